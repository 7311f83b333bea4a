"""What probability did the imitator give the human's answer? Bits per answer and byte, and what is certain of them."""

import math
from typing import NamedTuple

import numpy as np

from hf_imitate.audits.evidence import AnswerScores, Evidence
from hf_imitate.audits.report import Finding
from hf_imitate.audits.report_text import number_of
from hf_imitate.bounds import Interval, clopper_pearson
from hf_imitate.cluster_intervals import ClusterEstimate, cluster_mean, cluster_ratio, paired_cluster_mean
from hf_imitate.log_probs import nats_to_bits
from hf_imitate.population_bounds import floored_log_prob_lower_bound

# Below, an interval that leans on the central limit theorem over questions cannot be trusted.
MIN_QUESTIONS = 30
# Share of the floor law in what is certified; it costs at most 0.0014 bits and shifts total variation by as much.
FLOOR_SHARE = 2.0**-10
# Declared longest answer, in bytes, where there are no training answers to declare it from.
MAX_ANSWER_BYTES = 1024
_ESTIMATES_KEEP_IT = (
    "Scores are estimates whose mean is at most the probability: the bound holds for the law itself, and is lower. "
)
# Nats by which a sum of float32 log-probabilities may exceed 0.
_ROUNDING = 1e-3


class FlooredLogProb(NamedTuple):
    """A certified lower bound on the mean log-probability of human answers.

    Attributes:
        lower_bound (`float`, *optional*): nats; `None` where there is none.
        num_questions (`int`): questions behind it.
        detail (`str`): of which law and population it holds, or why there is none.
    """

    lower_bound: float | None
    num_questions: int
    detail: str


def audit_retrodiction(
    evidence: Evidence,
    confidence: float = 0.95,
    certified_confidence: float | None = None,
    max_answer_bytes: int | None = None,
) -> list[Finding]:
    """Measure how probable the humans' answers were for the imitator.

    Args:
        evidence ([`~hf_imitate.audits.evidence.Evidence`]): answers and scores.
        confidence (`float`, *optional*, defaults to `0.95`): of each interval on its own.
        certified_confidence (`float`, *optional*): of `mean_log_prob_lower`; defaults to `confidence`.
        max_answer_bytes (`int`, *optional*): longest answer of the population, see [`floored_log_prob`].

    Returns:
        `list[Finding]`: `bits_per_answer`, `bits_per_byte` and `calibration_gap` in bits, `mean_log_prob_lower` in
        nats (certified), `outside_support` (share of human answers of probability zero) and `length_ratio`.
    """
    return [
        *_bits(evidence, confidence),
        _mean_log_prob_lower(
            evidence, confidence if certified_confidence is None else certified_confidence, max_answer_bytes
        ),
        _outside_support(evidence, confidence),
        _calibration_gap(evidence, confidence),
        _length_ratio(evidence, confidence),
    ]


