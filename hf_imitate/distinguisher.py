"""The human-or-imitator classifier: one logit per (question, answer), high means human; and how it is fitted."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from hf_imitate.batching import forward_cost, questions_together
from hf_imitate.checks import Check, check_names, check_outcomes
from hf_imitate.classifier import (
    adapter_config,
    classifier_around,
    is_classifier,
    load_body,
    new_head,
    without_dropout,
)
from hf_imitate.distinguisher_files import write_distinguisher
from hf_imitate.distinguisher_fit import FitReport, fit, mean_loss_and_accuracy
from hf_imitate.rendering import Answer, Rendered, Renderer, canonical_text, collate, end_token_ids
from hf_imitate.side_by_side import reads_side_by_side, side_by_side

__all__ = ["ADAPTER_NAME", "Distinguisher", "FitReport", "fit", "mean_loss_and_accuracy"]

ADAPTER_NAME = "distinguisher"


class Distinguisher:
    """Scores how human an answer to a question reads.

    The logit is the text's logit plus, for each check, a learned weight times (outcome - 1/2). The text's logit is
    read at the last token, so an answer that ended and one that was cut are told apart. Dropout is switched off for
    good. A plain callable with TRL's reward signature: `GRPOTrainer(reward_funcs=Distinguisher.from_pretrained(repo))`
    works.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A sequence classifier with one label; or, with `adapter_name`, a causal LM in PEFT that carries an adapter
            of that name beside the imitator's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        head (`torch.nn.Linear`, *optional*):
            The one-logit head of a shared base. A sequence classifier brings its own.
        adapter_name (`str`, *optional*):
            Name of the distinguisher's adapter on a shared base.
        checks (`Sequence[Callable]`, *optional*):
            Checks whose outcomes enter the logit, each with a weight that is learned and starts at 0.
        check_weights (`dict[str, float]`, *optional*):
            Trained weights by check name; the checks themselves may come later, by `set_checks`.
        max_answer_tokens (`int`, *optional*):
            Longest answer read, in tokens with the end token.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template.
        end_ids (`Sequence[int]`, *optional*):
            Every id that ends an answer; by default those of the model's generation config and the tokenizer.
        completion_role (`str`, *optional*, defaults to `"assistant"`):
            Whose turn a conversation's answer is, as in [`~hf_imitate.rendering.Renderer`].

    Raises:
        ValueError: the model has no head, or two checks share a name.
    """

    __name__ = "distinguisher"  # TRL names a reward's column by it

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: Any,
        *,
        head: nn.Linear | None = None,
        adapter_name: str | None = None,
        checks: Sequence[Check] = (),
        check_weights: dict[str, float] | None = None,
        max_answer_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        end_ids: Sequence[int] | None = None,
        completion_role: str = "assistant",
    ):
        self.model, self.tokenizer, self.adapter_name = model, tokenizer, adapter_name
        if adapter_name is None:
            without_dropout(model)
        core = self._core()
        head = getattr(core, "score", None) if adapter_name is None else head
        if head is None:
            raise ValueError(
                f"{type(core).__name__} has no `score` head. Pass a causal LM's repo id, or a model loaded by "
                "AutoModelForSequenceClassification with num_labels=1."
            )
        self.head: nn.Module = head
        ends = end_token_ids(tokenizer, getattr(core, "generation_config", None)) if end_ids is None else end_ids
        self.renderer = Renderer(tokenizer, ends, max_answer_tokens, chat_template_kwargs, completion_role)
        self.take_checks(checks, check_weights)
        self.autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        # The causal LM around the classifier's body, where somebody may still fit the body by likelihood.
        self.language_model: PreTrainedModel | None = None

    # --- how to make one

    @classmethod
    def on_shared_base(cls, model: PeftModel, tokenizer: Any, peft_config: PeftConfig, **kwargs) -> "Distinguisher":
        """A second adapter and a head on the imitator's own frozen base; flags and active adapter stay as they are."""
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.add_adapter(ADAPTER_NAME, adapter_config(peft_config, modules_to_save=None))
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        own = _adapter_parameters(model, ADAPTER_NAME)
        for parameter in own:
            parameter.requires_grad_(False)
        head = new_head(model.config.get_text_config().hidden_size, own[0].device)
        return cls(model, tokenizer, head=head, adapter_name=ADAPTER_NAME, **kwargs)

    @classmethod
    def from_causal_lm(
        cls,
        model: str | PreTrainedModel,
        tokenizer: Any = None,
        *,
        peft_config: PeftConfig | None = None,
        seed: int | None = 0,
        revision: str | None = None,
        keep_language_model: bool = False,
        **kwargs,
    ) -> "Distinguisher":
        """A separate classifier that starts from a language model's weights; the language model is left alone.

        Args:
            model: repo id, path, or a causal LM (copied).
            tokenizer: its tokenizer; loaded from the repo if `model` is a string.
            peft_config: adapter to train; `None` trains all weights.
            seed: seeds head and adapter; `None` leaves the global random state in charge.
            keep_language_model: keep, as `language_model`, the causal LM around the very body that classifies, so
                that likelihood can fit the body first ([`~hf_imitate.distinguisher_body.BodyLearner`]).
        """
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            if isinstance(model, str):
                loading = {"revision": revision, "trust_remote_code": False}
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **loading)
                source = load_body(model, dtype=torch.float32, **loading)
                classifier = source if is_classifier(source) else classifier_around(source)
                classifier.score = new_head(classifier.config.get_text_config().hidden_size, classifier.device)
            else:
                source = copy.deepcopy(model) if keep_language_model else model
                classifier = classifier_around(source, copy_body=source is model)
            classifier.requires_grad_(True)
            # A classifier's own pooling looks for the pad id; unequal to the end token, it finds the end marker.
            classifier.config.pad_token_id = tokenizer.pad_token_id
            if peft_config is not None:
                config = adapter_config(peft_config, task_type="SEQ_CLS", modules_to_save=["score"])
                classifier = get_peft_model(classifier, config)
        distinguisher = cls(classifier, tokenizer, **kwargs)
        distinguisher.language_model = source if keep_language_model and not is_classifier(source) else None
        return distinguisher

    @classmethod
    def from_pretrained(
        cls,
        repo: str | Path,
        checks: Sequence[Check] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        base: PeftModel | None = None,
        token: str | bool | None = None,
    ) -> "Distinguisher":
        """Load from an imitator's repo (its `distinguisher/` folder) or from such a folder itself.

        Args:
            repo: Hub repo id or local path.
            checks: the checks it was trained with, needed to score with more than the text.
            device: where to put it; with a shared base, where that is.
            dtype: of the base's weights; fp32 by default. With a shared base, the base's own.
            revision, token: of the repo on the Hub; the token is its base's, too.
            base: an imitator in PEFT that is already loaded. Where the distinguisher is an adapter for the very same
                base, it is put beside the imitator's, and no second base is loaded; else `base` is left alone.

        Raises:
            FileNotFoundError: there is no distinguisher there.
            ValueError: `checks` are not those it was trained with.
        """
        # Here, since the other kinds of distinguisher are made of this one.
        from hf_imitate.distinguisher_loading import load_distinguisher

        return load_distinguisher(repo, checks, device, dtype, revision, base, token)

    def take_checks(self, checks: Sequence[Check], check_weights: dict[str, float] | None) -> None:
        """Begin with these checks, and with the weights given by name or else 0."""
        weights = dict.fromkeys(check_names(checks), 0.0) if check_weights is None else check_weights
        self.checks, self.check_names = tuple(checks), tuple(weights)
        start = torch.tensor(list(weights.values()), dtype=torch.float32, device=self.device)
        self.check_weights = nn.Parameter(start)

    def set_checks(self, checks: Sequence[Check]) -> None:
        """Score with these checks: the ones it was trained with, or, if it had none, new ones at weight 0.

        Raises:
            ValueError: it was trained with other checks.
        """
        names = check_names(checks)
        if self.check_names and set(names) != set(self.check_names):
            raise ValueError(
                f"This distinguisher was trained with the checks {sorted(self.check_names)}; got {sorted(names)}. "
                "Pass the same checks."
            )
        by_name = dict(zip(names, checks, strict=True))
        if not self.check_names:
            self.check_names = names
            self.check_weights = nn.Parameter(torch.zeros(len(names), device=self.device))
        self.checks = tuple(by_name[name] for name in self.check_names)

    def place(self, device: torch.device, autocast: Callable, gradient_checkpointing: bool) -> None:
        """Make ready for training on `device` under `autocast`; a shared base is its owner's to place."""
        self.autocast = autocast
        if self.language_model is not None:
            self.language_model.to(device)
        if self.adapter_name is None:
            self.model.to(device)
            if gradient_checkpointing:
                self.model.train()
                # Its name until transformers 5.19 or so; later versions warn of it.
                enable = getattr(self.model, "activation_checkpointing_enable", None)
                (enable or self.model.gradient_checkpointing_enable)()
                self.model.enable_input_require_grads()
        self.head.to(device)
        self.check_weights.data = self.check_weights.data.to(device)

    # --- scoring

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    def encode(self, prompts: Sequence[str | list], answers: Sequence[Answer]) -> list[Rendered]:
        """Token ids the classifier reads. Both sides come this way, and leave the same spelling behind."""
        conversational = not isinstance(prompts[0], str)
        texts = [canonical_text(answer.text).lstrip() for answer in answers]
        rows = self.renderer.answer_ids(texts, [answer.ended for answer in answers], conversational)
        return [row._replace(prompt_ids=p) for row, p in zip(rows, self.renderer.prompt_ids(prompts), strict=True)]

    def size(self, row: Rendered) -> int:
        """Tokens of a rendered text: what decides which rows share a forward."""
        return len(row.prompt_ids) + len(row.answer_ids)

    @property
    def forward_cost(self) -> float:
        """What a forward of its own is worth, see [`~hf_imitate.batching.forward_cost`]."""
        return forward_cost(self.device, is_padded=not reads_side_by_side(self._core().base_model))

    def text_logits(self, rows: Sequence[Rendered]) -> Tensor:
        """Logit of each rendered text. [N], fp32. The gradient reaches whatever is trainable just now."""
        with self.autocast():
            pooled = self._last_states(rows)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.to(next(self.head.parameters()).dtype)).squeeze(1).float()

    def _last_states(self, rows: Sequence[Rendered]) -> Tensor:
        """The body's states at each text's last token; questions with several answers are read once. [N, H]."""
        body, pad = self._core().base_model, self.tokenizer.pad_token_id or 0
        before, after = [row.prompt_ids for row in rows], [row.answer_ids for row in rows]
        shared = side_by_side(body, before, after, pad) if all(before) and all(after) else None
        if shared is not None:
            laid, order = shared
            states = body(**laid.inputs(body), use_cache=False).last_hidden_state
            pooled = states[laid.row, laid.start + laid.length - 1]
            return pooled[torch.tensor(order, device=pooled.device).argsort()]
        batch = collate(rows, pad, self.device)
        seen = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        last = batch.attention_mask.sum(dim=1) - 1
        return seen.last_hidden_state[torch.arange(len(rows), device=last.device), last]

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str | list],
        answers: Sequence[Answer],
        outcomes: Tensor | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Logit of each answer, without gradient.

        Args:
            prompts: questions. N of them.
            answers: one answer to each.
            outcomes: outcomes of the checks in [0, 1], NaN where one does not apply. [N, C]; `None` scores the text
                alone.

        Returns:
            Logits, [N], fp32, in the given order; independent of the batch an answer happens to be in.
        """
        if not prompts:
            return torch.zeros(0, device=self.device)
        rows = self.encode(prompts, answers)
        order = questions_together([str(prompt) for prompt in prompts], [self.size(row) for row in rows])
        logits = torch.empty(len(rows), device=self.device)
        with self.active():
            for start in range(0, len(rows), batch_size):
                chunk = order[start : start + batch_size]
                logits[chunk] = self.text_logits([rows[i] for i in chunk])
        if outcomes is not None and self.check_names:
            logits = logits + self.check_logits(outcomes.to(self.device))
        return logits

    def check_logits(self, outcomes: Tensor) -> Tensor:
        """What the checks add to the logit: sum of weight * (outcome - 1/2), 0 where one does not apply. [..., C]."""
        return (torch.nan_to_num(outcomes - 0.5, nan=0.0) * self.check_weights).sum(dim=-1)

    def __call__(self, prompts: list, completions: list, completion_ids: list | None = None, **columns) -> list[float]:
        """TRL's reward signature.

        Whether an answer ended is read from `completion_ids` where given, which takes a policy with this
        distinguisher's tokenizer: it did if one of its ids is an end token. Without ids every answer counts as ended.

        Raises:
            ValueError: it was trained with checks and has none.
        """
        if not prompts:
            return []
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        ended = [True] * len(texts)
        if completion_ids is not None:
            ended = [not set(self.renderer.end_token_ids).isdisjoint(ids) for ids in completion_ids]
        outcomes = None
        if self.check_names:
            if not self.checks:
                raise ValueError(
                    f"This distinguisher was trained with the checks {list(self.check_names)}. Pass them to "
                    "`Distinguisher.from_pretrained(..., checks=[...])`."
                )
            outcomes = check_outcomes(self.checks, prompts, self.renderer.tidy(completions), completion_ids, **columns)
        return self.score(prompts, [Answer(*pair) for pair in zip(texts, ended, strict=True)], outcomes).tolist()

    # --- training and saving

    def _core(self) -> PreTrainedModel:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The classifier's own parameters, without the check weights; the same in every phase of training."""
        if self.adapter_name is not None:
            return [*_adapter_parameters(self.model, self.adapter_name), *self.head.parameters()]
        if isinstance(self.model, PeftModel):
            names = ("lora_", "modules_to_save.")
            return [p for n, p in self.model.named_parameters() if p.requires_grad or any(key in n for key in names)]
        return list(self.model.parameters())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What learns at which rate, as an optimizer takes it; without the check weights."""
        return [{"params": self.trainable_parameters(), "lr": learning_rate}]

    @property
    def bodies(self) -> list["Distinguisher"]:
        """Whose body likelihood may fit: itself, if it has its language model's head."""
        return [] if self.language_model is None else [self]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Switch a shared base to the distinguisher's adapter, and back with every flag as it was.

        Forward, backward and step of one update all happen inside: with gradient checkpointing a switch between
        forward and backward would recompute the forward under the wrong adapter. Inside another, it does nothing.
        """
        if self.adapter_name is None or self.model.active_adapter == self.adapter_name:
            yield
            return
        flags, previous = [(p, p.requires_grad) for p in self.model.parameters()], self.model.active_adapter
        try:
            self.model.set_adapter(self.adapter_name)
            yield
        finally:
            self.model.set_adapter(previous)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def speak_as(self, completion_role: str) -> None:
        """Read answers as that role's turns."""
        self.renderer.completion_role = completion_role

    def published_models(self) -> tuple[nn.Module, ...]:
        """The models that are saved."""
        return (self.model,)

    def save_beside(self, folder: Path, tokenizer: Any) -> None:
        """Write it into the repo of an imitator with this tokenizer; another one it brings along."""
        self.save_pretrained(folder, with_tokenizer=self.tokenizer is not tokenizer)

    def save_pretrained(self, folder: str | Path, with_tokenizer: bool = True) -> None:
        """Write adapter and head (PEFT, SEQ_CLS, one label) or full weights, and `checks.json`."""
        write_distinguisher(self, Path(folder), with_tokenizer)


def _adapter_parameters(model: PeftModel, adapter_name: str) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if adapter_name in name.split(".")]
