import itertools
import math

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import binom

from hf_imitate.retrodictive_bounds import (
    NoCertificateError,
    confidence_of_each,
    counting_interval,
    e_process_against,
    factor_interval,
    log_mean_of_weights,
    log_prob_lower_bound,
    mean_log_prob_lower_bound,
    mean_log_prob_upper_bound,
)

DELTA = 0.1
NUM_RUNS = 10_000
NUM_ANSWERS = 40


def keeps_its_level(misses, error=DELTA):
    """No more misses than the allowed error explains, at one in a hundred thousand."""
    return misses.sum() <= binom.isf(1e-5, len(misses), error)


def breaks_its_level(misses, error=DELTA):
    return misses.mean() > 2 * error and not keeps_its_level(misses, error)


class Table:
    """Thoughts 0 .. S-1 behind one answer: p(z), p(answer | z) and q(z) written down, so that p is a sum."""

    def __init__(self, seed, num_thoughts=16, flatness=1.0):
        rng = np.random.default_rng(seed)
        self.prior = rng.dirichlet(np.full(num_thoughts, 0.7))
        self.likelihood = rng.uniform(0.02, 0.9, num_thoughts)
        self.joint = self.prior * self.likelihood
        self.p = self.joint.sum()
        self.posterior = self.joint / self.p
        self.q = self.posterior**flatness + 0.3 * rng.dirichlet(np.ones(num_thoughts))
        self.q /= self.q.sum()

    @property
    def log_weights(self):
        with np.errstate(divide="ignore"):
            return np.log(self.joint) - np.log(self.q)


def draw(rng, law, size):
    return np.searchsorted(np.cumsum(law)[:-1], rng.random(size), side="right")


def draw_weights(table, rng, size, law=None):
    return table.log_weights[draw(rng, table.q if law is None else law, size)]


TABLES = [Table(seed) for seed in range(NUM_ANSWERS)]
LOG_P = np.log([table.p for table in TABLES])


def misses_on_the_test_set(make_log_weights, num_runs=2000):
    """Share of runs in which the anytime bound over the tables is above the truth after some answer."""
    rng = np.random.default_rng(1)
    estimates = np.stack([log_mean_of_weights(make_log_weights(table, rng, num_runs)) for table in TABLES], axis=1)
    truth = np.cumsum(LOG_P) / np.arange(1, NUM_ANSWERS + 1)
    bounds = np.stack([mean_log_prob_lower_bound(row, 1 - DELTA) for row in estimates])
    return (bounds > truth + 1e-12).any(axis=1)


# --- one answer ---


@pytest.mark.parametrize("num_thoughts", [1, 4, 16])
def test_one_answers_bound_covers(num_thoughts):
    for seed in range(5):
        table, rng = Table(seed), np.random.default_rng(seed)
        bound = log_prob_lower_bound(draw_weights(table, rng, (NUM_RUNS, num_thoughts)), 1 - DELTA)
        assert keeps_its_level(bound > math.log(table.p))


def skewed_table():
    """A proposal for which Markov's inequality is tight: one thought in ten holds everything."""
    table = Table(0, num_thoughts=2)
    table.joint, table.p, table.q = np.array([0.3, 0.0]), 0.3, np.array([0.1, 0.9])
    return table


def test_one_answers_bound_is_tight_where_one_draw_in_ten_holds_everything():
    table = skewed_table()
    bound = log_prob_lower_bound(draw_weights(table, np.random.default_rng(0), (NUM_RUNS, 1)), 0.9 - 1e-9)
    assert keeps_its_level(bound > math.log(table.p) - 1e-6)
    assert (bound > math.log(table.p) - 1e-6).mean() > 0.08


def test_peeking_covers_over_all_prefixes():
    table, rng = skewed_table(), np.random.default_rng(0)
    log_w = draw_weights(table, rng, (NUM_RUNS, 64))
    peeked = log_prob_lower_bound(log_w, 1 - DELTA, peeking=True)
    assert keeps_its_level(peeked > math.log(table.p) + 1e-9)
    every = np.stack([log_prob_lower_bound(log_w[:, :k], 1 - DELTA) for k in range(1, 65)])
    np.testing.assert_allclose(peeked, every.max(axis=0))


