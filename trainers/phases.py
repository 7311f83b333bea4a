"""The phases of an adversarial run in one training loop, and the learning rate of each."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

IMITATOR_WARMUP, DISTINGUISHER_WARMUP, GAME = "imitator_warmup", "distinguisher_warmup", "game"
DISTINGUISHER_LM_WARMUP = "distinguisher_lm_warmup"


@dataclass
class Phases:
    """How many optimizer steps each phase takes: the imitator's warm-up, likelihood of a distinguisher's own body, the
    distinguisher's warm-up, the game.

    An "auto" warm-up holds its cap until `end` cuts it short.
    """

    imitator_warmup: int
    distinguisher_warmup: int
    game: int
    distinguisher_lm_warmup: int = 0

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.game_start + self.game

    @property
    def game_start(self) -> int:
        """First step of the game."""
        return self._starts()[GAME]

    def _starts(self) -> dict[str, int]:
        """First step of each phase, in their order."""
        lm = self.imitator_warmup
        classification = lm + self.distinguisher_lm_warmup
        return {
            IMITATOR_WARMUP: 0,
            DISTINGUISHER_LM_WARMUP: lm,
            DISTINGUISHER_WARMUP: classification,
            GAME: classification + self.distinguisher_warmup,
        }

    def name(self, step: int) -> str:
        """The phase that step `step` (from 0) belongs to."""
        # Of phases that begin at one step, all but the last are empty.
        return [phase for phase, start in self._starts().items() if start <= step][-1]

    def step_in_phase(self, step: int) -> int:
        """Number of `step` within its phase, from 0."""
        return step - self._starts()[self.name(step)]

    def end(self, step: int) -> None:
        """End the warm-up that `step` belongs to, so that `step` is the first of the next phase."""
        phase = self.name(step)
        if phase != GAME:
            setattr(self, phase, self.step_in_phase(step))

    def lm_learning_rate_factor(self, step: int) -> float:
        """The rate of the distinguisher's body at `step` of its likelihood warm-up, as a share of its full rate."""
        return _rise_and_fall(self.step_in_phase(step), self.distinguisher_lm_warmup)

    def learning_rate_factor(self, step: int, warmup_factor: float, game: Callable[[int], float]) -> float:
        """The imitator's learning rate at `step`, as a multiple of `learning_rate`.

        Args:
            warmup_factor: `imitator_warmup_learning_rate` over `learning_rate`.
            game: the user's schedule, over the steps of the game.
        """
        phase, number = self.name(step), self.step_in_phase(step)
        if phase == IMITATOR_WARMUP:
            return warmup_factor * _rise_and_fall(number, self.imitator_warmup)
        # 0, not a frozen flag: the optimizer's momentum would go on moving the imitator.
        return game(number) if phase == GAME else 0.0

    def state(self) -> dict[str, int]:
        """JSON-ready state."""
        return asdict(self)


def _rise_and_fall(number: int, most: int) -> float:
    """A short rise, then a linear fall to a tenth at the cap: fine-tuning ends better at a low rate."""
    return min(1.0, (number + 1) / 10) * (1 - 0.9 * number / most)


def warmup_caps(
    imitator: int | str, distinguisher: int | str, num_rows: int, rows_per_step: int, distinguisher_lm: int | str = 0
) -> tuple[int, int, int]:
    """Most steps of each warm-up: the imitator's, the distinguisher's, that of the distinguisher's body.

    As given, or for "auto" 3 passes over the rows (20 to 1 000 steps), 200 steps, and 3 passes again.
    """
    passes = min(max(-(-3 * num_rows // max(rows_per_step, 1)), 20), 1000)
    return (
        passes if imitator == "auto" else int(imitator),
        200 if distinguisher == "auto" else int(distinguisher),
        passes if distinguisher_lm == "auto" else int(distinguisher_lm),
    )
