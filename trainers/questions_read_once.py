"""A question's answers, scored after one reading of the question, where TRL reads it with each of them."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_imitate.side_by_side import (
    SideBySide,
    lay_side_by_side,
    reads_side_by_side,
    rows_side_by_side,
    sharing_pays,
    split_before_last,
)

IGNORED = -100


class QuestionsReadOnce:
    """A model that, asked by TRL for log-probabilities of answers, reads equal questions once.

    The values are the same but for rounding. Where it is asked for more than text, where the model cannot read several
    answers side by side, and where questions are short or different, it is the model itself.

    Args:
        model ([`~torch.nn.Module`]): with TRL's fused head; it may be wrapped.
        causal_lm ([`~transformers.PreTrainedModel`]): the model without a wrapper.
        pad_token_id (`int`): fills, and is never read.
    """

    def __init__(self, model: nn.Module, causal_lm: Any, pad_token_id: int):
        self.model, self.causal_lm, self.pad_token_id = model, causal_lm, pad_token_id

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **more: Any) -> Any:
        is_answer = labels != IGNORED
        parts = None
        if set(more) == {"fused_lm_head"} and reads_side_by_side(self.causal_lm):
            parts = self._parts(input_ids, attention_mask.bool() & ~is_answer, is_answer)
        if parts is None:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)
        before, after, answers, numbers = parts
        rows = rows_side_by_side(before, after, self.causal_lm.config.get_text_config().hidden_size, len(after))
        laid, order = lay_side_by_side(rows, before, after, self.pad_token_id, input_ids.device)
        targets = torch.full((len(order), int(laid.length.max())), IGNORED, device=input_ids.device)
        targets[laid.is_token()] = torch.tensor([t for i in order for t in answers[i]], device=input_ids.device)
        outputs = self.model(**laid.inputs(self.causal_lm), shift_labels=laid.scatter(targets, IGNORED), **more)
        place = torch.tensor([numbers[i] for i in order], device=input_ids.device)
        for name in ("log_probs", "entropy"):
            values = getattr(outputs, name)
            if values is not None:
                setattr(outputs, name, _at_answers(laid, values, place, is_answer[:, 1:]))
        return outputs

    def _parts(self, input_ids: Tensor, is_question: Tensor, is_answer: Tensor) -> tuple | None:
        """Texts and continuations of the rows that have an answer, the answers, and which rows they are."""
        ids, question, answer = input_ids.tolist(), is_question.tolist(), is_answer.tolist()
        before, after, answers, numbers = [], [], [], []
        for number, (row, asks, scored) in enumerate(zip(ids, question, answer, strict=True)):
            own = [token for token, is_scored in zip(row, scored, strict=True) if is_scored]
            if own:
                text, more = split_before_last([t for t, asking in zip(row, asks, strict=True) if asking], own)
                before.append(text)
                after.append(more)
                answers.append(own)
                numbers.append(number)
        return (before, after, answers, numbers) if sharing_pays(before, after) else None


def _at_answers(laid: SideBySide, values: Tensor, place: Tensor, is_answer: Tensor) -> Tensor:
    """Values at the tokens of the answers, as a plain forward has them; 0 elsewhere. [B, T - 1]."""
    own = laid.of_continuations(values)
    rows, is_token = torch.zeros_like(is_answer, dtype=values.dtype), laid.is_token()
    by_row = own.new_zeros(len(is_answer), own.shape[1]).index_copy(0, place, own)
    has_token = torch.zeros(by_row.shape, dtype=torch.bool, device=own.device).index_copy(0, place, is_token)
    return rows.masked_scatter(is_answer, by_row[has_token])
