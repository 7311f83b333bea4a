"""A checkpoint stands whole or not at all, and what happened to it later is found."""

import errno
import json
import os

import pytest
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from hf_imitate.hub_cards.card_file import write_card
from hf_imitate.trainers import atomic_checkpoints
from hf_imitate.trainers.atomic_checkpoints import (
    MARKER,
    clear_leftovers,
    flush,
    is_marked,
    marked_damage,
    put_in_place,
    settle,
    unfinished_folder,
)


def write(run, step, text="weights"):
    """A checkpoint as it is written beside: weights, a file in a folder, a card."""
    written = unfinished_folder(run, step) / f"checkpoint-{step}"
    (written / "distinguisher").mkdir(parents=True)
    (written / "model.safetensors").write_text(text)
    (written / "distinguisher" / "head.json").write_text("{}")
    for name in ("imitation.json", "README.md"):
        (written / name).write_text("{}")
    return written


@pytest.fixture
def checkpoint(tmp_path):
    """A complete one."""
    put_in_place(write(tmp_path, 3), tmp_path / "checkpoint-3")
    return tmp_path / "checkpoint-3"


def test_what_is_put_in_place_lists_every_file_and_is_whole(checkpoint, tmp_path):
    assert json.loads((checkpoint / MARKER).read_text())["files"] == {
        "distinguisher/head.json": {
            "size": 2,
            "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        },
        "model.safetensors": {
            "size": 7,
            "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
        },
    }
    assert is_marked(checkpoint)
    write_card(checkpoint, license="mit")  # a card that was written again left nothing to go on from
    assert marked_damage(checkpoint) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["model.safetensors", "distinguisher/head.json"])
def test_a_file_that_is_missing_cut_off_altered_or_longer_is_named(checkpoint, name):
    file = checkpoint / name
    data = file.read_bytes()
    file.unlink()
    assert marked_damage(checkpoint) == f"{name} is missing"
    file.write_bytes(data[:-1])
    assert marked_damage(checkpoint) == f"{name} is cut off"
    for other in (bytes([data[0] ^ 1]) + data[1:], data + b"more"):
        file.write_bytes(other)
        assert marked_damage(checkpoint) == f"{name} is not what was saved, its SHA-256 differs"
    file.write_bytes(data)
    assert marked_damage(checkpoint) is None


def test_a_file_that_cannot_be_read_is_passed_over_like_one_that_is_damaged(checkpoint, monkeypatch):
    def bad_sector(path, name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic_checkpoints.hashlib, "file_digest", bad_sector)
    assert marked_damage(checkpoint) == "distinguisher/head.json cannot be read (Input/output error)"
    assert marked_damage(checkpoint, reads_all=False) is None
    monkeypatch.setattr(atomic_checkpoints, "read_object", lambda path: bad_sector(path, ""))
    assert marked_damage(checkpoint) == f"{MARKER} cannot be read (Input/output error)"


def test_sizes_are_asked_for_where_files_are_not_read(checkpoint):
    (checkpoint / "model.safetensors").write_text("weighty")
    assert marked_damage(checkpoint, reads_all=False) is None
    (checkpoint / "model.safetensors").write_text("weight")
    assert marked_damage(checkpoint, reads_all=False) == "model.safetensors is cut off"
    (checkpoint / "model.safetensors").unlink()
    assert marked_damage(checkpoint, reads_all=False) == "model.safetensors is missing"


def test_a_card_written_anew_and_an_audit_leave_a_checkpoint_whole(tmp_path):
    """`hf-imitate audit` and `hf-imitate card` may be asked about a checkpoint, too."""
    written = write(tmp_path, 3)
    for name in ("README.md", "imitation.json"):
        (written / name).write_text("old")
    (written / "distinguisher" / "README.md").write_text("old")
    put_in_place(written, tmp_path / "checkpoint-3")
    checkpoint = tmp_path / "checkpoint-3"
    for name in ("README.md", "imitation.json"):
        (checkpoint / name).write_text("a")
    (checkpoint / "audit").mkdir()
    (checkpoint / "audit" / "audit.json").write_text("{}")
    assert marked_damage(checkpoint) is None
    (checkpoint / "distinguisher" / "README.md").write_text("new")
    assert marked_damage(checkpoint) is not None


def test_a_file_that_may_only_be_read_is_flushed_too(tmp_path, monkeypatch):
    opened, original = [], os.open
    written = write(tmp_path, 3)
    monkeypatch.setattr(
        atomic_checkpoints.os, "open", lambda path, flags: opened.append(flags) or original(path, flags)
    )
    flush(written)
    assert opened == [os.O_RDONLY] * 6


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"version": 1}', '{"version": 1, "files": {"a": 3}}', "\x00"]
)
def test_a_marker_that_is_not_one_says_so(checkpoint, text):
    (checkpoint / MARKER).write_text(text)
    assert marked_damage(checkpoint) == f"{MARKER} is cut off"


