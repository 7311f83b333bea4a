"""Sudoku: one of K answers, kept by a distinguisher that can check; and what one round moves into the weights.

The imitator is the start of the other Sudoku entries, fitted by likelihood to 1 800 puzzles that a human solved. It
stands still while a distinguisher with the check learns; from then on one of K answers is kept. The human always gives
the one right answer, so the rate of solved puzzles *is* the mean of p_K(human answer), which has unbiased estimates:
nothing has to be sampled for it (answers are, as a cross-check). The round of distillation answers 6 000 puzzles that
nobody solved, keeps one of 8 answers to each without asking the check any further, and learns these beside the human's
rows by likelihood.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.worlds import sudoku_arms as arms
from benchmarks.worlds.sudoku import SEEDS, STARTS, Puzzle, data, solved, tokenizer
from hf_imitate import AdversarialConfig, AdversarialTrainer, Imitator, RetrodictiveConfig, RetrodictiveTrainer
from hf_imitate.log_probs import nats_to_bits

CELLS = [{"seed": seed} for seed in SEEDS]
ESTIMATES = {1: 1, 2: 16, 4: 8, 8: 8, 16: 8}  # K: estimates inside the log
NUM_SCORED, NUM_PICKED = 300, 6000
DISTINGUISHER_STEPS, DISTINGUISHER_BATCH, DISTINGUISHER_RATE = 240, 64, 1e-4
DISTIL_STEPS, DISTIL_RATE = 500, 3e-4


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Fit the distinguisher of one seed, measure each K, distil once and measure again."""
    seed = cell["seed"]
    begun = time.process_time()
    imitator = residual(seed)
    trained = time.process_time()
    scored = data().test[:NUM_SCORED]
    by_k = {str(k): measured(imitator, scored, k, num, seed) for k, num in ESTIMATES.items()}
    begun_again = time.process_time()
    student, num_solved = distilled(imitator, seed)
    weight = imitator.distinguisher.check_weights.item()
    return {
        "K": by_k,
        "check_weight": weight,
        "distinguisher_cpu_seconds": round(trained - begun, 1),
        "distilled": measured(student, scored, 1, 1, seed)
        | {"picked_solved": num_solved, "train_cpu_seconds": round(time.process_time() - begun_again, 1)},
    }


def residual(seed: int) -> Imitator:
    """The start, with a distinguisher that can check: a copy of the start that reads the check's outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = AdversarialTrainer(
            model=arms.start(seed, STARTS),
            args=AdversarialConfig(
                output_dir=scratch,
                use_cpu=True,
                seed=seed,
                freeze_imitator=True,
                max_steps=DISTINGUISHER_STEPS,
                per_device_train_batch_size=DISTINGUISHER_BATCH,
                num_generations=2,
                max_completion_length=arms.MAX_TOKENS,
                distinguisher_lm_warmup_steps=0,
                distinguisher_warmup_steps=0,
                distinguisher_learning_rate=DISTINGUISHER_RATE,
                lr_scheduler_type="constant",  # the check's weight has a long way to go
                report_to="none",
                save_strategy="no",
                logging_steps=50,
                disable_tqdm=True,
            ),
            train_dataset=rows_of(data().train),
            distinguisher=arms.start(seed, STARTS),
            checks=[solved],
            processing_class=tokenizer(),
        )
        trainer.train()
    return Imitator(
        trainer.model.eval(), tokenizer(), distinguisher=trainer.distinguisher, max_new_tokens=arms.MAX_TOKENS
    )


def rows_of(puzzles: list[Puzzle]) -> Dataset:
    """Questions and the human's answers."""
    return Dataset.from_dict(
        {"prompt": [one.question for one in puzzles], "completion": [one.answer for one in puzzles]}
    )


