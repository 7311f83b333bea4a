"""The contest: every way of ours to imitate against temperature-swept fine-tuning, on three tasks.

Tasks: notes (the human's law is known), 4x4 Sudoku (a check decides), docstrings (real text). All arms get the same
rows, the same checks and start from the same fine-tuned imitator of a seed; each is given about the CPU seconds of the
dearest. Judges start from nothing that a distinguisher starts from, are trained afresh for each arm, and must notice
answers that no human gives. The aim, for the arm that is best on dev rows: found less often than fine-tuning at *any*
temperature, at no more than 0.1 bits more than fine-tuning at any; and half of the judges' advantage gone.

    python -m benchmarks.contest run --minutes 60 [--task notes]   goes on where it was stopped
    python -m benchmarks.contest open notes                        opens the test rows, once; then `run` measures them
    python -m benchmarks.contest summarize                         the tables, the verdicts, the figures

What is measured lies in `results/contest.json`, one cell per line; what is trained, in `results/partial/contest`, and
is trained again where it is missing.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceptance import CHECKOUT, RESULTS, format_table, package_source
from benchmarks.worlds import contest_arms as arms
from benchmarks.worlds import contest_judging as judging
from benchmarks.worlds import contest_verdict as verdicts
from benchmarks.worlds.contest_tasks import TASKS, Task, fingerprint
from benchmarks.worlds.contest_training import milliseconds_per_answer

WORLDS = Path(__file__).parent / "worlds"
LEDGER, PARTS = RESULTS / "contest.json", RESULTS / "partial" / "contest"
SEEDS = [11, 12, 13, 14, 15]  # chosen before their first run; settings were found on seed 100
NUM_SEEDS = 2  # of the other arms, and of the sweeps of SFT and the headline arms; other sweeps have one
PARTS_OF_A_TASK = ("dev", "sweep", "test")
HEADLINE = ("combined 1", "one of 8")
SWEEP = (0.85, 1.0)  # of all arms but SFT, which has its task's
RIVALS = (  # beside SFT
    "SFT continued",
    "rejection sampling",
    "SFT, first of 8 that passes",
    "rejection, first of 8 that passes",
    "rejection, first of 32 that passes",
    "larger model",
    "larger model, longer",
)
SCORED = {"dev": 150, "sweep": 150, "test": 300}  # questions whose human answers are scored
NUM_TIMED = 128

Cell = dict[str, Any]


def cells(task: Task, part: str, best: str | None = None) -> list[Cell]:
    """Of one task on its dev or test rows; "sweep" is the other temperatures on dev rows.

    On test rows the arm that was `best` on dev rows has all seeds, too.
    """
    most = ("SFT", *HEADLINE, *([best] if best and part == "test" else []))
    headline = [(arm, seed) for seed in SEEDS for arm in dict.fromkeys(most)]
    rest = [(arm, seed) for arm in arms.arms_of(task) for seed in SEEDS[:NUM_SEEDS]]
    order = [("power", SEEDS[0]), *dict.fromkeys([*headline, *rest])]
    if part == "sweep":
        order = [(arm, seed) for arm, seed in rest if arm in most or seed == SEEDS[0]]
    return [{"task": task.name, "part": part, "arm": arm, "seed": seed} for arm, seed in order]


def all_cells(tasks: Sequence[Task] = tuple(TASKS.values()), opened: dict[str, Any] | None = None) -> list[Cell]:
    """Headline arms and SFT of all tasks, seed by seed, then the rest, then their sweeps; test rows last."""
    best = {name: opening["best"] for name, opening in (opened or {}).items()}
    found = [cell for part in PARTS_OF_A_TASK for task in tasks for cell in cells(task, part, best.get(task.name))]

    def rank(cell: Cell) -> tuple[bool, int, int]:
        is_first = cell["arm"] in ("SFT", *HEADLINE) and (cell["part"] != "sweep" or cell["arm"] == "SFT")
        place = 0 if cell["arm"] == "power" else 1 if is_first else 3 if cell["part"] == "sweep" else 2
        return cell["part"] == "test", place, SEEDS.index(cell["seed"])

    return sorted(found, key=rank)


# --- what was measured, kept


def key_of(cell: Cell) -> str:
    """A cell's name."""
    return "/".join(str(cell[name]) for name in ("task", "part", "arm", "seed"))


