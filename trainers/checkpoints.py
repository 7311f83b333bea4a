"""Which checkpoints of a run can be resumed: a crash, a kill or a full disk may leave the newest one half written."""

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.training_args import HubStrategy

from hf_imitate.human_rows import HumanRow

logger = logging.getLogger(__name__)

LAST_WRITTEN = "trainer_state.json"
STATE = "adversarial_state"  # and the number of the process
STATE_VERSION = 4
_NAME = re.compile(r"checkpoint-(\d+)")


def newest_complete_checkpoint(output_dir: str | Path, most_step: int | None = None) -> Path | None:
    """The newest checkpoint that was written to its end, or `None`.

    Args:
        output_dir (`str` or `Path`): the run's folder.
        most_step (`int`, *optional*): look no further than the checkpoint of this step.
    """
    return next((path for path in checkpoints(output_dir, most_step) if damage(path) is None), None)


def checkpoints(output_dir: str | Path, most_step: int | None = None) -> list[Path]:
    """Every checkpoint in a run's folder, the newest first, complete or not."""
    folder = Path(output_dir)
    steps = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (most_step is None or int(match[1]) <= most_step):
            steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def damage(checkpoint: str | Path) -> str | None:
    """What a checkpoint lacks, in plain words: its first file that is missing or cut off. `None` if it is whole.

    transformers writes `trainer_state.json` after everything else of its process, so where it stands, the rest of that
    process was written. A disk that was full or lost its power may still have cut a file off, and other processes may
    not have been done.
    """
    folder = Path(checkpoint)
    files = [folder / LAST_WRITTEN, *sorted(folder.rglob("*.safetensors"))]
    state = folder / f"{STATE}_0.json"
    if state.exists() or any(folder.glob("optimizer*")):  # else it holds weights alone, and says so when resumed
        files += [state, folder / "scheduler.pt", *sorted(folder.glob("optimizer*.pt"))]
        processes = [0]
        if state.exists() and is_whole(state):
            processes = json.loads(state.read_text(encoding="utf-8"))["processes"]
            files += (
                [] if any((*folder.glob("optimizer*"), *folder.glob("global_step*"))) else [folder / "optimizer.pt"]
            )
            one = len(processes) == 1
            files += [folder / ("rng_state.pth" if one else f"rng_state_{process}.pth") for process in processes]
        files += [folder / f"{STATE}_{process}{end}" for process in processes for end in (".json", ".safetensors")]
    for file in files:
        if not file.is_file():
            return f"{file.relative_to(folder)} is missing"
        if not is_whole(file):
            return f"{file.relative_to(folder)} is cut off"
    return None


def withdraw(folder: Path, process: int) -> bool:
    """Unmark a checkpoint that is about to be written again, so that a kill in between leaves no mixture of two.

    Returns:
        Whether `folder` is a checkpoint's.
    """
    if not _NAME.fullmatch(folder.name):
        return False
    for name in (LAST_WRITTEN, f"{STATE}_{process}.json"):
        (folder / name).unlink(missing_ok=True)
    return True


def checkpoint_to_resume(output_dir: str | Path, damage: Callable[[Path], str | None] = damage) -> Path:
    """The newest complete checkpoint; the log names those passed over.

    Args:
        output_dir (`str` or `Path`): the run's folder.
        damage (`Callable`, defaults to [`damage`]): what a checkpoint of this kind of run lacks; `None` for nothing.

    Raises:
        ValueError: there is none.
    """
    for folder in checkpoints(output_dir):
        lack = damage(folder)
        if lack is None:
            return folder
        logger.warning("%s is passed over: %s.", folder, lack)
    raise ValueError(
        f"{output_dir} holds no complete checkpoint to resume from. Start without `resume_from_checkpoint`, or give "
        "the path of one."
    )


def check_resumable(checkpoint: str | Path, process: int, facts: Mapping[str, Any]) -> None:
    """Check that a run can be taken up, before anything is loaded.

    Args:
        checkpoint (`str` or `Path`): where from.
        process (`int`): number of this process.
        facts (`Mapping`): what the run that takes it up must share with the one that left it, as JSON gives it back.

    Raises:
        FileNotFoundError: it holds no state of a game.
        ValueError: a file is missing or cut off, or a fact is another; the message names it.
    """
    folder = Path(checkpoint)
    states = [folder / f"{STATE}_{number}.json" for number in (process, 0)]
    state = next((path for path in states if path.exists()), None)
    if state is None:
        raise FileNotFoundError(
            f"{folder} holds no {states[0].name}, so distinguisher, phases and replay cannot be restored. Resume from "
            "a checkpoint of AdversarialTrainer that was made with `save_only_model=False`."
        )
    lack = damage(folder)
    if lack is not None:
        raise ValueError(
            f"{folder} is not whole: {lack}. `resume_from_checkpoint=True` finds the newest checkpoint that is."
        )
    stored = json.loads(state.read_text(encoding="utf-8"))
    if stored["version"] != STATE_VERSION:
        raise ValueError(
            f"{state.name} in {folder} is of version {stored['version']}, and {STATE_VERSION} is needed. Resume it "
            "with the hf-imitate that wrote it."
        )
    was = stored["run"]
    changed = [
        f"`{name}` was {was.get(name)!r} and is {value!r}" for name, value in facts.items() if was.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} is of another run: {'; '.join(changed)}. Give what was saved. To go on otherwise, start anew "
            "from its imitator as `model` and `Distinguisher.from_pretrained(checkpoint)` as `distinguisher`."
        )


def data_digest(prompts: Iterable[Any], answered: Mapping[int, HumanRow]) -> str:
    """Number of rows, and a hash of what each asks and answers: replay knows rows by their number."""
    number, text = 0, hashlib.sha256()
    for number, prompt in enumerate(prompts, 1):
        row = answered.get(number - 1)
        text.update(repr((prompt, row and (row.answer, row.weight))).encode("utf-8", "replace"))
    return f"{number} rows, {text.hexdigest()[:16]}"


def check_hub_strategy(args: TrainingArguments) -> None:
    """Refuse to show everybody what a run is taken up from; called by the configs, before a model loads.

    Raises:
        ValueError: checkpoints would be pushed to a public repository.
    """
    strategy = HubStrategy(args.hub_strategy)
    pushes_them = args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    if pushes_them and args.hub_private_repo is False:
        raise ValueError(
            f"`hub_strategy` is {strategy.value!r} and `hub_private_repo` is False, so everybody could read what "
            "serves the run alone, of an adversarial one the imitator's answers to the training questions. Use "
            "'every_save' or 'end', or leave the repository private."
        )


class TakeUpTheLog(TrainerCallback):
    """Puts back the loss of the steps since the last log, which transformers sets to 0 when it starts or resumes."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        unlogged, self.trainer._unlogged = self.trainer._unlogged, None
        if unlogged is not None:
            self.trainer._tr_loss += unlogged["loss"]
            self.trainer._globalstep_last_logged = unlogged["last_log"]


def is_whole(file: Path) -> bool:
    """Whether a file that is there, of tensors or of JSON, was written to its end."""
    if file.suffix == ".safetensors":
        return _is_whole_safetensors(file)
    if file.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(file)  # its table of contents stands at its end
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def _is_whole_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        total = os.fstat(stream.fileno()).st_size
        if total < 8 + size:
            return False
        try:
            header = json.loads(stream.read(size))
        except ValueError:
            return False
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return total == 8 + size + max(ends, default=0)
