"""Train causal language models to answer as real people did, and audit how well they do.

The public names are loaded on first use, so `import hf_imitate` costs milliseconds and imports no torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

_CHECKOUT = Path(__file__).resolve().parent.parent
# In a checkout `trainers/` and `hub_cards/` lie beside this folder; installed, they lie inside it.
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "trainers").is_dir():
    __path__.append(str(_CHECKOUT))

# Public name -> the module that defines it.
_LAZY = {
    "AdversarialConfig": "hf_imitate.trainers.adversarial_config",
    "AdversarialTrainer": "hf_imitate.trainers.adversarial_trainer",
    "AuditReport": "hf_imitate.audits.report",
    "Distinguisher": "hf_imitate.distinguisher",
    "Finding": "hf_imitate.audits.report",
    "Imitator": "hf_imitate.imitator",
    "LatentRetrodictiveConfig": "hf_imitate.trainers.latent_retrodictive_config",
    "LatentRetrodictiveTrainer": "hf_imitate.trainers.latent_retrodictive_trainer",
    "RetrodictiveConfig": "hf_imitate.trainers.retrodictive_config",
    "RetrodictiveTrainer": "hf_imitate.trainers.retrodictive_trainer",
    "audit": "hf_imitate.audits.run",
    "load_docstrings": "hf_imitate.docstrings",
    "split_by_question": "hf_imitate.rows",
}

if TYPE_CHECKING:
    from hf_imitate.audits.report import AuditReport, Finding
    from hf_imitate.audits.run import audit
    from hf_imitate.distinguisher import Distinguisher
    from hf_imitate.docstrings import load_docstrings
    from hf_imitate.imitator import Imitator
    from hf_imitate.rows import split_by_question
    from hf_imitate.trainers.adversarial_config import AdversarialConfig
    from hf_imitate.trainers.adversarial_trainer import AdversarialTrainer
    from hf_imitate.trainers.latent_retrodictive_config import LatentRetrodictiveConfig
    from hf_imitate.trainers.latent_retrodictive_trainer import LatentRetrodictiveTrainer
    from hf_imitate.trainers.retrodictive_config import RetrodictiveConfig
    from hf_imitate.trainers.retrodictive_trainer import RetrodictiveTrainer

__all__ = [
    "AdversarialConfig",
    "AdversarialTrainer",
    "AuditReport",
    "Distinguisher",
    "Finding",
    "Imitator",
    "LatentRetrodictiveConfig",
    "LatentRetrodictiveTrainer",
    "RetrodictiveConfig",
    "RetrodictiveTrainer",
    "__version__",
    "audit",
    "load_docstrings",
    "split_by_question",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {sorted(__all__)}.")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
