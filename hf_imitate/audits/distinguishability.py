"""Can a freshly trained judge tell the imitator's answers from the human's? Paired accuracy, and bits per answer.

A null result speaks of the judge, not of the imitator: it says that *this* judge, with this much data, saw nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit
from scipy.stats import t as student_t
from sklearn.linear_model import LogisticRegression

from hf_imitate.audits.judges import Judge, Scorer
from hf_imitate.audits.report import Finding
from hf_imitate.audits.report_text import number_of
from hf_imitate.audits.splits import Split, check_pairs, split_pairs
from hf_imitate.bounds import Interval, clopper_pearson
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer
from hf_imitate.rows import question_key

# A judge's probability is kept in [c, 1 - c]: one confident mistake costs at most log2(1/c), about 10 bits.
SMALLEST_PROBABILITY = 0.001


class Judgement(NamedTuple):
    """What one judge found on the test pairs.

    Attributes:
        name (`str`): the judge.
        accuracy (`float`): probability that it scores the human's answer above the imitator's, ties 1/2.
        interval (`Interval`): two-sided Clopper-Pearson interval for `accuracy`.
        bits (`float`): what one answer tells the judge about its author, at most the Jensen-Shannon divergence of
            the two laws in expectation. Negative for a judge that is confident and wrong.
        bits_interval (`Interval`): normal interval for `bits` over groups of pairs.
        num_pairs (`int`): trials behind `accuracy`: test questions, or test pairs of questions too common to group;
            Kish's effective number where they weigh differently.
        num_ties (`int`): test comparisons with equal scores.
        findings (`tuple[Finding, ...]`): `paired_accuracy/<name>` and `judge_bits/<name>`.
    """

    name: str
    accuracy: float
    interval: Interval
    bits: float
    bits_interval: Interval
    num_pairs: int
    num_ties: int
    findings: tuple[Finding, ...]


def judge_pairs(
    pairs: Sequence[Pair],
    judge: Judge,
    *,
    name: str,
    confidence: float = 0.95,
    seed: int = 0,
    test_size: float = 0.5,
    valid_size: float = 0.1,
    group_by: Sequence[Hashable] | None = None,
    group_answers: bool = True,
) -> Judgement:
    """Train a judge on some questions and measure it on others.

    Equal questions stand on one side of the split, and so do equal answers: where rows are copies of each other, a
    judge that knows its training rows by heart would be praised for it. Answers are grouped whoever wrote them; by
    the human's alone, popular human answers would gather on one side, and the split itself would tell the authors
    apart. What holds more than 5 % of the pairs is not grouped, and is counted in the findings' `detail`.

    Accuracy is one trial per test question (its mean, where it has several pairs or generations), ties 1/2. Bits are
    1 minus the cross-entropy of "human or imitator?" asked of single answers, both equally likely, by the judge's
    score calibrated on the validation pairs (logistic, with intercept). Accuracy near 1 stops telling judges or
    imitators apart; bits do not.

    Args:
        pairs (`Sequence[Pair]`): human and imitator answers to the same questions, the imitator's drawn without
            looking at the human's.
        judge (`Judge`): [`~judges.ngram_judge`], a [`~judges.lora_judge`], or any callable of that type.
        name (`str`): its name in the findings.
        confidence (`float`, *optional*, defaults to `0.95`): of both intervals, each on its own.
        seed (`int`, *optional*, defaults to `0`): of the split and of the judge.
        test_size, valid_size (`float`, *optional*, default to `0.5` and `0.1`): shares of the pairs.
        group_by (`Sequence[Hashable]`, *optional*): one value per pair; equal ones are kept together, `None` is free.
        group_answers (`bool`, *optional*, defaults to `True`): `False` groups by question and `group_by` alone.

    Returns:
        [`Judgement`].

    Raises:
        ValueError: too few pairs or groups, a pair without an imitator answer, scores that are not one finite number
            per answer.

    Source:
        Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", https://huggingface.co/papers/1610.06545
        Platt (1999) for the calibration.
    """
    check_pairs(pairs, test_size, valid_size, group_by)
    split = split_pairs(pairs, seed, test_size, valid_size, group_by, group_answers)
    return judgement_of(split, score_split(split, judge, name, seed), name, confidence)


class SplitScores(NamedTuple):
    """A trained judge's scores: of the human's answer, [1], and of the imitator's, [K], for each pair."""

    valid: list[tuple[np.ndarray, np.ndarray]]
    test: list[tuple[np.ndarray, np.ndarray]]


