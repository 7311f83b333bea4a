"""Every certified statement, with the assumption it rests on."""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, binom, norm


class Interval(NamedTuple):
    """Both ends of an interval, `low` <= `high`."""

    low: float
    high: float


def clopper_pearson(
    num_correct: float, num_trials: int, confidence: float = 0.95, side: str = "two-sided"
) -> Interval:
    """Exact confidence interval for a probability, from counted successes.

    The lower end is the probability under which `num_correct` or more successes are just rare enough, the upper
    end mirrors it; each is a quantile of a beta law. It covers the truth with *at least* `confidence` whatever the
    truth is, if the trials are independent with one success probability.

    A tie is half a success, the mean of a fair coin. A half-integer count is rounded against the claim: down for
    the lower end, up for the upper end. A tie varies less than the coin that would replace it, so coverage stays at
    least `confidence` (checked by enumeration in the tests, for up to 40 trials and confidences from 0.8 to 0.99).

    Args:
        num_correct (`float`): successes, from 0 to `num_trials`; ties add 1/2 each.
        num_trials (`int`): independent trials.
        confidence (`float`, *optional*, defaults to `0.95`): coverage, strictly between 0 and 1.
        side (`str`, *optional*, defaults to `"two-sided"`): `"lower"` gives `(low, 1)` and `"upper"` gives
            `(0, high)`, each with all the error on its side.

    Returns:
        `Interval(low, high)`, probabilities.

    Raises:
        ValueError: no trials, a count outside 0 to `num_trials`, a confidence outside (0, 1), an unknown side.

    Source:
        Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
        Biometrika 26 (1934).
    """
    if num_trials < 1 or not 0 <= num_correct <= num_trials:
        raise ValueError(
            f"Need `num_trials` >= 1 and 0 <= `num_correct` <= `num_trials`; got {num_correct} of {num_trials}."
        )
    _check_probability("confidence", confidence)
    if side not in ("two-sided", "lower", "upper"):
        raise ValueError(f"`side` is {side!r}; use 'two-sided', 'lower' or 'upper'.")
    error = (1 - confidence) / 2 if side == "two-sided" else 1 - confidence
    fewest, most = math.floor(num_correct), math.ceil(num_correct)
    low = float(beta.ppf(error, fewest, num_trials - fewest + 1)) if fewest and side != "upper" else 0.0
    high = float(beta.isf(error, most + 1, num_trials - most)) if most < num_trials and side != "lower" else 1.0
    return Interval(low, high)


def total_variation_lower_bound_paired(num_correct: float, num_pairs: int, confidence: float = 0.95) -> float:
    """Lower-bound the total variation between human and imitator answers, in [0, 1]; 0 proves nothing.

    Each pair shows a judge one human and one imitator answer to the same question. A judge picks the human's
    with probability a <= 1/2 + TV - TV^2/2, so TV >= 1 - sqrt(2 - 2a). (2a - 1 would claim too much.) The bound is
    on the total variation averaged over questions.

    Args:
        num_correct (`float`): pairs in which the judge picked the human's answer; ties count 1/2.
        num_pairs (`int`): held-out pairs, one per question, the two answers drawn independently. A judge tested on
            its training pairs bounds nothing.
        confidence (`float`, *optional*, defaults to `0.95`): one-sided; the bound holds with at least this
            probability.

    Raises:
        ValueError: `num_pairs` is 0, or `num_correct` is not between 0 and `num_pairs`.

    Source:
        Clopper and Pearson (1934) for a; Sadasivan et al., "Can AI-Generated Text be Reliably Detected?", for the
        inequality. https://huggingface.co/papers/2303.11156
    """
    accuracy = clopper_pearson(num_correct, num_pairs, confidence, side="lower").low
    return 0.0 if accuracy <= 0.5 else 1 - math.sqrt(2 - 2 * accuracy)


def num_pairs_for_advantage(advantage: float, power: float = 0.8, level: float = 0.05) -> int:
    """How many pairs a test needs to notice a judge that is right with probability 1/2 + `advantage`.

    The test is the exact one-sided binomial test of accuracy 1/2. Its power rises in teeth as pairs are added (the
    critical count is an integer); the number returned is the one *from which on* it stays at or above `power`.

    Args:
        advantage (`float`): accuracy minus 1/2, in (0, 1/2].
        power (`float`, *optional*, defaults to `0.8`): wanted probability of noticing.
        level (`float`, *optional*, defaults to `0.05`): allowed probability of a false alarm.

    Returns:
        `int`, pairs; 169 for an advantage of 0.1, 654 for 0.05, 3945 for 0.02.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0 < advantage <= 0.5:
        raise ValueError(f"`advantage` is accuracy minus 1/2 and must lie in (0, 0.5]; got {advantage}.")
    _check_probability("power", power)
    _check_probability("level", level)
    deviation = norm.isf(level) / 2 + norm.ppf(power) * math.sqrt(0.25 - advantage**2)
    # The normal approximation is off by about two teeth; the search leaves ten and a half of it on either side.
    approximation = math.ceil(max(deviation, 0.0) ** 2 / advantage**2)
    reach = math.ceil(10 / advantage) + approximation // 2
    num_pairs = np.arange(max(1, approximation - reach), approximation + reach + 1)
    # `isf` gives the largest count that is still exceeded too often under a fair coin.
    largest_accepted = binom.isf(level, num_pairs, 0.5)
    is_too_weak = binom.sf(largest_accepted, num_pairs, 0.5 + advantage) < power
    return int(num_pairs[is_too_weak][-1]) + 1 if is_too_weak.any() else 1


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must lie strictly between 0 and 1; got {value}.")