def measured(imitator: Imitator, puzzles: list[Puzzle], k: int, num_estimates: int, seed: int) -> dict[str, float]:
    """Rate of solved puzzles and bits per human answer where one of K is kept; sampled answers; CPU time of one."""
    questions, humans = ([getattr(one, name) for one in puzzles] for name in ("question", "answer"))
    law: dict[str, Any] = {"resample": k, "checks": [solved] if k > 1 else None, "batch_size": 256}
    found = imitator.log_prob(questions, humans, seed=seed, num_estimates=num_estimates if k > 1 else None, **law)
    nats = found.nats.numpy()
    begun = time.process_time()
    given = [own[0] for own in imitator.answer(questions, seed=seed, **law)]
    seconds = (time.process_time() - begun) / len(questions)
    return {
        "solved": float(np.exp(nats).mean()),
        "solved_of_sampled": float(np.mean(solved(questions, given))),
        "bits": nats_to_bits(float(-nats.mean())),
        "standard_error_of_bits": nats_to_bits(float(nats.std(ddof=1) / math.sqrt(len(nats)))),
        "cpu_seconds": seconds,
    }


def distilled(imitator: Imitator, seed: int) -> tuple[Imitator, float]:
    """Likelihood of the human's rows and of picked answers to puzzles nobody solved; how many of those are right."""
    questions = [one.question for one in data().unlabelled[:NUM_PICKED]]
    law: dict[str, Any] = {"resample": 8, "checks": [solved]}
    drawn = imitator.answer(questions, seed=seed + 1000, batch_size=256, **law)
    picked = [Puzzle(question, own[0], -1) for question, own in zip(questions, drawn, strict=True) if own[0]]
    rate = float(np.mean(solved([one.question for one in picked], [one.answer for one in picked])))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RetrodictiveTrainer(
            model=arms.start(seed, STARTS),
            args=RetrodictiveConfig(
                output_dir=scratch,
                use_cpu=True,
                seed=seed,
                max_steps=DISTIL_STEPS,
                per_device_train_batch_size=96,
                learning_rate=DISTIL_RATE,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                report_to="none",
                save_strategy="no",
                logging_steps=100,
                disable_tqdm=True,
            ),
            train_dataset=rows_of([*data().train, *picked]),
            processing_class=tokenizer(),
        )
        trainer.train()
    return Imitator(trainer.model.eval(), tokenizer(), max_new_tokens=arms.MAX_TOKENS), rate


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per seed and law. Claimed: more is solved at each larger K up to 8, at fewer bits. What share of that
    gain in solved puzzles a round of distillation keeps at K = 1 is reported."""
    rows, holds = [], []
    for entry in results:
        seed, result = entry["cell"]["seed"], entry["result"]
        laws = {f"K = {k}": law for k, law in result["K"].items()} | {"distilled, K = 1": result["distilled"]}
        rows += [
            {
                "seed": seed,
                "law": name,
                "solved": round(law["solved"], 3),
                "of sampled": round(law["solved_of_sampled"], 3),
                "bits": round(law["bits"], 2),
                "s.e.": round(law["standard_error_of_bits"], 2),
                "CPU ms": round(1000 * law["cpu_seconds"], 2),
                "gain kept": round(share_kept(result["K"], law), 2),
            }
            for name, law in laws.items()
        ]
        solve_rates = [result["K"][str(k)]["solved"] for k in (1, 2, 4, 8)]
        fewer = result["K"]["8"]["bits"] < result["K"]["1"]["bits"]
        holds.append(solve_rates == sorted(solve_rates) and fewer)
    return rows, all(holds)


def share_kept(by_k: dict[str, dict[str, float]], law: dict[str, float]) -> float:
    """A law's share of what K = 8 solves more than K = 1; 0 where that is nothing."""
    gain = by_k["8"]["solved"] - by_k["1"]["solved"]
    return (law["solved"] - by_k["1"]["solved"]) / gain if gain > 0 else 0.0


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Solved puzzles and bits against K, and after one round at K = 1."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    ks = list(ESTIMATES)
    for entry in results:
        for axis, name in zip(panels, ("solved", "bits"), strict=True):
            axis.plot(ks, [entry["result"]["K"][str(k)][name] for k in ks], "o-", ms=3, color="#4878a8")
            axis.plot(1, entry["result"]["distilled"][name], "s", color="#c06030")
    for axis, label in zip(panels, ("share of test puzzles solved", "bits per human answer"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("K (square: distilled once)")
        axis.set_ylabel(label)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
