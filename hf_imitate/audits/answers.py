"""Does the imitator answer as the *population* does? Its distribution of answers against the humans', where several
humans answered one question or the options are closed."""

import math
from collections.abc import Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np

from hf_imitate.audits.evidence import Evidence
from hf_imitate.audits.report import Finding
from hf_imitate.audits.report_text import number_of
from hf_imitate.cluster_intervals import cluster_mean, paired_cluster_mean
from hf_imitate.rendering import Answer, canonical_text

MIN_QUESTIONS = 30
MAX_SUBGROUPS = 50
_NUM_SPLITS = 20
_TV, _CEILING = "answer_distribution_tv", "human_ceiling"


class _Cell(NamedTuple):
    """Answers that are drawn from one human law and one imitator law. M rows."""

    human: np.ndarray  # which answer, as a number from 0. [M]
    imitator: np.ndarray  # [M]
    weight: np.ndarray  # [M]
    num_options: int  # closed options, 0 where anything is an answer; their number is also the code of "none of them"
    positions: np.ndarray | None  # of the options, from 0 to 1, where they are ordered numbers. [num_options]

    @property
    def num_codes(self) -> int:
        return self.num_options + 1 if self.num_options else int(max(self.human.max(), self.imitator.max())) + 1


class _Distances(NamedTuple):
    """Mean distances over random halves of one cell, of equal size on both sides."""

    to_imitator: float
    to_humans: float


def audit_answers(evidence: Evidence, by: str | None = None, confidence: float = 0.95) -> list[Finding]:
    """Compare the distribution of the imitator's answers with the humans', and humans with humans.

    Where at least 30 questions were answered by two humans or more, each question is looked at on its own: half of its
    humans against as many of the imitator's answers (`answer_distribution_tv`), and against the other half of its
    humans (`human_ceiling`), averaged over random halves and questions. Total variation of small samples is large even
    between equal laws; both numbers are from samples of one size, so they may be compared, with each other only.

    Otherwise, where `choices` are closed, all questions with the same options are pooled: the distance is that of the
    two overall shares, which can agree though single questions do not.

    Args:
        evidence ([`~hf_imitate.audits.evidence.Evidence`]): answers of both sides, `weight`, `choices`.
        by (`str`, *optional*): a column; each of its values has findings of its own,
        `answer_distribution_tv/<by>=<value>`. confidence (`float`, *optional*, defaults to `0.95`): of each interval
        on its own.

    Returns:
        `list[Finding]`: `answer_distribution_tv` and `human_ceiling`; where the options are ordered numbers also
        `answer_distribution_tv/wasserstein` and `human_ceiling/wasserstein`, the mean distance that probability must
        be moved, as a share of the scale.

    Raises:
        ValueError: there is no column `by`, or it has more than 50 values.

    Source:
        Santurkar et al., "Whose Opinions Do Language Models Reflect?", for the Wasserstein distance between opinions.
        https://huggingface.co/papers/2303.17548
    """
    everyone = np.flatnonzero(evidence.weight > 0)
    findings = _compare(evidence, everyone, "", confidence)
    if by is None:
        return findings
    for value, rows in _subgroups(evidence, by, everyone):
        findings += _compare(evidence, rows, f"/{by}={value}", confidence)
    return findings


