"""The human-or-imitator classifier: one logit per (question, answer), high means human; and how it is fitted."""

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hf_imitate.checks import Check, check_name, check_outcomes
from hf_imitate.classifier import classifier_with_body_of, distinguisher_folder, new_head
from hf_imitate.losses import DISTINGUISHER_LOSSES, paired_wins
from hf_imitate.pairs import Learner, Logits, Pair
from hf_imitate.plateau import Plateau
from hf_imitate.rendering import Answer, Rendered, Renderer, canonical_text, collate, end_token_ids

logger = logging.getLogger(__name__)

ADAPTER_NAME = "distinguisher"


class Distinguisher:
    """Scores how human an answer to a question reads.

    The logit is the text's logit plus, for each check, a learned weight times (outcome - 1/2). The text's logit is read
    at the last token, so an answer that ended and one that was cut are told apart. A plain callable with TRL's reward
    signature: `GRPOTrainer(reward_funcs=Distinguisher.from_pretrained(repo))` works.

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
            Trained weights by check name.
        max_answer_tokens (`int`, *optional*):
            Longest answer read, in tokens with the end token.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template.
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
    ):
        self.model, self.tokenizer, self.adapter_name, self.checks = model, tokenizer, adapter_name, tuple(checks)
        core = self._core()
        if adapter_name is None:
            head = getattr(core, "score", None)
            if head is None:
                raise ValueError(
                    f"{type(core).__name__} has no `score` head. Pass a causal LM's repo id, or a model loaded by "
                    "AutoModelForSequenceClassification with num_labels=1."
                )
        self.head = head
        ends = end_token_ids(tokenizer, getattr(core, "generation_config", None))
        self.renderer = Renderer(tokenizer, ends, max_answer_tokens, chat_template_kwargs)
        weights = {check_name(check): 0.0 for check in checks} if check_weights is None else check_weights
        self.check_names = tuple(weights)
        self.check_weights = nn.Parameter(torch.tensor(list(weights.values()), dtype=torch.float32))
        self.check_weights.data = self.check_weights.data.to(self.device)
        self.autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    # --- how to make one

    @classmethod
    def on_shared_base(cls, model: PeftModel, tokenizer: Any, peft_config: PeftConfig, **kwargs) -> "Distinguisher":
        """A second adapter and a head on the imitator's own frozen base."""
        config = copy.deepcopy(peft_config)
        config.modules_to_save, config.inference_mode = None, False
        if isinstance(config, LoraConfig):
            config.lora_dropout = 0.0
        model.add_adapter(ADAPTER_NAME, config)
        for name, parameter in model.named_parameters():
            if f".{ADAPTER_NAME}." in name:
                parameter.requires_grad_(False)
        reference = next(p for n, p in model.named_parameters() if f".{ADAPTER_NAME}." in n)
        head = new_head(model.config.get_text_config().hidden_size, reference.device)
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
        **kwargs,
    ) -> "Distinguisher":
        """A separate classifier that starts from a language model's weights; the language model is left alone.

        Args:
            model: repo id, path, or a causal LM (copied).
            tokenizer: its tokenizer; loaded from the repo if `model` is a string.
            peft_config: adapter to train; `None` trains all weights.
            seed: seeds head and adapter; `None` leaves the global random state in charge.
        """
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            if isinstance(model, str):
                loading = {"revision": revision, "trust_remote_code": False}
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **loading)
                classifier = AutoModelForSequenceClassification.from_pretrained(
                    model, num_labels=1, dtype=torch.float32, **loading
                )
            else:
                classifier = classifier_with_body_of(model)
            if getattr(classifier, "score", None) is not None:
                classifier.score = new_head(classifier.config.get_text_config().hidden_size, classifier.device)
            # A classifier's own pooling looks for the pad id; unequal to the end token, it finds the end marker.
            classifier.config.pad_token_id = tokenizer.pad_token_id
            if peft_config is not None:
                config = copy.deepcopy(peft_config)
                config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
                if isinstance(config, LoraConfig):
                    config.lora_dropout = 0.0
                classifier = get_peft_model(classifier, config)
        return cls(classifier, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        repo: str | Path,
        checks: Sequence[Check] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "Distinguisher":
        """Load from an imitator's repo (its `distinguisher/` folder) or from such a folder itself.

        Args:
            repo: Hub repo id or local path.
            checks: the checks it was trained with, needed to score with more than the text.

        Raises:
            FileNotFoundError: there is no distinguisher there.
            ValueError: `checks` are not those it was trained with.
        """
        folder, root = distinguisher_folder(repo, revision)
        stored = json.loads((folder / "checks.json").read_text(encoding="utf-8"))
        loading = {"trust_remote_code": False, "use_safetensors": True, "dtype": dtype or torch.float32}
        if (folder / "adapter_config.json").exists():
            config = PeftConfig.from_pretrained(str(folder))
            base = AutoModelForSequenceClassification.from_pretrained(
                config.base_model_name_or_path, num_labels=1, revision=config.revision, **loading
            )
            model = PeftModel.from_pretrained(base, str(folder))
        else:
            model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=1, **loading)
        tokenizer_folder = folder if (folder / "tokenizer_config.json").exists() else root
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), trust_remote_code=False)
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        core.config.pad_token_id = tokenizer.pad_token_id
        if device is not None:
            model.to(device)
        model.eval().requires_grad_(False)
        distinguisher = cls(
            model,
            tokenizer,
            check_weights=stored["checks"],
            max_answer_tokens=stored["max_answer_tokens"],
            chat_template_kwargs=stored["chat_template_kwargs"],
        )
        if checks:
            distinguisher.set_checks(checks)
        distinguisher.renderer.end_token_ids = stored["end_token_ids"]
        return distinguisher

    def set_checks(self, checks: Sequence[Check]) -> None:
        """Score with these checks: the ones it was trained with, or, if it had none, new ones at weight 0.

        Raises:
            ValueError: it was trained with other checks.
        """
        names = tuple(check_name(check) for check in checks)
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
        if self.adapter_name is None:
            self.model.to(device)
            if gradient_checkpointing:
                self.model.gradient_checkpointing_enable()
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

    def text_logits(self, rows: Sequence[Rendered]) -> Tensor:
        """Logit of each rendered text. [N], fp32. The gradient reaches whatever is trainable just now."""
        with self.autocast():
            batch = collate(rows, self.tokenizer.pad_token_id or 0, self.device)
            hidden = (
                self._core()
                .base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                .last_hidden_state
            )
        last = batch.attention_mask.sum(dim=1) - 1
        pooled = hidden[torch.arange(len(rows), device=hidden.device), last].float()
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled).squeeze(1).float()

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
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids) + len(rows[i].answer_ids))
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
        """TRL's reward signature. Whether an answer ended is read from `completion_ids`, where given."""
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        ends = self.renderer.end_token_ids
        ended = [True] * len(texts) if completion_ids is None else [ids[-1] in ends for ids in completion_ids]
        outcomes = None
        if self.check_names:
            if not self.checks:
                raise ValueError(
                    f"This distinguisher was trained with the checks {list(self.check_names)}. Pass them to "
                    "`Distinguisher.from_pretrained(..., checks=[...])`."
                )
            outcomes = check_outcomes(self.checks, prompts, completions, completion_ids, **columns)
        return self.score(prompts, [Answer(*pair) for pair in zip(texts, ended, strict=True)], outcomes).tolist()

    # --- training and saving

    def _core(self) -> PreTrainedModel:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The classifier's own parameters, without the check weights; the same in every phase of training."""
        if self.adapter_name is not None:
            adapter = [p for n, p in self.model.named_parameters() if f".{self.adapter_name}." in n]
            return [*adapter, *self.head.parameters()]
        if isinstance(self.model, PeftModel):
            names = ("lora_", "modules_to_save.")
            return [p for n, p in self.model.named_parameters() if p.requires_grad or any(key in n for key in names)]
        return list(self.model.parameters())

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Switch a shared base to the distinguisher's adapter, and back with every flag as it was.

        Forward, backward and step of one update all happen inside: with gradient checkpointing a switch between
        forward and backward would recompute the forward under the wrong adapter.
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

    def save_pretrained(self, folder: str | Path, with_tokenizer: bool = True) -> None:
        """Write adapter and head (PEFT, SEQ_CLS, one label) or full weights, and `checks.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter_name is not None:
            state = get_peft_model_state_dict(self.model, adapter_name=self.adapter_name, save_embedding_layers=False)
            state["base_model.model.score.weight"] = self.head.weight
            config = copy.deepcopy(self.model.peft_config[self.adapter_name])
            config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], True
            config.base_model_name_or_path = self.model.peft_config["default"].base_model_name_or_path
            config.save_pretrained(str(folder))
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        elif isinstance(self.model, PeftModel) and not self.model.peft_config["default"].base_model_name_or_path:
            # An adapter on a base that exists nowhere but in memory could not be loaded again.
            copy.deepcopy(self.model).merge_and_unload().save_pretrained(folder)
        else:
            self.model.save_pretrained(str(folder))
            (folder / "README.md").unlink(missing_ok=True)
        if with_tokenizer:
            self.tokenizer.save_pretrained(str(folder))
        stored = {
            "version": 1,
            "checks": dict(zip(self.check_names, self.check_weights.tolist(), strict=True)),
            "max_answer_tokens": self.renderer.max_answer_tokens,
            "end_token_ids": self.renderer.end_token_ids,
            "chat_template_kwargs": self.renderer.chat_template_kwargs,
        }
        (folder / "checks.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


class FitReport(NamedTuple):
    """How a fit went: updates made, and loss (nats per comparison) and paired accuracy on the held-out pairs where
    the kept weights were best; NaN without held-out pairs."""

    num_steps: int
    heldout_loss: float
    heldout_accuracy: float


def mean_loss_and_accuracy(logits: Sequence[Logits], loss: str) -> tuple[float, float]:
    """Mean loss (nats) and paired accuracy (ties 1/2) over all comparisons; NaN if there are none."""
    if not logits:
        return float("nan"), float("nan")
    human, imitator = (torch.cat([pair[side] for pair in logits]) for side in (0, 1))
    return DISTINGUISHER_LOSSES[loss](human, imitator).mean().item(), paired_wins(human, imitator).mean().item()


def fit(
    distinguisher: Distinguisher,
    pairs: Sequence[Pair],
    heldout_pairs: Sequence[Pair] = (),
    *,
    num_steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    loss: str = "bradley_terry",
    patience: int = 5,
    eval_every: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> FitReport:
    """Fit a distinguisher to pairs, and keep the weights that were best on held-out pairs.

    Args:
        distinguisher: what is fitted, in place.
        pairs: training pairs.
        heldout_pairs: pairs it never trains on; they decide when to stop and which weights are kept.
        num_steps: most updates; the learning rate falls linearly to 0 over them.
        batch_size: pairs in an update.
        loss: "bradley_terry" or "bce".
        patience: readings without improvement, `eval_every` updates apart, that end the fit.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("`fit` needs at least one pair of a human's and an imitator's answer; got none.")
    learner = Learner(distinguisher, learning_rate, loss=loss)
    order = np.random.default_rng(seed)
    plateau, best, best_accuracy = Plateau(patience), None, float("nan")
    queue: list[int] = []
    step = 0
    for step in tqdm(range(1, num_steps + 1), desc="distinguisher", disable=not progress, leave=False):
        while len(queue) < batch_size:
            queue += order.permutation(len(pairs)).tolist()
        batch, queue = queue[:batch_size], queue[batch_size:]
        learner.step([pairs[i] for i in batch], lr_scale=1 - (step - 1) / num_steps)
        if heldout_pairs and (step % eval_every == 0 or step == num_steps):
            value, accuracy = mean_loss_and_accuracy(learner.score(heldout_pairs), loss)
            if plateau.update(value):
                best, best_accuracy = [p.detach().clone() for p in learner.parameters], accuracy
            if plateau.is_reached:
                break
    if best is not None:
        with torch.no_grad():
            for parameter, value in zip(learner.parameters, best, strict=True):
                parameter.copy_(value)
    return FitReport(step, plateau.best if heldout_pairs else float("nan"), best_accuracy)
