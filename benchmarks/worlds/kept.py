"""What is trained once and used by several cells: a folder under a hash of what made it."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def kept(name: str, folder: Path, settings: Sequence[Any], build: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder that `build` fills unless one of these settings, sources too, is there; facts in `made.json`."""
    digest = hashlib.sha256(str(settings).encode()).hexdigest()[:10]
    path = folder / f"{name}-{digest}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
            made = Path(unfinished) / "made"
            made.mkdir()
            begun = time.process_time()
            facts = build(made)
            facts["cpu_seconds"] = round(time.process_time() - begun, 1)
            (made / "made.json").write_text(json.dumps(facts), encoding="utf-8")
            try:
                made.rename(path)
            except OSError:
                if not path.exists():  # else another process was first
                    raise
    return path


def made(path: Path) -> dict[str, Any]:
    """The facts that [`kept`] wrote."""
    return json.loads((path / "made.json").read_text(encoding="utf-8"))
