import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from hf_imitate.bounds import Interval
from hf_imitate.population_bounds import (
    betting_lower_bound,
    empirical_bernstein_lower_bound,
    floored_log_prob_lower_bound,
    uniform_string_log_prob,
)

DELTA = 0.05
NUM_RUNS = 10_000
UNIT = Interval(0.0, 1.0)


def keeps_its_level(misses, error=DELTA):
    return misses.sum() <= binom.isf(1e-5, len(misses), error)


def breaks_its_level(misses, error=DELTA):
    return misses.mean() > 2 * error and not keeps_its_level(misses, error)


# --- the floor law ---


@pytest.mark.parametrize(("alphabet_size", "mean_symbols"), [(2, 1.5), (3, 0.4)])
def test_the_floor_law_sums_to_one_over_all_strings(alphabet_size, mean_symbols):
    total = sum(
        math.exp(uniform_string_log_prob(len(string), mean_symbols, alphabet_size))
        for n in range(9)
        for string in itertools.product(range(alphabet_size), repeat=n)
    )
    longer = (mean_symbols / (1 + mean_symbols)) ** 9
    assert total + longer == pytest.approx(1)


def test_the_floor_laws_mean_length_is_the_declared_one():
    n = np.arange(2000)
    law = np.exp(uniform_string_log_prob(n, 20.0, 256) + n * math.log(256))
    assert (n * law).sum() == pytest.approx(20.0)


@pytest.mark.parametrize("arguments", [(-1, 5.0), (3, 0.0), (3, 5.0, 0)])
def test_an_impossible_floor_is_refused(arguments):
    with pytest.raises(ValueError, match="mean_symbols"):
        uniform_string_log_prob(*arguments)


# --- means of bounded draws ---

LAWS = {
    "rare and low": (np.array([0.0, 1.0]), np.array([0.02, 0.98])),
    "rare and high": (np.array([0.0, 1.0]), np.array([0.98, 0.02])),
    "spread": (np.linspace(0, 1, 7), np.full(7, 1 / 7)),
    "narrow": (np.array([0.70, 0.72]), np.array([0.5, 0.5])),
}


@pytest.mark.parametrize("law", sorted(LAWS))
def test_both_bounds_cover(law):
    values, probabilities = LAWS[law]
    mean = values @ probabilities
    drawn = values[np.random.default_rng(0).choice(len(values), (NUM_RUNS, 100), p=probabilities)]
    bernstein = empirical_bernstein_lower_bound(drawn, UNIT, 1 - DELTA)
    # The best so far is returned: its last entry above the mean means that it was above at some time.
    betting = betting_lower_bound(drawn, UNIT, 1 - DELTA)[:, -1]
    assert keeps_its_level(bernstein > mean + 1e-12)
    assert keeps_its_level(betting > mean + 1e-12)


@pytest.mark.parametrize("bound", [empirical_bernstein_lower_bound, betting_lower_bound])
def test_bounds_close_in_and_move_with_the_scale(bound):
    x = np.random.default_rng(0).uniform(0.4, 0.8, 20_000)
    narrow = np.max(bound(x, UNIT, 0.95))
    assert 0.59 < narrow < 0.6
    assert np.max(bound(10 * x - 12, Interval(-12.0, -2.0), 0.95)) == pytest.approx(10 * narrow - 12)


def test_bernstein_has_the_published_constants():
    x = np.array([0.1, 0.4, 0.4, 0.9] * 25)
    log_term = math.log(2 / 0.05)
    by_hand = x.mean() - math.sqrt(2 * x.var(ddof=1) * log_term / 100) - 7 * log_term / (3 * 99)
    assert empirical_bernstein_lower_bound(x, UNIT, 0.95) == pytest.approx(by_hand)


def test_betting_agrees_with_its_supermartingale_step_by_step():
    """The bound is where the wealth of a bettor against the mean m reaches 1 / delta."""
    x = np.random.default_rng(2).beta(4, 2, 60)
    bound = betting_lower_bound(x, UNIT, 0.95)[-1]

    def best_log_wealth(m):
        log_wealth, best, seen = 0.0, -np.inf, []
        for i, value in enumerate(x, start=1):
            means = [(0.5 + sum(seen[:j])) / (j + 1) for j in range(1, i)]
            mean = means[-1] if means else 0.5
            variance = (0.25 + sum((s - mu) ** 2 for s, mu in zip(seen, means, strict=True))) / i
            bet = min(math.sqrt(2 * math.log(20) / (variance * i * math.log(1 + i))), 0.5)
            log_wealth += bet * (value - m) - (value - mean) ** 2 * (-math.log(1 - bet) - bet)
            seen.append(value)
            best = max(best, log_wealth)
        return best

    assert best_log_wealth(bound) == pytest.approx(math.log(20))
    assert best_log_wealth(bound + 0.01) < math.log(20) < best_log_wealth(bound - 0.01)


