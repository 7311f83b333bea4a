"""Score rules by counting: a language model states what an answer must satisfy, a human gave one such answer.

    python examples/sudoku_by_counting.py        # needs `pip install 'hf-imitate[counting]'`

The question is a Sudoku. An imitator that states the right rules gives the human's answer probability 1 over the
number of solutions; one that leaves a rule out spreads its probability over more grids; one that demands too much
forbids the human's answer. Nothing is sampled, however long the answer is.
"""

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


def main() -> None:
    """Score three imitators, each of which states its rules."""
    for rules in (("rows",), ("rows", "columns"), RULES):
        counted = log_prob_of_answer(sudoku(PUZZLE, rules), bits_of(HUMAN))
        bits = -counted.log_prob / math.log(2)
        print(f"{', '.join(rules):24} {counted.num_outcomes.value:8} grids  {bits:6.2f} bits for the human's answer")


if __name__ == "__main__":
    main()