def paired_difference(evidence_a: Evidence, evidence_b: Evidence, confidence: float = 0.95) -> list[Finding]:
    """Compare two imitators on the same human answers: bits per answer of A minus those of B; below 0, A is better.

    Args:
        evidence_a, evidence_b ([`~hf_imitate.audits.evidence.Evidence`]): audits of A and of B on the same rows.
        confidence (`float`, *optional*, defaults to `0.95`): of the interval, normal over questions.

    Returns:
        `list[Finding]`: `bits_per_answer_difference`.

    Raises:
        ValueError: the two audits looked at different rows.

    Source:
        Miller, "Adding Error Bars to Evals", section on paired differences. https://huggingface.co/papers/2411.00640
    """
    texts_a, texts_b = ([answer.text for answer in e.human_answers] for e in (evidence_a, evidence_b))
    if texts_a != texts_b or evidence_a.prompts != evidence_b.prompts:
        raise ValueError(
            f"The two audits looked at different rows ({len(texts_a)} and {len(texts_b)}). A paired difference needs "
            "the same questions and human answers in the same order: audit both on one data set."
        )
    name, unit = "bits_per_answer_difference", "bits"
    is_whole = usable_rows(evidence_a, evidence_a.human) & usable_rows(evidence_b, evidence_b.human)
    problem = _problem(evidence_a, is_whole, evidence_a.human) or _problem(evidence_b, is_whole, evidence_b.human)
    if problem:
        return [not_measured(name, unit, problem)]
    usable = is_whole & (evidence_a.weight > 0)
    loss_a, loss_b = -evidence_a.human.nats[usable], -evidence_b.human.nats[usable]
    num_infinite = [int(np.isinf(loss).sum()) for loss in (loss_a, loss_b)]
    if any(num_infinite):
        reason = (
            f"A gave {num_infinite[0]} and B gave {num_infinite[1]} of {len(loss_a)} human answers probability zero"
        )
        return [not_measured(name, unit, f"{reason}; compare `outside_support`.")]
    weights = evidence_a.weight[usable]
    found = paired_cluster_mean(loss_a, loss_b, evidence_a.question[usable], confidence, weights)
    share = float(np.average((loss_a < loss_b) + 0.5 * (loss_a == loss_b), weights=weights))
    detail = (
        "Bits per human answer of the first imitator minus those of the second, on the same answers; below 0, the "
        f"first is better. It gave the likelier {share:.1%} of them (ties 1/2). t interval over questions. "
        f"{_estimated(evidence_a, usable, 'Of the first imitator: s')}"
        f"{_estimated(evidence_b, usable, 'Of the other imitator: s')}{_left_out(is_whole)}"
    )
    return [_finding(name, _in_bits(found), unit, confidence, detail)]


def floored_log_prob(
    evidence: Evidence, confidence: float, max_answer_bytes: int | None = None, among: np.ndarray | None = None
) -> FlooredLogProb:
    """Certify a lower bound on the mean log-probability of human answers under the imitator mixed with a floor law.

    Without the floor no bound exists: one unseen answer of probability zero would make the mean infinite. The floor is
    over byte strings and takes a share 2^-10. The longest answer is declared, in bytes, not looked up in the test
    answers: `max_answer_bytes`, else the next power of two from the longest training answer, else 1024. One row per
    question counts, its first that was not cut.

    Args:
        evidence ([`~hf_imitate.audits.evidence.Evidence`]): answers and scores.
        confidence (`float`): one-sided.
        max_answer_bytes (`int`, *optional*): longest answer of the population.
        among (`np.ndarray`, *optional*): rows that may count, [N], bool; all by default.

    Returns:
        [`FlooredLogProb`].
    """
    is_whole = usable_rows(evidence, evidence.human)
    counted = is_whole if among is None else is_whole & among
    rows = first_rows(evidence, counted & (evidence.weight > 0))
    problem = _problem(evidence, counted, evidence.human)
    num_bytes = _num_bytes(evidence)[rows]
    cap = _declared_cap(evidence) if max_answer_bytes is None else max_answer_bytes
    if not problem and (num_bytes > cap).any():
        problem = (
            f"{int((num_bytes > cap).sum())} of {len(rows)} answers are longer than the declared {cap} bytes. The cap "
            "defines the population and is fixed beforehand: declare one that every answer obeys (`max_answer_bytes`)."
        )
    if problem:
        return FlooredLogProb(None, len(rows), problem)
    mean_symbols = max(1.0, cap / 8)
    bound = floored_log_prob_lower_bound(
        evidence.human.nats[rows], num_bytes, cap, mean_symbols, FLOOR_SHARE, confidence, alphabet_size=256
    )
    unweighted = "" if np.ptp(evidence.weight) == 0 else "Rows count alike here, whatever their weight. "
    detail = (
        f"Of the imitator mixed with a share {FLOOR_SHARE:.2g} of a floor law over byte strings (geometric length, "
        f"mean {mean_symbols:g} bytes), for a population of independent questions whose answers end within the length "
        f"limit and have at most {cap} bytes; one answer per question. "
        f"{unweighted}{'' if evidence.is_exact else _ESTIMATES_KEEP_IT}{_left_out(is_whole)}"
    )
    return FlooredLogProb(bound, len(rows), detail)


