"""What an imitator says of an answer's log-probability, whichever of its laws said it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_imitate.latent_imitator import LatentLogProb
from hf_imitate.rendering import Renderer
from hf_imitate.residual_imitator import ResampledLogProb
from hf_imitate.scoring import score_answers


class LogProb(NamedTuple):
    """Log-probability of each answer, nats.

    Attributes:
        nats (`torch.Tensor`): log p(answer | question), [N], fp64.
        lower_bound (`torch.Tensor`): what log p is at least, for each answer on its own, at the asked confidence. [N].
        effective_sample_size (`torch.Tensor`): draws that an estimate rests on, from 1; infinite where exact. Of a
            resampled law, sets of candidates, from 1 to `num_estimates`. [N].
        is_exact (`torch.Tensor`): whether `nats` is no estimate; `lower_bound` then equals it. [N], bool.
    """

    nats: Tensor
    lower_bound: Tensor
    effective_sample_size: Tensor
    is_exact: Tensor


def estimated_log_prob(found: LatentLogProb | ResampledLogProb) -> LogProb:
    """An estimate with its lower bound, as [`LogProb`]."""
    is_exact = torch.zeros(len(found.nats), dtype=torch.bool)
    return LogProb(found.nats, found.lower_bound, found.effective_sample_size, is_exact)


def exact_log_prob(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[str],
    temperature: float,
    batch_size: int,
    progress: bool,
) -> LogProb:
    """Score answers under softmax(logits / temperature), see [`~hf_imitate.scoring.score_answers`]."""
    rows = renderer.human(questions, answers) if questions else []
    pad = renderer.tokenizer.pad_token_id or 0
    nats = score_answers(model, rows, pad, batch_size, temperature, progress)
    is_exact = torch.ones(len(rows), dtype=torch.bool)
    return LogProb(nats, nats.clone(), torch.full_like(nats, torch.inf), is_exact)
