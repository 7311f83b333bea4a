import dataclasses
import math

import numpy as np
import pytest
from audit_evidence import by_name, evidence_of
from scipy import stats
from scipy.stats import binom

from hf_imitate.audits.report import Finding
from hf_imitate.audits.retrodiction import (
    FLOOR_SHARE,
    audit_retrodiction,
    first_rows,
    floored_log_prob,
    paired_difference,
)
from hf_imitate.bounds import Interval, clopper_pearson
from hf_imitate.population_bounds import betting_lower_bound, uniform_string_log_prob

NAMES = {
    "bits_per_answer",
    "bits_per_byte",
    "mean_log_prob_lower",
    "outside_support",
    "calibration_gap",
    "length_ratio",
}
NATS = -np.random.default_rng(0).gamma(3, 4, 60)


def audited(*given, **fields) -> dict[str, Finding]:
    return by_name(audit_retrodiction(evidence_of(*given, **fields)))


def test_bits_are_those_of_the_textbook_where_each_question_has_one_answer():
    found = audited(NATS)
    assert set(found) == NAMES
    bits = -NATS / math.log(2)
    per_answer = found["bits_per_answer"]
    assert per_answer.value == pytest.approx(bits.mean())
    assert per_answer.interval == pytest.approx(tuple(stats.ttest_1samp(bits, 0).confidence_interval(0.95)))
    assert (per_answer.n, per_answer.confidence, per_answer.certified) == (60, 0.95, False)
    # Four bytes each.
    assert found["bits_per_byte"].value == pytest.approx(bits.mean() / 4)


def test_bytes_are_utf8_and_the_ratio_is_that_of_the_totals():
    texts = ["a", "éé"] * 30
    found = audited(np.tile([-1.0, -8.0], 30), texts=texts)["bits_per_byte"]
    assert found.value == pytest.approx(9 / 5 / math.log(2))


def test_answers_to_one_question_are_one_observation():
    once, often = audited(NATS), audited(np.repeat(NATS, 4), question=np.repeat(np.arange(60), 4))
    for name in ("bits_per_answer", "bits_per_byte"):
        assert often[name].n == 60
        assert often[name].interval == pytest.approx(once[name].interval)


def test_a_weight_of_three_is_three_rows_and_of_none_no_row():
    weight = np.tile([3.0, 0.0], 30)
    nats = np.where(weight == 0, -np.inf, NATS)
    uneven = np.random.default_rng(1).integers(1, 4, 60)
    found = audited(NATS, weight=uneven.astype(float))
    for name, per in (("bits_per_answer", 1), ("bits_per_byte", 4)):
        assert found[name].value == pytest.approx(-np.average(NATS, weights=uneven) / per / math.log(2))
    found = audited(nats, weight=weight)
    assert found["bits_per_answer"].value == pytest.approx(-NATS[::2].mean() / math.log(2))
    assert found["bits_per_answer"].n == 30
    assert found["outside_support"].value == 0


def test_cut_answers_are_left_out_of_bits_and_counted():
    nats = np.append(NATS, [-1e6, -1e6])
    found = audited(nats, cut=(60, 61))
    assert found["bits_per_answer"].value == pytest.approx(-NATS.mean() / math.log(2))
    for name in ("bits_per_answer", "bits_per_byte", "mean_log_prob_lower", "calibration_gap"):
        assert "2 of 62 rows were cut" in found[name].detail
    assert "2 human and 0 imitator answers were cut" in found["length_ratio"].detail


def test_one_human_answer_outside_the_support_makes_the_loss_infinite_and_is_counted():
    nats = NATS.copy()
    nats[:3] = -np.inf
    found = audited(nats, is_truncated_law=True)
    for name in ("bits_per_answer", "bits_per_byte"):
        assert found[name].value == math.inf
        assert found[name].interval is None
        assert "3 of 60 human answers (5.0%) have probability zero" in found[name].detail
        assert f"{-NATS[3:].mean() / math.log(2):.4g} bits" in found[name].detail
    outside = found["outside_support"]
    assert outside.value == 0.05
    assert outside.interval == pytest.approx(tuple(clopper_pearson(3, 60)))
    assert math.isfinite(found["mean_log_prob_lower"].value)


def test_a_law_that_gives_all_human_answers_nothing_says_so():
    found = audited(np.full(40, -np.inf), NATS[:40])
    assert found["outside_support"].value == 1
    assert found["bits_per_answer"].value == found["calibration_gap"].value == math.inf
    assert "100.0%" in found["bits_per_answer"].detail


def test_the_gap_is_what_human_answers_cost_more_than_its_own():
    own = NATS + 1.5 * math.log(2) + np.tile([0.1, -0.1], 30)
    gap = audited(NATS, own)["calibration_gap"]
    assert gap.value == pytest.approx(1.5)
    assert gap.interval.__class__ is tuple
    assert gap.interval[0] > 1.4
    assert not gap.certified


