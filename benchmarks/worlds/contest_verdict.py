"""What the contest's cells add up to: intervals over questions and seeds, the table, the frontier and the verdict.

A cell's numbers are sums by groups of questions, the same groups for every arm; a bootstrap draws groups and seeds.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

MARGIN_BITS = 0.1  # what a human answer may cost more and still count as no loss
MARGIN_ACCURACY = 0.01  # another temperature than 1 is taken where judges' mean accuracy on dev rows is so much lower
NEAR_ACCURACY, NEAR_BITS = 0.02, 0.2  # of SFT's best on dev rows: what may be the best on test rows
NUM_REPLICATES, CONFIDENCE = 4000, 0.95
# Baselines, the same thing by another name, and what answers with a larger model: the verdict is about the others.
NOT_OURS = (
    "SFT",
    "SFT continued",
    "retrodictive",
    "larger model",
    "larger model, longer",
    "larger model, one of 8",
    "rejection sampling",
    "SFT, first of 8 that passes",
    "rejection, first of 8 that passes",
    "rejection, first of 32 that passes",
)

Measured = dict[float, dict[int, dict[str, Any]]]  # temperature -> seed -> what was measured


class Estimate(NamedTuple):
    """A mean and its interval."""

    value: float
    low: float
    high: float


class Sums(NamedTuple):
    """One law: wins of each judge and bits, by seed and group of questions. [S, J, G] and [S, G]."""

    wins: np.ndarray
    pairs: np.ndarray
    bits: np.ndarray
    scored: np.ndarray
    seeds: list[int]


def sums(by_seed: dict[int, dict[str, Any]], judges: Sequence[str]) -> Sums:
    """Of one law, by those judges."""
    seeds = sorted(by_seed)
    cells = [by_seed[seed] for seed in seeds]
    wins = np.array([[cell["judges"][name]["wins"] for name in judges] for cell in cells], float).reshape(
        len(cells), len(judges), 2, -1
    )
    bits = np.array([cell["bits_by_group"] for cell in cells], float)
    return Sums(wins[:, :, 0], wins[:, :, 1], bits[:, 0], bits[:, 1], seeds)


class Draw(NamedTuple):
    """How often each seed and each group of questions counts in one replicate."""

    seeds: dict[int, int]
    groups: np.ndarray


def draws(seeds: Sequence[int], num_groups: int, rng: np.random.Generator, num: int = NUM_REPLICATES) -> list[Draw]:
    """Bootstrap replicates: seeds and groups, each drawn with replacement."""
    found = []
    for _ in range(num):
        counts = np.bincount(rng.integers(len(seeds), size=len(seeds)), minlength=len(seeds))
        groups = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
        found.append(Draw(dict(zip(seeds, counts.tolist(), strict=True)), groups))
    return found


def means(law: Sums, draw: Draw | None = None) -> tuple[float, float]:
    """Judges' mean accuracy, and mean bits; NaN where a replicate has no seed or no question of this law."""
    groups = np.ones(law.bits.shape[1]) if draw is None else draw.groups
    weights = np.array([1 if draw is None else draw.seeds.get(seed, 0) for seed in law.seeds], float)
    if not weights.sum() or not (law.pairs @ groups).all() or not (law.scored @ groups).all():
        return float("nan"), float("nan")
    accuracy = (law.wins @ groups / (law.pairs @ groups)).mean(axis=1)
    bits = law.bits @ groups / (law.scored @ groups)
    return float(weights @ accuracy / weights.sum()), float(weights @ bits / weights.sum())


