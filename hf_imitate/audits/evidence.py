"""What an audit looks at, collected once: every finding is a function of it."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from hf_imitate.audits.evidence_cache import EvidenceCache
from hf_imitate.human_rows import render_humans
from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import ProcessedLaw, answer_statistics, draw_processed
from hf_imitate.rendering import Answer, Rendered, Renderer, canonical_text
from hf_imitate.rows import answer_text, check_columns, question_key

CHUNK = 128  # rows whose answers and scores are stored together: what a killed audit loses at most
MIN_ROWS = 30
# Share of answers with broken characters from which on a judge would tell encodings apart, not authors.
MOST_MOJIBAKE = 0.05
# What UTF-8's bytes of Latin letters and of typographic quotes become when they are read as Windows-1252.
_DOUBLY_ENCODED = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u2020-\u2022\u2026\u2030]|\u00e2\u20ac"
)
_NOT_COLUMNS = ("prompt", "completion", "weight", "choices")


@dataclass(frozen=True)
class AnswerScores:
    """What the imitator's law says of N answers, one end token included in each.

    Attributes:
        nats (`np.ndarray`): log-probability under the audited law; -inf outside a truncated law's support. [N].
        lower_bound (`np.ndarray`): lower bound of each, for itself, where `nats` is an estimate; else `nats`. [N].
        num_tokens (`np.ndarray`): tokens, end token included. [N], int.
        entropy (`np.ndarray`): sum over the answer's positions of the next-token law's entropy, nats. [N].
        variance (`np.ndarray`): sum over positions of the variance of the next token's log-probability. [N].
        log_rank (`np.ndarray`): sum over positions of log(1 + rank of the token, from 0). [N].
        is_cut (`np.ndarray`): whether the answer reached the length limit without an end token. [N], bool.
    """

    nats: np.ndarray
    lower_bound: np.ndarray
    num_tokens: np.ndarray
    entropy: np.ndarray
    variance: np.ndarray
    log_rank: np.ndarray
    is_cut: np.ndarray


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
        notes.append(f"{len(broken)} human answers look wrongly decoded (mojibake).")
    return tuple(notes)


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
    scorer = _Scorer(
        imitator, law, seed=seed, batch_size=batch_size, cache=cache, confidence=confidence, advance=advance
    )
    renderer = scorer.renderer
    humans = render_humans(renderer, prompts, rows["completion"][:])
    drawn = scorer.draw(prompts, draw_number)
    imitator_rows = scorer.render(prompts, drawn)
    answers = scorer.read(imitator_rows)
    num_cut = (sum(not row.rendered.ended for row in humans), sum(not row.ended for row in imitator_rows))
    counted = (
        (len(dataset) - len(kept), "rows have weight 0 and are left out"),
        (num_cut[0], f"human answers are longer than the limit of {limit} tokens and were cut there"),
        (num_cut[1], f"imitator answers reached the limit of {limit} tokens"),
        (sum(not text.strip() for text, _ in drawn), "imitator answers are empty"),
    )
    train = train_dataset
    return Evidence(
        prompts=prompts,
        question=np.array([places[key] for key in keys]),
        human_answers=[row.answer for row in humans],
        imitator_answers=answers,
        human=scorer.score("human", prompts, [row.answer for row in humans], [row.rendered for row in humans]),
        imitator=scorer.score("imitator", prompts, answers, imitator_rows),
        weight=weights[kept],
        columns={name: rows[name][:] for name in rows.column_names if name not in _NOT_COLUMNS},
        choices=rows["choices"][:] if "choices" in rows.column_names else None,
        train_answers=None if train is None else [t for t in map(answer_text, train["completion"]) if t is not None],
        train_questions=None if train is None else train["prompt"][:],
        is_exact=imitator.latent is None,
        is_truncated_law=law.is_truncated,
        seed=seed,
        sampled_texts=[text for text, _ in drawn],
        draw_number=draw_number,
        max_new_tokens=limit,
        temperature=law.temperature,
        row=kept,
        notes=(*notes, *(f"{count} {what}." for count, what in counted if count)),
    )


def draw_foils(
    imitator: Imitator, evidence: Evidence, law: ProcessedLaw, *, cache: EvidenceCache, batch_size: int = 64
) -> list[Answer]:
    """An answer to each row by somebody else, as long as the imitator's may be: what the power control plants."""
    scorer = _Scorer(
        imitator, law, seed=evidence.seed, batch_size=batch_size, cache=cache, limit=evidence.max_new_tokens
    )
    numbers = np.zeros(len(evidence.prompts), int) if evidence.draw_number is None else evidence.draw_number
    drawn = scorer.draw(evidence.prompts, numbers, purpose="power_control")
    return scorer.read(scorer.render(evidence.prompts, drawn))


