"""The three phases of an adversarial run in one training loop, and the learning rate of each."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

IMITATOR_WARMUP, DISTINGUISHER_WARMUP, GAME = "imitator_warmup", "distinguisher_warmup", "game"


@dataclass
class Phases:
    """How many optimizer steps each phase takes: the imitator's warm-up, then the distinguisher's, then the game.

    An "auto" warm-up holds its cap until `end` cuts it short.
    """

    imitator_warmup: int
    distinguisher_warmup: int
    game: int

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.imitator_warmup + self.distinguisher_warmup + self.game

    @property
    def game_start(self) -> int:
        """First step of the game."""
        return self.imitator_warmup + self.distinguisher_warmup

    def name(self, step: int) -> str:
        """The phase that step `step` (from 0) belongs to."""
        if step < self.imitator_warmup:
            return IMITATOR_WARMUP
        return DISTINGUISHER_WARMUP if step < self.game_start else GAME

    def step_in_phase(self, step: int) -> int:
        """Number of `step` within its phase, from 0."""
        starts = {IMITATOR_WARMUP: 0, DISTINGUISHER_WARMUP: self.imitator_warmup, GAME: self.game_start}
        return step - starts[self.name(step)]

    def end(self, step: int) -> None:
        """End the warm-up that `step` belongs to, so that `step` is the first of the next phase."""
        if self.name(step) == IMITATOR_WARMUP:
            self.imitator_warmup = step
        elif self.name(step) == DISTINGUISHER_WARMUP:
            self.distinguisher_warmup = step - self.imitator_warmup

    def learning_rate_factor(self, step: int, warmup_factor: float, game: Callable[[int], float]) -> float:
        """The imitator's learning rate at `step`, as a multiple of `learning_rate`.

        Args:
            warmup_factor: `imitator_warmup_learning_rate` over `learning_rate`.
            game: the user's schedule, over the steps of the game.
        """
        phase, number = self.name(step), self.step_in_phase(step)
        if phase == IMITATOR_WARMUP:
            # A short rise, then a linear fall to a tenth at the cap: fine-tuning ends better at a low rate.
            rise = min(1.0, (number + 1) / 10)
            return warmup_factor * rise * (1 - 0.9 * number / self.imitator_warmup)
        # 0, not a frozen flag: the optimizer's momentum would go on moving the imitator.
        return 0.0 if phase == DISTINGUISHER_WARMUP else game(number)

    def state(self) -> dict[str, int]:
        """JSON-ready state."""
        return asdict(self)


def warmup_caps(imitator: int | str, distinguisher: int | str, num_rows: int, rows_per_step: int) -> tuple[int, int]:
    """Most steps of each warm-up: as given, or for "auto" 3 passes over the rows (20 to 1 000 steps) and 200 steps."""
    passes = -(-3 * num_rows // max(rows_per_step, 1))
    return (
        min(max(passes, 20), 1000) if imitator == "auto" else int(imitator),
        200 if distinguisher == "auto" else int(distinguisher),
    )
