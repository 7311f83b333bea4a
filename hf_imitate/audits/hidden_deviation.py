"""What could hide? A certified bound on *any* difference between the imitator and the humans, where one exists."""

import numpy as np

from hf_imitate.audits.evidence import Evidence
from hf_imitate.audits.report import Finding
from hf_imitate.audits.report_text import number_of
from hf_imitate.audits.retrodiction import (
    FLOOR_SHARE,
    MIN_QUESTIONS,
    first_rows,
    floored_log_prob,
    not_measured,
    score_problem,
    usable_rows,
)
from hf_imitate.deviation_bounds import (
    collision_entropy_lower_bound,
    largest_probability_within,
    total_variation_upper_bound,
    unique_answer_deviation_upper_bound,
)
from hf_imitate.log_probs import nats_to_bits

_NAME, _UNIT = "hidden_deviation", "probability"
_QUESTIONS_HAVE = ("question has", "questions have")
_ESTIMATED = "Probabilities are estimates whose mean is at most the truth; capped at 1, they only raise the bound. "
_SCORED_LAW = "It speaks of the law that was scored; that answers are drawn from it is what `sampler_match` is about. "


def audit_hidden_deviation(
    evidence: Evidence,
    confidence: float = 0.95,
    certified_confidence: float | None = None,
    entropy: str | float | None = None,
    max_answer_bytes: int | None = None,
) -> list[Finding]:
    """Bound the mean total variation between human and imitator, whatever differs and whoever knows the key.

    The imitator's loss on human answers is KL(human || imitator) + H(human). Data give the loss alone, so a bound
    needs a certified lower bound on the humans' entropy H, which exists in three cases:

    * `entropy="unique"`: each question has one right answer, and every human gives it, in one spelling (a solved
      Sudoku). Then total variation is E[1 - q(right answer)], exactly.
    * `entropy=` a number: what the mean entropy is known to be at least, nats per answer (a closed world).
    * `entropy=None`: at least 30 questions were answered twice, by two independently drawn humans. How seldom the two
      agree certifies an entropy of at most about log(n / 3) nats, which is enough for short answers only.

    Args:
        evidence ([`~hf_imitate.audits.evidence.Evidence`]): answers and scores.
        confidence (`float`, *optional*, defaults to `0.95`): where `certified_confidence` is not given.
        certified_confidence (`float`, *optional*): of the bound, one-sided.
        entropy (`str` or `float`, *optional*): see above.
        max_answer_bytes (`int`, *optional*): longest answer of the population, fixed beforehand.

    Returns:
        `list[Finding]`: `hidden_deviation`, certified; `None` with the reason where no bound exists.

    Raises:
        ValueError: `entropy` is something else.
    """
    certified = confidence if certified_confidence is None else certified_confidence
    if entropy == "unique":
        return [_unique(evidence, certified)]
    if entropy is None:
        return [_collisions(evidence, certified, max_answer_bytes)]
    if isinstance(entropy, str | bool) or not 0 <= entropy < np.inf:
        raise ValueError(
            f'`entropy` is {entropy!r}; give "unique", a number of nats that the mean entropy of human answers is '
            "known to be at least, or None to have it bounded from repeated questions."
        )
    source = f"The humans' entropy was declared to be at least {nats_to_bits(entropy):.4g} bits. "
    every = np.ones(len(evidence.question), dtype=bool)
    return [_from_entropy(evidence, float(entropy), every, certified, certified, max_answer_bytes, source)]


def _unique(evidence: Evidence, confidence: float) -> Finding:
    has_weight = evidence.weight > 0
    problem = score_problem(evidence, evidence.human)
    rows = first_rows(evidence, has_weight)
    if problem:
        return not_measured(_NAME, _UNIT, problem)
    if len(rows) < MIN_QUESTIONS:
        return not_measured(_NAME, _UNIT, f"{len(rows)} questions; need at least {MIN_QUESTIONS}.")
    num_torn = _num_disagreeing(evidence, has_weight)
    if num_torn:
        torn = number_of(num_torn, *_QUESTIONS_HAVE)
        reason = f"the answers were said to be unique, and {torn} two different human answers."
        return not_measured(_NAME, _UNIT, reason)
    is_whole = usable_rows(evidence, evidence.human)[rows]
    # A cut answer's score is that of its beginning, so it counts as probability 0: the bound only rises.
    probabilities = np.where(is_whole, np.exp(np.minimum(evidence.human.nats[rows], 0.0)), 0.0)
    bound = float(unique_answer_deviation_upper_bound(probabilities, confidence))
    cut = number_of(int((~is_whole).sum()), "cut answer counts", "cut answers count")
    detail = (
        "Certified upper bound on the mean total variation, by any set of answers. It rests on the declaration that "
        "every human gives one and the same answer, in one spelling: total variation is then the mean of 1 minus the "
        f"probability of that answer, here {1 - probabilities.mean():.4g} on {len(rows)} independent questions. "
        f"{cut} as probability 0. {_SCORED_LAW}"
        f"{'' if evidence.is_exact else _ESTIMATED}"
    )
    return _certified(bound, confidence, len(rows), detail)


