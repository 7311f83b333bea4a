"""What an audit looks at, collected once: every finding is a function of it."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from hf_imitate.audits.evidence_cache import EvidenceCache
from hf_imitate.audits.report_text import number_of
from hf_imitate.audits.resampled_law import ResampledLaw
from hf_imitate.audits.scorer import AnswerScores, Scorer
from hf_imitate.human_rows import question_lengths, render_humans
from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import ProcessedLaw
from hf_imitate.rendering import Answer
from hf_imitate.rows import answer_text, check_columns, question_key
from hf_imitate.scoring import num_positions

MIN_ROWS = 30
# Share of answers with broken characters from which on a judge would tell encodings apart, not authors.
MOST_MOJIBAKE = 0.05
# What UTF-8's bytes of Latin letters and of typographic quotes become when they are read as Windows-1252.
_DOUBLY_ENCODED = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u2020-\u2022\u2026\u2030]|\u00e2\u20ac"
)
__all__ = ["AnswerScores", "Evidence", "check_dataset", "collect_evidence", "draw_foils", "score_foils"]

NOT_COLUMNS = ("prompt", "completion", "weight", "choices")


@dataclass(frozen=True)
class Evidence:
    """Human answers, the imitator's answers to the same questions, and what its law says of both. N rows.

    Attributes:
        prompts (`list`): questions, text or messages. N.
        question (`np.ndarray`): number of the row's question; equal questions share one. [N], int.
        human_answers ([`~hf_imitate.rendering.Answer`]s): canonical text, and whether it ended. N.
        imitator_answers ([`~hf_imitate.rendering.Answer`]s): one per row, spelled canonically like the humans'; the
            rows of one question hold its draws 0, 1, 2, ... N.
        human (`AnswerScores`): of the human answers.
        imitator (`AnswerScores`): of the imitator's own answers.
        weight (`np.ndarray`): of each row. [N].
        columns (`dict[str, list]`): the data set's other columns, N values each.
        choices (`list`, *optional*): closed options of each row, or `None`.
        train_answers (`list[str]`, *optional*): the training humans' answers, if given.
        train_questions (`list`, *optional*): their questions.
        is_exact (`bool`): whether `human.nats` are exact.
        has_exact_zeros (`bool`): whether an answer of which `human.nats` says -inf has probability 0: also where an
            answer is kept out of K, which gives none to what a candidate never is.
        num_candidates (`int`): K answers are drawn, of which the distinguisher keeps one; 1 is a single draw.
        num_estimates (`int`): sets of K - 1 companions behind each score, where K is not 1.
        is_truncated_law (`bool`): whether the audited law has tokens of probability zero (top-k, top-p, ...).
        seed (`int`): of every draw and split.
        sampled_texts (`list[str]`, *optional*): the imitator's answers as they were sampled. N.
        draw_number (`np.ndarray`, *optional*): number of each one's draw, from 0. [N], int.
        max_new_tokens (`int`, *optional*): longest answer; human answers are cut there, too.
        temperature (`float`, *optional*): of the audited law, where it is softmax(logits / temperature) alone.
        row (`np.ndarray`, *optional*): the data set's row that each of these is; rows of weight 0 are left out. [N].
        notes (`tuple[str, ...]`): what the report says about the rows: counts, never text.
        first_of_question (`np.ndarray`): row number of each question's first row. [num_questions], int.
    """

    prompts: list
    question: np.ndarray
    human_answers: list[Answer]
    imitator_answers: list[Answer]
    human: AnswerScores
    imitator: AnswerScores
    weight: np.ndarray
    columns: dict[str, list[Any]] = field(default_factory=dict)
    choices: list[Any] | None = None
    train_answers: list[str] | None = None
    train_questions: list[Any] | None = None
    is_exact: bool = True
    has_exact_zeros: bool = True
    num_candidates: int = 1
    num_estimates: int = 1
    is_truncated_law: bool = False
    seed: int = 0
    sampled_texts: list[str] | None = None
    draw_number: np.ndarray | None = None
    max_new_tokens: int | None = None
    temperature: float | None = 1.0
    row: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @property
    def first_of_question(self) -> np.ndarray:
        """Row number of each question's first row. [num_questions]."""
        return np.unique(self.question, return_index=True)[1]