# --- the population's mean log-probability ---

LENGTHS = np.array([1, 2, 3, 4])
SHARES = np.array([0.45, 0.3, 0.2, 0.05])
PROBABILITIES = np.array([0.6, 0.3, 0.1, 1e-9])  # the rare long answers are ones the imitator hardly gives
OPTIONS = {"max_symbols": 4, "mean_symbols": 2.0, "floor_share": 0.05, "alphabet_size": 4}


def floored_mean(lengths=LENGTHS, shares=SHARES, probabilities=PROBABILITIES):
    floor = np.exp(uniform_string_log_prob(lengths, 2.0, 4))
    return shares @ np.log(0.95 * probabilities + 0.05 * floor)


def draw_estimates(rng, num_runs, num_answers):
    """Two weights per answer, each 4 p or 0: noisy and unbiased."""
    kind = rng.choice(4, (num_runs, num_answers), p=SHARES)
    weights = np.where(rng.random((num_runs, num_answers, 2)) < 0.25, 4.0, 0.0).mean(axis=2) * PROBABILITIES[kind]
    with np.errstate(divide="ignore"):
        return np.log(weights), kind


@pytest.mark.parametrize("method", ["betting", "bernstein"])
def test_the_populations_bound_covers(method):
    log_w, kind = draw_estimates(np.random.default_rng(0), NUM_RUNS, 60)
    bounds = np.array(
        [
            floored_log_prob_lower_bound(w, LENGTHS[k], method=method, confidence=1 - DELTA, **OPTIONS)
            for w, k in zip(log_w, kind, strict=True)
        ]
    )
    assert keeps_its_level(bounds > floored_mean())


@pytest.mark.parametrize("method", ["betting", "bernstein"])
def test_the_populations_bound_closes_in_where_estimates_are_exact(method):
    kind = np.random.default_rng(0).choice(4, 20_000, p=SHARES)
    bound = floored_log_prob_lower_bound(np.log(PROBABILITIES)[kind], LENGTHS[kind], method=method, **OPTIONS)
    assert floored_mean() - 0.1 < bound < floored_mean()


def test_clipping_from_below_breaks_the_level():
    """A range declared too small, with the values pushed into it, forgets how bad the bad answers are."""
    kind = np.random.default_rng(0).choice(4, (1000, 1000), p=SHARES)
    floor = math.log(0.05) + uniform_string_log_prob(LENGTHS, 2.0, 4)
    values = np.logaddexp(math.log(0.95) + np.log(PROBABILITIES), floor)[kind]
    clipped = np.maximum(values, -3.0)
    bounds = betting_lower_bound(clipped, Interval(-3.0, 0.0), 1 - DELTA)[:, -1]
    assert breaks_its_level(bounds > floored_mean())
    with pytest.raises(ValueError, match="no draw can leave"):
        betting_lower_bound(values[0], Interval(-3.0, 0.0))


def test_leaving_out_answers_above_the_cap_breaks_the_level_and_is_refused():
    kind = np.random.default_rng(0).choice(4, (1000, 1000), p=SHARES)
    options = {**OPTIONS, "max_symbols": 2}
    log_p = np.log(PROBABILITIES)
    bounds = np.array(
        [
            floored_log_prob_lower_bound(log_p[k[k < 2]], LENGTHS[k[k < 2]], confidence=1 - DELTA, **options)
            for k in kind
        ]
    )
    assert breaks_its_level(bounds > floored_mean())
    with pytest.raises(ValueError, match="The cap defines the population"):
        floored_log_prob_lower_bound(log_p[kind[0]], LENGTHS[kind[0]], **options)


def test_without_the_floor_one_impossible_answer_would_be_minus_infinity():
    bound = floored_log_prob_lower_bound([-np.inf, -1.0] * 50, [2, 2] * 50, **OPTIONS)
    assert -np.inf < bound < -1.0


def test_an_invalid_estimate_counts_as_probability_zero():
    with_nan = floored_log_prob_lower_bound([np.nan, -1.0] * 50, [2, 2] * 50, **OPTIONS)
    assert with_nan == floored_log_prob_lower_bound([-np.inf, -1.0] * 50, [2, 2] * 50, **OPTIONS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "hoeffding"}, "'hoeffding'"),
        ({"floor_share": 0.0}, "floor_share"),
        ({"confidence": 1.0}, "confidence"),
        ({"log_estimates": [-1.0]}, "N >= 2"),
    ],
)
def test_wrong_input_is_refused_by_name(changed, message):
    arguments = {"log_estimates": [-1.0, -2.0], "num_symbols": [1, 2], **OPTIONS, **changed}
    with pytest.raises(ValueError, match=message):
        floored_log_prob_lower_bound(**arguments)