def test_the_best_of_many_runs_breaks_a_bound_made_for_one():
    table, rng = skewed_table(), np.random.default_rng(0)
    best = draw_weights(table, rng, (NUM_RUNS, 20, 1)).max(axis=1)
    assert breaks_its_level(log_prob_lower_bound(best, 0.9 - 1e-9) > math.log(table.p) - 1e-6)
    corrected = np.array([mean_log_prob_lower_bound(row, 0.9 - 1e-9, num_runs=20)[0] for row in best])
    assert keeps_its_level(corrected > math.log(table.p) - 1e-6)


def test_one_answers_bound_has_the_closed_form():
    assert log_prob_lower_bound(np.log([[0.1, 0.3]]), 0.95)[0] == pytest.approx(math.log(0.2 * 0.05))
    assert log_prob_lower_bound([-np.inf, -np.inf], 0.95) == -np.inf
    assert log_prob_lower_bound([50.0], 0.95) == 0.0


def test_an_invalid_draw_counts_as_nothing_and_stays_in_the_mean():
    assert log_mean_of_weights([0.0, np.nan]) == pytest.approx(math.log(0.5))


# --- a test set ---


@pytest.mark.parametrize("num_thoughts", [1, 4, 16])
def test_the_test_sets_bound_covers_at_all_times(num_thoughts):
    assert keeps_its_level(
        misses_on_the_test_set(lambda table, rng, n: draw_weights(table, rng, (n, num_thoughts)), NUM_RUNS)
    )


def test_the_test_sets_bound_costs_little_per_answer():
    bound = mean_log_prob_lower_bound(np.full(1000, -2.0), 0.95)
    assert bound[-1] == pytest.approx(-2 - math.log(20) / 1000)
    assert bound[0] == pytest.approx(-2 - math.log(20))


def test_a_lost_thought_makes_the_bound_low_and_not_false():
    def lost(table, rng, n):
        q = with_a_hole(table)
        with np.errstate(divide="ignore"):
            log_w = np.log(table.joint) - np.log(q)
        return log_w[draw(rng, q, (n, 8))]

    assert misses_on_the_test_set(lost).sum() == 0


def test_weights_of_rows_keep_the_level():
    weight = np.random.default_rng(0).uniform(0, 3, NUM_ANSWERS) + 1e-3
    rng = np.random.default_rng(1)
    estimates = np.stack([log_mean_of_weights(draw_weights(t, rng, (NUM_RUNS, 1))) for t in TABLES], axis=1)
    truth = np.cumsum(weight * LOG_P) / np.cumsum(weight)
    bounds = np.stack([mean_log_prob_lower_bound(row, 1 - DELTA, weight=weight) for row in estimates])
    assert keeps_its_level((bounds > truth + 1e-12).any(axis=1))
    equal = mean_log_prob_lower_bound(estimates[0], 1 - DELTA, weight=np.full(NUM_ANSWERS, 7.0))
    np.testing.assert_allclose(equal, mean_log_prob_lower_bound(estimates[0], 1 - DELTA))


# --- procedures that look right and are not: each must be seen to break the level ---


def tempered(table, rng, n):
    law = table.q ** (1 / 0.7)
    return draw_weights(table, rng, (n, 8), law / law.sum())


def discarded(table, rng, n):
    """A third of the thoughts come out invalid (weight 0) and are thrown away instead of counted."""
    log_w = draw_weights(table, rng, (n, 12))
    return np.where(rng.random(log_w.shape) < 1 / 3, np.nan, log_w)


def token_means(table, rng, n):
    return draw_weights(table, rng, (n, 8)) / 6


def lifted_small_weights(table, rng, n):
    """Smoothing: weights below the median of their group are raised to it."""
    log_w = draw_weights(table, rng, (n, 8))
    return np.maximum(log_w, np.median(log_w, axis=1, keepdims=True))


