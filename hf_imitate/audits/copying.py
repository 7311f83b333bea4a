"""Does the imitator repeat its training humans, more than other humans do?"""

import re
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from hf_imitate.audits.evidence import Evidence
from hf_imitate.audits.report import Finding
from hf_imitate.bounds import clopper_pearson
from hf_imitate.cluster_intervals import cluster_ratio, paired_cluster_mean
from hf_imitate.rendering import Answer, canonical_text
from hf_imitate.rows import question_key

MIN_QUESTIONS = 30
# Words in a run: shorter ones are idioms that anybody uses.
RUN_LENGTH = 5
_WORD = re.compile(r"\w+|[^\w\s]")


def audit_copying(evidence: Evidence, confidence: float = 0.95) -> list[Finding]:
    """Measure how much of the imitator's answers stands in the training humans' answers, and how much of new humans'.

    Humans repeat each other, too: short answers, formulas, quotations. So the human share is the yardstick, not 0.

    Args:
        evidence ([`~hf_imitate.audits.evidence.Evidence`]): answers, and the training humans' answers.
        confidence (`float`, *optional*, defaults to `0.95`): of each interval on its own.

    Returns:
        `list[Finding]`: `copying` and `copying/human`: share of imitator and human answers that equal a whole training
        answer (case and spacing aside), one answer per question, exact intervals; `copying/runs` and
        `copying/runs/human`: share of runs of five words that occur in a training answer, intervals over questions.
        Without training answers `copying` is `None`.
    """
    if not evidence.train_answers:
        reason = "Not measured: no training answers were given; pass `train_dataset`."
        return [Finding("copying", None, "probability", detail=reason)]
    training = [_words(text) for text in evidence.train_answers]
    sides = [evidence.imitator_answers, evidence.human_answers]
    return [*_whole_answers(evidence, training, sides, confidence), *_runs(evidence, training, sides, confidence)]


def _whole_answers(
    evidence: Evidence, training: list[tuple[str, ...]], sides: list[list[Answer]], confidence: float
) -> list[Finding]:
    rows = evidence.first_of_question
    rows = rows[evidence.weight[rows] > 0]
    known = set(training)
    is_copy = np.array([[_words(answers[row].text) in known for row in rows] for answers in sides], dtype=bool)
    is_empty = np.array([[not _words(answers[row].text) for row in rows] for answers in sides], dtype=bool)
    counted = ~is_empty.any(axis=0)
    n = int(counted.sum())
    if not n:
        return [_not_measured(name, f"all {len(rows)} questions have an empty answer.") for name in _NAMES[:2]]
    only_imitator = int((is_copy[0] & ~is_copy[1] & counted).sum())
    only_human = int((~is_copy[0] & is_copy[1] & counted).sum())
    differing = only_imitator + only_human
    p_value = binomtest(only_imitator, differing, 0.5).pvalue if differing else 1.0
    against = (
        f"Exact McNemar test against new humans: p = {p_value:.3g} (only the imitator's is a copy on {only_imitator} "
        f"questions, only the human's on {only_human}). {_shared_questions(evidence)}"
    )
    findings = []
    for name, copies, whose, more in zip(_NAMES, is_copy, ("imitator", "new human"), (against, ""), strict=False):
        num_copies = int((copies & counted).sum())
        interval = clopper_pearson(num_copies, n, confidence)
        detail = (
            f"{num_copies} of {n} {whose} answers equal one of {len(training)} training answers, case and spacing "
            f"aside; one per question, {len(rows) - n} questions with an empty answer left out, rows count alike; "
            f"exact Clopper-Pearson interval, for this number alone. {more}"
        )
        findings.append(Finding(name, num_copies / n, "probability", interval, confidence, n, detail=detail.strip()))
    return findings


_NAMES = ("copying", "copying/human", "copying/runs", "copying/runs/human")


def _runs(
    evidence: Evidence, training: list[tuple[str, ...]], sides: list[list[Answer]], confidence: float
) -> list[Finding]:
    known = {run for words in training for run in _runs_of(words)}
    counts = np.array(
        [[_count_known(_runs_of(_words(answer.text)), known) for answer in answers] for answers in sides], dtype=float
    )  # [2, N, 2]: how many runs, how many of them known
    counted = (counts[:, :, 0] > 0).all(axis=0) & (evidence.weight > 0)
    questions, weights = evidence.question[counted], evidence.weight[counted]
    if len(np.unique(questions)) < MIN_QUESTIONS:
        reason = (
            f"{len(np.unique(questions))} questions have answers of at least {RUN_LENGTH} words on both sides; need "
            f"{MIN_QUESTIONS}."
        )
        return [_not_measured(name, reason) for name in _NAMES[2:]]
    shares = counts[:, counted, 1] / counts[:, counted, 0]
    gap = paired_cluster_mean(shares[0], shares[1], questions, confidence, weights)
    against = (
        f"Mean over answers of the imitator's share minus the human's: {gap.value:+.4g} "
        f"({gap.interval.low:+.4g} to {gap.interval.high:+.4g})."
    )
    findings = []
    for name, side, whose, more in zip(_NAMES[2:], counts, ("imitator", "new human"), (against, ""), strict=True):
        found = cluster_ratio(side[counted, 1], side[counted, 0], questions, confidence, weights)
        interval = (max(0.0, found.interval.low), min(1.0, found.interval.high))
        detail = (
            f"Share of the runs of {RUN_LENGTH} words in {whose} answers that occur in a training answer, over "
            f"{int(counted.sum())} rows where both sides have one; t interval over questions. {more}"
        )
        findings.append(
            Finding(name, found.value, "probability", interval, confidence, found.num_clusters, detail=detail.strip())
        )
    return findings


def _shared_questions(evidence: Evidence) -> str:
    if evidence.train_questions is None:
        return ""
    trained = set(map(question_key, evidence.train_questions))
    shared = sum(question_key(evidence.prompts[row]) in trained for row in evidence.first_of_question)
    return f"{shared} of {len(evidence.first_of_question)} questions were asked in training, too."


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(canonical_text(text).casefold()))


def _runs_of(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + RUN_LENGTH]) for start in range(len(words) - RUN_LENGTH + 1)]


def _count_known(runs: list[tuple[str, ...]], known: set[tuple[str, ...]]) -> tuple[int, int]:
    return len(runs), sum(run in known for run in runs)


def _not_measured(name: str, reason: str) -> Finding:
    return Finding(name, None, "probability", detail=f"Not measured: {reason}")
