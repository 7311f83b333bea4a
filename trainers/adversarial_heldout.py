"""Held-out human answers in two halves: one says when to stop and what to keep, the other if there is a signal."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather

from hf_imitate.bounds import clopper_pearson
from hf_imitate.human_rows import HumanRows
from hf_imitate.losses import DISTINGUISHER_LOSSES, paired_wins
from hf_imitate.pairs import Learner
from hf_imitate.replay import Entry, entries_from_json, entries_to_json
from hf_imitate.rows import question_key

logger = logging.getLogger(__name__)

MOST_TO_STOP_BY, MOST_TO_TEST = 256, 1024  # pairs of a process
# Below it, the game had nothing to teach in trials.
NO_SIGNAL = 0.58


class Reading(NamedTuple):
    """Loss (nats per comparison) and paired accuracy on held-out pairs over all processes; NaN if there are none."""

    loss: float
    accuracy: float


class Signal(NamedTuple):
    """What held-out questions that chose nothing say of the distinguisher.

    Attributes:
        accuracy: paired accuracy, ties 1/2, one pair to a question; NaN without any.
        upper: one-sided 95 % upper limit of it (Clopper and Pearson); 1 without any.
        num: questions.
    """

    accuracy: float
    upper: float
    num: int

    def metrics(self) -> dict[str, float]:
        """What is logged; nothing where nothing was measured."""
        if not self.num:
            return {}
        names = ("accuracy_tested", "accuracy_tested_upper", "pairs_tested")
        return {f"distinguisher/{name}": float(value) for name, value in zip(names, self, strict=True)}

    def describe(self, is_frozen: bool) -> str:
        """What it means, in plain words."""
        found = (
            f"on {self.num} held-out questions that decided nothing before, the distinguisher prefers the human's "
            f"answer in {self.accuracy:.0%}, and with 95 % confidence in fewer than {self.upper:.0%} of all such "
            "questions"
        )
        useless = "choosing among answers by its logit" if is_frozen else "the game"
        return (
            f"There is no adversarial signal: {found}. So {useless} can gain next to nothing. That does not show a "
            "human-like imitator: a distinguisher learns one bit from a pair where likelihood learns from every "
            "token, and one of the imitator's own size, fitted to the same rows, often finds nothing where an ideal "
            "judge would. Let it know more than the imitator: a larger causal LM as `distinguisher` (its body is "
            "fitted to the same rows first), 'ngram' beside it, `checks`, or more human rows. Or stay with "
            "likelihood alone."
        )

    def describe_doubt(self) -> str:
        """That too few were asked, in plain words."""
        return (
            f"Whether there is an adversarial signal cannot be told: on {self.num} held-out questions the "
            f"distinguisher prefers the human's answer in {self.accuracy:.0%}, so with 95 % confidence in fewer than "
            f"{self.upper:.0%} of all. A sixteenth of its warm-up's pairs are asked: raise "
            "`distinguisher_warmup_steps` or the batch."
        )


class Heldout:
    """Human answers that nobody learns from, each beside an answer of an imitator that stands still.

    The halves share no question. By the first, warm-ups stop and weights are kept; the second is asked once, at the
    end, one pair to a question, so that what it says was not chosen by it.

    Args:
        human_rows ([`HumanRows`]): says which rows are held out.
        prompts (`Sequence`): the questions, by row.
        learner ([`Learner`]): the distinguisher.
        accelerator ([`~accelerate.Accelerator`]): knows the processes.
        record (`Callable`): takes a metric's name, sum and count.
    """

    def __init__(
        self,
        human_rows: HumanRows,
        prompts: Sequence[str | list],
        learner: Learner,
        accelerator: Accelerator,
        record: Callable[[str, float, float], None],
    ):
        self.learner, self.accelerator, self.record = learner, accelerator, record
        self.human_rows, self.prompts = human_rows, prompts
        self.stopping, self.testing = halves(human_rows, prompts)
        numbers: dict[str, int] = {}
        self.question_of = {
            row: numbers.setdefault(question_key(prompts[row]), len(numbers)) for row in human_rows.heldout.tolist()
        }
        self._to_stop_by = set(self.stopping)
        self.entries: list[Entry] = []  # of the first half
        self.tested: dict[int, Entry] = {}  # of the second, by question
        self.best: list[torch.Tensor] | None = None
        self._best_seen: list[tuple[float, float]] = []  # loss and win of the best weights on each entry

    def add(self, entry: Entry) -> None:
        """Take in what an imitator that stands still answered to the question of a held-out row."""
        if entry.row in self._to_stop_by:
            if len(self.entries) < MOST_TO_STOP_BY:
                self.entries.append(entry)
        elif len(self.tested) < MOST_TO_TEST:
            self.tested.setdefault(self.question_of[entry.row], entry)

    def reading(self, keep: bool = False) -> Reading:
        """How well the distinguisher does on the first half; with `keep`, its weights are kept if that is the best.

        The best so far is the one that is right most often, of equals the one of lower loss, on all pairs met by now:
        the weights kept before are asked about those met since.
        """
        seen = self._seen(self.entries)
        now = self._mean(seen)
        # All processes go the same way: the means are over all of them.
        if math.isnan(now.accuracy):
            return now
        self.record("distinguisher/accuracy_stopping", now.accuracy, 1)
        if keep:
            before = self._reading_of_best()
            if before is None or (now.accuracy, -now.loss) > (before.accuracy, -before.loss):
                self.best = [parameter.detach().clone() for parameter in self.learner.parameters]
                self._best_seen = seen
        return now

    def _reading_of_best(self) -> Reading | None:
        if self.best is None:
            return None
        if len(self._best_seen) < len(self.entries):
            with self._weights(self.best):
                self._best_seen += self._seen(self.entries[len(self._best_seen) :])
        return self._mean(self._best_seen)

    def restore(self) -> None:
        """Read once more, and go back to the best weights that were kept."""
        self.reading(keep=True)
        if self.best is not None:
            _copy(self.best, self.learner.parameters)

    def forget(self) -> None:
        """Let go of answers and weights: an imitator that moves has other answers."""
        self.entries, self.tested, self.best, self._best_seen = [], {}, None, []

    def signal(self) -> Signal:
        """Ask the second half."""
        rows = torch.full((MOST_TO_TEST, 2), -1.0, device=self.accelerator.device)
        seen = self._seen(list(self.tested.values()))
        if seen:
            found = [(question, win) for question, (_, win) in zip(self.tested, seen, strict=True)]
            rows[: len(seen)] = torch.tensor(found, device=rows.device)
        by_question: dict[int, float] = {}
        for question, win in gather(rows).tolist():
            if question >= 0:
                by_question.setdefault(int(question), win)  # several processes may have asked it
        num, wins = len(by_question), sum(by_question.values())
        if num == 0:
            return Signal(float("nan"), 1.0, 0)
        return Signal(wins / num, clopper_pearson(wins, num, side="upper").high, num)

    def _seen(self, entries: Sequence[Entry]) -> list[tuple[float, float]]:
        pairs = [entry.pair(self.prompts, self.human_rows) for entry in entries]
        compare = DISTINGUISHER_LOSSES[self.learner.loss]
        return [
            (compare(*logits).mean().item(), paired_wins(logits.human, logits.imitator).mean().item())
            for logits in self.learner.score(pairs)
        ]

    def _mean(self, seen: Sequence[tuple[float, float]]) -> Reading:
        sums = [sum(values) for values in zip(*seen, strict=True)] if seen else [0.0, 0.0]
        found = torch.tensor([[*sums, len(seen)]], dtype=torch.float64)
        # Not every accelerator knows fp64; a sum of a few hundred halves is exact in fp32.
        loss, wins, count = gather(found.float().to(self.accelerator.device)).sum(dim=0).tolist()
        return Reading(loss / count, wins / count) if count else Reading(float("nan"), float("nan"))

    @contextlib.contextmanager
    def _weights(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        current = [parameter.detach().clone() for parameter in self.learner.parameters]
        _copy(weights, self.learner.parameters)
        try:
            yield
        finally:
            _copy(current, self.learner.parameters)

    def state(self) -> dict[str, Any]:
        """JSON-ready state; the kept weights are `tensors()`."""
        return {
            "entries": entries_to_json(self.entries),
            "tested": [list(self.tested), entries_to_json(self.tested.values())],
            "best_seen": [list(values) for values in self._best_seen],
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The kept weights, for a checkpoint."""
        return {f"best.{i}": tensor for i, tensor in enumerate(self.best or [])}

    def load_state(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `state` and `tensors` gave."""
        self.entries = entries_from_json(state["entries"])
        questions, tested = state["tested"]
        self.tested = dict(zip(questions, entries_from_json(tested), strict=True))
        self._best_seen = [(loss, win) for loss, win in state["best_seen"]]
        kept = [tensors.get(f"best.{i}") for i in range(len(self.learner.parameters))]
        is_kept = "best.0" in tensors
        own = zip(kept, self.learner.parameters, strict=True)
        self.best = [tensor.to(p.device) for tensor, p in own if tensor is not None] if is_kept else None


def _copy(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for kept, parameter in zip(source, target, strict=True):
            parameter.copy_(kept)


def halves(human_rows: HumanRows, prompts: Sequence[str | list]) -> tuple[list[int], list[int]]:
    """Split the held-out rows in two, equal questions on one side.

    Args:
        human_rows ([`HumanRows`]): says which rows are held out.
        prompts (`Sequence`): the questions, by row.

    Returns:
        Rows to stop by, and rows to test on. Questions in random order join the smaller half.
    """
    groups: dict[str, list[int]] = {}
    for row in human_rows.heldout.tolist():
        groups.setdefault(question_key(prompts[row]), []).append(row)
    questions = list(groups)
    stopping: list[int] = []
    testing: list[int] = []
    for i in np.random.default_rng([human_rows.seed, 6]).permutation(len(questions)).tolist():
        (stopping if len(stopping) <= len(testing) else testing).extend(groups[questions[i]])
    return sorted(stopping), sorted(testing)
