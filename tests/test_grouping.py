"""Groups against brute force: connected components by repeated relaxation, sizes by trying every subset."""

import random
from itertools import combinations

import pytest

from hf_imitate.grouping import choose_nearest, connected_rows


def components_by_relaxation(relations: list[list], num_rows: int) -> set[frozenset[int]]:
    label = list(range(num_rows))
    for _ in range(num_rows):
        for values in relations:
            for one, other in combinations(range(num_rows), 2):
                if values[one] is not None and values[one] == values[other]:
                    label[one] = label[other] = min(label[one], label[other])
    return {frozenset(row for row in range(num_rows) if label[row] == value) for value in label}


@pytest.mark.parametrize("seed", range(30))
def test_groups_are_the_connected_components(seed):
    draw = random.Random(seed)
    relations = [[draw.choice([None, *range(9)]) for _ in range(12)] for _ in range(2)]
    groups = connected_rows(relations, 12)
    assert {frozenset(group) for group in groups} == components_by_relaxation(relations, 12)
    assert all(group == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@pytest.mark.parametrize("seed", range(60))
def test_the_chosen_size_is_the_nearest_that_any_choice_reaches(seed):
    draw = random.Random(seed)
    sizes = [draw.choice([2, 3, 7, 20]) for _ in range(draw.randrange(2, 9))]
    num_wanted = draw.randrange(1, sum(sizes))
    order = draw.sample(range(len(sizes)), len(sizes))
    chosen = choose_nearest(order, sizes, num_wanted)
    reachable = {sum(choice) for n in range(1, len(sizes)) for choice in combinations(sizes, n)}
    assert len(set(chosen)) == len(chosen)
    size = sum(sizes[group] for group in chosen)
    assert size in reachable
    assert abs(size - num_wanted) == min(abs(reached - num_wanted) for reached in reachable)


def test_the_order_decides_among_good_choices():
    choices = {tuple(choose_nearest(random.Random(seed).sample(range(6), 6), [1] * 6, 2)) for seed in range(99)}
    assert len(choices) == 30


def test_many_equal_groups_are_quick():
    assert len(choose_nearest(list(range(100_000)), [2] * 100_000, 9_999)) in (4_999, 5_000)
