"""When a run saves, what it says when it cannot, and how it stops."""

import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from hf_imitate.trainers.atomic_checkpoints import (
    clear_leftovers,
    flush,
    is_marked,
    marked_damage,
    put_in_place,
    settle,
    unfinished_folder,
)
from hf_imitate.trainers.checkpoints import LAST_WRITTEN, checkpoints, numbers_alone
from hf_imitate.trainers.ranks import AgreedStop

logger = logging.getLogger(__name__)

# A disk that is full is a bare `RuntimeError` to it, with the place in its source.
_WRITER_OF_TORCH = "inline_container"


class AtomicSaving:
    """The part of a trainer that decides when a checkpoint stands: whole, or not at all.

    Comes before TRL's trainer among the bases. All processes write into one folder beside; once every one of them is
    done and flushed, those that transformers lets save (the first one, or that of each node) put it in its place.
    """

    _unfinished: Path | None = None  # the folder that is written beside, while a checkpoint is saved

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._stopping = StopOnSignal(self)
        self.add_callback(self._stopping)

    def lack_of(self, checkpoint: Path) -> str | None:
        """What a checkpoint of this kind of run lacks, in plain words; `None` if it is whole."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As in transformers; a SIGTERM stops after the step, with a checkpoint, an interrupt says what is left."""
        try:
            with self._stopping:
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except KeyboardInterrupt:
            logger.warning("Interrupted in step %d. %s", self.state.global_step + 1, self.where_to_go_on())
            raise

    def where_to_go_on(self) -> str:
        """Where a run that ended early goes on, in a sentence."""
        found = next((path for path in checkpoints(self.args.output_dir) if self._seems_whole(path)), None)
        if found is None:
            return "There is no complete checkpoint to go on from."
        return f"The newest complete checkpoint is {found}; `resume_from_checkpoint=True` goes on from it."

    def _seems_whole(self, checkpoint: Path) -> bool:
        # Others wait for these words, a scheduler perhaps; whoever resumes reads every file.
        lack = marked_damage(checkpoint, reads_all=False) if is_marked(checkpoint) else self.lack_of(checkpoint)
        return lack is None

    def prepare_output_dir(self) -> None:
        """Remove what dead runs left half written.

        Raises:
            PermissionError: checkpoints are wanted, and nothing can be written to `output_dir`.
        """
        folder = Path(self.args.output_dir)
        if self.args.should_save and self.args.save_strategy != SaveStrategy.NO:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(
                    f"Nothing can be written to `output_dir` {folder}, so no checkpoint could be saved; nothing was "
                    "trained. Make it writable, give another one, or set `save_strategy='no'`. "
                    f"{self.where_to_go_on()}"
                )
            clear_leftovers(folder)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        with numbers_alone(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with numbers_alone(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint):
        with numbers_alone(checkpoint):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model, trial):
        run_folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        unfinished = unfinished_folder(run_folder, self.state.global_step)
        try:
            if self.args.should_save:
                settle(unfinished)
            self.accelerator.wait_for_everyone()
            self._unfinished = unfinished
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            self._name_best(run_folder, unfinished / name)
            self.accelerator.wait_for_everyone()  # while others write, files come and go
            if self.args.local_process_index == 0:
                flush(unfinished / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                put_in_place(unfinished / name, run_folder / name)
        except BaseException as error:
            if self.args.world_size == 1:  # else others may be writing there, and would fail before they hear why
                with contextlib.suppress(OSError):
                    settle(unfinished)
            if isinstance(error, OSError | SafetensorError) or _WRITER_OF_TORCH in str(error):
                raise OSError(self._could_not_save(run_folder, name, error)) from error
            raise
        self.accelerator.wait_for_everyone()
        if self.args.process_index != 0 and self.args.local_process_index == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a node that keeps no checkpoints
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))
        # Where later checkpoints stand, this run has gone back; what it just saved would pass for old and be deleted.
        if self.args.should_save and checkpoints(run_folder)[:1] == [run_folder / name]:
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,  # a clock that was put back must not cost the newest
            )

    def _name_best(self, run_folder: Path, written: Path) -> None:
        """Call the best checkpoint by its place; transformers has looked for it in the folder written beside."""
        if not self.state.best_global_step:
            return
        best = run_folder / f"checkpoint-{self.state.best_global_step}"
        if best.name == written.name or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(written / LAST_WRITTEN))

    def _could_not_save(self, run_folder: Path, name: str, error: BaseException) -> str:
        free = shutil.disk_usage(run_folder).free if run_folder.is_dir() else 0
        is_alone = self.args.world_size == 1
        left = "Nothing half-written is left." if is_alone else "What is half-written is removed when the run goes on."
        return (
            f"{name} could not be written to {run_folder} ({type(error).__name__}: {error}); {free / 2**20:.1f} MiB "
            f"are free there. {left} {self.where_to_go_on()} Make room, or lower "
            "`save_total_limit`, and go on."
        )


class StopOnSignal(TrainerCallback):
    """A SIGTERM, such as a scheduler's, ends a run after the step under way: with a checkpoint, and with status 143.

    Entered around a training. A second SIGTERM ends the process at once; whatever else handles SIGTERM is left to it.
    Of several processes, all stop at the step at which one has been told to.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._is_told = False
        self._process = 0
        self._earlier: Callable[[int, FrameType | None], Any] | int | None = None

    def __enter__(self) -> None:
        self._is_told, self._process = False, os.getpid()
        # Only the main thread may; and a handler that somebody else has set knows better.
        is_ours = threading.current_thread() is threading.main_thread()
        is_ours = is_ours and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        self._earlier = signal.signal(signal.SIGTERM, self._note) if is_ours else None

    def __exit__(self, *raised: Any) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)
            self._earlier = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self._process:  # a child that a reward has forked, such as one to run code in
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        must_stop = self._is_anybody_told(args)
        if must_stop and args.save_strategy == SaveStrategy.NO:
            self._leave(state)
        control.should_save = control.should_save or must_stop

    def on_save(self, args, state, control, **kwargs):
        if self._is_anybody_told(args):
            self._leave(state)

    def _is_anybody_told(self, args: Any) -> bool:
        if args.world_size == 1:
            return self._is_told
        told = torch.tensor([self._is_told], device=self.trainer.accelerator.device)
        return bool(gather(told).any())

    def _leave(self, state: Any) -> None:
        if state.is_world_process_zero:
            logger.warning("Stopped by SIGTERM after step %d. %s", state.global_step, self.trainer.where_to_go_on())
        raise AgreedStop(128 + signal.SIGTERM)