def test_a_marker_may_not_lead_out_of_its_folder(checkpoint, tmp_path):
    (tmp_path / "private").write_text("")
    for name in ("../private", str(tmp_path / "private")):
        files = {name: {"size": 0, "sha256": ""}}
        (checkpoint / MARKER).write_text(json.dumps({"version": 1, "files": files}))
        assert marked_damage(checkpoint) == f"{MARKER} lists files outside the checkpoint"
    (checkpoint / MARKER).write_text(json.dumps({"version": 2, "files": {}}))
    assert "is of version 2" in marked_damage(checkpoint)


def test_neither_transformers_nor_a_push_takes_the_folder_beside_for_a_checkpoint(checkpoint, tmp_path):
    from fnmatch import fnmatch

    from hf_imitate.hub_cards.push import IGNORED_FILES

    written = write(tmp_path, 9)
    assert get_last_checkpoint(str(tmp_path)) == str(checkpoint)
    assert sort_checkpoints(str(tmp_path)) == [str(checkpoint)]
    name = (written / "model.safetensors").relative_to(tmp_path).as_posix()
    assert any(fnmatch(name, pattern) for pattern in IGNORED_FILES)
    assert any(fnmatch(MARKER, pattern) for pattern in IGNORED_FILES)


def test_every_file_and_folder_is_flushed_before_the_rename_and_the_folder_around_it_after(tmp_path, monkeypatch):
    events = []
    original = os.fsync

    def noting(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/"))
        original(descriptor)

    monkeypatch.setattr(atomic_checkpoints.os, "fsync", noting)
    written = write(tmp_path, 3)
    flush(written)
    beside = "_saving-3/checkpoint-3"
    files = ("README.md", "distinguisher", "distinguisher/head.json", "imitation.json", "model.safetensors")
    inside = [*(f"{beside}/{name}" for name in files), beside]
    assert events == inside
    put_in_place(written, tmp_path / "checkpoint-3")
    assert events[len(inside) :] == [f"{beside}/{MARKER}", beside, str(tmp_path)]


# --- what a dead run leaves


def test_only_folders_of_our_own_are_removed_and_never_through_a_link(tmp_path):
    write(tmp_path, 4)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("")
    put_in_place(write(tmp_path, 5), kept / "checkpoint-5")
    (tmp_path / "_saving-5").symlink_to(kept)
    write(tmp_path, 6)
    (tmp_path / "_saving-6" / "link").symlink_to(kept)
    for name in ("_saving-", "_saving-7x", "saving-7", "checkpoint-7"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"kept", "_saving-", "_saving-7x", "saving-7", "checkpoint-7"}
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-5", "file"]
    clear_leftovers(tmp_path / "nowhere")


def test_a_checkpoint_that_was_complete_before_its_rename_is_put_in_place(tmp_path, monkeypatch):
    def die(*paths):
        raise KeyboardInterrupt

    written = write(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_checkpoints.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            put_in_place(written, tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-4").exists()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert marked_damage(tmp_path / "checkpoint-4") is None


@pytest.mark.parametrize("lost", [None, MARKER, "distinguisher/head.json"])
def test_a_kill_between_two_renames_leaves_the_new_checkpoint_or_the_old(tmp_path, lost):
    """The one that stood there has been moved out of the way, and the other has not yet come."""
    put_in_place(write(tmp_path, 4, "old"), tmp_path / "checkpoint-4")
    put_in_place(write(tmp_path, 5, "new"), tmp_path / "checkpoint-5")
    beside = unfinished_folder(tmp_path, 4)
    beside.mkdir()
    os.replace(tmp_path / "checkpoint-4", beside / "replaced")
    os.replace(tmp_path / "checkpoint-5", beside / "checkpoint-4")
    if lost is not None:
        (beside / "checkpoint-4" / lost).unlink()
    settle(beside)
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_text() == ("new" if lost is None else "old")
    assert not beside.exists()


def test_a_link_that_stood_at_the_place_is_put_back_after_a_kill(tmp_path):
    """As where a checkpoint was moved to another disk; and nothing is moved over what stands there by now."""
    put_in_place(write(tmp_path, 4, "old"), tmp_path / "elsewhere")
    beside = unfinished_folder(tmp_path, 4)
    for text in ("old", "new"):
        beside.mkdir()
        (beside / "replaced").symlink_to(tmp_path / "elsewhere")
        settle(beside)
        assert (tmp_path / "checkpoint-4" / "model.safetensors").read_text() == text
        assert (tmp_path / "elsewhere").is_dir()
        if text == "old":
            (tmp_path / "checkpoint-4").unlink()
            put_in_place(write(tmp_path, 4, "new"), tmp_path / "checkpoint-4")


def test_a_checkpoint_that_stands_at_the_place_is_replaced(tmp_path):
    for text in ("old", "new"):
        put_in_place(write(tmp_path, 4, text), tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
