"""A padded batch read as several of similar length, where their padding would cost more than another forward."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_imitate.batching import similar_lengths
from hf_imitate.trainers.questions_read_once import READ, is_padded_text

_PER_TOKEN = ("log_probs", "entropy", "is_top1", "label_mask")


class RowsByLength:
    """A model that, asked under TRL's fused head for a right-padded batch, reads rows of similar length together.

    The values are the same but for rounding. Asked for more than text, it is the model itself.

    Args:
        model ([`~torch.nn.Module`]): with TRL's fused head; it may be wrapped.
        per_forward (`float`): what a forward costs, in padded tokens ([`~hf_imitate.batching.forward_cost`]); infinite
            where processes wait for each other in every forward.
    """

    def __init__(self, model: nn.Module, per_forward: float):
        self.model, self.per_forward = model, per_forward

    def __call__(self, **inputs: Any) -> Any:
        batches = self._batches(inputs)
        if len(batches) < 2:
            return self.model(**inputs)
        lengths, width = inputs["attention_mask"].sum(dim=1), inputs["input_ids"].shape[1]
        parts = []
        for rows in batches:
            length = int(lengths[rows].max())
            part = self.model(**inputs | {name: inputs[name][rows, :length] for name in READ})
            # Zeros where only longer rows have tokens.
            parts.append([nn.functional.pad(getattr(part, name), (0, width - length)) for name in _PER_TOKEN])
        place = torch.cat(batches).argsort()
        for name, values in zip(_PER_TOKEN, zip(*parts, strict=True), strict=True):
            setattr(part, name, torch.cat(values)[place])
        return part

    def _batches(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Which rows are read together; none where it is not for this class to say."""
        if not is_padded_text(inputs):
            return []
        mask = inputs["attention_mask"]
        if not torch.equal(mask, mask.cummin(dim=1).values):
            return []
        batches = similar_lengths(mask.sum(dim=1).tolist(), len(mask), self.per_forward)
        return [torch.tensor(rows, device=mask.device) for rows in batches]
