"""Run one entry of `benchmarks/` cell by cell, so that a run that was stopped goes on where it stopped.

An entry is a module `benchmarks/<name>.py` with

* `CELLS`: a list of dicts that JSON can hold, the settings of one piece of work each (a seed, a control);
* `run_cell(cell) -> dict`: does one piece and returns what was measured, as JSON;
* `summarize(results) -> (rows, passed)`: `results` is a list of `{"cell": ..., "result": ...}`, in the order of
  `CELLS`; `rows` is the table, a list of dicts with the same keys; `passed` says whether the claim held;
* optionally `plot(results, path)`: the picture, written beside the JSON;
* optionally `page(report) -> str`: Markdown made of the JSON, written beside it.

A finished cell is written at once to `results/partial/<name>/`, under a hash of the cell, of the entry's source and of
the other sources in `benchmarks` that it imports: an edited entry or cell is measured again. Each cell also notes the
package's source it was measured with; where that has changed since, the table says so. The whole goes to
`results/<date>-<name>.json`.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import pkgutil
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "benchmarks" / "results"
MAX_MINUTES = 60.0
REPORTED_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "scipy", "scikit-learn", "lm_eval")


class OutOfTime(BaseException):
    """The entry's wall limit passed before its last cell; finished cells are kept.

    No `Exception`: an audit calls a judge that raises one "not measured" and goes on.
    """


def entry_names() -> list[str]:
    """The names that `ONLY` takes: every module of `benchmarks/` that lists `CELLS`."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(info.name for info in found if not info.ispkg and info.name != "acceptance")


def load_entry(name: str, package: str = "benchmarks") -> ModuleType:
    """Import an entry and check that it has the three parts.

    Args:
        name (`str`): module name inside `package`.
        package (`str`, *optional*, defaults to `"benchmarks"`): the package searched.

    Raises:
        ValueError: there is no such entry, or one of its parts is missing.
    """
    try:
        entry = importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise
        raise ValueError(f"There is no entry '{name}'. Set `ONLY` to one of {entry_names()}.") from error
    missing = [part for part in ("CELLS", "run_cell", "summarize") if part not in vars(entry)]
    if missing:
        raise ValueError(f"The entry '{name}' has no {missing}; an entry needs `CELLS`, `run_cell` and `summarize`.")
    return entry


