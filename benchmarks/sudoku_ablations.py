"""Sudoku: what the game owes to its check, and what to questions nobody answered; measured, not claimed."""

from typing import Any

from benchmarks.worlds import sudoku_arms as arms
from benchmarks.worlds.sudoku import SEEDS, STARTS

LEFT_OUT = {
    "no check": {"with_check": False},
    "no unlabelled questions": {"with_unlabelled": False},
}
CELLS = [{"seed": seed, "arm": arm} for seed in SEEDS for arm in LEFT_OUT]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """The game of one seed with one thing left out."""
    return arms.game(cell["seed"], STARTS, **LEFT_OUT[cell["arm"]])


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Exact solve rate and bits per human answer, after the last step and at the best step on validation rows."""
    return arms.table(results), True
