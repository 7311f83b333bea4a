"""MATH: logits -> log-probability per token -> sum per answer, in nats."""

import math

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Log-probability of each token given those before it, nats.

    Computed in fp32 whatever the model's precision: in bf16 the sum over an answer is off by whole nats.

    Args:
        logits: scores of the next token at each position. [B, T, V].
        input_ids: the tokens. [B, T].

    Returns:
        log p(token t | tokens before t) for t = 1 .. T-1. [B, T-1].

    Raises:
        ValueError: the shapes do not belong together.
    """
    if logits.dim() != 3 or logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"Need `logits` [B, T, V] for `input_ids` [B, T]; got {tuple(logits.shape)} and {tuple(input_ids.shape)}."
        )
    return chosen_log_probs(logits[:, :-1], input_ids[:, 1:])


def chosen_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of given tokens, nats, in fp32 as above.

    Args:
        logits: scores of each token. [..., V].
        ids: the tokens. [...].
    """
    # One kernel: with its backward, half of what `logsumexp` costs on a CPU.
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None]).squeeze(-1)


def answer_log_probs(logits: Tensor, input_ids: Tensor, answer_mask: Tensor) -> Tensor:
    """Log-probability of each answer: the sum over its tokens, its end token included, nats.

    Args:
        logits: scores of the next token at each position. [B, T, V].
        input_ids: question and answer. [B, T].
        answer_mask: 1 on the answer's tokens. [B, T]. The first position is never an answer's.

    Returns:
        log p(answer | question). [B], at most 0.
    """
    log_p = token_log_probs(logits, input_ids)
    # `where`, not a product: -inf outside the answer must not poison the sum.
    return torch.where(answer_mask[:, 1:].bool(), log_p, 0.0).sum(dim=1)


def nats_to_bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)
