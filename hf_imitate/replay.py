"""Old answers of the imitator, kept for the distinguisher alone."""

import math
from collections import deque
from typing import NamedTuple

import numpy as np

from hf_imitate.rendering import Answer


class Entry(NamedTuple):
    """An old answer: the row whose question it answers, and the outcomes of the checks on both sides."""

    row: int
    prompt: str | list
    answer: Answer
    human_checks: tuple[float, ...]
    checks: tuple[float, ...]


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

    def add(
        self,
        row: int,
        prompt: str | list,
        answer: Answer,
        human_checks: tuple[float, ...] = (),
        checks: tuple[float, ...] = (),
    ) -> None:
        """Remember an answer to the question of `row`, with both sides' check outcomes."""
        self.entries.append(Entry(row, prompt, answer, human_checks, checks))

    def draw(self, size: int, number: int) -> list[Entry]:
        """Up to `size` different old answers, the `number`-th draw."""
        size = min(size, len(self.entries))
        if size == 0:
            return []
        order = np.random.default_rng([self.seed, 3, number]).choice(len(self.entries), size, replace=False)
        return [self.entries[int(i)] for i in order]

    def state(self) -> list[list]:
        """JSON-ready contents, NaN outcomes as `None`."""
        return [[e.row, e.prompt, list(e.answer), _to_json(e.human_checks), _to_json(e.checks)] for e in self.entries]

    def load_state(self, state: list[list]) -> None:
        """Take up contents written by `state`."""
        self.entries.clear()
        for row, prompt, answer, human_checks, checks in state:
            self.add(row, prompt, Answer(*answer), _from_json(human_checks), _from_json(checks))


def _to_json(outcomes: tuple[float, ...]) -> list[float | None]:
    return [None if math.isnan(outcome) else outcome for outcome in outcomes]


def _from_json(outcomes: list[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if outcome is None else outcome for outcome in outcomes)
