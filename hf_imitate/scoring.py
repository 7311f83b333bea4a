"""Exact log-probabilities of many answers, fast: batches by length, shared questions read once, a sparing head."""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_imitate.batching import forward_cost, similar_lengths, tokens_at_once
from hf_imitate.log_probs import chosen_log_probs
from hf_imitate.rendering import Rendered, collate
from hf_imitate.side_by_side import (
    adapts_each_token_alone,
    lay_side_by_side,
    reads_side_by_side,
    row_batches,
    sharing_pays,
    split_before_last,
)

# The logits of one forward: 1 GiB in fp32. Long answers and large vocabularies get smaller batches.
MAX_LOGITS = 2**28


class AnswerLogits(NamedTuple):
    """What the model says where the tokens of some answers are: M tokens of one batch, answer by answer.

    Attributes:
        indices (`list[int]`): which of the given rows the batch holds.
        row (`torch.Tensor`): index, into the given rows, of the answer that each token belongs to. [M], on the CPU.
        position (`torch.Tensor`): number of the token in its answer, from 0. [M], on the CPU.
        token (`torch.Tensor`): the token there. [M], on the CPU.
        logits (`torch.Tensor`): scores of all tokens there, fp32, on the model's device. [M, V].
    """

    indices: list[int]
    row: Tensor
    position: Tensor
    token: Tensor
    logits: Tensor


@torch.no_grad()
def score_answers(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Rendered],
    pad_token_id: int,
    batch_size: int = 64,
    temperature: float = 1.0,
    progress: bool = False,
) -> Tensor:
    """Log-probability of each answer: the sum over its tokens, its end token included, nats.

    The law is softmax(logits / temperature) over the whole vocabulary, computed in fp32 whatever the model's precision
    and summed in fp64. The model runs in evaluation mode; every module's mode is restored. Answers to one question
    (equal `prompt_ids`) share its keys and values where that is faster and the model keeps them in a standard cache;
    in fp32 this shifts a log-probability by less than 1e-4.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal LM; of a PEFT model, the active adapter counts.
        rows (`Sequence[Rendered]`):
            Questions and answers, from [`~hf_imitate.rendering.Renderer`]. N of them.
        pad_token_id (`int`):
            Fills the shorter rows of a batch. It is never scored, so it may equal an end token.
        batch_size (`int`, defaults to 64):
            Most answers in one forward.
        temperature (`float`, defaults to 1.0):
            Of the law that is scored.
        progress (`bool`, defaults to `False`):
            Show a progress bar.

    Returns:
        `torch.Tensor`: log p(answer | question), [N], fp64, on the CPU, in the given order. An answer without tokens,
        not even an end token, has probability 1.

    Raises:
        ValueError: a setting is out of range, or a question has no tokens.
    """
    check_temperature(temperature)
    log_probs = torch.zeros(len(rows), dtype=torch.float64)
    with tqdm(total=len(rows), desc="scoring", disable=not progress) as bar:
        for batch in answer_logits(model, rows, pad_token_id, batch_size):
            logits = batch.logits if temperature == 1.0 else batch.logits / temperature
            log_p = chosen_log_probs(logits, batch.token.to(logits.device))
            log_probs.index_add_(0, batch.row, log_p.cpu().double())
            bar.update(len(batch.indices))
    return log_probs


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel | PeftModel, rows: Sequence[Rendered], pad_token_id: int, batch_size: int = 64
) -> Iterator[AnswerLogits]:
    """The model's logits at every token of every answer, batch by batch, as [`score_answers`] reads them.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal LM. It runs in evaluation mode.
        rows (`Sequence[Rendered]`): questions and answers.
        pad_token_id (`int`): fills shorter rows; it is never read.
        batch_size (`int`, defaults to 64): most answers in one forward.

    Returns:
        An iterator over [`AnswerLogits`]; each row is in exactly one of them.

    Raises:
        ValueError: `batch_size` is out of range, a question has no tokens, or the model has too few positions.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    check_prompt_ids([row.prompt_ids for row in rows])
    needed = [len(row.prompt_ids) + len(row.answer_ids) for row in rows]
    check_positions(needed, num_positions(model), "questions with their answers")
    reader = _Reader(model, rows, pad_token_id, batch_size)
    together = reader.sharing() if reader.can_share else []
    shared = set(together)
    with evaluation_mode(model):
        yield from reader.read_sharing(together)
        for chunk in reader.batches(index for index in range(len(rows)) if index not in shared):
            yield reader.read(chunk)


def check_temperature(temperature: float) -> None:
    """Raise `ValueError` unless `temperature` is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"`temperature` is {temperature}; it must be positive and finite. 1.0 is the law that was trained; at 0 "
            "every answer but one would have probability 0."
        )


def check_prompt_ids(prompt_ids: Sequence[list[int]]) -> None:
    """Raise `ValueError` if a question has no tokens: a causal LM has no law for a token with nothing before it."""
    empty = [index for index, ids in enumerate(prompt_ids) if not ids]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(prompt_ids)} questions have no tokens, the first is number {empty[0]}; a causal LM "
            "needs at least one. Leave empty questions out, or use a tokenizer that puts a start token first."
        )


