"""The trainers and their configs, imported as `hf_imitate.trainers`; loaded on first use."""

import importlib
from typing import TYPE_CHECKING

# Public name -> the module that defines it.
_LAZY = {
    "AdversarialConfig": "hf_imitate.trainers.adversarial_config",
    "AdversarialTrainer": "hf_imitate.trainers.adversarial_trainer",
    "LatentRetrodictiveConfig": "hf_imitate.trainers.latent_retrodictive_config",
    "LatentRetrodictiveTrainer": "hf_imitate.trainers.latent_retrodictive_trainer",
    "RetrodictiveConfig": "hf_imitate.trainers.retrodictive_config",
    "RetrodictiveTrainer": "hf_imitate.trainers.retrodictive_trainer",
}

if TYPE_CHECKING:
    from hf_imitate.trainers.adversarial_config import AdversarialConfig
    from hf_imitate.trainers.adversarial_trainer import AdversarialTrainer
    from hf_imitate.trainers.latent_retrodictive_config import LatentRetrodictiveConfig
    from hf_imitate.trainers.latent_retrodictive_trainer import LatentRetrodictiveTrainer
    from hf_imitate.trainers.retrodictive_config import RetrodictiveConfig
    from hf_imitate.trainers.retrodictive_trainer import RetrodictiveTrainer

__all__ = [
    "AdversarialConfig",
    "AdversarialTrainer",
    "LatentRetrodictiveConfig",
    "LatentRetrodictiveTrainer",
    "RetrodictiveConfig",
    "RetrodictiveTrainer",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {__all__}.")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
