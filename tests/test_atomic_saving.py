"""When a run saves, what it says when it cannot, and how it stops; killed runs are in test_resume.py."""

import errno
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from exact_runs import make, run
from tiny_runs import imitator_weights, same, train
from transformers import TrainerCallback

from hf_imitate import AdversarialConfig, LatentRetrodictiveConfig, RetrodictiveConfig
from hf_imitate.trainers import atomic_saving
from hf_imitate.trainers.checkpoints import checkpoints
from hf_imitate.trainers.retrodictive_saving import damage

LONG = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
SAVED = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir):
    """A run of four steps with a checkpoint after each. Read-only."""
    return run(tmp_path_factory.mktemp("whole"), tiny_model_dir, adapter=True, **LONG, **SAVED)


class At(TrainerCallback):
    """Does something at one moment of one step."""

    def __init__(self, moment, step, act):
        setattr(self, moment, lambda args, state, control, **kwargs: act() if state.global_step == step else None)


def left(trainer):
    """The names in a run's folder that are checkpoints or were about to be."""
    folder = Path(trainer.args.output_dir)
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def disk_is_full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_until_it_is_whole_a_checkpoint_is_not_there(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **{**LONG, "max_steps": 2}, **SAVED)
    seen = []
    write = trainer._save_rng_state

    def observed(folder):
        write(folder)
        seen.append((Path(folder).parent.name, left(trainer)))

    trainer._save_rng_state = observed
    at_save = []
    for step in (1, 2):
        trainer.add_callback(
            At("on_save", step, lambda: at_save.append([damage(p) for p in checkpoints(tmp_path / "run")]))
        )
    train(trainer)
    assert seen == [("_saving-1", ["_saving-1"]), ("_saving-2", ["_saving-2", "checkpoint-1"])]
    assert at_save == [[None], [None, None]]
    assert left(trainer) == ["checkpoint-1", "checkpoint-2"]


def test_the_new_checkpoint_is_whole_before_an_old_one_goes(tmp_path, tiny_model_dir, monkeypatch):
    seen, rotate = [], atomic_saving.rotate_checkpoints

    def observed(output_dir, **given):
        seen.append([(path.name, damage(path)) for path in checkpoints(output_dir)])
        rotate(output_dir=output_dir, **given)

    monkeypatch.setattr(atomic_saving, "rotate_checkpoints", observed)
    trainer = run(tmp_path, tiny_model_dir, adapter=True, **{**LONG, "max_steps": 3}, **SAVED, save_total_limit=1)
    assert seen[1:] == [
        [("checkpoint-2", None), ("checkpoint-1", None)],
        [("checkpoint-3", None), ("checkpoint-2", None)],
    ]
    assert left(trainer) == ["checkpoint-3"]


def test_a_clock_that_was_put_back_does_not_cost_the_newest_checkpoint(tmp_path, tiny_model_dir):
    """Or another machine's, or a file that was put into the older one: it was changed last, and is not the newest."""
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **{**LONG, "max_steps": 2}, **SAVED, save_total_limit=1)
    first, later = tmp_path / "run" / "checkpoint-1", time.time() + 3600
    trainer.add_callback(At("on_step_begin", 1, lambda: os.utime(first, (later, later))))
    train(trainer)
    assert left(trainer) == ["checkpoint-2"]


def test_nothing_is_flushed_before_all_processes_have_written_and_nothing_moved_before_all_is_flushed(
    tmp_path, tiny_model_dir, monkeypatch
):
    """The first one writes files and removes them again: another would flush what is gone."""
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **{**LONG, "max_steps": 1}, **SAVED)
    events = []

    def noting(owner, name):
        original = getattr(owner, name)

        def noted(*args, **kwargs):
            result = original(*args, **kwargs)
            events.append(name)
            return result

        monkeypatch.setattr(owner, name, noted)

    noting(trainer, "_save_rng_state")
    noting(trainer.accelerator, "wait_for_everyone")
    noting(atomic_saving, "flush")
    noting(atomic_saving, "put_in_place")
    train(trainer)
    wait = "wait_for_everyone"
    start = events.index("_save_rng_state")
    assert events[start - 1 : start + 6] == [wait, "_save_rng_state", wait, "flush", wait, "put_in_place", wait]


