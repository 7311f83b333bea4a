"""A cheap distinguisher: logistic on hashed n-grams of the answer, its length and its overlap with the question."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_imitate.batching import forward_cost
from hf_imitate.checks import Check
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.distinguisher_files import NGRAM, write_settings
from hf_imitate.ngram_features import NUM_FEATURES, ngram_features
from hf_imitate.rendering import Answer, Renderer, canonical_text

WEIGHTS_FILE = "ngram.safetensors"
# Of features whose blocks have norm 1. On real docstrings one pass over 3 000 pairs came within a point of
# scikit-learn's best logistic regression on the same pairs (.73 against .74 of held-out pairs).
NGRAM_LEARNING_RATE = 5.0
_NO_ADAPTATION = 1.0  # AdamW's epsilon, far above any gradient here: what is left is plain gradient descent


class NgramRow(NamedTuple):
    """Features of one answer: where they are and what they are. Both as long as there are features."""

    indices: np.ndarray
    values: np.ndarray


class NgramModel(nn.Module):
    """One weight per feature, all 0 at first: it then says nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_FEATURES))

    def forward(self, indices: Tensor, values: Tensor, starts: Tensor) -> Tensor:
        """Logit of each answer: the sum of weight times value over its features, which begin at `starts`. [N]."""
        bag = nn.functional.embedding_bag(indices, self.weight[:, None], starts, per_sample_weights=values, mode="sum")
        return bag.squeeze(1)


class NgramDistinguisher(Distinguisher):
    """A [`Distinguisher`] that needs no language model, knows no grammar, and costs next to nothing.

    It learns on pairs as the others do, by the same loss, by plain gradient steps at a rate of its own (the game's is
    that of an adapter). See [`~hf_imitate.ngram_features.ngram_features`] for what it sees.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The imitator's: where an answer is cut, and whether it ended, is told by its tokens.
        end_ids (`Sequence[int]`): every id that ends an answer.
        checks, check_weights, max_answer_tokens, chat_template_kwargs, completion_role: as in [`Distinguisher`].
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int],
        *,
        checks: Sequence[Check] = (),
        check_weights: dict[str, float] | None = None,
        max_answer_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        completion_role: str = "assistant",
    ):
        self.model, self.tokenizer, self.adapter_name = NgramModel(), tokenizer, None
        self.renderer = Renderer(tokenizer, end_ids, max_answer_tokens, chat_template_kwargs, completion_role)
        self.autocast = contextlib.nullcontext
        self.language_model = None
        self.take_checks(checks, check_weights)

    def encode(self, prompts: Sequence[str | list], answers: Sequence[Answer]) -> list[Any]:
        """Features of each answer, cut where the imitator's are. Both sides leave the same spelling behind."""
        texts = [canonical_text(answer.text).lstrip() for answer in answers]
        shown = [Answer(text, answer.ended) for text, answer in zip(texts, answers, strict=True)]
        if self.renderer.max_answer_tokens is not None:
            rows = self.renderer.answer_ids(texts, [answer.ended for answer in answers])
            shown = [
                one if row.ended else self.renderer.read(row.answer_ids) for one, row in zip(shown, rows, strict=True)
            ]
        found = ngram_features(prompts, shown)
        bounds = list(zip(found.indptr[:-1], found.indptr[1:], strict=True))
        return [NgramRow(found.indices[start:stop], found.data[start:stop]) for start, stop in bounds]

    def size(self, row: Any) -> int:
        """Features of a row: what decides which rows share a forward."""
        return len(row.indices)

    @property
    def forward_cost(self) -> float:
        """Features are never padded."""
        return forward_cost(self.device, is_padded=False)

    def text_logits(self, rows: Sequence[Any]) -> Tensor:
        """Logit of each answer's features. [N], fp32."""
        starts = np.cumsum([0, *(len(row.indices) for row in rows[:-1])])
        parts = (np.concatenate([row.indices for row in rows]), np.concatenate([row.values for row in rows]), starts)
        indices, values, offsets = (torch.from_numpy(part).to(self.device) for part in parts)
        return self.model(indices.long(), values, offsets.long())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The weights of the features."""
        return list(self.model.parameters())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Its own rate, whatever the others' is."""
        return [{"params": self.trainable_parameters(), "lr": NGRAM_LEARNING_RATE, "eps": _NO_ADAPTATION}]

    def place(self, device: torch.device, autocast: Callable, gradient_checkpointing: bool) -> None:
        """Move to `device`; in a sum of a few hundred terms there is nothing to gain from `autocast`."""
        self.move(device)

    def move(self, device: str | torch.device | None) -> None:
        """Move to `device`; `None` stays."""
        if device is not None:
            self.model.to(device)
            self.check_weights.data = self.check_weights.data.to(device)

    def published_models(self) -> tuple[nn.Module, ...]:
        """None that has a base."""
        return ()

    def save_pretrained(self, folder: str | Path, with_tokenizer: bool = True) -> None:
        """Write `ngram.safetensors` and `checks.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": self.model.weight.detach().cpu().contiguous()}, folder / WEIGHTS_FILE)
        if with_tokenizer:
            self.tokenizer.save_pretrained(str(folder))
        write_settings(self, folder, kind=NGRAM)

    @classmethod
    def load(cls, folder: Path, tokenizer: Any, settings: dict[str, Any]) -> "NgramDistinguisher":
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: the weights are those of other features.
        """
        distinguisher = cls(tokenizer, **settings)
        weight = load_file(folder / WEIGHTS_FILE).get("weight", torch.zeros(0))
        if weight.shape != distinguisher.model.weight.shape:
            raise ValueError(
                f"{folder / WEIGHTS_FILE} holds {weight.numel()} weights for {NUM_FEATURES} features; it was written "
                "by another version of hf-imitate. Load it there, or train it anew."
            )
        if not weight.isfinite().all():
            raise ValueError(f"{folder / WEIGHTS_FILE} holds numbers that are none. Train it anew.")
        distinguisher.model.load_state_dict({"weight": weight})
        distinguisher.model.requires_grad_(False)
        return distinguisher
