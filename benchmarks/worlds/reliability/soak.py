"""Half an hour of one adversarial run with evaluations, checkpoints and rotation: what it holds must not grow."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MINUTES, EVERY = 30.0, 15.0
WARM_UP = 240.0  # seconds in which caches fill
MOST_MIB_PER_HOUR = 32.0
CELLS = [{"minutes": MINUTES}]

PROGRAM = """
import json, math, os, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import TrainerCallback
from benchmarks.worlds.reliability.small_runs import make, rows, save_base, train

folder, minutes = Path(sys.argv[1]), float(sys.argv[2])
end = time.monotonic() + 60 * minutes

class UntilTheEnd(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.monotonic() > end

trainer = make(
    "adversarial", folder / "run", save_base(folder / "base"), max_steps=10**6, save_steps=50, logging_steps=25,
    lr_scheduler_type="constant", learning_rate=1e-5, eval_strategy="steps", eval_steps=200,
    per_device_eval_batch_size=4, eval_dataset=rows(8),
)
trainer.add_callback(UntilTheEnd())
train(trainer)
numbers = [value for entry in trainer.state.log_history for value in entry.values() if isinstance(value, int | float)]
not_finite = sum(not math.isfinite(number) for number in numbers)
told = {"steps": trainer.state.global_step, "numbers": len(numbers), "not_finite": not_finite}
Path(folder, "told.json").write_text(json.dumps(told))
"""


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train in a process of its own and look at it from outside."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "errors.txt").open("w") as errors:
            program = [sys.executable, "-W", "ignore", "-c", PROGRAM, name, str(cell["minutes"])]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
            samples, begin = [], time.monotonic()
            try:
                while process.poll() is None:
                    samples.append({"seconds": round(time.monotonic() - begin, 1), **_look(process.pid)})
                    try:
                        process.wait(EVERY)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode != 0:
            raise RuntimeError((folder / "errors.txt").read_text()[-2000:])
        told = json.loads((folder / "told.json").read_text())
    return {**told, "samples": [sample for sample in samples if "mib" in sample]}


def _look(pid: int) -> dict[str, float]:
    """Memory, descriptors and threads of a process."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return {
            "mib": int(status["VmRSS"].split()[0]) / 1024,
            "threads": int(status["Threads"]),
            "descriptors": descriptors,
        }
    except (OSError, KeyError):
        return {}  # it has just ended


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from scipy.stats import theilslopes

    (result,) = (one["result"] for one in results)
    samples = [sample for sample in result["samples"] if sample["seconds"] >= WARM_UP]
    hours = [sample["seconds"] / 3600 for sample in samples]
    mib = [sample["mib"] for sample in samples]
    slope, _, low, high = theilslopes(mib, hours, alpha=0.95)
    minutes = (samples[-1]["seconds"] - samples[0]["seconds"]) / 60
    told = [
        {
            "what": f"memory over {minutes:.0f} min, {result['steps']} steps",
            "claim": f"grows by less than {MOST_MIB_PER_HOUR:g} MiB an hour",
            "measured": f"{slope:+.1f} MiB an hour [{low:+.1f}, {high:+.1f}], median {statistics.median(mib):.0f} MiB",
            "passed": bool(high < MOST_MIB_PER_HOUR),
        }
    ]
    for name in ("descriptors", "threads"):
        values = [sample[name] for sample in samples]
        slope, _, low, high = theilslopes(values, hours, alpha=0.95)
        told.append(
            {
                "what": name,
                "claim": "flat",
                "measured": f"{min(values):g} to {max(values):g}, {slope:+.2f} an hour [{low:+.2f}, {high:+.2f}]",
                "passed": bool(low <= 0 <= high and max(values) - min(values) <= 8),
            }
        )
    finite = result["numbers"] - result["not_finite"]
    told.append(
        {
            "what": "logged numbers",
            "claim": "all finite",
            "measured": f"{finite} of {result['numbers']} finite",
            "passed": result["not_finite"] == 0,
        }
    )
    return told