def _collisions(evidence: Evidence, confidence: float, max_answer_bytes: int | None) -> Finding:
    usable = usable_rows(evidence, evidence.human) & (evidence.weight > 0)
    first = first_rows(evidence, usable)
    rest = usable.copy()
    rest[first] = False
    second = first_rows(evidence, rest)
    if len(second) < MIN_QUESTIONS:
        return not_measured(
            *(_NAME, _UNIT),
            f"{number_of(len(second), *_QUESTIONS_HAVE)} two human answers; need at least {MIN_QUESTIONS} to bound "
            "the humans' entropy from below, without which a loss says nothing absolute. Bring repeated questions, "
            'or pass `human_entropy="unique"` where each has one right answer, or a known entropy.',
        )
    first_of = dict(zip(evidence.question[first].tolist(), first.tolist(), strict=True))
    pairs = [
        (first_of[question], row) for question, row in zip(evidence.question[second].tolist(), second, strict=True)
    ]
    answers = evidence.human_answers
    num_equal = sum(answers[one].text == answers[other].text for one, other in pairs)
    each = (1 + confidence) / 2
    entropy = collision_entropy_lower_bound(num_equal, len(pairs), each)
    repeated = np.isin(evidence.question, evidence.question[second])
    source = (
        f"{num_equal} of {len(pairs)} pairs of human answers to one question are equal, so the humans' entropy is at "
        f"least {nats_to_bits(entropy):.4g} bits (upper Clopper-Pearson limit; the two of a pair must be "
        "independently drawn humans). Half of the error is spent there. "
    )
    return _from_entropy(evidence, entropy, repeated, confidence, each, max_answer_bytes, source)


def _from_entropy(
    evidence: Evidence,
    entropy: float,
    among: np.ndarray,
    confidence: float,
    loss_confidence: float,
    max_answer_bytes: int | None,
    source: str,
) -> Finding:
    floored = floored_log_prob(evidence, loss_confidence, max_answer_bytes, among)
    if floored.lower_bound is None:
        return not_measured(_NAME, _UNIT, floored.detail)
    # A loss below the entropy happens with the certificate's error only; no divergence is negative.
    divergence = max(0.0, -floored.lower_bound - entropy)
    bound = min(1.0, float(total_variation_upper_bound(divergence)) + FLOOR_SHARE)
    never = min(1.0, float(largest_probability_within(0.0, divergence)) / (1 - FLOOR_SHARE))
    verdict = "It says next to nothing. " if bound > 0.99 else ""
    detail = (
        f"Certified upper bound on the mean total variation, by any set of answers. {verdict}The divergence from the "
        f"human law is at most {nats_to_bits(divergence):.4g} bits; what no human ever does, the imitator does with "
        f"probability at most {never:.4g}. {source}{_SCORED_LAW}{floored.detail}"
    )
    return _certified(bound, confidence, floored.num_questions, detail)


def _certified(bound: float, confidence: float, n: int, detail: str) -> Finding:
    return Finding(_NAME, bound, _UNIT, (0.0, bound), confidence, n, certified=True, detail=detail.strip())


def _num_disagreeing(evidence: Evidence, counted: np.ndarray) -> int:
    """Questions to which two humans gave different answers."""
    texts: dict[int, set[str]] = {}
    for row in np.flatnonzero(counted).tolist():
        texts.setdefault(int(evidence.question[row]), set()).add(evidence.human_answers[row].text)
    return sum(len(answers) > 1 for answers in texts.values())
