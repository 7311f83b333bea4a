"""Which texts to put into one forward."""

import math
from collections.abc import Sequence

import torch

CPU_STRETCH = 1.5


def stretch_on(device: torch.device | str) -> float:
    """How much longer the longest of a batch may be than its shortest.

    A CPU pays for every padded token (a batch of 64 short answers took 2.3 times as long unsplit), an accelerator for
    every forward.
    """
    return CPU_STRETCH if torch.device(device).type == "cpu" else math.inf


def similar_lengths(
    lengths: Sequence[int], max_rows: int, stretch: float = math.inf, rows: Sequence[int] | None = None
) -> list[list[int]]:
    """Split items into batches of similar length, shortest first.

    Args:
        lengths: length of each item. N.
        max_rows: most rows in a batch; a single item may exceed it.
        stretch: longest over shortest in a batch, at most.
        rows: rows that each item brings; 1 each by default. N.

    Returns:
        Indices of the items, each in exactly one batch.
    """
    batches: list[list[int]] = []
    num_rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        needed = 1 if rows is None else rows[i]
        fits = batches and num_rows + needed <= max_rows and lengths[i] <= stretch * max(lengths[batches[-1][0]], 1)
        if fits:
            batches[-1].append(i)
            num_rows += needed
        else:
            batches.append([i])
            num_rows = needed
    return batches
