"""Keyed answer laws that hide a message, and what each one costs in the human's log-probability.

The price of a law s against humans who answer by p is the expected loss of log-probability, KL(p || s), nats. It does
not depend on how well the law hides from those who have no key.
"""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from torch import Tensor

# Nodes of the integral over the logarithm of time; the integrand is gone to 1e-14 at both ends.
_LOG_TIMES = np.arange(-34.0, 5.0, 0.125)


def green_list_law(log_p: Tensor, is_green: Tensor, delta: float) -> Tensor:
    """The law that favours listed tokens: s(token) proportional to p(token) e^delta if green, p(token) otherwise.

    Args:
        log_p: log-probability of each next token, nats. [..., V].
        is_green: which tokens are listed, bool. [..., V].
        delta: what a listed token gains, nats, at least 0; 0 is the honest law.

    Returns:
        log s, nats. [..., V].

    Raises:
        ValueError: `delta` is negative or infinite.

    Source:
        Kirchenbauer et al., "A Watermark for Large Language Models". https://huggingface.co/papers/2301.10226
    """
    _check_delta(delta)
    return torch.log_softmax(log_p + delta * is_green, dim=-1)


def green_list_price(log_p: Tensor, is_green: Tensor, delta: float) -> Tensor:
    """KL(p || s) of one position under a known list: log(1 + (e^delta - 1) p(green)) - delta p(green), nats. [...]."""
    _check_delta(delta)
    p_green = (log_p.exp() * is_green).sum(dim=-1)
    return torch.log1p(math.expm1(delta) * p_green) - delta * p_green


def expected_green_list_price(p: ArrayLike, delta: float, share: float = 0.5) -> np.ndarray:
    """KL(p || s) of one position, averaged over lists on which each token stands independently with chance `share`.

        price = E log(1 + c X) - delta share,      X = p(green),  c = e^delta - 1
        E log(1 + c X) = int_0^inf e^-t (1 - prod over tokens (1 - share + share e^(-t c p)))  dt / t

    The product is E e^(-t c X): an exact sum over all 2^V lists. The integral is taken by the trapezoid rule in log t,
    whose error is below 1e-9.

    Args:
        p: law of the next token. [N, V] or [V].
        delta: what a listed token gains, nats, at least 0.
        share: chance that a token is listed.

    Returns:
        nats, [N] or a scalar.

    Source:
        Frullani's integral for the logarithm.
    """
    _check_delta(delta)
    p = np.asarray(p, dtype=float)
    times = np.exp(_LOG_TIMES)
    exponent = times[:, None] * math.expm1(delta)
    mean = np.array([np.prod(1 + share * np.expm1(-exponent * row), axis=1) for row in np.atleast_2d(p)])
    price = (np.exp(-times) * (1 - mean)).sum(axis=1) * 0.125 - delta * share
    return price.reshape(p.shape[:-1])


def soft_rotation_law(log_p: Tensor, start: Tensor, delta: float) -> Tensor:
    """Honest sampling by a coin in [0, 1), whose density is 1 + delta on a half circle and 1 - delta on the other.

        s(token) = (1 - delta) p(token) + 2 delta |[cdf before token, cdf after token)  and  [start, start + 1/2)|

    The half circle wraps around. Averaged over a uniform `start` the law is p exactly, and so it is over `start` and
    `start + 1/2`. `delta` 0 is honest; 1 gives every second half no probability, as rotated samples do.

    Args:
        log_p: log-probability of each next token, nats. [..., V].
        start: where the favoured half circle begins, in turns. [...].
        delta: between 0 and 1.

    Returns:
        log s, nats; -inf where `delta` is 1 and a token lies in the other half. [..., V].

    Raises:
        ValueError: `delta` is not between 0 and 1.

    Source:
        Ding et al., "Discop" (2023), for rotated copies of a law; the soft form is this library's.
    """
    _check_rotation(delta)
    if delta == 0:
        return log_p
    p = log_p.exp()
    after = p.cumsum(dim=-1)
    before = after - p
    start = (start % 1)[..., None]
    overlap = sum(
        (torch.minimum(after, start + shift + 0.5) - torch.maximum(before, start + shift)).clamp(min=0)
        for shift in (0.0, -1.0)
    )
    law = (1 - delta) * p + 2 * delta * torch.minimum(torch.as_tensor(overlap), p)
    return (law / law.sum(dim=-1, keepdim=True)).log()


