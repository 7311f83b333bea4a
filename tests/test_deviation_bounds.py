import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from hf_imitate.deviation_bounds import (
    binary_divergence,
    collision_entropy_lower_bound,
    failure_deviation_lower_bound,
    largest_probability_within,
    num_answers_to_expose,
    smallest_probability_within,
    total_variation_upper_bound,
    unique_answer_deviation_upper_bound,
)

NUM_RUNS = 10_000
DELTA = 0.05


def keeps_its_level(misses, error=DELTA):
    return misses.sum() <= binom.isf(1e-5, len(misses), error)


# --- divergence ---


def test_two_coins_by_hand():
    assert binary_divergence(0.5, 0.25) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert binary_divergence([0.0, 1.0, 0.3], [0.2, 0.2, 0.3]) == pytest.approx([-math.log(0.8), math.log(5), 0])
    assert binary_divergence(0.5, [0.0, 1.0]).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.01, 0.1, 0.5, 1.0, 4.0, 50.0])
def test_inversion_is_that_of_brute_force(eps):
    grid = np.linspace(0, 1, 200_001)
    for a in (0.0, 0.001, 0.2, 0.5, 0.97, 1.0):
        within = grid[binary_divergence(a, grid) <= eps + 1e-15]
        assert largest_probability_within(a, eps) == pytest.approx(within.max(), abs=1.1e-5)
        assert smallest_probability_within(a, eps) == pytest.approx(within.min(), abs=1.1e-5)


def test_inversion_rounds_away_from_a_claim():
    a, eps = np.meshgrid(np.linspace(0, 0.99, 34), np.geomspace(1e-4, 5, 20))
    assert (binary_divergence(a, largest_probability_within(a, eps)) >= eps * (1 - 1e-9)).all()


def test_what_humans_never_do_is_bounded_linearly():
    eps = np.array([0.01, 0.1, 0.5, 1.0, 4.0])
    assert largest_probability_within(0.0, eps) == pytest.approx(1 - np.exp(-eps))
    assert np.round(largest_probability_within(0.0, eps), 3).tolist() == [0.01, 0.095, 0.393, 0.632, 0.982]
    # With at most 1 % for humans instead of never.
    found = largest_probability_within(0.01, eps[:4])
    assert np.round(found, 3).tolist() == [0.031, 0.128, 0.425, 0.654]


def test_total_variation_bounds_have_their_published_values():
    eps = np.array([0.01, 0.1, 0.5, 1.0, 4.0])
    assert total_variation_upper_bound(eps) == pytest.approx([0.0707, 0.2236, 0.5, 0.7071, 0.9908], abs=1e-4)
    assert total_variation_upper_bound([0.0, np.inf]).tolist() == [0.0, 1.0]


def test_no_set_of_answers_escapes_whatever_the_laws():
    """All subsets of five answers, three questions each, 300 random pairs of laws."""
    rng = np.random.default_rng(0)
    subsets = np.array(list(itertools.product([0, 1], repeat=5)))
    tightest = 1.0
    for _ in range(300):
        p = rng.dirichlet(np.full(5, rng.choice([0.1, 1.0])), 3)
        q = (1 - (mix := rng.random())) * p + mix * rng.dirichlet(np.full(5, rng.choice([0.1, 1.0])), 3)
        eps = float(np.where(p > 0, p * np.log(p / q), 0).sum(axis=1).mean())
        tv = np.abs(p - q).sum(axis=1).mean() / 2
        assert tv <= total_variation_upper_bound(eps) + 1e-12
        # The set may differ from question to question: the same one everywhere, and the worst one of each.
        p_in, q_in = (p @ subsets.T).mean(axis=0), (q @ subsets.T).mean(axis=0)
        worst = np.where(q > p, 1.0, 0.0)
        p_in, q_in = np.append(p_in, (p * worst).sum(axis=1).mean()), np.append(q_in, (q * worst).sum(axis=1).mean())
        bound = largest_probability_within(p_in.clip(0, 1), eps)
        assert (q_in <= bound + 1e-9).all()
        assert (q_in >= smallest_probability_within(p_in.clip(0, 1), eps) - 1e-9).all()
        tightest = min(tightest, float((bound - q_in)[1:-1].min()))
    assert tightest < 0.01


def test_the_never_bound_is_reached():
    # A human who always gives one answer; the imitator gives it with probability q.
    q = 0.37
    assert largest_probability_within(0.0, -math.log(q)) == pytest.approx(1 - q)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_numbers_that_are_no_probability_are_refused(bad):
    for function in (lambda: binary_divergence(bad, 0.5), lambda: largest_probability_within(bad, 0.5)):
        with pytest.raises(ValueError, match="Probabilities"):
            function()


@pytest.mark.parametrize("bad", [-0.1, math.nan])
def test_a_negative_divergence_is_refused(bad):
    with pytest.raises(ValueError, match="divergence"):
        total_variation_upper_bound(bad)


# --- unique answers ---