def interval(values: Sequence[float], at: float) -> Estimate:
    """The percentile interval of replicates, around what was measured."""
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return Estimate(at, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(at, float(low), float(high))


class Verdict(NamedTuple):
    """One arm against the whole frontier of SFT.

    Attributes:
        accuracy, bits: the arm's.
        less_seen: its accuracy minus the lowest on the frontier.
        dearer: its bits minus the fewest on the frontier.
        left: its advantage over 1/2 minus half of the frontier's smallest.
        less_seen_by_seeds: as `less_seen`, each seed against its own frontier; Student's interval over seeds alone.
        beyond, halves: whether the intervals lie where the aims say; both of `less_seen`'s below 0.
    """

    accuracy: Estimate
    bits: Estimate
    less_seen: Estimate
    dearer: Estimate
    left: Estimate
    less_seen_by_seeds: Estimate
    beyond: bool
    halves: bool


def verdict(arm: Sums, frontier: Sequence[Sums], seed: int = 0, num: int = NUM_REPLICATES) -> Verdict:
    """Whether an arm is beyond *both ends* of SFT's frontier, and halves the judges' advantage.

    Beyond: no temperature of SFT is found less often by judges, and none costs over `MARGIN_BITS` less. The frontier's
    best is taken anew in each replicate, which favours SFT. Only seeds of the arm count, for both.
    """
    everyone = draws(arm.seeds, arm.bits.shape[1], np.random.default_rng(seed), num)
    own_frontier = [_of_seeds(law, arm.seeds) for law in frontier if set(law.seeds) & set(arm.seeds)]

    def differences(draw: Draw | None) -> tuple[float, ...]:
        accuracy, bits = means(arm, draw)
        others = np.array([means(law, draw) for law in own_frontier])
        best_accuracy, best_bits = np.fmin.reduce(others)  # a replicate may lack the seeds of a temperature
        return accuracy, bits, accuracy - best_accuracy, bits - best_bits, accuracy - 0.5 - (best_accuracy - 0.5) / 2

    replicates = np.array([differences(draw) for draw in everyone])
    found = [interval(column, at) for column, at in zip(replicates.T, differences(None), strict=True)]
    own = []
    for seed in arm.seeds:
        others = [means(_of_seeds(law, [seed]))[0] for law in own_frontier if seed in law.seeds]
        own += [means(_of_seeds(arm, [seed]))[0] - min(others)] if others else []
    by_seeds = student(own)
    is_less_seen = found[2].high < 0 and by_seeds.high < 0
    beyond = is_less_seen and found[3].high <= MARGIN_BITS
    # Who is not told apart from SFT has halved nothing, however little there was to halve.
    return Verdict(*found, by_seeds, bool(beyond), bool(found[4].high < 0 and is_less_seen))


def student(values: Sequence[float]) -> Estimate:
    """The mean of a few normal values with Student's interval; without bounds for fewer than two.

    A bootstrap over so few seeds is too narrow: over two it covers half of the time.
    """
    mean = float(np.mean(values)) if len(values) else float("nan")
    if len(values) < 2:
        return Estimate(mean, -float("inf"), float("inf"))
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return Estimate(mean, mean - float(reach), mean + float(reach))


def _of_seeds(law: Sums, seeds: Sequence[int]) -> Sums:
    common = [seed for seed in law.seeds if seed in seeds]
    places = [law.seeds.index(seed) for seed in common]
    return Sums(*(part[places] for part in law[:4]), common)


def estimate(law: Sums, seed: int = 0, num: int = NUM_REPLICATES) -> tuple[Estimate, Estimate]:
    """Accuracy and bits of one law with their intervals."""
    replicates = np.array(
        [means(law, d) for d in draws(law.seeds, law.bits.shape[1], np.random.default_rng(seed), num)]
    )
    accuracy, bits = (interval(column, at) for column, at in zip(replicates.T, means(law), strict=True))
    return accuracy, bits


def chosen_temperature(measured: Measured, judges: Sequence[str]) -> float:
    """1, unless judges' mean accuracy is lower elsewhere by `MARGIN_ACCURACY`: they are noisy, and 1 is the law.

    Seeds that were asked at each temperature decide.
    """
    swept = set.intersection(*(set(by_seed) for by_seed in measured.values()))
    accuracy = {t: means(sums({seed: by_seed[seed] for seed in swept}, judges))[0] for t, by_seed in measured.items()}
    best = min(accuracy, key=lambda t: (accuracy[t], abs(t - 1)))
    return best if 1.0 not in accuracy or accuracy[best] <= accuracy[1.0] - MARGIN_ACCURACY else 1.0


def ends_of_frontier(measured: Measured, judges: Sequence[str]) -> list[float]:
    """The temperatures that may be found least often or cost the fewest bits on other rows, and 1."""
    found = {t: means(sums(by_seed, judges)) for t, by_seed in measured.items()}
    accuracy, bits = (min(values) for values in zip(*found.values(), strict=True))
    near = {t for t, seen in found.items() if seen[0] <= accuracy + NEAR_ACCURACY or seen[1] <= bits + NEAR_BITS}
    return sorted({1.0, *near})


def best_arm(arms: dict[str, Sums], frontier: Sequence[Sums]) -> str | None:
    """Of ours, by judges' accuracy among those whose bits are no loss; of all of ours where none is such.

    By the seeds that all have.
    """
    ours = {name: law for name, law in arms.items() if name not in NOT_OURS}
    if not ours:
        return None
    common = sorted(set.intersection(*(set(law.seeds) for law in (*ours.values(), *frontier))))
    ours = {name: _of_seeds(law, common) for name, law in ours.items()}
    fewest = min(means(_of_seeds(law, common))[1] for law in frontier)
    no_loss = {name: law for name, law in ours.items() if means(law)[1] <= fewest + MARGIN_BITS}
    return min(no_loss or ours, key=lambda name: means(ours[name])[0])


# --- shown


def row(arm: str, temperature: float, by_seed: dict[int, dict[str, Any]], facts: list[dict], judges: Sequence[str]):
    """One line of the table."""
    cells = [by_seed[seed] for seed in sorted(by_seed)]
    accuracy, bits = estimate(sums(by_seed, judges), num=1000)

    def mean(key: str) -> float | str:
        values = [cell[key] for cell in cells if key in cell]
        return round(float(np.mean(values)), 3) if values else ""

    names = list(cells[0]["judges"])
    each = {name: round(float(np.mean([cell["judges"][name]["accuracy"] for cell in cells])), 3) for name in names}
    judge_bits = np.mean([cell["judges"][name]["bits"] for cell in cells for name in judges])
    return {
        "arm": arm,
        "T": temperature,
        "seeds": len(cells),
        "judges": f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]",
        **each,
        "judge bits": round(float(judge_bits), 3),
        "bits": f"{bits.value:.2f} [{bits.low:.2f}, {bits.high:.2f}]",
        "bias": mean("bias"),
        "oracle": mean("oracle"),
        "passed": mean("passed"),
        "length": mean("length"),
        "self-BLEU": mean("self_bleu"),
        "humans'": mean("self_bleu_of_humans"),
        "CPU s": round(float(np.mean([fact["cpu_seconds"] for fact in facts])), 0),
        "CPU ms": round(float(np.mean([fact["milliseconds"] for fact in facts])), 2),
    }


