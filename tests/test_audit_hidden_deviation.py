import math

import numpy as np
import pytest
from audit_evidence import evidence_of
from scipy.stats import binom

from hf_imitate.audits.hidden_deviation import audit_hidden_deviation
from hf_imitate.audits.retrodiction import FLOOR_SHARE, floored_log_prob
from hf_imitate.bounds import Interval
from hf_imitate.deviation_bounds import collision_entropy_lower_bound, total_variation_upper_bound
from hf_imitate.population_bounds import betting_lower_bound, uniform_string_log_prob


def bound_of(evidence, **settings):
    findings = audit_hidden_deviation(evidence, **settings)
    assert [finding.name for finding in findings] == ["hidden_deviation"]
    return findings[0]


def misses_rarely_enough(misses, error):
    return misses.sum() <= binom.isf(1e-5, len(misses), error)


# --- unique answers ---


def test_unique_answers_need_no_cap_and_no_floor():
    q = np.random.default_rng(0).uniform(0.8, 1, 2000)
    found = bound_of(evidence_of(np.log(q), texts=["x" * 5000] * 2000), entropy="unique")
    assert found.certified
    assert found.interval == (0.0, found.value)
    assert 0.1 < found.value < 0.125
    assert f"{1 - q.mean():.4g}" in found.detail


@pytest.mark.parametrize("tv", [0.1, 0.3, 0.5])
def test_the_bound_for_unique_answers_covers_worlds_of_known_distance(tv):
    """Half of the questions the imitator knows, the other half it gets right with probability 1 - 2 tv."""
    log_q = np.log(np.where(np.random.default_rng(0).random((2000, 40)) < 0.5, 1 - 2 * tv + 1e-300, 1.0))
    misses = np.array(
        [bound_of(evidence_of(row), entropy="unique", certified_confidence=0.9).value < tv for row in log_q]
    )
    assert misses_rarely_enough(misses, 0.1)


def test_a_cut_answer_counts_as_one_never_given():
    nats = np.full(100, -0.01)
    whole, cut = bound_of(evidence_of(nats), entropy="unique"), bound_of(evidence_of(nats, cut=(7,)), entropy="unique")
    zero = nats.copy()
    zero[7] = -np.inf
    assert cut.value == bound_of(evidence_of(zero), entropy="unique").value > whole.value
    assert "1 cut answer counts as probability 0" in cut.detail


def test_two_different_human_answers_refute_that_answers_are_unique():
    question = np.repeat(np.arange(40), 2)
    same = evidence_of(np.full(80, -0.1), texts=["abcd"] * 80, question=question)
    assert bound_of(same, entropy="unique").n == 40
    torn = evidence_of(np.full(80, -0.1), texts=["abcd"] * 79 + ["other"], question=question)
    found = bound_of(torn, entropy="unique")
    assert found.value is None
    assert "1 question has two different human answers" in found.detail


# --- a known entropy ---


def test_a_known_entropy_turns_the_loss_into_a_divergence():
    nats = np.full(3000, -math.log(8) - 0.05)
    evidence = evidence_of(nats, texts=["abc"] * 3000)
    found = bound_of(evidence, entropy=math.log(8), certified_confidence=0.9, max_answer_bytes=4)
    lower = floored_log_prob(evidence, 0.9, 4).lower_bound
    expected = float(total_variation_upper_bound(-lower - math.log(8))) + FLOOR_SHARE
    assert found.value == pytest.approx(expected)
    assert 0.16 < found.value < 0.5
    assert found.certified
    assert found.confidence == 0.9
    # Without it the same loss proves nothing.
    assert bound_of(evidence, entropy=0.0, max_answer_bytes=4).value > 0.9


def test_a_loss_below_the_entropy_is_no_negative_divergence():
    found = bound_of(evidence_of(np.full(40, -0.1)), entropy=1e6)
    assert found.value == pytest.approx(FLOOR_SHARE)


@pytest.mark.parametrize("entropy", ["uniqe", -1.0, math.inf, math.nan, True])
def test_an_entropy_that_is_none_is_refused(entropy):
    with pytest.raises(ValueError, match="entropy"):
        audit_hidden_deviation(evidence_of(np.zeros(40)), entropy=entropy)


# --- collisions ---