def settings_of(task: Task, arm: str, part: str) -> str:
    """8 hex digits of everything that a cell depends on, beside the code."""
    uses = (*arms.ARMS["SFT" if arm == "power" else arm].uses, "judge_lm", "judge")
    said = (
        [getattr(task.settings, name) for name in uses],
        (task.distinguisher, task.other_distinguisher, task.unlabelled, fingerprint(task)),
        (task.sft_sweep, SWEEP) if part == "sweep" or (part == "test" and arm == "SFT") else (),
        (SCORED, judging.judges_of(task), judging.POWER_SHARES, judging.TEST_SHARE),
        (arms.ARMS[arm].resample, judging.NUM_ESTIMATES) if arm != "power" and arms.ARMS[arm].resample > 1 else (),
        task.is_grouped_by_answer,
    )
    return hashlib.sha256(repr(said).encode()).hexdigest()[:8]


def read_ledger(path: Path) -> dict[str, Any]:
    """`{"opened": {task: ...}, "cells": {key: record}}`."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"opened": {}, "cells": {}}


def write_ledger(path: Path, ledger: dict[str, Any]) -> None:
    """One cell per line; a kill leaves the old file or the new one."""
    parts = []
    for name in ("opened", "cells"):
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in ledger[name].items()]
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    unfinished.replace(path)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[dict[str, Any]]:
    """The ledger, read and written back while no other process does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ledger = read_ledger(path)
        yield ledger
        write_ledger(path, ledger)


def code() -> str:
    """Digest of the package and of the contest itself."""
    own = sorted(p for name in ("contest*.py", "kept.py", "notes*.py", "sudoku*.py") for p in WORLDS.glob(name))
    digest = hashlib.sha256(package_source().encode())
    for path in (Path(__file__), *own):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- one cell


def run_cell(cell: Cell, ledger: dict[str, Any], folder: Path = PARTS) -> dict[str, Any]:
    """Train what is missing and measure one arm of one seed, at each temperature that this part asks for.

    Raises:
        PermissionError: the cell is about test rows that were not opened, or were opened with other settings.
    """
    task, part, seed = TASKS[cell["task"]], cell["part"], cell["seed"]
    if part == "test":
        opening = ledger["opened"].get(task.name)
        if opening is None:
            raise PermissionError(
                f"The test rows of {task.name} are not open: `python -m benchmarks.contest open {task.name}`."
            )
        if opening["settings"][cell["arm"]] != settings_of(task, cell["arm"], part):
            raise PermissionError(
                f"The test rows of {task.name} were opened with other settings of '{cell['arm']}'. Go back to "
                f"those of commit {opening['commit']}."
            )
        if opening["code"] != code():
            raise PermissionError(
                f"The test rows of {task.name} were opened with other code. Go back to commit {opening['commit']}."
            )
    rows = task.rows().test if part == "test" else task.rows().dev
    if cell["arm"] == "power":
        return judging.power(task, rows, folder)
    law = arms.law_of(task, cell["arm"], seed, folder)
    found = {
        f"{temperature:g}": judging.measured(
            task, law._replace(temperature=temperature), rows, min(SCORED[part], len(rows)), folder, seed
        )
        for temperature in temperatures(cell, ledger)
    }
    asked = task.rows().dev["prompt"][:NUM_TIMED]
    return {
        "at": found,
        "milliseconds": round(milliseconds_per_answer(task, law, asked), 3),
        **arms.facts_of(law.path),
    }


def temperatures(cell: Cell, ledger: dict[str, Any]) -> tuple[float, ...]:
    """Those that a cell measures: 1 on dev rows, the others in the sweep; on test rows the chosen one.

    Of SFT, on test rows, those that may be an end of its frontier.
    """
    if cell["part"] == "dev":
        return (1.0,)
    every = TASKS[cell["task"]].sft_sweep if cell["arm"] == "SFT" else SWEEP
    if cell["part"] == "sweep":
        return tuple(temperature for temperature in every if temperature != 1)
    opening = ledger["opened"][cell["task"]]
    return tuple(opening["frontier"]) if cell["arm"] == "SFT" else (opening["temperatures"][cell["arm"]],)


