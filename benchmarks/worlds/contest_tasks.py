"""The contest's three tasks behind one interface: notes of a known law, Sudoku with a check, real docstrings.

Each is an existing world ([`notes`], [`sudoku`], [`residual_docstrings`]) with rows for training, dev rows on which
everything is chosen, and test rows that are opened once. Rows are the same for all seeds; seeds are those of training.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from benchmarks import residual_docstrings, residual_sudoku
from benchmarks.worlds import notes, notes_arms, sudoku, sudoku_arms
from hf_imitate import load_docstrings
from hf_imitate.rendering import Answer
from hf_imitate.tiny_base import tiny_base

DATA_SEED = 8  # of the rows of all tasks; no other entry has it
SUDOKU_DEV_GRIDS, SUDOKU_PUZZLES = (
    40,
    1000,
)  # of the 88 grids that no training saw; as many puzzles for dev as for test
DOCSTRING_ENDS = (2000, 3000, 4000, 5000)  # train, dev, test, and what the judges' language models read
NOTES_SIZES, NUM_NOTES = notes_arms.FULL, 1600  # dev and test rows that are judged; there are more


class Rows(NamedTuple):
    """Rows to train on, rows on which all is chosen, and rows that are opened once; questions without an answer."""

    train: Dataset
    dev: Dataset
    test: Dataset
    unanswered: list[str]


class Settings(NamedTuple):
    """Steps and rates, found on the tuning seed with dev rows. Each arm's own steps cost about as much CPU time."""

    batch: int
    sft: tuple[int, float]  # steps and rate of the start
    larger: tuple[int, float]
    more: tuple[int, float]  # the start, continued for as long as the dearest arm
    judge_lm: tuple[int, float]
    judge: tuple[int, float, int]  # steps, rate, from how many trainings the better on validation pairs is taken
    game: tuple[int, int, int]  # steps, questions in each, answers to each
    game_rates: tuple[float, float]  # imitator, distinguisher
    warmup: int  # steps of a distinguisher that is not the one taught for one-of-K, before the game
    residual: tuple[int, int, float]  # steps, answers in each, rate
    distil: tuple[int, float, int, int]  # steps, rate, questions asked in a round, answers kept to each
    budget: float  # nats that the budgeted game may lose
    rejection: tuple[int, int, int, float] = (0, 0, 0, 0.0)  # rounds, questions, steps in each, rate
    larger_longer: tuple[int, float] = (0, 0.0)  # where `larger` stops short of its best


@dataclass(frozen=True)
class Task:
    """What the contest needs to know of one task.

    Attributes:
        new_model: ("imitator", "larger" or "judge", seed) -> an untrained model; "larger" may be a base that has read.
        judge_rows: number of a judge -> what its language model reads: rows of its own.
        misfit: (question, human's answer) -> an answer that no human gives; for the judges' power.
        checks: what a distinguisher may ask; empty where nothing can be verified.
        distinguisher: what the game and one-of-8 are played with: "larger", "ngram + larger", or "own" (a copy of the
            start, which knows more only by its check).
        other_distinguisher: what it is compared with in one arm.
        unlabelled: whether the game asks unanswered questions, too; one arm does the other.
        is_grouped_by_answer: rows of one human answer stand on one side of a judge's split and in one group.
        sft_sweep: temperatures of fine-tuning: so wide that its best is not at an end, where that can be.
        oracle: (rows, answers, log-probability of the law) -> what a judge sees who knows both laws.
    """

    name: str
    rows: Callable[[], Rows]
    tokenizer: Callable[[], Any]
    new_model: Callable[[str, int], Any]
    judge_rows: Callable[[int], Dataset]
    misfit: Callable[[str, str], str]
    max_tokens: int
    settings: Settings
    distinguisher: str
    other_distinguisher: str
    checks: tuple[Callable[..., Any], ...] = ()
    unlabelled: bool = False
    is_grouped_by_answer: bool = False
    sft_sweep: tuple[float, ...] = (0.55, 0.7, 0.85, 1.0, 1.15, 1.3)
    oracle: Callable[..., dict[str, float]] | None = None


@cache
def fingerprint(task: Task) -> str:
    """8 hex digits of the rows: what is measured on others does not count."""
    digest = hashlib.sha256()
    for part in task.rows()[:3]:
        digest.update(repr((part["prompt"][:], part["completion"][:])).encode())
    return digest.hexdigest()[:8]


# --- notes


@cache
def _note_rows() -> Rows:
    found = notes_arms.data(DATA_SEED, NOTES_SIZES)
    unanswered = notes.questions(NOTES_SIZES.unanswered, DATA_SEED, reserved=True)
    dev, test = (part.select(range(min(NUM_NOTES, len(part)))) for part in (found.dev, found.test))
    return Rows(found.train, dev, test, unanswered)