def until_it_looks_good(table, rng, n):
    """K chosen while looking: stop at the highest running mean."""
    log_w = draw_weights(table, rng, (n, 8))
    running = np.logaddexp.accumulate(log_w, axis=1) - np.log(np.arange(1, 9))
    return running.max(axis=1, keepdims=True)


def test_scoring_tempered_draws_at_temperature_one_breaks_the_level():
    """Thoughts drawn at 0.7 come from a sharper law than the one in the weights."""
    flat = [Table(seed, flatness=0.5) for seed in range(NUM_ANSWERS)]
    rng, log_p = np.random.default_rng(0), np.log([t.p for t in flat])
    truth = np.cumsum(log_p) / np.arange(1, NUM_ANSWERS + 1)
    for sampler, is_right in ((tempered, False), (lambda t, r, n: draw_weights(t, r, (n, 8)), True)):
        estimates = np.stack([log_mean_of_weights(sampler(table, rng, 2000)) for table in flat], axis=1)
        misses = np.stack([mean_log_prob_lower_bound(row, 1 - DELTA) for row in estimates]) > truth
        assert (keeps_its_level if is_right else breaks_its_level)(misses.any(axis=1))


def test_discarded_draws_break_the_level_and_counted_ones_do_not():
    def only_kept(table, rng, n):
        log_w = discarded(table, rng, n)
        num_kept = np.maximum((~np.isnan(log_w)).sum(axis=1, keepdims=True), 1)
        return np.where(np.isnan(log_w), -np.inf, log_w) + np.log(12 / num_kept)

    # The model's own law gives an invalid thought no answer: p is a third lower.
    valid = LOG_P + math.log(2 / 3)
    truth = np.cumsum(valid) / np.arange(1, NUM_ANSWERS + 1)
    rng = np.random.default_rng(1)
    for procedure, is_right in ((discarded, True), (only_kept, False)):
        estimates = np.stack([log_mean_of_weights(procedure(table, rng, 2000)) for table in TABLES], axis=1)
        bounds = np.stack([mean_log_prob_lower_bound(row, 1 - DELTA) for row in estimates])
        assert (keeps_its_level if is_right else breaks_its_level)((bounds > truth).any(axis=1))


@pytest.mark.parametrize("procedure", [token_means, lifted_small_weights, until_it_looks_good])
def test_token_means_smoothed_weights_and_looking_break_the_level(procedure):
    assert breaks_its_level(misses_on_the_test_set(procedure))


def test_a_forced_close_that_only_p_knows_of_breaks_the_level():
    """Thoughts of at most two tokens: at the cap the delimiter is certain. Charged in q for a delimiter it never had
    to draw, a long thought weighs too much."""
    stop = 0.4
    q = np.array([stop, (1 - stop) * stop, (1 - stop) ** 2])  # lengths 0, 1, 2; the last is closed by force
    q_not_mirrored = q * [1, 1, stop]
    joint = np.array([0.1, 0.2, 0.3]) * [0.5, 0.5, 0.5]
    rng = np.random.default_rng(0)
    lengths = draw(rng, q, (2000, NUM_ANSWERS, 8))
    for law, is_right in ((q, True), (q_not_mirrored, False)):
        estimates = log_mean_of_weights((np.log(joint) - np.log(law))[lengths])
        bounds = np.stack([mean_log_prob_lower_bound(row, 1 - DELTA) for row in estimates])
        misses = (bounds > math.log(joint.sum())).any(axis=1)
        assert (keeps_its_level if is_right else breaks_its_level)(misses)


def test_an_answer_without_its_end_token_breaks_the_level():
    """The probability of *beginning* with the answer is larger than that of the answer."""
    end = 0.8

    def without_end(table, rng, n):
        return draw_weights(table, rng, (n, 8)) - math.log(end)

    assert breaks_its_level(misses_on_the_test_set(without_end))


# --- from above, by an exact posterior sample ---


