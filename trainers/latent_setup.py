"""What [`LatentRetrodictiveTrainer`] puts together before it trains, and what it measures of each row."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_imitate.classifier import default_peft_config
from hf_imitate.estimators import ImportanceEstimate
from hf_imitate.retrodictor import RETRODICTOR, Retrodictor
from hf_imitate.trainers.adversarial_setup import preserved_random_state
from hf_imitate.trainers.engines import Engine
from hf_imitate.trainers.latent_retrodictive_config import LatentRetrodictiveConfig
from hf_imitate.trainers.latent_rows import LatentRow

logger = logging.getLogger(__name__)

# What is summed over rows: numerators and denominators of the metrics below.
COLUMNS = (
    *("nats", "weight", "bytes", "effective_sample_size", "largest_weight", "gap", "num_gaps", "num_rows"),
    *("length", "num_thoughts", "num_skipped", "known_nats", "known_weight"),
)
METRICS = {
    "retrodiction/bits_per_answer": ("nats", "weight"),
    "retrodiction/bits_per_byte": ("nats", "bytes"),
    "retrodiction/bits_per_thought_and_answer": ("known_nats", "known_weight"),
    "thoughts/effective_sample_size": ("effective_sample_size", "num_rows"),
    "thoughts/largest_weight": ("largest_weight", "num_rows"),
    "thoughts/elbo_gap": ("gap", "num_gaps"),
    "thoughts/mean_length": ("length", "num_thoughts"),
    "thoughts/skipped": ("num_skipped", "num_rows"),
}


def check_no_retrodictor(model: Any) -> None:
    """Raise `ValueError` where the model carries a retrodictor already."""
    if isinstance(model, PeftModel) and RETRODICTOR in model.peft_config:
        raise ValueError(
            f"The PeftModel already carries an adapter '{RETRODICTOR}', perhaps of an earlier run. Remove it by "
            f"`model.delete_adapter('{RETRODICTOR}')`, or go on with that run by "
            "`trainer.train(resume_from_checkpoint=True)`."
        )


def settle_padding(tokenizer: Any, model: PreTrainedModel | PeftModel, end_token_ids: Sequence[int]) -> None:
    """Give a tokenizer without padding an end token for it: padding is never read."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end_token_ids[0])
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def build_retrodictor(
    model: PreTrainedModel | PeftModel, config: PeftConfig | None, args: LatentRetrodictiveConfig, engine: Engine
) -> Retrodictor | None:
    """The retrodictor of a run: on the imitator's base where the engine allows it, or on a frozen copy of it; none for
    the estimator "prior"."""
    if args.estimator == "prior":
        return None
    # The global random state differs between processes by TRL's design, and has to go on doing so.
    with preserved_random_state(), engine.loading_whole():
        if isinstance(model, PeftModel) and engine.why_not_shared is None:
            return Retrodictor.on_shared_base(model, config or model.peft_config["default"], args.seed)
        copied = Retrodictor.on_copy(engine.whole_base(model), config or default_peft_config(), args.seed)
    logger.warning(engine.describe_copy("retrodictor", copied.model))
    if args.gradient_checkpointing:
        copied.model.train()
        # Its name until transformers 5.19 or so; later versions warn of it.
        enable = getattr(copied.model, "activation_checkpointing_enable", None)
        (enable or copied.model.gradient_checkpointing_enable)()
        copied.model.enable_input_require_grads()
    return copied


def measure_estimates(
    rows: Sequence[LatentRow], estimate: ImportanceEstimate, lengths: Sequence[Sequence[int]], is_skipped: Tensor
) -> Tensor:
    """What thoughts say about rows, by `COLUMNS`. [B, C], fp64, on the CPU.

    Bits leave out an answer that was cut, and one that no thought explains at all counts as skipped, not as infinity.

    Args:
        rows: B of them.
        estimate: of their answers.
        lengths: tokens of each of their thoughts.
        is_skipped: rows whose weights give no gradient. [B].
    """
    zeros = torch.zeros(len(rows), dtype=torch.float64)
    weight = torch.tensor([row.weight for row in rows], dtype=torch.float64)
    num_bytes = torch.tensor([row.num_bytes for row in rows], dtype=torch.float64)
    log_prob, gap = estimate.log_prob.detach().double().cpu(), estimate.elbo_gap.detach().double().cpu()
    counts = torch.tensor([row.rendered.ended for row in rows]) & log_prob.isfinite()
    columns = {
        "nats": torch.where(counts, -weight * log_prob, zeros),
        "weight": torch.where(counts, weight, zeros),
        "bytes": torch.where(counts, weight * num_bytes, zeros),
        "effective_sample_size": estimate.effective_sample_size.double().cpu(),
        "largest_weight": estimate.largest_weight.double().cpu(),
        "gap": torch.where(gap.isfinite(), gap, zeros),
        "num_gaps": gap.isfinite().double(),
        "num_rows": zeros + 1,
        "length": torch.tensor([float(sum(own)) for own in lengths], dtype=torch.float64),
        "num_thoughts": torch.tensor([float(len(own)) for own in lengths], dtype=torch.float64),
        "num_skipped": is_skipped.double().cpu(),
    }
    return torch.stack([columns.get(name, zeros) for name in COLUMNS], dim=1)


def measure_known(rows: Sequence[LatentRow], log_p_joint: Tensor) -> Tensor:
    """What rows with a known thought cost, by `COLUMNS`. [B, C], fp64, on the CPU.

    Args:
        rows: B of them.
        log_p_joint: log p(thought, answer | question), nats. [B].
    """
    zeros = torch.zeros(len(rows), dtype=torch.float64)
    weight = torch.tensor([row.weight if row.rendered.ended else 0.0 for row in rows], dtype=torch.float64)
    columns = {"known_nats": -weight * log_p_joint.detach().double().cpu(), "known_weight": weight}
    return torch.stack([columns.get(name, zeros) for name in COLUMNS], dim=1)