def usable_rows(evidence: Evidence, scores: AnswerScores) -> np.ndarray:
    """Rows whose answer was not cut at the length limit: a cut answer's score is that of a beginning. [N], bool."""
    answers = evidence.human_answers if scores is evidence.human else evidence.imitator_answers
    return ~np.asarray(scores.is_cut, dtype=bool) & np.array([answer.ended for answer in answers], dtype=bool)


def first_rows(evidence: Evidence, usable: np.ndarray) -> np.ndarray:
    """Row number of each question's first usable row, ascending: what is independent. [num_questions], int."""
    rows = np.flatnonzero(usable)
    return np.sort(rows[np.unique(evidence.question[rows], return_index=True)[1]])


def not_measured(name: str, unit: str, reason: str) -> Finding:
    """The finding that says why there is no number."""
    return Finding(name, None, unit, detail=f"Not measured: {reason}")


# --- the findings


def _bits(evidence: Evidence, confidence: float) -> list[Finding]:
    is_whole = usable_rows(evidence, evidence.human)
    problem = _problem(evidence, is_whole, evidence.human)
    if problem:
        return [not_measured(name, "bits", problem) for name in ("bits_per_answer", "bits_per_byte")]
    counted = is_whole & (evidence.weight > 0)
    loss, weights, questions = -evidence.human.nats[counted], evidence.weight[counted], evidence.question[counted]
    num_bytes = _num_bytes(evidence)[counted]
    told = f"{_estimated(evidence, counted)}{_left_out(is_whole)}"
    is_outside = np.isinf(loss)
    if is_outside.any():
        rest = float(np.average(loss[~is_outside], weights=weights[~is_outside])) if not is_outside.all() else math.nan
        told = (
            f"Infinite: {int(is_outside.sum())} of {len(loss)} human answers ({is_outside.mean():.1%}) have "
            "probability "
            f"zero{'' if is_outside.all() else f'; the others take {nats_to_bits(rest):.4g} bits on average'}. {told}"
        )
        n = len(np.unique(questions))
        return [Finding(name, math.inf, "bits", n=n, detail=told) for name in ("bits_per_answer", "bits_per_byte")]
    per_answer = cluster_mean(loss, questions, confidence, weights)
    mean = f"Mean over human answers of minus the log-probability, end included; t interval over questions. {told}"
    findings = [_finding("bits_per_answer", _in_bits(per_answer), "bits", confidence, mean)]
    if not (num_bytes * weights).sum() > 0:
        return [*findings, not_measured("bits_per_byte", "bits", "every human answer is empty.")]
    per_byte = cluster_ratio(loss, num_bytes, questions, confidence, weights)
    num_empty = int((num_bytes == 0).sum())
    costs = number_of(num_empty, "empty answer costs bits and has", "empty answers cost bits and have")
    empty = f"{costs} no byte. " if num_empty else ""
    ratio = f"All bits over all UTF-8 bytes of human answers; linearised t interval over questions. {empty}{told}"
    return [*findings, _finding("bits_per_byte", _in_bits(per_byte), "bits", confidence, ratio)]


def _mean_log_prob_lower(evidence: Evidence, confidence: float, max_answer_bytes: int | None) -> Finding:
    found = floored_log_prob(evidence, confidence, max_answer_bytes)
    if found.lower_bound is None:
        return not_measured("mean_log_prob_lower", "nats", found.detail)
    return Finding(
        *("mean_log_prob_lower", found.lower_bound, "nats", (found.lower_bound, 0.0), confidence, found.num_questions),
        certified=True,
        detail=f"Certified lower bound on the mean log-probability of a human answer. {found.detail}",
    )


