"""Several processes, one run: where one fails, all stop, with its words, its step and a place to go on from."""

import contextlib
import dis
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

logger = logging.getLogger(__name__)

POLL, ACKNOWLEDGE, GRACE = 0.5, 3.0, 4.0  # seconds: between two looks, for all to have looked, to leave by itself
MOST_WORDS = 4000  # bytes of a message


class ProcessFailure(RuntimeError):
    """A process of this run failed, perhaps another one, so all of them stop."""


class NotFinite(ProcessFailure, FloatingPointError):
    """The numbers of a process stopped being finite."""


class AgreedStop(SystemExit):
    """All processes stop after the same step, and none of them has failed."""


def words_of(error: BaseException) -> str:
    """What may be told of an error to other processes: of ours all, for they quote no rows; of others the kind and the
    place."""
    kind = type(error).__name__
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = "" if last is None else last.tb_frame.f_globals.get("__name__", "")
    if _is_raised_by_us(last, module) or isinstance(error, torch.OutOfMemoryError):
        return f"{kind}: {error}"
    if isinstance(error, OSError) and error.strerror:
        kind = f"{kind} ({error.strerror})"
    where = "" if last is None else f" in {module}, line {last.tb_lineno}"
    return f"{kind}{where}; its own words may quote a row and stand in the output of that process alone."


def _is_raised_by_us(last: TracebackType | None, module: str) -> bool:
    if last is None or module.split(".")[0] != "hf_imitate":
        return False
    # Not what Python or torch says in a line of ours: "could not convert string to float" quotes the string.
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _told(error: BaseException, accelerator: Accelerator, step: int) -> str:
    return (
        f"Process {accelerator.process_index} of {accelerator.num_processes} failed at step {step}: {words_of(error)}"
    )


@contextlib.contextmanager
def agreed(accelerator: Accelerator, step: int) -> Iterator[None]:
    """Do inside what may fail on one process alone, such as calls of a user's functions; then all go on, or none.

    Every process has to come here equally often, and nothing inside may wait for others.

    Args:
        accelerator ([`~accelerate.Accelerator`]): knows the processes.
        step (`int`): of the optimizer, for the message.

    Raises:
        ProcessFailure: on every process, with the words of the first that failed. One process alone raises its error
            as it is.
    """
    if accelerator.num_processes == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as found:
        error = found
    has_failed = gather(torch.tensor([error is not None], device=accelerator.device))
    if has_failed.any():
        first = int(has_failed.nonzero()[0])
        mine = "" if error is None else _told(error, accelerator, step)
        is_not_finite = torch.tensor([isinstance(error, FloatingPointError)], device=accelerator.device)
        kind = NotFinite if gather(is_not_finite)[first] else ProcessFailure
        raise kind(_said_by(first, mine, accelerator)) from error


def _said_by(process: int, words: str, accelerator: Accelerator) -> str:
    # As numbers, since torch sends objects as pickles.
    sent = torch.zeros(1, MOST_WORDS, dtype=torch.uint8, device=accelerator.device)
    encoded = words.encode("utf-8", "replace")[:MOST_WORDS]
    sent[0, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    return bytes(gather(sent)[process].tolist()).rstrip(b"\0").decode("utf-8", "ignore")


def stopping_together(train: Callable) -> Callable:
    """A trainer's `train` where a process that fails tells the others, which may wait for it in a collective that
    nobody can interrupt.

    They hear of it from a thread. Whoever has not left after a few seconds is ended. The error of every process is a
    [`ProcessFailure`] with the words of the first that failed; one process alone raises its error as it is.
    """

    @functools.wraps(train)
    def together(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.accelerator.num_processes == 1 or not torch.distributed.is_initialized():
            return train(trainer, *args, **kwargs)
        watch = _Watch(trainer.accelerator.num_processes)
        try:
            return train(trainer, *args, **kwargs)
        except AgreedStop:
            raise
        except BaseException as error:
            is_told = isinstance(error, ProcessFailure)
            mine = str(error) if is_told else _told(error, trainer.accelerator, trainer.state.global_step)
            if not isinstance(error, FloatingPointError):  # else it names one from before the numbers broke
                mine = f"{mine} {_where_to_go_on(trainer)}"
            first = watch.tell(mine, wait=not is_told)
            if not isinstance(error, Exception):
                raise  # an interrupt stays one
            kind = NotFinite if isinstance(error, FloatingPointError) else ProcessFailure
            raise kind(first) from (error.__cause__ if is_told else error if first == mine else None)
        finally:
            watch.end()

    return together


def _where_to_go_on(trainer: Any) -> str:
    try:
        return trainer.where_to_go_on()
    except Exception:  # whatever lies there, the processes have to stop
        return "There is no complete checkpoint to go on from."


class _Watch:
    """Tells others of a failure and hears of theirs, through the store by which torch's processes found each other."""

    _number = 0  # of watches so far, the same on all processes

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        _Watch._number += 1
        self.store: Store = PrefixStore(f"hf_imitate/{_Watch._number}", _get_default_store())
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._listen, name="other processes", daemon=True)
        self.thread.start()

    def tell(self, words: str, wait: bool) -> str:
        """Tell all of a failure of this process, and `wait` until they heard; returns the words of the first that
        told."""
        self.is_over.set()
        try:
            first = self.store.compare_set("failure", "", words).decode()
            if first != words:
                self.store.add("heard", 1)
                return first
            # Else the launcher may end the others before they could say why.
            end = time.monotonic() + ACKNOWLEDGE
            while wait and self.store.add("heard", 0) < self.num_processes - 1 and time.monotonic() < end:
                time.sleep(POLL / 10)
        except RuntimeError:  # the store is gone with the process that held it
            return words
        return words

    def _listen(self) -> None:
        try:
            while not self.is_over.wait(POLL):
                if self.store.check(["failure"]):
                    break
            else:
                return
            words = self.store.get("failure").decode()
            self.store.add("heard", 1)
        except RuntimeError:  # the store is gone: the launcher is ending the run
            return
        logger.error(words)
        if not self.is_over.wait(GRACE):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def end(self) -> None:
        """Listen no longer."""
        self.is_over.set()
        self.thread.join()
