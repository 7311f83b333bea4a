"""Sudoku: others with the same information and CPU time. Nothing is claimed: the table says who wins at what.

Rejection-sampling fine-tuning and GRPO know the check and the unlabelled questions, too; temperature costs nothing.
"""

from typing import Any

from benchmarks.worlds import sudoku_arms as arms
from benchmarks.worlds.sudoku import SEEDS, STARTS
from hf_imitate.log_probs import nats_to_bits

GRPO_RATE = 2e-4  # of that and the game's own 8e-4, at which it collapses, on the seed that settings were found on
CELLS = [{"seed": seed, "arm": arm} for seed in SEEDS for arm in ("temperature", "rejection sampling", "GRPO")]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train one rival of one seed for the CPU time of the game, measured here and now."""
    seed, arm = cell["seed"], cell["arm"]
    if arm == "temperature":
        return arms.tempered(seed, STARTS)
    seconds = arms.seconds_per_game_step(seed, STARTS) * (arms.NUM_STEPS + arms.NUM_WARMUP)
    if arm == "GRPO":
        num_trial = 30
        per_step = arms.grpo(seed, STARTS, num_trial)["cpu_seconds"] / num_trial
        return arms.grpo(seed, STARTS, int(seconds / per_step), GRPO_RATE)
    num_trial = 2 * arms.REJECTION_STEPS
    per_step = arms.rejection(seed, STARTS, seconds, num_trial)["cpu_seconds"] / num_trial
    return arms.rejection(seed, STARTS, seconds, int(seconds / per_step))


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Exact solve rate and bits per human answer; for the start's temperature, chosen by solve rate on validation."""
    rows = arms.table([entry for entry in results if entry["cell"]["arm"] != "temperature"])
    for entry in results:
        if entry["cell"]["arm"] == "temperature":
            best = max(entry["result"]["curve"], key=lambda reading: reading["validation_solve_rate"])
            name = f"start at temperature {best['temperature']}"
            bits = nats_to_bits(-best["test_nats"])
            row = {"arm": name, "seed": entry["cell"]["seed"], "solved": best["solve_rate"], "bits": bits}
            rows.append({key: row.get(key, "") for key in rows[0]} if rows else row)
    return rows, True
