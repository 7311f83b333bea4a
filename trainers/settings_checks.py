"""What every trainer asks of its settings before a model loads: numbers in their range, checkpoints to go on from."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import HubStrategy

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
    COUNT: lambda value: value >= 1 and isinstance(value, Integral),
    STEPS: lambda value: value >= -1 and isinstance(value, Integral),
    SEED: lambda value: 0 <= value < 2**32 and isinstance(value, Integral),
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


def check_saving(args: TrainingArguments) -> None:
    """Refuse checkpoints from which a run would not go on to the same bits, or that everybody could read.

    Raises:
        ValueError: a setting makes such; the message names it.
    """
    if args.enable_jit_checkpoint:
        raise ValueError(
            "`enable_jit_checkpoint=True` saves on SIGTERM in the middle of a step, from where no run goes on to the "
            "same bits. Leave it at False: a SIGTERM saves after the step as it is."
        )
    if args.ignore_data_skip:
        raise ValueError(
            "`ignore_data_skip=True` shows a resumed run rows that it has already seen in place of those that come "
            "next. Leave it at False."
        )
    strategy = HubStrategy(args.hub_strategy)
    pushes_them = args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    if pushes_them and args.hub_private_repo is False:
        raise ValueError(
            f"`hub_strategy` is {strategy.value!r} and `hub_private_repo` is False, so everybody could read what "
            "serves the run alone, of an adversarial one the imitator's answers to the training questions. Use "
            "'every_save' or 'end', or leave the repository private."
        )
