"""How costs grow: CPU seconds and live memory of one step or audit against its size, each with a fitted exponent.

Models are fresh, so that no answer ends before its limit and lengths are what they are set to. Memory is the most that
the tensors made in one step or audit hold at once.
"""

import contextlib
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import speed
from benchmarks.worlds import speed as world
from benchmarks.worlds import speed_trainers as arms
from benchmarks.worlds.speed import Shape
from hf_imitate import Imitator, audit


class Sizes(NamedTuple):
    """How often, and how far."""

    steps: int = 5
    skipped: int = 2
    rows: int = 240
    values: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("batch", (8, 16, 32)),
        ("answer tokens", (8, 16, 32)),
        ("width", (96, 192, 384)),
        ("thoughts", (4, 8, 16)),
        ("audited questions", (60, 120, 240)),
    )


FULL = Sizes()
FRESH = Shape(steps=4)
CELLS = [{"axis": axis, "value": value} for axis, values in FULL.values for value in values]
WHAT = {
    "batch": "adversarial step",
    "answer tokens": "adversarial step",
    "width": "adversarial step",
    "thoughts": "latent forward and backward, 8 rows",
    "audited questions": "audit, surface judge",
}


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: Any) -> None:
        address = storage.data_ptr()
        if address and address not in self._known:
            self._known.add(address)
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def run_cell(cell: dict[str, Any], sizes: Sizes = FULL, folder: Path = world.PARTS) -> dict[str, Any]:
    """One size on one axis: seconds and bytes."""
    arms.quietly()
    axis, value = cell["axis"], cell["value"]
    rows = world.docstrings().select(range(sizes.rows))
    measures: dict[str, Callable[..., dict[str, Any]]] = {"thoughts": _thoughts, "audited questions": _audit}
    shape = FRESH._replace(hidden_size=value) if axis == "width" else FRESH
    with contextlib.redirect_stdout(io.StringIO()), world.one_thread():
        return measures.get(axis, _step)(world.base(shape, folder), rows, sizes, axis, value)


def _step(base: Path, rows: Dataset, sizes: Sizes, axis: str, value: int) -> dict[str, Any]:
    changes = {"batch": {"per_device_train_batch_size": value}, "answer tokens": {"max_completion_length": value}}
    make = arms.adversarial(base, rows, sizes.steps, **arms.EQUAL, **changes.get(axis, {}))
    seconds = world.seconds_per_step({"step": make}, sizes.skipped)["step"]
    trainer = arms.adversarial(base, rows, 1, **arms.EQUAL, **changes.get(axis, {}))()
    with Live() as live:
        trainer.train()
    return {"seconds": seconds, "bytes": live.most}


def _thoughts(base: Path, rows: Dataset, sizes: Sizes, axis: str, value: int) -> dict[str, Any]:
    few = speed.FULL._replace(repeats=sizes.steps - sizes.skipped)
    with Live() as live:
        speed.latent(base, rows, few._replace(repeats=1), value, anew=False)
    seconds = speed.latent(base, rows, few, value, anew=False)["seconds"]
    return {"seconds": seconds[speed.TARGETS["latent"][0][0]], "bytes": live.most}


def _audit(base: Path, rows: Dataset, sizes: Sizes, axis: str, value: int) -> dict[str, Any]:
    model, tokenizer = world.load(base)
    imitator = Imitator(model, tokenizer, max_new_tokens=arms.MAX_NEW_TOKENS)
    held_out = rows.select(range(value))

    def work() -> None:
        audit(imitator, held_out, judges=["surface"], output_dir=None, progress=False)

    with Live() as live:
        work()
    return {"seconds": world.seconds_of({"audit": work}, 1, 0)["audit"], "bytes": live.most}


def exponent(values: list[float], costs: list[float]) -> float:
    """Slope of log cost against log size, least squares."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """A line per axis. Claimed: an audit's cost is linear in the questions, or less."""
    table = []
    for axis in dict.fromkeys(one["cell"]["axis"] for one in results):
        own = [one for one in results if one["cell"]["axis"] == axis]
        values = [float(one["cell"]["value"]) for one in own]
        seconds = [sum(one["result"]["seconds"]) / len(one["result"]["seconds"]) for one in own]
        sizes = [one["result"]["bytes"] / 2**20 for one in own]
        table.append(
            {
                "of": WHAT[axis],
                "against": axis,
                "values": ", ".join(f"{value:g}" for value in values),
                "seconds": ", ".join(f"{value:.2f}" for value in seconds),
                "exponent": exponent(values, seconds),
                "MiB": ", ".join(f"{value:.0f}" for value in sizes),
                "memory_exponent": exponent(values, sizes),
            }
        )
    audits = [row["exponent"] for row in table if row["against"] == "audited questions"]
    return table, all(value <= 1.1 for value in audits)


def page(report: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        f"# How costs grow, {report['date']}",
        "",
        "CPU seconds on one torch thread, and MiB of live tensors at the worst moment; exponents by least squares.",
        "",
        "| of | against | values | seconds | exponent | MiB | exponent of memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["summary"]:
        lines.append(
            f"| {row['of']} | {row['against']} | {row['values']} | {row['seconds']} | {row['exponent']:.2f} | "
            f"{row['MiB']} | {row['memory_exponent']:.2f} |"
        )
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Cost and memory on logarithmic axes, one panel per axis."""
    from matplotlib.figure import Figure

    table, _ = summarize(results)
    figure = Figure(figsize=(3 * len(table), 5.2), layout="constrained")
    panels = figure.subplots(2, len(table), squeeze=False)
    for column, row in enumerate(table):
        values = [float(value) for value in row["values"].split(", ")]
        for line, (name, power) in enumerate((("seconds", "exponent"), ("MiB", "memory_exponent"))):
            panel = panels[line][column]
            costs = [float(cost) for cost in row[name].split(", ")]
            in_proportion = [costs[0] * value / values[0] for value in values]
            panel.loglog(values, in_proportion, "--", color="#999999", label="in proportion")
            panel.loglog(values, costs, "o-", color="#2166ac" if line == 0 else "#b35806", label="measured")
            panel.set_xticks(values, [f"{value:g}" for value in values])
            # Of costs that nearly agree, one is named.
            ticks = [cost for n, cost in enumerate(costs) if all(abs(cost / other - 1) > 0.1 for other in costs[:n])]
            panel.set_yticks(ticks, [f"{tick:.2f}" if tick < 10 else f"{tick:.0f}" for tick in ticks])
            panel.minorticks_off()
            panel.set_title(f"{row['of']}\n{name}, exponent {row[power]:.2f}", fontsize=8)
            panel.set_xlabel(row["against"], fontsize=8)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