def cell_key(entry: ModuleType, cell: dict[str, Any]) -> str:
    """What a finished cell is filed under: 16 hex digits of the SHA-256 of its sources and itself."""
    text = json.dumps([*(inspect.getsource(module) for module in sources(entry)), cell], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources(entry: ModuleType) -> list[ModuleType]:
    """The entry and every module of `benchmarks` that it and they import, ordered by name."""
    found, waiting = {entry.__name__: entry}, [entry]
    while waiting:
        for value in vars(waiting.pop()).values():
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name.startswith("benchmarks.") and name not in found and name != __name__:
                found[name] = sys.modules[name]
                waiting.append(found[name])
    return [found[name] for name in sorted(found)]


def write_atomically(path: Path, value: Any) -> None:
    """Write JSON so that a kill leaves either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # NaN is refused: a table must not hold a number that another JSON reader cannot read.
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def run_cells(entry: ModuleType, partial: Path, max_minutes: float = MAX_MINUTES) -> list[dict[str, Any]]:
    """Run the cells that are not finished yet.

    Args:
        entry (`ModuleType`): see the module's docstring.
        partial (`Path`): folder of the finished cells.
        max_minutes (`float`, *optional*, defaults to `60`): the work stops after this many minutes, those of the
            finished cells included.

    Returns:
        `list[dict]`: `{"cell", "seconds", "package_source", "result"}` per cell, in the order of `CELLS`.

    Raises:
        ValueError: two cells are equal.
        OutOfTime: the limit passed before the last cell was finished.
    """
    files = [partial / f"{cell_key(entry, cell)}.json" for cell in entry.CELLS]
    if len(set(files)) < len(files):
        raise ValueError(
            f"{entry.__name__} lists equal cells, which would be measured once. Tell them apart by a key."
        )
    finished = {file: json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()}
    spent = sum(record["seconds"] for record in finished.values())
    progress = tqdm(total=len(files), initial=len(finished), desc=entry.__name__, unit="cell", file=sys.stderr)
    source = package_source()
    with progress:
        for file, cell in zip(files, entry.CELLS, strict=True):
            if file in finished:
                continue
            start = time.monotonic()
            try:
                with _time_left(60 * max_minutes - spent):
                    result = entry.run_cell(cell)
            except OutOfTime:
                raise OutOfTime(
                    f"{entry.__name__} reached its limit of {max_minutes:g} minutes with {len(finished)} of "
                    f"{len(files)} cells finished; these are kept. Make the cells smaller or fewer."
                ) from None
            seconds = time.monotonic() - start
            spent += seconds
            record = {"cell": cell, "seconds": round(seconds, 3), "package_source": source, "result": result}
            write_atomically(file, record)
            finished[file] = record
            progress.update()
    return [finished[file] for file in files]


@contextlib.contextmanager
def _time_left(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block once the seconds are over; where there are no alarms, only before it starts."""
    if seconds <= 0:
        raise OutOfTime
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def package_source() -> str:
    """16 hex digits of the SHA-256 of every Python file of the checkout's package: which code made a number."""
    digest = hashlib.sha256()
    for folder in ("hf_imitate", "trainers", "hub_cards"):
        for file in sorted((CHECKOUT / folder).rglob("*.py")):
            digest.update(file.relative_to(CHECKOUT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}
    for package in ("hf-imitate", *REPORTED_PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lay out rows with the same keys as an aligned table; floats with four significant digits."""
    if not rows:
        return "(no rows)"
    header = list(rows[0])
    lines = [header] + [[_format_value(row.get(key)) for key in header] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([aligned[0], "  ".join("-" * width for width in widths), *aligned[1:]])


def _format_value(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_entry(entry: ModuleType, results: Path = RESULTS, max_minutes: float = MAX_MINUTES) -> bool:
    """Run an entry to its end, write `<date>-<name>.json`, print its table.

    Args:
        entry (`ModuleType`): see the module's docstring.
        results (`Path`, *optional*): folder of the dated JSON; the finished cells lie in its `partial/<name>`.
        max_minutes (`float`, *optional*, defaults to `60`): wall limit.

    Returns:
        `bool`: whether the entry's claim held.
    """
    name = entry.__name__.rpartition(".")[2]
    records = run_cells(entry, results / "partial" / name, max_minutes)
    rows, passed = entry.summarize([{"cell": record["cell"], "result": record["result"]} for record in records])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {
        "name": name,
        "date": today,
        "passed": bool(passed),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "package_source": package_source(),
        "versions": versions(),
        "summary": rows,
        "cells": records,
    }
    file = results / f"{today}-{name}.json"
    write_atomically(file, report)
    if hasattr(entry, "plot"):
        entry.plot(
            [{"cell": record["cell"], "result": record["result"]} for record in records], file.with_suffix(".png")
        )
    if hasattr(entry, "page"):
        file.with_suffix(".md").write_text(entry.page(report), encoding="utf-8")
    print(format_table(rows))
    num_older = sum(record["package_source"] != report["package_source"] for record in records)
    if num_older:
        print(f"\n{num_older} of {len(records)} cells were measured before the package's source last changed;")
        print(f"delete {results / 'partial' / name} to measure them again.")
    print(f"\n{name}: {'passed' if passed else 'FAILED'}; written to {file}")
    return bool(passed)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `make acceptance ONLY=<name>`; exits with 1 if the claim failed, 2 if time ran out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceptance", description="Run one acceptance entry.")
    parser.add_argument("name", nargs="?", default="", help="the entry; without it, the entries are listed")
    parser.add_argument("--max-minutes", type=float, default=MAX_MINUTES, help="wall limit (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.name:
        print("Entries: " + (", ".join(entry_names()) or "none yet"))
        return 2
    try:
        entry = load_entry(options.name)
    except ValueError as error:
        parser.error(str(error))
    try:
        return 0 if run_entry(entry, max_minutes=options.max_minutes) else 1
    except OutOfTime as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
