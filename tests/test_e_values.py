"""E-values, sign tests and Holm's correction, against enumeration and other libraries."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from hf_imitate.bounds import num_pairs_for_advantage, total_variation_lower_bound_paired
from hf_imitate.e_values import (
    BETS,
    average_log_e,
    calibrated_payoffs,
    holm,
    log_e_process,
    sign_test_p_value,
)


def test_one_payoff_wins_the_mean_bet():
    assert log_e_process([0.4])[-1] == pytest.approx(math.log(1 + 0.4 * BETS.mean()))
    assert log_e_process([0.0, 0.0])[-1] == pytest.approx(0.0)


def test_the_game_is_fair_over_all_paths():
    """All 2^12 orders of the sides, with payoffs of different sizes: the mean of E is 1 at every step."""
    sizes = np.array([1.0, 0.3, 0.0, 0.9, 1.0, 0.2, 0.7, 1.0, 0.5, 1.0, 0.1, 0.6])
    paths = np.array(list(product([-1.0, 1.0], repeat=12))) * sizes
    np.testing.assert_allclose(np.exp(log_e_process(paths)).mean(axis=0), 1.0, rtol=1e-10)


def test_it_ever_reaches_one_over_a_on_at_most_a_share_a_of_all_paths():
    wealth = np.exp(log_e_process(np.array(list(product([-1.0, 1.0], repeat=14)))))
    for level in (0.5, 0.2, 0.1, 0.05, 0.01):
        assert (wealth.max(axis=1) >= 1 / level).mean() <= level


def test_stopping_when_it_looks_best_does_not_break_it():
    """10 000 replicates of 300 pairs under the null hypothesis, with ties, each stopped at its best moment."""
    rng = np.random.default_rng(0)
    payoffs = rng.choice([-1.0, 0.0, 1.0], size=(10_000, 300), p=[0.4, 0.2, 0.4])
    best = log_e_process(payoffs).max(axis=1)
    for level in (0.1, 0.05, 0.01):
        share = (best >= -math.log(level)).mean()
        assert share <= level + 3 * math.sqrt(level * (1 - level) / 10_000)
    # It is no empty promise: an exact test looked at after every pair errs in far more than 1 of 20 cases.
    wins = np.cumsum(payoffs[:2000] > 0, axis=1)[:, 20:]
    losses = np.cumsum(payoffs[:2000] < 0, axis=1)[:, 20:]
    assert (sign_test_p_value(wins, losses).min(axis=1) <= 0.05).mean() > 0.2


def test_a_bet_is_laid_before_its_payoff_is_seen():
    rng = np.random.default_rng(1)
    payoffs = rng.uniform(-1, 1, 50)
    changed = np.concatenate([payoffs[:30], -payoffs[30:]])
    np.testing.assert_array_equal(log_e_process(payoffs)[:30], log_e_process(changed)[:30])


def test_evidence_grows_at_most_log_20_below_the_best_bet():
    payoffs = np.where(np.random.default_rng(2).random(2000) < 0.65, 1.0, -1.0)
    best = max(np.log1p(bet * payoffs).sum() for bet in BETS)
    assert best - math.log(len(BETS)) <= log_e_process(payoffs)[-1] <= best


def test_calibrated_odds_make_the_payoff_the_likelihood_ratio():
    # The pair in this order against either order: 2 P(order) = 1 + g.
    assert 1 + calibrated_payoffs(math.log(3)) == pytest.approx(2 * 3 / 4)
    assert calibrated_payoffs(0.0) == 0


def test_the_mean_of_e_values_survives_numbers_that_overflow():
    assert average_log_e([1000.0, 0.0]) == pytest.approx(1000 - math.log(2))
    np.testing.assert_allclose(average_log_e(np.log([[1.0, 2.0], [3.0, 4.0]])), np.log([2.0, 3.0]))


@pytest.mark.parametrize("payoffs", [[1.5], [math.nan], 0.3])
def test_payoffs_outside_their_range_are_refused(payoffs):
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        log_e_process(payoffs)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (7, 3), (0, 5), (60, 40), (5, 0)])
def test_the_sign_test_is_scipys(wins, losses):
    exact = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
    assert sign_test_p_value(wins, losses) == pytest.approx(exact)


def test_the_sign_test_keeps_its_level_whatever_share_ties():
    """Enumerated over (wins, losses, ties) of 30 pairs: the probability of p <= level never exceeds it."""
    for p_tie in (0.0, 0.3, 0.9):
        for level in (0.1, 0.05, 0.01):
            total = 0.0
            for ties in range(31):
                n = 30 - ties
                wins = np.arange(n + 1)
                rejected = sign_test_p_value(wins, n - wins) <= level
                total += binom.pmf(ties, 30, p_tie) * binom.pmf(wins[rejected], n, 0.5).sum()
            assert total <= level + 1e-12


def test_holm_rejects_what_the_closed_test_of_bonferroni_rejects():
    """The definition: a hypothesis falls if every set of hypotheses that holds it falls by Bonferroni's test."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        p = rng.random(4) ** 3
        for level in (0.05, 0.3):
            closed = [
                all(
                    min(p[list(others)]) <= level / len(others)
                    for size in range(1, 5)
                    for others in combinations(range(4), size)
                    if i in others
                )
                for i in range(4)
            ]
            assert (holm(p) <= level).tolist() == closed


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = [0.01, 0.04, 0.03, 0.005, 1.0]
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1])


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.1, math.nan])


def test_the_power_of_the_sign_test_is_the_exact_binomials():
    rng = np.random.default_rng(4)
    for advantage in (0.05, 0.1):
        num_pairs = num_pairs_for_advantage(advantage)
        wins = rng.binomial(num_pairs, 0.5 + advantage, 20_000)
        power = (sign_test_p_value(wins, num_pairs - wins) <= 0.05).mean()
        assert power == pytest.approx(0.8, rel=0.1)
        exact = binom.sf(binom.isf(0.05, num_pairs, 0.5), num_pairs, 0.5 + advantage)
        assert power == pytest.approx(exact, abs=0.015)


@pytest.mark.parametrize("total_variation", [0.1, 0.3, 0.5])
def test_certified_total_variation_is_wrong_at_most_as_often_as_it_says(total_variation):
    """Two laws of known distance and the judge that knows both: 10 000 audits of 300 pairs, ties included.

    Human: 0.5, 0.5. Imitator: 0.5 + TV, 0.5 - TV. The best judge prefers the second answer; equal answers tie.
    """
    rng = np.random.default_rng(5)
    human = rng.random((10_000, 300)) < 0.5
    imitator = rng.random((10_000, 300)) < 0.5 - total_variation
    correct = (human & ~imitator).sum(axis=1) + 0.5 * (human == imitator).sum(axis=1)
    bounds = {count: total_variation_lower_bound_paired(count, 300, 0.95) for count in np.unique(correct)}
    wrong = np.mean([bounds[count] > total_variation for count in correct])
    assert wrong <= 0.05
    # Tightest where each law holds answers that the other never gives.
    disjoint = rng.random((10_000, 300, 2)) < total_variation
    correct = np.where(disjoint.any(axis=2), 1.0, 0.5).sum(axis=1)
    bounds = {count: total_variation_lower_bound_paired(count, 300, 0.95) for count in np.unique(correct)}
    wrong = np.mean([bounds[count] > total_variation for count in correct])
    assert wrong <= 0.05
    assert np.mean([bounds[count] for count in correct]) > 0.4 * total_variation
