"""Full disks, read-only folders, files cut off or altered, SIGTERM and SIGINT: what is left, and what is said."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KINDS = ("adversarial", "retrodictive", "latent")
CELLS = [{"kind": kind} for kind in KINDS]
STEP = 5  # the step in or after which something happens
ROOM = (0.05, 0.3, 0.6, 0.95)  # of a checkpoint, left on a disk that then is full
PROGRAM = "import sys; from benchmarks.worlds.reliability import faults; faults.main(*sys.argv[1:])"
CHECKOUT = Path(__file__).resolve().parents[3]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Every fault on one kind of run, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, cell["kind"], name],
            cwd=CHECKOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(Path(name, "told.json").read_text())


def main(kind: str, folder: str) -> None:
    import torch
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # it is a thread
    torch.set_num_threads(1)
    faults = Faults(kind, Path(folder))
    told = {
        "full disk": faults.full_disk(),
        "read-only folder": faults.read_only(),
        "folder that becomes read-only": faults.becomes_read_only(),
        "truncated file": faults.damaged("cut off", lambda data, at: data[:at]),
        "flipped bit": faults.damaged("SHA-256 differs", lambda d, at: d[:at] + bytes([d[at] ^ 4]) + d[at + 1 :]),
        "missing file": faults.missing(),
        "SIGTERM in a step": faults.signalled(signal.SIGTERM, in_save=False),
        "SIGTERM in a save": faults.signalled(signal.SIGTERM, in_save=True),
        "SIGINT in a step": faults.signalled(signal.SIGINT, in_save=False),
        "SIGINT in a save": faults.signalled(signal.SIGINT, in_save=True),
    }
    Path(folder, "told.json").write_text(json.dumps(told), encoding="utf-8")


class Faults:
    """One uninterrupted run of a kind, and what is done to copies of its first steps."""

    def __init__(self, kind: str, folder: Path):
        from benchmarks.worlds.reliability import small_runs
        from benchmarks.worlds.reliability.kills import what_counts

        self.kind, self.folder, self.steps = kind, folder, small_runs.STEPS[kind]
        self.base, self.whole, self.said = small_runs.save_base(folder / "base"), folder / "whole", folder / "said.txt"
        self.random = random.Random(0)
        status = self._train(self.whole, None, save_total_limit=None)
        if status != 0:
            raise RuntimeError(self.said.read_text())
        self.expected = what_counts(self.whole / f"checkpoint-{self.steps}")

    # --- the faults; each returns what did not hold, nothing if all did

    def full_disk(self) -> list[str] | None:
        """The disk is full somewhere in the save of `STEP`."""
        wrong: list[str] = []
        size = sum(path.stat().st_size for path in (self.whole / f"checkpoint-{STEP}").rglob("*") if path.is_file())
        for room in ROOM:
            with _small_disk(self.folder / "disk") as disk:
                if disk is None:
                    return None
                run = self._start(disk / "run")
                free = shutil.disk_usage(disk).free
                (disk / "filler").write_bytes(b"\0" * max(free - int(room * size) - 4096, 0))
                status = self._train(run, True)
                wrong += self._after(run, status, ("could not be written", f"checkpoint-{STEP - 1};", "MiB are free"))
                (disk / "filler").unlink()
                wrong += self._goes_on(run)
        return wrong

    def read_only(self) -> list[str] | None:
        """The folder cannot be written from the start."""
        with _small_disk(self.folder / "disk") as disk:
            if disk is None:
                return None
            run = self._start(disk / "run")
            _mount("-o", "remount,ro", str(disk))
            status = self._train(run, True)
            wrong = self._after(
                run, status, ("Nothing can be written", f"checkpoint-{STEP - 1};", "nothing was trained")
            )
            _mount("-o", "remount,rw", str(disk))
            return wrong + self._goes_on(run)

    def becomes_read_only(self) -> list[str] | None:
        """The folder can no longer be written when `STEP` is saved."""
        with _small_disk(self.folder / "disk") as disk:
            if disk is None:
                return None
            run = self._start(disk / "run")
            status = self._train(
                run, True, moment=("on_step_end", lambda: _mount("-o", "remount,ro", str(disk)), STEP)
            )
            wrong = self._after(run, status, ("could not be written", f"checkpoint-{STEP - 1};"))
            _mount("-o", "remount,rw", str(disk))
            return wrong + self._goes_on(run)

    def damaged(self, reason: str, change: Callable[[bytes, int], bytes]) -> list[str]:
        """Each file of the newest checkpoint is changed at a random byte; after one of them, the run goes on."""
        from hf_imitate.trainers.checkpoints import damage

        run = self._start(self.folder / "run")
        newest, wrong = run / f"checkpoint-{STEP - 1}", []
        for file in _files(newest, last="optimizer.pt"):
            data = file.read_bytes()
            file.write_bytes(change(data, self.random.randrange(len(data))))
            lack = damage(newest) or "nothing is found"
            if str(file.relative_to(newest)) not in lack or reason not in lack:
                wrong.append(f"{file.name}: {lack}")
            if file.name != "optimizer.pt":
                file.write_bytes(data)
        return wrong + self._goes_on(run, f"checkpoint-{STEP - 1} is passed over: optimizer.pt")

    def missing(self) -> list[str]:
        """Each file of the newest checkpoint is missing; after one of them, the run goes on."""
        from hf_imitate.trainers.checkpoints import damage

        run = self._start(self.folder / "run")
        newest, wrong = run / f"checkpoint-{STEP - 1}", []
        for file in _files(newest, last="rng_state.pth"):
            data = file.read_bytes()
            file.unlink()
            if damage(newest) != f"{file.relative_to(newest)} is missing":
                wrong.append(f"{file.name}: {damage(newest)}")
            if file.name != "rng_state.pth":
                file.write_bytes(data)
        return wrong + self._goes_on(run, f"checkpoint-{STEP - 1} is passed over: rng_state.pth is missing")

    def signalled(self, number: int, in_save: bool) -> list[str]:
        """A signal in the middle of `STEP`, or in the middle of its save."""
        run = self._start(self.folder / "run")
        tell = lambda: os.kill(os.getpid(), number)  # noqa: E731
        if in_save:
            status = self._train(run, True, in_save=tell)
        else:
            # Checkpoints are due after every second step: the one after the signal is not.
            status = self._train(run, True, moment=("on_pre_optimizer_step", tell, STEP - 1), save_steps=2)
        if number == signal.SIGTERM:
            wrong = [] if os.waitstatus_to_exitcode(status) == 143 else [f"status {status}"]
            said = ("Stopped by SIGTERM after step 5", f"checkpoint-{STEP};")
            return wrong + self._after(run, status, said, newest=STEP) + self._goes_on(run)
        said = ("Interrupted in step", f"checkpoint-{STEP - 1};", "KeyboardInterrupt")
        return self._after(run, status, said) + self._goes_on(run)

    # --- how

    def _start(self, run: Path) -> Path:
        """A run's folder as it was before `STEP`."""
        shutil.rmtree(run, ignore_errors=True)
        for step in (STEP - 2, STEP - 1):
            shutil.copytree(self.whole / f"checkpoint-{step}", run / f"checkpoint-{step}")
        return run

    def _after(self, run: Path, status: int, said: tuple[str, ...], newest: int = STEP - 1) -> list[str]:
        """What does not hold after a run that did not end well."""
        from hf_imitate.trainers.checkpoints import checkpoints, damage

        text, wrong = self.said.read_text(), []
        if status == 0:
            wrong.append("it ended as if nothing had been")
        found = [path.name for path in checkpoints(run)]
        if found != [f"checkpoint-{newest}", f"checkpoint-{newest - 1}"]:
            wrong.append(f"there are {found}")
        wrong += [f"{path.name}: {damage(path)}" for path in checkpoints(run) if damage(path) is not None]
        wrong += [f"{path.name} is left" for path in run.iterdir() if path.name.startswith("_saving")]
        wrong += [f"not said: {part} ({text[-400:]})" for part in said if part not in text]
        return wrong

    def _goes_on(self, run: Path, said: str = "") -> list[str]:
        """What does not hold once the run is resumed."""
        from benchmarks.worlds.reliability.kills import what_counts

        if self._train(run, True) != 0:
            return [f"it does not go on: {self.said.read_text()[-400:]}"]
        got = what_counts(run / f"checkpoint-{self.steps}")
        wrong = [f"{name} differs" for name in self.expected if self.expected[name] != got.get(name)]
        return wrong if said in self.said.read_text() else [*wrong, f"not said: {said}"]

    def _train(
        self,
        run: Path,
        resume: bool | None,
        moment: tuple[str, Callable[[], None], int] | None = None,
        in_save: Callable[[], None] | None = None,
        **changes: Any,
    ) -> int:
        """Train in a child; what it logs and raises is noted. Returns how it ended, as `os.waitpid` says it."""
        from benchmarks.worlds.reliability import small_runs

        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1]
        status = 1
        logging.basicConfig(filename=self.said, filemode="w", force=True)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            trainer = small_runs.make(self.kind, run, self.base, **changes)
            if moment is not None:
                trainer.add_callback(_callback(*moment))
            if in_save is not None:
                write = trainer._save_rng_state
                trainer._save_rng_state = lambda folder: (write(folder), in_save())
            small_runs.train(trainer, resume)
            status = 0
        except SystemExit as left:
            status = left.code
        except BaseException:
            logging.error("%s", traceback.format_exc())
        finally:
            os._exit(status)