def upper_misses(tables, num_thoughts, redraw_in=None, truncate=False, num_runs=NUM_RUNS):
    """Miss rate over runs; `redraw_in` holds q's with a hole, for the faulty code that redraws z* until q knows it."""
    rng, stars, others = np.random.default_rng(3), [], []
    for index, table in enumerate(tables):
        q = table.q if redraw_in is None else redraw_in[index]
        with np.errstate(divide="ignore"):
            log_w = np.log(table.joint) - np.log(q)
        law = np.where(q > 0, table.posterior, 0)
        stars.append(log_w[draw(rng, law / law.sum(), num_runs)])
        others.append(log_w[draw(rng, q, (num_runs, num_thoughts - 1))])
    star, other = np.stack(stars, 1), np.stack(others, 1)
    if truncate:
        joined = np.concatenate([star[..., None], other], axis=2)
        cap = logsumexp(joined, axis=2) - 0.5 * math.log(num_thoughts)
        star, other = np.minimum(star, cap), np.minimum(other, cap[..., None])
    truth = np.cumsum(np.log([t.p for t in tables])) / np.arange(1, len(tables) + 1)
    bounds = np.stack(
        [mean_log_prob_upper_bound(s, o, "enumerated", "human", 1 - DELTA) for s, o in zip(star, other, strict=True)]
    )
    return (bounds < truth - 1e-12).any(axis=1)


@pytest.mark.parametrize("num_thoughts", [1, 4, 16])
def test_the_upper_bound_covers_at_all_times(num_thoughts):
    assert keeps_its_level(upper_misses(TABLES[:10], num_thoughts))
    assert keeps_its_level(upper_misses(TABLES[:1], num_thoughts))


def with_a_hole(table):
    q = np.where(np.arange(16) == table.posterior.argmax(), 0.0, table.q)
    return q / q.sum()


def mean_of_inverse(table, q, law):
    """p E[exp(-U)] for K = 2 by the sum over both draws: at most 1 is what the bound rests on."""
    with np.errstate(divide="ignore"):
        w = table.joint / np.where(q > 0, q, np.nan)
    total = 0.0
    for star, other in itertools.product(range(16), repeat=2):
        if law[star] > 0 and q[other] > 0:
            mean_weight = np.inf if q[star] == 0 else (w[star] + w[other]) / 2
            total += law[star] * q[other] / mean_weight
    return table.p * total


def test_a_thought_outside_the_proposals_support_makes_the_bound_infinite_and_never_false():
    for table in TABLES[:5]:
        assert mean_of_inverse(table, table.q, table.posterior) == pytest.approx(1)
        assert mean_of_inverse(table, with_a_hole(table), table.posterior) <= 1 + 1e-12
    bound = mean_log_prob_upper_bound([np.inf], [[-1.0]], "enumerated", "human")
    assert bound[0] == 0.0  # log p <= 0 is all that is left


def test_redrawing_it_breaks_the_level():
    holes = [with_a_hole(table) for table in TABLES[:20]]
    for table, q in zip(TABLES[:5], holes, strict=False):
        law = np.where(q > 0, table.posterior, 0)
        assert mean_of_inverse(table, q, law / law.sum()) > 1.05
    assert breaks_its_level(upper_misses(TABLES[:20], 4, redraw_in=holes, num_runs=2000))


def test_smoothed_weights_break_the_upper_bound():
    """Truncated importance sampling: no weight above sqrt(K) times their mean. A poor proposal has such weights."""
    poor = [Table(seed) for seed in range(NUM_ANSWERS)]
    for table in poor:
        table.q = 1 / (table.posterior + 0.01)
        table.q /= table.q.sum()
    assert keeps_its_level(upper_misses(poor, 16, num_runs=2000))
    assert breaks_its_level(upper_misses(poor, 16, truncate=True, num_runs=2000))


def test_an_invalid_companion_makes_the_upper_bound_trivial():
    assert mean_log_prob_upper_bound([-3.0], [[np.nan]], "simulated", "model")[0] == 0.0


