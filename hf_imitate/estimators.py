"""MATH: log p(answer | question) from K weighted thoughts, and the gradient estimators made of the weights. Nats."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_imitate.losses import leave_one_out


class ImportanceEstimate(NamedTuple):
    """What K weighted thoughts say about each answer. All [B]."""

    log_prob: Tensor  # nats per answer: log of the mean weight
    effective_sample_size: Tensor  # from 1 (one thought holds all the weight) to K; 0 where every weight is 0
    largest_weight: Tensor  # share of the weight that the heaviest thought holds, from 1/K to 1; 0 likewise
    elbo_gap: Tensor  # nats: log of the mean weight minus the mean log weight


class Coefficients(NamedTuple):
    """What each log-probability is multiplied by in the loss (with a minus sign). Constants: no gradient flows."""

    thought: Tensor  # [B, K], for log p(thought_k | question)
    answer: Tensor  # [B, K], for log p(answer | question, thought_k)
    retrodictor: Tensor | None  # [B, K], for log q(thought_k | question, answer); None without a retrodictor
    bound: Tensor  # [B], nats: the lower bound that is raised; 0 where the group is skipped
    is_skipped: Tensor  # [B], bool: the weights give no gradient at all; every coefficient is 0
    is_draw_skipped: Tensor  # [B], bool: no finite gradient for the law that drew the thoughts; the rest is kept


class LatentLoss(NamedTuple):
    """The two scalars to run backward through, and what they were made of."""

    imitator: Tensor  # scalar; its value is minus the mean bound, its gradient that of the estimator
    retrodictor: Tensor | None  # scalar; None without a retrodictor
    coefficients: Coefficients
    estimate: ImportanceEstimate


def importance_weighted_log_prob(log_p_joint: Tensor, log_q_thought: Tensor) -> ImportanceEstimate:
    """Estimate log p(answer | question) when the thought behind the answer is unknown.

    K thoughts are drawn from a proposal q that has seen the answer; weighting corrects for that:

        log_prob = log( mean_k  p(answer, thought_k | question) / q(thought_k | question, answer) )

    Args:
        log_p_joint: log p(answer, thought_k | question), summed over tokens, nats. [B, K].
        log_q_thought: log-probability of each thought under the law that really drew it, nats. [B, K].

    Returns:
        ImportanceEstimate. `log_prob` is a lower bound in expectation and tightens as K grows; -inf where every weight
        is 0. Distrust it where `effective_sample_size` is near 1.

    Raises:
        ValueError: the two shapes differ or are not [B, K].

    Source:
        Burda et al., "Importance Weighted Autoencoders", Theorem 1.
        https://huggingface.co/papers/1509.00519
    """
    if log_p_joint.shape != log_q_thought.shape or log_p_joint.dim() != 2:
        raise ValueError(
            "`log_p_joint` and `log_q_thought` must share one shape [B, K] (answers, thoughts per answer); "
            f"got {tuple(log_p_joint.shape)} and {tuple(log_q_thought.shape)}."
        )
    log_weights = log_p_joint - log_q_thought
    return ImportanceEstimate(
        log_mean_weight(log_weights),
        effective_sample_size(log_weights),
        largest_weight(log_weights),
        elbo_gap(log_weights),
    )


def log_mean_weight(log_weights: Tensor) -> Tensor:
    """L_K = log mean_k w_k, nats. `log_weights` [..., K], -inf is a weight of 0 and stays in the mean. [...]."""
    return torch.logsumexp(log_weights, dim=-1) - math.log(log_weights.shape[-1])


def normalized_weights(log_weights: Tensor) -> Tensor:
    """v_k = w_k / sum_j w_j, in [0, 1]. [..., K] to [..., K]; all 0 where every weight is 0."""
    is_positive = log_weights > -torch.inf
    safe = torch.where(is_positive.any(dim=-1, keepdim=True), log_weights, 0.0)
    return torch.where(is_positive, torch.softmax(safe, dim=-1), 0.0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """1 / sum_k v_k^2: from 1 (one thought holds all the weight) to K; 0 where every weight is 0. [..., K] to [...].

    A large value is no proof of a good proposal: thoughts that q never draws leave no trace in the weights.

    Source:
        Kong, "A note on importance sampling using standardized weights" (1992).
    """
    sum_of_squares = normalized_weights(log_weights).square().sum(dim=-1)
    return torch.where(sum_of_squares > 0, 1 / sum_of_squares, 0.0)


def largest_weight(log_weights: Tensor) -> Tensor:
    """max_k v_k: the share of the heaviest thought, from 1/K to 1; 0 where every weight is 0. [..., K] to [...]."""
    return normalized_weights(log_weights).amax(dim=-1)


def elbo_gap(log_weights: Tensor) -> Tensor:
    """L_K - mean_k log w_k, nats: what averaging weights gains over averaging their logs; >= 0. [..., K] to [...].

    Its mean at large K is KL(q || posterior). Infinite where some weights are 0, NaN where all are.
    """
    return log_mean_weight(log_weights) - log_weights.mean(dim=-1)


def rws_coefficients(log_weights: Tensor, baseline: float = 0.0) -> Coefficients:
    """Reweighted wake-sleep: both laws follow the normalised weights v_k.

    The imitator's gradient is exactly that of E L_K, provided q shares no trained parameter with it. The
    retrodictor's descends KL(posterior || q), biased at finite K, and needs no score-function baseline.

    Args:
        log_weights: log p(thought_k, answer) - log q(thought_k), nats. [B, K].
        baseline: not used here.

    Raises:
        ValueError: K = 1; the single v is always 1, so the retrodictor would learn nothing.

    Source:
        Bornschein and Bengio, https://huggingface.co/papers/1406.2751
    """
    _need_two_thoughts("rws", log_weights)
    v = normalized_weights(log_weights)
    is_skipped = v.sum(dim=-1) == 0
    return Coefficients(v, v, v, _finite(log_mean_weight(log_weights)), is_skipped, torch.zeros_like(is_skipped))


def ovis_coefficients(log_weights: Tensor, baseline: float = 0.0) -> Coefficients:
    """Both laws ascend E L_K; the retrodictor by the score function with an optimal leave-one-out control variate.

        retrodictor:  c_k = -log(1 - v_k) - v_k  =  (log sum_j w_j - log sum_{j != k} w_j) - v_k

    Unbiased (gamma = 0). The right-hand form is computed: 1 - v_k loses everything once v_k rounds to 1. Where exactly
    one weight is positive c_k is infinite; the retrodictor then skips the group and the imitator keeps it.

    Args:
        log_weights: as in [`rws_coefficients`]. [B, K].
        baseline: not used here.

    Raises:
        ValueError: K = 1; there is no other thought to leave one out of.

    Source:
        Liévin et al., "Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted
        Bounds". https://huggingface.co/papers/2008.01998
    """
    _need_two_thoughts("ovis", log_weights)
    v = normalized_weights(log_weights)
    num_positive = (log_weights > -torch.inf).sum(dim=-1)
    shifted = _shifted(log_weights)
    gain = torch.logsumexp(shifted, dim=-1, keepdim=True) - _log_sum_of_others(shifted)
    retrodictor = torch.where(num_positive[..., None] > 1, gain - v, 0.0)
    return Coefficients(v, v, retrodictor, _finite(log_mean_weight(log_weights)), num_positive == 0, num_positive == 1)


def elbo_coefficients(log_weights: Tensor, baseline: float = 0.0) -> Coefficients:
    """Both laws ascend E log w, the evidence lower bound; the retrodictor by REINFORCE, leave-one-out (RLOO).

        retrodictor:  (log w_k - mean_{j != k} log w_j) / K          imitator:  1 / K

    One weight of 0 makes the bound -inf and leaves no gradient: the group is skipped.

    Args:
        log_weights: as in [`rws_coefficients`]. [B, K], K >= 1.
        baseline: subtracted from log w at K = 1, where there is no other thought; for instance a running mean of
            *earlier* batches. Without one the gradient is unbiased, too, and noisy.

    Source:
        Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019).
    """
    num_thoughts = log_weights.shape[-1]
    is_skipped = (log_weights == -torch.inf).any(dim=-1)
    safe = torch.where(is_skipped[..., None], 0.0, log_weights)
    imitator = torch.where(is_skipped[..., None], 0.0, torch.full_like(safe, 1 / num_thoughts))
    centred = leave_one_out(safe) if num_thoughts > 1 else safe - baseline
    retrodictor = torch.where(is_skipped[..., None], 0.0, centred / num_thoughts)
    return Coefficients(imitator, imitator, retrodictor, safe.mean(dim=-1), is_skipped, torch.zeros_like(is_skipped))


def prior_coefficients(log_weights: Tensor, baseline: float = 0.0) -> Coefficients:
    """The imitator thinks without having seen the answer: q is its own p(thought | question), no retrodictor.

        thought:  L_K - L_{-k},  L_{-k} = log mean_{j != k} w_j          answer:  v_k

    Together exactly the gradient of E L_K; here w_k = p(answer | question, thought_k). Where exactly one weight is
    positive L_{-k} is -inf: the thought's part is skipped, the answer's kept.

    Args:
        log_weights: log p(answer | question, thought_k), nats. [B, K], K >= 1.
        baseline: stands for L_{-k} at K = 1.

    Source:
        Tang et al., "Beyond Verifiable Rewards", https://huggingface.co/papers/2503.19618
    """
    v = normalized_weights(log_weights)
    num_thoughts = log_weights.shape[-1]
    num_positive = (log_weights > -torch.inf).sum(dim=-1)
    is_skipped = num_positive == 0
    if num_thoughts == 1:
        thought, is_draw_skipped = _finite(log_weights - baseline), torch.zeros_like(is_skipped)
    else:
        shifted = _shifted(log_weights)
        log_mean_of_others = _log_sum_of_others(shifted) - math.log(num_thoughts - 1)
        is_draw_skipped = num_positive == 1
        thought = log_mean_weight(shifted)[..., None] - log_mean_of_others
        thought = torch.where(num_positive[..., None] > 1, thought, 0.0)
    return Coefficients(thought, v, None, _finite(log_mean_weight(log_weights)), is_skipped, is_draw_skipped)


ESTIMATORS: dict[str, Callable[[Tensor, float], Coefficients]] = {
    "rws": rws_coefficients,
    "ovis": ovis_coefficients,
    "elbo": elbo_coefficients,
    "prior": prior_coefficients,
}


def latent_loss(
    estimator: str,
    log_p_thought: Tensor,
    log_p_answer: Tensor,
    log_q_thought: Tensor | None,
    weight: Tensor | None = None,
    normalizer: float | None = None,
    baseline: float = 0.0,
) -> LatentLoss:
    """The losses of one batch of answers with K thoughts each: weighted means over answers, skipped groups counting 0.

    The weights are constants: gradients reach the imitator through `log_p_*` alone and the retrodictor through
    `log_q_thought` alone. Where the retrodictor's forward comes later, pass the recorded `log_q_thought` here and call
    [`retrodictor_loss`] with the returned coefficients.

    Args:
        estimator: "rws", "ovis", "elbo" or "prior".
        log_p_thought: log p(thought_k | question), summed over tokens, nats. [B, K].
        log_p_answer: log p(answer | question, thought_k), likewise, end token included. [B, K].
        log_q_thought: log-probability of each thought under the law that really drew it. [B, K]; None for "prior".
        weight: weight of each answer. [B]; defaults to ones.
        normalizer: what the sums are divided by; defaults to this batch's sum of weights. Give the sum over all
            batches of one optimiser step where gradients are accumulated.
        baseline: for "elbo" and "prior" at K = 1.

    Raises:
        ValueError: unknown estimator, shapes that differ, a NaN or infinite weight, K = 1 for "rws" and "ovis", a
            proposal for "prior", or none for the others.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` is {estimator!r}; use one of {sorted(ESTIMATORS)}.")
    if (log_q_thought is None) != (estimator == "prior"):
        raise ValueError(
            f"`estimator` is {estimator!r} and `log_q_thought` is {'missing' if log_q_thought is None else 'given'}; "
            "'prior' draws thoughts from the imitator and takes None, the others need the retrodictor's [B, K]."
        )
    # Drawn by the imitator, a thought has the same probability in numerator and denominator.
    log_q = (log_p_thought if log_q_thought is None else log_q_thought).detach()
    log_p_joint = (log_p_thought + log_p_answer).detach()
    estimate = importance_weighted_log_prob(log_p_joint, log_q)
    log_weights = log_p_answer.detach() if log_q_thought is None else log_p_joint - log_q
    is_bad = ~(log_weights < torch.inf).all(dim=-1)
    if is_bad.any():
        raise ValueError(
            f"{int(is_bad.sum())} answers of this batch have a weight that is NaN or infinite, the first is number "
            f"{int(is_bad.nonzero()[0])}: a log-probability is NaN, or q gave 0 to a thought that was drawn. Record "
            "log q from the very logits that were sampled, in fp32, and check the model for NaN."
        )
    coefficients = ESTIMATORS[estimator](log_weights, baseline)
    surrogate = _weighted_mean(
        _dot(coefficients.thought, log_p_thought) + _dot(coefficients.answer, log_p_answer), weight, normalizer
    )
    bound = _weighted_mean(coefficients.bound, weight, normalizer)
    retrodictor = None if log_q_thought is None else retrodictor_loss(coefficients, log_q_thought, weight, normalizer)
    # The surrogate's own value means nothing to a reader of the loss curve; the bound's does.
    return LatentLoss(surrogate.detach() - surrogate - bound, retrodictor, coefficients, estimate)


def retrodictor_loss(
    coefficients: Coefficients, log_q_thought: Tensor, weight: Tensor | None = None, normalizer: float | None = None
) -> Tensor:
    """Minus the weighted mean over answers of sum_k c_k log q(thought_k | question, answer). Scalar.

    For "rws" its value is a cross-entropy in nats; for the others only its gradient means something.

    Args:
        coefficients: from [`latent_loss`].
        log_q_thought: log q of each thought, with the retrodictor's gradient, nats. [B, K].
        weight, normalizer: as in [`latent_loss`].

    Raises:
        ValueError: the coefficients are those of "prior", which has no retrodictor.
    """
    if coefficients.retrodictor is None:
        raise ValueError("The estimator 'prior' has no retrodictor to train; use 'rws', 'ovis' or 'elbo'.")
    return -_weighted_mean(_dot(coefficients.retrodictor, log_q_thought), weight, normalizer)


def _need_two_thoughts(estimator: str, log_weights: Tensor) -> None:
    if log_weights.shape[-1] < 2:
        raise ValueError(
            f"`num_thoughts` is {log_weights.shape[-1]}; the estimator {estimator!r} compares thoughts and needs at "
            "least 2. Set `num_thoughts=8`, or use `estimator='elbo'`."
        )


def _shifted(log_weights: Tensor) -> Tensor:
    """Log weights with the largest at 0, so that fp32 differences of their log-sums keep their digits."""
    largest = log_weights.amax(dim=-1, keepdim=True)
    return log_weights - torch.where(largest == -torch.inf, 0.0, largest)


def _log_sum_of_others(log_weights: Tensor) -> Tensor:
    """log sum_{j != k} w_j for every k. [..., K] to [..., K]."""
    is_self = torch.eye(log_weights.shape[-1], dtype=torch.bool, device=log_weights.device)
    return torch.logsumexp(log_weights[..., None, :].masked_fill(is_self, -torch.inf), dim=-1)


def _finite(values: Tensor) -> Tensor:
    return torch.where(values == -torch.inf, 0.0, values)


def _dot(coefficient: Tensor, log_prob: Tensor) -> Tensor:
    """sum_k c_k l_k, [B], where a coefficient of 0 silences a log-probability of -inf."""
    return (coefficient * torch.where(coefficient == 0, 0.0, log_prob)).sum(dim=-1)


def _weighted_mean(values: Tensor, weight: Tensor | None, normalizer: float | None) -> Tensor:
    weight = torch.ones_like(values) if weight is None else weight
    total = weight.sum().clamp(min=torch.finfo(values.dtype).tiny) if normalizer is None else normalizer
    return (weight * values).sum() / total
