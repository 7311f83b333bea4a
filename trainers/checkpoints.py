"""Which checkpoints of a run can be resumed: a crash, a kill or a full disk may leave the newest one half written."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback

from hf_imitate.human_rows import HumanRow
from hf_imitate.repo_checks import UnsafeRepoError
from hf_imitate.trainers.atomic_checkpoints import is_marked, marked_damage

logger = logging.getLogger(__name__)

LAST_WRITTEN = "trainer_state.json"
STATE = "adversarial_state"  # and the number of the process
STATE_VERSION = 4
_NAME = re.compile(r"checkpoint-(\d+)")
# Settings, by how their names begin, that leave the course of a training as it is: where and when something is logged,
# saved, evaluated or pushed, and on what machine. How long a run is stands under `_depends_on_length`.
_NO_COURSE = (
    *("output_dir", "disable_tqdm", "resume_from_checkpoint", "force_resume", "run_name", "project", "report_to"),
    *("log", "trackio_", "include_", "num_completions_to_print", "debug", "skip_memory_metrics", "do_"),
    *("eval_", "per_device_eval_", "prediction_loss_only", "batch_eval_", "bf16_full_eval", "fp16_full_eval"),
    *("num_generations_eval", "num_thoughts_eval", "load_best_model", "metric_for_best", "greater_is_better"),
    *("save_", "push_to_hub", "hub_", "enable_jit_checkpoint", "restore_callback_states", "max_steps"),
    *("num_train_epochs", "dataloader_", "dataset_num_proc", "remove_unused_columns", "label_names"),
    *("use_cpu", "local_rank", "ddp_", "fsdp", "deepspeed", "accelerator_config", "parallelism_config"),
    *("vllm_", "torch_empty_cache", "activation_", "gradient_checkpointing", "use_cache", "cache_implementation"),
    *("trust_remote_code", "model_init_kwargs"),
)
_OF_AN_ADAPTER = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias")


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
    """The first file of a checkpoint that is missing, cut off or altered, in plain words; `None` if it is whole.

    One without a marker, from before there were any, is read as far as it tells: transformers writes
    `trainer_state.json` after everything else of its process, so where it stands, the rest of that process was
    written. A disk that was full or lost its power may still have cut a file off, and other processes may not have
    been done.
    """
    folder = Path(checkpoint)
    if is_marked(folder):
        return marked_damage(folder)
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


def check_resumable(checkpoint: str | Path, process: int, facts: Mapping[str, Any], is_forced: bool = False) -> None:
    """Check that a game can be taken up, before anything is loaded.

    Args:
        checkpoint (`str` or `Path`): where from.
        process (`int`): number of this process.
        facts (`Mapping`): what the run that takes it up must share with the one that left it, as JSON gives it back.
        is_forced (`bool`, *optional*, defaults to `False`): warn of another setting instead.

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
        raise ValueError(not_whole(folder, lack))
    stored = stored_state(state, STATE_VERSION)
    # Replay knows rows by their number, and the trained numbers of the distinguisher are loaded one by one.
    check_same_run(folder, stored["run"], facts, is_forced, needed=("train_dataset", "distinguisher"))


def not_whole(checkpoint: str | Path, lack: str) -> str:
    """What is said of a checkpoint that was named and cannot be resumed."""
    return f"{checkpoint} is not whole: {lack}. `resume_from_checkpoint=True` finds the newest checkpoint that is."


def stored_state(file: Path, version: int) -> dict[str, Any]:
    """The state of a run that a checkpoint holds beside what transformers writes.

    Raises:
        ValueError: it is of another version.
    """
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored["version"] != version:
        raise ValueError(
            f"{file.name} in {file.parent} is of version {stored['version']}, and {version} is needed. Resume it "
            "with the hf-imitate that wrote it."
        )
    return stored