def run(minutes: float, names: Sequence[str], ledger_path: Path = LEDGER, folder: Path = PARTS) -> int:
    """Measure what is missing, most important first, until the time is over; how many cells were measured.

    Several processes share the work; a cell is measured by one.
    """
    begun, count = time.monotonic(), 0
    tasks = [TASKS[name] for name in names]
    for cell in all_cells(tasks, read_ledger(ledger_path)["opened"]):
        task, key = TASKS[cell["task"]], key_of(cell)
        ledger = read_ledger(ledger_path)
        settings = settings_of(task, cell["arm"], cell["part"])
        known = ledger["cells"].get(key, {}).get("settings")
        if known == settings or (known and cell["part"] == "test"):  # those are measured once
            continue
        # What was not chosen at the opening is not measured after it.
        if cell["part"] == "test" and cell["arm"] not in ledger["opened"].get(task.name, {}).get("settings", {}):
            continue
        if time.monotonic() - begun > 60 * minutes:
            break
        with claimed(folder, key) as is_mine:
            if not is_mine or key in read_ledger(ledger_path)["cells"].keys() - ledger["cells"].keys():
                continue  # another process is at it, or was since
            started = time.process_time()
            result = run_cell(cell, ledger, folder)
            seconds = round(time.process_time() - started, 1)
            record = {"settings": settings, "source": code(), "cpu_seconds": seconds, "result": result}
            with alone(ledger_path) as ledger:
                ledger["cells"][key] = record
        count += 1
        print(f"{key}: {seconds:.0f} CPU seconds", flush=True)
    return count


