"""What [`AdversarialTrainer`] asks of rewards and of the distinguisher's scores, each with the cure in its error."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from trl.trainer.utils import get_callable_name, is_async_callable

from hf_imitate.checks import failure

DISTINGUISHER_REWARD = "distinguisher"


def check_rewards(reward_funcs: Sequence[Any], weights: Sequence[float] | None) -> None:
    """Check the user's own rewards and their weights.

    Raises:
        TypeError: a reward is neither callable nor the name of a model.
        ValueError: a name is the distinguisher's, or the weights are not one finite number for each.
    """
    for func in reward_funcs:
        if not (isinstance(func, str) or callable(func)):
            raise TypeError(
                f"A reward in `reward_funcs` is a {type(func).__name__}; give functions with TRL's reward signature, "
                "reward models, or their repo ids."
            )
        name = func.split("/")[-1] if isinstance(func, str) else getattr(func, "__name__", "")
        if name == DISTINGUISHER_REWARD:
            raise ValueError(
                f"A reward in `reward_funcs` is called '{DISTINGUISHER_REWARD}', the name of the reward this trainer "
                "adds itself. Rename it; a Distinguisher of your own goes to the argument `distinguisher`."
            )
    if weights is not None and len(weights) != len(reward_funcs):
        raise ValueError(
            f"`reward_weights` has {len(weights)} values for {len(reward_funcs)} functions in `reward_funcs`. Give "
            "one weight for each of them; the distinguisher's own reward is not among them and always has weight 1."
        )
    odd = [i for i, w in enumerate(weights or ()) if not (isinstance(w, int | float) and math.isfinite(w))]
    if odd:
        raise ValueError(f"`reward_weights` has values that are no finite numbers, at {odd}. Give finite numbers.")


def guarded(reward: Any, failures: list[Exception]) -> Any:
    """A reward function whose returns are numbers or `None`, or an error that names it; models stay as they are.

    The error is kept, since TRL gathers what all processes pay before it comes back: [`raise_first`] raises it then.

    Args:
        reward: the user's.
        failures: where errors are kept: `RuntimeError` if it raised, of which the kind and the place are said, not the
            words; `TypeError` or `ValueError` if it returned the wrong number of rewards, or something that is no
            finite number.
    """
    if isinstance(reward, str | nn.Module):
        return reward
    name = get_callable_name(reward)

    def checked(returned: Any, prompts: list) -> list[float | None]:
        if returned is None or isinstance(returned, str) or not hasattr(returned, "__len__"):
            raise TypeError(
                f"The reward '{name}' must return a list of {len(prompts)} numbers; got a {type(returned).__name__}."
            )
        if len(returned) != len(prompts):
            raise ValueError(
                f"The reward '{name}' must return {len(prompts)} numbers, one per answer; got {len(returned)}."
            )
        return [_reward(value, name, i) for i, value in enumerate(returned)]

    if is_async_callable(reward):

        @functools.wraps(reward)
        async def call(prompts: list, **kwargs: Any) -> list[float | None]:
            with _kept(failures):
                try:
                    returned = await reward(prompts=prompts, **kwargs)
                except Exception as error:
                    raise RuntimeError(failure(f"reward '{name}'", error, len(prompts))) from None
                return checked(returned, prompts)
            return [None] * len(prompts)

    else:

        @functools.wraps(reward)
        def call(prompts: list, **kwargs: Any) -> list[float | None]:
            with _kept(failures):
                try:
                    returned = reward(prompts=prompts, **kwargs)
                except Exception as error:
                    raise RuntimeError(failure(f"reward '{name}'", error, len(prompts))) from None
                return checked(returned, prompts)
            return [None] * len(prompts)

    call.__name__ = name
    return call


@contextlib.contextmanager
def _kept(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failures.append(error)


def raise_first(failures: list[Exception]) -> None:
    """Raise the first of the errors that were kept, and forget all."""
    first = failures[0] if failures else None
    failures.clear()
    if first is not None:
        raise first


def _reward(value: Any, name: str, index: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"The reward '{name}' returned a {type(value).__name__} for answer {index}; need a number.")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(
            f"The reward '{name}' returned {value} for answer {index}, which would spoil its whole group. Return a "
            "finite number, or None where the reward does not apply."
        )
    return value


def check_paid(rewards: Tensor, names: Sequence[str]) -> None:
    """Check what a generation batch is paid, over all processes; NaN says that an answer has left its group, or that
    a reward does not apply to it.

    Args:
        rewards: by function, the distinguisher's first. [N, F].
        names: of the functions. F.

    Raises:
        FloatingPointError: some reward is infinite.
    """
    bad = rewards.isinf()
    if bad.any():
        which = [name for name, is_bad in zip(names, bad.any(dim=0).tolist(), strict=True) if is_bad]
        raise FloatingPointError(
            f"The rewards {which} of {int(bad.any(dim=1).sum())} of {len(rewards)} answers are infinite. Bound them."
        )


def check_scores(s_imitator: Tensor, s_human: Tensor, has_human: Tensor) -> None:
    """Check what a distinguisher said of a generation batch, over all processes.

    Args:
        s_imitator, s_human: logits; of human answers, NaN where there is none. Same shape.
        has_human: where there is one. Same shape.

    Raises:
        FloatingPointError: some logit is not finite.
    """
    bad = ~s_imitator.isfinite() | (has_human & ~s_human.isfinite())
    if bad.any():
        raise FloatingPointError(
            f"The distinguisher's logits of {int(bad.sum())} of {bad.numel()} pairs are not finite. Lower "
            "`distinguisher_learning_rate`, or load it in fp32."
        )
