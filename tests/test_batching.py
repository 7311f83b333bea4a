"""Batches of similar length."""

import math

import pytest

from hf_imitate.batching import similar_lengths, stretch_on


def test_every_item_stands_in_exactly_one_batch():
    lengths = [7, 3, 9, 3, 40, 12, 8]
    batches = similar_lengths(lengths, max_rows=3, stretch=1.5)
    assert sorted(i for batch in batches for i in batch) == list(range(7))


def test_a_batch_stays_within_the_stretch_and_the_rows():
    lengths = [10, 14, 15, 16, 30, 31, 32, 33]
    for batch in similar_lengths(lengths, max_rows=3, stretch=1.5):
        chosen = [lengths[i] for i in batch]
        assert max(chosen) <= 1.5 * min(chosen)
        assert len(chosen) <= 3
    assert similar_lengths(lengths, max_rows=3, stretch=1.5)[0] == [0, 1, 2]


def test_without_stretch_only_the_rows_split():
    assert similar_lengths([1, 100, 1000], max_rows=8) == [[0, 1, 2]]


def test_an_item_counts_for_the_rows_it_brings():
    assert similar_lengths([5, 5, 5], max_rows=4, rows=[3, 3, 1]) == [[0], [1, 2]]
    assert similar_lengths([5], max_rows=4, rows=[9]) == [[0]]


@pytest.mark.parametrize(("device", "stretch"), [("cpu", 1.5), ("cuda", math.inf), ("mps", math.inf)])
def test_only_a_cpu_saves_padding(device, stretch):
    assert stretch_on(device) == stretch