@contextlib.contextmanager
def claimed(folder: Path, key: str) -> Iterator[bool]:
    """Whether this process is the only one at that cell; several share the work."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{key.replace('/', '-')}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


# --- the test rows


def open_test(name: str, despite: str = "", ledger_path: Path = LEDGER) -> dict[str, Any]:
    """Open a task's test rows: writes date, commit, chosen temperatures, the arm that the verdict is about, settings.

    Args:
        name: the task.
        despite: why it is opened although arms are missing; recorded.

    Raises:
        PermissionError: they were opened before, or arms are missing on dev rows and no reason is given.
    """
    task = TASKS[name]
    with alone(ledger_path) as ledger:
        if name in ledger["opened"]:
            raise PermissionError(
                f"The test rows of {name} were opened on {ledger['opened'][name]['date']}, and are opened once."
            )
        known = current(ledger, task)
        wanted = [key_of(cell) for part in ("dev", "sweep") for cell in cells(task, part)]
        missing = [key for key in wanted if key not in known]
        if missing and not despite:
            raise PermissionError(
                f"{len(missing)} cells of {name} are missing on dev rows, {missing[0]} first. Run them, or give a "
                "reason with `--despite`."
            )
        measured, judges = by_arm(ledger, task, "dev"), telling(ledger, task, "dev") or list(judging.judges_of(task))
        chosen = {arm: verdicts.chosen_temperature(of_arm, judges) for arm, of_arm in measured.items()}
        laws = {arm: verdicts.sums(of_arm[chosen[arm]], judges) for arm, of_arm in measured.items()}
        frontier = [verdicts.sums(by_seed, judges) for by_seed in measured["SFT"].values()]
        ledger["opened"][name] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": _git("rev-parse", "HEAD"),
            "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "code": code(),
            "temperatures": chosen,
            "judges": judges,
            "frontier": verdicts.ends_of_frontier(measured["SFT"], judges),
            "best": verdicts.best_arm(laws, frontier),
            "settings": {arm: settings_of(task, arm, "test") for arm in ("power", *chosen)},
            "said": repr(task.settings),
            "missing": missing,
            "despite": despite,
        }
        return ledger["opened"][name]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


# --- read again


def current(ledger: dict[str, Any], task: Task) -> dict[str, Any]:
    """The records that were measured with the settings as they are now."""
    found = {}
    for cell in all_cells([task], ledger["opened"]):
        record = ledger["cells"].get(key_of(cell), {})
        if record.get("settings") == settings_of(task, cell["arm"], cell["part"]):
            found[key_of(cell)] = record
    return found


def by_arm(ledger: dict[str, Any], task: Task, part: str) -> dict[str, verdicts.Measured]:
    """Arm -> temperature -> seed -> what was measured; dev rows with their sweeps."""
    known, found = current(ledger, task), {}
    best = ledger["opened"].get(task.name, {}).get("best")
    for cell in [*cells(task, part, best), *(cells(task, "sweep") if part == "dev" else ())]:
        record = known.get(key_of(cell))
        if record and cell["arm"] != "power":
            for temperature, measured in record["result"]["at"].items():
                found.setdefault(cell["arm"], {}).setdefault(float(temperature), {})[cell["seed"]] = measured
    return found


def telling(ledger: dict[str, Any], task: Task, part: str) -> list[str]:
    """The judges that noticed what was planted in dev rows; the others cannot tell. The opening fixes them."""
    if part == "test":
        return ledger["opened"][task.name]["judges"]
    record = current(ledger, task).get(key_of(cells(task, part)[0]))
    return [name for name, seen in record["result"].items() if seen["notices"]] if record else []


def summarize(ledger: dict[str, Any], task: Task) -> tuple[list[dict[str, Any]], list[str], str]:
    """The table of one task, the aims' verdict in words, and the part that both are about."""
    part = "test" if any(key.startswith(f"{task.name}/test/") for key in current(ledger, task)) else "dev"
    measured, noticing = by_arm(ledger, task, part), telling(ledger, task, part)
    if "SFT" not in measured:
        return [], ["nothing was measured yet"], part
    judges = noticing or list(judging.judges_of(task))
    chosen = {arm: chosen_for(ledger, task, part, arm, of_arm, judges) for arm, of_arm in measured.items()}
    known, table = current(ledger, task), []
    for arm, of_arm in measured.items():
        facts = [known[f"{task.name}/{part}/{arm}/{seed}"]["result"] for seed in sorted(of_arm[chosen[arm]])]
        shown = sorted(of_arm) if arm == "SFT" else [chosen[arm]]
        table += [verdicts.row(arm, t, of_arm[t], facts, judges) for t in shown]
    power = known.get(key_of(cells(task, part)[0]))
    words = [f"power: {_power_in_words(power['result'])}"] if power else ["power: not measured"]
    if not noticing:
        return table, [*words, "cannot tell: no judge noticed what was planted"], part
    frontier = [verdicts.sums(by_seed, judges) for by_seed in measured["SFT"].values()]
    laws = {arm: verdicts.sums(of_arm[chosen[arm]], judges) for arm, of_arm in measured.items()}
    best = ledger["opened"][task.name]["best"] if part == "test" else verdicts.best_arm(laws, frontier)
    strongest = max(judges, key=lambda name: verdicts.means(verdicts.sums(measured["SFT"][1.0], [name]))[0])
    for arm in dict.fromkeys((best, *HEADLINE)):
        if arm in laws:
            seen = verdicts.verdict(laws[arm], frontier)
            words.append(_in_words(arm, arm == best, "SFT at any temperature", seen, len(laws[arm].seeds)))
    if best:
        for rival in (name for name in RIVALS if name in laws):
            seen = verdicts.verdict(laws[best], [laws[rival]])
            words.append(_in_words(best, True, rival, seen, len(set(laws[best].seeds) & set(laws[rival].seeds))))
        alone_law = verdicts.sums(measured[best][chosen[best]], [strongest])
        alone_frontier = [verdicts.sums(by_seed, [strongest]) for by_seed in measured["SFT"].values()]
        seen = verdicts.verdict(alone_law, alone_frontier)
        words.append(
            f"by {strongest} alone, " + _in_words(best, True, "SFT at any temperature", seen, len(alone_law.seeds))
        )
    words.append(f"the frontier is SFT at {', '.join(f'{t:g}' for t in sorted(measured['SFT']))}")
    if part == "dev":
        words.append("nothing is claimed: arm and temperatures were chosen on these rows")
    elif unmeasured := [key for key in _wanted_on_test_rows(ledger, task) if key not in known]:
        words.append(f"incomplete, nothing is claimed: {len(unmeasured)} cells are missing, {unmeasured[0]} first")
    return table, words, part


