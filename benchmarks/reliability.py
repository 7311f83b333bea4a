"""Runs that survive what happens to machines: kills, faults, long hours; what of it holds is measured here.

Every module of `benchmarks/worlds/reliability/` that lists `CELLS` is a part, with `run_cell(cell) -> dict` and
`rows(results) -> list of {"what", "claim", "measured", "passed"}` over its own cells, in their order. A cell carries
the hash of its part's source, so an edited part is measured again, and only that part. Parts need a POSIX system.
"""

import hashlib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "benchmarks.worlds.reliability"
FOLDER = Path(__file__).parent / "worlds" / "reliability"
SHARED = "small_runs"  # what the parts train


def _parts() -> dict[str, ModuleType]:
    names = sorted(info.name for info in pkgutil.iter_modules([str(FOLDER)]))
    modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in names if name != SHARED}
    return {name: module for name, module in modules.items() if hasattr(module, "CELLS")}


def _source(part: str) -> str:
    text = b"".join((FOLDER / f"{name}.py").read_bytes() for name in (SHARED, part))
    return hashlib.sha256(text).hexdigest()[:16]


CELLS = [{"part": part, "source": _source(part), **cell} for part, module in _parts().items() for cell in module.CELLS]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in cell.items() if key not in ("part", "source")}
    return _parts()[cell["part"]].run_cell(own)


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    table = []
    for part, module in _parts().items():
        own = [result for result in results if result["cell"]["part"] == part]
        table += [{"part": part, **row} for row in module.rows(own)]
    return table, all(row["passed"] for row in table)
