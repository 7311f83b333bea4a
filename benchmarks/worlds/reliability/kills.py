"""kill -9 in every file of a checkpoint, while old ones are deleted, within steps and at random times.

A parent imports everything once; each point is a child that it forks, which dies by a real SIGKILL, and a second child
that resumes what is left with `resume_from_checkpoint=True`. Its last checkpoint must equal that of a run that nobody
killed: the bytes of all weights, optimizers and random states, the logged history and what was not logged yet.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("adversarial", "retrodictive", "latent")
CELLS = [{"kind": kind, "where": where} for kind in KINDS for where in ("saving", "between")]
NUM_AT_RANDOM = 24
LEAST_POINTS = 200
PROGRAM = "import sys; from benchmarks.worlds.reliability import kills; kills.main(*sys.argv[1:])"
CHECKOUT = Path(__file__).resolve().parents[3]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Sweep in a process of its own, which forks and so must not have threads."""
    return sweep_apart(cell["kind"], cell["where"])


def sweep_apart(kind: str, plans: str | list[dict[str, Any]]) -> dict[str, Any]:
    """What [`sweep`] returns, from a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        told = Path(name, "told.json")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, kind, json.dumps(plans), name],
            cwd=CHECKOUT,
            env={
                **os.environ,
                **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
                **{"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"},
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(told.read_text())


def main(kind: str, plans: str, folder: str) -> None:
    import torch
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # it is a thread
    torch.set_num_threads(1)
    told = sweep(kind, json.loads(plans), Path(folder))
    Path(folder, "told.json").write_text(json.dumps(told), encoding="utf-8")


def sweep(kind: str, plans: str | list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Kill and resume by plan; `plans` is "saving", "between", or a list of them.

    Returns:
        `dict`: `points`, a list of `{"plan", "killed", "resumed", "identical", "passed_over"}`; `differs`, what was
        not identical; `cpu_seconds` of all children.
    """
    from benchmarks.worlds.reliability import small_runs

    base, steps = small_runs.save_base(folder / "base"), small_runs.STEPS[kind]
    small_runs.make(kind, folder / "none", base)  # imports what is imported late
    whole = folder / "whole"
    begin = time.monotonic()
    status = _wait(_fork(lambda: _run(kind, whole, base, limit=None), folder / "errors.txt"))
    duration = time.monotonic() - begin
    if status != 0:
        raise RuntimeError((folder / "errors.txt").read_text()[-3000:])
    expected = what_counts(whole / f"checkpoint-{steps}")
    sweeping = _Sweep(kind, base, steps, whole, expected, duration, folder)
    if plans == "saving":
        plans = sweeping.plans_of_saving()
    elif plans == "between":
        plans = sweeping.plans_between()
    points = [sweeping.point(plan) for plan in plans]
    used = os.times()
    return {
        "points": [point for point in points if point is not None],
        "differs": sweeping.differs,
        "cpu_seconds": round(used.children_user + used.children_system, 1),
    }


