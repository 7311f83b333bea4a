"""Metrics as sums and counts, so that a logged mean is over everything since the last log."""

from collections import defaultdict


class Tally:
    """Sums of numerators and denominators, per mode ("train" or "eval") and metric."""

    def __init__(self):
        self._sums: dict[str, dict[str, list[float]]] = {
            mode: defaultdict(lambda: [0.0, 0.0]) for mode in ("train", "eval")
        }

    def add(self, mode: str, name: str, total: float, count: float) -> None:
        """Add `total` over `count` things; nothing is logged for a metric whose count stays 0."""
        entry = self._sums[mode][name]
        entry[0] += total
        entry[1] += count

    def state(self, mode: str) -> dict[str, list[float]]:
        """The sums and counts since the last flush, JSON-ready."""
        return {name: list(entry) for name, entry in self._sums[mode].items()}

    def take_up(self, mode: str, state: dict[str, list[float]]) -> None:
        """Go on from what [`Tally.state`] gave."""
        self._sums[mode].clear()
        for name, (total, count) in state.items():
            self.add(mode, name, total, count)

    def flush(self, mode: str) -> dict[str, float]:
        """Ratios since the last flush."""
        values = {name: total / count for name, (total, count) in self._sums[mode].items() if count}
        self._sums[mode].clear()
        return values
