"""MATH: intervals for means and ratios of values that depend on each other within clusters. Approximate, by design."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from hf_imitate.bounds import Interval


class ClusterEstimate(NamedTuple):
    """An estimate with its interval.

    Attributes:
        value (`float`): the weighted mean or ratio.
        standard_error (`float`): cluster-robust.
        interval (`Interval`): Student's t with `num_clusters` - 1 degrees of freedom, around `value`.
        num_clusters (`int`): independent observations behind it.
    """

    value: float
    standard_error: float
    interval: Interval
    num_clusters: int


def cluster_mean(
    values: ArrayLike, clusters: ArrayLike, confidence: float = 0.95, weights: ArrayLike | None = None
) -> ClusterEstimate:
    """Mean of values that are independent across clusters and arbitrary within: answers to one question, say.

        error^2 = G / (G - 1)  sum_g ( sum_{i in g} w_i (x_i - mean) )^2 / (sum_i w_i)^2,      G = number of clusters

    With one value per cluster and equal weights it is the textbook t interval. It relies on the central limit theorem
    over clusters: with few of them, or one that dominates, it is too narrow.

    Args:
        values: [N], finite.
        clusters: which cluster each value belongs to, any labels. [N].
        confidence: of the two-sided interval.
        weights: non-negative, of each value; equal by default. [N].

    Returns:
        [`ClusterEstimate`].

    Raises:
        ValueError: shapes differ, a value is not finite, a weight is negative, or fewer than two clusters have weight.

    Source:
        Miller, "Adding Error Bars to Evals", https://huggingface.co/papers/2411.00640; the factor G / (G - 1) is the
        usual correction for few clusters, and t their usual reference.
    """
    return cluster_ratio(values, np.ones(np.shape(values)), clusters, confidence, weights)


def paired_cluster_mean(
    values_a: ArrayLike,
    values_b: ArrayLike,
    clusters: ArrayLike,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
) -> ClusterEstimate:
    """Mean of `values_a` minus `values_b`, measured on the same things: what both share cancels before the error.

    Args as in [`cluster_mean`]; both [N].
    """
    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"Pairs need two values each; got shapes {a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("A difference needs finite values on both sides. Count what is infinite or NaN on its own.")
    return cluster_mean(a - b, clusters, confidence, weights)


def cluster_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: ArrayLike,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
) -> ClusterEstimate:
    """Ratio of two weighted totals, such as bits per byte; clusters as in [`cluster_mean`].

        ratio = sum w a / sum w b
        error^2 = G / (G - 1)  sum_g ( sum_{i in g} w_i (a_i - ratio b_i) )^2 / (sum w b)^2

    Args:
        numerators, denominators: a and b. [N], finite.
        clusters, confidence, weights: as in [`cluster_mean`].

    Raises:
        ValueError: as in [`cluster_mean`], or the denominators' total is not positive.

    Source:
        Cochran, "Sampling Techniques" (1977), section 6: the linearised (delta) error of a ratio.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    labels = np.asarray(clusters)
    w = np.ones(a.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    _check(a, b, labels, w, confidence)
    total = float((w * b).sum())
    if not total > 0:
        raise ValueError(f"The denominators' weighted total is {total}; a ratio needs a positive one.")
    ratio = float((w * a).sum()) / total
    # A cluster without weight says nothing and must not count as an observation.
    _, places = np.unique(labels[w > 0], return_inverse=True)
    sums = np.bincount(places, (w * (a - ratio * b))[w > 0])
    num_clusters = len(sums)
    if num_clusters < 2:
        raise ValueError(f"An error needs at least 2 clusters with positive weight; got {num_clusters}.")
    error = math.sqrt(num_clusters / (num_clusters - 1) * float(np.square(sums).sum())) / total
    reach = float(student_t.isf((1 - confidence) / 2, num_clusters - 1)) * error
    return ClusterEstimate(ratio, error, Interval(ratio - reach, ratio + reach), num_clusters)


def _check(a: np.ndarray, b: np.ndarray, labels: np.ndarray, w: np.ndarray, confidence: float) -> None:
    if a.ndim != 1 or not a.shape == b.shape == labels.shape == w.shape:
        raise ValueError(
            f"Values, clusters and weights must share one shape [N]; got {a.shape}, {b.shape}, {labels.shape}, "
            f"{w.shape}."
        )
    bad = int((~np.isfinite(a) | ~np.isfinite(b)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(a)} values are infinite or NaN; a mean needs finite ones. Count those apart.")
    if not (np.isfinite(w).all() and (w >= 0).all()):
        raise ValueError("Weights must be finite and at least 0.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie strictly between 0 and 1; got {confidence}.")
