"""Which pairs train a judge, which choose its settings, and which test it: never one question on two sides."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hf_imitate.pairs import Pair
from hf_imitate.rows import question_key

MIN_PAIRS = 40
# A question or answer that holds more than this share of the pairs is a stock phrase of the law, not a copied row.
LARGEST_GROUP = 0.05


class Split(NamedTuple):
    """Pairs of a judge.

    Attributes:
        train, valid, test: the pairs.
        test_groups: one id per test pair; equal ids may depend on each other.
        test_trials: one id per test pair: its question, or itself where the question is too common to group.
        num_straddling: questions and answers too common to stand on one side.
    """

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]
    test_groups: np.ndarray
    test_trials: np.ndarray
    num_straddling: int


class QuestionSplit(NamedTuple):
    """Row numbers, decided from the questions alone, before any answer is read.

    Attributes:
        train, valid: rows, ascending.
        test: one row per test question, its first, in random order: the order in which bets are laid.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def take(self, pairs: Sequence[Pair]) -> Split:
        """The split of these pairs, one per row."""
        train, valid, test = ([pairs[row] for row in rows] for rows in self)
        own = np.arange(len(test))
        return Split(train, valid, test, own, own, 0)


def split_questions(
    prompts: Sequence[str | list], seed: int = 0, test_size: float = 0.5, valid_size: float = 0.1
) -> QuestionSplit:
    """Split rows by question; questions that differ in case and spacing alone stay together.

    Each question's rows land together, and a test question is one trial, its first row. So where the rows are
    independent draws of one law and the judge is fixed by the other rows, the trials are independent, and statements
    about them are exact.

    Args:
        prompts: the question of each row.
        seed: of the order.
        test_size, valid_size: shares of the rows, reached from below.
    """
    keys = [" ".join(question_key(prompt).casefold().replace("\\n", " ").split()) for prompt in prompts]
    groups = [rows for _, rows in sorted(_rows_by_key([[key] for key in keys]), key=lambda item: item[1])]
    order = np.random.default_rng([seed, 1]).permutation(len(groups))
    wanted = {"test": round(test_size * len(keys)), "valid": max(1, round(valid_size * len(keys)))}
    wanted["train"] = len(keys)
    parts: dict[str, list[list[int]]] = {"test": [], "valid": [], "train": []}
    filled = dict.fromkeys(parts, 0)
    for group in order:
        rows = groups[group]
        part = next(name for name in parts if filled[name] + len(rows) <= wanted[name])
        parts[part].append(rows)
        filled[part] += len(rows)
    train, valid = (
        np.sort(np.array([row for rows in parts[name] for row in rows], int)) for name in ("train", "valid")
    )
    return QuestionSplit(train, valid, np.array([rows[0] for rows in parts["test"]], int))


def check_pairs(pairs: Sequence[Pair], test_size: float, valid_size: float, group_by: Sequence | None) -> None:
    """Raise `ValueError` if these pairs, or shares of them, cannot train and test a judge."""
    if len(pairs) < MIN_PAIRS:
        raise ValueError(f"A judge needs at least {MIN_PAIRS} pairs to learn and be tested; got {len(pairs)}.")
    if not (test_size > 0 and valid_size > 0 and test_size + valid_size < 1):
        raise ValueError(
            "`test_size` and `valid_size` are shares of the pairs and must leave some for training; "
            f"got {test_size} and {valid_size}."
        )
    if group_by is not None and len(group_by) != len(pairs):
        raise ValueError(f"`group_by` needs one value per pair; got {len(group_by)} for {len(pairs)} pairs.")
    bare = [row for row, pair in enumerate(pairs) if not pair.imitator]
    if bare:
        raise ValueError(f"{len(bare)} pairs have no imitator answer (rows {bare[:5]}). Sample at least one for each.")
    wrong = [row for row, pair in enumerate(pairs) if not 0 < pair.weight < math.inf]
    if wrong:
        raise ValueError(f"{len(wrong)} pairs have a weight that is not positive (rows {wrong[:5]}). Leave them out.")


