"""MATH: what each trainer minimises or pays, as pure functions. Q questions, G generations each; logits are nats."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CENTERING = 0.01
REWARD_CLIP = 5.0


def bradley_terry_loss(logit_human: Tensor, logit_imitator: Tensor, text_sum: Tensor | None = None) -> Tensor:
    """Loss of telling the human's answer from the imitator's answer to the same question, one value per pair.

        -log sigmoid(s_human - s_imitator) + 0.01 (t_human + t_imitator)^2

    Its optimum is s(x, y) = log p_human(y|x) - log p_imitator(y|x) + c(x). The small second term pins the free
    constant c(x) and leaves the fixed point alone; it shrinks the slope to 1 / 1.08 = .93 near the fixed point, and
    further where the log ratio is large (.86 where it reaches 2). It reads the logits of the texts alone: what a check
    adds is no constant of the question, and where most answers pass, pinning it would hold the check's weight down.

    Args:
        logit_human, logit_imitator: distinguisher logits, high means human. Same shape.
        text_sum: sum of both logits without what checks added, by default the sum of the logits. Same shape.

    Returns:
        Loss per pair, nats. Same shape, at least 0.

    Source:
        Bradley and Terry (1952); for distinguishers of language models https://huggingface.co/papers/2511.10643
    """
    text_sum = logit_human + logit_imitator if text_sum is None else text_sum
    return -F.logsigmoid(logit_human - logit_imitator) + CENTERING * text_sum.square()


def binary_cross_entropy_loss(logit_human: Tensor, logit_imitator: Tensor, text_sum: Tensor | None = None) -> Tensor:
    """Loss of labelling each answer on its own, balanced, one value per pair; its optimum has c(x) = 0.

        -1/2 log sigmoid(s_human) - 1/2 log sigmoid(-s_imitator)

    `text_sum` is not read: there is no free constant to pin.

    Source:
        Goodfellow et al. (2014), https://huggingface.co/papers/1406.2661
    """
    return -0.5 * (F.logsigmoid(logit_human) + F.logsigmoid(-logit_imitator))


DISTINGUISHER_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "bradley_terry": bradley_terry_loss,
    "bce": binary_cross_entropy_loss,
}


def leave_one_out(values: Tensor, keep: Tensor | None = None) -> Tensor:
    """Centre each value by the mean of the *other* kept values of its question.

    With this baseline E[(s_i - mean of the others) grad log pi(y_i)] = -grad KL(pi || p_human) at the distinguisher's
    optimum, with factor 1 (the plain mean gives 1 - 1/G).

    Args:
        values: one value per generation. [Q, G].
        keep: `False` where a generation has left its group. [Q, G].

    Returns:
        Centred values, [Q, G]: each question's kept values sum to 0; those that left, and a group of one, are 0.
    """
    keep = torch.ones_like(values, dtype=torch.bool) if keep is None else keep
    kept = torch.where(keep, values, 0.0)
    num_kept = keep.sum(dim=1, keepdim=True)
    mean_of_others = (kept.sum(dim=1, keepdim=True) - kept) / (num_kept - 1).clamp(min=1)
    return torch.where(keep & (num_kept > 1), values - mean_of_others, 0.0)


def logit_reward(logit_imitator: Tensor, logit_human: Tensor) -> Tensor:
    """The logit itself: an estimate of log p_human - log p_imitator, so its policy gradient is that of reverse KL."""
    return logit_imitator


def pair_reward(logit_imitator: Tensor, logit_human: Tensor) -> Tensor:
    """sigmoid(s_imitator - s_human): the probability of being preferred to the human's answer. Bounded."""
    return torch.sigmoid(logit_imitator - (logit_human[:, None] if logit_human.dim() == 1 else logit_human))


def gail_reward(logit_imitator: Tensor, logit_human: Tensor) -> Tensor:
    """-log(1 - D) = softplus(s). An f-divergence only where c(x) = 0, hence only with the "bce" loss.

    Source:
        Ho and Ermon, https://huggingface.co/papers/1606.03476
    """
    return F.softplus(logit_imitator)


