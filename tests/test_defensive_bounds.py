import math

import numpy as np
import pytest
from scipy.stats import binom

from hf_imitate.defensive_bounds import StoppingRule, defensive_log_weights

DELTA = 0.1
EPSILON = 0.6
NUM_RUNS = 10_000
SHARE = 0.25

RNG = np.random.default_rng(11)
PRIOR = RNG.dirichlet(np.full(32, 0.5))
LIKELIHOOD = RNG.uniform(0, 0.9, 32) ** 3
P = float(PRIOR @ LIKELIHOOD)
LARGEST = float(LIKELIHOOD.max())
POSTERIOR = PRIOR * LIKELIHOOD / P
# A retrodictor that has lost half of the thoughts, the best one among them.
Q = np.where((np.arange(32) % 2 == 0) | (np.arange(32) == POSTERIOR.argmax()), 0.0, POSTERIOR)
Q /= Q.sum()
MIXTURE = SHARE * PRIOR + (1 - SHARE) * Q
with np.errstate(divide="ignore"):
    LOG_WEIGHTS = defensive_log_weights(np.log(PRIOR), np.log(LIKELIHOOD), np.log(Q), SHARE)


def draw(rng, law, size):
    return np.searchsorted(np.cumsum(law)[:-1], rng.random(size), side="right")


def miss_rate(log_weights, law, log_largest, num_runs=NUM_RUNS, epsilon=EPSILON, prepare=lambda x: x):
    """Which runs end with an interval that does not hold log p, and the draws they took."""
    rng, misses, num_draws = np.random.default_rng(0), [], []
    for _ in range(num_runs):
        rule = StoppingRule(log_largest, epsilon, 1 - DELTA, max_draws=10**6)
        while rule.wants_more():
            rule.add(prepare(log_weights[draw(rng, law, 512)]))
        low, high = rule.result().interval
        misses.append(not low <= math.log(P) <= high)
        num_draws.append(rule.result().num_draws)
    return np.array(misses), np.array(num_draws)


def breaks_its_level(misses):
    return misses.mean() > 2 * DELTA and misses.sum() > binom.isf(1e-5, len(misses), DELTA)


def test_the_interval_covers_and_takes_the_predicted_number_of_draws():
    misses, num_draws = miss_rate(LOG_WEIGHTS, MIXTURE, math.log(LARGEST / SHARE))
    assert misses.sum() <= binom.isf(1e-5, NUM_RUNS, DELTA)
    predicted = StoppingRule(math.log(LARGEST / SHARE), EPSILON, 1 - DELTA).expected_draws(math.log(P))
    assert num_draws.mean() == pytest.approx(predicted, rel=0.02)


def test_mixture_weights_are_unbiased_and_below_their_bound():
    assert MIXTURE @ np.exp(LOG_WEIGHTS) == pytest.approx(P)
    assert np.exp(LOG_WEIGHTS).max() <= LARGEST / SHARE


def test_the_whole_prior_is_a_proposal_too():
    log_w = defensive_log_weights(np.log(PRIOR), np.log(LIKELIHOOD), np.full(32, -np.inf), 1.0)
    np.testing.assert_allclose(log_w, np.log(LIKELIHOOD))


def test_the_threshold_is_the_published_one_at_the_relative_error_that_gives_the_factor():
    """The published threshold at relative error e is 1 + (1 + e) 4 (exp(1) - 2) ln(2 / delta) / e^2."""
    rule = StoppingRule(0.0, epsilon=0.25, confidence=0.9)  # 0.25 / 1.25 = 0.2
    assert rule.threshold == pytest.approx(1 + 1.2 * 4 * (math.e - 2) * math.log(20) / 0.04)


def test_the_interval_is_the_factor_interval_with_its_lower_end_drawn_in():
    rule = StoppingRule(0.0, epsilon=0.5, confidence=0.9)
    rule.add(np.full(10_000, math.log(0.1)))
    result = rule.result()
    assert result.is_finished
    assert result.num_draws == math.ceil(rule.threshold / 0.1)
    assert result.log_prob == pytest.approx(math.log(0.1), abs=0.001)
    assert result.interval.high - result.log_prob == pytest.approx(math.log(1.5))
    assert result.log_prob - result.interval.low == pytest.approx(math.log(4 / 3))


def test_draws_may_come_in_any_pieces():
    rng = np.random.default_rng(0)
    log_w = np.log(rng.uniform(0, 1, 4000))
    at_once, one_by_one = StoppingRule(0.0), StoppingRule(0.0)
    at_once.add(log_w)
    for value in log_w:
        if not one_by_one.wants_more():
            break
        one_by_one.add(value)
    assert at_once.result().is_finished
    assert at_once.result().num_draws == one_by_one.result().num_draws
    assert at_once.result().log_prob == pytest.approx(one_by_one.result().log_prob)