def _outside_support(evidence: Evidence, confidence: float) -> Finding:
    name, unit = "outside_support", "probability"
    is_whole = usable_rows(evidence, evidence.human)
    rows = first_rows(evidence, is_whole & (evidence.weight > 0))
    problem = score_problem(evidence, evidence.human)
    if not problem and not (evidence.is_exact or evidence.has_exact_zeros):
        problem = "scores are estimates, and an estimate of zero does not prove a probability of zero."
    if not problem and not len(rows):
        problem = f"all {len(is_whole)} human answers were cut at the length limit."
    if problem:
        return not_measured(name, unit, problem)
    num_outside = int(np.isneginf(evidence.human.nats[rows]).sum())
    interval = clopper_pearson(num_outside, len(rows), confidence)
    law = "truncated: tokens left out by it have probability zero" if evidence.is_truncated_law else "not truncated"
    detail = (
        f"{num_outside} of {len(rows)} human answers, the first of each question, have probability zero under the "
        f"audited law, which is {law}. Exact Clopper-Pearson interval, for this number alone. {_left_out(is_whole)}"
    )
    return Finding(name, num_outside / len(rows), unit, interval, confidence, len(rows), detail=detail.strip())


def _calibration_gap(evidence: Evidence, confidence: float) -> Finding:
    name, unit = "calibration_gap", "bits"
    is_whole = usable_rows(evidence, evidence.human) & usable_rows(evidence, evidence.imitator)
    problem = _problem(evidence, is_whole, evidence.human) or _problem(evidence, is_whole, evidence.imitator)
    if problem:
        return not_measured(name, unit, problem)
    usable = is_whole & (evidence.weight > 0)
    human, own = -evidence.human.nats[usable], -evidence.imitator.nats[usable]
    weights, questions = evidence.weight[usable], evidence.question[usable]
    if np.isinf(own).any():
        reason = f"{int(np.isinf(own).sum())} of the imitator's own answers have probability zero under the scored law"
        return not_measured(name, unit, f"{reason}: it was not sampled from what is scored.")
    told = (
        "A flag, no bound: what human answers cost more than the imitator's own. 0 if both laws are equal, but also "
        "for some that differ; over-confidence shows here as much as anything hidden. Where the humans' law is the "
        "imitator's without a hidden message, it is price plus payload on average over keys. t interval over "
        f"questions. {_estimated_gap(evidence, usable)}{_left_out(is_whole)}"
    )
    if np.isinf(human).any():
        share = f"Infinite: {int(np.isinf(human).sum())} of {len(human)} human answers have probability zero. "
        return Finding(name, math.inf, unit, n=len(np.unique(questions)), detail=share + told)
    found = paired_cluster_mean(human, own, questions, confidence, weights)
    return _finding(name, _in_bits(found), unit, confidence, told)


def _length_ratio(evidence: Evidence, confidence: float) -> Finding:
    name, unit = "length_ratio", "ratio"
    cut = [~usable_rows(evidence, scores) for scores in (evidence.human, evidence.imitator)]
    everything = np.ones(len(cut[0]), dtype=bool)
    problem = _count_problem(evidence, everything)
    for side, is_cut in zip(("human", "imitator"), cut, strict=True):
        if not problem and is_cut.all():
            problem = (
                f"all {len(is_cut)} {side} answers were cut at the length limit, so their lengths are the limit's."
            )
    if problem:
        return not_measured(name, unit, problem)
    imitator, human = (np.asarray(scores.num_tokens, float) for scores in (evidence.imitator, evidence.human))
    if not (human * evidence.weight).sum() > 0:
        return not_measured(name, unit, "the human answers have no tokens.")
    found = cluster_ratio(imitator, human, evidence.question, confidence, evidence.weight)
    counts = (
        f"{int(cut[0].sum())} human and {int(cut[1].sum())} imitator answers were cut and count as long as the limit"
    )
    detail = f"Mean tokens of an answer, imitator over human, end included; t interval over questions. {counts}."
    interval = Interval(max(0.0, found.interval.low), found.interval.high)
    return _finding(name, found._replace(interval=interval), unit, confidence, detail)


# --- what stands in the way


def _problem(evidence: Evidence, usable: np.ndarray, scores: AnswerScores) -> str:
    """Why no number would be valid, or nothing."""
    return score_problem(evidence, scores) or _count_problem(evidence, usable)


