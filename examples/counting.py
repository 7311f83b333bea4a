"""Score rules by counting: a language model states what an answer must satisfy, a human gave one such answer.

    python examples/counting.py                  # needs `pip install 'hf-imitate[counting]'`; takes seconds
    python examples/counting.py --smoke          # the same on the rules that are quickest to count

The question is a Sudoku. An imitator that states the right rules gives the human's answer probability 1 over the
number of solutions; one that leaves a rule out spreads its probability over more grids; one that demands too much
forbids the human's answer. Nothing is sampled, however long the answer is.
"""

import argparse
import math

from hf_imitate.circuits import Circuit, Formula
from hf_imitate.counting import log_prob_of_answer

# 4x4, row by row; 0 is an empty cell.
PUZZLE = (1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 2, 0, 0, 0, 0)
HUMAN = (1, 3, 2, 4, 2, 4, 3, 1, 3, 1, 4, 2, 4, 2, 1, 3)
RULES = ("rows", "columns", "boxes")


def groups(size: int, rule: str) -> list[list[int]]:
    """The cells that must differ, numbered row by row, by one rule of a `size` x `size` Sudoku."""
    box = math.isqrt(size)
    name = {
        "rows": lambda row, column: row,
        "columns": lambda row, column: column,
        "boxes": lambda row, column: row // box * box + column // box,
    }[rule]
    cells = [divmod(cell, size) for cell in range(size * size)]
    return [[row * size + column for row, column in cells if name(row, column) == group] for group in range(size)]


def sudoku(puzzle: tuple[int, ...], rules: tuple[str, ...] = RULES) -> Formula:
    """The constraint system of a puzzle; its answer has a bit for each cell and digit: is the digit in the cell?"""
    size = math.isqrt(len(puzzle))
    circuit = Circuit()
    cells = [circuit.free_bits(size) for _ in puzzle]
    for cell, clue in zip(cells, puzzle, strict=True):
        require_one(circuit, cell)
        if clue:
            circuit.require(cell[clue - 1])
    for group in [group for rule in rules for group in groups(size, rule)]:
        for digit in range(size):
            require_one(circuit, [cells[cell][digit] for cell in group])
    return circuit.constraint_system([bit for cell in cells for bit in cell])


def require_one(circuit: Circuit, bits: list[int]) -> None:
    """Demand that exactly one bit is true."""
    circuit.require(*bits)
    for place, bit in enumerate(bits):
        for other in bits[:place]:
            circuit.require(-bit, -other)


def bits_of(grid: tuple[int, ...]) -> list[int]:
    """A filled grid as an answer of `sudoku`."""
    size = math.isqrt(len(grid))
    return [int(digit == in_cell) for in_cell in grid for digit in range(1, size + 1)]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Score three imitators, each of which states its rules; bits of the human's answer under each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--figure", default="counting.png", help="where the picture goes")
    parser.add_argument("--smoke", action="store_true", help="two imitators: a test that it runs")
    given = parser.parse_args(arguments)

    found = {}
    for rules in [RULES, ("rows", "columns")] if given.smoke else [RULES, ("rows", "columns"), ("rows",)]:
        counted = log_prob_of_answer(sudoku(PUZZLE, rules), bits_of(HUMAN))
        bits = found[", ".join(rules)] = -counted.log_prob / math.log(2)
        print(f"{', '.join(rules):24} {counted.num_outcomes.value:8} grids  {bits:6.2f} bits for the human's answer")
    plot(found, given.figure)
    print(f"The picture is in {given.figure}.")
    return found


def plot(found: dict[str, float], path: str) -> None:
    """Bits of the human's answer by the rules an imitator states."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 0.8 + 0.5 * len(found)), layout="constrained")
    bars = axes.barh(list(found), list(found.values()), height=0.5, color="#4878a8")
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.set_xlabel("bits for the human's answer, exact")
    axes.margins(x=0.1)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