class _Sweep:
    def __init__(self, kind, base, steps, whole, expected, duration, folder):
        self.kind, self.base, self.steps, self.whole, self.expected = kind, base, steps, whole, expected
        self.duration, self.folder, self.random = duration, folder, random.Random(0)
        self.differs: list[str] = []

    def plans_of_saving(self) -> list[dict[str, Any]]:
        """Every event of a save and of the rotation after it, at steps that take turns; and some of the first save."""
        plans = []
        for first, chosen in ((3, 1), (1, 8)):
            # A folder that is there already is often made once more, which changes nothing.
            events = [event for event in self._record(first) if not (event.startswith("mkdir") and "#" in event)]
            for number, event in enumerate(events[::chosen]):
                step = first + (number % (self.steps - 2) if first == 3 else 0)
                plans.append({"step": step, "event": event, "torn": event.startswith(("flush", "store"))})
        return plans

    def plans_between(self) -> list[dict[str, Any]]:
        """Inside every step, and at random times of a run from the start or from some checkpoint."""
        moments = ("on_step_begin", "on_pre_optimizer_step", "on_step_end")
        inside = [{"step": step, "moment": moments[step % 3]} for step in range(1, self.steps + 1)]
        at_random = [{"step": 1 + number % (self.steps - 1), "at": "random"} for number in range(NUM_AT_RANDOM)]
        return inside + at_random

    def _record(self, step: int) -> list[str]:
        """The events of the save of `step`, in their order."""
        run, told = self._start(step), self.folder / "events.json"
        status = _wait(_fork(lambda: self._first(run, step, {"record": str(told)}), self.folder / "errors.txt"))
        if status != 0:
            raise RuntimeError((self.folder / "errors.txt").read_text()[-3000:])
        return json.loads(told.read_text())

    def point(self, plan: dict[str, Any]) -> dict[str, Any] | None:
        """Kill one child and let another go on; `None` if the first had ended before its time."""
        from hf_imitate.trainers.checkpoints import checkpoints, damage

        run, errors = self._start(plan["step"]), self.folder / "errors.txt"
        pid = _fork(lambda: self._first(run, plan["step"], plan), errors)
        if "at" in plan:
            time.sleep(self.random.uniform(0, self.duration * (1 - (plan["step"] - 1) / self.steps)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = _wait(pid)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and "at" in plan:
            return None
        found = [(path, damage(path)) for path in checkpoints(run)]
        resume = any(lack is None for _, lack in found) or None
        status = _wait(_fork(lambda: _run(self.kind, run, self.base, resume), errors))
        ended = run / f"checkpoint-{self.steps}"
        got = what_counts(ended) if status == 0 and damage(ended) is None else {}
        differs = [name for name in self.expected if self.expected[name] != got.get(name)]
        left = [path.name for path in run.iterdir() if path.name.startswith("_saving")]
        if status != 0:
            differs.append(errors.read_text()[-500:])
        if differs or left or not killed:
            self.differs.append(f"{plan}: {differs} {left}")
        return {
            "plan": plan,
            "killed": killed,
            "resumed": status == 0 and not left,
            "identical": not differs,
            "passed_over": [f"{path.name}: {lack}" for path, lack in found if lack],
        }

    def _start(self, step: int) -> Path:
        """A run's folder as it was before `step`."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for earlier in (step - 2, step - 1):
            if earlier > 0:
                name = f"checkpoint-{earlier}"
                shutil.copytree(self.whole / name, run / name)
        return run

    def _first(self, run: Path, step: int, plan: dict[str, Any]) -> None:
        """The child that dies: in its first save, in its first step, or when its parent says so."""
        callbacks = []
        if "event" in plan or "record" in plan:
            watch = Watch(run, step, plan)
            callbacks.append(_at("on_save", watch.tell))
        elif "moment" in plan:
            callbacks.append(_at(plan["moment"], lambda: os.kill(os.getpid(), signal.SIGKILL)))
        _run(self.kind, run, self.base, True if step > 1 else None, callbacks=callbacks)


class Watch:
    """Notes what happens to files while one checkpoint is saved, and dies at what the plan names.

    Args:
        run (`Path`): the run's folder.
        step (`int`): the step whose save is watched.
        plan (`dict`): `event` and `torn` (whether the file loses its end first), or `record`, where to note events.
    """

    def __init__(self, run: Path, step: int, plan: dict[str, Any]):
        import safetensors.torch
        import torch

        self.run, self.mark, self.plan = str(run), f"_saving-{step}", plan
        # Plans are made at one step and followed at others.
        self.names = {self.mark: "beside", f"checkpoint-{step}": "new", f"checkpoint-{step - 2}": "old"}
        self.events: list[str] = []
        self.seen: collections.Counter[str] = collections.Counter()
        # These are written by code that Python's audit does not see.
        for module, name, place in ((torch, "save", 1), (safetensors.torch, "serialize_file", 1)):
            setattr(module, name, self._storing(getattr(module, name), place))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode = arguments[0], arguments[1]
            if isinstance(path, str | os.PathLike) and mode is not None and set(mode) & set("wxa+"):
                self._happens("write", os.fspath(path))
            elif isinstance(path, str | os.PathLike) and mode is None and os.path.isfile(path):
                self._happens("flush", os.fspath(path))  # by `os.open`, as nothing else here is
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            path, is_within = arguments[0], arguments[-1] != -1  # of a folder that is being removed
            if isinstance(path, str | os.PathLike):
                self._happens(event.removeprefix("os."), os.fspath(path), is_within)

    def _storing(self, write: Callable, place: int) -> Callable:
        def written(*arguments: Any, **keywords: Any) -> Any:
            result = write(*arguments, **keywords)
            path = arguments[place] if len(arguments) > place else keywords.get("filename", "")
            if isinstance(path, str | os.PathLike):
                self._happens("store", os.fspath(path))
            return result

        return written

    def _happens(self, what: str, path: str, is_within: bool = False) -> None:
        if not self.events and self.mark not in path:
            return
        if not (is_within or path.startswith(self.run)):
            return
        name = path if is_within else os.path.relpath(path, self.run)
        event = f"{what} {name.split(os.sep, 2)[-1] if self.mark in name else name}"
        for here, anywhere in self.names.items():
            event = event.replace(here, anywhere)
        self.seen[event] += 1
        event = f"{event} #{self.seen[event]}" if self.seen[event] > 1 else event
        self.events.append(event)
        if event != self.plan.get("event"):
            return
        if self.plan.get("torn"):
            os.truncate(path, random.Random(event).randrange(max(os.path.getsize(path), 1)))
        os.kill(os.getpid(), signal.SIGKILL)

    def tell(self) -> None:
        """Leave what was noted, at the end of the save."""
        if "record" in self.plan:
            Path(self.plan["record"]).write_text(json.dumps(self.events))
            os._exit(0)


def _at(moment: str, what: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    return type("At", (TrainerCallback,), {moment: lambda self, args, state, control, **kwargs: what()})()


def _run(
    kind: str, run: Path, base: Path, resume: bool | None = None, limit: int | None = 2, callbacks: Any = ()
) -> None:
    from benchmarks.worlds.reliability import small_runs

    trainer = small_runs.make(kind, run, base, save_total_limit=limit)
    for callback in callbacks:
        trainer.add_callback(callback)
    small_runs.train(trainer, resume)


def _fork(work: Callable[[], None], errors: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        errors.write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _wait(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def what_counts(checkpoint: Path) -> dict[str, Any]:
    """All that a run's future depends on, and its history, without times."""
    from benchmarks.worlds.reliability.small_runs import CLOCK, history

    files = json.loads((checkpoint / "_complete.json").read_text())["files"]
    bits = {name: file["sha256"] for name, file in files.items() if name.endswith((".safetensors", ".pt", ".pth"))}
    found: dict[str, Any] = {**bits, "history": history(checkpoint)}
    for path in checkpoint.glob("*_state_0.json"):
        state = json.loads(path.read_text())
        unlogged = state.get("unlogged", {})
        unlogged["metrics"] = {n: v for n, v in unlogged.get("metrics", {}).items() if not n.endswith(CLOCK)}
        found[path.name] = state
    return found


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    told, total = [], 0
    for result in results:
        points = result["result"]["points"]
        total += len(points)
        counts = {name: sum(point[name] for point in points) for name in ("killed", "resumed", "identical")}
        cell = result["cell"]
        told.append(
            {
                "what": f"kill -9, {cell['kind']}, {cell['where']}",
                "claim": "all resume to the same bits",
                "measured": ", ".join(f"{count} {name}" for name, count in counts.items()),
                "passed": set(counts.values()) == {len(points)},
            }
        )
    total_row = {"what": "kill -9, points in all", "claim": f"at least {LEAST_POINTS}", "measured": f"{total}"}
    return [*told, {**total_row, "passed": total >= LEAST_POINTS}]
