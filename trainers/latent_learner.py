"""The retrodictor's side of a latent run: its optimizer, its steps, and how long it is warmed up."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_imitate.plateau import Plateau
from hf_imitate.retrodictor import Retrodictor

WARMUP, TRAINING = "retrodictor_warmup", "training"
WARMUP_CAP = 100  # most steps of an "auto" warm-up
READING_EVERY = 10  # steps that one reading of its loss is a mean over


class RetrodictorLearner:
    """A retrodictor with its optimizer. It is trained on the unwrapped model, with an all-reduce of its own.

    Args:
        retrodictor ([`~hf_imitate.retrodictor.Retrodictor`]): what learns.
        learning_rate (`float`): its rate.
        max_grad_norm (`float`): gradients are clipped to this norm.
        reduce (`Callable[[Tensor], Tensor]`, *optional*): mean over processes.
    """

    def __init__(
        self,
        retrodictor: Retrodictor,
        learning_rate: float,
        max_grad_norm: float = 1.0,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ):
        self.retrodictor, self.learning_rate, self.reduce = retrodictor, learning_rate, reduce
        self.max_grad_norm = max_grad_norm
        self.parameters = retrodictor.parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=True)

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, forward *and* backward are the retrodictor's; outside, it is frozen."""
        with self.retrodictor.active():
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            try:
                yield
            finally:
                for parameter in self.parameters:
                    parameter.requires_grad_(False)

    def step(self, lr_scale: float = 1.0) -> float:
        """Update by the gradients gathered since the last step; returns their norm over all processes.

        Raises:
            FloatingPointError: the gradient is not finite, on any process; nothing was updated.
        """
        if self.reduce is not None:
            for parameter in self.parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.reduce(gradient)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf).item()
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"The norm of the retrodictor's gradient is {norm}; nothing was updated. Lower "
                "`retrodictor_learning_rate`, or train in fp32."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, by name."""
        named = {f"parameter.{i}": parameter.detach() for i, parameter in enumerate(self.parameters)}
        for index, moments in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return named

    def load_weights(self, named: dict[str, Tensor]) -> None:
        """Take up the weights that `tensors` gave."""
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(named[f"parameter.{i}"])

    def load(self, named: dict[str, Tensor]) -> None:
        """Take up all that `tensors` gave."""
        self.load_weights(named)
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, tensor in named.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                state["state"].setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict(state)


@dataclass
class Warmup:
    """How many steps come before the first of the imitator's, and when "auto" has seen enough.

    Every dream is new, so the loss on it before the update is that on held-out ones.
    """

    steps: int
    is_auto: bool
    plateau: Plateau = field(default_factory=Plateau)
    readings: list[float] = field(default_factory=list)

    @classmethod
    def from_setting(cls, setting: int | str) -> "Warmup":
        """From `retrodictor_warmup_steps`."""
        return cls(WARMUP_CAP, True) if setting == "auto" else cls(int(setting), False)

    def phase(self, step: int) -> str:
        """The phase that step `step` (from 0) belongs to."""
        return WARMUP if step < self.steps else TRAINING

    def learning_rate_factor(self, step: int, schedule: Callable[[int], float]) -> float:
        """The imitator's rate as a multiple of `learning_rate`: it stands still in the warm-up."""
        return 0.0 if step < self.steps else schedule(step - self.steps)

    def take_reading(self, step: int, loss: float) -> bool:
        """Note the loss of step `step`, over all processes; `True` if the warm-up thereby ends early."""
        self.readings.append(loss)
        if not self.is_auto or len(self.readings) < READING_EVERY:
            return False
        self.plateau.update(sum(self.readings) / len(self.readings))
        self.readings.clear()
        if self.plateau.is_reached and step + 1 < self.steps:
            self.steps = step + 1
            return True
        return False

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        state = asdict(self)
        state["plateau"]["best"] = min(self.plateau.best, 1e300)  # JSON has no infinity
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` wrote."""
        self.steps, self.is_auto = state["steps"], state["is_auto"]
        self.plateau, self.readings = Plateau(**state["plateau"]), list(state["readings"])
