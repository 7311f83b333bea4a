"""Likelihood steps of a separate distinguisher's body on human answers, before it learns to classify."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_imitate.batching import forward_cost, similar_lengths
from hf_imitate.log_probs import answer_log_probs
from hf_imitate.rendering import Answer, Rendered, collate
from hf_imitate.sparing_head import SparingHead

if TYPE_CHECKING:
    from hf_imitate.distinguisher import Distinguisher


class HumanAnswer(NamedTuple):
    """A question, what a human answered, and the weight of the row."""

    prompt: str | list
    answer: Answer
    weight: float = 1.0


class Likelihood(NamedTuple):
    """Weighted nats of some answers, each summed over its tokens, and the sum of their weights, over all processes."""

    nats: float
    weight: float


class BodyLearner:
    """Fits the body of a distinguisher as the language model it came from; the head that classifies stays as it is.

    Both sides of a distinguisher's life read the same token ids: those of [`Distinguisher.encode`]. What learns is
    what of the distinguisher lies in the body, an adapter or all weights; the language model's own head does not,
    unless it is tied to the body's embeddings.

    Args:
        distinguisher ([`Distinguisher`]): with its `language_model`.
        learning_rate (`float`): at a scale of 1.
        max_rows (`int`): most answers in one forward.
        max_grad_norm (`float`): gradients are clipped to this norm.
        reduce (`Callable[[Tensor], Tensor]`, *optional*): sum over processes. Every process must call `step` equally
            often; one without rows gives an empty list.

    Raises:
        ValueError: the distinguisher came without a language model's head, or nothing of its body learns.
    """

    def __init__(
        self,
        distinguisher: "Distinguisher",
        learning_rate: float,
        max_rows: int = 64,
        max_grad_norm: float = 1.0,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ):
        if distinguisher.language_model is None:
            raise ValueError(
                "The distinguisher has no language model's head, so its body cannot be fitted by likelihood. Build it "
                "from a causal LM, `Distinguisher.from_causal_lm(..., keep_language_model=True)`."
            )
        self.distinguisher, self.language_model = distinguisher, distinguisher.language_model
        self.max_rows, self.max_grad_norm, self.reduce = max_rows, max_grad_norm, reduce
        in_body = {id(parameter) for parameter in self.language_model.parameters()}
        self.parameters = [p for p in distinguisher.trainable_parameters() if id(p) in in_body]
        if not self.parameters:
            raise ValueError("No parameter of the distinguisher lies in its body, so likelihood could move nothing.")
        learns = {id(parameter) for parameter in self.parameters}
        for parameter in self.language_model.parameters():
            parameter.requires_grad_(id(parameter) in learns)
        self.learning_rate, self.head = learning_rate, SparingHead.of(self.language_model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=True)

    def step(self, rows: Sequence[HumanAnswer], lr_scale: float = 1.0) -> Likelihood:
        """One update on all `rows` together, down their weighted mean nats per answer.

        Args:
            rows: this process's rows; none is allowed.
            lr_scale: share of the learning rate.

        Returns:
            [`Likelihood`] before the update.

        Raises:
            FloatingPointError: the loss or its gradient is not finite, on any process; nothing was updated.
        """
        device = self.distinguisher.device
        weight = self._sum(torch.tensor([float(sum(row.weight for row in rows))], device=device)).item()
        nats = torch.zeros(1, device=device)
        rendered = self._encode(rows)
        for chunk in self._chunks(rendered):
            part = -(self._log_prob(rendered, chunk) * self._weights(rows, chunk)).sum()
            (part / max(weight, 1e-12)).backward()
            nats += part.detach()
        for parameter in self.parameters if self.reduce is not None else ():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._sum(gradient)
        total = self._sum(nats).item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not (math.isfinite(total) and torch.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"The likelihood of the distinguisher's body is {total} nats on {len(rows)} answers, its gradient's "
                f"norm {norm.item()}; nothing was updated. Lower `imitator_warmup_learning_rate`, or train the "
                "distinguisher in fp32."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Likelihood(total, weight)

    @torch.no_grad()
    def likelihood(self, rows: Sequence[HumanAnswer]) -> Likelihood:
        """What the body thinks of `rows`, this process's share of all that are asked about, without learning."""
        rendered = self._encode(rows)
        sums = torch.zeros(2, device=self.distinguisher.device)
        for chunk in self._chunks(rendered):
            weights = self._weights(rows, chunk)
            sums += torch.stack([-(self._log_prob(rendered, chunk) * weights).sum(), weights.sum()])
        return Likelihood(*self._sum(sums).tolist())

    def _encode(self, rows: Sequence[HumanAnswer]) -> list[Rendered]:
        return self.distinguisher.encode([row.prompt for row in rows], [row.answer for row in rows]) if rows else []

    def _chunks(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        lengths = [len(row.prompt_ids) + len(row.answer_ids) for row in rendered]
        is_padded = not (self.head and self.head.can_share)
        return similar_lengths(lengths, self.max_rows, forward_cost(self.distinguisher.device, is_padded))

    def _log_prob(self, rendered: Sequence[Rendered], chunk: Sequence[int]) -> Tensor:
        """Log p of each answer of the chunk, nats. [len(chunk)]."""
        d = self.distinguisher
        rows, pad = [rendered[i] for i in chunk], d.tokenizer.pad_token_id or 0
        with d.autocast():
            if self.head is not None:
                return self.head.answer_log_probs(self.language_model, rows, pad)
            batch = collate(rows, pad, d.device)
            seen = self.language_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return answer_log_probs(seen.logits, batch.input_ids, batch.answer_mask)

    def _weights(self, rows: Sequence[HumanAnswer], chunk: Sequence[int]) -> Tensor:
        return torch.tensor([rows[i].weight for i in chunk], device=self.distinguisher.device)

    def _sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.reduce is None else self.reduce(tensor)
