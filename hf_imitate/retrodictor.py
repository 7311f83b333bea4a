"""Who thinks before the answer and who thinks after it: the imitator, and the retrodictor that has seen the answer."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_imitate.classifier import adapter_config, without_dropout
from hf_imitate.latent_draws import Continuation, Drawn, draw_thoughts, sequence_log_probs
from hf_imitate.rendering import Rendered
from hf_imitate.sampling import GumbelSampler
from hf_imitate.sparing_head import SparingHead
from hf_imitate.thoughts import ThoughtLaw, hindsight_ids

RETRODICTOR = "retrodictor"  # the adapter's name, and its folder's


class Retrodictor:
    """The law q(thought given question and answer): an adapter on the imitator's base, or on a frozen copy of it.

    Args:
        model ([`~peft.PeftModel`]): carries the adapter.
        adapter_name (`str`, *optional*):
            Its name on the imitator's own base; `None` where the model is the retrodictor's alone.
    """

    def __init__(self, model: PeftModel, adapter_name: str | None = None):
        self.model, self.adapter_name = model, adapter_name

    @classmethod
    def on_shared_base(cls, model: PeftModel, config: PeftConfig, seed: int = 0) -> "Retrodictor":
        """A second adapter on the imitator's base; flags and active adapter stay as they are.

        Raises:
            ValueError: the two would share a trained parameter, so the imitator's gradient would not be that of its
                bound; or they are not both LoRA.
        """
        configs = [config, *model.peft_config.values()]
        if not all(isinstance(one, LoraConfig) for one in configs):
            raise ValueError(
                "Imitator and retrodictor are two LoRA adapters on one base; got "
                f"{[one.peft_type for one in configs]}. Use LoraConfig, or train all weights."
            )
        check_no_shared_parameter(model)
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.add_adapter(RETRODICTOR, _own_config(config))
        made = cls(model, RETRODICTOR)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter in made.parameters():
            parameter.requires_grad_(False)
        without_dropout(model)
        return made

    @classmethod
    def on_copy(cls, model: PreTrainedModel, config: PeftConfig, seed: int = 0) -> "Retrodictor":
        """An adapter on a frozen copy of the model as it is now."""
        copied = copy.deepcopy(model)
        # TRL puts a forward of its own on the model object, and a copy of it would go on computing with the original.
        vars(copied).pop("forward", None)
        copied.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(without_dropout(get_peft_model(copied, _own_config(config))))

    def parameters(self) -> list[nn.Parameter]:
        """What of it is trained."""
        name = self.adapter_name or "default"
        return [parameter for key, parameter in self.model.named_parameters() if name in key.split(".")]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Switch a shared base to the retrodictor, and back with every flag as it was.

        Forward and backward happen inside: with gradient checkpointing a switch in between would recompute the forward
        under the wrong adapter.
        """
        if self.adapter_name is None:
            yield
            return
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        previous = self.model.active_adapter
        self.model.set_adapter(self.adapter_name)
        try:
            yield
        finally:
            self.model.set_adapter(previous)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a retrodictor that has a base of its own: an adapter, or merged weights where the base has no name.

        One on a shared base is written with the imitator, by PEFT.
        """
        model: Any = self.model
        if not model.peft_config["default"].base_model_name_or_path:
            # An adapter on a base that exists nowhere but in memory could not be loaded again.
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(str(folder))
        (Path(folder) / "README.md").unlink(missing_ok=True)


def check_no_shared_parameter(model: PeftModel) -> None:
    """Raise `ValueError` where the imitator trains something that every adapter on its base reads."""
    name = model.active_adapter
    shared = [key for key, p in model.named_parameters() if p.requires_grad and name not in key.split(".")]
    if shared:
        raise ValueError(
            f"The imitator trains {len(shared)} weights of the shared base, such as `{shared[0]}`. The retrodictor "
            "would change with each of its steps, and the gradient would not be that of the bound. Freeze them "
            "(`bias='none'` in LoraConfig), or train all weights, without a `peft_config`."
        )


def _own_config(config: PeftConfig) -> PeftConfig:
    own = adapter_config(config, modules_to_save=None, task_type="CAUSAL_LM")
    if isinstance(own, LoraConfig):
        own.bias, own.trainable_token_indices = "none", None
        # Others ("pissa", "olora") move a part of the base's weights into the adapter: the imitator's base, too.
        own.init_lora_weights = True
    return own


@dataclass
class Thinkers:
    """Imitator and retrodictor under one law of thoughts.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the imitator; its adapter is active.
        law ([`~hf_imitate.thoughts.ThoughtLaw`]): of the thoughts of both.
        retrodictor ([`Retrodictor`], *optional*): without one, thoughts come from the imitator itself.
        end_token_ids (`list[int]`): end an answer.
        pad_token_id (`int`): fills.
        bos_token_id (`int`, *optional*): starts a text.
        max_rows (`int`): most sequences in one forward without gradient.
        positions (`int`, *optional*): most tokens that the model can read at once.
    """

    model: Any
    law: ThoughtLaw
    retrodictor: Retrodictor | None
    end_token_ids: list[int]
    pad_token_id: int
    bos_token_id: int | None = None
    max_rows: int = 64
    positions: int | None = None
    _heads: dict[int, SparingHead | None] = field(default_factory=dict, init=False, repr=False)

    def opened(self, row: Rendered) -> list[int]:
        """What the imitator reads before it thinks."""
        return self.law.opened(row.prompt_ids)

    def in_hindsight(self, row: Rendered) -> list[int]:
        """What the retrodictor reads before it thinks."""
        return self.law.opened(hindsight_ids(row.prompt_ids, row.answer_ids, self.bos_token_id))

    def forward_rows(self, row: Rendered, thoughts: Sequence[Sequence[int]]) -> list[Continuation]:
        """Each thought with the row's answer after it, as the imitator is scored."""
        before = self.opened(row)
        return [Continuation(before, self.law.join(thought, row.answer_ids)) for thought in thoughts]

    def hindsight_rows(self, row: Rendered, thoughts: Sequence[Sequence[int]]) -> list[Continuation]:
        """Each thought, as the retrodictor is scored."""
        before = self.in_hindsight(row)
        return [Continuation(before, self.law.join(thought)) for thought in thoughts]

    def think(self, rows: Sequence[Rendered], keys: Sequence[Sequence[bytes]]) -> list[list[Drawn]]:
        """Thoughts behind each row's answer, one for each of its keys; the retrodictor's, where there is one."""
        retrodictor = self.retrodictor
        prompts = [self.opened(row) if retrodictor is None else self.in_hindsight(row) for row in rows]
        context = contextlib.nullcontext() if retrodictor is None else retrodictor.active()
        with context:
            drawn = self._draw(self.model if retrodictor is None else retrodictor.model, prompts, keys)
        return _nested(drawn, keys)

    def dream(
        self,
        rows: Sequence[Rendered],
        keys: Sequence[Sequence[bytes]],
        max_answer_tokens: int,
        temperature: float = 1.0,
        make_sampler: Callable[..., GumbelSampler] = GumbelSampler,
    ) -> list[list[Drawn]]:
        """Thoughts and answers of the imitator's own to each row's question, one for each of its keys."""
        prompts = [self.opened(row) for row in rows]
        return _nested(self._draw(self.model, prompts, keys, max_answer_tokens, temperature, make_sampler), keys)

    @torch.no_grad()
    def log_weights(
        self, rows: Sequence[Rendered], keys: Sequence[Sequence[bytes]], temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, list[list[Drawn]]]:
        """Log p of each thought and answer together, log q of the thought as it was drawn, nats, and the thoughts.

        Every row has equally many keys. [N, K] and [N, K], fp64, on the CPU.
        """
        drawn = self.think(rows, keys)
        sequences = [
            one
            for row, thoughts in zip(rows, drawn, strict=True)
            for one in self.forward_rows(row, [d.thought_ids for d in thoughts])
        ]
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].prompt_ids) - len(sequences[i].ids))
        log_p = torch.zeros(len(sequences), dtype=torch.float64)
        for first in range(0, len(order), self.max_rows):
            chunk = order[first : first + self.max_rows]
            scored = self.score(self.model, [sequences[i] for i in chunk], temperature)
            log_p[chunk] = sum(part.double().cpu() for part in scored)
        log_q = torch.tensor([[d.log_prob_thought for d in thoughts] for thoughts in drawn], dtype=torch.float64)
        return log_p.reshape(log_q.shape), log_q, drawn

    def score(self, model: Any, rows: Sequence[Continuation], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities of thoughts and of answers, see [`~hf_imitate.latent_draws.sequence_log_probs`].

        `model` is the imitator, perhaps wrapped, or the retrodictor's.
        """
        own = self.model if self.retrodictor is None or model is not self.retrodictor.model else model
        if id(own) not in self._heads:
            self._heads[id(own)] = SparingHead.of(own)
        return sequence_log_probs(
            *(model, self.law, rows, self.pad_token_id, self.model.device, temperature, self._heads[id(own)])
        )

    def _draw(
        self, model, prompts, keys, max_answer_tokens: int = 0, temperature: float = 1.0, make_sampler=GumbelSampler
    ) -> list[Drawn]:
        each = [prompt for prompt, own in zip(prompts, keys, strict=True) for _ in own]
        flat = [key for own in keys for key in own]
        return draw_thoughts(
            *(model, self.law, each, flat, self.end_token_ids, self.pad_token_id),
            max_answer_tokens=max_answer_tokens,
            temperature=temperature,
            max_rows=self.max_rows,
            make_sampler=make_sampler,
        )

    def longest(self, row: Rendered) -> int:
        """Most tokens that the model will have to read at once for this row."""
        own = self.law.max_length + len(self.law.delimiter_ids)
        hindsight = len(self.in_hindsight(row)) + own if self.retrodictor is not None else 0
        return max(self.longest_forward(row), hindsight)

    def longest_forward(self, row: Rendered) -> int:
        """Of these, what the imitator reads."""
        own = self.law.max_length + len(self.law.delimiter_ids)
        return len(self.opened(row)) + own + len(row.answer_ids)

    def longest_answer(self, row: Rendered, limit: int) -> int:
        """Most tokens, up to `limit`, of an answer of the imitator's own for which the model still has positions."""
        if self.positions is None:
            return limit
        return min(limit, self.positions - self.longest(row._replace(answer_ids=[])))


def _nested(drawn: Sequence[Drawn], keys: Sequence[Sequence[bytes]]) -> list[list[Drawn]]:
    flat = iter(drawn)
    return [[next(flat) for _ in own] for own in keys]