def test_the_gap_of_own_answers_is_zero_in_19_of_20_audits():
    """Human and imitator draw from one law over 30 answers, so only luck separates their losses."""
    rng = np.random.default_rng(0)
    log_law = np.log(rng.dirichlet(np.full(30, 0.5)))
    covers = []
    for _ in range(600):
        human, own = log_law[rng.choice(30, (2, 100), p=np.exp(log_law) / np.exp(log_law).sum())]
        low, high = audited(human, own)["calibration_gap"].interval
        covers.append(low <= 0 <= high)
    assert 0.92 < np.mean(covers) < 0.98


def test_an_over_confident_imitator_has_a_gap_though_nothing_is_hidden():
    rng = np.random.default_rng(0)
    p, q = np.array([0.6, 0.4]), np.array([0.95, 0.05])
    human, own = np.log(q)[rng.choice(2, 400, p=p)], np.log(q)[rng.choice(2, 400, p=q)]
    gap = audited(human, own)["calibration_gap"]
    exact = ((q - p) @ np.log(q)) / math.log(2)
    assert gap.interval[0] < exact < gap.interval[1]
    assert gap.interval[0] > 0


def test_the_length_ratio_is_imitator_over_human():
    found = audited(NATS, num_tokens=(10, np.tile([10, 20], 30)))["length_ratio"]
    assert found.value == pytest.approx(1.5)
    assert found.interval[0] > 1.3


# --- the certificate ---


def test_the_certificate_is_the_bound_of_the_floored_law():
    found = floored_log_prob(evidence_of(NATS), 0.9, max_answer_bytes=16)
    floor = math.log(FLOOR_SHARE) + uniform_string_log_prob(4, 2.0)
    x = np.minimum(np.logaddexp(math.log1p(-FLOOR_SHARE) + NATS, floor), 0)
    lowest = math.log(FLOOR_SHARE) + float(uniform_string_log_prob(16, 2.0))
    assert found.lower_bound == pytest.approx(betting_lower_bound(x, Interval(lowest, 0.0), 0.9)[-1])
    finding = audited(NATS)["mean_log_prob_lower"]
    assert finding.certified
    assert finding.interval == (finding.value, 0.0)
    assert finding.unit == "nats"
    assert finding.value < NATS.mean()


def test_the_certificate_has_the_confidence_it_is_given():
    evidence = evidence_of(NATS)
    sure, surer = (by_name(audit_retrodiction(evidence, 0.95, c))["mean_log_prob_lower"] for c in (0.9, 0.999))
    assert (sure.confidence, surer.confidence) == (0.9, 0.999)
    assert surer.value < sure.value
    assert by_name(audit_retrodiction(evidence, 0.9))["mean_log_prob_lower"].confidence == 0.9


def test_the_certificate_holds_in_as_many_audits_as_it_says():
    """Ten answers of 1 to 10 bytes, one of which the imitator gives no probability; 10 000 audits of 40 questions."""
    delta = 0.1
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(10))
    nats = np.log(rng.dirichlet(np.ones(10)))
    nats[3] = -np.inf
    lengths = np.arange(1, 11)
    floor = math.log(FLOOR_SHARE) + uniform_string_log_prob(lengths, 2.0)
    truth = p @ np.logaddexp(math.log1p(-FLOOR_SHARE) + nats, floor)
    evidence = evidence_of(np.zeros(40))
    drawn = rng.choice(10, (10_000, 40), p=p)
    texts = [["x" * length for length in row] for row in lengths[drawn].tolist()]
    bounds = []
    for answers, row in zip(texts, drawn, strict=True):
        human = dataclasses.replace(evidence.human, nats=nats[row])
        answered = [answer._replace(text=text) for answer, text in zip(evidence.human_answers, answers, strict=True)]
        audit = dataclasses.replace(evidence, human=human, human_answers=answered)
        bounds.append(floored_log_prob(audit, 1 - delta, max_answer_bytes=16).lower_bound)
    assert (np.array(bounds) > truth).sum() <= binom.isf(1e-5, 10_000, delta)


def test_one_answer_of_each_question_counts_for_the_certificate():
    once, often = evidence_of(NATS), evidence_of(np.repeat(NATS, 4), question=np.repeat(np.arange(60), 4))
    assert floored_log_prob(often, 0.95, 16) == floored_log_prob(once, 0.95, 16)


