"""What every trainer asks of numbers among its settings, before a model loads: finite, whole, in their range."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

POSITIVE = "a positive, finite number"
NOT_NEGATIVE = "a finite number, 0 or more"
NORM = "a number, 0 or more"
SHARE = "a share in [0, 1)"
COUNT = "a whole number, at least 1"
STEPS = "a whole number, -1 for as many as the epochs have"
SEED = "a whole number from 0 to 2**32 - 1"

_HOLDS: dict[str, Callable[[Any], bool]] = {
    POSITIVE: lambda value: 0 < value < math.inf,
    NOT_NEGATIVE: lambda value: 0 <= value < math.inf,
    NORM: lambda value: value >= 0,
    SHARE: lambda value: 0 <= value < 1,
    COUNT: lambda value: isinstance(value, Integral) and value >= 1,
    STEPS: lambda value: isinstance(value, Integral) and value >= -1,
    SEED: lambda value: isinstance(value, Integral) and 0 <= value < 2**32,
}

# transformers lets these pass, and then fails in its own words, late, or trains on numbers that are none.
COMMON = {
    "learning_rate": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NORM,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "num_train_epochs": NOT_NEGATIVE,
    "max_steps": STEPS,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "seed": SEED,
    "data_seed": SEED,
}


def check_numbers(args: Any, needs: Mapping[str, str]) -> None:
    """Check numbers among the settings of a config; `None` passes where it is the default.

    Args:
        args: a config.
        needs (`Mapping[str, str]`): what each of them has to be, by the setting's name.

    Raises:
        ValueError: one is something else; the message names it, what was given and what is needed.
    """
    for name, need in needs.items():
        value = getattr(args, name)
        if value is None and args.__dataclass_fields__[name].default is None:
            continue
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_number and _HOLDS[need](value)):
            raise ValueError(f"`{name}` is {value!r}; need {need}.")
