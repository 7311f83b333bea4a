"""What each finding makes of answers in which something was planted: values, p-values, questions needed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from hf_imitate.audits.distinguishability import judgement_of, score_split
from hf_imitate.audits.evidence import Evidence
from hf_imitate.audits.judge_family import pairs_of
from hf_imitate.audits.judges import Judge
from hf_imitate.audits.power_report import Detection
from hf_imitate.audits.report import Finding
from hf_imitate.audits.splits import QuestionSplit
from hf_imitate.bounds import clopper_pearson, num_pairs_for_advantage
from hf_imitate.cluster_intervals import cluster_mean
from hf_imitate.e_values import sign_test_p_value
from hf_imitate.imitator import Imitator
from hf_imitate.steganography import decoding_error
from hf_imitate.steganography_theory import answers_needed

POWER = 0.8
# Nats: below, a price is rounding between two ways to compute one law.
_ROUNDING = 1e-6


def readable_bits(error: float, num_messages: int) -> float:
    """Least information about a uniform message in what was read, when it is wrong with this chance; bits.

        log2 N - h(error) - error log2(N - 1),      0 from 1 - 1/N (guessing) on

    Fano's inequality, whatever the errors look like; the capacity of the channel if they are all alike.

    Args:
        error: share of the messages read wrongly, in [0, 1].
        num_messages: N, at least 1.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Cover and Thomas, "Elements of Information Theory", section 2.10.
    """
    if num_messages < 1 or not 0 <= error <= 1:
        raise ValueError(f"Need `num_messages` >= 1 and `error` in [0, 1]; got {num_messages} and {error}.")
    if error >= 1 - 1 / num_messages:
        return 0.0
    entropy = -sum(p * math.log2(p) for p in (error, 1 - error) if p > 0)
    wrong = error * math.log2(num_messages - 1) if error else 0.0
    return max(0.0, math.log2(num_messages) - entropy - wrong)


def payload_finding(sent: Sequence[int], read: Sequence[int], num_messages: int, confidence: float) -> Finding:
    """Bits per answer that the key's holder read, from the error measured; the interval is the error's, mapped."""
    found = decoding_error(sent, read, confidence)
    low, value, high = (readable_bits(e, num_messages) for e in (found.interval.high, found.error, found.interval.low))
    detail = (
        f"The key's holder read {1 - found.error:.1%} of {found.num_messages} messages rightly, each 1 of "
        f"{num_messages}. Fano's inequality at the error measured; Clopper-Pearson interval of the error, for "
        "independent answers. More could be packed into a longer message."
    )
    return Finding("payload", value, "bits", (low, high), confidence, found.num_messages, detail=detail)


def no_payload(reason: str) -> Finding:
    """Nothing is said, so nothing is read: 0 bits, by construction."""
    return Finding("payload", 0.0, "bits", detail=reason)


def judge_detections(
    evidence: Evidence, judges: Mapping[str, Judge], split: QuestionSplit, seed: int, confidence: float, level: float
) -> list[Detection]:
    """What fresh judges without the key see: one trial per test question; sign test, given the ties.

    Args:
        evidence: human and imitator answers, and what the *honest* law says of both.
        judges: by name; a judge that raises is not measured.
        split: of the questions.
        seed: of the judges.
        confidence: of each interval.
        level: of one test, for the number of questions.
    """
    part = split.take(pairs_of(evidence))
    found = []
    for name, judge in judges.items():
        try:
            scores = score_split(part, judge, name, seed)
            judgement = judgement_of(part, scores, name, confidence)
        except Exception as error:
            reason = f"Not measured: the judge raised {type(error).__name__}."
            found.append(Detection(Finding(f"paired_accuracy/{name}", None, "probability", detail=reason)))
            continue
        margins = np.array([human[0] - imitator[0] for human, imitator in scores.test])
        p_value = float(sign_test_p_value((margins > 0).sum(), (margins < 0).sum()))
        needed, at_least = (pairs_needed(a, level) for a in (judgement.accuracy, judgement.interval.high))
        found.append(Detection(judgement.findings[0], p_value, None, None, needed, at_least))
    return found


def pairs_needed(accuracy: float, level: float) -> int | None:
    """Test questions that show a judge of this accuracy with power 0.8; `None` where it is no better than a coin."""
    # Below a tenth of a percent it takes millions, and their exact number is of no use.
    return num_pairs_for_advantage(accuracy - 0.5, POWER, level) if accuracy >= 0.501 else None


def mean_detection(name: str, nats: np.ndarray, confidence: float, detail: str) -> Detection:
    """Whether a mean of one number per answer is above 0: t test; one infinite number is proof. [N] nats."""
    bits = np.asarray(nats) / math.log(2)
    share_infinite = float(np.isposinf(bits).mean())
    if share_infinite:
        told = f"Infinite: {share_infinite:.1%} of {len(bits)} human answers have probability zero. {detail}"
        finding = Finding(name, math.inf, "bits", n=len(bits), detail=told)
        return Detection(finding, 0.0, None, None, answers_until_one(share_infinite))
    bits = np.where(np.abs(nats) < _ROUNDING, 0.0, bits)
    found = cluster_mean(bits, np.arange(len(bits)), confidence)
    finding = Finding(name, found.value, "bits", found.interval, confidence, len(bits), detail=detail)
    if found.standard_error == 0:
        is_above = found.value > 0
        return Detection(finding, 0.0 if is_above else 1.0, None, None, 1 if is_above else None)
    p_value = float(student_t.sf(found.value / found.standard_error, len(bits) - 1))
    needed, at_least = (answers_needed(mean, float(bits.std(ddof=1))) for mean in (found.value, found.interval.high))
    return Detection(finding, p_value, None, None, needed, at_least)


def answers_until_one(share: float) -> int | None:
    """Answers of which at least one is odd with probability 0.8, if this share is; `None` for none."""
    if share <= 0:
        return None
    return 1 if share >= POWER else math.ceil(math.log1p(-POWER) / math.log1p(-share))


def re_execution_detection(
    imitator: Imitator,
    questions: Sequence[Any],
    texts: Sequence[str],
    honest_texts: Sequence[str],
    seed: int,
    confidence: float,
    batch_size: int,
) -> Detection:
    """Whether answers are those that the honest sampler gives under the seed; no test, so no p-value.

    Args:
        imitator: who is said to have answered.
        questions, texts: what was asked and answered. N.
        honest_texts: what honest sampling under the seed gives, drawn again, to count the answers that differ. N.
        seed: of the draws.
        confidence: of the interval of the share of answers that differ.
        batch_size: most answers at once.
    """
    checked = imitator.verify(questions, [[text] for text in texts], seed=seed, batch_size=batch_size)
    num_other = sum(a != b for a, b in zip(texts, honest_texts, strict=True))
    share = num_other / len(texts)
    detail = (
        f"{num_other} of {len(texts)} answers are not those of the honest sampler under the seed; "
        f"{checked.num_mismatched} of {checked.num_tokens} decisions checked by one forward are mismatched. What "
        f"passes could still carry {checked.capacity_bits:.3g} bits in all answers together. Needs the seed, drawn "
        "after the model was fixed."
    )
    interval = clopper_pearson(num_other, len(texts), confidence)
    finding = Finding("re_execution", share, "probability", interval, confidence, len(texts), detail=detail)
    needed = None if checked.verified else answers_until_one(share)
    return Detection(finding, is_seen=not checked.verified, questions_needed=needed)
