"""The likelihood warm-up of separate distinguishers' bodies: which human answers come when, and what they cost."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce

from hf_imitate.distinguisher import Distinguisher
from hf_imitate.distinguisher_body import BodyLearner, HumanAnswer, Likelihood
from hf_imitate.human_rows import HumanRows
from hf_imitate.log_probs import nats_to_bits
from hf_imitate.trainers.adversarial_config import AdversarialConfig

STREAM = 5  # of the draws of human rows
NUM_HELDOUT = 256


class BodyWarmup:
    """Fits the bodies of one or several distinguishers to the human answers that the imitator is fitted to.

    Args:
        args ([`AdversarialConfig`]): settings.
        bodies (`Sequence[Distinguisher]`): those with a `language_model`.
        heldout (`Sequence[int]`): rows of held-out answers that say when to stop.
        human_rows ([`HumanRows`]): the humans' answers.
        prompts (`Sequence`): the questions, by row.
        accelerator ([`~accelerate.Accelerator`]): knows the processes.
        record (`Callable`): takes a metric's name, sum and count.
    """

    def __init__(
        self,
        args: AdversarialConfig,
        bodies: Sequence[Distinguisher],
        heldout: Sequence[int],
        human_rows: HumanRows,
        prompts: Sequence[str | list],
        accelerator: Accelerator,
        record: Callable[[str, float, float], None],
    ):
        self.args, self.human_rows, self.prompts, self.heldout = args, human_rows, prompts, list(heldout)
        self.accelerator, self.record = accelerator, record
        self.learners = [
            BodyLearner(
                body,
                args.imitator_warmup_learning_rate,
                args.per_device_train_batch_size,
                reduce=partial(reduce, reduction="sum") if accelerator.num_processes > 1 else None,
            )
            for body in bodies
        ]

    def step(self, number: int, lr_scale: float) -> None:
        """The `number`-th update of every body, on as many rows as an optimizer step of the imitator has."""
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        draw = number * self.accelerator.num_processes + self.accelerator.process_index
        rows = self._rows(self.human_rows.draw(draw, batch, stream=STREAM))
        self._note("", [learner.step(rows, lr_scale) for learner in self.learners])

    def heldout_nats(self) -> float:
        """Mean nats per held-out answer, summed over the bodies; recorded as bits of each."""
        ids = self.heldout[:NUM_HELDOUT][self.accelerator.process_index :: self.accelerator.num_processes]
        rows = self._rows(ids)
        return self._note("_heldout", [learner.likelihood(rows) for learner in self.learners])

    def release(self) -> None:
        """Let go of what classification has no use for: the language models' heads and the optimizers."""
        for learner in self.learners:
            learner.distinguisher.language_model = None
        self.learners = []

    def _rows(self, ids: Sequence[int]) -> list[HumanAnswer]:
        rows = zip(ids, self.human_rows.batch(ids), strict=True)
        return [HumanAnswer(self.prompts[i], row.answer, row.weight) for i, row in rows]

    def _note(self, ending: str, found: Sequence[Likelihood]) -> float:
        for likelihood in found:
            self.record(f"distinguisher/bits_per_answer{ending}", nats_to_bits(likelihood.nats), likelihood.weight)
        return sum(likelihood.nats / likelihood.weight for likelihood in found)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizers' moments, for a checkpoint."""
        return {
            f"body.{i}.{index}.{name}": torch.as_tensor(value)
            for i, learner in enumerate(self.learners)
            for index, moments in learner.optimizer.state_dict()["state"].items()
            for name, value in moments.items()
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `tensors` gave."""
        for i, learner in enumerate(self.learners):
            state: dict[str, Any] = learner.optimizer.state_dict()
            state["state"] = {}
            prefix = f"body.{i}."
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    index, moment = name.removeprefix(prefix).split(".")
                    state["state"].setdefault(int(index), {})[moment] = tensor
            learner.optimizer.load_state_dict(state)
