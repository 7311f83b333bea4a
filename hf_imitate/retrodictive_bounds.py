"""MATH: certified statements about log p(answer | question) from weighted thoughts, with their assumptions. Nats.

Common to all: a weight is p(thought, answer | question) / q(thought), where q is the law that really drew the thought,
and W, the mean of K weights, has mean at most p. **Every draw is used**: a truncated, invalid or NaN draw counts as
weight 0, never as no draw. Both models, K, the order of the answers and the rule for seeds are fixed before the draw.
Log-probabilities are sums over tokens, never means, with the end token; weights are never smoothed. "Certified" means
up to floating point.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_imitate.bounds import Interval


class NoCertificateError(ValueError):
    """No certified statement of the wanted kind exists for this input; the message says why and what does exist."""


class EProcess(NamedTuple):
    """Evidence against "these answers came from imitator B", growing answer by answer."""

    log_e_values: np.ndarray  # [N], nats; log of the product so far
    rejected_at: int | None  # number of answers after which the hypothesis was rejected first; None: never
    error: float  # probability of ever rejecting a true hypothesis, at most


def log_mean_of_weights(log_weights: ArrayLike) -> np.ndarray:
    """log of the mean weight, nats; NaN counts as weight 0 and stays in the mean. [..., K] to [...]."""
    log_w = np.asarray(log_weights, dtype=np.float64)
    log_w = np.where(np.isnan(log_w), -np.inf, log_w)
    return np.logaddexp.reduce(log_w, axis=-1) - math.log(log_w.shape[-1])


def log_prob_lower_bound(log_weights: ArrayLike, confidence: float = 0.95, peeking: bool = False) -> np.ndarray:
    """Lower-bound log p of one answer: log W - log(1 / delta), by Markov's inequality (T1).

    Assumes the module's common conditions and nothing else: no bounded weights, no support, no independence. It holds
    for each answer on its own; for N at once use `confidence_of_each`, or bound their mean by
    [`mean_log_prob_lower_bound`], which is far tighter.

    Args:
        log_weights: log weights, nats. [..., K].
        confidence: 1 - delta.
        peeking: use the best of the means of the first 1, 2, .. K weights. Allowed only if the draws are exchangeable
            under one fixed q (not resampled, not adapted); the peeked value may not enter a product over answers.

    Returns:
        Nats, at most 0; -inf where every weight is 0. [...].

    Source:
        Gogate, Bidyuk and Dechter, "Studies in Lower Bounding Probabilities of Evidence using the
        Markov Inequality".
        https://huggingface.co/papers/1206.5242
    """
    delta = _delta(confidence)
    log_w = np.asarray(log_weights, dtype=np.float64)
    if not peeking:
        return np.minimum(log_mean_of_weights(log_w) - math.log(1 / delta), 0.0)
    log_w = np.where(np.isnan(log_w), -np.inf, log_w)
    running = np.logaddexp.accumulate(log_w, axis=-1) - np.log(np.arange(1, log_w.shape[-1] + 1))
    return np.minimum(running.max(axis=-1) - math.log(1 / delta), 0.0)


def mean_log_prob_lower_bound(
    log_estimates: ArrayLike, confidence: float = 0.95, num_runs: int = 1, weight: ArrayLike | None = None
) -> np.ndarray:
    """Lower-bound the mean log p of the test answers, after each answer, all at once, by Ville's inequality (T2).

        mean_{i <= t} log p_i  >=  mean_{i <= t} log W_i - log(R / delta) / t     for all t, with probability 1 - delta

    Assumes the common conditions: W_i comes from fresh randomness with E[W_i | past] <= p_i, and K_i is not chosen
    while looking at the i-th weights. Neither bounded weights nor independent answers are needed. It speaks of these
    answers, not of a population.

    Args:
        log_estimates: log W_i, nats. [N]. NaN counts as 0.
        confidence: 1 - delta.
        num_runs: R, if this run is the best of R (seeds, checkpoints, proposals) that were looked at. Averaging W over
            runs costs nothing instead.
        weight: of each answer, >= 0, fixed before the draws; the mean is then weighted. [N]. Weights divided by their
            largest are exponents in the product, which stays a supermartingale since they are at most 1.

    Returns:
        Nats, at most 0. [N]; the last entry is the test set's.
    """
    if num_runs < 1:
        raise ValueError(f"`num_runs` is {num_runs}; count every run that was looked at, at least 1.")
    log_w = _as_vector("log_estimates", log_estimates)
    log_w = np.where(np.isnan(log_w), -np.inf, log_w)
    share = np.ones_like(log_w) if weight is None else _as_vector("weight", weight)
    if share.shape != log_w.shape or not (share >= 0).all() or not share[0] > 0:
        raise ValueError("`weight` needs one number >= 0 per answer, the first of them positive.")
    share = share / share.max()
    total = np.cumsum(np.where(share > 0, share * np.where(share > 0, log_w, 0.0), 0.0))
    return np.minimum((total - math.log(num_runs / _delta(confidence))) / np.cumsum(share), 0.0)


def mean_log_prob_upper_bound(
    log_weight_posterior: ArrayLike,
    log_weights: ArrayLike,
    posterior_sample: str | None,
    answers_from: str,
    confidence: float = 0.95,
) -> np.ndarray:
    """Upper-bound the mean log p of answers for which one thought was drawn from the exact posterior (T4).

        U_i = log( (w(z*) + w(z_2) + .. + w(z_K)) / K )      mean log p  <=  mean U + log(1 / delta) / t, for all t

    Assumes, for each answer, z* drawn from p(thought | question, answer) *exactly*, its K - 1 companions independent
    of z* and of each other, all from the one q of the weights. A z* that q cannot draw has weight +inf and makes the
    bound +inf; to redraw it instead breaks the guarantee. Not for stratified proposals with z* in a fixed stratum.

    Where an exact posterior sample comes from: "simulated" (the model wrote thought, then answer: its own answers
    only), "enumerated" (every thought can be listed) or "rejection" (thoughts from the prior, accepted with
    probability p(answer | thought) / c, about c / p(answer) trials).

    Args:
        log_weight_posterior: log weight of z*, nats. [N], +inf where q gives it 0.
        log_weights: log weights of the companions. [N, K - 1]; K - 1 may be 0.
        posterior_sample: "simulated", "enumerated", "rejection", or None if there is none.
        answers_from: "model" or "human".
        confidence: 1 - delta.

    Returns:
        Nats, at most 0. [N]: entry t bounds the mean over the first t answers, all at once. For one answer take N = 1.

    Raises:
        NoCertificateError: a human's answer without an exact posterior sample.
        ValueError: an unknown name, or shapes that differ.

    Source:
        Grosse, Ghahramani and Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo".
        https://huggingface.co/papers/1511.02543
    """
    _need_posterior_sample(posterior_sample, answers_from)
    log_star = _as_vector("log_weight_posterior", log_weight_posterior)
    log_w = np.asarray(log_weights, dtype=np.float64)
    if log_w.ndim != 2 or len(log_w) != len(log_star):
        raise ValueError(f"`log_weights` has shape {log_w.shape}; need [N, K - 1] with N = {len(log_star)}.")
    joined = np.concatenate([log_star[:, None], log_w], axis=1)
    # Here 0 would flatter the bound: an invalid draw may have any weight.
    joined = np.where(np.isnan(joined), np.inf, joined)
    upper = np.logaddexp.reduce(joined, axis=1) - math.log(joined.shape[1])
    num_answers = np.arange(1, len(upper) + 1)
    return np.minimum((np.cumsum(upper) + math.log(1 / _delta(confidence))) / num_answers, 0.0)


def _need_posterior_sample(posterior_sample: str | None, answers_from: str) -> None:
    if answers_from not in ("model", "human"):
        raise ValueError(f"`answers_from` is {answers_from!r}; use 'model' or 'human'.")
    if posterior_sample not in ("simulated", "enumerated", "rejection", None):
        raise ValueError(
            f"`posterior_sample` is {posterior_sample!r}; use 'simulated', 'enumerated', 'rejection' or None."
        )
    if posterior_sample is None or (posterior_sample == "simulated" and answers_from == "human"):
        raise NoCertificateError(
            "An upper bound on log p of these answers needs, for each, a thought drawn from the exact posterior "
            "p(thought | question, answer). A model that writes a thought and then an answer gives one for its own "
            "answer only, and weighted thoughts only ever bound from below: a thought that was never drawn may hold "
            "all the probability. For a human's answer use `enclose_log_prob` (few or short thoughts), `StoppingRule` "
            "with a defensive mixture (answers of probability above about 1e-3) or counting; under long thoughts "
            "report the lower bound alone."
        )


def factor_interval(log_estimate: float, epsilon: float) -> Interval:
    """Interval of log p if estimate / (1 + epsilon) <= p <= estimate * (1 + epsilon). Nats, `high` at most 0.

    It holds with whatever probability the factor statement holds. |estimate - p| <= epsilon p is another, weaker
    statement (log p can then be lower by log(1 / (1 - epsilon))) and may not be passed here.
    """
    if not epsilon >= 0:
        raise ValueError(f"`epsilon` is {epsilon}; it must be at least 0 (0: exact).")
    return Interval(log_estimate - math.log1p(epsilon), min(log_estimate + math.log1p(epsilon), 0.0))


def counting_interval(count: int, num_outcomes: int, epsilon: float = 0.0) -> Interval:
    """Interval of log p = log(count / num_outcomes) for a sampler circuit or a constraint system (T7). Nats.

    A circuit on m random bits: `count` settings of the bits that give the answer, of 2^m. A constraint system: 1 of
    its number of solutions. Exact counters have `epsilon` 0; an (epsilon, delta) counter errs by at most the factor
    1 + epsilon with probability 1 - delta, and the interval holds as often. For N answers run it at delta / N each. If
    both numbers are approximate, epsilon = (1 + epsilon_1)(1 + epsilon_2) - 1.

    Args:
        count: models of the answer, of any size. 0 gives -inf at both ends. An estimate above `num_outcomes` says no
            more than one of `num_outcomes` does, since p is at most 1.
        num_outcomes: what it is out of, of any size.
        epsilon: as above.

    Raises:
        ValueError: a negative number, nothing to count from, or an exact count above `num_outcomes`.
    """
    if count < 0 or num_outcomes <= 0 or (epsilon == 0 and count > num_outcomes):
        raise ValueError(f"Need 0 <= `count` <= `num_outcomes` and `num_outcomes` > 0; got {count} of {num_outcomes}.")
    return factor_interval(min(log_of_ratio(count, num_outcomes), 0.0), epsilon)


def log_of_ratio(numerator: int, denominator: int) -> float:
    """log(numerator / denominator) of nonnegative integers of any size, in nats; -inf if the numerator is 0.

    Neither is rounded first: the quotient may lie far outside the range of floats, or so near 1 that only the
    difference of the integers tells it from 1.
    """
    if numerator == 0:
        return -math.inf
    shift = numerator.bit_length() - denominator.bit_length()
    if abs(shift) <= 1:
        return math.log1p((numerator - denominator) / denominator)
    if shift > 0:
        denominator <<= shift
    else:
        numerator <<= -shift
    return math.log1p((numerator - denominator) / denominator) + shift * math.log(2)


def confidence_of_each(confidence: float, num_answers: int) -> float:
    """Confidence at which each of N statements must hold so that all do at `confidence` (Bonferroni)."""
    return 1 - _delta(confidence) / num_answers


def e_process_against(
    log_estimates: ArrayLike,
    log_prob_upper: ArrayLike,
    hypothesis: str,
    denominator: str,
    confidence: float = 0.95,
    upper_error: float = 0.0,
) -> EProcess:
    """Evidence that answers do *not* come from imitator B: the product of W_A(y_i) / pbar_B(y_i) (T8).

    H0: each answer (with its end), given its question and the past, is drawn from p_B. Then the product has mean at
    most 1 whatever A is, and reaches 1 / delta with probability at most delta, ever (Ville).

    Assumes A chosen without y_i (trained on earlier answers only); E[W_A] <= p_A(y_i); pbar_B >= p_B of the *object of
    H0*, jointly with probability 1 - `upper_error`. For strings that is the sum over all tokenisations or an upper
    bound of it: the canonical tokenisation alone is too small and rejects true hypotheses. For token ids the ids must
    be the raw data, not a re-encoding. If B is cut at a length, its missing mass belongs to the outcome "no answer".
    A 0 / 0 counts as 0.

    Args:
        log_estimates: log W_A(y_i), nats; NaN counts as 0. [N].
        log_prob_upper: log pbar_B(y_i), nats. [N].
        hypothesis: what H0 speaks of, "string" or "token_ids".
        denominator: what `log_prob_upper` bounds, "string" or "token_ids" (of the recorded or canonical ids).
        confidence: 1 - delta.
        upper_error: delta', probability that some pbar_B is below p_B.

    Raises:
        NoCertificateError: H0 speaks of strings and the denominator of token ids.
        ValueError: an unknown name, lengths that differ, or an error outside [0, 1).
    """
    if {hypothesis, denominator} - {"string", "token_ids"}:
        raise ValueError(
            f"`hypothesis` and `denominator` are 'string' or 'token_ids'; got {hypothesis!r} and {denominator!r}."
        )
    if hypothesis == "string" and denominator == "token_ids":
        raise NoCertificateError(
            "B's probability of one tokenisation is below its probability of the string, so the product can grow "
            "under a true hypothesis. Pass an upper bound of the sum over tokenisations, or test recorded token ids."
        )
    log_w, log_upper = _as_vector("log_estimates", log_estimates), _as_vector("log_prob_upper", log_prob_upper)
    if log_w.shape != log_upper.shape or not 0 <= upper_error < 1:
        raise ValueError(
            f"Need one upper bound per estimate and 0 <= `upper_error` < 1; got {len(log_w)} estimates, "
            f"{len(log_upper)} bounds, {upper_error}."
        )
    delta = _delta(confidence)
    with np.errstate(invalid="ignore"):
        step = log_w - log_upper
        log_e_values = np.cumsum(np.where(np.isnan(step), -np.inf, step))
    is_over = log_e_values >= math.log(1 / delta)
    return EProcess(log_e_values, int(is_over.argmax()) + 1 if is_over.any() else None, delta + upper_error)


def _as_vector(name: str, values: ArrayLike) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"`{name}` has shape {vector.shape}; need one number per answer, [N], N >= 1.")
    return vector


def _delta(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie strictly between 0 and 1; got {confidence}.")
    return 1 - confidence
