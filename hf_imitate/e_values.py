"""MATH: evidence against "nobody can tell them apart": betting e-values, exact sign tests, Holm's correction."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom

# Fixed shares of the wealth that are bet side by side. A bet of 1 could lose everything on one pair; at 0.95 one
# mistake costs 4.3 bits.
BETS = np.linspace(0.0, 0.95, 20)


def log_e_process(payoffs: ArrayLike) -> np.ndarray:
    """Log of the wealth of a bettor who doubts that human and imitator answers are exchangeable within pairs. Nats.

        E_t = mean over b of product over i <= t of (1 + b g_i),     b = 0, 0.05, ..., 0.95

    Under the null hypothesis each g_i has mean 0 given the past, so E is a fair game from 1 on: it ever reaches 1 / a
    with probability at most a (Ville), whenever one looks or stops. The mean over fixed bets is itself one predictable
    bet: the mean bet weighted by what each has won so far. It loses at most log 20 to the best of them. For signs it
    needs 2.3 (advantage 0.05) and 1.9 (0.1) times the pairs of the exact test at power 0.8, and 1.2 and 1.0 times in
    the median; the online Newton step up to 1/2 needs 2.5 and 2.1, and 1.3 and 1.0 (measured, 2 000 runs each).

    Args:
        payoffs: g_i in [-1, 1], positive where the judge preferred the human's answer, 0 for a tie, of a judge that
            was fixed before the pair was seen. One or many series. [..., N].

    Returns:
        log E_t, [..., N]; `log_e_process(...)[..., -1]` is that of the whole series.

    Raises:
        ValueError: a payoff outside [-1, 1] or NaN.

    Source:
        Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", section 4,
        https://huggingface.co/papers/2010.09686; Cover, "Universal Portfolios", Mathematical Finance 1 (1991).
    """
    g = np.asarray(payoffs, dtype=np.float64)
    if g.ndim < 1 or not (np.abs(g) <= 1).all():
        raise ValueError(f"`payoffs` must be numbers in [-1, 1], of shape [..., N]; got shape {g.shape}.")
    return average_log_e(np.stack([np.cumsum(np.log1p(bet * g), axis=-1) for bet in BETS]))


def average_log_e(log_e: ArrayLike, axis: int = 0) -> np.ndarray:
    """Log of the mean of e-values, given their logs: an e-value whatever their dependence. Nats."""
    values = np.asarray(log_e, dtype=np.float64)
    return np.logaddexp.reduce(values, axis=axis) - math.log(values.shape[axis])


def sign_test_p_value(num_wins: ArrayLike, num_losses: ArrayLike) -> np.ndarray:
    """P(at least `num_wins` of `num_wins + num_losses` fair coins): exact, one-sided, given which pairs tie.

    Ties carry no sign: given that a pair does not tie, its sign is a fair coin under the null hypothesis.

    Args:
        num_wins, num_losses: pairs in which the human's answer scored higher, and lower. Any shape.

    Raises:
        ValueError: a negative count.
    """
    wins, losses = np.asarray(num_wins, dtype=np.float64), np.asarray(num_losses, dtype=np.float64)
    if (wins < 0).any() or (losses < 0).any():
        raise ValueError("Wins and losses are counts; got a negative one.")
    return binom.sf(wins - 1, wins + losses, 0.5)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values: rejecting where they are <= a errs anywhere with probability at most a. [N] to [N].

        adjusted of the k-th smallest = max over j <= k of min(1, (N - j + 1) p_(j))

    It asks nothing of how the tests depend on each other.

    Raises:
        ValueError: a value outside [0, 1].

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"`p_values` must be numbers in [0, 1], of shape [N]; got shape {p.shape}.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(len(p), 0, -1), 1.0))
    return adjusted


def calibrated_payoffs(log_odds: ArrayLike) -> np.ndarray:
    """Payoffs of a judge that says how sure it is: 2 sigmoid(log odds that the human's is the human's) - 1.

    Where the odds are right, betting all of it makes 1 + g the likelihood ratio of the pair's two orders. [...].
    """
    return np.tanh(np.asarray(log_odds, dtype=np.float64) / 2)
