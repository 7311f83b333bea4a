"""When a game between imitator and distinguisher has gone wrong, and what to say about it."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

DECAY = 0.9
TRUNCATION_MARGIN = 0.10
NUM_STANDARD_ERRORS = 3
NUM_AT_START = 64  # answers; fewer do not tell what is usual for the imitator
BELOW_CHANCE = 0.40
TOO_STRONG = 0.98
VANISHED_SPREAD = 1e-3  # nats; rewards of a question's answers that differ by less carry no direction
PATIENCE = 20
STOP_AFTER = 50
MEMORY_DECAY = 0.99  # one question in twenty is a held-out row's: the last few batches hold too few of them
MEMORY_GAP = 0.10


@dataclass
class Guard:
    """Watches the game and pauses the imitator where its reward carries no signal or the wrong one.

    While it pauses, the distinguisher goes on learning (and the likelihood term, where there is one, goes on pulling
    the imitator back). After 50 paused generation batches in a row training stops. Every process sees the same numbers
    and so decides the same.

    Attributes:
        accuracy: moving average of the paired accuracy on fresh answers; `None` before the first.
        truncated, truncated_human: moving averages of the share of answers cut at the limit, per side.
        truncated_at_start: that share while the imitator stood still; where that gave fewer than 64 answers, also over
            the first batches of the game, as many as make 64.
        num_at_start: how many answers that were.
        truncated_labelled: that share while the imitator stood still, where only some kinds of questions were asked.
        num_labelled: how many answers that were.
        squared_weights: sum of the squared weights of the batches in the moving averages: 1 divided by how many
            batches' worth of answers they hold (about 19 after a while).
        num_low: generation batches in a row with the accuracy below chance.
        num_paused: generation batches in a row without a step of the imitator.
        said: reasons already given, each once per pause.
    """

    accuracy: float | None = None
    truncated: float | None = None
    truncated_human: float | None = None
    truncated_at_start: float | None = None
    num_at_start: int = 0
    truncated_labelled: float | None = None
    num_labelled: int = 0
    squared_weights: float = 1.0
    num_low: int = 0
    num_paused: int = 0
    said: list[str] = field(default_factory=list)

    def note_start(self, truncated: float, num_answers: int, asks_all: bool = True) -> None:
        """Take in answers of an imitator that has not played yet: a collapse in the game's first batches must not be
        what the guard compares with.

        Args:
            truncated: share of them cut at the limit.
            num_answers: how many they are, over all processes.
            asks_all: whether the game asks no other questions. Where it does, its own first answers count, too, and
                the larger share is the usual one: a few questions' answers may all be short by chance.
        """
        if asks_all:
            cut = (self.truncated_at_start or 0.0) * self.num_at_start + truncated * num_answers
            self.num_at_start += num_answers
            self.truncated_at_start = cut / self.num_at_start
        else:
            cut = (self.truncated_labelled or 0.0) * self.num_labelled + truncated * num_answers
            self.num_labelled += num_answers
            self.truncated_labelled = cut / self.num_labelled

    def update(
        self,
        accuracy: float | None,
        spread: float,
        truncated: float,
        truncated_human: float,
        num_answers: int = 512,
    ) -> str | None:
        """Take in one generation batch of the game.

        Args:
            accuracy: paired accuracy on it; `None` without labelled questions.
            spread: mean over questions of the standard deviation of rewards, nats.
            truncated, truncated_human: share of answers cut at the limit, per side.
            num_answers: the imitator's answers in it, over all processes; how far a share may be off by chance
                depends on it.

        Returns:
            The reason to pause the imitator on this batch, in plain words, or `None`.
        """
        if accuracy is not None:
            self.accuracy = _moved(self.accuracy, accuracy)
            self.num_low = self.num_low + 1 if self.accuracy < BELOW_CHANCE else 0
        if self.num_at_start < NUM_AT_START:
            self.note_start(truncated, num_answers)
        if self.truncated is not None:
            self.squared_weights = DECAY**2 * self.squared_weights + (1 - DECAY) ** 2
        self.truncated, self.truncated_human = (
            _moved(self.truncated, truncated),
            _moved(self.truncated_human, truncated_human),
        )
        usual = max(self.truncated_human, self.truncated_at_start or 0.0, self.truncated_labelled or 0.0)
        reason = self._reason(spread, self.truncated, usual, num_answers / self.squared_weights)
        self.num_paused = self.num_paused + 1 if reason else 0
        if not reason:
            self.said.clear()
        return reason

    def _reason(self, spread: float, truncated: float, usual: float, num_averaged: float) -> str | None:
        noise = NUM_STANDARD_ERRORS * _standard_error(truncated, num_averaged, usual, self.num_at_start)
        if self.num_at_start >= NUM_AT_START and truncated > usual + max(TRUNCATION_MARGIN, noise):
            return (
                f"The imitator stops ending its answers: {truncated:.0%} run into the length limit, where {usual:.0%} "
                "of the human's answers or its own first ones do. It is not paid until that ends. Likely causes: a "
                "distinguisher too weak at the start (raise `distinguisher_warmup_steps`), or an imitator that learns "
                "too fast (lower `learning_rate`)."
            )
        accuracy = 0.5 if self.accuracy is None else self.accuracy
        if spread < VANISHED_SPREAD and accuracy > TOO_STRONG:
            return (
                f"The distinguisher is too strong to teach: it is right in {accuracy:.0%} of pairs and rewards all "
                "answers to a question alike. The imitator waits. Look for a surface leak, lower "
                "`distinguisher_learning_rate`, or warm the imitator up for longer."
            )
        if self.num_low >= PATIENCE:
            return (
                f"The distinguisher is below chance (it prefers the imitator's answer in {1 - accuracy:.0%} of "
                "pairs), so its reward points the wrong way. The imitator waits. Raise "
                "`distinguisher_learning_rate` or `distinguisher_steps`, or lower the imitator's `learning_rate`."
            )
        return None

    def is_news(self, reason: str) -> bool:
        """Whether this kind of reason was not given yet in this pause."""
        kind = reason[:30]  # before the first number
        if kind in self.said:
            return False
        self.said.append(kind)
        return True

    @property
    def should_stop(self) -> bool:
        """Whether the pause has lasted too long to hope for an end."""
        return self.num_paused >= STOP_AFTER

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        return asdict(self)


@dataclass
class Memory:
    """Notices a distinguisher that knows its human answers by heart: right about those it trains on, in the dark about
    others. It warns once and pauses nothing.

    Both sides are judged on fresh answers of the imitator, so only the human's answer can be remembered. The pairs
    of one human answer in a batch are one trial, and no side ever counts more trials than it has different answers:
    a few held-out answers that happen to be hard stay hard however often they come back.

    Attributes:
        num_rows: human answers that are trained on.
        num_heldout_rows: human answers that are held out.
        wins, num: moving sums over the answers that are trained on: pairs won and answers met.
        wins_heldout, num_heldout: the same over held-out ones.
        is_said: whether the warning was given.
    """

    num_rows: int
    num_heldout_rows: int
    wins: float = 0.0
    num: float = 0.0
    wins_heldout: float = 0.0
    num_heldout: float = 0.0
    is_said: bool = False

    def update(self, accuracy: float, num: int, accuracy_heldout: float, num_heldout: int) -> str | None:
        """Take in one generation batch.

        Args:
            accuracy, accuracy_heldout: paired accuracy with human answers that are trained on and held out; any number
                where there is none of the kind.
            num, num_heldout: different human answers behind them.

        Returns:
            The warning, in plain words, the first time that the accuracy with trained-on answers lies above the other
            by 0.1 and by three standard errors; else `None`.

        Source:
            Agresti and Caffo (2000): near 0 or 1, few trials look surer than they are.
        """
        self.wins, self.num = _summed(self.wins, accuracy, num), _summed(self.num, 1.0, num)
        self.wins_heldout = _summed(self.wins_heldout, accuracy_heldout, num_heldout)
        self.num_heldout = _summed(self.num_heldout, 1.0, num_heldout)
        if self.is_said or not (self.num and self.num_heldout):
            return None
        known, variance = _estimate(self.wins, self.num, self.num_rows)
        unknown, variance_heldout = _estimate(self.wins_heldout, self.num_heldout, self.num_heldout_rows)
        noise = NUM_STANDARD_ERRORS * math.sqrt(variance + variance_heldout)
        self.is_said = known - unknown > max(MEMORY_GAP, noise)
        if not self.is_said:
            return None
        known, unknown = self.wins / self.num, self.wins_heldout / self.num_heldout
        return (
            f"The distinguisher knows human answers by heart: it is right in {known:.0%} of pairs with answers it "
            f"trains on, and in {unknown:.0%} with held-out ones. It then pays "
            "for likeness to single answers, not to the human. Bring more human rows, give a smaller `distinguisher`, "
            "or lower `distinguisher_steps` or `distinguisher_learning_rate`."
        )

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        return asdict(self)


def _summed(total: float, value: float, num: int) -> float:
    return MEMORY_DECAY * total + (value * num if num else 0.0)


def _estimate(wins: float, num: float, most: int) -> tuple[float, float]:
    """A share of at most `most` trials and its variance, with one win and one loss added."""
    trials = min(num, most)
    share = (trials * wins / num + 1) / (trials + 2)
    return share, share * (1 - share) / (trials + 2)


def _standard_error(share: float, num: float, other: float, num_other: float) -> float:
    """Of the difference of two shares, were they of one law (binomial, pooled)."""
    pooled = (share * num + other * num_other) / (num + num_other)
    return math.sqrt(max(pooled * (1 - pooled), 0.0) * (1 / num + 1 / num_other))


def _moved(average: float | None, value: float) -> float:
    return value if average is None else DECAY * average + (1 - DECAY) * value
