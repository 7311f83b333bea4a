"""Where numbers of a run stop being finite, it stops: before they move a weight, on all processes, saying where to go
on from.

One rule for every trainer. A loss, a gradient, a reward or a logit that is NaN or infinite ends `train()` with a
`FloatingPointError` that names the step; nothing is updated by it. Under fp16 alone an overflow is usual: there the
gradient scaler skips the step, and the logged `gradients/skipped` is the share of steps that it skipped.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from hf_imitate.trainers.checkpoints import checkpoints
from hf_imitate.trainers.phases import IMITATOR_WARMUP
from hf_imitate.trainers.ranks import agreed, stopping_together


@contextlib.contextmanager
def at_step(step: int) -> Iterator[None]:
    """Say at which step of the optimizer numbers stopped being finite."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"At step {step}: {error}") from None


def check_loss(loss: Tensor, model: nn.Module, accelerator: Accelerator, step: int, phase: str) -> None:
    """Stop all processes where one has no finite loss.

    Raises:
        FloatingPointError: naming the step and the first weight that is not finite, or else the largest one.
    """
    with agreed(accelerator, step):
        if not loss.detach().isfinite():
            raise FloatingPointError(
                f"The imitator's loss is not finite at step {step} ({phase}): {blame(model)}. Lower `learning_rate`"
                f"{' or `imitator_warmup_learning_rate`' if phase == IMITATOR_WARMUP else ''}, or train in fp32 or "
                "bf16."
            )


def blame(model: nn.Module) -> str:
    """Which trained weight is not finite, or else which is the largest, in words."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    broken = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if broken is not None:
        return f"the first weight that is not finite is `{broken}`"
    if not weights:
        return "none of its weights is trained, so those it was loaded with or its inputs are at fault"
    name, largest = max(((name, w.abs().max().item()) for name, w in weights.items()), key=lambda pair: pair[1])
    return f"every trained weight is finite, the largest is {largest:.3g} in `{name}`, so its activations overflow"


class FiniteSteps:
    """The part of a trainer that ends a run where numbers are not finite. Comes first among the bases."""

    @stopping_together
    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As in transformers.

        Raises:
            FloatingPointError: a number of the run is not finite; the message names the step and the newest complete
                checkpoint before it.
            ProcessFailure: of several processes one failed, perhaps another one.
        """
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except FloatingPointError as error:
            raise type(error)(f"{error} {self._where_to_go_on()}") from None

    def _where_to_go_on(self) -> str:
        # The weights of the step at hand are those whose numbers broke, though their checkpoint may be whole.
        found = newest_usable(self, self.state.global_step - 1)
        if found is None:
            return "There is no complete checkpoint from before this step; `save_steps` makes more of them."
        return f"The newest complete checkpoint from before this step is {found}; go on from there."

    def _get_grad_norm(self, model, grad_norm=None):
        """As in transformers; a norm that is not finite ends the run before the step it would be taken for."""
        norm = super()._get_grad_norm(model, grad_norm)
        value = math.nan if norm is None else float(norm)
        if self.accelerator.scaler is not None:
            self._tally.add("train", "gradients/skipped", float(not math.isfinite(value)), 1.0)
            return norm
        if norm is None or math.isfinite(value):
            return norm
        # Of gradients that were reduced before: the same on every process.
        raise FloatingPointError(
            f"The norm of the imitator's gradient is {value} at step {self.state.global_step}; nothing was updated. "
            "Lower `learning_rate`, or train in fp32 or bf16."
        )


def newest_usable(trainer: Any, most_step: int) -> Path | None:
    """The newest checkpoint, up to a step, that this run could be resumed from; `None` where there is none."""
    for folder in checkpoints(trainer.args.output_dir, most_step):
        try:
            trainer.check_checkpoint(str(folder))
        except (OSError, ValueError):
            continue
        return folder
    return None
