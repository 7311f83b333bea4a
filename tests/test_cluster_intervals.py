import numpy as np
import pytest
from scipy import stats

from hf_imitate.cluster_intervals import cluster_mean, cluster_ratio, paired_cluster_mean

RNG_VALUES = np.random.default_rng(0).normal(3, 2, 24)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_one_value_per_cluster_gives_the_textbook_t_interval(confidence):
    found = cluster_mean(RNG_VALUES, np.arange(24), confidence)
    textbook = stats.ttest_1samp(RNG_VALUES, 0).confidence_interval(confidence)
    assert found.interval == pytest.approx(tuple(textbook))
    assert found.value == pytest.approx(RNG_VALUES.mean())
    assert found.standard_error == pytest.approx(stats.sem(RNG_VALUES))
    assert found.num_clusters == 24


def test_clusters_of_one_size_are_worth_their_means():
    clusters = np.repeat(list("cabdfe"), 4)
    found = cluster_mean(RNG_VALUES, clusters)
    means = RNG_VALUES.reshape(6, 4).mean(axis=1)
    assert found.interval == pytest.approx(tuple(stats.ttest_1samp(means, 0).confidence_interval(0.95)))
    assert found.num_clusters == 6


def test_copies_of_a_row_in_its_cluster_add_no_certainty():
    once = cluster_mean(RNG_VALUES, np.arange(24))
    copied = cluster_mean(np.repeat(RNG_VALUES, 5), np.repeat(np.arange(24), 5))
    assert copied.interval == pytest.approx(once.interval)


def test_a_weight_of_three_is_three_copies():
    weights = np.random.default_rng(1).integers(1, 4, 24)
    clusters = np.arange(24) // 2
    weighted = cluster_mean(RNG_VALUES, clusters, weights=weights)
    copied = cluster_mean(np.repeat(RNG_VALUES, weights), np.repeat(clusters, weights))
    assert weighted.interval == pytest.approx(copied.interval)
    assert weighted.value != pytest.approx(RNG_VALUES.mean())


def test_agrees_with_statsmodels_on_unequal_clusters_and_weights():
    api = pytest.importorskip("statsmodels.api")
    clusters = np.array([0] * 9 + [1] * 2 + [2] * 6 + [3] * 7)
    weights = np.random.default_rng(2).uniform(0.5, 2, 24)
    model = api.WLS(RNG_VALUES, np.ones(24), weights=weights)
    fitted = model.fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    found = cluster_mean(RNG_VALUES, clusters, weights=weights)
    assert found.standard_error == pytest.approx(fitted.bse[0])
    assert found.interval == pytest.approx(tuple(fitted.conf_int(0.05)[0]))


def test_the_error_of_unequal_clusters_by_hand():
    # Mean 3; the clusters' residuals sum to -3 and 3; error^2 = 2 / 1 * 18 / 9 = 4.
    assert cluster_mean([1.0, 2.0, 6.0], [0, 0, 1]).standard_error == pytest.approx(2.0)


def coverage(clusters, num_runs=10_000, seed=0):
    """How often the interval covers a mean of 0, where answers of one question share an effect."""
    rng = np.random.default_rng(seed)
    _, places = np.unique(np.arange(120) // 3, return_inverse=True)
    values = rng.normal(size=(num_runs, 40))[:, places] + rng.exponential(size=(num_runs, 120)) - 1
    return np.mean([found.low <= 0 <= found.high for found in (cluster_mean(v, clusters).interval for v in values)])


def test_intervals_cover_where_answers_of_a_question_hang_together():
    assert 0.94 < coverage(np.arange(120) // 3) < 0.96
    # Every answer as a question of its own: the error is too small, and the interval misses.
    assert coverage(np.arange(120), num_runs=2000) < 0.87


def test_a_ratio_is_that_of_the_totals_and_exact_where_every_row_has_it():
    bits, length = np.array([8.0, 2.0, 20.0]), np.array([4.0, 1.0, 10.0])
    assert cluster_ratio(bits, length, np.arange(3)).interval == pytest.approx((2.0, 2.0))
    assert cluster_ratio([1.0, 9.0], [1.0, 3.0], [0, 1]).value == 2.5


def test_ratio_intervals_cover():
    rng = np.random.default_rng(0)
    length = rng.integers(1, 30, (4000, 100)).astype(float)
    bits = 2.0 * length + rng.normal(size=length.shape) * length
    found = [cluster_ratio(*rows, np.arange(100)).interval for rows in zip(bits, length, strict=True)]
    assert 0.935 < np.mean([interval.low <= 2 <= interval.high for interval in found]) < 0.96


def test_what_a_pair_shares_cancels():
    shared = 1000 * RNG_VALUES
    found = paired_cluster_mean(shared + 1 + np.tile([0.1, -0.1], 12), shared, np.arange(24))
    assert found.value == pytest.approx(1)
    assert found.standard_error < 0.03


def test_a_cluster_without_weight_is_no_observation():
    found = cluster_mean([1.0, 2.0, 3.0, 50.0], [0, 1, 2, 3], weights=[1, 1, 1, 0])
    assert found.interval == pytest.approx(cluster_mean([1.0, 2.0, 3.0], [0, 1, 2]).interval)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0, np.inf], [0, 1]), "infinite or NaN"),
        (([1.0, np.nan], [0, 1]), "infinite or NaN"),
        (([1.0, 2.0], [0, 0]), "at least 2 clusters"),
        (([1.0, 2.0], [0]), "one shape"),
        (([1.0, 2.0], [0, 1], 1.0), "confidence"),
        (([1.0, 2.0], [0, 1], 0.95, [1, -1]), "Weights"),
        (([1.0, 2.0], [0, 1], 0.95, [0, 0]), "positive"),
    ],
)
def test_what_has_no_interval_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        cluster_mean(*arguments)


def test_a_ratio_to_nothing_and_an_infinite_difference_are_refused():
    with pytest.raises(ValueError, match="total is 0"):
        cluster_ratio([1.0, 2.0], [0.0, 0.0], [0, 1])
    with pytest.raises(ValueError, match="finite"):
        paired_cluster_mean([np.inf, 1.0], [np.inf, 1.0], [0, 1])