@pytest.mark.parametrize("sample", [None, "simulated"])
def test_no_upper_bound_for_a_humans_answer_without_an_exact_posterior_sample(sample):
    with pytest.raises(NoCertificateError, match=r"exact posterior.*its own answer only.*report the lower bound"):
        mean_log_prob_upper_bound([-3.0], [[-3.0]], sample, "human")


def test_the_models_own_answers_come_with_a_posterior_sample():
    assert mean_log_prob_upper_bound([-30.0], [[-30.0]], "simulated", "model", 0.95)[0] == pytest.approx(
        -30 + math.log(20)
    )
    with pytest.raises(NoCertificateError):
        mean_log_prob_upper_bound([-3.0], [[-3.0]], None, "model")


# --- counting ---


def test_the_factor_interval_covers_exactly_when_the_factor_statement_holds():
    rng = np.random.default_rng(0)
    for epsilon in (0.0, 0.3, 0.8):
        ratio = np.exp(rng.uniform(-1, 1, NUM_RUNS))
        log_p = -5.0
        for value in ratio[:2000]:
            low, high = factor_interval(log_p + math.log(value), epsilon)
            assert (low <= log_p <= high) == (1 / (1 + epsilon) <= value <= 1 + epsilon)


def test_the_relative_error_form_is_weaker_than_the_factor_form():
    """|estimate - p| <= 0.8 p allows an estimate of 0.2 p, which the factor interval at 0.8 does not cover."""
    low, high = factor_interval(math.log(0.2 * 0.01), 0.8)
    assert not low <= math.log(0.01) <= high


@pytest.mark.parametrize("num_bits", [3, 32])
def test_an_adders_probability_is_its_count(num_bits):
    for total in (0, 5, 2**num_bits - 1):
        interval = counting_interval(total + 1, 4**num_bits)
        assert interval.low == interval.high == pytest.approx(math.log(total + 1) - num_bits * math.log(4))


def test_counts_too_large_for_a_float_are_no_problem():
    assert counting_interval(2**5000, 2**5003).low == pytest.approx(-3 * math.log(2))


def test_no_model_means_probability_zero():
    assert counting_interval(0, 16) == counting_interval(0, 16, 0.8) == (-math.inf, -math.inf)


def test_an_approximate_count_above_all_outcomes_counts_as_all_of_them():
    """The true count is at most 16, and at least 20 / 1.8: so log p is between log(16 / 1.8 / 16) and 0."""
    assert counting_interval(20, 16, 0.8) == counting_interval(16, 16, 0.8) == (-math.log(1.8), 0.0)


def test_an_interval_at_one_of_many_outcomes_keeps_the_difference_of_the_integers():
    """The difference of the logarithms of these would be 0: they are equal as floats."""
    assert counting_interval(2**100 - 1, 2**100).high == pytest.approx(-(2.0**-100), rel=1e-12)


@pytest.mark.parametrize("arguments", [(-1, 4), (5, 4), (1, 0), (1, 4, -0.1)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match=r"Need 0 <=|epsilon"):
        counting_interval(*arguments)


def test_a_simulated_approximate_counter_covers_for_all_answers_at_once():
    """Each of 20 counts is off by more than its factor with probability delta / 20."""
    rng, epsilon, num_answers = np.random.default_rng(0), 0.8, 20
    error = 1 - confidence_of_each(1 - DELTA, num_answers)
    ratio = np.exp(rng.uniform(-1, 1, (NUM_RUNS, num_answers)) * math.log1p(epsilon))
    ratio = np.where(rng.random(ratio.shape) < error, 5.0, ratio)
    intervals = factor_interval(0.0, epsilon)
    misses = ((np.log(ratio) + intervals.low > 0) | (np.log(ratio) + math.log1p(epsilon) < 0)).any(axis=1)
    assert error == pytest.approx(DELTA / num_answers)
    assert keeps_its_level(misses)


# --- against a named imitator ---


def e_process_rejections(log_upper_of, num_runs, num_answers=60, upper_error=0.0):
    """B writes strings 0..3, A is latent and tells some of them apart. Which runs reject B, which is the truth."""
    rng = np.random.default_rng(5)
    p_b = np.array([0.4, 0.3, 0.2, 0.1])
    a_given_z = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]])
    answers = draw(rng, p_b, (num_runs, num_answers))
    thoughts = draw(rng, np.array([0.5, 0.5]), (num_runs, num_answers, 2))
    log_w = np.log(a_given_z[thoughts, answers[..., None]].mean(axis=2))
    log_upper = log_upper_of(p_b, answers, rng)
    return np.array(
        [
            e_process_against(w, u, "string", "string", 1 - DELTA, upper_error).rejected_at is not None
            for w, u in zip(log_w, log_upper, strict=True)
        ]
    )


