"""Which checkpoints of a run can be resumed: a crash, a kill or a full disk may leave the newest one half written."""

import re
from pathlib import Path

LAST_WRITTEN = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def newest_complete_checkpoint(output_dir: str | Path, most_step: int | None = None) -> Path | None:
    """The newest checkpoint that was written to its end, or `None`.

    transformers writes `trainer_state.json` after everything else, so a checkpoint that holds it holds the rest.

    Args:
        output_dir (`str` or `Path`): the run's folder.
        most_step (`int`, *optional*): look no further than the checkpoint of this step.
    """
    folder = Path(output_dir)
    steps = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and _is_whole(path / LAST_WRITTEN):
            steps[int(match[1])] = path
    usable = [step for step in steps if most_step is None or step <= most_step]
    return steps[max(usable)] if usable else None


def _is_whole(file: Path) -> bool:
    # It ends with its closing brace; a disk that filled up while it was written has cut that off.
    return file.is_file() and file.read_bytes().rstrip().endswith(b"}")