def soft_rotation_price(p: ArrayLike, delta: float) -> np.ndarray:
    """KL(p || s) of one position under soft rotation, averaged over the start of the half circle; exact, nats.

    As the half circle turns, the ratio s/p of a token goes between 1 - e and 1 + e, e = delta min(1, (1 - p)/p). It
    stays |1/2 - p| of the time at either end and moves linearly in between, so the price is the sum over tokens of

        p ( -|1/2 - p| log(1 - e^2)  -  (1 - 2 |1/2 - p|) (g(1 + e) - g(1 - e)) / (2 e) ),      g(x) = x log x - x

    Its supremum over laws is -1/2 log(1 - delta^2), reached as every token becomes rare.

    Args:
        p: law of the next token. [..., V].
        delta: between 0 and 1; at 1 the price is infinite where some token has less than half of the probability.

    Returns:
        nats. [...].

    Raises:
        ValueError: `delta` is not between 0 and 1.
    """
    _check_rotation(delta)
    p = np.asarray(p, dtype=float)
    swing = delta * np.minimum(1, (1 - p) / np.maximum(p, 1e-300))
    stay = np.abs(0.5 - p)
    with np.errstate(divide="ignore", invalid="ignore"):
        staying = np.where(stay > 0, -stay * np.log1p(-np.square(swing)), 0.0)
        moving = -_mean_log_between(swing)
        token = np.where(p > 0, p * (staying + (1 - 2 * stay) * moving), 0.0)
    return token.sum(axis=-1)


def _mean_log_between(swing: np.ndarray) -> np.ndarray:
    """Mean of log x for x uniform on [1 - e, 1 + e]; its series where e is too small for the closed form."""
    high, low = 1 + swing, 1 - swing
    entropy_like = np.where(low > 0, low * np.log(np.maximum(low, 1e-300)), 0.0)
    closed = (high * np.log(high) - entropy_like) / np.maximum(2 * swing, 1e-300) - 1
    return np.where(swing < 1e-3, -np.square(swing) / 6 - swing**4 / 20, closed)


def rare_burst_law(log_p: Tensor, log_p_prefix: Tensor, codeword: Tensor, rate: float) -> Tensor:
    """Next-token law of "with chance `rate` the whole answer is the codeword, else an honest one".

        s(token) = ((1 - rate) p(prefix) p(token) + rate [token is the codeword's]) / ((1 - rate) p(prefix) + rate)

    This holds where the answer so far is the codeword's beginning; anywhere else the law is p.

    Args:
        log_p: log-probability of each next token, nats. [N, V].
        log_p_prefix: honest log-probability of the answer so far, nats. [N].
        codeword: the codeword's next token. [N].
        rate: at least 0, below 1.

    Returns:
        log s, nats. [N, V].

    Raises:
        ValueError: `rate` is out of range.
    """
    _check_share("rate", rate)
    honest = math.log1p(-rate) + log_p_prefix
    log_rate = torch.full_like(honest, math.log(rate) if rate else -math.inf)
    joint = honest[:, None] + log_p
    index = codeword[:, None]
    joint = joint.scatter(1, index, torch.logaddexp(joint.gather(1, index), log_rate[:, None]))
    return joint - torch.logaddexp(honest, log_rate)[:, None]


def rare_burst_price(log_p_codeword: ArrayLike, rate: float) -> np.ndarray:
    """KL(p || s) of a whole answer: -log(1 - rate) - p(codeword) log(1 + rate / ((1 - rate) p(codeword))), nats.

    At most -log(1 - rate), however long the message is: the price is for how often one deviates.
    """
    _check_share("rate", rate)
    log_p = np.asarray(log_p_codeword, dtype=float)
    log_odds = math.log(rate) - math.log1p(-rate) if rate else -math.inf
    return -math.log1p(-rate) - np.exp(log_p) * np.logaddexp(0, log_odds - log_p)