def _files(checkpoint: Path, last: str) -> list[Path]:
    """The files that the marker lists; the one that stays damaged is the last."""
    listed = json.loads((checkpoint / "_complete.json").read_text())["files"]
    return sorted((checkpoint / name for name in sorted(listed)), key=lambda path: path.name == last)


def _callback(moment: str, what: Callable[[], None], step: int) -> Any:
    from transformers import TrainerCallback

    def act(self, args, state, control, **kwargs):
        if state.global_step == step:
            what()

    return type("At", (TrainerCallback,), {moment: act})()


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of 4 MiB, or `None` where nothing may be mounted."""
    folder.mkdir(exist_ok=True)
    try:
        _mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    told = []
    for fault in results[0]["result"]:
        by_kind = {result["cell"]["kind"]: result["result"][fault] for result in results}
        measured = {kind: "not measured" if wrong is None else "; ".join(wrong) for kind, wrong in by_kind.items()}
        held = [kind for kind, wrong in by_kind.items() if wrong == []]
        others = [f"{kind}: {text}" for kind, text in measured.items() if text]
        told.append(
            {
                "what": fault,
                "claim": "old checkpoint intact, said clearly, goes on to the same bits",
                "measured": "; ".join([f"holds for {', '.join(held)}"] * bool(held) + others),
                "passed": len(held) == len(by_kind),
            }
        )
    return told
