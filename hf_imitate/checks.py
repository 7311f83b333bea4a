"""Checks: callables that pass or fail an answer, what a distinguisher can *verify*."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Check = Callable[..., list[float | bool | None]]


def check_name(check: Check) -> str:
    """A check's name: its `__name__`.

    Raises:
        ValueError: it has none, or is a lambda, whose name says nothing and would not survive a reload.
    """
    name = getattr(check, "__name__", None)
    if not isinstance(name, str) or name == "<lambda>":
        raise ValueError(
            f"A check needs a name of its own, and {check!r} has none. Define it with `def`, or set its `__name__`."
        )
    return name


def check_names(checks: Sequence[Check]) -> tuple[str, ...]:
    """Names of all checks.

    Raises:
        ValueError: a name is missing or used twice.
        TypeError: a check is not callable.
    """
    for check in checks:
        if not callable(check):
            raise TypeError(f"A check must be callable; got {type(check).__name__}.")
    names = tuple(check_name(check) for check in checks)
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"Check names must differ; used more than once: {twice}. Rename one of the functions.")
    return names


def check_outcomes(
    checks: Sequence[Check],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]] | None = None,
    **columns: Any,
) -> Tensor:
    """Run every check once over N answers.

    Args:
        checks: C callables with TRL's reward signature.
        prompts, completions: questions and answers as in the data set.
        completion_ids: sampled ids; `None` for human answers.
        columns: the data set's other columns, one value per answer.

    Returns:
        Outcomes in [0, 1], NaN where a check does not apply. [N, C].

    Raises:
        RuntimeError: a check raised; its name is given, and its own error is the cause.
        ValueError, TypeError: a check returned the wrong number of outcomes, or something that is no number in [0, 1].
    """
    outcomes = torch.full((len(prompts), len(checks)), torch.nan)
    for column, check in enumerate(checks):
        name = check_name(check)
        try:
            returned = check(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        except Exception as error:
            raise RuntimeError(
                f"The check '{name}' raised {type(error).__name__} on {len(prompts)} answers."
            ) from error
        if not isinstance(returned, (list, tuple)) or len(returned) != len(prompts):
            found = len(returned) if isinstance(returned, (list, tuple)) else f"a {type(returned).__name__}"
            raise ValueError(f"The check '{name}' must return a list of {len(prompts)} outcomes; got {found}.")
        outcomes[:, column] = torch.tensor([_outcome(value, name, i) for i, value in enumerate(returned)])
    return outcomes


def _outcome(value: float | bool | None, name: str, index: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, str) or (not isinstance(value, (bool, int, float)) and not hasattr(value, "__float__")):
        raise TypeError(f"The check '{name}' returned a {type(value).__name__} for answer {index}; need a number.")
    value = float(value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"The check '{name}' returned {value} for answer {index}; an outcome lies in [0, 1] and passes at >= 0.5. "
            "Return None where the check does not apply."
        )
    return value
