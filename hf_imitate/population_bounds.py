"""MATH: a certified lower bound on the mean log-probability over a *population* of questions, by a floor. Nats."""

import math

import numpy as np
from numpy.typing import ArrayLike

from hf_imitate.bounds import Interval

# A bet of 1 risks everything on one answer; half is what the authors of the bound use.
LARGEST_BET = 0.5


def uniform_string_log_prob(num_symbols: ArrayLike, mean_symbols: float, alphabet_size: int = 256) -> np.ndarray:
    """Log-probability of a string under the floor law: geometric length, uniform symbols. Nats. [N] to [N].

        u(y) = stop (1 - stop)^n / alphabet_size^n,     n = number of symbols,     stop = 1 / (1 + mean_symbols)

    It sums to 1 over all strings. Bytes (`alphabet_size=256`) suit statements about strings, content tokens
    (`alphabet_size` = vocabulary without the end token) statements about token ids; the end is the stop.

    Args:
        num_symbols: n of each answer, its end not counted.
        mean_symbols: mean length under the law, positive; fixed without the test answers.
        alphabet_size: number of different symbols.

    Raises:
        ValueError: a negative length, `mean_symbols` <= 0, or an alphabet without symbols.
    """
    n = np.asarray(num_symbols, dtype=np.float64)
    if not (n >= 0).all() or not mean_symbols > 0 or alphabet_size < 1:
        raise ValueError(
            f"Need lengths >= 0, `mean_symbols` > 0 and `alphabet_size` >= 1; got {mean_symbols}, {alphabet_size}."
        )
    stop = 1 / (1 + mean_symbols)
    return math.log(stop) + n * (math.log1p(-stop) - math.log(alphabet_size))


def floored_log_prob_lower_bound(
    log_estimates: ArrayLike,
    num_symbols: ArrayLike,
    max_symbols: int,
    mean_symbols: float,
    floor_share: float = 0.01,
    confidence: float = 0.95,
    method: str = "betting",
    alphabet_size: int = 256,
) -> float:
    """Lower-bound E log p'(answer | question) over the population, p' = (1 - eps) p + eps u, u a floor law (T3).

    Without a floor no such bound exists: one unseen answer of probability 0 makes the mean -inf. With it
    X = min(log((1 - eps) W + eps u), 0) lies in [a, 0] and has mean at most log p', by Jensen.

    Conditions, all needed:

    1. It bounds the *floored* imitator p', not p, whose mean may be -inf. Report eps and u with it.
    2. a = log eps + log u of the longest answer, so `max_symbols` is a declared cap that defines the population, fixed
       in advance and obeyed by *every* answer of it. X is never clipped from below: that would raise its mean.
    3. Both models, eps, u and the caps do not depend on the test sample; question-answer pairs are independent draws
       of one law, and E[W | pair] <= p.
    4. u and p are laws on the same object: bytes with the string's probability, or token ids. The probability of the
       canonical ids is at most the string's, so the bound for the string stays valid.

    Args:
        log_estimates: log W of each answer, or the exact log p, nats; NaN counts as 0. [N], N >= 2.
        num_symbols: bytes or content tokens of each answer. [N].
        max_symbols: the declared cap.
        mean_symbols: mean length under u.
        floor_share: eps, in (0, 1).
        confidence: of the one-sided bound.
        method: "betting" (also valid if the test set was stopped early while looking) or "bernstein".
        alphabet_size: of u.

    Returns:
        Nats per answer, at most 0.

    Raises:
        ValueError: an answer is longer than the cap, or an argument is out of range.
    """
    log_w = np.asarray(log_estimates, dtype=np.float64)
    lengths = np.asarray(num_symbols)
    if method not in ("betting", "bernstein"):
        raise ValueError(f"`method` is {method!r}; use 'betting' or 'bernstein'.")
    if log_w.ndim != 1 or log_w.shape != lengths.shape or len(log_w) < 2:
        raise ValueError(
            f"Need one estimate and one length for each of N >= 2 answers; got {log_w.shape}, {lengths.shape}."
        )
    if not 0 < floor_share < 1:
        raise ValueError(f"`floor_share` must lie strictly between 0 and 1; got {floor_share}.")
    if (lengths > max_symbols).any():
        raise ValueError(
            f"{int((lengths > max_symbols).sum())} answers are longer than `max_symbols` = {max_symbols}. The cap "
            "defines the population: declare one that every answer obeys. Dropping or clipping voids the bound."
        )
    log_floor = math.log(floor_share) + uniform_string_log_prob(lengths, mean_symbols, alphabet_size)
    lowest = math.log(floor_share) + float(uniform_string_log_prob(max_symbols, mean_symbols, alphabet_size))
    log_w = np.where(np.isnan(log_w), -np.inf, log_w)
    values = np.minimum(np.logaddexp(math.log1p(-floor_share) + log_w, log_floor), 0.0)
    bounded = Interval(lowest, 0.0)
    if method == "bernstein":
        return float(empirical_bernstein_lower_bound(values, bounded, confidence))
    return float(betting_lower_bound(values, bounded, confidence)[-1])


