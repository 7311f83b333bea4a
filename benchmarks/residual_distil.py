"""Rounds of distillation on the notes: what of the gain of one-of-8 stays in the weights, at K = 1.

The imitator could hold the human's law, since it sees everything, but was shown 400 rows; the distinguisher has read
5 000, as a language model first. A round keeps one of 8 answers to each of 2 400 questions that no human answered,
four times, learns these and the 400 rows by likelihood from where the imitator was, and fits a fresh distinguisher to
the new imitator ([`worlds.notes_arms.distilled`]). Two rounds; all questions are asked in each. Claimed: one round
keeps at least half of what one-of-8 gained, of the judges' advantage and of the bits. More rounds are reported.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import residual
from benchmarks.worlds import notes_arms as arms
from benchmarks.worlds.kept import made
from benchmarks.worlds.notes_arms import FULL, PARTS, Sizes
from hf_imitate.log_probs import nats_to_bits

ROUNDS = (1, 2)
SEEDS = [74, 75, 76]  # chosen before their first run; the settings were found on seeds 71 and 100: docs/log.md
CELLS = [
    *({"part": "training", "seed": seed, "round": number} for seed in SEEDS for number in ROUNDS),
    *({"part": "judges", "seed": seed, "judge": judge} for seed in SEEDS for judge in residual.JUDGES),
    *({"part": "scores", "seed": seed} for seed in SEEDS),
]


def run_cell(cell: dict[str, Any], sizes: Sizes = FULL, folder: Path = PARTS) -> dict[str, Any]:
    """Train one round, let one judge see all imitators, or score them."""
    seed = cell["seed"]
    rounds = [arms.distilled(seed, number, sizes, folder) for number in (0, *ROUNDS)]
    if cell["part"] == "training":
        teacher = arms.residual("large", seed, sizes, folder, rounds[cell["round"] - 1])
        return {"imitator": made(rounds[cell["round"]]), "distinguisher": made(teacher)}
    rows = arms.data(seed, sizes).test
    one_of_8 = arms.load(arms.residual("large", seed, sizes, folder, rounds[0]))
    students = {f"round {number}": (arms.load(path), {}) for number, path in enumerate(rounds)}
    laws: dict[str, tuple[Any, dict[str, int]]] = {"one of 8": (one_of_8, {"resample": 8}), **students}
    if cell["part"] == "judges":
        judge, asked = cell["judge"], rows["prompt"][:]
        return {
            name: arms.judged(
                rows,
                arms.answers(imitator, asked, 50 + judge, **law),
                arms.judge(judge, sizes, folder),
                judge,
            )["accuracy"]
            for name, (imitator, law) in laws.items()
        }
    asked, humans = (rows[name][: sizes.scored] for name in ("prompt", "completion"))
    nats = {
        name: arms.log_prob(imitator, asked, humans, residual.ESTIMATES.get(law.get("resample", 1), 1), **law)["nats"]
        for name, (imitator, law) in laws.items()
    }
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
