"""What checkpoints cost a run whose steps are of a usual size for a CPU, in CPU time, counted where it is spent."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CELLS = [{"kind": kind} for kind in ("adversarial", "retrodictive", "latent")]
STEPS, SAVES = 12, (6, 9, 12)
EVERY = 50  # steps; transformers saves every 500
MOST = 0.02
LARGE_MIB = 256
PROGRAM = "import sys; from benchmarks.worlds.reliability import overhead; overhead.main(*sys.argv[1:])"
CHECKOUT = Path(__file__).resolve().parents[3]
# Three million weights; 16 answers of up to 32 tokens in a step.
SIZES: dict[str, dict[str, Any]] = {
    "adversarial": {
        **{"imitator_warmup_steps": 0, "distinguisher_warmup_steps": 0, "max_completion_length": 32},
        **{"num_generations": 8, "steps_per_generation": 1, "num_iterations": 1, "per_device_train_batch_size": 16},
    },
    "retrodictive": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    "latent": {
        **{"retrodictor_warmup_steps": 0, "per_device_train_batch_size": 16, "num_thoughts": 4},
        **{"max_thought_length": 16},
    },
}


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, cell["kind"], name],
            cwd=CHECKOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(Path(name, "told.json").read_text())


def main(kind: str, name: str) -> None:
    import torch
    from transformers import TrainerCallback

    from benchmarks.worlds.reliability import small_runs
    from hf_imitate.trainers import atomic_saving

    torch.set_num_threads(1)
    folder, spent = Path(name), {"save": [], "whole": []}

    def timed(function: Callable, where: str) -> Callable:
        def call(*arguments: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*arguments)
            finally:
                spent[where].append(time.process_time() - begin)

        return call

    class Steps(TrainerCallback):
        """Saves now and then, and notes the CPU time of steps."""

        def __init__(self):
            self.begin, self.seconds = 0.0, []

        def on_step_begin(self, args, state, control, **kwargs):
            self.begin = time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.process_time() - self.begin)
            control.should_save = state.global_step in SAVES

    base = small_runs.save_base(folder / "base", width=192, layers=6)
    trainer = small_runs.make(kind, folder / "run", base, max_steps=STEPS, save_steps=10**6, **SIZES[kind])
    steps = Steps()
    trainer.add_callback(steps)
    trainer._save_checkpoint = timed(trainer._save_checkpoint, "save")
    for part in ("flush", "put_in_place", "settle"):
        setattr(atomic_saving, part, timed(getattr(atomic_saving, part), "whole"))
    small_runs.train(trainer)
    told = {
        "step": statistics.median(steps.seconds[2:]),
        "save": statistics.median(spent["save"]),
        "of_it_whole": sum(spent["whole"]) / len(spent["save"]),
        "seconds_per_gib": _seconds_per_gib(folder),
    }
    (folder / "told.json").write_text(json.dumps(told))


def _seconds_per_gib(folder: Path) -> float:
    """CPU seconds to flush and hash a large checkpoint."""
    from hf_imitate.trainers.atomic_checkpoints import flush, put_in_place

    written = folder / "_saving-1" / "checkpoint-1"
    written.mkdir(parents=True)
    (written / "model.safetensors").write_bytes(os.urandom(2**20) * LARGE_MIB)
    begin = time.process_time()
    flush(written)
    put_in_place(written, folder / "checkpoint-1")
    return (time.process_time() - begin) * 1024 / LARGE_MIB


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    told = []
    for result in results:
        one = result["result"]
        share, added = one["save"] / (EVERY * one["step"]), one["of_it_whole"] / (EVERY * one["step"])
        told.append(
            {
                "what": f"checkpoint every {EVERY} steps, {result['cell']['kind']}",
                "claim": f"at most {MOST:.0%} of the CPU time",
                "measured": f"{share:.2%} ({one['save']:.3f} s, steps of {one['step']:.2f} s); flushing, hashing and "
                f"renaming take {added:.3%}, and {one['seconds_per_gib']:.1f} s for each GiB",
                "passed": share <= MOST,
            }
        )
    return told