def world(num_questions, seed=0, num_answers=16, slip=0.1):
    """Humans answer with one of 16 letters, evenly; the imitator puts `slip` more on the first half."""
    rng = np.random.default_rng(seed)
    q = np.full(num_answers, 1 / num_answers)
    q[: num_answers // 2] += slip / (num_answers // 2)
    q[num_answers // 2 :] -= slip / (num_answers // 2)
    with np.errstate(divide="ignore"):
        return rng.integers(0, num_answers, (num_questions, 2)), np.log(q)


def test_two_humans_per_question_certify_an_entropy():
    drawn, log_q = world(4000)
    texts = [chr(97 + letter) for letter in drawn.ravel()]
    question = np.repeat(np.arange(4000), 2)
    evidence = evidence_of(log_q[drawn.ravel()], texts=texts, question=question)
    found = bound_of(evidence, certified_confidence=0.9, max_answer_bytes=1)
    num_equal = int((drawn[:, 0] == drawn[:, 1]).sum())
    # Half of the error each.
    entropy = collision_entropy_lower_bound(num_equal, 4000, 0.95)
    lower = floored_log_prob(evidence, 0.95, 1).lower_bound
    assert found.value == pytest.approx(float(total_variation_upper_bound(-lower - entropy)) + FLOOR_SHARE)
    assert found.certified
    assert found.confidence == 0.9
    assert f"{num_equal} of 4000 pairs" in found.detail
    # The truth is 0.1.
    assert 0.1 < found.value < 0.4


def test_questions_asked_once_do_not_enter_beside_repeated_ones():
    """The entropy is that of the repeated questions, so the loss must be theirs: here the others are easy."""
    drawn, log_q = world(1000)
    texts, question = [chr(97 + letter) for letter in drawn.ravel()], np.repeat(np.arange(1000), 2)
    alone = evidence_of(log_q[drawn.ravel()], texts=texts, question=question)
    beside = evidence_of(
        np.append(log_q[drawn.ravel()], np.zeros(500)),
        texts=[*texts, *["z"] * 500],
        question=np.append(question, np.arange(1000, 1500)),
    )
    assert bound_of(beside, max_answer_bytes=1).value == bound_of(alone, max_answer_bytes=1).value


@pytest.mark.parametrize("slip", [0.1, 0.3, 0.5])
def test_bounds_from_collisions_cover_worlds_of_known_distance(slip):
    """10 000 audits; the two bounds inside may depend on each other, as they are of the same answers."""
    num_runs, n, delta = 10_000, 300, 0.1
    drawn, log_q = world(num_runs * n, 1, slip=slip)
    floor = math.log(FLOOR_SHARE) + float(uniform_string_log_prob(1, 1.0))
    x = np.logaddexp(math.log1p(-FLOOR_SHARE) + log_q, floor)[drawn[:, 0]].reshape(num_runs, n)
    lower = betting_lower_bound(x, Interval(floor, 0.0), 1 - delta / 2)[:, -1]
    entropies = np.array([collision_entropy_lower_bound(c, n, 1 - delta / 2) for c in range(n + 1)])
    entropy = entropies[(drawn[:, 0] == drawn[:, 1]).reshape(num_runs, n).sum(axis=1)]
    bounds = total_variation_upper_bound(np.maximum(-lower - entropy, 0)) + FLOOR_SHARE
    assert misses_rarely_enough(bounds < slip, delta)
    # That these are the audit's: one of the runs through it.
    texts = [chr(97 + letter) for letter in drawn[:n].ravel()]
    evidence = evidence_of(log_q[drawn[:n].ravel()], texts=texts, question=np.repeat(np.arange(n), 2))
    audited = bound_of(evidence, certified_confidence=1 - delta, max_answer_bytes=1).value
    assert audited == pytest.approx(min(1.0, bounds[0]))


# --- none ---


@pytest.mark.parametrize(
    ("evidence", "settings", "reason"),
    [
        (evidence_of(np.full(100, -1.0)), {}, "0 questions have two human answers"),
        (evidence_of(np.full(29, -1.0)), {"entropy": "unique"}, "29 questions"),
        (evidence_of(np.full(29, -1.0)), {"entropy": 1.0}, "29 questions"),
        (evidence_of([*np.full(99, -1.0), math.nan]), {"entropy": "unique"}, "NaN"),
        (evidence_of([*np.full(99, -1.0), math.nan]), {"entropy": 1.0}, "NaN"),
        (
            evidence_of(np.full(99, -1.0), texts=["x" * 99] * 99),
            {"entropy": 1.0, "max_answer_bytes": 64},
            "declared 64",
        ),
        (evidence_of(np.full(100, -1.0), cut=range(100)), {"entropy": 1.0}, "all 100"),
        (
            evidence_of(np.full(100, -1.0), question=np.repeat(np.arange(50), 2), cut=range(0, 60, 2)),
            {},
            "20 questions have two",
        ),
    ],
)
def test_no_bound_without_what_it_rests_on(evidence, settings, reason):
    found = bound_of(evidence, **settings)
    assert found.value is None
    assert reason in found.detail


def test_a_bound_that_says_nothing_says_so():
    found = bound_of(evidence_of(np.full(100, -500.0)), entropy=0.0)
    assert found.value == 1.0
    assert "next to nothing" in found.detail