def score_problem(evidence: Evidence, scores: AnswerScores) -> str:
    """Why these scores are no log-probabilities, or nothing."""
    num_nan = int(np.isnan(scores.nats).sum())
    side = "human" if scores is evidence.human else "imitator"
    num_positive = int((scores.nats > _ROUNDING).sum()) if evidence.is_exact else 0
    if num_positive:
        return (
            f"{num_positive} of {len(scores.nats)} {side} answers have a probability above 1: the scores are no law's."
        )
    if not num_nan:
        return ""
    return f"{num_nan} of {len(scores.nats)} {side} answers have NaN as log-probability; load the model in float32."


def _count_problem(evidence: Evidence, usable: np.ndarray) -> str:
    if not usable.any():
        return f"all {len(usable)} rows hold an answer that was cut at the length limit; raise `max_new_tokens`."
    num_questions = len(first_rows(evidence, usable & (evidence.weight > 0)))
    if num_questions >= MIN_QUESTIONS:
        return ""
    left = number_of(num_questions, "question is left", "questions are left")
    return (
        f"{left} ({int((~usable).sum())} of {len(usable)} rows were cut at the length "
        f"limit); an interval needs at least {MIN_QUESTIONS}."
    )


# --- what an estimate is worth


def _estimated(evidence: Evidence, counted: np.ndarray, first: str = "S") -> str:
    """What is to be known of scores that are estimates: the mean of logs lies below the log of the mean."""
    if evidence.is_exact:
        return ""
    too_many = "so the bits are too many rather than too few"
    if evidence.num_candidates == 1:
        return f"{first}cores are estimates whose mean is at most the probability, {too_many}. "
    bias = _mean_bias(evidence.human, counted)
    size = "" if math.isnan(bias) else f": by about {nats_to_bits(-bias):.3g} bits an answer, to first order"
    k, e = evidence.num_candidates, evidence.num_estimates
    return (
        f"{first}cores are estimates: the log of the mean of {e} unbiased estimates of the probability that an answer "
        f"kept out of {k} is this one, each from {k - 1} fresh candidates. A log of a mean is too low on average "
        f"(Jensen), {too_many}{size}; the interval is that of the estimates. "
    )


def _estimated_gap(evidence: Evidence, counted: np.ndarray) -> str:
    if evidence.is_exact:
        return ""
    biases = [_mean_bias(scores, counted) for scores in (evidence.human, evidence.imitator)]
    sizes = " and ".join(f"{nats_to_bits(-bias):.3g}" for bias in biases)
    known = "" if any(map(math.isnan, biases)) else f", by about {sizes} bits an answer"
    return (
        f"Both sides' bits are estimates and too many on average{known}: the gap is off by the difference, which is 0 "
        "where the laws are equal. "
    )


def _mean_bias(scores: AnswerScores, counted: np.ndarray) -> float:
    """Mean of what is known of the biases, nats; NaN where nothing is."""
    known = np.zeros(0) if scores.log_bias is None else scores.log_bias[counted]
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else math.nan


def _left_out(usable: np.ndarray) -> str:
    num_cut = int((~usable).sum())
    return f"{num_cut} of {len(usable)} rows were cut at the length limit and left out. " if num_cut else ""


def _num_bytes(evidence: Evidence) -> np.ndarray:
    # A lone surrogate has no UTF-8; it is counted as the three bytes it would take.
    return np.array([len(answer.text.encode("utf-8", "surrogatepass")) for answer in evidence.human_answers])


def _declared_cap(evidence: Evidence) -> int:
    longest = max((len(text.encode("utf-8", "surrogatepass")) for text in evidence.train_answers or ()), default=0)
    return 2 ** math.ceil(math.log2(longest)) if longest > 1 else MAX_ANSWER_BYTES


def _in_bits(found: ClusterEstimate) -> ClusterEstimate:
    low, high = found.interval
    interval = Interval(nats_to_bits(low), nats_to_bits(high))
    return ClusterEstimate(nats_to_bits(found.value), nats_to_bits(found.standard_error), interval, found.num_clusters)


def _finding(name: str, found: ClusterEstimate, unit: str, confidence: float, detail: str) -> Finding:
    n = found.num_clusters
    return Finding(name, found.value, unit, found.interval, confidence, n, detail=detail.strip())