def test_with_unique_answers_total_variation_is_one_minus_their_probability():
    """The Sudoku identity: the human law is a point mass, so its distance to q is what q puts elsewhere, and q's own
    samples pass as often as q believes."""
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(6), 50)
    right = rng.integers(0, 6, 50)
    human = np.eye(6)[right]
    tv = np.abs(human - q).sum(axis=1) / 2
    assert tv == pytest.approx(1 - q[np.arange(50), right])
    bound = unique_answer_deviation_upper_bound(q[np.arange(50), right], 0.95)
    assert tv.mean() < bound <= 1


@pytest.mark.parametrize("tv", [0.1, 0.3, 0.5])
def test_the_bound_for_unique_answers_covers_and_closes_in(tv):
    rng = np.random.default_rng(0)
    # A question is hard (q = 0.2) or easy (q = 1), or all lie around the mean.
    hard = np.where(rng.random((NUM_RUNS, 100)) < tv / 0.8, 0.2, 1.0)
    spread = np.clip(1 - tv + rng.uniform(-tv, tv, (NUM_RUNS, 100)), 0, 1)
    for q in (hard, spread):
        assert keeps_its_level(unique_answer_deviation_upper_bound(q, 1 - DELTA) < tv - 1e-12)
    assert unique_answer_deviation_upper_bound(hard.ravel()[:20_000], 0.95) < tv + 0.02


def test_an_estimate_that_is_capped_makes_the_bound_rise_only():
    rng = np.random.default_rng(0)
    estimate = np.minimum(0.7 * rng.exponential(size=(2000, 200)), 1.0)
    assert keeps_its_level(unique_answer_deviation_upper_bound(estimate, 0.95) < 0.3)


# --- collisions ---


def test_the_certificates_ceiling_is_the_published_one():
    found = [collision_entropy_lower_bound(0, n, 0.95) / math.log(2) for n in (200, 1000, 10_000)]
    assert found == pytest.approx([6.1, 8.4, 11.7], abs=0.05)
    assert collision_entropy_lower_bound(50, 50) == 0.0


def test_entropy_is_certified_by_the_upper_limit_of_collisions():
    """Questions whose answers are spread differently: the mean entropy lies above the bound in at least 95 % of runs.
    The lower limit, read as a certificate, would be wrong nearly always."""
    rng = np.random.default_rng(0)
    num_answers = np.array([2, 4, 16])  # uniform over so many; a question is one of the three, equally likely
    mean_entropy = np.log(num_answers).mean()
    collision = (1 / num_answers).mean()
    n = 300
    kinds = rng.integers(0, 3, (NUM_RUNS, n))
    equal = (rng.random((NUM_RUNS, n)) < 1 / num_answers[kinds]).sum(axis=1)
    bound = np.array([collision_entropy_lower_bound(c, n, 1 - DELTA) for c in range(n + 1)])[equal]
    assert keeps_its_level(bound > mean_entropy)
    # Tight where Jensen is: against the collision entropy itself.
    assert keeps_its_level(bound > -math.log(collision))
    assert (bound > -math.log(collision)).mean() > 0.02
    assert bound.mean() > 0.85 * -math.log(collision)


# --- failures ---


def test_the_human_limit_spends_half_of_the_error():
    # No human failure: U = 1.83 % and 0.37 % at 0.025 each.
    for n, limit in ((200, 0.0183), (1000, 0.0037)):
        low = 0.025 ** (1 / n)
        assert failure_deviation_lower_bound(n, 0, n, 0.95) == pytest.approx(low - limit, abs=5e-5)
    assert failure_deviation_lower_bound(3, 3, 100) == 0.0


@pytest.mark.parametrize(("human", "imitator"), [(0.0, 0.1), (0.05, 0.35), (0.2, 0.7), (0.3, 0.3)])
def test_the_failure_bound_covers_by_simulation_and_by_enumeration(human, imitator):
    """Failures of both sides on one question come together as often as they can; the bound needs no independence."""
    n = 60
    bound = np.array([[failure_deviation_lower_bound(i, h, n, 1 - DELTA) for h in range(n + 1)] for i in range(n + 1)])
    luck = np.random.default_rng(0).random((NUM_RUNS, n))
    together = bound[(luck < imitator).sum(axis=1), (luck < human).sum(axis=1)]
    apart = bound[(luck < imitator).sum(axis=1), (luck > 1 - human).sum(axis=1)]
    for found in (together, apart):
        assert keeps_its_level(found > imitator - human)
    law = np.outer(binom.pmf(np.arange(n + 1), n, imitator), binom.pmf(np.arange(n + 1), n, human))
    assert law[bound > imitator - human + 1e-12].sum() <= DELTA


@pytest.mark.parametrize(("rate", "n"), [(0.001, 2995), (0.005, 598), (0.01, 299), (0.02, 149), (0.05, 59), (0.1, 29)])
def test_answers_needed_to_expose_a_failure_rate(rate, n):
    assert num_answers_to_expose(rate) == n
    assert (1 - rate) ** n <= 0.05 < (1 - rate) ** (n - 1)


def test_a_rate_of_one_is_exposed_at_once_and_of_zero_never():
    assert num_answers_to_expose(1.0) == 1
    with pytest.raises(ValueError, match="failure_rate"):
        num_answers_to_expose(0.0)
