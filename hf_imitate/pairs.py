"""One question, the human's answer and the imitator's: what a distinguisher learns from, and one step of learning."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_imitate.batching import similar_lengths
from hf_imitate.checks import first_weights
from hf_imitate.losses import DISTINGUISHER_LOSSES
from hf_imitate.rendering import Answer

if TYPE_CHECKING:
    from hf_imitate.distinguisher import Distinguisher

BETAS = (0.5, 0.99)  # little momentum: against a moving opponent it pushes towards where the opponent was
# Adam moves a scalar by about its rate per step: at the adapter's rate a check's weight would stand still.
CHECK_LEARNING_RATE = 3e-2


@dataclass(frozen=True)
class Pair:
    """A question with the human's answer and one or more of the imitator's.

    Attributes:
        prompt: the question, as in the data set.
        human: what the human answered.
        imitator: what the imitator answered. K answers.
        weight: weight of the row; shared by its K comparisons.
        human_checks: outcomes of the C checks on the human's answer, NaN where one does not apply.
        imitator_checks: the same for each imitator answer. K tuples of C.
    """

    prompt: str | list
    human: Answer
    imitator: tuple[Answer, ...]
    weight: float = 1.0
    human_checks: tuple[float, ...] = ()
    imitator_checks: tuple[tuple[float, ...], ...] = ()


class Logits(NamedTuple):
    """Logits of one pair, by comparison: K of the human's answer (they differ only where a check does not apply to
    one side and is left out on both), K of the imitator's, and K sums of both without what checks added."""

    human: Tensor
    imitator: Tensor
    text_sum: Tensor


def comparable(on_human: Tensor, on_imitator: Tensor) -> tuple[Tensor, Tensor]:
    """Check outcomes of both sides of some comparisons, NaN on both where a check does not apply to one. [..., C].

    Such a check says nothing about the comparison, so it adds to neither logit.
    """
    applies = ~(on_human.isnan() | on_imitator.isnan())
    return torch.where(applies, on_human, torch.nan), torch.where(applies, on_imitator, torch.nan)


class StepResult(NamedTuple):
    """What one update saw: the mean loss per comparison over all processes in nats, and the logits of every pair of
    this process, both from *before* the update."""

    loss: float
    logits: list[Logits]


