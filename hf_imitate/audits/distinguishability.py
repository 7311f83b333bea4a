"""Can a freshly trained judge tell the imitator's answers from the human's? Paired accuracy, and bits per answer.

A null result speaks of the judge, not of the imitator: it says that *this* judge, with this much data, saw nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit
from scipy.stats import t as student_t
from sklearn.linear_model import LogisticRegression

from hf_imitate.audits.judges import Judge, Scorer
from hf_imitate.audits.report import Finding
from hf_imitate.bounds import Interval, clopper_pearson
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer
from hf_imitate.rows import question_key

MIN_PAIRS = 40
# A judge's probability is kept in [c, 1 - c]: one confident mistake costs at most log2(1/c), about 10 bits.
SMALLEST_PROBABILITY = 0.001
# A question or answer that holds more than this share of the pairs is a stock phrase of the law, not a copied row.
LARGEST_GROUP = 0.05


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


class _Split(NamedTuple):
    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]
    test_groups: np.ndarray  # one id per test pair
    test_trials: np.ndarray  # one id per test pair: its question, or itself where the question is too common
    num_straddling: int  # questions and answers too common to stand on one side


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
    _check_pairs(pairs, test_size, valid_size, group_by)
    split = _split_pairs(pairs, seed, test_size, valid_size, group_by, group_answers)
    scorer = judge(split.train, split.valid, seed)
    calibrate = _platt_scaling(split.valid, _score_pairs(split.valid, scorer, name))
    scores = _score_pairs(split.test, scorer, name)

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


# --- the split


def _check_pairs(pairs: Sequence[Pair], test_size: float, valid_size: float, group_by: Sequence | None) -> None:
    if len(pairs) < MIN_PAIRS:
        raise ValueError(f"A judge needs at least {MIN_PAIRS} pairs to learn and be tested; got {len(pairs)}.")
    if not (test_size > 0 and valid_size > 0 and test_size + valid_size < 1):
        raise ValueError(
            "`test_size` and `valid_size` are shares of the pairs and must leave some for training; "
            f"got {test_size} and {valid_size}."
        )
    if group_by is not None and len(group_by) != len(pairs):
        raise ValueError(f"`group_by` needs one value per pair; got {len(group_by)} for {len(pairs)} pairs.")
    bare = [row for row, pair in enumerate(pairs) if not pair.imitator]
    if bare:
        raise ValueError(f"{len(bare)} pairs have no imitator answer (rows {bare[:5]}). Sample at least one for each.")
    wrong = [row for row, pair in enumerate(pairs) if not 0 < pair.weight < math.inf]
    if wrong:
        raise ValueError(f"{len(wrong)} pairs have a weight that is not positive (rows {wrong[:5]}). Leave them out.")


def _split_pairs(
    pairs: Sequence[Pair],
    seed: int,
    test_size: float,
    valid_size: float,
    group_by: Sequence[Hashable] | None,
    group_answers: bool,
) -> _Split:
    questions = [("question", question_key(pair.prompt)) for pair in pairs]
    ties = _Ties(len(pairs))
    for value, rows in _rows_by_key([[value] for value in group_by or ()]):
        if value is not None:
            ties.join(rows)
    limit = max(2, LARGEST_GROUP * len(pairs))
    common: set[Hashable] = set()
    for question, rows in _rows_by_key([[question] for question in questions]):
        if len(rows) > limit:
            common.add(question)
        else:
            ties.join(rows)
    if group_answers:
        # Treating both authors alike keeps the null exact: exchanging them must not change the split.
        texts = [{pair.human.text.strip(), pair.imitator[0].text.strip()} for pair in pairs]
        for text, rows in _rows_by_key(texts):
            # A chain of answers, each in two rows, must not tie most rows together: the rarest are joined first.
            if ties.size_if_joined(rows) > limit and not ties.are_joined(rows):
                common.add(text)
            else:
                ties.join(rows)
    groups = ties.groups()
    order = np.random.default_rng(seed).permutation(len(groups))
    parts: dict[str, list[int]] = {"test": [], "valid": [], "train": []}
    wanted = {"test": round(test_size * len(pairs)), "valid": max(1, round(valid_size * len(pairs)))}
    wanted["train"] = len(pairs)
    group_of = np.empty(len(pairs), dtype=int)
    for group in order:
        group_of[groups[group]] = group
        part = next(part for part, rows in parts.items() if len(rows) + len(groups[group]) <= wanted[part])
        parts[part] += groups[group]
    if min(len(rows) for rows in parts.values()) < 2:
        raise ValueError(
            f"{len(pairs)} pairs fall into {len(groups)} groups of equal questions, answers or `group_by` values: too "
            "few to train, validate and test on. Bring more distinct questions, or a finer `group_by`."
        )
    for rows in parts.values():
        rows.sort()
    ids: dict[Hashable, int] = {}
    trial_of = [
        ids.setdefault((questions[row], row) if questions[row] in common else questions[row], len(ids))
        for row in parts["test"]
    ]
    train, valid, test = ([pairs[row] for row in parts[part]] for part in ("train", "valid", "test"))
    return _Split(train, valid, test, group_of[parts["test"]], np.array(trial_of), len(common))


def _rows_by_key(keys_of_row: Sequence[Iterable[Hashable]]) -> list[tuple[Hashable, list[int]]]:
    """The rows that hold each key, rarest keys first."""
    rows_of_key: dict[Hashable, list[int]] = {}
    for row, keys in enumerate(keys_of_row):
        for key in keys:
            rows_of_key.setdefault(key, []).append(row)
    return sorted(rows_of_key.items(), key=lambda item: (len(item[1]), item[1]))


class _Ties:
    """Union-find of rows that must stand on one side of the split."""

    def __init__(self, num_rows: int):
        self.parent, self.size = list(range(num_rows)), [1] * num_rows

    def find(self, row: int) -> int:
        while self.parent[row] != row:
            self.parent[row] = self.parent[self.parent[row]]
            row = self.parent[row]
        return row

    def are_joined(self, rows: list[int]) -> bool:
        return len({self.find(row) for row in rows}) == 1

    def size_if_joined(self, rows: list[int]) -> int:
        return sum(self.size[root] for root in {self.find(row) for row in rows})

    def join(self, rows: list[int]) -> None:
        first, *others = sorted({self.find(row) for row in rows})
        for root in others:
            self.parent[root] = first
            self.size[first] += self.size[root]

    def groups(self) -> list[list[int]]:
        """All rows by group, groups by first row."""
        groups: dict[int, list[int]] = {}
        for row in range(len(self.parent)):
            groups.setdefault(self.find(row), []).append(row)
        return list(groups.values())


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


def _caveats(split: _Split, num_trials: int, weights: np.ndarray) -> list[str]:
    """Why the interval of the accuracy is not exact, if it is not."""
    caveats = []
    if np.ptp(weights) > 1e-12 * weights.max():
        caveats.append("rows have different weights; the number of trials is Kish's effective one")
    if num_trials < len(split.test) or any(len(pair.imitator) > 1 for pair in split.test):
        caveats.append("a question's answers are one trial, their mean; the number of trials is Kish's effective one")
    num_tied = len(split.test) - len(np.unique(split.test_groups))
    if num_tied:
        caveats.append(f"{num_tied} test pairs share a question or an answer with another and count as independent")
    return caveats


def _straddling(split: _Split) -> str:
    if not split.num_straddling:
        return (
            "No question and no answer stands on both sides of the split (of several generations, the first counts)."
        )
    return f"{split.num_straddling} questions or answers are too common to stand on one side of the split."