def empirical_bernstein_lower_bound(values: ArrayLike, bounded: Interval, confidence: float = 0.95) -> np.ndarray:
    """Lower-bound the mean of independent draws of one law within `bounded`, at a sample size fixed in advance.

        mean - sqrt(2 V log(2 / delta) / n) - 7 (high - low) log(2 / delta) / (3 (n - 1)),   V the sample variance

    Args:
        values: one or many samples. [..., N], N >= 2.
        bounded: the range that the law *provably* has, not the range seen.
        confidence: 1 - delta, one-sided, for each sample on its own.

    Returns:
        [...].

    Raises:
        ValueError: fewer than two values, or one outside the range.

    Source:
        Maurer and Pontil, "Empirical Bernstein Bounds and Sample Variance Penalization", Theorem 4.
        https://huggingface.co/papers/0907.3740
    """
    scaled = _scaled(values, bounded, confidence)
    n, log_term = scaled.shape[-1], math.log(2 / (1 - confidence))
    slack = np.sqrt(2 * scaled.var(axis=-1, ddof=1) * log_term / n) + 7 * log_term / (3 * (n - 1))
    return bounded.low + (bounded.high - bounded.low) * np.maximum(scaled.mean(axis=-1) - slack, 0.0)


def betting_lower_bound(values: ArrayLike, bounded: Interval, confidence: float = 0.95) -> np.ndarray:
    """Lower-bound the mean after each draw, all at once: the predictable plug-in empirical Bernstein bound.

        (sum l_i X_i - log(1 / delta) - sum (X_i - m_{i-1})^2 psi(l_i)) / sum l_i,    psi(l) = -log(1 - l) - l

    X is scaled to [0, 1]; the bet l_i and the running mean m_{i-1} come from the values before the i-th. Whoever bets
    against a mean that is not below the truth cannot get rich: the draws may be stopped at any time. The best bound so
    far is returned.

    Args:
        values: independent draws of one law, or any draws with one conditional mean, in the order drawn; one or many
            samples. [..., N], N >= 2.
        bounded: the range that the law provably has.
        confidence: 1 - delta, one-sided, for each sample on its own.

    Returns:
        [..., N], rising along the last axis.

    Raises:
        ValueError: fewer than two values, or one outside the range.

    Source:
        Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", Theorem 2.
        https://huggingface.co/papers/2010.09686
    """
    x = _scaled(values, bounded, confidence)
    t = np.arange(1, x.shape[-1] + 1)
    log_term = math.log(1 / (1 - confidence))
    mean = (0.5 + np.cumsum(x, axis=-1)) / (t + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2, axis=-1)) / (t + 1)
    mean_before, variance_before = _one_later(mean, 0.5), _one_later(variance, 0.25)
    bet = np.minimum(np.sqrt(2 * log_term / (variance_before * t * np.log1p(t))), LARGEST_BET)
    cost = (x - mean_before) ** 2 * (-np.log1p(-bet) - bet)
    lower = (np.cumsum(bet * x - cost, axis=-1) - log_term) / np.cumsum(bet, axis=-1)
    return bounded.low + (bounded.high - bounded.low) * np.maximum.accumulate(np.maximum(lower, 0.0), axis=-1)


def _one_later(values: np.ndarray, first: float) -> np.ndarray:
    """What was known before each draw."""
    return np.concatenate([np.full_like(values[..., :1], first), values[..., :-1]], axis=-1)


def _scaled(values: ArrayLike, bounded: Interval, confidence: float) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie strictly between 0 and 1; got {confidence}.")
    if x.ndim < 1 or x.shape[-1] < 2 or not bounded.low < bounded.high:
        raise ValueError(f"Need at least 2 values [..., N] and a range low < high; got shape {x.shape} and {bounded}.")
    scaled = (x - bounded.low) / (bounded.high - bounded.low)
    if not ((scaled >= -1e-9) & (scaled <= 1 + 1e-9)).all():
        raise ValueError(f"Values lie outside the declared range {bounded}; declare one that no draw can leave.")
    return scaled.clip(0.0, 1.0)
