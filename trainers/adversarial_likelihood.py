"""The likelihood side of an adversarial run: which human answers come when, what they cost, what budget they keep."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor, nn

from hf_imitate.batching import forward_cost, similar_lengths
from hf_imitate.human_rows import HumanRow, HumanRows
from hf_imitate.log_probs import nats_to_bits
from hf_imitate.losses import retrodictive_loss, updated_multiplier
from hf_imitate.rendering import Rendered, collate
from hf_imitate.sparing_head import SparingHead

BUDGET_ROWS = 4096
BUDGET_DECAY = 0.95


class HumanLikelihood:
    """Scores the imitator by the log-probability it gives to human answers, each summed over its tokens.

    Args:
        human_rows ([`HumanRows`]): the answers.
        pad_token_id (`int`): pads, never scored.
        batch_size (`int`): rows in one forward.
        coefficient (`float`, *optional*), budget (`float`, *optional*): as in [`AdversarialConfig`].
        head ([`SparingHead`], *optional*): of the imitator; without one, TRL's fused head is asked.
        accelerator ([`~accelerate.Accelerator`]): knows the processes.
        record (`Callable`): takes a metric's name, sum and count.
    """

    def __init__(
        self,
        human_rows: HumanRows,
        pad_token_id: int,
        batch_size: int,
        coefficient: float | None,
        budget: float | None,
        head: SparingHead | None,
        accelerator: Accelerator,
        record: Callable[[str, float, float], None],
    ):
        self.rows, self.pad_token_id, self.batch_size, self.budget = human_rows, pad_token_id, batch_size, budget
        self.head, self.accelerator, self.record = head, accelerator, record
        self.multiplier = 1.0 if coefficient is None else coefficient
        weights = [human_rows.rows[i].weight for i in human_rows.train.tolist()]
        self.mean_weight = max(sum(weights) / len(weights), torch.finfo(torch.float32).tiny)
        self.nats_at_start = self.nats_now = math.nan  # until the budget is opened
        self._nats_of_step: list[float] = []

    def draw(self, step: int) -> list[HumanRow]:
        """The training rows of micro-step `step` on this process."""
        number = step * self.accelerator.num_processes + self.accelerator.process_index
        return self.rows.batch(self.rows.draw(number, self.batch_size))

    def loss(self, model: nn.Module, rows: Sequence[HumanRow]) -> Tensor:
        """Nats per human answer, weighted, under the mean weight of all training rows. Scalar, with gradient.

        A normaliser that is the same for every batch makes the sum over batches independent of how rows are split.
        Bits per answer and per byte are recorded, over all processes.
        """
        sums, loss = torch.zeros(3, device=self.accelerator.device), torch.zeros((), device=self.accelerator.device)
        if rows:
            log_prob, weight = self._log_prob(model, rows)
            num_bytes = weight * weight.new_tensor([row.num_bytes for row in rows])
            sums = torch.stack([-(weight * log_prob.detach()).sum(), weight.sum(), num_bytes.sum()])
            loss = retrodictive_loss(log_prob, weight) * weight.sum() / (len(rows) * self.mean_weight)
        else:
            self._keep_up(model)
        # A process without rows takes part, too: the others wait for it.
        nats, count, num_bytes = gather(sums[None]).sum(dim=0).tolist()
        self.record("retrodiction/bits_per_answer", nats_to_bits(nats), count)
        self.record("retrodiction/bits_per_byte", nats_to_bits(nats), num_bytes)
        return loss

    @torch.no_grad()
    def mean_nats(self, model: nn.Module, ids: Sequence[int]) -> float:
        """Mean nats per human answer over the rows `ids`, each process reading its share."""
        mine = self.rows.batch(ids[self.accelerator.process_index :: self.accelerator.num_processes])
        sums = torch.zeros(2, device=self.accelerator.device)
        most = -(-len(ids) // self.accelerator.num_processes)
        for start in range(0, most, self.batch_size):
            rows = mine[start : start + self.batch_size]
            if not rows:
                self._keep_up(model)
                continue
            with self.accelerator.autocast():
                log_prob, weight = self._log_prob(model, rows)
            sums += torch.stack([-(weight * log_prob).sum(), weight.sum()])
        nats, count = gather(sums[None]).sum(dim=0).tolist()
        return nats / count

    def heldout_nats(self, model: nn.Module, ids: Sequence[int]) -> float:
        """Mean nats over held-out rows, recorded as bits."""
        nats = self.mean_nats(model, ids)
        self.record("retrodiction/bits_per_answer_heldout", nats_to_bits(nats), 1)
        return nats

    def open_budget(self, model: nn.Module) -> None:
        """Fix what the budget is counted from: the mean nats before the game's first step."""
        if self.budget is not None and math.isnan(self.nats_at_start):
            ids = self.rows.draw(0, min(BUDGET_ROWS, len(self.rows.train)), stream=4)
            self.nats_at_start = self.nats_now = self.mean_nats(model, ids)

    def keep_budget(self, nats: float) -> None:
        """Take in that a batch of the game cost `nats` per answer; after a step's last batch, move the multiplier."""
        if self.budget is None:
            return
        self._nats_of_step.append(nats)
        if not self.accelerator.sync_gradients:
            return
        mean = sum(self._nats_of_step) / len(self._nats_of_step)
        self._nats_of_step.clear()
        mean = gather(torch.tensor([mean], device=self.accelerator.device)).mean().item()
        self.nats_now = BUDGET_DECAY * self.nats_now + (1 - BUDGET_DECAY) * mean
        self.multiplier = updated_multiplier(self.multiplier, self.nats_now - self.nats_at_start - self.budget)
        self.record("retrodiction/multiplier", self.multiplier, 1)

    @torch.no_grad()
    def _keep_up(self, model: nn.Module) -> None:
        """A forward for nothing where another process has rows: shards of weights come together in all at once."""
        if self.accelerator.num_processes > 1:
            self._log_prob(model, self.rows.batch(self.rows.train[:1].tolist()))

    def _log_prob(self, model: nn.Module, rows: Sequence[HumanRow]) -> tuple[Tensor, Tensor]:
        """Log p of each row's answer, nats, and the rows' weights. [B], [B]."""
        rendered = [row.rendered for row in rows]
        # Several processes wait for each other in every forward, so they must agree on how many there are.
        is_padded = self.accelerator.num_processes == 1 and not (self.head and self.head.can_share)
        per_forward = forward_cost(self.accelerator.device, is_padded)
        lengths = [len(row.prompt_ids) + len(row.answer_ids) for row in rendered]
        chunks = similar_lengths(lengths, len(rows), per_forward)
        parts = [self._log_prob_of_chunk(model, [rendered[i] for i in chunk]) for chunk in chunks]
        log_prob = torch.cat(parts)[torch.tensor([i for chunk in chunks for i in chunk]).argsort()]
        return log_prob, torch.tensor([row.weight for row in rows], device=log_prob.device)

    def _log_prob_of_chunk(self, model: nn.Module, rendered: Sequence[Rendered]) -> Tensor:
        if self.head is not None:
            return self.head.answer_log_probs(model, rendered, self.pad_token_id)
        batch = collate(rendered, self.pad_token_id, self.accelerator.device)
        labels = batch.input_ids.masked_fill(batch.answer_mask == 0, -100)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
        return model(**inputs, fused_lm_head=True).log_probs.sum(dim=1)

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {"multiplier": self.multiplier, "nats_at_start": self.nats_at_start, "nats_now": self.nats_now}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` wrote."""
        self.multiplier, self.nats_at_start, self.nats_now = (
            state[key] for key in ("multiplier", "nats_at_start", "nats_now")
        )
