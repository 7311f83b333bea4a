"""Rounds of distillation on the digits: what of the gain of one-of-8 stays in the weights, at K = 1.

A round keeps one of 8 answers to each training question, twice, learns these and the human's rows by likelihood from
where the imitator was, and fits a fresh distinguisher to the new imitator ([`worlds.digits_arms.distilled`]). Two
rounds. Claimed: one round keeps at least half of what one-of-8 gained, of the judges' advantage and of the bits. This
imitator has too few weights for the human's law, so the bits are the hard half: likelihood of the human's rows alone
had already brought it to where they fall no more.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import residual
from benchmarks.worlds import digits_arms as arms
from benchmarks.worlds.digits_arms import FULL, PARTS, Sizes
from hf_imitate.log_probs import nats_to_bits

ROUNDS = (1, 2)
SEEDS = residual.SEEDS
CELLS = [
    *({"part": "training", "seed": seed, "round": number} for seed in SEEDS for number in ROUNDS),
    *({"part": "judges", "seed": seed, "judge": judge} for seed in SEEDS for judge in residual.JUDGES),
    *({"part": "scores", "seed": seed} for seed in SEEDS),
]


def run_cell(cell: dict[str, Any], sizes: Sizes = FULL, folder: Path = PARTS) -> dict[str, Any]:
    """Train one round, let one judge see all imitators, or score them."""
    seed = cell["seed"]
    if cell["part"] == "training":
        return arms.made(arms.distilled(seed, cell["round"], sizes, folder))
    rows = arms.data(seed, sizes).test
    begun = arms.load(arms.residual("large", seed, sizes, folder))
    students = {f"round {n}": arms.load(arms.distilled(seed, n, sizes, folder)) for n in ROUNDS}
    if cell["part"] == "judges":
        laws = {"round 0": (begun, 1), "one of 8": (begun, 8)} | {name: (one, 1) for name, one in students.items()}
        judge, asked = cell["judge"], rows["prompt"][:]
        return {
            name: arms.judged(
                rows,
                arms.answers(imitator, asked, 50 + judge, resample=k),
                arms.judge(judge, sizes, folder),
                judge,
            )["accuracy"]
            for name, (imitator, k) in laws.items()
        }
    scored = rows.select(range(sizes.scored))
    nats = {"round 0": arms.log_probs(begun, scored, 1, 1)["nats"]}
    nats["one of 8"] = arms.log_probs(begun, scored, 8, residual.ESTIMATES[8])["nats"]
    nats |= {name: arms.log_probs(one, scored, 1, 1)["nats"] for name, one in students.items()}
    return {name: nats_to_bits(float(-values.mean())) for name, values in nats.items()}


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per data seed and imitator, and the shares of the gain that are kept."""
    rows, holds = [], []
    for seed in dict.fromkeys(entry["cell"]["seed"] for entry in results):
        own = [entry for entry in results if entry["cell"]["seed"] == seed]
        bits = next(entry["result"] for entry in own if entry["cell"]["part"] == "scores")
        seen = [entry["result"] for entry in own if entry["cell"]["part"] == "judges"]
        accuracy = {name: float(np.mean([one[name] for one in seen])) for name in bits}
        kept = {name: (share_kept(accuracy, name), share_kept(bits, name)) for name in bits}
        rows += [
            {
                "seed": seed,
                "law": name,
                "judges": round(accuracy[name], 3),
                "bits": round(bits[name], 3),
                "of the judges' gain": round(kept[name][0], 2),
                "of the bits gained": round(kept[name][1], 2),
            }
            for name in bits
        ]
        holds.append(min(kept["round 1"]) >= 0.5)
    return rows, all(holds)


def share_kept(measured: dict[str, float], name: str) -> float:
    """What one law keeps of the gain of one-of-8 over round 0, where less is better; 0 where there was no gain."""
    gain = measured["round 0"] - measured["one of 8"]
    return (measured["round 0"] - measured[name]) / gain if gain > 0 else 0.0