IMITATOR_REWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit": logit_reward,
    "pair": pair_reward,
    "gail": gail_reward,
}


def imitator_reward(
    kind: str, logit_imitator: Tensor, logit_human: Tensor, truncated: Tensor, truncated_answers: str = "score"
) -> Tensor:
    """What the imitator is paid for each answer: centred leave-one-out, clipped at 5 nats, centred again.

    Clipping after centring keeps the fixed point; where it bites, the gradient is no longer exactly that of the KL.

    Args:
        kind: "logit", "pair" or "gail".
        logit_imitator: logits of the generations, taken before this batch's update of the distinguisher. [Q, G].
        logit_human: logits of the human answers; NaN where a question has none. [Q], or [Q, G] where checks that do
            not apply to both sides make them differ by generation.
        truncated: generations cut at the length limit. [Q, G], bool.
        truncated_answers: "score" treats them as any other; "drop" takes them out of their group;
            "penalty" gives them their group's lowest reward before centring.

    Returns:
        Rewards, [Q, G], each question's sum is 0; "drop"ped answers are NaN.
    """
    raw = IMITATOR_REWARDS[kind](logit_imitator, logit_human)
    if truncated_answers == "penalty":
        raw = penalize_truncated(raw, truncated)
    keep = ~truncated if truncated_answers == "drop" else torch.ones_like(truncated)
    clipped = leave_one_out(raw, keep).clamp(-REWARD_CLIP, REWARD_CLIP)
    num_kept = keep.sum(dim=1, keepdim=True).clamp(min=1)
    centred = clipped - clipped.sum(dim=1, keepdim=True) / num_kept
    return torch.where(keep, centred, torch.nan)


def penalize_truncated(rewards: Tensor, truncated: Tensor) -> Tensor:
    """Give each truncated answer the lowest reward of its question's generations. [Q, G]."""
    # NaN is a reward that was not given; it is nobody's lowest.
    lowest = torch.where(rewards.isnan(), torch.inf, rewards).min(dim=1, keepdim=True).values.expand_as(rewards)
    lowest = torch.where(lowest.isinf(), rewards, lowest)
    return torch.where(truncated, lowest, rewards)


def retrodictive_loss(log_prob: Tensor, weight: Tensor) -> Tensor:
    """Minus the weighted mean log-probability of human answers, each summed over its tokens, nats. Scalar.

    The sum matters: a mean over each answer's tokens has its optimum at p_human(answer) / length.

    Args:
        log_prob: log p(answer | question), nats. [B].
        weight: weight of each row. [B].
    """
    return -(weight * log_prob).sum() / weight.sum().clamp(min=torch.finfo(log_prob.dtype).tiny)


def paired_wins(logit_human: Tensor, logit_imitator: Tensor) -> Tensor:
    """1 where the human's answer scores higher, 1/2 where both score the same, else 0; NaN stays NaN. Same shape.

    Logits that differ by less than rounding in batches of different shape can do (1e-6 and 1e-5 of their size) are the
    same: equal texts are a tie wherever they stand.
    """
    is_tie = torch.isclose(logit_human, logit_imitator, rtol=1e-5, atol=1e-6)
    wins = torch.where(is_tie, 0.5, (logit_human > logit_imitator).float())
    return torch.where(logit_human.isnan() | logit_imitator.isnan(), torch.nan, wins)


def updated_multiplier(multiplier: float, violation: float, rate: float = 0.05, limit: float = 100.0) -> float:
    """One step of the Lagrange multiplier that keeps a budget: multiplicative, so it stays positive.

        multiplier * exp(rate * violation), kept within [1 / limit, limit]

    Args:
        multiplier: current weight of the likelihood term.
        violation: nats by which the mean human log-probability lies below what the budget allows; negative if inside.
        rate: step size per nat. One step moves by at most a factor e^(rate * 4).
        limit: largest multiplier, and the inverse of the smallest.
    """
    step = rate * min(max(violation, -4.0), 4.0)
    return min(max(multiplier * math.exp(step), 1 / limit), limit)
