"""Sudoku, in an absolute sense: the game solves more than likelihood alone from the same start, at no more bits.

The imitator starts at the best step of supervised fine-tuning. The game gets the same human rows, questions that
nobody answered, and a check. Its controls get likelihood alone: for as many steps, at the better of two rates; and for
as much CPU time, spent on seven annealed runs of which validation rows choose the run and its step. Solve rates are
exact: with one right string per puzzle they are the mean of exp(log p(human answer)). The test over grids is about
these three seeds and this split of the grids.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worlds import sudoku_arms as arms
from benchmarks.worlds.sudoku import SEEDS, STARTS, data

CELLS = [{"seed": seed, "arm": arm} for seed in SEEDS for arm in ("game", "likelihood, steps", "likelihood, time")]
RATES = (arms.RATE, arms.RATE / 8)


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train one arm of one seed; of a control's runs, the one with the fewest bits on validation rows counts."""
    seed = cell["seed"]
    if cell["arm"] == "game":
        before = arms.log_probs(arms.start(seed, STARTS), data().test).tolist()
        return arms.game(seed, STARTS) | {"start": [round(x, 4) for x in before]}
    if cell["arm"] == "likelihood, steps":
        runs = [arms.likelihood(seed, STARTS, arms.NUM_STEPS, rate) for rate in RATES]
        best = max(runs, key=lambda run: run["curve"][-1]["validation_nats"])
    else:
        runs = [arms.likelihood(seed, STARTS, num_steps, rate) for rate, num_steps in arms.SCHEDULES]
        best = max(runs, key=lambda run: max(reading["validation_nats"] for reading in run["curve"]))
    others = [{key: run[key] for key in ("rate", "num_steps", "curve")} for run in runs if run is not best]
    return best | {"cpu_seconds": round(sum(run["cpu_seconds"] for run in runs), 1), "others": others}


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per seed and law, and the game against both controls over the 88 grids, seeds averaged within a grid."""
    laws = laws_by_seed(results)
    rows = [
        {"compared": name, "seed": seed, **arms.rates(np.array(log_probs))}
        for name, by_seed in laws.items()
        for seed, log_probs in sorted(by_seed.items())
    ]
    passed = True
    for control in ("likelihood, steps", "likelihood, time"):
        verdict = compare(laws["game"], laws[control])
        passed &= verdict["holds"]
        rows.append({"compared": f"game - ({control})", "seed": "mean", **verdict})
    return [{key: row.get(key, "") for key in (*rows[0], *rows[-1])} for row in rows], passed


def laws_by_seed(results: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Log-probs of the test answers by arm and seed: the game and the equal-step control after their last step, the
    equal-time control at its best."""
    laws: dict[str, dict[int, list[float]]] = {"start": {}}
    for entry in results:
        seed, arm, result = entry["cell"]["seed"], entry["cell"]["arm"], entry["result"]
        laws.setdefault(arm, {})[seed] = result["best" if arm == "likelihood, time" else "last"]
        if "start" in result:
            laws["start"][seed] = result["start"]
    return laws


def compare(game: dict[int, list[float]], control: dict[int, list[float]]) -> dict[str, Any]:
    """The claim of the game against one control, over grids.

    Returns:
        `dict`: gain in solve rate; bits per answer more (negative: fewer) with their one-sided 95 % upper limit (t
        over grids); p of the sign-flip test of the gain; whether all three hold.
    """
    seeds = sorted(game)
    ours, theirs = (np.array([law[seed] for seed in seeds]) for law in (game, control))
    gain = by_grid((np.exp(ours) - np.exp(theirs)).mean(axis=0))
    bits = by_grid(((theirs - ours) / np.log(2)).mean(axis=0))
    # Student's t with 87 degrees of freedom.
    upper = bits.mean() + 1.6626 * bits.std(ddof=1) / np.sqrt(len(bits))
    p = sign_flip_p(gain)
    return {
        "solved": float(gain.mean()),
        "bits": float(bits.mean()),
        "bits at most": float(upper),
        "p": p,
        "holds": bool(gain.mean() >= 0.05 and upper <= 0.1 and p < 0.01),
    }


def by_grid(values: np.ndarray) -> np.ndarray:
    """Mean over each grid's test puzzles, [88]."""
    grids = np.array([puzzle.grid for puzzle in data().test])
    return np.array([values[grids == grid].mean() for grid in np.unique(grids)])


def sign_flip_p(differences: np.ndarray, num_flips: int = 99_999, seed: int = 0) -> float:
    """One-sided p of a mean above 0 were each sign as likely as the other; the observed signs count as one draw."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(num_flips, len(differences)))
    as_large = ((signs * differences).mean(axis=1) >= differences.mean() - 1e-12).sum()
    return float((1 + as_large) / (1 + num_flips))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Histogram of p(human answer) over the test puzzles, all seeds: the start, both controls, and the game."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    laws = laws_by_seed(results)
    figure, axes = pyplot.subplots(1, len(laws), figsize=(3.1 * len(laws), 2.8), sharey=True, layout="constrained")
    for axis, (name, by_seed) in zip(axes, laws.items(), strict=True):
        log_probs = np.array([by_seed[seed] for seed in sorted(by_seed)])
        probs = np.exp(log_probs).ravel()
        measured = arms.rates(log_probs)
        axis.hist(probs, bins=20, range=(0, 1), weights=np.full(len(probs), 1 / len(probs)), color="#4878a8")
        axis.set_title(f"{name}\nsolved {measured['solved']:.1%}, {measured['bits']:.2f} bits", fontsize=9)
        axis.set_xlabel("p(human answer)")
    axes[0].set_ylabel("share of test puzzles")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