def _wanted_on_test_rows(ledger: dict[str, Any], task: Task) -> list[str]:
    opening = ledger["opened"][task.name]
    return [key_of(cell) for cell in cells(task, "test", opening["best"]) if cell["arm"] in opening["settings"]]


def chosen_for(
    ledger: dict[str, Any], task: Task, part: str, arm: str, measured: verdicts.Measured, judges: Sequence[str]
) -> float:
    """On test rows what was recorded at their opening; on dev rows what would be."""
    if part == "test":
        return ledger["opened"][task.name]["temperatures"][arm]
    return verdicts.chosen_temperature(measured, judges)


def _power_in_words(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} notices {seen['smallest']:.0%}" if seen["smallest"] else f"{name} notices nothing, not even 20%"
        for name, seen in result.items()
    )


def _in_words(arm: str, is_best: bool, rival: str, seen: verdicts.Verdict, num_seeds: int) -> str:
    def said(one: verdicts.Estimate) -> str:
        return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"

    best = f" ({'best on dev rows; ' if is_best else ''}{num_seeds} seed{'s' if num_seeds > 1 else ''})"
    return (
        f"{arm}{best} against {rival}: accuracy {said(seen.less_seen)}, by seeds "
        f"{said(seen.less_seen_by_seeds)}; bits "
        f"{said(seen.dearer)}: {'beyond' if seen.beyond else 'not beyond'}; advantage minus half of the other's "
        f"{said(seen.left)}: {'halved' if seen.halves else 'not halved'}"
    )


def figure(ledger: dict[str, Any], task: Task, path: Path) -> None:
    """The frontier and the arms of one task."""
    _, _, part = summarize(ledger, task)
    measured, judges = by_arm(ledger, task, part), telling(ledger, task, part) or list(judging.judges_of(task))
    frontier = {t: verdicts.sums(by_seed, judges) for t, by_seed in measured["SFT"].items()}
    laws = {
        arm: verdicts.sums(of_arm[chosen_for(ledger, task, part, arm, of_arm, judges)], judges)
        for arm, of_arm in measured.items()
        if arm != "SFT"
    }
    best = ledger["opened"].get(task.name, {}).get("best")
    named = f"{len(judges)} fresh judges, mean"
    verdicts.plot(frontier, laws, {*HEADLINE, best}, named, f"{task.name}, {part} rows", path)


def main(arguments: list[str] | None = None) -> int:
    """`python -m benchmarks.contest run | open | summarize`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contest", description="The contest.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure what is missing")
    running.add_argument(
        "--minutes", type=float, default=60.0, help="no new cell after so long (default: %(default)s)"
    )
    running.add_argument("--task", choices=TASKS, action="append", help="only these tasks")
    opening = commands.add_parser("open", help="open a task's test rows, once")
    opening.add_argument("task", choices=TASKS)
    opening.add_argument("--despite", default="", help="why, although arms are missing")
    commands.add_parser("summarize", help="tables, verdicts, figures")
    options = parser.parse_args(arguments)
    if options.command == "run":
        print(f"{run(options.minutes, options.task or list(TASKS))} cells measured")
        return 0
    if options.command == "open":
        try:
            print(json.dumps(open_test(options.task, options.despite), indent=2))
        except PermissionError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    ledger = read_ledger(LEDGER)
    for task in TASKS.values():
        table, words, part = summarize(ledger, task)
        print(f"\n{task.name}, {part} rows\n\n{format_table(table)}\n")
        print("\n".join(words))
        if table:
            figure(ledger, task, RESULTS / f"contest-{task.name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
