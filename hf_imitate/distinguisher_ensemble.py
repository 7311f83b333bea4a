"""Several distinguishers whose logits add, each knowing something else."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_imitate.checks import Check
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.distinguisher_files import ADAPTER_FILE, ENSEMBLE, write_settings
from hf_imitate.rendering import Answer


class DistinguisherEnsemble(Distinguisher):
    """One logit: the sum of the members' text logits, plus what the checks add, once.

    All members learn under one loss on that sum, so that each is left with what the others do not see.

    Args:
        members (`Sequence[Distinguisher]`): two or more; of an ensemble among them, its members. Check weights that
            they bring along are added up here, by name, and taken from them.
        checks (`Sequence[Callable]`, *optional*): as in [`Distinguisher`].
        check_weights (`dict[str, float]`, *optional*): trained weights by name, in place of the members'.

    Raises:
        ValueError: there are fewer than two members, or `checks` are not those that members were trained with.
    """

    def __init__(
        self,
        members: Sequence[Distinguisher],
        checks: Sequence[Check] = (),
        check_weights: dict[str, float] | None = None,
    ):
        if len(members) < 2:
            raise ValueError(f"An ensemble has {len(members)} members; give two or more, or one on its own.")
        self.members = [one for member in members for one in getattr(member, "members", [member])]
        # Low precision first: whoever asks for the precision of the whole gets the worst.
        self.model = nn.ModuleList(
            sorted(
                (one.model for one in self.members), key=lambda model: next(model.parameters()).dtype == torch.float32
            )
        )
        self.tokenizer, self.renderer = members[0].tokenizer, members[0].renderer
        self.adapter_name = self.language_model = None
        brought: dict[str, float] = {}
        brought_checks: dict[str, Check] = {}
        for member in members:
            for name, weight in zip(member.check_names, member.check_weights.tolist(), strict=True):
                brought[name] = brought.get(name, 0.0) + weight
            brought_checks |= zip(member.check_names, member.checks, strict=False)
            member.take_checks((), {})
        given = check_weights if check_weights is not None else (brought or None)
        known = [brought_checks[name] for name in given or () if name in brought_checks]
        if given is None:
            self.take_checks(checks, None)
            return
        self.take_checks(known if len(known) == len(given) else (), given)
        if checks:
            self.set_checks(checks)

    def encode(self, prompts: Sequence[str | list], answers: Sequence[Answer]) -> list[Any]:
        """What each member reads of an answer."""
        return list(zip(*(member.encode(prompts, answers) for member in self.members), strict=True))

    def size(self, row: Any) -> int:
        """The longest of what the members read."""
        return max(member.size(part) for member, part in zip(self.members, row, strict=True))

    @property
    def forward_cost(self) -> float:
        """What pays for each of the members."""
        return min(member.forward_cost for member in self.members)

    def text_logits(self, rows: Sequence[Any]) -> Tensor:
        """Sum of the members' logits of each answer. [N], fp32."""
        parts = zip(self.members, zip(*rows, strict=True), strict=True)
        logits = [member.text_logits(own).to(self.device) for member, own in parts]
        return torch.stack(logits).sum(dim=0)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Switch the member on a shared base to its adapter, and back."""
        with contextlib.ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.active())
            yield

    def place(self, device: torch.device, autocast: Callable, gradient_checkpointing: bool) -> None:
        """Make every member ready for training."""
        for member in self.members:
            member.place(device, autocast, gradient_checkpointing)
        self.check_weights.data = self.check_weights.data.to(device)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those of all members, in order."""
        return [parameter for member in self.members for parameter in member.trainable_parameters()]

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Those of all members, each at its own rate."""
        return [group for member in self.members for group in member.parameter_groups(learning_rate)]

    @property
    def bodies(self) -> list[Distinguisher]:
        """The members whose body likelihood may fit."""
        return [body for member in self.members for body in member.bodies]

    def speak_as(self, completion_role: str) -> None:
        """Read answers as that role's turns."""
        for member in self.members:
            member.speak_as(completion_role)

    def published_models(self) -> tuple[nn.Module, ...]:
        """Those of all members."""
        return tuple(model for member in self.members for model in member.published_models())

    def save_beside(self, folder: Path, tokenizer: Any) -> None:
        """Write it into an imitator's repo; members with another tokenizer bring it along."""
        for i, member in enumerate(self.members):
            member.save_beside(folder / str(i), tokenizer)
        # PEFT saves an adapter beside the imitator's under its own name, which is this folder's.
        for name in (ADAPTER_FILE, "adapter_config.json", "README.md"):
            (folder / name).unlink(missing_ok=True)
        write_settings(self, folder, kind=ENSEMBLE, num_members=len(self.members))

    def save_pretrained(self, folder: str | Path, with_tokenizer: bool = True) -> None:
        """Write each member into a numbered folder, and `checks.json` beside them."""
        folder = Path(folder)
        for i, member in enumerate(self.members):
            member.save_pretrained(folder / str(i), with_tokenizer)
        write_settings(self, folder, kind=ENSEMBLE, num_members=len(self.members))