class _Scorer:
    """Draws and scores in chunks that are stored one by one."""

    def __init__(
        self,
        imitator: Imitator,
        law: ProcessedLaw,
        *,
        seed: int,
        batch_size: int,
        cache: EvidenceCache,
        confidence: float = 0.95,
        limit: int | None = None,
        advance: Callable[[int], None] = lambda num_rows: None,
    ):
        self.imitator, self.law, self.confidence = imitator, law, confidence
        own = imitator.renderer
        self.renderer = Renderer(
            imitator.tokenizer,
            own.end_token_ids,
            limit or imitator.max_new_tokens,
            own.chat_template_kwargs,
            own.completion_role,
        )
        self.seed, self.batch_size, self.cache, self.advance = seed, batch_size, cache, advance
        if imitator.latent is not None and law.is_truncated:
            raise ValueError(
                f"The imitator thinks before it answers; its law cannot be sampled and scored with {law.describe()}. "
                "Audit it with a temperature alone, or with `generation_config=None`."
            )

    def draw(self, prompts: list, numbers: np.ndarray, purpose: str = "answer") -> list[tuple[str, bool]]:
        """Text as sampled, and whether it ended, for each row."""
        drawn: list[tuple[str, bool]] = []
        for start in range(0, len(prompts), CHUNK):
            part = slice(start, start + CHUNK)
            stored = self.cache.json(
                f"{purpose}-{start:07d}", functools.partial(self._draw, prompts[part], numbers[part], purpose)
            )
            drawn += [(text, ended) for text, ended in stored]
            self.advance(len(stored))
        return drawn

    def _draw(self, prompts: list, numbers: np.ndarray, purpose: str) -> list[tuple[str, bool]]:
        settings: dict[str, Any] = {"seed": self.seed, "purpose": purpose, "batch_size": self.batch_size}
        settings["max_new_tokens"] = self.renderer.max_answer_tokens
        latent = self.imitator.latent
        if latent is None:
            model, renderer = self.imitator.model, self.imitator.renderer
            draws = draw_processed(model, renderer, self.law, prompts, numbers.tolist(), **settings)
            return [(draw.answer.text, draw.answer.ended) for draw in draws]
        answers: dict[int, Answer] = {}
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            asked = [prompts[row] for row in chosen]
            settings |= {"first_draw": int(number), "temperature": self.law.temperature}
            found = latent.answer(asked, num_answers=1, **settings)
            answers |= {int(row): draws[0].answer for row, draws in zip(chosen, found, strict=True)}
        return [(answers[row].text, answers[row].ended) for row in range(len(prompts))]

    def render(self, prompts: list, drawn: list[tuple[str, bool]]) -> list[Rendered]:
        """Ids of answers in the tokenizer's own spelling, cut at the limit, as the humans' are."""
        roles = [self.renderer.role_after(prompt) for prompt in prompts if not isinstance(prompt, str)]
        texts, ended = [canonical_text(text) for text, _ in drawn], [is_ended for _, is_ended in drawn]
        answers = self.renderer.answer_ids(texts, ended, bool(roles), roles or None)
        questions = self.renderer.prompt_ids(prompts)
        return [answer._replace(prompt_ids=ids) for ids, answer in zip(questions, answers, strict=True)]

    def read(self, rows: list[Rendered]) -> list[Answer]:
        """What the ids of answers spell."""
        return [Answer(self.renderer.read(row.answer_ids).text, row.ended) for row in rows]

    def score(self, side: str, prompts: list, answers: list[Answer], rows: list[Rendered]) -> AnswerScores:
        """What the law says of answers."""
        chunks = []
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            # Estimates of equal rows in two chunks, or on two sides, must not share their draws.
            number = 2 * start + (side == "human")
            compute = functools.partial(self._score, prompts[part], answers[part], rows[part], number)
            chunks.append(self.cache.arrays(f"scores-{side}-{start:07d}", compute))
            self.advance(len(rows[part]))
        arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        is_bad = np.isnan(arrays["nats"]) if self.imitator.latent is None else np.isnan(arrays["lower_bound"])
        if is_bad.any():
            raise ValueError(
                f"The log-probability of {int(is_bad.sum())} of {len(rows)} {side} answers is NaN (row "
                f"{str(np.flatnonzero(is_bad)[:5].tolist())[1:-1]}). Load the model in float32, and check that "
                "training did not diverge."
            )
        return AnswerScores(**arrays)

    def _score(self, prompts: list, answers: list[Answer], rows: list[Rendered], number: int) -> dict[str, np.ndarray]:
        pad = self.renderer.tokenizer.pad_token_id or 0
        is_cut = np.array([not row.ended for row in rows])
        if self.imitator.latent is None:
            found = answer_statistics(self.imitator.model, rows, pad, self.law, self.batch_size)
            arrays = {name: values.numpy() for name, values in found._asdict().items()}
            return {**arrays, "lower_bound": arrays["nats"], "is_cut": is_cut}
        texts = [answer.text for answer in answers]
        scored = self.imitator.log_prob(
            prompts,
            texts,
            self.confidence,
            seed=self.seed * 2**32 + number,
            temperature=self.law.temperature or 1.0,
            batch_size=self.batch_size,
        )
        # Only answers that end have an estimate: -inf says "at least 0" of the others.
        nats = np.where(is_cut, -np.inf, scored.nats.numpy())
        unknown = np.full(len(rows), np.nan)
        return {
            "nats": nats,
            "lower_bound": np.where(is_cut, -np.inf, scored.lower_bound.numpy()),
            "num_tokens": np.array([len(row.answer_ids) for row in rows]),
            **dict.fromkeys(("entropy", "variance", "log_rank"), unknown),
            "is_cut": is_cut,
        }


def score_foils(
    imitator: Imitator, evidence: Evidence, foils: list[Answer], law: ProcessedLaw, cache: EvidenceCache
) -> AnswerScores:
    """What the audited law says of the foils."""
    scorer = _Scorer(imitator, law, seed=evidence.seed, batch_size=64, cache=cache, limit=evidence.max_new_tokens)
    rows = scorer.render(evidence.prompts, [(foil.text, foil.ended) for foil in foils])
    return scorer.score("foil", evidence.prompts, foils, rows)


def _weights(dataset: Dataset) -> np.ndarray:
    if "weight" not in dataset.column_names:
        return np.ones(len(dataset))
    return np.array([1.0 if weight is None else float(weight) for weight in dataset["weight"]])
