"""How a checkpoint comes to stand whole or not at all: written beside, flushed, listed with its hashes, renamed."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from hf_imitate.hub_cards.card_file import FACTS_FILE
from hf_imitate.hub_cards.push import MARKER
from hf_imitate.repo_checks import read_object

# What starts with "_" is not published, and transformers takes none of these names for a checkpoint.
MARKER_VERSION = 1
_REWRITTEN = (FACTS_FILE, "README.md")  # by `hf-imitate card`; no run is taken up from what they say
_UNFINISHED, REPLACED = re.compile(r"_saving-(\d+)"), "replaced"


def unfinished_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written, as `checkpoint-<step>` in it, before it stands at its place."""
    return run_folder / f"_saving-{step}"


def discard(folder: Path) -> None:
    """Remove a folder that was written beside; of a link, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def settle(folder: Path) -> None:
    """Remove a folder that was written beside, once what belongs at the checkpoint's place is there again.

    Whoever wrote it may have died between two renames: a checkpoint that was complete is put in its place, and one
    that had been moved out of the way for it is put back.
    """
    match = _UNFINISHED.fullmatch(folder.name)
    if match is not None and folder.is_dir() and not folder.is_symlink():
        name = f"checkpoint-{match[1]}"
        place, written, replaced = folder.parent / name, folder / name, folder / REPLACED
        is_complete = is_marked(written) and marked_damage(written) is None
        found = written if is_complete else replaced
        if found.is_dir() and not place.exists():
            os.replace(found, place)
            _flush(folder.parent)
    discard(folder)


def clear_leftovers(run_folder: Path) -> None:
    """Settle the folders in which dead runs were writing a checkpoint; only names of our own are touched."""
    for folder in sorted(run_folder.iterdir()) if run_folder.is_dir() else ():
        if _UNFINISHED.fullmatch(folder.name):
            settle(folder)


def flush(folder: Path) -> None:
    """Wait until a folder and all that lies in it is on the disk."""
    for path in (*sorted(folder.rglob("*")), folder):
        _flush(path)


def put_in_place(written: Path, place: Path) -> None:
    """Mark a checkpoint that is written and flushed as complete, and rename it to its place.

    The marker lists every file but the card's with its size and SHA-256, so that what is cut off or altered later is
    found. A checkpoint that stood there is moved out of the way first, into the folder that is about to be removed.
    """
    files = {
        path.relative_to(written).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(written.rglob("*"))
        if path.is_file() and path.relative_to(written).as_posix() not in _REWRITTEN
    }
    marker = written / MARKER
    with marker.open("w", encoding="utf-8") as stream:
        json.dump({"version": MARKER_VERSION, "files": files}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    _flush(written)
    if place.is_symlink() or place.exists():
        os.replace(place, written.parent / REPLACED)
    os.replace(written, place)
    _flush(place.parent)
    discard(written.parent)


def is_marked(checkpoint: Path) -> bool:
    """Whether a checkpoint says of itself that it is complete; those from before there were markers do not."""
    return (checkpoint / MARKER).is_file()


def marked_damage(checkpoint: Path, reads_all: bool = True) -> str | None:
    """What a marked checkpoint lacks, in plain words.

    Args:
        checkpoint (`Path`): its folder.
        reads_all (`bool`, *optional*, defaults to `True`): read every file to its end; else only ask for its size.

    Returns:
        The first file that is missing, cut off, altered or cannot be read; `None` if there is none.
    """
    try:
        listed = read_object(checkpoint / MARKER)  # a checkpoint of the Hub may be anybody's
        files = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in listed["files"].items()}
        is_known = listed["version"] == MARKER_VERSION
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} is cut off"
    except OSError as error:
        return f"{MARKER} cannot be read ({error.strerror})"
    if not is_known:
        return f"{MARKER} is of version {listed['version']}, and this hf-imitate knows {MARKER_VERSION}"
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        return f"{MARKER} lists files outside the checkpoint"
    for name, (size, _) in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (checkpoint / name).stat().st_size < size:
            return f"{name} is cut off"
    altered = (_altered(checkpoint, name, sha256) for name, (_, sha256) in files.items() if reads_all)
    return next(filter(None, altered), None)


def _altered(checkpoint: Path, name: str, sha256: str) -> str | None:
    try:
        is_same = _sha256(checkpoint / name) == sha256
    except OSError as error:  # such as a bad sector
        return f"{name} cannot be read ({error.strerror})"
    return None if is_same else f"{name} is not what was saved, its SHA-256 differs"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # elsewhere a folder cannot be opened
    # To be flushed, a file need not be writable; elsewhere it does.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
