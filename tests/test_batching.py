"""Batches of similar length."""

import itertools
import math

import pytest

from hf_imitate.batching import forward_cost, questions_together, similar_lengths


def cost(batches, lengths, per_forward):
    return sum(len(batch) * max(lengths[i] for i in batch) + per_forward for batch in batches)


def test_every_item_stands_in_exactly_one_batch():
    lengths = [7, 3, 9, 3, 40, 12, 8]
    batches = similar_lengths(lengths, max_rows=3, per_forward=5)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert max(len(batch) for batch in batches) <= 3


def every_split(order, max_rows):
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        batches = [[order[0]]]
        for i, cut in zip(order[1:], cuts, strict=True):
            batches.append([i]) if cut else batches[-1].append(i)
        if max(map(len, batches)) <= max_rows:
            yield batches


@pytest.mark.parametrize("per_forward", [0, 3, 20, 500])
def test_no_split_of_the_sorted_items_costs_less(per_forward):
    lengths = [10, 14, 15, 16, 30, 31, 90, 33]
    batches = similar_lengths(lengths, max_rows=4, per_forward=per_forward)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    least = min(cost(split, lengths, per_forward) for split in every_split(order, 4))
    assert cost(batches, lengths, per_forward) == least


def test_where_forwards_are_dear_only_the_rows_split():
    assert similar_lengths([1, 100, 1000], max_rows=8) == [[0, 1, 2]]
    assert len(similar_lengths([1, 100, 1000, 1, 7], max_rows=2)) == 3


def test_an_item_counts_for_the_rows_it_brings():
    assert similar_lengths([5, 5, 5], max_rows=4, rows=[3, 3, 1]) == [[0], [1, 2]]
    assert similar_lengths([5], max_rows=4, rows=[9]) == [[0]]
    assert similar_lengths([], max_rows=4) == []


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_only_a_cpu_saves_padding(device):
    assert forward_cost(device) == math.inf
    assert math.isfinite(forward_cost("cpu"))
    assert forward_cost("cpu", is_padded=False) == math.inf


def test_items_of_one_question_follow_each_other():
    assert questions_together(["a", "b", "a", "b"], [9, 5, 1, 2]) == [3, 1, 2, 0]
