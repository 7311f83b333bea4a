"""When to stop waiting for something to improve."""

from dataclasses import dataclass


@dataclass
class Plateau:
    """Says when a value that should fall has stopped falling.

    Args:
        patience (`int`): readings in a row without improvement that end the wait.
        min_delta (`float`): an improvement smaller than this does not count.
    """

    patience: int = 3
    min_delta: float = 0.0
    best: float = float("inf")
    num_worse: int = 0

    def update(self, value: float) -> bool:
        """Take a reading. Returns `True` if it is the best so far."""
        if value < self.best - self.min_delta:
            self.best, self.num_worse = value, 0
            return True
        self.num_worse += 1
        return False

    @property
    def is_reached(self) -> bool:
        """Whether `patience` readings in a row brought nothing."""
        return self.num_worse >= self.patience