def num_positions(model: PreTrainedModel | PeftModel) -> int | None:
    """Most tokens that a model can read at once; `None` where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(needed: Sequence[int], positions: int | None, what: str, cure: str = "") -> None:
    """Raise `ValueError` if a model has too few positions for some of what it is to read.

    Args:
        needed (`Sequence[int]`): tokens of each.
        positions (`int`, *optional*): of the model, [`num_positions`].
        what (`str`): what they are called.
        cure (`str`): what to do beside shortening them.
    """
    bad = [i for i, length in enumerate(needed) if positions is not None and length > positions]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(needed)} {what} (number {str(bad[:5])[1:-1]}) need up to {max(needed)} positions; "
            f"the model has {positions}. Shorten them{cure}, or leave them out."
        )


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off inside; afterwards each module is in the mode it was in, not all in one."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Reader:
    """Forwards of one model over some rows, plain or with shared questions."""

    def __init__(self, model: Any, rows: Sequence[Rendered], pad_token_id: int, batch_size: int):
        self.model, self.rows, self.pad_token_id, self.batch_size = model, rows, pad_token_id, batch_size
        self.causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        self.vocab_size = model.config.get_text_config().vocab_size
        is_plain = adapts_each_token_alone(model)
        self.takes_positions = "position_ids" in inspect.signature(self.causal_lm.forward).parameters
        self.takes_positions = self.takes_positions and is_plain
        self.can_share = is_plain and reads_side_by_side(self.causal_lm)

    def sharing(self) -> list[int]:
        """Answers whose question is read once for several of them: where enough of its tokens are spared."""
        by_question: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.answer_ids:
                by_question.setdefault(tuple(row.prompt_ids), []).append(index)
        return [
            index for ids, indices in by_question.items() if self._sharing_pays(len(ids), indices) for index in indices
        ]

    def _sharing_pays(self, num_prompt_tokens: int, indices: list[int]) -> bool:
        return sharing_pays([[0] * num_prompt_tokens] * len(indices), [self.rows[i].answer_ids for i in indices])

    def batches(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """Indices of rows of similar length; the longest come first, so that too little memory shows at once."""
        own = list(indices)
        lengths = [len(self.rows[i].prompt_ids) + len(self.rows[i].answer_ids) for i in own]
        device = self.model.device
        for batch in similar_lengths(
            lengths, self.batch_size, forward_cost(device), max_tokens=tokens_at_once(device)
        )[::-1]:
            chunk: list[int] = []
            num_logits = 0
            for index in (own[i] for i in reversed(batch)):
                more = len(self.rows[index].answer_ids) * self.vocab_size
                if chunk and num_logits + more > MAX_LOGITS:
                    yield chunk
                    chunk, num_logits = [], 0
                chunk.append(index)
                num_logits += more
            yield chunk

    def read(self, indices: list[int]) -> AnswerLogits:
        """One forward over whole rows, without the last token of each answer, which predicts none."""
        rows = [self.rows[i] for i in indices]
        batch = collate(
            [row._replace(answer_ids=row.answer_ids[:-1]) for row in rows], self.pad_token_id, self.model.device
        )
        width = batch.input_ids.shape[1]
        first = torch.tensor([len(row.prompt_ids) - 1 if row.answer_ids else width for row in rows])
        positions = torch.arange(width, device=self.model.device).expand_as(batch.input_ids)
        predicts = batch.attention_mask.bool() & (positions >= first.to(self.model.device)[:, None])
        logits = self._forward(batch.input_ids, batch.attention_mask, positions, predicts, use_cache=False)
        return self._answers(indices, logits)

    def read_sharing(self, indices: list[int]) -> Iterator[AnswerLogits]:
        """Forwards over rows that hold a question and several answers to it.

        A question's last token goes with each answer, whose first token it predicts.
        """
        parts = [split_before_last(self.rows[i].prompt_ids, self.rows[i].answer_ids) for i in indices]
        before, after = [part[0] for part in parts], [part[1] for part in parts]
        width = self.model.config.get_text_config().hidden_size
        longest = max((len(ids) for ids in after), default=1)
        most = min(self.batch_size, max(1, MAX_LOGITS // (longest * self.vocab_size)))
        for batch in row_batches(before, after, width, most, self.model.device):
            laid, order = lay_side_by_side(batch, before, after, self.pad_token_id, self.model.device)
            is_answer = laid.scatter(laid.is_token().long(), 0).bool()
            inputs = laid.inputs(self.causal_lm)
            logits = self._forward(
                *(inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"], is_answer), use_cache=False
            )
            yield self._answers([indices[i] for i in order], logits)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor, **options: Any) -> Tensor:
        """Logits [M, V], fp32, at the M kept positions of [B, T]."""
        if self.takes_positions:
            options["position_ids"] = positions
        with _head_reads_only(self.causal_lm.get_output_embeddings(), keep):
            logits = self.model(input_ids=ids, attention_mask=mask, **options).logits
        if logits.shape[:2] != (1, int(keep.sum())):  # not narrowed; prompt tuning has put its tokens in front
            logits = logits[:, -ids.shape[1] :][keep.to(logits.device)][None]
        return logits[0].float()

    def _answers(self, indices: list[int], logits: Tensor) -> AnswerLogits:
        answers = [self.rows[i].answer_ids for i in indices]
        row = torch.tensor([index for index, ids in zip(indices, answers, strict=True) for _ in ids], dtype=torch.long)
        position = torch.tensor([number for ids in answers for number in range(len(ids))], dtype=torch.long)
        token = torch.tensor([token for ids in answers for token in ids], dtype=torch.long)
        return AnswerLogits(indices, row, position, token, logits)


@contextlib.contextmanager
def _head_reads_only(head: nn.Module | None, keep: Tensor) -> Iterator[None]:
    """Inside, the model's own forward gives logits [1, M, V] for the M kept positions of [B, T] only.

    What the forward does to the logits afterwards (soft caps, scales) still happens, and only the head is spared.
    """

    def narrow(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        return (hidden[keep.to(hidden.device)][None], *args[1:]) if hidden.shape[:2] == keep.shape else args

    handle = head.register_forward_pre_hook(narrow) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