def check_dataset(dataset: Dataset, train_dataset: Dataset | None = None) -> tuple[str, ...]:
    """Check rows before any model loads.

    Returns:
        Notes for the report.

    Raises:
        TypeError, ValueError: rows that cannot be audited, too few of them, questions that the imitator was trained
            on, or answers that were decoded wrongly. Counts and row numbers are given, never text.
    """
    check_columns(dataset, name="dataset")
    _check_choices(dataset)
    if len(dataset) < MIN_ROWS:
        raise ValueError(
            f"`dataset` has {len(dataset)} rows; an audit needs at least {MIN_ROWS}, and about 1,000 to notice a "
            "judge that is right in 55 % of the cases. Hold out more questions."
        )
    notes = []
    if train_dataset is not None:
        check_columns(train_dataset, allow_unlabelled=True, name="train_dataset")
        known = {question_key(prompt) for prompt in train_dataset["prompt"]}
        shared = [row for row, prompt in enumerate(dataset["prompt"]) if question_key(prompt) in known]
        if shared:
            raise ValueError(
                f"{len(shared)} of {len(dataset)} rows of `dataset` (row {str(shared[:5])[1:-1]}) ask questions that "
                "also stand in `train_dataset`: the audit would measure memory. Split with `split_by_question`; or, "
                "where the questions are a closed set, leave `train_dataset` out, and copying is not measured."
            )
    broken = [
        row for row, completion in enumerate(dataset["completion"]) if is_mojibake(answer_text(completion) or "")
    ]
    if len(broken) > MOST_MOJIBAKE * len(dataset):
        raise ValueError(
            f"`dataset` column `completion`: {len(broken)} of {len(dataset)} rows (row {str(broken[:5])[1:-1]}) hold "
            "characters that UTF-8 becomes when it is decoded wrongly, or U+FFFD. A judge would tell encodings apart, "
            "not authors. Decode the source as UTF-8."
        )
    if broken:
        looks = number_of(len(broken), "human answer looks", "human answers look")
        notes.append(f"{looks} wrongly decoded (mojibake).")
    return tuple(notes)


def _check_choices(dataset: Dataset) -> None:
    """Raise `TypeError` unless closed options are lists: of a text, every letter would be one."""
    if "choices" not in dataset.column_names:
        return
    options = dataset.with_format(None)["choices"][:]
    wrong = [row for row, value in enumerate(options) if not isinstance(value, list | None)]
    if wrong:
        raise TypeError(
            f"`dataset` column `choices`: {len(wrong)} of {len(dataset)} rows (row {str(wrong[:5])[1:-1]}) hold "
            f"{type(options[wrong[0]]).__name__}; a list of options, or None, is needed. Convert them with "
            "`dataset.map` (a CSV holds no lists, JSON does), or rename the column."
        )


def check_room(imitator: Imitator, dataset: Dataset) -> None:
    """Check that the model can read every question and the longest answer that it may give to it.

    Raises:
        ValueError: some questions are too long; the message names their rows.
    """
    positions, limit = num_positions(imitator.model), imitator.max_new_tokens
    if positions is None:
        return
    lengths = question_lengths(dataset, imitator.renderer)
    too_long = [row for row, length in lengths.items() if length + limit > positions]
    if too_long:
        raise ValueError(
            f"`dataset` column `prompt`: {len(too_long)} of {len(dataset)} rows (row {str(too_long[:5])[1:-1]}) have "
            f"up to {max(lengths.values())} tokens; with answers of up to {limit} they exceed the model's {positions} "
            'positions. Drop these rows, or audit shorter answers: `generation_config={"max_new_tokens": ...}`.'
        )


def is_mojibake(text: str) -> bool:
    """Whether a text holds U+FFFD, or UTF-8 that was read as Latin-1 or Windows-1252."""
    return not text.isascii() and ("\ufffd" in text or _DOUBLY_ENCODED.search(text) is not None)