def check_same_run(
    checkpoint: Path,
    was: Mapping[str, Any],
    facts: Mapping[str, Any],
    is_forced: bool,
    needed: Collection[str] = (),
) -> None:
    """Check that a run goes on under the settings it was left with.

    Args:
        checkpoint (`Path`): where from.
        was (`Mapping`): the facts of the run that left it.
        facts (`Mapping`): those of the run that takes it up; what only one of them knows is not compared.
        is_forced (`bool`): warn of another setting instead.
        needed (`Collection[str]`, *optional*): facts without which it cannot be loaded, forced or not.

    Raises:
        ValueError: a fact is another; the message names it.
    """
    changed = {name: facts[name] for name in was if name in facts and facts[name] != was[name]}
    if not changed:
        return
    told = "; ".join(f"`{name}` was {was[name]!r} and is {value!r}" for name, value in changed.items())
    if is_forced and not changed.keys() & {"num_processes", "imitator", *needed}:
        logger.warning(
            "%s is of another run: %s. It goes on all the same, and no longer to the same bits.", checkpoint, told
        )
        return
    way_out = (
        "`force_resume=True` (`--force`) does not help here: it could not be loaded."
        if is_forced
        else "`force_resume=True` (`--force`) goes on all the same, where it can be loaded."
    )
    raise ValueError(f"{checkpoint} is of another run: {told}. Give what was saved. {way_out}")


def settings_of_the_course(args: Any) -> dict[str, Any]:
    """The settings on which a run's course depends, by name: all but those that are known not to touch it."""
    names = [field.name for field in dataclasses.fields(args) if not field.name.startswith(_NO_COURSE)]
    names += ["dataloader_drop_last"]
    if _depends_on_length(args):
        names += ["max_steps"] if args.max_steps > 0 else ["num_train_epochs"]
    return {name: getattr(args, name) for name in names}


def _depends_on_length(args: Any) -> bool:
    """Whether the learning rate of a step depends on how many steps there are; if not, a run may be made longer."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    has_share = 0 < (args.warmup_steps or 0) < 1
    return schedule != "constant" and (schedule not in ("constant_with_warmup", "inverse_sqrt") or has_share)


def model_facts(model: Any) -> dict[str, Any]:
    """What a run's models must share with those of the run it takes up."""
    facts: dict[str, Any] = {
        "imitator": "an adapter" if isinstance(model, PeftModel) else "all weights",
        "dtype": str(model.dtype),
    }
    for name, config in getattr(model, "peft_config", {}).items() if isinstance(model, PeftModel) else ():
        whose = "peft_config" if name == "default" else f"peft_config of {name}"
        for setting in _OF_AN_ADAPTER:
            value = getattr(config, setting, None)
            facts[f"{whose}.{setting}"] = sorted(value) if isinstance(value, set) else value
    return facts


def data_digest(prompts: Iterable[Any], answered: Mapping[int, HumanRow]) -> str:
    """Number of rows, and a hash of what each asks and answers: replay knows rows by their number."""
    number, text = 0, hashlib.sha256()
    for number, prompt in enumerate(prompts, 1):
        row = answered.get(number - 1)
        text.update(repr((prompt, row and (row.answer, row.weight))).encode("utf-8", "replace"))
    return f"{number} rows, {text.hexdigest()[:16]}"


def rows_digest(dataset: Dataset) -> str:
    """Number of prepared rows, and a hash of them in their order."""
    text = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(1000):
        for row in batch.to_pylist():
            text.update(repr(sorted(row.items())).encode("utf-8", "replace"))
    return f"{len(dataset)} rows, {text.hexdigest()[:16]}"


class TakeUpTheLog(TrainerCallback):
    """Puts back the loss of the steps since the last log, which transformers sets to 0 when it starts or resumes."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        unlogged, self.trainer._unlogged = self.trainer._unlogged, None
        if unlogged is not None:
            self.trainer._tr_loss += unlogged["loss"]
            self.trainer._globalstep_last_logged = unlogged["last_log"]


@contextlib.contextmanager
def numbers_alone(checkpoint: str | Path | None) -> Iterator[None]:
    """Do inside what reads transformers' own files, to be refused in words of ours where they hold a program.

    Raises:
        UnsafeRepoError: torch refused to unpickle one of them.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # its module is nowhere imported here
            raise
        # torch's words say how to run it all the same.
        raise UnsafeRepoError(
            f"{checkpoint}: one of its files of the kinds .pt, .pth and .bin holds more than tensors and numbers, so "
            "no training wrote it as it is, and it could harm whoever loads it. Nothing of it was run. Go on "
            "from a checkpoint of a run of your own, or start anew from its imitator as `model`."
        ) from None


def is_whole(file: Path) -> bool:
    """Whether a file that is there, of tensors or of JSON, was written to its end."""
    if file.suffix == ".safetensors":
        return _is_whole_safetensors(file)
    if file.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(file)  # its table of contents stands at its end
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # the second, of a stranger's that is nested without end
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
        except (ValueError, RecursionError):
            return False
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return total == 8 + size + max(ends, default=0)