def plot(
    frontier: dict[float, Sums], arms: dict[str, Sums], headline: Collection[str], judges: str, title: str, path: Path
) -> None:
    """One line to an arm: judges' accuracy, and bits beyond fine-tuning's fewest on the same questions and seeds.

    Args:
        frontier: temperature -> fine-tuning at it.
        arms: name -> the others, at their own temperature.
        headline: the names that are set off.
        judges: whose accuracy it is, in words.
        title: of the figure.
        path: where it is written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sft = {f"SFT, T = {temperature:g}": law for temperature, law in frontier.items()}
    order = sorted({**sft, **arms}.items(), key=lambda item: -means(item[1])[0])
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(8.6, 1.3 + 0.24 * len(order)), layout="constrained", sharey=True, width_ratios=(1.0, 1.0)
    )
    reach = max(1.0, *(abs(means(law)[1] - _fewest(law, frontier)) for name, law in order if name in headline)) * 1.3
    for place, (name, law) in enumerate(order):
        seen = verdict(law, list(frontier.values()), num=500)
        color = "#888888" if name in sft else "#c06030" if name in headline else "#4878a8"
        style = {"fmt": "o", "ms": 3.5, "lw": 1.0, "color": color}
        for axis, value in ((left, seen.accuracy), (right, seen.dearer)):
            if axis is right and value.value > reach:
                axis.annotate(
                    f"{value.value:+.1f} \u2192", (reach, place), ha="right", va="center", fontsize=7, color=color
                )
                continue
            bars = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
            axis.errorbar(value.value, place, xerr=bars, **style)
    left.set_yticks(range(len(order)), [f"{name} ({len(law.seeds)})" for name, law in order], fontsize=7)
    for tick, (name, _) in zip(left.get_yticklabels(), order, strict=True):
        tick.set_color("#c06030" if name in headline else "#555555" if name in sft else "black")
    left.axvline(0.5, color="black", lw=0.8, ls="--")
    right.axvline(0.0, color="#888888", lw=0.8)
    right.axvline(MARGIN_BITS, color="#888888", lw=0.8, ls=":")
    right.set_xlim(right=reach * 1.02)
    left.set_xlabel(f"accuracy of {judges} (dashed: chance)", fontsize=8)
    right.set_xlabel(f"bits beyond SFT's fewest (dotted: the margin, {MARGIN_BITS:g})", fontsize=8)
    for axis in (left, right):
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", lw=0.3, color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}; left is better in both; seeds in brackets; bars: 95 %", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _fewest(law: Sums, frontier: dict[float, Sums]) -> float:
    return min(
        means(_of_seeds(other, law.seeds))[1] for other in frontier.values() if set(other.seeds) & set(law.seeds)
    )