def split_pairs(
    pairs: Sequence[Pair],
    seed: int,
    test_size: float,
    valid_size: float,
    group_by: Sequence[Hashable] | None,
    group_answers: bool,
) -> Split:
    """Split pairs by question, by `group_by`, and, if asked, by answer; see `judge_pairs`."""
    questions = [("question", question_key(pair.prompt)) for pair in pairs]
    ties = _Ties(len(pairs))
    for value, rows in _rows_by_key([[value] for value in group_by or ()]):
        if value is not None:
            ties.join(rows)
    limit = max(2, LARGEST_GROUP * len(pairs))
    common: set[Hashable] = set()
    for question, rows in _rows_by_key([[question] for question in questions]):
        if len(rows) > limit:
            common.add(question)
        else:
            ties.join(rows)
    if group_answers:
        # Treating both authors alike keeps the null exact: exchanging them must not change the split.
        texts = [{pair.human.text.strip(), pair.imitator[0].text.strip()} for pair in pairs]
        for text, rows in _rows_by_key(texts):
            # A chain of answers, each in two rows, must not tie most rows together: the rarest are joined first.
            if ties.size_if_joined(rows) > limit and not ties.are_joined(rows):
                common.add(text)
            else:
                ties.join(rows)
    groups = ties.groups()
    order = np.random.default_rng(seed).permutation(len(groups))
    parts: dict[str, list[int]] = {"test": [], "valid": [], "train": []}
    wanted = {"test": round(test_size * len(pairs)), "valid": max(1, round(valid_size * len(pairs)))}
    wanted["train"] = len(pairs)
    group_of = np.empty(len(pairs), dtype=int)
    for group in order:
        group_of[groups[group]] = group
        part = next(part for part, rows in parts.items() if len(rows) + len(groups[group]) <= wanted[part])
        parts[part] += groups[group]
    # Errors are counted over groups: of a test in one group there is none.
    if min(len(rows) for rows in parts.values()) < 2 or len(set(group_of[parts["test"]].tolist())) < 2:
        raise ValueError(
            f"{len(pairs)} pairs fall into {len(groups)} groups of equal questions, answers or `group_by` values: too "
            "few to train, validate and test on. Bring more distinct questions, or a finer `group_by`."
        )
    for rows in parts.values():
        rows.sort()
    ids: dict[Hashable, int] = {}
    trial_of = [
        ids.setdefault((questions[row], row) if questions[row] in common else questions[row], len(ids))
        for row in parts["test"]
    ]
    train, valid, test = ([pairs[row] for row in parts[part]] for part in ("train", "valid", "test"))
    return Split(train, valid, test, group_of[parts["test"]], np.array(trial_of), len(common))


def _rows_by_key(keys_of_row: Sequence[Iterable[Hashable]]) -> list[tuple[Hashable, list[int]]]:
    """The rows that hold each key, rarest keys first."""
    rows_of_key: dict[Hashable, list[int]] = {}
    for row, keys in enumerate(keys_of_row):
        for key in keys:
            rows_of_key.setdefault(key, []).append(row)
    return sorted(rows_of_key.items(), key=lambda item: (len(item[1]), item[1]))


class _Ties:
    """Union-find of rows that must stand on one side of the split."""

    def __init__(self, num_rows: int):
        self.parent, self.size = list(range(num_rows)), [1] * num_rows

    def find(self, row: int) -> int:
        while self.parent[row] != row:
            self.parent[row] = self.parent[self.parent[row]]
            row = self.parent[row]
        return row

    def are_joined(self, rows: list[int]) -> bool:
        return len({self.find(row) for row in rows}) == 1

    def size_if_joined(self, rows: list[int]) -> int:
        return sum(self.size[root] for root in {self.find(row) for row in rows})

    def join(self, rows: list[int]) -> None:
        first, *others = sorted({self.find(row) for row in rows})
        for root in others:
            self.parent[root] = first
            self.size[first] += self.size[root]

    def groups(self) -> list[list[int]]:
        """All rows by group, groups by first row."""
        groups: dict[int, list[int]] = {}
        for row in range(len(self.parent)):
            groups.setdefault(self.find(row), []).append(row)
        return list(groups.values())