def test_a_true_hypothesis_is_seldom_rejected_ever():
    assert keeps_its_level(e_process_rejections(lambda p, y, rng: np.log(p[y]), NUM_RUNS))


def test_upper_bounds_that_may_fail_add_their_error():
    def sometimes_too_small(p, y, rng):
        failed = rng.random((len(y), 1)) < 0.05
        return np.log(p[y]) + np.where(failed, -3.0, 0.2)

    misses = e_process_rejections(sometimes_too_small, NUM_RUNS, upper_error=0.05)
    assert keeps_its_level(misses, DELTA + 0.05)
    assert e_process_against([0.0], [0.0], "string", "string", 0.95, 0.05).error == pytest.approx(0.1)


def test_the_canonical_tokenisation_as_denominator_rejects_a_true_hypothesis():
    """Each string has two tokenisations; the canonical one holds 1/2 to 9/10 of it. The product's mean is above 1."""
    share = np.array([0.9, 0.5, 0.7, 0.6])
    assert (np.array([0.4, 0.3, 0.2, 0.1]) @ (1 / share)) > 1.4
    assert breaks_its_level(e_process_rejections(lambda p, y, rng: np.log(p[y] * share[y]), 2000))
    with pytest.raises(NoCertificateError, match="one tokenisation"):
        e_process_against([-1.0], [-1.0], "string", "token_ids")
    e_process_against([-1.0], [-1.0], "token_ids", "token_ids")


def test_a_false_hypothesis_is_rejected_and_says_when():
    result = e_process_against([-1.0] * 10, [-2.0] * 10, "string", "string", 0.95)
    assert result.rejected_at == 3  # e^3 > 20
    np.testing.assert_allclose(result.log_e_values, np.arange(1, 11))


def test_an_answer_that_neither_can_give_ends_the_evidence():
    result = e_process_against([-np.inf, 0.0], [-np.inf, -50.0], "string", "string")
    assert result.rejected_at is None


def test_an_answer_that_the_named_imitator_cannot_give_refutes_it():
    assert e_process_against([-1.0, -1.0], [-np.inf, -1.0], "string", "string").rejected_at == 1


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_outside_zero_and_one_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        log_prob_lower_bound([0.0], confidence)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_log_prob_lower_bound([-1.0], num_runs=0), "num_runs"),
        (lambda: mean_log_prob_lower_bound([-1.0, -1.0], weight=[0.0, 1.0]), "first of them positive"),
        (lambda: mean_log_prob_lower_bound(-1.0), r"\[N\]"),
        (lambda: mean_log_prob_upper_bound([-1.0], [-1.0], "enumerated", "human"), r"\[N, K - 1\]"),
        (lambda: mean_log_prob_upper_bound([-1.0], [[-1.0]], "mcmc", "human"), "'mcmc'"),
        (lambda: mean_log_prob_upper_bound([-1.0], [[-1.0]], "enumerated", "me"), "'me'"),
        (lambda: e_process_against([-1.0], [-1.0, -2.0], "string", "string"), "one upper bound per estimate"),
        (lambda: e_process_against([-1.0], [-1.0], "text", "string"), "'text'"),
    ],
)
def test_wrong_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