def score_split(split: Split, judge: Judge, name: str, seed: int = 0) -> SplitScores:
    """Train a judge on a split's training pairs, and let it score the others.

    Raises:
        ValueError: scores that are not one finite number per answer.
    """
    scorer = judge(split.train, split.valid, seed)
    return SplitScores(_score_pairs(split.valid, scorer, name), _score_pairs(split.test, scorer, name))


def judgement_of(split: Split, split_scores: SplitScores, name: str, confidence: float = 0.95) -> Judgement:
    """What a judge's scores say, with intervals; see [`judge_pairs`]."""
    calibrate = _platt_scaling(split.valid, split_scores.valid)
    scores = split_scores.test

    weights = np.array([pair.weight for pair in split.test])
    wins = np.array([np.mean((human > imitator) + 0.5 * (human == imitator)) for human, imitator in scores])
    num_ties = sum(int((human == imitator).sum()) for human, imitator in scores)
    trials, trial_weights = _mean_by(split.test_trials, wins, weights)
    accuracy = float(np.average(trials, weights=trial_weights))
    # Kish's effective number of trials; exactly their number under equal weights.
    num_trials = math.floor(trial_weights.sum() ** 2 / np.square(trial_weights).sum() + 1e-9)
    interval = clopper_pearson(min(round(accuracy * num_trials, 9), num_trials), num_trials, confidence)

    bits_of_pair = np.array([1 - _cross_entropy_bits(*map(calibrate, both)) for both in scores])
    bits = float(np.average(bits_of_pair, weights=weights))
    bits_interval = _normal_interval(bits_of_pair, weights, split.test_groups, confidence)

    caveats = _caveats(split, len(trials), weights)
    exactness = f"{'; '.join(caveats)}. " if caveats else ""
    detail_accuracy = f"One trial per question, {num_ties} ties counted 1/2; Clopper-Pearson interval. {exactness}"
    detail_bits = (
        "1 minus the cross-entropy of the balanced human-or-imitator label of single answers, by the judge's score "
        f"calibrated on {len(split.valid)} validation pairs, probabilities kept in [{SMALLEST_PROBABILITY}, "
        f"{1 - SMALLEST_PROBABILITY}]; normal interval over groups. Below 0: the judge is confident and wrong. "
    )
    told = _straddling(split)
    findings = (
        Finding(
            *(f"paired_accuracy/{name}", accuracy, "probability", interval, confidence, num_trials),
            certified=not caveats,
            detail=detail_accuracy + told,
        ),
        Finding(
            *(f"judge_bits/{name}", bits, "bits", bits_interval, confidence, len(np.unique(split.test_groups))),
            detail=detail_bits + told,
        ),
    )
    return Judgement(name, accuracy, interval, bits, bits_interval, num_trials, num_ties, findings)


