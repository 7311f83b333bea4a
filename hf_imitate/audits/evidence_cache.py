"""What an audit has computed so far, on disk: whole files or none, numbers and JSON, never pickle."""

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class EvidenceCache:
    """A folder whose files belong to one plan. Everything in it can be computed again, so a broken file is no loss.

    It holds the imitator's answers as text, so it stays local: nothing in it is for pushing.

    Args:
        folder (`Path`, *optional*): where; `None` keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._kept: dict[str, dict[str, np.ndarray]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def arrays(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays stored under a name, or computed and then stored."""
        path = self._path(name, ".npz")
        if path is not None and path.is_file():
            broken = contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
            with broken, open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        values = compute()
        if path is not None:
            with _replacing(path) as unfinished:
                np.savez(unfinished, allow_pickle=False, **values)
        return values

    def shared_arrays(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The same for arrays that are needed again: computed once even where nothing is stored."""
        if name not in self._kept:
            self._kept[name] = self.arrays(name, compute)
        return self._kept[name]

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """JSON stored under a name, or computed and then stored."""
        path = self._path(name, ".json")
        if path is not None and path.is_file():
            with contextlib.suppress(OSError, ValueError, RecursionError):
                return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        if path is not None:
            write_text(path, json.dumps(value))
        return value

    def _path(self, name: str, suffix: str) -> Path | None:
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        return None if self.folder is None else self.folder / (plain + suffix)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one."""
    with _replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    # The process number keeps two audits of one plan from writing into one file.
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
