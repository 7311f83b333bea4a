"""Exact log-probabilities of many answers, fast: batches by length, and the head only where an answer is read."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_imitate.rendering import Rendered, collate

# The logits of one forward: 1 GiB in fp32. Long answers and large vocabularies get smaller batches.
MAX_LOGITS = 2**28


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
    and summed in fp64. The model runs in evaluation mode; every module's mode is restored.

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
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    check_prompt_ids([row.prompt_ids for row in rows])
    log_probs = torch.zeros(len(rows), dtype=torch.float64)
    with evaluation_mode(model), tqdm(total=len(rows), desc="scoring", disable=not progress) as bar:
        for chunk in _batches(rows, batch_size, model.config.get_text_config().vocab_size):
            log_probs[chunk] = _score_batch(model, [rows[i] for i in chunk], pad_token_id, temperature)
            bar.update(len(chunk))
    return log_probs


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


def _batches(rows: Sequence[Rendered], batch_size: int, vocab_size: int) -> Iterator[list[int]]:
    """Indices of rows of similar length; the longest come first, so that too little memory shows at once."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids) + len(rows[i].answer_ids), reverse=True)
    chunk: list[int] = []
    num_logits = 0
    for index in order:
        more = len(rows[index].answer_ids) * vocab_size
        if chunk and (len(chunk) == batch_size or num_logits + more > MAX_LOGITS):
            yield chunk
            chunk, num_logits = [], 0
        chunk.append(index)
        num_logits += more
    if chunk:
        yield chunk


def _score_batch(model: Any, rows: list[Rendered], pad_token_id: int, temperature: float) -> Tensor:
    batch = collate(rows, pad_token_id, model.device)
    predicts_answer = torch.zeros_like(batch.answer_mask, dtype=torch.bool)
    predicts_answer[:, :-1] = batch.answer_mask[:, 1:].bool()
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    with _head_reads_only(causal_lm.get_output_embeddings(), predicts_answer):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    row, position = predicts_answer.nonzero(as_tuple=True)
    if logits.shape[:2] != (1, len(row)):  # the head could not be narrowed; prompt tuning has put its tokens in front
        logits = logits[:, -batch.input_ids.shape[1] :][predicts_answer.to(logits.device)][None]
    logits = logits[0].float()
    if temperature != 1.0:
        logits = logits / temperature
    chosen = batch.input_ids[row, position + 1].to(logits.device)
    log_p = logits.gather(1, chosen[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)
    total = torch.zeros(len(rows), dtype=torch.float64)
    return total.index_add_(0, row.cpu(), log_p.cpu().double())


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