class Learner:
    """A distinguisher with its optimizer. One `step` is one update on all the pairs given, however they are split.

    Args:
        distinguisher ([`Distinguisher`]): what learns.
        learning_rate (`float`): of adapter and head; the check weights have a rate of their own.
        loss (`str`): "bradley_terry" or "bce".
        max_rows (`int`): most answers in one forward.
        max_grad_norm (`float`): gradients are clipped to this norm.
        reduce (`Callable[[Tensor], Tensor]`, *optional*): sum over processes. Every process must call `step` equally
            often; one without pairs gives an empty list.
    """

    def __init__(
        self,
        distinguisher: "Distinguisher",
        learning_rate: float,
        loss: str = "bradley_terry",
        max_rows: int = 64,
        max_grad_norm: float = 1.0,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ):
        self.distinguisher, self.loss, self.max_rows, self.max_grad_norm = distinguisher, loss, max_rows, max_grad_norm
        self.reduce = reduce
        groups = distinguisher.parameter_groups(learning_rate)
        # One member's gradient must not shorten the step of another.
        self._clipped_together = [list(group["params"]) for group in groups]
        self.parameters = distinguisher.trainable_parameters()
        if distinguisher.check_names:
            groups.append({"params": [distinguisher.check_weights], "lr": CHECK_LEARNING_RATE})
            self.parameters = [*self.parameters, distinguisher.check_weights]
            self._clipped_together[0].append(distinguisher.check_weights)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS, fused=True)
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, pairs: Sequence[Pair], lr_scale: float = 1.0) -> StepResult:
        """Update on all `pairs` together.

        Args:
            pairs: this process's pairs; none is allowed.
            lr_scale: share of the learning rates.

        Raises:
            FloatingPointError: the loss or its gradient is not finite, on any process; nothing was updated.
        """
        device = self.distinguisher.device
        weight = self._reduced(torch.tensor([float(sum(pair.weight for pair in pairs))], device=device)).item()
        if weight == 0:
            # There is nothing to learn on any process, and momentum alone must not move the distinguisher.
            return StepResult(0.0, self.score(pairs))
        is_first = not self.optimizer.state and not self.distinguisher.check_weights.any()
        logits: dict[int, Logits] = {}
        loss_sum = torch.zeros(1, device=device)
        with self.distinguisher.active():
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            for indices in self._chunks(pairs):
                chunk = [pairs[i] for i in indices]
                seen = self._forward(chunk)
                loss = self._weighted_loss(chunk, seen) / max(weight, 1e-12)
                loss.backward()
                loss_sum += loss.detach()
                for i, pair in zip(indices, seen, strict=True):
                    logits[i] = Logits(*(tensor.detach() for tensor in pair))
            self._reduce_gradients()
            mean_loss = self._reduced(loss_sum).item()
            norms = [torch.nn.utils.clip_grad_norm_(own, self.max_grad_norm) for own in self._clipped_together]
            norm = torch.stack(norms).max()
            # Reduced first, so that all processes raise together and none waits for the others.
            if not (math.isfinite(mean_loss) and torch.isfinite(norm)):
                self.optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(
                    f"The distinguisher's loss is {mean_loss} and its gradient's norm {norm.item()} on {len(pairs)} "
                    "pairs; nothing was updated. Lower `distinguisher_learning_rate`, or train it in fp32."
                )
            for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
                group["lr"] = rate * lr_scale
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.distinguisher.check_names and is_first:
            # Not before: no answer is paid by a weight that it has itself decided.
            self._begin_checks(pairs)
        return StepResult(mean_loss, [logits[i] for i in range(len(pairs))])

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> list[Logits]:
        """Logits of every pair, without learning."""
        logits: dict[int, Logits] = {}
        with self.distinguisher.active():
            for indices in self._chunks(pairs):
                for i, seen in zip(indices, self._forward([pairs[i] for i in indices]), strict=True):
                    logits[i] = seen
        return [logits[i] for i in range(len(pairs))]

    @torch.no_grad()
    def _begin_checks(self, pairs: Sequence[Pair]) -> None:
        """Give the checks the weights that the first pairs speak for; steps of Adam alone would take hundreds."""
        weights = self.distinguisher.check_weights
        alone, totals = torch.zeros(2, len(weights), device=weights.device), torch.zeros(2, device=weights.device)
        for pair in pairs:
            totals += totals.new_tensor([len(pair.imitator), pair.weight])
            if pair.imitator_checks:
                on_imitator = torch.tensor(pair.imitator_checks, device=weights.device)
                on_human = torch.tensor(pair.human_checks, device=weights.device).expand_as(on_imitator)
                more = torch.nan_to_num(on_human - on_imitator, nan=0.0) * pair.weight
                alone += torch.stack([more.clamp(min=0).mean(dim=0), (-more).clamp(min=0).mean(dim=0)])
        # Under the mean weight: a data set whose weights sum to 1 holds no fewer pairs.
        number, weight = self._reduced(totals)
        weights.copy_(first_weights(*(self._reduced(alone) * number / weight)))

    def _chunks(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Indices of pairs of similar length, with at most `max_rows` answers in a chunk."""
        rows = [1 + len(pair.imitator) for pair in pairs]
        # A question is read once for all its answers; four characters are close enough to a token.
        lengths = [
            (len(str(pair.prompt)) + sum(len(answer.text) for answer in (pair.human, *pair.imitator))) // 4
            + len(pair.imitator)
            for pair in pairs
        ]
        return similar_lengths(lengths, self.max_rows, self.distinguisher.forward_cost, rows)

    def _forward(self, pairs: Sequence[Pair]) -> list[Logits]:
        d = self.distinguisher
        prompts = [pair.prompt for pair in pairs for _ in range(1 + len(pair.imitator))]
        answers = [answer for pair in pairs for answer in (pair.human, *pair.imitator)]
        texts = d.text_logits(d.encode(prompts, answers)).split([1 + len(pair.imitator) for pair in pairs])
        result = []
        for pair, text in zip(pairs, texts, strict=True):
            human, imitator = text[:1].expand(len(pair.imitator)), text[1:]
            text_sum = human + imitator
            if pair.imitator_checks:
                on_human = torch.tensor(pair.human_checks, device=text.device).expand(len(pair.imitator), -1)
                on_imitator = torch.tensor(pair.imitator_checks, device=text.device)
                on_human, on_imitator = comparable(on_human, on_imitator)
                human = human + d.check_logits(on_human)
                imitator = imitator + d.check_logits(on_imitator)
            result.append(Logits(human, imitator, text_sum))
        return result

    def _weighted_loss(self, pairs: Sequence[Pair], logits: Sequence[Logits]) -> Tensor:
        compare = DISTINGUISHER_LOSSES[self.loss]
        losses = [pair.weight * compare(*seen).mean() for pair, seen in zip(pairs, logits, strict=True)]
        return torch.stack(losses).sum()

    def _reduced(self, tensor: Tensor) -> Tensor:
        return tensor if self.reduce is None else self.reduce(tensor)

    def _reduce_gradients(self) -> None:
        for parameter in self.parameters:
            if self.reduce is not None:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.reduce(gradient)
