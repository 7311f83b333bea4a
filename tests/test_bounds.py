import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from hf_imitate.bounds import clopper_pearson, num_pairs_for_advantage, total_variation_lower_bound_paired


@pytest.mark.parametrize("num_trials", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_interval_agrees_with_scipy(num_trials, confidence):
    for num_correct in {0, 1, num_trials // 3, num_trials - 1, num_trials}:
        expected = binomtest(num_correct, num_trials).proportion_ci(confidence, method="exact")
        assert clopper_pearson(num_correct, num_trials, confidence) == pytest.approx((expected.low, expected.high))
        above = binomtest(num_correct, num_trials, alternative="greater").proportion_ci(confidence, method="exact")
        assert clopper_pearson(num_correct, num_trials, confidence, side="lower") == pytest.approx((above.low, 1.0))
        below = binomtest(num_correct, num_trials, alternative="less").proportion_ci(confidence, method="exact")
        assert clopper_pearson(num_correct, num_trials, confidence, side="upper") == pytest.approx((0.0, below.high))


def test_no_failure_in_n_trials_has_the_closed_form():
    # P(no failure in n) = (1 - rate)^n, so the one-sided limits are solved by hand: 1.49 % for 200, 0.30 % for 1000.
    assert clopper_pearson(0, 200, side="upper").high == pytest.approx(1 - 0.05 ** (1 / 200))
    assert clopper_pearson(0, 200, side="upper").high == pytest.approx(0.0149, abs=5e-5)
    assert clopper_pearson(0, 1000, side="upper").high == pytest.approx(0.0030, abs=5e-5)
    assert clopper_pearson(200, 200, side="lower").low == pytest.approx(0.05 ** (1 / 200))


@pytest.mark.parametrize("side", ["two-sided", "lower", "upper"])
def test_coverage_is_never_below_the_confidence_by_summing_over_all_counts(side):
    for num_trials in (1, 5, 23):
        intervals = np.array([clopper_pearson(k, num_trials, 0.9, side) for k in range(num_trials + 1)])
        for truth in np.linspace(0.001, 0.999, 333):
            covers = (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
            assert binom.pmf(np.arange(num_trials + 1), num_trials, truth)[covers].sum() >= 0.9 - 1e-12


def exact_law_of_doubled_count(num_trials, p_wrong, p_tie, p_right):
    law = np.ones(1)
    for _ in range(num_trials):
        law = np.convolve(law, [p_wrong, p_tie, p_right])
    return law


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_ties_counted_half_keep_the_coverage_by_summing_over_all_outcomes(confidence):
    """Counting a tie as half a success and rounding against the claim must not cost coverage."""
    worst = 1.0
    for num_trials in (1, 2, 3, 8, 17, 40):
        intervals = np.array([clopper_pearson(k / 2, num_trials, confidence) for k in range(2 * num_trials + 1)])
        for p_tie in (0.02, 0.2, 0.5, 0.8, 0.98):
            for p_right in np.linspace(0, 1 - p_tie, 41):
                truth = p_right + p_tie / 2
                law = exact_law_of_doubled_count(num_trials, 1 - p_tie - p_right, p_tie, p_right)
                covers = (intervals[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= intervals[:, 1])
                worst = min(worst, law[covers].sum())
    assert worst >= confidence - 1e-12


def test_a_half_count_is_rounded_against_the_claim():
    interval = clopper_pearson(6.5, 10)
    assert interval.low == clopper_pearson(6, 10).low
    assert interval.high == clopper_pearson(7, 10).high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0), "num_trials"),
        ((-1, 5), "got -1 of 5"),
        ((6, 5), "got 6 of 5"),
        ((1, 5, 1.0), "confidence"),
        ((1, 5, 0.9, "left"), "left"),
    ],
)
def test_impossible_counts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        clopper_pearson(*arguments)


def test_bound_holds_for_the_best_judge_of_random_laws():
    """The best judge of a pair prefers the larger likelihood ratio; its accuracy never proves more than the truth."""
    rng = np.random.default_rng(0)
    num_laws_where_the_naive_bound_overclaims = 0
    for _ in range(300):
        p_human, p_imitator = rng.dirichlet(np.full(6, 0.5)), rng.dirichlet(np.full(6, 0.5))
        ratio = p_human / p_imitator
        wins = (ratio[:, None] > ratio[None]) + 0.5 * (ratio[:, None] == ratio[None])
        accuracy = float(p_human @ wins @ p_imitator)
        total_variation = np.abs(p_human - p_imitator).sum() / 2
        assert 1 - math.sqrt(2 - 2 * accuracy) <= total_variation + 1e-9
        num_laws_where_the_naive_bound_overclaims += 2 * accuracy - 1 > total_variation + 1e-9
    assert num_laws_where_the_naive_bound_overclaims > 200


def test_bound_is_reached_from_below_as_pairs_grow():
    # Two laws on {a, b, c} with TV 1/2 for which a = 1/2 + TV - TV^2/2: human (1/2, 1/2, 0), imitator (0, 1/2, 1/2).
    total_variation, accuracy = 0.5, 0.875
    bounds = [total_variation_lower_bound_paired(int(accuracy * n), n) for n in (80, 800, 80_000)]
    assert bounds == sorted(bounds)
    assert bounds[-1] < total_variation
    assert bounds[-1] == pytest.approx(total_variation, abs=0.005)


def test_a_coin_flipping_judge_proves_nothing():
    assert total_variation_lower_bound_paired(500, 1000) == 0.0
    assert total_variation_lower_bound_paired(520, 1000) == 0.0
    assert total_variation_lower_bound_paired(400.5, 1000) == 0.0


def test_a_judge_that_is_always_right_proves_as_much_as_the_sample_allows():
    assert total_variation_lower_bound_paired(100, 100) == pytest.approx(1 - math.sqrt(2 - 2 * 0.05**0.01))


@pytest.mark.parametrize(("advantage", "num_pairs"), [(0.02, 3945), (0.05, 654), (0.1, 169)])
def test_pairs_needed_match_the_published_exact_numbers(advantage, num_pairs):
    assert num_pairs_for_advantage(advantage) == num_pairs


@pytest.mark.parametrize(
    ("advantage", "power", "level"), [(0.1, 0.8, 0.05), (0.3, 0.95, 0.01), (0.5, 0.8, 0.05), (0.45, 0.5, 0.4)]
)
def test_pairs_needed_match_a_search_through_all_sizes(advantage, power, level):
    def exact_power(n):
        critical = next(k for k in range(n + 2) if binom.sf(k - 1, n, 0.5) <= level)
        return binom.sf(critical - 1, n, 0.5 + advantage)

    too_weak = [n for n in range(1, 230) if exact_power(n) < power]
    assert num_pairs_for_advantage(advantage, power, level) == too_weak[-1] + 1


def test_an_advantage_above_one_half_is_refused():
    with pytest.raises(ValueError, match=r"0\.6"):
        num_pairs_for_advantage(0.6)
    with pytest.raises(ValueError, match="power"):
        num_pairs_for_advantage(0.1, power=1.0)