def test_a_run_that_went_back_does_not_delete_what_it_has_just_saved(whole, tmp_path, tiny_model_dir):
    """By its number, checkpoint-2 is older than the damaged checkpoint-4, and a limit of one would take it."""
    folder = shutil.copytree(whole.args.output_dir, tmp_path / "run")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    again = make(tmp_path, tiny_model_dir, adapter=True, **LONG, **SAVED, save_total_limit=1)
    found = []
    again.add_callback(At("on_save", 2, lambda: found.append(left(again))))
    train(again, resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert found == [["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]]
    assert left(again) == ["checkpoint-4"]
    assert damage(folder / "checkpoint-4") is None
    assert same(imitator_weights(again), imitator_weights(whole))


def test_the_best_checkpoint_is_known_by_its_place_and_loaded_from_there(tmp_path, tiny_model_dir):
    from exact_runs import rows

    trainer = make(
        tmp_path,
        tiny_model_dir,
        adapter=True,
        arguments={"eval_dataset": rows(4)},
        **{**LONG, **SAVED, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1},
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first step is the best
    )
    bests = []
    for step in (1, 2, 3):
        trainer.add_callback(At("on_save", step, lambda: bests.append(trainer.state.best_model_checkpoint)))
    train(trainer)
    assert bests == [str(tmp_path / "run" / "checkpoint-1")] * 3
    assert left(trainer) == ["checkpoint-1"]
    assert bests[0] in (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text()
    assert trainer._step_of_weights == 1


# --- when it cannot save


def test_a_full_disk_leaves_the_old_checkpoint_and_names_it(tmp_path, tiny_model_dir, monkeypatch, whole):
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **LONG, **SAVED)
    trainer.add_callback(At("on_step_begin", 2, lambda: monkeypatch.setattr(torch, "save", disk_is_full)))
    with pytest.raises(
        OSError, match=r"checkpoint-3 could not be written .*No space left.*checkpoint-2; `resume_from"
    ) as info:
        train(trainer)
    assert "MiB are free there. Nothing half-written is left." in str(info.value)
    assert left(trainer) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    again = make(tmp_path, tiny_model_dir, adapter=True, **LONG, **SAVED)
    train(again, resume_from_checkpoint=True)
    assert same(imitator_weights(again), imitator_weights(whole))


def test_another_error_in_a_save_stays_what_it_is_and_leaves_nothing_behind(tmp_path, tiny_model_dir, monkeypatch):
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **LONG, **SAVED)

    def broken():
        raise KeyError("a bug")

    monkeypatch.setattr(trainer, "trained_law", broken)
    with pytest.raises(KeyError, match="a bug"):
        train(trainer)
    assert left(trainer) == []


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(tmp_path, tiny_model_dir, monkeypatch):
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **LONG, **SAVED)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        PermissionError, match=r"Nothing can be written to `output_dir`.*There is no complete checkpoint"
    ):
        train(trainer)
    assert trainer.state.global_step == 0
    trainer.args.save_strategy = "no"
    train(trainer)


# --- how it stops

IS_MAIN = threading.current_thread() is threading.main_thread()


@pytest.mark.skipif(not IS_MAIN, reason="signals are the main thread's")
@pytest.mark.parametrize("moment", ["on_pre_optimizer_step", "on_save"])
def test_a_sigterm_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, tiny_model_dir, caplog, moment, whole):
    rare = {**SAVED, "save_steps": 3 if moment == "on_save" else 100}
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **LONG, **rare)
    step = 3 if moment == "on_save" else 2  # counted after the step, and before
    trainer.callback_handler.callbacks.insert(0, At(moment, step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as info:
        train(trainer)
    assert info.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert "Stopped by SIGTERM after step 3. The newest complete checkpoint is" in caplog.text
    assert left(trainer) == ["checkpoint-3"]
    again = make(tmp_path, tiny_model_dir, adapter=True, **LONG, **rare)
    train(again, resume_from_checkpoint=True)
    assert same(imitator_weights(again), imitator_weights(whole))


@pytest.mark.skipif(not IS_MAIN, reason="signals are the main thread's")
def test_a_sigterm_saves_nothing_where_nothing_is_to_be_saved(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **LONG)
    trainer.add_callback(At("on_step_begin", 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit):
        train(trainer)
    assert (trainer.state.global_step, left(trainer)) == (2, [])


@pytest.mark.skipif(not IS_MAIN, reason="signals are the main thread's")
def test_a_child_of_the_run_ends_by_sigterm_as_ever(tmp_path, tiny_model_dir):
    """A reward may run code in a process that it forks and ends after a while; the run itself goes on."""
    ended = []

    def run_code():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        time.sleep(0.1)
        child.terminate()
        child.join(5)
        ended.append(child.exitcode)
        child.kill()

    trainer = make(tmp_path, tiny_model_dir, adapter=True, **LONG)
    trainer.add_callback(At("on_step_begin", 1, run_code))
    train(trainer)
    assert (trainer.state.global_step, ended) == (4, [-signal.SIGTERM])


@pytest.mark.skipif(not IS_MAIN, reason="signals are the main thread's")
def test_who_handles_sigterm_already_goes_on_handling_it(tmp_path, tiny_model_dir):
    told = []
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **LONG)
    trainer.add_callback(At("on_step_begin", 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        train(trainer)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (trainer.state.global_step, told) == (4, [signal.SIGTERM])


def test_an_interrupt_stops_at_once_and_says_where_to_go_on(tmp_path, tiny_model_dir, caplog):
    trainer = make(tmp_path, tiny_model_dir, adapter=True, **LONG, **SAVED)

    def interrupt():
        raise KeyboardInterrupt

    trainer.add_callback(At("on_pre_optimizer_step", 1, interrupt))
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        train(trainer)
    assert (
        f"Interrupted in step 2. The newest complete checkpoint is {tmp_path}/run/checkpoint-1; `resume" in caplog.text
    )


# --- settings under which it would not go on to the same bits


@pytest.mark.parametrize("kind", [AdversarialConfig, RetrodictiveConfig, LatentRetrodictiveConfig])
@pytest.mark.parametrize("name", ["enable_jit_checkpoint", "ignore_data_skip"])
def test_a_setting_that_breaks_resuming_is_refused(tmp_path, kind, name):
    with pytest.raises(ValueError, match=f"`{name}=True` .*Leave it at False"):
        kind(str(tmp_path), report_to="none", **{name: True})
