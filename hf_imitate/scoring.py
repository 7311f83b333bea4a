"""Exact log-probabilities of many answers, fast: batches by length, shared questions read once, a sparing head."""

import contextlib
import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_imitate.rendering import Rendered, collate

# The logits of one forward: 1 GiB in fp32. Long answers and large vocabularies get smaller batches.
MAX_LOGITS = 2**28
# Keys and values of one forward over answers that share questions: 1 GiB in fp32.
MAX_CACHED = 2**28
# Share of a question's tokens that must be spared before it is read once for all its answers: below, the second
# forward and the copies of its keys and values cost more than they save (measured).
MIN_SPARED = 0.2
# Questions that are read together are at least this share of the longest one: the rest is padding.
_MIN_FILLED = 0.75


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
            chosen = batch.token.to(logits.device)
            log_p = logits.gather(1, chosen[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)
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
    families = reader.families() if reader.has_standard_cache() else []
    shared = {index for family in families for question in family for index in question}
    alone = [index for index in range(len(rows)) if index not in shared]
    with evaluation_mode(model):
        for family in families:
            yield from reader.read_sharing(family)
        for chunk in reader.batches(alone, lambda row: len(row.prompt_ids) + len(row.answer_ids)):
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
        is_prompt_tuned = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        takes_positions = "position_ids" in inspect.signature(self.causal_lm.forward).parameters
        self.takes_positions = takes_positions and not is_prompt_tuned

    def has_standard_cache(self) -> bool:
        """Whether every layer keeps all keys and values, so that the rows of a batch can share them.

        A sliding window or a recurrent state does not outlive padding in the middle of a row; flash attention takes
        such padding for the row's start; and where positions cannot be given, they are counted over the padding.
        """
        config = self.model.config
        if not self.takes_positions or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
            return False
        layers = DynamicCache(config=config).layers
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def families(self) -> list[list[list[int]]]:
        """Questions to read together; of each, the indices of the answers to it, where sharing pays."""
        by_question: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.answer_ids:
                by_question.setdefault(tuple(row.prompt_ids), []).append(index)
        questions = [indices for ids, indices in by_question.items() if self._sharing_pays(len(ids), indices)]
        questions.sort(key=lambda indices: len(self.rows[indices[0]].prompt_ids), reverse=True)
        families: list[list[list[int]]] = []
        room, shortest = 0, 0.0
        for indices in questions:
            length = len(self.rows[indices[0]].prompt_ids)
            if not families or len(indices) > room or length < shortest:
                families.append([])
                room, shortest = self.batch_size, length * _MIN_FILLED
            families[-1].append(indices)
            room -= len(indices)
        return families

    def _sharing_pays(self, num_prompt_tokens: int, indices: list[int]) -> bool:
        spared = (len(indices) - 1) * (num_prompt_tokens - 1)
        return spared > MIN_SPARED * sum(num_prompt_tokens + len(self.rows[i].answer_ids) for i in indices)

    def batches(self, indices: Iterable[int], length: Any, most: int | None = None) -> Iterator[list[int]]:
        """Indices of rows of similar length; the longest come first, so that too little memory shows at once."""
        chunk: list[int] = []
        num_logits = 0
        for index in sorted(indices, key=lambda i: length(self.rows[i]), reverse=True):
            more = len(self.rows[index].answer_ids) * self.vocab_size
            if chunk and (
                len(chunk) == min(self.batch_size, most or len(self.rows)) or num_logits + more > MAX_LOGITS
            ):
                yield chunk
                chunk, num_logits = [], 0
            chunk.append(index)
            num_logits += more
        if chunk:
            yield chunk

    def read(self, indices: list[int]) -> AnswerLogits:
        """One forward over whole rows."""
        batch = collate([self.rows[i] for i in indices], self.pad_token_id, self.model.device)
        predicts_answer = torch.zeros_like(batch.answer_mask, dtype=torch.bool)
        predicts_answer[:, :-1] = batch.answer_mask[:, 1:].bool()
        positions = torch.arange(batch.input_ids.shape[1], device=self.model.device).expand_as(batch.input_ids)
        logits, _ = self._forward(batch.input_ids, batch.attention_mask, positions, predicts_answer, use_cache=False)
        return self._answers(indices, logits)

    def read_sharing(self, family: list[list[int]]) -> Iterator[AnswerLogits]:
        """One forward over the questions but for their last tokens, and forwards over the answers to them.

        A question's last token goes with each answer, whose first token it predicts.
        """
        questions = [self.rows[indices[0]].prompt_ids[:-1] for indices in family]
        ids, mask = self._padded(questions)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        nothing = torch.zeros_like(mask, dtype=torch.bool)
        _, cache = self._forward(ids, mask, positions, nothing, use_cache=True)
        numbers_per_row = sum(layer.keys[0].numel() + layer.values[0].numel() for layer in cache.layers)
        most = max(1, MAX_CACHED // numbers_per_row)
        question_of = {index: number for number, indices in enumerate(family) for index in indices}
        for chunk in self.batches(question_of, lambda row: len(row.answer_ids), most):
            rows = [self.rows[i] for i in chunk]
            ids, answer_mask = self._padded([[row.prompt_ids[-1], *row.answer_ids[:-1]] for row in rows])
            numbers = torch.tensor([question_of[i] for i in chunk], device=ids.device)
            lengths = mask.sum(dim=1)[numbers]
            # Padding gets position 0: beyond the model's last position there may be no embedding.
            positions = (lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)) * answer_mask
            logits, _ = self._forward(
                ids,
                torch.cat([mask[numbers], answer_mask], dim=1),
                positions,
                answer_mask.bool(),
                use_cache=True,
                past_key_values=_rows_of_cache(cache, numbers),
            )
            yield self._answers(chunk, logits)

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad_token_id] * (length - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor, **options: Any
    ) -> tuple[Tensor, Any]:
        """Logits [M, V], fp32, at the M kept positions of [B, T], and the cache."""
        if self.takes_positions:
            options["position_ids"] = positions
        with _head_reads_only(self.causal_lm.get_output_embeddings(), keep):
            output = self.model(input_ids=ids, attention_mask=mask, **options)
        logits = output.logits
        if logits.shape[:2] != (1, int(keep.sum())):  # not narrowed; prompt tuning has put its tokens in front
            logits = logits[:, -ids.shape[1] :][keep.to(logits.device)][None]
        return logits[0].float(), output.get("past_key_values")

    def _answers(self, indices: list[int], logits: Tensor) -> AnswerLogits:
        answers = [self.rows[i].answer_ids for i in indices]
        row = torch.tensor([index for index, ids in zip(indices, answers, strict=True) for _ in ids], dtype=torch.long)
        position = torch.tensor([number for ids in answers for number in range(len(ids))], dtype=torch.long)
        token = torch.tensor([token for ids in answers for token in ids], dtype=torch.long)
        return AnswerLogits(indices, row, position, token, logits)


def _rows_of_cache(cache: DynamicCache, numbers: Tensor) -> DynamicCache:
    """A cache that holds, for each row of the next forward, a copy of the keys and values of its question."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(numbers)
    return selected


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