def test_giving_up_says_nothing_about_p():
    rule = StoppingRule(0.0, max_draws=100)
    assert rule.add(np.full(5000, -3.0)) is False
    assert rule.result() == (False, None, (-math.inf, 0.0), 100)
    assert not rule.wants_more()
    rule.add([-3.0])
    assert rule.result().num_draws == 100


# --- procedures that look right and are not: each must be seen to break the level ---


def test_a_retrodictor_alone_loses_thoughts_and_breaks_the_level():
    with np.errstate(divide="ignore", invalid="ignore"):
        log_w = np.where(Q > 0, np.log(PRIOR * LIKELIHOOD) - np.log(Q), -np.inf)
    misses, _ = miss_rate(log_w, Q, float(log_w.max()), num_runs=300)
    assert breaks_its_level(misses)


def test_the_density_of_the_part_that_drew_the_thought_breaks_the_level():
    """Each part on its own would give p, so both together give twice that."""
    rng, misses = np.random.default_rng(0), []
    for _ in range(100):
        from_prior = rng.random(2000) < SHARE
        index = np.where(from_prior, draw(rng, PRIOR, 2000), draw(rng, POSTERIOR, 2000))
        density = np.where(from_prior, SHARE * PRIOR[index], (1 - SHARE) * POSTERIOR[index])
        rule = StoppingRule(math.log(LARGEST / SHARE), EPSILON, 1 - DELTA)
        assert rule.add(np.log(PRIOR * LIKELIHOOD)[index] - np.log(density))
        low, high = rule.result().interval
        misses.append(not low <= math.log(P) <= high)
    assert breaks_its_level(np.array(misses))


def test_smoothed_weights_break_the_level():
    """One thought of twenty holds everything; no weight is let above sqrt(32) times the mean of its 32."""

    def truncated(log_w):
        groups = np.exp(log_w).reshape(-1, 32)
        return np.log(np.minimum(groups, np.sqrt(32) * groups.mean(axis=1, keepdims=True))).ravel()

    law = np.full(20, 0.05)
    weights = np.r_[math.log(P / 0.05), np.full(19, -700.0)]
    right, _ = miss_rate(weights, law, weights[0], num_runs=100)
    wrong, _ = miss_rate(weights, law, weights[0], num_runs=100, prepare=truncated)
    assert not breaks_its_level(right)
    assert breaks_its_level(wrong)


def test_discarded_zero_weights_break_the_level():
    log_w = np.where(np.arange(32) % 3 == 0, LOG_WEIGHTS, -np.inf)

    def without_zeros(drawn):
        return drawn[drawn > -np.inf]

    p = MIXTURE @ np.exp(log_w)
    assert p < 0.7 * P
    misses = []
    for prepare in (lambda x: x, without_zeros):
        rng, missed = np.random.default_rng(0), []
        for _ in range(200):
            rule = StoppingRule(math.log(LARGEST / SHARE), EPSILON, 1 - DELTA, max_draws=10**6)
            while rule.wants_more():
                rule.add(prepare(log_w[draw(rng, MIXTURE, 512)]))
            low, high = rule.result().interval
            missed.append(not low <= math.log(p) <= high)
        misses.append(np.array(missed))
    assert not breaks_its_level(misses[0])
    assert breaks_its_level(misses[1])


def test_the_largest_weight_seen_so_far_is_no_bound():
    rule = StoppingRule(float(np.sort(LOG_WEIGHTS)[-3]))
    with pytest.raises(ValueError, match="Declare a proved bound"):
        rule.add(LOG_WEIGHTS)


@pytest.mark.parametrize("log_weight", [math.nan, math.inf])
def test_an_invalid_weight_is_refused(log_weight):
    with pytest.raises(ValueError, match="A weight is NaN or above"):
        StoppingRule(0.0).add([log_weight])


@pytest.mark.parametrize(
    "options", [{"epsilon": 0.0}, {"confidence": 1.0}, {"max_draws": 0}, {"log_largest_weight": math.inf}]
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="Need `epsilon`"):
        StoppingRule(**{"log_largest_weight": 0.0, **options})


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_mixture_without_the_prior_is_refused(share):
    with pytest.raises(ValueError, match="weights are unbounded"):
        defensive_log_weights([-1.0], [-1.0], [-1.0], share)
