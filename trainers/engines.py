"""How Accelerate spreads a run over processes, and what that leaves to a second model beside the imitator."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, patch_environment
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config


@dataclass(frozen=True)
class Engine:
    """What runs the training, and the base that the imitator starts from.

    Args:
        accelerator ([`~accelerate.Accelerator`]): knows the processes.
        base (`str`, *optional*): the repo id or path that was given as the model; `None` where it was an object.
        revision (`str`, *optional*): of `base`.
    """

    accelerator: Accelerator
    base: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, accelerator: Accelerator, model: Any, args: Any) -> "Engine":
        """Of a run that was given `model` and settings."""
        revision = (args.model_init_kwargs or {}).get("revision")
        return cls(accelerator, model, revision) if isinstance(model, str) else cls(accelerator)

    @property
    def name(self) -> str:
        """Its name in [`~hf_imitate.hub_cards.engines.ENGINES`]."""
        kind, state = self.accelerator.distributed_type, self.accelerator.state
        if kind == DistributedType.DEEPSPEED:
            return f"zero{state.deepspeed_plugin.zero_stage}"
        if kind == DistributedType.FSDP:
            return f"fsdp{state.fsdp_plugin.fsdp_version}"
        place = "cpu" if self.accelerator.device.type == "cpu" else "gpu"
        if kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            return f"multi_{place}"
        return f"single_{place}" if kind == DistributedType.NO else str(kind.value).lower()

    @property
    def why_not_shared(self) -> str | None:
        """Why a second model's adapter cannot lie on the imitator's own base; `None` where it can."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return "FSDP lays the imitator's weights in shards on all processes"
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            if self.accelerator.state.deepspeed_plugin.zero_stage == 3:
                return "ZeRO-3 lays the imitator's weights in shards on all processes"
            return "DeepSpeed turns everything on the imitator's model into its own precision"
        return None

    def check_frozen(self, is_frozen: bool) -> None:
        """Raise `ValueError` where a frozen imitator, which has no optimizer, would have to be prepared with one."""
        if is_frozen and self.why_not_shared is not None:
            raise ValueError(
                f"`freeze_imitator=True` under {self.name}, which prepares a model together with its optimizer, and a "
                "frozen imitator has none. Run it in one process or under DDP (`--accelerate_config multi_gpu`)."
            )

    @contextlib.contextmanager
    def loading_whole(self) -> Iterator[None]:
        """Inside, every process loads all weights of a model, also where the engine would shard them as they come."""
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if is_deepspeed:
            unset_hf_deepspeed_config()
        try:
            with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
                yield
        finally:
            if is_deepspeed:
                self.accelerator.state.deepspeed_plugin.set_deepspeed_weakref()

    def whole_base(self, imitator: PreTrainedModel | PeftModel) -> PreTrainedModel:
        """The imitator's starting base, whole on this process, to be copied or, under an engine that shards, new.

        Raises:
            ValueError: this process holds no weights of it.
        """
        base = imitator.get_base_model() if isinstance(imitator, PeftModel) else imitator
        if self.why_not_shared is None:
            return base
        if self.base is not None:
            return type(base).from_pretrained(
                self.base, revision=self.revision, dtype=base.dtype, trust_remote_code=False
            )
        if any(parameter.is_meta for parameter in base.parameters()):
            raise ValueError(
                "The model was given as an object, and this process holds none of its weights. Give its repo id or "
                "path, or load it with `fsdp_cpu_ram_efficient_loading: false`."
            )
        return copy.deepcopy(imitator).unload() if isinstance(imitator, PeftModel) else base

    def describe_copy(self, whose: str, model: PreTrainedModel | PeftModel) -> str:
        """What a second model with a base of its own costs, and why it has one."""
        megabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        what = f"The {whose} is an adapter on a frozen copy of the starting model: {megabytes:.0f} MB more memory"
        why = self.why_not_shared
        if why is None:
            return f"{what}. With LoRA (`peft_config`) it shares the imitator's base."
        return f"{what} on each process, since {why}. With LoRA under DDP it shares the imitator's base."
