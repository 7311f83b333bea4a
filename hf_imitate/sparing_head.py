"""A model's head on the scored tokens alone, a piece of them at a time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_imitate.log_probs import chosen_log_probs
from hf_imitate.rendering import Rendered, collate
from hf_imitate.sampling import generation_mode
from hf_imitate.side_by_side import (
    SideBySide,
    adapts_each_token_alone,
    reads_side_by_side,
    side_by_side,
    split_before_last,
)

MAX_SCORES = 2**25  # of one piece of a head: 128 MiB in fp32


class SparingHead:
    """A model's head, put on the scored tokens alone, a piece of them at a time: no scores [N, T, V] are ever held.

    With a vocabulary of 150 000, those of 64 sequences of 300 tokens would take 12 GB, and several times that with
    their gradients.

    Args:
        causal_lm ([`~transformers.PreTrainedModel`]): the model itself, without a wrapper.
        head ([`~torch.nn.Module`]): makes scores of the last hidden states of its body.

    Attributes:
        can_share: whether the model can read several continuations of a text side by side.
    """

    def __init__(self, causal_lm: Any, head: nn.Module):
        self.causal_lm, self.body, self.head = causal_lm, causal_lm.base_model, head
        self.can_share = reads_side_by_side(causal_lm)

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel | PeftModel) -> "SparingHead | None":
        """The head of a causal LM; `None` where its scores are more than the head's output (Gemma's are capped)."""
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        head = causal_lm.get_output_embeddings()
        if head is None or causal_lm.base_model is causal_lm or not adapts_each_token_alone(model):
            return None
        made = cls(causal_lm, head)
        one = torch.zeros(1, 1, dtype=torch.long, device=causal_lm.device)
        with generation_mode(model), made._watched() as seen:
            scores = model(input_ids=one, use_cache=False).logits
            is_all = bool(seen) and torch.equal(made.head(seen[0]), scores)
        return made if is_all else None

    def last_states(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
        """Last hidden states of one forward through `model`, which may wrap the head's own. [N, T, H]."""
        with self._watched() as seen:
            model(**inputs, logits_to_keep=1)
        return seen[0]

    def map_scores(self, read: Callable[..., Tensor], states: Tensor, *per_token: Tensor) -> Tensor:
        """What `read(scores, *per_token)` makes of the scores of M tokens, piece by piece. [M].

        Args:
            read: scores [m, V] and the rest of a piece to [m].
            states: last hidden states before each token. [M, H].
            per_token: anything else that `read` needs to know of each token. [M] each.
        """

        def of_piece(states: Tensor, *rest: Tensor) -> Tensor:
            return read(self.head(states), *rest)

        size = max(1, MAX_SCORES // self.causal_lm.config.get_text_config().vocab_size)
        pieces = list(zip(*(values.split(size) for values in (states, *per_token)), strict=True))
        if len(pieces) == 1 or not torch.is_grad_enabled():
            return torch.cat([of_piece(*piece) for piece in pieces])
        # The backward makes each piece's scores again.
        kept = [checkpoint(of_piece, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        return torch.cat(kept)

    def answer_log_probs(self, model: Callable[..., Any], rows: Sequence[Rendered], pad_token_id: int) -> Tensor:
        """Log-probability of each row's answer: the sum over its tokens, nats. [B].

        Args:
            model: may wrap the head's own.
            rows: questions and answers. B.
            pad_token_id: fills, and is never read.
        """
        shared = self._laid(rows, pad_token_id)
        if shared is None:
            batch = collate(rows, pad_token_id, self.causal_lm.device)
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            states, is_answer = self.last_states(model, inputs)[:, :-1], batch.answer_mask[:, 1:].bool()
            order = list(range(len(rows)))
        else:
            laid, order = shared
            states = laid.of_continuations(self.last_states(model, laid.inputs(self.causal_lm) | {"use_cache": False}))
            is_answer = laid.is_token()
        targets = torch.tensor([token for i in order for token in rows[i].answer_ids], device=states.device)
        log_p = self.map_scores(chosen_log_probs, states[is_answer], targets)
        sums = log_p.new_zeros(is_answer.shape).masked_scatter(is_answer, log_p).sum(dim=1)
        return sums[torch.tensor(order, device=sums.device).argsort()]

    def _laid(self, rows: Sequence[Rendered], pad_token_id: int) -> tuple[SideBySide, list[int]] | None:
        if not self.can_share or not all(row.prompt_ids and row.answer_ids for row in rows):
            return None
        parts = [split_before_last(row.prompt_ids, row.answer_ids) for row in rows]
        before, after = [part[0] for part in parts], [part[1] for part in parts]
        return side_by_side(self.causal_lm, before, after, pad_token_id)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        seen: list[Tensor] = []

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if getattr(output, "last_hidden_state", None) is not None:
                seen.append(output.last_hidden_state)

        handle = self.body.register_forward_hook(note)
        try:
            yield seen
        finally:
            handle.remove()
