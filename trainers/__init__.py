"""The trainers and their configs, imported as `hf_imitate.trainers`; loaded on first use."""

import importlib
from typing import TYPE_CHECKING

# Public name -> the module that defines it.
_LAZY = {
    "AdversarialConfig": "hf_imitate.trainers.adversarial_config",
    "AdversarialTrainer": "hf_imitate.trainers.adversarial_trainer",
}

if TYPE_CHECKING:
    from hf_imitate.trainers.adversarial_config import AdversarialConfig
    from hf_imitate.trainers.adversarial_trainer import AdversarialTrainer

__all__ = ["AdversarialConfig", "AdversarialTrainer"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {__all__}.")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
