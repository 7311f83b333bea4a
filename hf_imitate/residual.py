"""MATH: the law of an answer that was kept out of K candidates, and unbiased estimates of its probabilities. Nats.

K candidates y_1 .. y_K are drawn from p; one is kept with probability softmax(s(y_1), .., s(y_K)), where s is the
distinguisher's logit, any finite function of question and answer. The answer that is kept has the law

    p_K(y|x) = E over y_2 .. y_K ~ p of   p(y|x) F,     F = K exp(s(y)) / ( exp(s(y)) + sum_j exp(s(y_j)) )  in (0, K]

since each of the K places keeps y with the same probability. So log p(y|x) + log F is the log of an unbiased estimate,
one for each fresh set of K - 1 companions, whatever s is: bounded scores, a calibrated or even a good distinguisher
are needed for nothing here. K = 1 is p itself; as K grows, p_K tends to p exp(s) / Z with Z = E_p exp(s), and where
s = log p_human - log p + c(x), that is the human's law.

Source:
    Deng et al., "Residual energy-based models for text generation", for p exp(s) / Z.
    https://huggingface.co/papers/2004.11714
    Andrieu, Doucet and Holenstein, "Particle Markov chain Monte Carlo methods" (2010), for one kept among K.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_imitate.defensive_bounds import StoppingRule
from hf_imitate.estimators import effective_sample_size, log_mean_weight


class ResampledEstimate(NamedTuple):
    """What E independent estimates say about log p_K of each answer. All [...]."""

    log_prob: Tensor  # nats: log of the mean estimate; exp of it is unbiased
    effective_sample_size: Tensor  # of the estimates, from 1 (one of them holds all the mass) to E
    log_bias: Tensor  # nats: about how far `log_prob` lies below log p_K in the mean, at most 0; NaN if unknown, E = 1


class Resampling(NamedTuple):
    """How much of a choice K candidates leave. All [...]."""

    effective_candidates: Tensor  # from 1 (one candidate is as good as certain) to K (the logits say nothing)
    log_normalizer: Tensor  # nats: log of the mean of exp(s), an estimate of log Z


def resampling_log_factors(logit: Tensor, companion_logits: Tensor) -> Tensor:
    """Log of F = p_K(y) / p(y) as one set of K - 1 companions estimates it.

        log F = log K + log softmax(s(y), s(y_2), .., s(y_K))_1

    Args:
        logit: s(y) of the answer in question. [...].
        companion_logits: s of companions drawn from p, independent of the answer and of each other. [..., K - 1];
            K - 1 may be 0.

    Returns:
        Nats, fp64, in (-inf, log K]. [...]. E exp(log F) = p_K(y) / p(y) exactly.

    Raises:
        ValueError: the shapes do not belong together, or a logit is NaN or infinite.
    """
    if companion_logits.dim() != logit.dim() + 1 or companion_logits.shape[:-1] != logit.shape:
        raise ValueError(
            "`companion_logits` needs one more dimension than `logit`, the companions'; got "
            f"{tuple(companion_logits.shape)} and {tuple(logit.shape)}."
        )
    logits = torch.cat([logit[..., None], companion_logits], dim=-1).double()
    check_logits(logits)
    return math.log(logits.shape[-1]) + torch.log_softmax(logits, dim=-1)[..., 0]


def resampled_log_prob(log_p: Tensor, log_factors: Tensor) -> ResampledEstimate:
    """Estimate log p_K from E independent estimates of F; and of p, where p, too, is only estimated.

        log_prob = log( mean_e  p_e F_e )          log_bias = - var(p_e F_e) / (2 E mean(p_e F_e)^2)

    Means and products of independent unbiased estimates are unbiased, so exp(log_prob) has mean p_K. Its log does not:
    by Jensen it is too low in the mean, by `log_bias` to first order in 1 / E (variance with ddof = 1).

    Args:
        log_p: log p(y), nats. [..., 1]; or the logs of E unbiased estimates of p, independent of each other and of all
            companions. [..., E].
        log_factors: from [`resampling_log_factors`]. [..., E].

    Returns:
        ResampledEstimate. log p + log_factors are the log weights that the lower bounds of
        [`~hf_imitate.retrodictive_bounds`] take.
    """
    log_weights = log_p + log_factors
    num_estimates = log_weights.shape[-1]
    log_prob = log_mean_weight(log_weights)
    if num_estimates == 1:
        bias = torch.full_like(log_prob, torch.nan)
    else:
        deviation = (log_weights - log_prob[..., None]).exp() - 1
        bias = -deviation.square().sum(dim=-1) / (2 * num_estimates * (num_estimates - 1))
    return ResampledEstimate(log_prob, effective_sample_size(log_weights), bias)


def describe_resampling(logits: Tensor) -> Resampling:
    """Effective number of candidates, 1 / sum softmax(s)^2, and the estimate of log Z that they give.

    exp(log_normalizer) is an unbiased estimate of Z = E_p exp(s); its log is too low in the mean. log Z shifts with
    the distinguisher's free constant c(x), so it says something only beside logits: s(y) - log Z is the log of the
    ratio of p exp(s) / Z to p.

    Args:
        logits: s of candidates drawn from p. [..., K].

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    logits = logits.double()
    check_logits(logits)
    return Resampling(effective_sample_size(logits), log_mean_weight(logits))


def two_sided_rule(
    log_p: float, num_candidates: int, epsilon: float = 0.2, confidence: float = 0.95, max_draws: int = 100_000
) -> StoppingRule:
    """The rule that encloses log p_K of one answer to a factor 1 + epsilon, given log p exactly.

    The estimates p F lie in (0, K p] for any logits at all, which is what
    [`~hf_imitate.defensive_bounds.StoppingRule`] asks for. Feed it log p + log F; it takes about
    4 (e - 2) log(2 / delta) K p / (e^2 p_K) of them, e = epsilon / (1 + epsilon), so the more an answer loses against
    its companions, the longer. Where log p is an estimate, nothing bounds it and this rule proves nothing.

    Args:
        log_p: exact, nats.
        num_candidates: K.
        epsilon, confidence, max_draws: as of the rule.

    Raises:
        ValueError: `log_p` is no log-probability, or K is below 1.
    """
    if not -math.inf < log_p <= 0 or num_candidates < 1:
        raise ValueError(
            f"Need a finite `log_p` of at most 0 and `num_candidates` of at least 1; got {log_p} and {num_candidates}."
        )
    return StoppingRule(log_p + math.log(num_candidates), epsilon, confidence, max_draws)


def check_logits(logits: Tensor) -> None:
    """Raise `ValueError` unless all logits are finite."""
    num_bad = int((~logits.isfinite()).sum())
    if num_bad:
        raise ValueError(
            f"{num_bad} of {logits.numel()} logits of the distinguisher are NaN or infinite, so no candidate can be "
            "chosen by them. Load it in float32 and check that its training did not diverge."
        )