def rejection_log_ratio(is_match: ArrayLike, match_mass: ArrayLike, honest: float, max_draws: int) -> np.ndarray:
    """log s(answer) - log p(answer) of rejection: redraw until the answer's hash is the message, at most R draws.

        s / p = honest + (1 - honest) ( [match] (1 - (1 - M)^R) / M  +  [no match] (1 - M)^(R - 1) )

    A share `honest` of the answers is drawn without looking. If none of the R draws matches, the last one is kept.

    Args:
        is_match: whether the answer's hash is the message. [N].
        match_mass: M, the honest probability of all answers whose hash is the message. [N] or a scalar.
        honest: in [0, 1].
        max_draws: R, at least 1.

    Returns:
        nats, [N]; -inf where `honest` is 0, R is infinite and the hash does not match.

    Raises:
        ValueError: a setting is out of range.

    Source:
        Hopper, Langford and von Ahn, "Provably Secure Steganography" (2002).
    """
    if not 0 <= honest <= 1 or max_draws < 1:
        raise ValueError(f"Need `honest` in [0, 1] and `max_draws` >= 1; got {honest} and {max_draws}.")
    mass = np.asarray(match_mass, dtype=float)
    all_miss = np.power(1 - mass, max_draws)
    hit = np.where(mass > 0, (1 - all_miss) / np.maximum(mass, 1e-300), float(max_draws))
    miss = np.power(1 - mass, max_draws - 1)
    with np.errstate(divide="ignore"):
        return np.log(honest + (1 - honest) * np.where(is_match, hit, miss))


def rejection_price(num_bits: int, honest: float) -> float:
    """KL(p || s) of a whole answer under rejection without limit on draws, the hash exactly balanced, nats:

    -( 2^-k log(e + (1 - e) 2^k) + (1 - 2^-k) log e ),      k = `num_bits`, e = `honest`; infinite at e = 0.
    """
    if num_bits < 1 or not 0 <= honest <= 1:
        raise ValueError(f"Need `num_bits` >= 1 and `honest` in [0, 1]; got {num_bits} and {honest}.")
    match = 2.0**-num_bits
    on_match = match * math.log(honest + (1 - honest) / match)
    return -on_match - (1 - match) * math.log(honest) if honest else math.inf


def message_price(num_messages: int, error: float) -> float:
    """Least price of a message: d(1/N || 1 - error), nats, d the binary KL divergence.

    For a uniform message out of N, laws s_m, any human law p and any decoder that errs at most that often,

        mean over m of KL(p || s_m)  >=  d(1/N || 1 - error)

    since the decoder's verdict on a *human* answer is right with chance 1/N. For N = 2 it is 1/2 log 1/(4 e (1 - e)).

    Args:
        num_messages: N, at least 2.
        error: the decoder's, in [0, 1]; at or above 1 - 1/N (guessing) the price is 0.

    Raises:
        ValueError: an argument is out of range.

    Source:
        The data-processing inequality; Cover and Thomas, "Elements of Information Theory", section 2.8.
    """
    if num_messages < 2 or not 0 <= error <= 1:
        raise ValueError(f"Need `num_messages` >= 2 and `error` in [0, 1]; got {num_messages} and {error}.")
    guess = 1 / num_messages
    if error >= 1 - guess:
        return 0.0
    if error == 0:
        return math.inf
    return guess * math.log(guess / (1 - error)) + (1 - guess) * math.log((1 - guess) / error)


def largest_accuracy(price: float, num_messages: int = 2) -> float:
    """The best accuracy any decoder can have at this price: the a with d(1/N || a) = price, from 1/N to 1.

    Args:
        price: mean over messages of KL(p || s_m), nats, at least 0.
        num_messages: N, at least 2.

    Raises:
        ValueError: an argument is out of range.
    """
    if not price >= 0 or num_messages < 2:
        raise ValueError(f"Need `price` >= 0 and `num_messages` >= 2; got {price} and {num_messages}.")
    least = 1e-300
    if message_price(num_messages, least) <= price:
        return 1.0
    # In the logarithm of the error, so that tiny errors are found as well as large ones.
    log_error = brentq(
        lambda x: message_price(num_messages, math.exp(x)) - price, math.log(least), math.log1p(-1 / num_messages)
    )
    return 1 - math.exp(log_error)


def answers_needed(mean: float, deviation: float, z: float = 3.0) -> int | None:
    """Human answers after which a mean price is z standard errors above 0; `None` if it is not above 0."""
    if not mean > 0:
        return None
    return 1 if math.isinf(mean) else max(1, math.ceil((z * deviation / mean) ** 2))


def _check_delta(delta: float) -> None:
    if not 0 <= delta < math.inf:
        raise ValueError(f"`delta` is {delta}; a green list needs a finite number of nats, at least 0 (honest).")


def _check_rotation(delta: float) -> None:
    if not 0 <= delta <= 1:
        raise ValueError(f"`delta` is {delta}; soft rotation needs a number from 0 (honest) to 1 (half is forbidden).")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` is {value}; need a share in [0, 1).")