def test_the_longest_answer_is_declared_and_never_looked_up_in_the_test():
    long = evidence_of(NATS, texts=["abcd"] * 59 + ["x" * 40])
    refused = floored_log_prob(long, 0.95, max_answer_bytes=32)
    assert refused.lower_bound is None
    assert "1 of 60 answers are longer than the declared 32 bytes" in refused.detail
    # From the training answers, up to a power of two; without any, 1024.
    trained = dataclasses.replace(long, train_answers=["y" * 33, "z"])
    assert "at most 64 bytes" in floored_log_prob(trained, 0.95).detail
    assert "at most 1024 bytes" in floored_log_prob(long, 0.95).detail


def test_a_cut_answer_of_unknown_score_is_not_outside_the_support():
    nats = np.append(NATS, -np.inf)
    found = audited(nats, cut=(60,))["outside_support"]
    assert (found.value, found.n) == (0.0, 60)


def test_an_estimate_says_that_it_is_one():
    found = audited(NATS, is_exact=False, has_exact_zeros=False)
    assert found["outside_support"].value is None
    assert "estimates" in found["bits_per_answer"].detail
    assert "estimates" in found["mean_log_prob_lower"].detail


# --- what has no number ---


@pytest.mark.parametrize(
    ("evidence", "reason", "missing"),
    [
        (evidence_of(np.append(NATS, np.nan)), "1 of 61 human answers have NaN", NAMES - {"length_ratio"}),
        (evidence_of(NATS, np.append(NATS[1:], np.nan)), "1 of 60 imitator answers have NaN", {"calibration_gap"}),
        (evidence_of(NATS[:29]), "29 questions are left", NAMES - {"outside_support"}),
        (evidence_of(np.repeat(NATS[:9], 9), question=np.repeat(np.arange(9), 9)), "9 questions are left", None),
        (evidence_of(NATS, cut=range(60)), "all 60", NAMES),
        (evidence_of(NATS, imitator_cut=range(60)), "all 60", {"calibration_gap", "length_ratio"}),
        (evidence_of(NATS, texts=[""] * 60), "every human answer is empty", {"bits_per_byte"}),
        (evidence_of(np.append(NATS, 0.5)), "probability above 1", NAMES - {"length_ratio"}),
        (evidence_of(NATS, np.append(NATS[1:], -np.inf)), "not sampled from what is scored", {"calibration_gap"}),
    ],
)
def test_no_number_where_none_is_valid(evidence, reason, missing):
    found = by_name(audit_retrodiction(evidence))
    missing = NAMES - {"outside_support"} if missing is None else missing
    assert {name for name, finding in found.items() if finding.value is None} == missing
    assert all(reason in found[name].detail for name in missing)
    assert all(found[name].detail.startswith("Not measured: ") for name in missing)


def test_some_empty_answers_cost_bits_and_are_said():
    found = audited(NATS, texts=["", "abcd"] * 30)
    assert found["bits_per_byte"].value == pytest.approx(2 * found["bits_per_answer"].value / 4)
    assert "30 empty answers" in found["bits_per_byte"].detail


def test_mojibake_has_bytes():
    assert audited(NATS, texts=["\ud800�\x00"] * 60)["bits_per_byte"].value is not None


def test_first_rows_are_the_first_that_count():
    evidence = evidence_of(np.zeros(6), question=[2, 2, 0, 0, 5, 5])
    assert first_rows(evidence, np.array([0, 1, 1, 1, 0, 0], dtype=bool)).tolist() == [1, 2]


# --- two imitators ---


def test_the_difference_of_two_imitators_is_paired():
    evidence_a = evidence_of(NATS + math.log(2) * (1 + np.tile([0.1, -0.1], 30)))
    found = paired_difference(evidence_a, evidence_of(NATS))
    assert [finding.name for finding in found] == ["bits_per_answer_difference"]
    assert found[0].value == pytest.approx(-1)
    low, high = found[0].interval
    # Unpaired, the interval would be wider than 3 bits.
    assert -1.04 < low < high < -0.96
    assert "100.0%" in found[0].detail
    swapped = paired_difference(evidence_of(NATS), evidence_a)[0]
    assert (swapped.value, swapped.interval) == (pytest.approx(1), pytest.approx((-high, -low)))


def test_a_difference_with_an_infinite_side_is_not_measured():
    outside = np.append(NATS[1:], -np.inf)
    found = paired_difference(evidence_of(outside), evidence_of(NATS))[0]
    assert found.value is None
    assert "A gave 1 and B gave 0 of 60" in found.detail
    assert paired_difference(evidence_of(NATS[:20]), evidence_of(NATS[:20]))[0].value is None


def test_two_audits_of_different_rows_are_refused():
    with pytest.raises(ValueError, match="different rows"):
        paired_difference(evidence_of(NATS), evidence_of(NATS, texts=["other"] * 60))
    with pytest.raises(ValueError, match="different rows"):
        paired_difference(evidence_of(NATS), evidence_of(NATS[1:]))