def swap_within_pairs(pairs: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """Exchange the human's answer and the imitator's first one in a random half of the pairs: the null control.

    No judge can do better than chance on the result; one that does is measured wrongly.
    """
    swapped = []
    for pair, is_swapped in zip(pairs, np.random.default_rng(seed).random(len(pairs)) < 0.5, strict=True):
        if is_swapped:
            changes: dict[str, Any] = {"human": pair.imitator[0], "imitator": (pair.human, *pair.imitator[1:])}
            if pair.imitator_checks:
                changes["human_checks"] = pair.imitator_checks[0]
                changes["imitator_checks"] = (pair.human_checks, *pair.imitator_checks[1:])
            pair = dataclasses.replace(pair, **changes)
        swapped.append(pair)
    return swapped


# --- the measurement


def _score_pairs(pairs: Sequence[Pair], scorer: Scorer, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores of the human's answer, [1], and of the imitator's, [K], for each pair.

    An answer is scored once however often it occurs: rounding that depends on the batch must not break a tie.
    """
    places: dict[Hashable, int] = {}
    prompts: list[str | list] = []
    answers: list[Answer] = []
    indices = []
    for pair in pairs:
        question = question_key(pair.prompt)
        for answer in (pair.human, *pair.imitator):
            index = places.setdefault((question, answer), len(places))
            if index == len(answers):
                prompts.append(pair.prompt)
                answers.append(answer)
            indices.append(index)
    scores = np.asarray(scorer(prompts, answers), dtype=float)
    if scores.shape != (len(answers),) or not np.isfinite(scores).all():
        raise ValueError(
            f"Judge {name!r} must return one finite score per answer, shape ({len(answers)},); got shape "
            f"{scores.shape} with {int((~np.isfinite(scores)).sum())} values that are not finite."
        )
    per_pair = np.split(scores[indices], np.cumsum([1 + len(pair.imitator) for pair in pairs])[:-1])
    return [(both[:1], both[1:]) for both in per_pair]


def _platt_scaling(
    pairs: Sequence[Pair], scores: list[tuple[np.ndarray, np.ndarray]]
) -> Callable[[np.ndarray], np.ndarray]:
    """Score -> probability of "human" for a single answer, both authors equally likely."""
    flat = np.concatenate([np.concatenate(both) for both in scores])
    is_human = np.concatenate([[1, *[0] * len(imitator)] for _, imitator in scores])
    mean_weight = np.mean([pair.weight for pair in pairs])
    weights = np.concatenate(
        [
            pair.weight / mean_weight * np.array([1, *[1 / len(imitator)] * len(imitator)])
            for pair, (_, imitator) in zip(pairs, scores, strict=True)
        ]
    )
    center = np.average(flat, weights=weights)
    scale = math.sqrt(np.average(np.square(flat - center), weights=weights)) or 1.0
    # The unit penalty keeps few validation pairs from making the judge certain.
    model = LogisticRegression(C=1.0).fit(((flat - center) / scale)[:, None], is_human, weights)
    # A judge that points the wrong way on the validation pairs has found nothing; turning it round would be luck.
    slope = max(float(model.coef_[0, 0]), 0.0) / scale
    intercept = float(model.intercept_[0]) if slope else 0.0
    return lambda values: np.clip(
        expit(slope * (values - center) + intercept), SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY
    )


def _cross_entropy_bits(p_human: np.ndarray, p_imitator: np.ndarray) -> float:
    """Cross-entropy of the balanced label, from the probability of "human" for either side's answers."""
    return float(-np.log2(p_human).mean() - np.log2(1 - p_imitator).mean()) / 2


def _mean_by(ids: np.ndarray, values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and total weight of each id."""
    totals = np.bincount(ids, weights)
    return np.bincount(ids, values * weights) / totals, totals


def _normal_interval(values: np.ndarray, weights: np.ndarray, groups: np.ndarray, confidence: float) -> Interval:
    """Interval of a weighted mean whose values depend on each other within groups, Student's t over groups."""
    mean = float(np.average(values, weights=weights))
    _, places = np.unique(groups, return_inverse=True)
    sums = np.bincount(places, weights * (values - mean))
    num_groups = len(sums)
    error = math.sqrt(num_groups / (num_groups - 1) * np.square(sums).sum()) / float(weights.sum())
    reach = float(student_t.isf((1 - confidence) / 2, num_groups - 1)) * error
    return Interval(mean - reach, mean + reach)


def _caveats(split: Split, num_trials: int, weights: np.ndarray) -> list[str]:
    """Why the interval of the accuracy is not exact, if it is not."""
    caveats = []
    if np.ptp(weights) > 1e-12 * weights.max():
        caveats.append("rows have different weights; the number of trials is Kish's effective one")
    if num_trials < len(split.test) or any(len(pair.imitator) > 1 for pair in split.test):
        caveats.append("a question's answers are one trial, their mean; the number of trials is Kish's effective one")
    num_tied = len(split.test) - len(np.unique(split.test_groups))
    if num_tied:
        share = number_of(num_tied, "test pair shares", "test pairs share")
        caveats.append(f"{share} a question or an answer with another, and all count as independent")
    return caveats


def _straddling(split: Split) -> str:
    if not split.num_straddling:
        return (
            "No question and no answer stands on both sides of the split (of several generations, the first counts)."
        )
    are = number_of(split.num_straddling, "question or answer is", "questions or answers are")
    return f"{are} too common to stand on one side of the split."
