"""Answers scored after one reading of their questions and without padding, where TRL reads a padded batch."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_imitate.side_by_side import adapts_each_token_alone, reads_side_by_side, side_by_side, split_before_last

IGNORED = -100
READ = ("input_ids", "attention_mask", "labels")
_PER_TOKEN = ("log_probs", "entropy", "is_top1")


def is_padded_text(inputs: dict[str, Any]) -> bool:
    """Whether TRL's fused head is asked about a padded batch of text and nothing else."""
    return bool(inputs.get("fused_lm_head")) and set(inputs) - {"use_cache", "fused_lm_head"} == set(READ)


def causal_lm_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel | None:
    """The model without its adapters; `None` where they are more than weights, which side by side would be lost."""
    if not adapts_each_token_alone(model):
        return None
    return model.get_base_model() if isinstance(model, PeftModel) else model


class QuestionsReadOnce:
    """A model that, asked under TRL's fused head for answers after questions, reads equal questions once, next to no
    padding, and puts its head on the answers' tokens alone.

    The values are the same but for rounding. Where it is asked for more than text, where the model cannot read several
    answers side by side, and where little would be spared, it is the model itself; positions are counted from the
    question's first token all the same.

    Args:
        model ([`~torch.nn.Module`]): with TRL's fused head; it may be wrapped.
        causal_lm ([`~transformers.PreTrainedModel`]): the model without a wrapper.
        pad_token_id (`int`): fills, and is never read.
    """

    def __init__(self, model: Any, causal_lm: Any, pad_token_id: int):
        self.model, self.causal_lm, self.pad_token_id = model, causal_lm, pad_token_id

    def __call__(self, **inputs: Any) -> Any:
        if not is_padded_text(inputs):
            return self.model(**inputs)
        parts = self._parts(**{name: inputs[name] for name in READ})
        if parts is None:
            return self.model(**inputs, **self._positions(inputs["attention_mask"]))
        (laid, order), answers, numbers = parts
        is_token, device = laid.is_token(), inputs["input_ids"].device
        targets = torch.tensor([token for i in order for token in answers[i]], device=device)
        options = {name: value for name, value in inputs.items() if name not in READ}
        with _head_reads_only(self.causal_lm.base_model, laid.scatter(is_token.long(), 0).bool()):
            # The head is given the answers' states in a row of their own, so the targets lie likewise.
            outputs = self.model(**laid.inputs(self.causal_lm), shift_labels=targets[None], **options)
        is_answer = inputs["labels"][:, 1:] != IGNORED
        place = torch.tensor([numbers[i] for i in order], device=device)
        for name in _PER_TOKEN:
            values = getattr(outputs, name)
            if values is not None:
                setattr(outputs, name, _at_answers(values[0], is_token, place, is_answer))
        outputs.label_mask = is_answer
        return outputs

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Those it has side by side, and while it draws: GPT-2 would count the padding before a question."""
        if mask[:, 0].all() or not reads_side_by_side(self.causal_lm):
            return {}
        return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}

    def _parts(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple | None:
        """The rows that have an answer, side by side; their answers, and which rows they are."""
        is_answer = labels != IGNORED
        is_question = attention_mask.bool() & ~is_answer
        ids, question, answer = input_ids.tolist(), is_question.tolist(), is_answer.tolist()
        before, after, answers, numbers = [], [], [], []
        for number, (row, asks, scored) in enumerate(zip(ids, question, answer, strict=True)):
            own = [token for token, is_scored in zip(row, scored, strict=True) if is_scored]
            if own:
                asked = [token for token, asking in zip(row, asks, strict=True) if asking]
                if not asked or True in asks[scored.index(True) :]:
                    return None  # not a question and then its answer
                text, more = split_before_last(asked, own)
                before.append(text)
                after.append(more)
                answers.append(own)
                numbers.append(number)
        laid = side_by_side(self.causal_lm, before, after, self.pad_token_id)
        return None if laid is None else (laid, answers, numbers)


@contextlib.contextmanager
def _head_reads_only(body: nn.Module, keep: Tensor) -> Iterator[None]:
    """Inside, the body's last states are those of the M kept positions of [B, T] alone: [1, M, H].

    Where Triton does not run, TRL's head scores every position it is given.
    """

    def narrow(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[keep][None]
        return output

    handle = body.register_forward_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def _at_answers(values: Tensor, is_token: Tensor, place: Tensor, is_answer: Tensor) -> Tensor:
    """Values of the answers' tokens, one after another, where a plain forward has them; 0 elsewhere. [B, T - 1]."""
    own = values.new_zeros(is_token.shape).masked_scatter(is_token, values)
    by_row = own.new_zeros(len(is_answer), own.shape[1]).index_copy(0, place, own)
    has_token = torch.zeros(by_row.shape, dtype=torch.bool, device=own.device).index_copy(0, place, is_token)
    return values.new_zeros(is_answer.shape).masked_scatter(is_answer, by_row[has_token])
