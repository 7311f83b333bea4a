"""Checks: callables that pass or fail an answer, what a distinguisher can *verify*."""

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Check = Callable[..., list[float | bool | None]]
_GIVEN = ("prompts", "completions", "completion_ids")


def check_name(check: Check) -> str:
    """A check's name: its `__name__`.

    Raises:
        ValueError: it has none, or is a lambda, whose name says nothing and would not survive a reload.
    """
    name = getattr(check, "__name__", None)
    if not isinstance(name, str) or name == "<lambda>":
        raise ValueError(
            f"A check needs a name of its own, and a {type(check).__name__} among them has none (a lambda's does not "
            "count). Define it with `def`, or set its `__name__`."
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
    /,
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
        RuntimeError: a check raised; its name, its error's type and the place are given, its own words are not: they
            may quote a row. `error.__context__` has them.
        ValueError, TypeError: a check returned the wrong number of outcomes, or something that is no number in [0, 1];
            or a column has the name of something else that checks are given.
    """
    if checks:
        check_column_names(columns)
    outcomes = torch.full((len(prompts), len(checks)), torch.nan)
    for column, check in enumerate(checks):
        name = check_name(check)
        try:
            returned = check(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        except Exception as error:
            raise RuntimeError(failure(f"check '{name}'", error, len(prompts))) from None
        if not isinstance(returned, (list, tuple)) or len(returned) != len(prompts):
            found = len(returned) if isinstance(returned, (list, tuple)) else f"a {type(returned).__name__}"
            raise ValueError(f"The check '{name}' must return a list of {len(prompts)} outcomes; got {found}.")
        outcomes[:, column] = torch.tensor([_outcome(value, name, i) for i, value in enumerate(returned)])
    return outcomes


def check_column_names(columns: Iterable[str]) -> None:
    """Raise `ValueError` if a column has the name of what checks are given besides the columns."""
    taken = [name for name in columns if name in _GIVEN]
    if taken:
        raise ValueError(
            f"The data set's column `{taken[0]}` has the name by which checks get something else. Rename it: "
            f'`dataset.rename_column("{taken[0]}", "my_{taken[0]}")`.'
        )


def failure(whose: str, error: Exception, num_answers: int) -> str:
    """What to say when a user's function raised: the kind of error and the place, never its words."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    if frames:
        where = f"{Path(frames[0].filename).name}, line {frames[0].lineno}"
        cure = "Try it on an answer of your own"
    else:
        where = "as it was called"
        cure = "It is called with `prompts`, `completions`, `completion_ids` and every other column by name"
    return (
        f"The {whose} raised {type(error).__name__} on {num_answers} answers ({where}). {cure}; its own words may "
        "quote a row and are kept in this error's `__context__` alone."
    )


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


def first_weights(num_human_alone: Tensor, num_imitator_alone: Tensor) -> Tensor:
    """Where the weights of C checks begin: nats, from the pairs in which one side alone passes.

        w_c = 1/C log( (n_human + 1/2) / (n_imitator + 1/2) )

    Without the 1/2s, which keep it finite, and with one check that is the maximum of Bradley and Terry's likelihood. C
    checks may all say the same; then their sum is right.

    Args:
        num_human_alone: number of pairs in which the human's answer passes and the imitator's fails; of outcomes
            between 0 and 1, the sum of the differences. [C].
        num_imitator_alone: the other way round. [C].

    Returns:
        Weights. [C].

    Source:
        McNemar's conditional estimate of the odds ratio in matched pairs; Haldane's and Anscombe's 1/2.
    """
    return torch.log((num_human_alone + 0.5) / (num_imitator_alone + 0.5)) / len(num_human_alone)