def _subgroups(evidence: Evidence, by: str, rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if by not in evidence.columns:
        raise ValueError(f"There is no column {by!r} to group by; the data set has {sorted(evidence.columns)}.")
    values = [str(evidence.columns[by][row]) for row in rows]
    names = subgroup_names(by, values)
    return [(shown, rows[[value == name for value in values]]) for name, shown in names.items()]


def subgroup_names(by: str, values: Sequence[Any]) -> dict[str, str]:
    """What findings call each value of a column: its first 40 characters, those that can be seen, no two alike.

    Raises:
        ValueError: there are more than 50.
    """
    names: dict[str, str] = {}
    found = sorted(set(map(str, values)))
    if len(found) > MAX_SUBGROUPS:
        raise ValueError(
            f"Column {by!r} has {len(found)} different values; at most {MAX_SUBGROUPS} subgroups are compared. Give a "
            "coarser column."
        )
    for value in found:
        shown = "".join(character if character.isprintable() else " " for character in value[:40])
        alike = (f"{shown} ({number})" for number in count(2))
        names[value] = next(name for name in chain([shown], alike) if name not in names.values())
    return names


def _compare(evidence: Evidence, rows: np.ndarray, suffix: str, confidence: float) -> list[Finding]:
    repeated = [group for group in _grouped(evidence.question[rows].tolist(), rows) if len(group) > 1]
    if len(repeated) >= MIN_QUESTIONS:
        return _per_question([_cell(evidence, group) for group in repeated], evidence.seed, suffix, confidence)
    firsts = [group[0] for group in _grouped(evidence.question[rows].tolist(), rows)]
    if evidence.choices is not None:
        keys = [tuple(map(str, evidence.choices[row] or ())) for row in firsts]
        pools = [
            group
            for group in _grouped(keys, np.array(firsts))
            if len(group) >= MIN_QUESTIONS and len(_options(evidence, group[0])) > 1
        ]
        if pools:
            return _pooled([_cell(evidence, pool) for pool in pools], evidence.seed, suffix, confidence)
    reason = (
        f"Not measured: {len(repeated)} of {len(firsts)} questions have two human answers or more, need at least "
        f"{MIN_QUESTIONS}; and no `choices` are shared by {MIN_QUESTIONS} questions."
    )
    return [Finding(name + suffix, None, "probability", detail=reason) for name in (_TV, _CEILING)]


def _grouped(keys: Sequence[Any], rows: np.ndarray) -> list[np.ndarray]:
    groups: dict[Any, list[int]] = {}
    for key, row in zip(keys, rows.tolist(), strict=True):
        groups.setdefault(key, []).append(row)
    return [np.array(group) for group in groups.values()]


# --- which answer is which


def _cell(evidence: Evidence, rows: np.ndarray) -> _Cell:
    options = _options(evidence, rows[0])
    codes: dict[Any, int] = {option: number for number, option in enumerate(options)}
    sides = []
    for answers in (evidence.human_answers, evidence.imitator_answers):
        keys = [_key(answers[row], bool(options)) for row in rows]
        if options:
            # What is none of the options is one more answer, the same for both sides.
            sides.append(np.array([codes.get(key, len(options)) for key in keys]))
        else:
            sides.append(np.array([codes.setdefault(key, len(codes)) for key in keys]))
    return _Cell(sides[0], sides[1], evidence.weight[rows], len(options), _positions(options))


def _options(evidence: Evidence, row: int) -> list[str]:
    if evidence.choices is None or not evidence.choices[row]:
        return []
    return list(dict.fromkeys(canonical_text(str(option)).strip().casefold() for option in evidence.choices[row]))


def _key(answer: Answer, is_closed: bool) -> Any:
    text = canonical_text(answer.text).strip()
    # Where everything is an answer, one that was cut is another than the same text that ended.
    return text.casefold() if is_closed else (text, answer.ended)


def _positions(options: list[str]) -> np.ndarray | None:
    try:
        numbers = np.array([float(option) for option in options])
    except ValueError:
        return None
    is_scale = (
        len(numbers) > 1
        and np.isfinite(numbers).all()
        and ((np.diff(numbers) > 0).all() or (np.diff(numbers) < 0).all())
    )
    return (numbers - numbers.min()) / np.ptp(numbers) if is_scale else None


# --- distances


def answer_shares(codes: np.ndarray, weights: np.ndarray, num_codes: int) -> np.ndarray:
    """Weighted share of each answer in S samples of M answers, as numbers below C = `num_codes`. [S, M] to [S, C]."""
    places = codes + num_codes * np.arange(len(codes))[:, None]
    shares = np.bincount(places.ravel(), weights.ravel(), num_codes * len(codes)).reshape(len(codes), num_codes)
    return shares / shares.sum(axis=1, keepdims=True)


def total_variation(shares: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Total variation between laws on C answers. [..., C] to [...], in [0, 1]."""
    return np.minimum(np.abs(shares - other).sum(axis=-1) / 2, 1.0)


def wasserstein(shares: np.ndarray, other: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Mean distance by which probability must be moved along a scale.

    Args:
        shares, other: of the options in order, then of what is none of them and is left out. [..., C].
        positions: of the options. [C - 1].

    Returns:
        [...], in the unit of `positions`; NaN where a side has no answer on the scale.
    """
    order = np.argsort(positions)
    cumulative = []
    for side in (shares, other):
        on_scale = side[..., order]
        total = on_scale.sum(axis=-1, keepdims=True)
        cumulative.append(np.cumsum(on_scale / np.where(total > 0, total, np.nan), axis=-1)[..., :-1])
    return (np.abs(cumulative[0] - cumulative[1]) * np.diff(positions[order])).sum(axis=-1)


def _distance(cell: _Cell, shares: np.ndarray, other: np.ndarray, is_wasserstein: bool) -> np.ndarray:
    if is_wasserstein and cell.positions is not None:
        return wasserstein(shares, other, cell.positions)
    return total_variation(shares, other)


def _halves(cell: _Cell, rng: np.random.Generator, is_wasserstein: bool = False) -> _Distances:
    num_rows = len(cell.human)
    orders = rng.permuted(np.tile(np.arange(num_rows), (_NUM_SPLITS if num_rows > 2 else 1, 1)), axis=1)
    first, second = orders[:, : num_rows // 2], orders[:, num_rows // 2 : 2 * (num_rows // 2)]

    def shares(side: np.ndarray, half: np.ndarray) -> np.ndarray:
        return answer_shares(side[half], cell.weight[half], cell.num_codes)

    found = []
    for one, two in ((first, second), (second, first)):
        of_humans = shares(cell.human, one)
        others = shares(cell.imitator, two), shares(cell.human, two)
        found.append([_distance(cell, of_humans, other, is_wasserstein) for other in others])
    pairs = np.concatenate(found, axis=1)  # [2, splits]
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    return _Distances(*(pairs.mean(axis=1).tolist() if pairs.size else (math.nan, math.nan)))


# --- the findings


def _per_question(cells: list[_Cell], seed: int, suffix: str, confidence: float) -> list[Finding]:
    weights = np.array([cell.weight.mean() for cell in cells])
    questions = np.arange(len(cells))
    counts = np.array([len(cell.human) for cell in cells])
    squared = cluster_mean([_squared_distance(cell) for cell in cells], questions, confidence, weights)
    sizes = f"{len(cells)} questions with {counts.min()} to {counts.max()} human answers"
    unbiased = (
        f"Free of the samples' size: mean sum of squared differences {squared.value:.4g} "
        f"({squared.interval.low:.4g} to {squared.interval.high:.4g}), 0 only between equal laws. "
    )
    findings = []
    for is_wasserstein in (False, True):
        if is_wasserstein and any(cell.positions is None for cell in cells):
            continue
        rng = np.random.default_rng([seed % 2**64, is_wasserstein])
        found = np.array([_halves(cell, rng, is_wasserstein) for cell in cells])  # [cells, 2]
        kept = ~np.isnan(found).any(axis=1)
        names, unit = _names(is_wasserstein, suffix)
        if kept.sum() < MIN_QUESTIONS:
            have = number_of(int(kept.sum()), "question has", "questions have")
            reason = f"Not measured: {have} answers on the scale; need {MIN_QUESTIONS}."
            findings += [Finding(name, None, unit, detail=reason) for name in names]
            continue
        more = paired_cluster_mean(found[kept, 0], found[kept, 1], questions[kept], confidence, weights[kept])
        excess = (
            f"Imitator minus humans: {more.value:+.4g} ({more.interval.low:+.4g} to {more.interval.high:+.4g}); below "
            "0 an imitator can be that keeps to the commonest answers, where a question has few. "
        )
        details = (
            f"Half of a question's humans against as many of the imitator's answers; {sizes}; compare it with "
            f"`{names[1]}` only. {excess}{'' if is_wasserstein else unbiased}t interval over questions.",
            f"Half of a question's humans against as many others; {sizes}. t interval over questions.",
        )
        for name, values, detail in zip(names, found[kept].T, details, strict=True):
            estimate = cluster_mean(values, questions[kept], confidence, weights[kept])
            interval = (max(0.0, estimate.interval.low), min(1.0, estimate.interval.high))
            findings.append(Finding(name, estimate.value, unit, interval, confidence, int(kept.sum()), detail=detail))
    return findings


def _pooled(cells: list[_Cell], seed: int, suffix: str, confidence: float) -> list[Finding]:
    sizes = np.array([len(cell.human) for cell in cells])
    totals = np.array([cell.weight.sum() for cell in cells])
    has_equal_weights = all(np.ptp(cell.weight) <= 1e-12 * cell.weight.max() for cell in cells)
    num_off = sum(int((side == cell.num_options).sum()) for cell in cells for side in (cell.human, cell.imitator))
    pools = f"{int(sizes.sum())} questions, one answer each, in {len(cells)} sets of equal options"
    findings = []
    for is_wasserstein in (False, True):
        if is_wasserstein and any(cell.positions is None for cell in cells):
            continue
        rng = np.random.default_rng([seed % 2**64, is_wasserstein])
        names, unit = _names(is_wasserstein, suffix)
        whole = [_whole(cell, is_wasserstein) for cell in cells]
        halves = np.array([_halves(cell, rng, is_wasserstein) for cell in cells])
        if np.isnan(whole).any() or np.isnan(halves).any():
            reason = "Not measured: in a set of options no answer of one side is on the scale."
            findings += [Finding(name, None, unit, detail=reason) for name in names]
            continue
        value = float(np.average(whole, weights=totals))
        to_imitator, to_humans = np.average(halves, axis=0, weights=totals)
        reach = float(np.average([_reach(cell, (1 - confidence) / len(cells)) for cell in cells], weights=totals))
        # Moving probability over the whole scale costs at most as much as it is, so the same reach will do; but what
        # is left out on the way is no probability of either law.
        has_interval = has_equal_weights and not (is_wasserstein and num_off)
        interval = (max(0.0, value - reach), min(1.0, value + reach)) if has_interval else None
        held = (
            "Interval by the deviation of observed shares (Weissman et al.), without approximation, for this number "
            "alone"
            if has_interval
            else "No interval, since rows weigh differently or are off the scale"
        )
        detail = (
            f"Overall shares of the options; {pools}; single questions may differ though these agree; "
            f"{number_of(num_off, 'answer is', 'answers are')} none of the options. {held}. At the size "
            f"of `{names[1]}`, half of the humans, it is {to_imitator:.4g}."
        )
        level = None if interval is None else confidence
        findings.append(Finding(names[0], value, unit, interval, level, int(sizes.sum()), detail=detail))
        half = f"Half of the humans against the other half, mean over random halves; {pools}. No interval."
        findings.append(Finding(names[1], float(to_humans), unit, n=int(sizes.sum()), detail=half))
    return findings


def _names(is_wasserstein: bool, suffix: str) -> tuple[tuple[str, str], str]:
    kind = "/wasserstein" if is_wasserstein else ""
    return (f"{_TV}{kind}{suffix}", f"{_CEILING}{kind}{suffix}"), "ratio" if is_wasserstein else "probability"


def _whole(cell: _Cell, is_wasserstein: bool) -> float:
    human, imitator = (
        answer_shares(side[None], cell.weight[None], cell.num_codes) for side in (cell.human, cell.imitator)
    )
    return float(_distance(cell, human, imitator, is_wasserstein)[0])


def _squared_distance(cell: _Cell) -> float:
    """Unbiased for the sum over answers of (p - q)^2, by pairs of different rows: they are independent."""
    is_other = ~np.eye(len(cell.human), dtype=bool)
    pair_weight = np.outer(cell.weight, cell.weight) * is_other

    def agreement(one: np.ndarray, two: np.ndarray) -> float:
        return float((pair_weight * (one[:, None] == two[None, :])).sum() / pair_weight.sum())

    within = agreement(cell.human, cell.human) + agreement(cell.imitator, cell.imitator)
    return within - 2 * agreement(cell.human, cell.imitator)


def _reach(cell: _Cell, error: float) -> float:
    """How far observed shares of k answers can be from the law's, on both sides together, but for `error`.

        P(total variation >= t) <= (2^k - 2) exp(-2 n t^2),      half of the error for either side

    Source: Weissman et al., "Inequalities for the L1 deviation of the empirical distribution" (2003).
    """
    k = cell.num_options + 1
    log_sets = k * math.log(2) + math.log1p(-(2.0 ** (1 - k)))
    return 2 * math.sqrt((log_sets - math.log(error / 2)) / (2 * len(cell.human)))
