"""4x4 Sudoku: every grid, puzzles with exactly one solution, and a human who always answers with that solution.

The human's law is a point mass, so a puzzle's solve rate at temperature 1 *is* exp(log p(human answer)): nothing has
to be sampled. All training comes from 200 of the 288 grids, all tests from the other 88, so a solved test puzzle was
not looked up.
"""

from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

BLANK = "."
FEWEST_CLUES, MOST_CLUES = 6, 9
NUM_TRAIN_GRIDS, NUM_VALIDATION_GRIDS = 180, 20  # of the 200 that the human answered puzzles of
NUM_TRAIN, NUM_VALIDATION, NUM_UNLABELLED, NUM_TEST = 1800, 200, 20_000, 1000
SEEDS = [1, 2, 3]  # chosen before their first run; settings were found on another seed and another split of the grids
STARTS = Path(__file__).parent.parent / "results" / "partial" / "sudoku"
DATA_SEED = 0  # one split of the grids for all training seeds: seeds can be averaged within a grid

_UNITS = [[4 * r + c for c in range(4)] for r in range(4)] + [[4 * r + c for r in range(4)] for c in range(4)]
_UNITS += [[4 * (r + i) + c + j for i, j in product(range(2), repeat=2)] for r, c in product((0, 2), repeat=2)]


class Puzzle(NamedTuple):
    """A question, the human's answer, and the number of the grid behind both."""

    question: str
    answer: str
    grid: int


class Data(NamedTuple):
    """Rows to train on, rows that choose the step, questions nobody answered, and puzzles of grids never seen."""

    train: list[Puzzle]
    validation: list[Puzzle]
    unlabelled: list[Puzzle]
    test: list[Puzzle]


def is_filled(grid: str) -> bool:
    """Whether every row, column and box holds each digit once."""
    return len(grid) == 16 and all({grid[i] for i in unit} == set("1234") for unit in _UNITS)


@cache
def grids() -> tuple[str, ...]:
    """All 288 filled grids, row by row, in lexicographic order."""
    rows = ["".join(row) for row in permutations("1234")]
    return tuple(grid for grid in map("".join, product(rows, repeat=4)) if is_filled(grid))


def solved(prompts, completions, completion_ids=None, **columns) -> list[bool]:
    """The check: the answer is a filled grid and keeps the puzzle's clues."""
    return [
        is_filled(answer) and all(p in (BLANK, a) for p, a in zip(puzzle, answer, strict=True))
        for puzzle, answer in zip(prompts, completions, strict=True)
    ]


@cache
def _digits() -> np.ndarray:
    return np.array([[int(digit) for digit in grid] for grid in grids()])


def num_solutions(puzzle: str) -> int:
    """How many of the 288 grids keep the puzzle's clues."""
    clues = [i for i, cell in enumerate(puzzle) if cell != BLANK]
    return int((_digits()[:, clues] == [int(puzzle[i]) for i in clues]).all(axis=1).sum())


def new_puzzle(grid: str, num_clues: int, rng: np.random.Generator) -> str:
    """A puzzle of this grid with one solution: cells are blanked in random order, down to `num_clues` if possible."""
    puzzle = grid
    for cell in rng.permutation(16).tolist():
        blanked = puzzle[:cell] + BLANK + puzzle[cell + 1 :]
        if 16 - puzzle.count(BLANK) > num_clues and num_solutions(blanked) == 1:
            puzzle = blanked
    return puzzle


@cache
def data(seed: int = DATA_SEED) -> Data:
    """The rows of this world. Test questions are of other grids; unlabelled ones are strings of their own."""
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(len(grids())).tolist()
    train, rest = order[:NUM_TRAIN_GRIDS], order[NUM_TRAIN_GRIDS:]
    validation, test = rest[:NUM_VALIDATION_GRIDS], rest[NUM_VALIDATION_GRIDS:]
    taken: set[str] = set()

    def puzzles(ids: list[int], number: int) -> list[Puzzle]:
        found: list[Puzzle] = []
        while len(found) < number:
            grid = ids[len(found) % len(ids)]
            question = new_puzzle(grids()[grid], int(rng.integers(FEWEST_CLUES, MOST_CLUES + 1)), rng)
            if question not in taken:
                taken.add(question)
                found.append(Puzzle(question, grids()[grid], grid))
        return found

    tests = puzzles(test, NUM_TEST)
    labelled = puzzles(train, NUM_TRAIN)
    return Data(labelled, puzzles(validation, NUM_VALIDATION), puzzles(train, NUM_UNLABELLED), tests)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Two cells per token: 25 of them, an end and a pad."""
    special = ["<end>", "<pad>", "<unk>"]
    words = ["".join(pair) for pair in product(BLANK + "1234", repeat=2)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def new_model() -> Qwen3ForCausalLM:
    """An untrained model of 446 000 parameters; seed torch before."""
    config = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    return Qwen3ForCausalLM(config)
