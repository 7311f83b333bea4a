"""Old answers of the imitator, kept for the distinguisher alone; what their rows say is looked up, never kept."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hf_imitate.human_rows import HumanRows
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer


class Entry(NamedTuple):
    """An old answer: the row whose question it answers, and the outcomes of the checks on both sides."""

    row: int
    answer: Answer
    human_checks: tuple[float, ...] = ()
    checks: tuple[float, ...] = ()

    def pair(self, prompts: Sequence[str | list], human_rows: HumanRows) -> Pair:
        """The row's question and human answer beside this one.

        Args:
            prompts: the questions, by row.
            human_rows: the humans' answers.
        """
        human = human_rows.rows[self.row]
        outcomes = (self.checks,) if self.checks else ()
        return Pair(prompts[self.row], human.answer, (self.answer,), human.weight, self.human_checks, outcomes)


class ReplayBuffer:
    """The last `capacity` answers of the imitator, with the row each belongs to.

    Replay shows the distinguisher more human rows per step than one generation batch holds, and earlier imitators.

    Args:
        capacity (`int`): answers kept.
        seed (`int`): a draw depends on (seed, step) alone.
    """

    def __init__(self, capacity: int = 2048, seed: int = 0):
        self.entries: deque[Entry] = deque(maxlen=capacity)
        self.seed = seed

    def add(self, entry: Entry) -> None:
        """Remember an answer."""
        self.entries.append(entry)

    def draw(self, size: int, number: int, together: int = 1) -> list[Entry]:
        """Up to `size` different old answers, the `number`-th draw.

        Args:
            size: how many.
            number: of the draw.
            together: answers to one row come in groups of so many, each as likely as another: they share its question
                and its human answer.
        """
        by_row: dict[int, list[Entry]] = {}
        for entry in self.entries:
            by_row.setdefault(entry.row, []).append(entry)
        groups = [own[i : i + together] for own in by_row.values() for i in range(0, len(own), together)]
        order = np.random.default_rng([self.seed, 3, number]).permutation(len(groups))
        return [entry for i in order for entry in groups[i]][:size]

    def state(self) -> list[list]:
        """JSON-ready contents."""
        return entries_to_json(self.entries)

    def load_state(self, state: list[list]) -> None:
        """Take up contents written by `state`."""
        self.entries.clear()
        self.entries.extend(entries_from_json(state))


def entries_to_json(entries: Iterable[Entry]) -> list[list]:
    """Entries as JSON, NaN outcomes as `None`: rows by their number, and of texts the imitator's own alone."""
    return [[e.row, list(e.answer), _to_json(e.human_checks), _to_json(e.checks)] for e in entries]


def entries_from_json(stored: Iterable[list]) -> list[Entry]:
    """Entries that `entries_to_json` wrote."""
    return [
        Entry(row, Answer(*answer), _from_json(human_checks), _from_json(checks))
        for row, answer, human_checks, checks in stored
    ]


def _to_json(outcomes: tuple[float, ...]) -> list[float | None]:
    return [None if math.isnan(outcome) else outcome for outcome in outcomes]


def _from_json(outcomes: list[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if outcome is None else outcome for outcome in outcomes)
