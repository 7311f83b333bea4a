"""Which texts to put into one forward."""

import math
from collections.abc import Sequence

import torch

# What a forward of its own costs, in padded tokens that would cost as much: measured at 3 million weights, where it is
# 10 ms (25 with its backward); larger models pay less, and by this at most 64 tokens of padding too much.
CPU_FORWARD = 64.0


def forward_cost(device: torch.device | str, is_padded: bool = True) -> float:
    """How many padded tokens are worth a forward of its own.

    A CPU pays for every padded token, an accelerator for every forward.

    Args:
        device: of the model.
        is_padded: whether what shares a forward is padded to the longest; rows side by side are next to not.
    """
    return CPU_FORWARD if is_padded and torch.device(device).type == "cpu" else math.inf


def tokens_at_once(device: torch.device | str) -> float:
    """Most padded tokens in a forward without gradient: on a CPU, what its caches still hold.

    At 192 wide, answers of 26 tokens were scored 1.3 times as fast 16 or 32 at once as 64 at once.
    """
    return 768 if torch.device(device).type == "cpu" else math.inf


def similar_lengths(
    lengths: Sequence[int],
    max_rows: int,
    per_forward: float = math.inf,
    rows: Sequence[int] | None = None,
    max_tokens: float = math.inf,
) -> list[list[int]]:
    """Split items into batches of similar length, shortest first, at the least total cost.

        cost of a batch = number of items * longest length + `per_forward`

    Args:
        lengths: length of each item, in tokens. N.
        max_rows: most rows in a batch; a single item may exceed it.
        per_forward: see [`forward_cost`]; where it is infinite, there are as few batches as `max_rows` allows.
        rows: rows that each item counts for; 1 each by default. N.
        max_tokens: most padded tokens in a batch; a single item may exceed it.

    Returns:
        Indices of the items, each in exactly one batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    # Where infinite, so dear that no padding is worth another forward.
    dear = per_forward if math.isfinite(per_forward) else len(lengths) * (1.0 + max(lengths, default=0))
    best, begins = [0.0], [0]  # of the first n items: least cost, and where the last batch begins
    for stop in range(1, len(order) + 1):
        least, begin, num_rows = math.inf, stop - 1, 0
        for start in range(stop - 1, -1, -1):
            num_rows += 1 if rows is None else rows[order[start]]
            num_tokens = (stop - start) * lengths[order[stop - 1]]
            if (num_rows > max_rows or num_tokens > max_tokens) and start < stop - 1:
                break
            cost = best[start] + num_tokens + dear
            if cost < least:
                least, begin = cost, start
        best.append(least)
        begins.append(begin)
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[begins[stop] : stop])
        stop = begins[stop]
    return batches[::-1]


def questions_together(questions: Sequence[str], lengths: Sequence[int]) -> list[int]:
    """Indices of items by length, shortest first, those of one question in a row, where its longest would stand."""
    longest: dict[str, int] = {}
    for question, length in zip(questions, lengths, strict=True):
        longest[question] = max(longest.get(question, 0), length)
    return sorted(range(len(lengths)), key=lambda i: (longest[questions[i]], questions[i], lengths[i]))
