"""Fit a distinguisher to pairs until held-out pairs say that it is enough."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_imitate.losses import DISTINGUISHER_LOSSES, paired_wins
from hf_imitate.pairs import Learner, Logits, Pair
from hf_imitate.plateau import Plateau

if TYPE_CHECKING:
    from hf_imitate.distinguisher import Distinguisher


class FitReport(NamedTuple):
    """How a fit went.

    Attributes:
        num_steps (`int`): updates made.
        heldout_loss (`float`): nats per comparison on the held-out pairs, with the kept weights; NaN without them.
        heldout_accuracy (`float`): paired accuracy there, ties 1/2; NaN without them.
    """

    num_steps: int
    heldout_loss: float
    heldout_accuracy: float


def mean_loss_and_accuracy(logits: Sequence[Logits], loss: str) -> tuple[float, float]:
    """Mean loss (nats) and paired accuracy (ties 1/2) over all comparisons; NaN if there are none."""
    if not logits:
        return float("nan"), float("nan")
    seen = Logits(*(torch.cat(parts) for parts in zip(*logits, strict=True)))
    return DISTINGUISHER_LOSSES[loss](*seen).mean().item(), paired_wins(seen.human, seen.imitator).mean().item()


def fit(
    distinguisher: "Distinguisher",
    pairs: Sequence[Pair],
    heldout_pairs: Sequence[Pair] = (),
    *,
    num_steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    loss: str = "bradley_terry",
    patience: int = 5,
    eval_every: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> FitReport:
    """Fit a distinguisher to pairs, and keep the weights that were best on held-out pairs.

    Args:
        distinguisher: what is fitted, in place.
        pairs: training pairs.
        heldout_pairs: pairs it never trains on; they decide when to stop and which weights are kept.
        num_steps: most updates; the learning rate falls linearly to 0 over them.
        batch_size: pairs in an update.
        learning_rate: at the start; the check weights have a rate of their own.
        loss: "bradley_terry" or "bce".
        patience: readings without improvement, `eval_every` updates apart, that end the fit.
        eval_every: updates between two readings.
        seed: decides the order of the pairs.
        progress: show a bar.

    Raises:
        ValueError: there are no pairs.
        FloatingPointError: the loss is not finite; the weights are those before that update.
    """
    if not pairs:
        raise ValueError("`fit` needs at least one pair of a human's and an imitator's answer; got none.")
    learner = Learner(distinguisher, learning_rate, loss=loss)
    rng = np.random.default_rng(seed)
    plateau, best_accuracy = Plateau(patience), float("nan")
    best: list[torch.Tensor] | None = None
    queue: list[int] = []
    step = 0
    for step in tqdm(range(1, num_steps + 1), desc="distinguisher", disable=not progress, leave=False):
        while len(queue) < batch_size:
            queue += rng.permutation(len(pairs)).tolist()
        batch, queue = queue[:batch_size], queue[batch_size:]
        learner.step([pairs[i] for i in batch], lr_scale=1 - (step - 1) / num_steps)
        if heldout_pairs and (step % eval_every == 0 or step == num_steps):
            value, accuracy = mean_loss_and_accuracy(learner.score(heldout_pairs), loss)
            if plateau.update(value):
                best, best_accuracy = [parameter.detach().clone() for parameter in learner.parameters], accuracy
            if plateau.is_reached:
                break
    if best is not None:
        with torch.no_grad():
            for parameter, kept in zip(learner.parameters, best, strict=True):
                parameter.copy_(kept)
    return FitReport(step, plateau.best if heldout_pairs else float("nan"), best_accuracy)