def collect_evidence(
    imitator: Imitator,
    dataset: Dataset,
    *,
    law: ProcessedLaw | None = None,
    train_dataset: Dataset | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    cache: EvidenceCache | None = None,
    notes: Sequence[str] = (),
    advance: Callable[[int], None] = lambda num_rows: None,
    resampled: ResampledLaw | None = None,
) -> Evidence:
    """Let an imitator answer every question, and score both sides' answers under its law.

    Both sides go through one code path: canonical spelling, the tokenizer's own ids, a cut at the imitator's limit.
    So whatever is computed from an answer has one law on both sides if the authors have.

    Args:
        imitator ([`~hf_imitate.imitator.Imitator`]): who answers.
        dataset (`datasets.Dataset`): rows that passed [`check_dataset`].
        law ([`~hf_imitate.processed_law.ProcessedLaw`], *optional*): what is sampled and scored.
        train_dataset (`datasets.Dataset`, *optional*): what the imitator was trained on.
        confidence (`float`, *optional*, defaults to `0.95`): of `lower_bound`, where scores are estimates.
        seed (`int`, *optional*, defaults to `0`): of the draws; row k of a question is its draw k - 1.
        batch_size (`int`, *optional*, defaults to `64`): most answers at once.
        cache ([`~hf_imitate.audits.evidence_cache.EvidenceCache`], *optional*): keeps answers and scores.
        notes (`Sequence[str]`, *optional*): put into `Evidence.notes` first.
        advance (`Callable[[int], None]`, *optional*): told how many rows were drawn or scored.
        resampled ([`~hf_imitate.audits.resampled_law.ResampledLaw`], *optional*): the law, where each answer is kept
            out of several draws of `law`.

    Returns:
        [`Evidence`].

    Raises:
        ValueError: the model's scores are NaN, or a law of hidden thoughts was to be truncated.
    """
    law, cache = law or ProcessedLaw(), cache or EvidenceCache(None)
    weights = _weights(dataset)
    kept = np.flatnonzero(weights > 0)
    rows = dataset if len(kept) == len(dataset) else dataset.select(kept)
    prompts, numbers = rows["prompt"][:], Counter[str]()
    keys = [question_key(prompt) for prompt in prompts]
    draw_number = np.array([(numbers.update([key]), numbers[key] - 1)[1] for key in keys])
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    limit = imitator.max_new_tokens
    columns = {name: rows[name][:] for name in rows.column_names if name not in NOT_COLUMNS}
    choices = rows["choices"][:] if "choices" in rows.column_names else None
    scorer = Scorer(
        *(imitator, law, prompts, draw_number),
        seed=seed,
        batch_size=batch_size,
        cache=cache,
        confidence=confidence,
        advance=advance,
        resampled=resampled,
        columns=for_checks(columns, choices),
    )
    humans = render_humans(scorer.renderer, prompts, rows["completion"][:])
    drawn = scorer.draw()
    imitator_rows = scorer.render(drawn)
    answers = scorer.read(imitator_rows)
    num_cut = (sum(not row.rendered.ended for row in humans), sum(not row.ended for row in imitator_rows))
    num_empty = sum(not text.strip() for text, _ in drawn)
    longer = f"longer than the limit of {limit} tokens and"
    odd = (
        (len(dataset) - len(kept), "row has weight 0 and is", "rows have weight 0 and are", "left out"),
        (num_cut[0], f"human answer is {longer} was", f"human answers are {longer} were", "cut there"),
        (num_cut[1], "imitator answer", "imitator answers", f"reached the limit of {limit} tokens"),
        (num_empty, "imitator answer is", "imitator answers are", "empty"),
    )
    train = train_dataset
    return Evidence(
        prompts=prompts,
        question=np.array([places[key] for key in keys]),
        human_answers=[row.answer for row in humans],
        imitator_answers=answers,
        human=scorer.score("human", [row.answer for row in humans], [row.rendered for row in humans]),
        imitator=scorer.score("imitator", answers, imitator_rows),
        weight=weights[kept],
        columns=columns,
        choices=choices,
        train_answers=None if train is None else [t for t in map(answer_text, train["completion"]) if t is not None],
        train_questions=None if train is None else train["prompt"][:],
        is_exact=imitator.latent is None and resampled is None,
        has_exact_zeros=imitator.latent is None,
        num_candidates=1 if resampled is None else resampled.num_candidates,
        num_estimates=1 if resampled is None else resampled.num_estimates,
        is_truncated_law=law.is_truncated,
        seed=seed,
        sampled_texts=[text for text, _ in drawn],
        draw_number=draw_number,
        max_new_tokens=limit,
        temperature=law.temperature,
        row=kept,
        notes=(*notes, *(f"{number_of(number, one, many)} {what}." for number, one, many, what in odd if number)),
    )


def draw_foils(
    imitator: Imitator, evidence: Evidence, law: ProcessedLaw, *, cache: EvidenceCache, batch_size: int = 64
) -> list[Answer]:
    """An answer to each row by somebody else, as long as the imitator's may be: what the power control plants."""
    numbers = np.zeros(len(evidence.prompts), int) if evidence.draw_number is None else evidence.draw_number
    scorer = Scorer(
        *(imitator, law, evidence.prompts, numbers),
        seed=evidence.seed,
        batch_size=batch_size,
        cache=cache,
        limit=evidence.max_new_tokens,
    )
    return scorer.read(scorer.render(scorer.draw("power_control")))


def score_foils(
    imitator: Imitator,
    evidence: Evidence,
    foils: list[Answer],
    law: ProcessedLaw,
    cache: EvidenceCache,
    resampled: ResampledLaw | None = None,
) -> AnswerScores:
    """What the audited law says of the foils."""
    numbers = np.zeros(len(evidence.prompts), int) if evidence.draw_number is None else evidence.draw_number
    scorer = Scorer(
        *(imitator, law, evidence.prompts, numbers),
        seed=evidence.seed,
        batch_size=64,
        cache=cache,
        limit=evidence.max_new_tokens,
        resampled=resampled,
        columns=for_checks(evidence.columns, evidence.choices),
    )
    return scorer.score("foil", foils, scorer.render([(foil.text, foil.ended) for foil in foils]))


def for_checks(columns: dict[str, list[Any]], choices: list[Any] | None) -> dict[str, list[Any]]:
    """The columns that checks are given: the data set's own, its closed options among them."""
    return columns if choices is None else {"choices": choices, **columns}


def _weights(dataset: Dataset) -> np.ndarray:
    if "weight" not in dataset.column_names:
        return np.ones(len(dataset))
    return np.array([1.0 if weight is None else float(weight) for weight in dataset["weight"]])