def _note_judge_rows(number: int) -> Dataset:
    seed = 7100 + number
    return notes.human_rows(notes.questions(NOTES_SIZES.judge_rows, seed, reserved=True), seed)


def closed_wrongly(question: str, answer: str) -> str:
    """The note, closed as it was not opened."""
    return answer[:-1] + {")": "]", "]": "}", "}": ")"}[answer[-1]]


NOTES = Task(
    name="notes",
    rows=_note_rows,
    tokenizer=notes.tokenizer,
    new_model=lambda size, seed: notes_arms.new_model("small" if size == "imitator" else "large", seed),
    judge_rows=_note_judge_rows,
    misfit=closed_wrongly,
    max_tokens=notes.MAX_TOKENS,
    settings=Settings(
        batch=notes_arms.BATCH,
        sft=(NOTES_SIZES.small_steps, notes_arms.SMALL_RATE),
        larger=(NOTES_SIZES.large_steps, notes_arms.LARGE_RATE),
        more=(3500, notes_arms.MORE_RATE),
        judge_lm=(NOTES_SIZES.judge_lm_steps, notes_arms.JUDGE_LM_RATE),
        judge=(NOTES_SIZES.judge_steps, 1.5e-3, 2),  # one training in some ten learns nothing
        game=(280, 8, 8),
        game_rates=(1e-4, 2e-4),
        warmup=150,
        residual=(*NOTES_SIZES.distinguisher[:2], notes_arms.DISTINGUISHER_RATE),
        distil=(
            NOTES_SIZES.distil_steps,
            notes_arms.DISTIL_RATE,
            NOTES_SIZES.unanswered,
            notes_arms.PICKED_PER_QUESTION,
        ),
        budget=0.1,
    ),
    distinguisher="larger",
    other_distinguisher="own",
    oracle=notes_arms.oracle,
)


# --- Sudoku


