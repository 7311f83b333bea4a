"""MATH: how far the imitator's law can or must be from the human one, from a divergence, from entropy, from failures.

"Hidden" means: any set A of answers whatever, chosen by anyone, even with a key that no test knows. Nats.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import rel_entr

from hf_imitate.bounds import Interval, clopper_pearson
from hf_imitate.population_bounds import betting_lower_bound

# Halvings of an interval of length 1: beyond the last digit of a double.
_NUM_HALVINGS = 60


def binary_divergence(probability: ArrayLike, other: ArrayLike) -> np.ndarray:
    """Kullback-Leibler divergence d(a || b) between two coins, nats; infinite where b excludes what a allows.

        d(a || b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b))

    Args:
        probability: a. Any shape.
        other: b. Broadcast against a.
    """
    a, b = _probabilities(probability), _probabilities(other)
    return np.maximum(rel_entr(a, b) + rel_entr(1 - a, 1 - b), 0.0)


def largest_probability_within(probability: ArrayLike, divergence: ArrayLike) -> np.ndarray:
    """How probable an event can be for the imitator, if it has `probability` for humans: sup{b : d(a || b) <= eps}.

    If the mean over questions of KL(human || imitator) is at most eps, this bounds the imitator's probability of *any*
    set of answers, which may depend on the question and be chosen afterwards, averaged over questions (data
    processing; d is convex in both arguments together). What humans never do, the imitator does with probability at
    most 1 - exp(-eps). Where humans are only known to do it with probability at most u, pass u: the result rises
    with it.

    Args:
        probability: a, in [0, 1]. Any shape.
        divergence: eps, nats, at least 0. Broadcast against a.

    Returns:
        b >= a, rounded up. Broadcast shape.

    Raises:
        ValueError: an argument is out of range.
    """
    a, eps = np.broadcast_arrays(_probabilities(probability), _divergences(divergence))
    low, high = a.astype(np.float64), np.ones(a.shape)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        is_within = binary_divergence(a, middle) <= eps
        low, high = np.where(is_within, middle, low), np.where(is_within, high, middle)
    return high


def smallest_probability_within(probability: ArrayLike, divergence: ArrayLike) -> np.ndarray:
    """The mirror image of [`largest_probability_within`]: inf{b : d(a || b) <= eps}, rounded down."""
    return 1 - largest_probability_within(1 - _probabilities(probability), divergence)


def total_variation_upper_bound(divergence: ArrayLike) -> np.ndarray:
    """How far apart two laws with KL(human || imitator) <= eps can be, in total variation; 1 says nothing.

        min( sqrt(eps / 2),  sqrt(1 - exp(-eps)) )       Pinsker;  Bretagnolle and Huber

    Both are concave in eps: for a mean of eps over questions they bound the mean total variation.

    Args:
        divergence: eps, nats, at least 0. Any shape.

    Raises:
        ValueError: a divergence is negative or NaN.

    Source:
        Canonne, "A short note on an inequality between KL and TV", https://huggingface.co/papers/2202.07198
    """
    eps = _divergences(divergence)
    return np.minimum(np.sqrt(eps / 2), np.sqrt(-np.expm1(-eps)))


def unique_answer_deviation_upper_bound(answer_probabilities: ArrayLike, confidence: float = 0.95) -> np.ndarray:
    """Upper-bound the mean total variation where each question has *one* right answer that every human gives.

    Then the human law is a point mass, and total variation is what the imitator puts elsewhere, exactly:
    E[1 - q(right answer)]. Its mean needs no entropy, no floor and no cap on length, since it lies in [0, 1].

    Args:
        answer_probabilities: q of the human's answer to each question, independent questions, in an order fixed
            before; one or many samples. An estimate with mean at most q, capped at 1, will do: the bound then only
            rises. [..., N], N >= 2.
        confidence: one-sided, for each sample on its own.

    Returns:
        [...], in [0, 1].

    Raises:
        ValueError: fewer than two questions, or a number that is no probability.

    Source:
        [`~hf_imitate.population_bounds.betting_lower_bound`] on q.
    """
    return 1 - betting_lower_bound(_probabilities(answer_probabilities), Interval(0.0, 1.0), confidence)[..., -1]


def collision_entropy_lower_bound(num_equal: int, num_pairs: int, confidence: float = 0.95) -> float:
    """Lower-bound the mean entropy of human answers from how often two humans give the same one. Nats.

        E H(p(. | x))  >=  E H_2  >=  -log E P(collision | x)  >=  -log U,

    U an *upper* limit of the rate of collisions.

    Conditions: questions drawn independently; *one* pair each, of two independently drawn humans; "equal" is at least
    as coarse as the object whose log-probability is scored. With no collision at all it is about log(n / 3) at 0.95:
    few questions certify few nats.

    Args:
        num_equal: pairs of equal answers.
        num_pairs: pairs, one per question.
        confidence: one-sided.

    Returns:
        At least 0.

    Source:
        Jensen's inequality, twice; Clopper and Pearson (1934) for U.
    """
    # Adding 0.0 turns -0.0, the entropy when every pair is equal, into 0.0.
    return -math.log(clopper_pearson(num_equal, num_pairs, confidence, side="upper").high) + 0.0


def failure_deviation_lower_bound(
    num_failed_imitator: int, num_failed_human: int, num_questions: int, confidence: float = 0.95
) -> float:
    """Lower-bound total variation by an event: the imitator fails a check more often than humans do.

        TV  >=  P(imitator fails) - P(human fails)  >=  L - U,     each limit with half of the error

    Args:
        num_failed_imitator, num_failed_human: failures among answers to the same questions, one per side and question.
        num_questions: independent questions.
        confidence: of the bound on the mean total variation over questions.

    Returns:
        In [0, 1]; 0 proves nothing.

    Source:
        Clopper and Pearson (1934), and a union bound: the two counts may depend on each other.
    """
    each = (1 + confidence) / 2
    low = clopper_pearson(num_failed_imitator, num_questions, each, side="lower").low
    high = clopper_pearson(num_failed_human, num_questions, each, side="upper").high
    return max(0.0, low - high)


def num_answers_to_expose(failure_rate: float, probability: float = 0.95) -> int:
    """Answers after which an imitator that fails with `failure_rate` has failed at least once with `probability`.

    299 answers expose a rate of 1 %.

    Raises:
        ValueError: an argument is outside (0, 1); a rate of 1 is exposed by one answer.
    """
    if not 0 < failure_rate <= 1 or not 0 < probability < 1:
        raise ValueError(
            f"`failure_rate` must lie in (0, 1] and `probability` in (0, 1); got {failure_rate}, {probability}."
        )
    return 1 if failure_rate == 1 else max(1, math.ceil(math.log1p(-probability) / math.log1p(-failure_rate)))


def _probabilities(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError("Probabilities must lie in [0, 1]; at least one does not, or is NaN.")
    return array


def _divergences(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not (array >= 0).all():
        raise ValueError("A divergence is at least 0; at least one is negative or NaN. A negative estimate bounds 0.")
    return array