@cache
def _sudoku_rows() -> Rows:
    found = sudoku.data(DATA_SEED)
    order = np.random.default_rng([DATA_SEED, 1])
    grids = order.permutation(sorted({puzzle.grid for puzzle in found.test})).tolist()
    dev, test = grids[:SUDOKU_DEV_GRIDS], grids[SUDOKU_DEV_GRIDS:]
    parts = (_puzzles(own, order) for own in (dev, test))
    unanswered = [puzzle.question for puzzle in found.unlabelled[: len(found.unlabelled) // 2]]
    return Rows(residual_sudoku.rows_of(found.train), *map(residual_sudoku.rows_of, parts), unanswered)


def _puzzles(grids: Sequence[int], rng: np.random.Generator) -> list[sudoku.Puzzle]:
    """Different puzzles of these grids, as many of each."""
    found: dict[str, sudoku.Puzzle] = {}
    while len(found) < SUDOKU_PUZZLES:
        grid = grids[len(found) % len(grids)]
        answer = sudoku.grids()[grid]
        question = sudoku.new_puzzle(answer, int(rng.integers(sudoku.FEWEST_CLUES, sudoku.MOST_CLUES + 1)), rng)
        found.setdefault(question, sudoku.Puzzle(question, answer, grid))
    return list(found.values())


def _sudoku_judge_rows(number: int) -> Dataset:
    """Solved puzzles that no arm asks: the other half of those nobody answered for them."""
    found = sudoku.data(DATA_SEED).unlabelled
    own = found[len(found) // 2 :]
    chosen = np.random.default_rng([number, 2]).permutation(len(own))[: sudoku.NUM_TRAIN]
    return residual_sudoku.rows_of([own[i] for i in chosen])


def _sudoku_model(size: str, seed: int) -> Qwen3ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = sudoku.new_model()
        if size != "larger":
            return model
        config = model.config
        config.hidden_size, config.intermediate_size, config.head_dim = 160, 448, 40
        return Qwen3ForCausalLM(config)


def one_digit_wrong(question: str, answer: str) -> str:
    """The solution with one of its digits exchanged for the next; which one depends on the puzzle."""
    place = sum(map(ord, question)) % len(answer)
    return answer[:place] + "2341"[int(answer[place]) - 1] + answer[place + 1 :]


def sudoku_oracle(
    rows: Dataset, given: Sequence[Answer], log_prob: Callable[[list[str], list[str]], np.ndarray]
) -> dict[str, float]:
    """The human always gives the one right answer, so who knows that loses only where the imitator gives it, too."""
    wrong = [answer.text != human for answer, human in zip(given, rows["completion"], strict=True)]
    return {"oracle": 0.5 + float(np.mean(wrong)) / 2, "impossible": float(np.mean(wrong))}


SUDOKU = Task(
    name="sudoku",
    rows=_sudoku_rows,
    tokenizer=sudoku.tokenizer,
    new_model=_sudoku_model,
    judge_rows=_sudoku_judge_rows,
    misfit=one_digit_wrong,
    max_tokens=sudoku_arms.MAX_TOKENS,
    settings=Settings(
        batch=64,
        sft=(sudoku_arms.START_STEPS, sudoku_arms.START_RATE),
        larger=(300, sudoku_arms.START_RATE),
        more=(1700, sudoku_arms.RATE / 8),
        judge_lm=(500, sudoku_arms.START_RATE),
        judge=(120, 5e-4, 1),
        game=(220, 12, 8),
        game_rates=(sudoku_arms.RATE, sudoku_arms.DISTINGUISHER_RATE),
        warmup=60,
        residual=(200, residual_sudoku.DISTINGUISHER_BATCH, residual_sudoku.DISTINGUISHER_RATE),
        distil=(300, residual_sudoku.DISTIL_RATE, 2000, 1),
        budget=0.1,
        rejection=(4, 2500, 250, sudoku_arms.RATE),
        larger_longer=(1300, sudoku_arms.START_RATE),
    ),
    distinguisher="own",
    other_distinguisher="larger",
    checks=(sudoku.solved,),
    unlabelled=True,
    is_grouped_by_answer=True,
    sft_sweep=(0.1, 0.4, 0.7, 0.85, 1.0, 1.15),
    oracle=sudoku_oracle,
)


# --- docstrings


@cache
def _docstring_parts() -> tuple[Dataset, ...]:
    dataset = load_docstrings().select_columns(["prompt", "completion"])
    most = residual_docstrings.MOST_CHARACTERS
    dataset = dataset.filter(lambda row: max(map(len, row.values())) <= most)
    by_question: dict[str, int] = {}
    for number, prompt in enumerate(dataset["prompt"]):
        by_question.setdefault(prompt, number)
    order = np.random.default_rng([DATA_SEED, 3]).permutation(list(by_question.values()))
    if DOCSTRING_ENDS[-1] > len(order):
        raise ValueError(f"There are {len(order)} questions; {DOCSTRING_ENDS[-1]} are needed. Lower `DOCSTRING_ENDS`.")
    return tuple(dataset.select(order[first:end]) for first, end in pairwise((0, *DOCSTRING_ENDS)))


@cache
def _docstring_rows() -> Rows:
    train, dev, test, others = _docstring_parts()
    return Rows(train, dev, test, others["prompt"][:])


def _docstring_model(size: str, seed: int) -> Any:
    if size == "imitator":
        return residual_docstrings.new_model(seed)
    # Judges start from bases of their own, as able as the distinguisher's: a weak judge would praise everyone.
    base = residual_docstrings.tiny_base() if size == "larger" else tiny_base(seed=1 + seed % 1000)
    return AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)


def words_exchanged(question: str, answer: str) -> str:
    """The docstring with its two halves exchanged."""
    words = answer.split()
    half = len(words) // 2
    return " ".join(words[half:] + words[:half]) if half else answer + " " + answer


DOCSTRINGS = Task(
    name="docstrings",
    rows=_docstring_rows,
    tokenizer=cache(residual_docstrings.tokenizer),
    new_model=_docstring_model,
    judge_rows=lambda number: _docstring_parts()[3],
    misfit=words_exchanged,
    max_tokens=residual_docstrings.LONGEST,
    settings=Settings(
        batch=32,
        sft=(400, residual_docstrings.IMITATOR_RATE),
        larger=(residual_docstrings.FULL.larger_steps, residual_docstrings.LARGER_LM_RATE),
        more=(850, residual_docstrings.IMITATOR_RATE / 4),
        judge_lm=(residual_docstrings.FULL.larger_steps, residual_docstrings.LARGER_LM_RATE),
        judge=(residual_docstrings.FULL.judge_steps, residual_docstrings.DISTINGUISHER_RATES["larger"], 1),
        game=(60, 8, 8),
        game_rates=(5e-4, 5e-4),
        warmup=100,
        residual=(110, 32, residual_docstrings.DISTINGUISHER_RATES["larger"]),
        distil=(300, residual_docstrings.IMITATOR_RATE / 4, 1000, 2),
        budget=0.5,
    ),
    distinguisher="ngram + larger",
    other_distinguisher="own",
)

TASKS = {task.name: task for task in (NOTES, SUDOKU, DOCSTRINGS)}
