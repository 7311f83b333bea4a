"""One run in two processes and in one: the same numbers; and what the others hear when one process fails.

The processes are started by `torch.distributed.run` over gloo (`accelerate launch --cpu` would start one).
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.worlds import notes
from hf_imitate import AdversarialConfig, AdversarialTrainer, RetrodictiveConfig, RetrodictiveTrainer

CHECKOUT = Path(__file__).resolve().parent.parent.parent.parent
NUM_STEPS = 20
NUM_ROWS = 64
LONGEST = 14
# By name: what is trained, how many answers a process has in a batch, batches in a step, answers to a question.
SPLITS: dict[str, dict[str, Any]] = {
    "lora": {"batch": 4, "accumulate": 1, "generations": 4},
    "full": {"batch": 4, "accumulate": 1, "generations": 4, "full": True},
    "a question on two processes": {"batch": 4, "accumulate": 1, "generations": 8},
    "a question on two processes, accumulated": {"batch": 2, "accumulate": 2, "generations": 8},
    "retrodictive": {"batch": 4, "accumulate": 1},
    "retrodictive, accumulated, full": {"batch": 2, "accumulate": 2, "full": True},
}
# The program of a process; it leaves without the interpreter's end, see tests/launch.py.
PROGRAM = """
import os, sys, torch
torch.set_num_threads(1)
from benchmarks.worlds.reliability import ranks
getattr(ranks, {function!r})(**{arguments!r})
torch.distributed.barrier()
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
"""


def launch(
    function: str, arguments: dict[str, Any], folder: Path, timeout: float = 240
) -> subprocess.CompletedProcess:
    """Call a function of this module in two processes."""
    file = folder / "program.py"
    file.write_text(PROGRAM.format(function=function, arguments=arguments), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# --- two processes and one


def note_rows() -> Dataset:
    """Notes that somebody wrote; every seventh row has no answer, others weigh twice."""
    rows = notes.human_rows(notes.questions(NUM_ROWS, seed=0), seed=0)
    completions = [None if i % 7 == 3 else text for i, text in enumerate(rows["completion"])]
    return Dataset.from_dict(
        {"prompt": rows["prompt"], "completion": completions, "weight": [1.0 + i % 2 for i in range(NUM_ROWS)]}
    )


def is_short(completions: list, **columns: Any) -> list[bool | None]:
    """A check that says nothing about answers in brackets."""
    return [None if text.startswith("(") else len(text) < 6 for text in completions]


def wants_ones(completions: list, **columns: Any) -> list[float]:
    """A reward of the user's own."""
    return [0.1 * text.count("1") for text in completions]


class Recorded(AdversarialTrainer):
    """Answers by a record keyed by the batch and the place in it, instead of sampling: TRL seeds every process
    differently. It keeps what was paid."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        first = self.accelerator.process_index * len(prompt_ids)
        number = self._step // self.args.steps_per_generation
        return [recorded_answer(number, first + i, self.eos_token_ids[0]) for i in range(len(prompt_ids))], None

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        self.__dict__.setdefault("paid", []).append(rewards.flatten().clone())
        return rewards


def recorded_answer(batch: int, place: int, end: int) -> list[int]:
    """The answer at a place of a generation batch: any letters, some cut at the limit."""
    rng = np.random.default_rng([batch, place])
    ids = rng.integers(2, len(notes.tokenizer()), size=int(rng.integers(1, LONGEST + 3))).tolist()
    return [*ids, end] if len(ids) < LONGEST else ids[:LONGEST]


class EveryStep(TrainerCallback):
    """Keeps what is trained after every step, and a hash of it."""

    def __init__(self, sides: Callable[[], dict[str, list[Tensor]]]):
        self.sides = sides
        self.weights: dict[str, list[Tensor]] = {}
        self.hashes: list[str] = []

    def on_step_end(self, args, state, control, **kwargs):
        digest = hashlib.sha256()
        for side, parameters in self.sides().items():
            flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
            self.weights.setdefault(side, []).append(flat)
            digest.update(flat.numpy().tobytes())
        self.hashes.append(digest.hexdigest())


def one_run(folder: str, split: str, num_processes: int, epsilon: float | None = None) -> dict[str, Any]:
    """Train by one of `SPLITS` in this process, which is one of `num_processes`; the global batch is always the same.

    All sides learn by plain gradient descent, or by AdamW with an `epsilon`: with that of its default it turns a
    rounding error in a gradient of 0 into a whole step.
    """
    told = SPLITS[split]
    plain = {
        **{"output_dir": f"{folder}/run", "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True},
        **{"save_strategy": "no", "logging_steps": 1, "max_grad_norm": 1.0, "learning_rate": 1e-2},
        **{"per_device_train_batch_size": told["batch"] * 2 // num_processes, "lr_scheduler_type": "constant"},
        **{"gradient_accumulation_steps": told["accumulate"], "optim": "adamw_torch" if epsilon else "sgd"},
    }
    plain |= {"adam_epsilon": epsilon} if epsilon else {}
    if num_processes == 1 and told["accumulate"] > 1:  # one undivided batch
        plain["per_device_train_batch_size"] *= told["accumulate"]
        plain["gradient_accumulation_steps"] = 1
    torch.manual_seed(0)
    model = notes.new_model("small")
    lora = None if told.get("full") else LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    common = {"model": model, "processing_class": notes.tokenizer(), "peft_config": lora}
    if "generations" not in told:
        trainer: Any = RetrodictiveTrainer(
            args=RetrodictiveConfig(max_steps=NUM_STEPS, **plain),
            # Rows that fill every batch: else Accelerate repeats the first ones on several processes.
            train_dataset=note_rows().filter(lambda row: row["completion"] is not None).select(range(48)),
            **common,
        )
    else:
        trainer = _adversarial(plain, told["generations"], epsilon, common)
    learner = trainer.game.learner if "generations" in told else None
    imitator = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    kept = EveryStep(lambda: {"imitator": imitator} | ({"distinguisher": learner.parameters} if learner else {}))
    trainer.add_callback(kept)
    start = torch.cat([parameter.detach().flatten() for parameter in imitator])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    metrics = sorted({name for entry in history for name in entry if name.startswith(COMPARED)})
    return {
        "imitator": torch.stack(kept.weights["imitator"]),
        "distinguisher": torch.stack(kept.weights["distinguisher"]) if learner else torch.zeros(0),
        "rewards": torch.stack(trainer.paid) if learner else torch.zeros(0),
        "loss": torch.tensor([entry["loss"] for entry in history if "loss" in entry], dtype=torch.float64),
        "metrics": torch.tensor([[entry.get(name, 0.0) for name in metrics] for entry in history]),
        "moved": (kept.weights["imitator"][-1] - start).abs().max(),
        "hashes": kept.hashes,
        "guard": json.dumps(trainer.game.guard.state()) if learner else "",
        "num_processes": trainer.accelerator.num_processes,
    }


COMPARED = ("distinguisher/", "answers/", "checks/", "retrodiction/")


def _adversarial(
    plain: dict[str, Any], generations: int, epsilon: float | None, common: dict[str, Any]
) -> AdversarialTrainer:
    args = AdversarialConfig(
        **{"imitator_warmup_steps": 3, "distinguisher_warmup_steps": 3, "max_steps": NUM_STEPS - 6},
        **{"num_generations": generations, "max_completion_length": LONGEST, "allow_unlabelled": True},
        **{"heldout_fraction": 0.2, "replay_ratio": 0.5, "retrodictive_budget": 1.0, "shuffle_dataset": False},
        **{"imitator_warmup_learning_rate": 1e-2, "truncated_answers": "drop", "reward_weights": [0.5], **plain},
    )
    trainer = Recorded(args=args, train_dataset=note_rows(), checks=[is_short], reward_funcs=wants_ones, **common)
    learner = trainer.game.learner
    if epsilon is None:
        learner.optimizer = torch.optim.SGD(learner.optimizer.param_groups, momentum=0.5)
    for group in learner.optimizer.param_groups:
        group["eps"] = epsilon
    return trainer


def each_run(folder: str, splits: list[str], epsilon: float | None = None) -> None:
    """What each of two processes does: every split, its results in a file of its own."""
    found = {split: one_run(f"{folder}/{i}", split, 2, epsilon) for i, split in enumerate(splits)}
    torch.save(found, f"{folder}/rank{os.environ['RANK']}.pt")


def equality(split: str, epsilon: float | None = None) -> dict[str, Any]:
    """The largest differences, over all steps, between two processes and one with the same global batch."""
    with tempfile.TemporaryDirectory() as folder:
        done = launch("each_run", {"folder": folder, "splits": [split], "epsilon": epsilon}, Path(folder))
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        both = [torch.load(f"{folder}/rank{rank}.pt", weights_only=True)[split] for rank in (0, 1)]
        return differences(both, one_run(f"{folder}/alone", split, 1, epsilon))


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative where values are above 1: the last bit of 200 bits an answer is 1.5e-5."""
    return ((one - other) / other.abs().clamp(min=1)).nan_to_num().abs().max().item()


def differences(both: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """What [`equality`] reports, from what [`one_run`] found."""
    one, two = both
    gaps = {
        name: _gap(one[name].double(), alone[name].double())
        for name in ("loss", "rewards", "distinguisher", "imitator", "metrics")
        if alone[name].numel()
    }
    nothing = [name for name in gaps if one[name].isnan().ne(alone[name].isnan()).any()]
    return {
        "steps": len(alone["hashes"]),
        "largest_difference": gaps,
        "missing_in_one": nothing,
        "imitator_moved": alone["moved"].item(),
        "processes": [result["num_processes"] for result in (one, two, alone)],
        "equal_hashes_on_both": sum(a == b for a, b in zip(one["hashes"], two["hashes"], strict=True)),
        "equal_guards_on_both": one["guard"] == two["guard"],
    }


# --- one process fails

SECRET = "a row of the data"
FAILS_AT = 4  # optimizer steps that were taken; a checkpoint is written after every second one


def _fails_on_the_second(trainer_state: Any, prompts: list) -> None:
    if os.environ["RANK"] == "1" and trainer_state is not None and trainer_state.global_step == FAILS_AT:
        raise KeyError(SECRET)


def failing_reward(completions: list, prompts: list, trainer_state: Any = None, **columns: Any) -> list[float]:
    """A user's reward that raises on one process."""
    _fails_on_the_second(trainer_state, prompts)
    return [0.0] * len(completions)


async def failing_async_reward(completions: list, prompts: list, trainer_state: Any = None, **columns: Any):
    """The same, awaited."""
    _fails_on_the_second(trainer_state, prompts)
    return [0.0] * len(completions)


class FailingCheck:
    """A check that raises on one process, at its call number `at`."""

    __name__ = "failing_check"

    def __init__(self):
        self.calls = 0

    def __call__(self, completions: list, **columns: Any) -> list[bool]:
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls > 1 + 2 * FAILS_AT:  # tried once; then called once for each side
            raise KeyError(SECRET)
        return [True] * len(completions)


class BreaksOnTheSecond(TrainerCallback):
    """The weights of one process break, so that its loss is no number at the next step."""

    def __init__(self, model: Any):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        if os.environ["RANK"] != "1" or state.global_step != FAILS_AT:
            return
        with torch.no_grad():
            next(p for p in self.model.parameters() if p.requires_grad).fill_(torch.nan)


FAILURES = ("check", "reward", "async reward", "nan", "save")


def _failing(kind: str, folder: str) -> Any:
    """A trainer whose second process will fail."""
    given: dict[str, Any] = {"checks": [FailingCheck()]} if kind == "check" else {}
    given |= {"reward_funcs": failing_reward} if kind == "reward" else {}
    given |= {"reward_funcs": failing_async_reward} if kind == "async reward" else {}
    args = AdversarialConfig(
        **{"output_dir": f"{folder}/run", "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 8},
        **{"imitator_warmup_steps": 0, "distinguisher_warmup_steps": 0, "max_completion_length": LONGEST},
        **{"per_device_train_batch_size": 4, "num_generations": 4, "allow_unlabelled": True, "save_steps": 2},
        **{"save_strategy": "steps", "retrodictive_coef": 0.0},
    )
    torch.manual_seed(0)
    trainer = Recorded(
        notes.new_model("small"),
        args,
        note_rows(),
        processing_class=notes.tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        **given,
    )
    if kind == "nan":
        trainer.add_callback(BreaksOnTheSecond(trainer.model))
    if kind == "save":
        write = trainer._save_rng_state
        trainer._save_rng_state = lambda folder: (_fill_the_disk(trainer), write(folder))
    return trainer


def _fill_the_disk(trainer: Any) -> None:
    if os.environ["RANK"] == "1" and trainer.state.global_step == FAILS_AT:
        raise OSError(errno.ENOSPC, "No space left on device")


def each_failure(folder: str, kinds: Sequence[str] = FAILURES[:-1]) -> None:
    """What each of two processes does where both meet the failure of one: what it raised, in a file of its own."""
    found = {}
    for i, kind in enumerate(kinds):
        trainer = _failing(kind, f"{folder}/{i}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        except RuntimeError as error:
            found[kind] = {"kind": type(error).__name__, "words": str(error), "at": time.time()}
    Path(f"{folder}/failures{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


def linger(folder: str, seconds: float) -> None:
    """The disk of one process is full while both save, and it stays: the other waits for it in a collective."""
    trainer = _failing("save", folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    except RuntimeError as error:
        Path(f"{folder}/said{os.environ['RANK']}").write_text(str(error), encoding="utf-8")
        raise
    finally:
        Path(f"{folder}/failed{os.environ['RANK']}").write_text(str(time.time()))
        time.sleep(seconds)


def heard(folder: str) -> dict[str, Any]:
    """What two processes of [`each_failure`] said, compared."""
    one, two = (json.loads(Path(f"{folder}/failures{rank}.json").read_text()) for rank in (0, 1))
    return {
        kind: {
            "kind": one[kind]["kind"],
            "words": one[kind]["words"].replace(folder, ""),
            "seconds_apart": abs(one[kind]["at"] - two[kind]["at"]),
            "same_words": one[kind]["words"] == two[kind]["words"],
            "quotes_a_row": SECRET in one[kind]["words"] + two[kind]["words"],
        }
        for kind in FAILURES[:-1]
    }


def failures() -> dict[str, Any]:
    """By kind: seconds between the two processes' errors, and whether both said the same and quoted no row."""
    with tempfile.TemporaryDirectory() as folder:
        done = launch("each_failure", {"folder": folder}, Path(folder))
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found = heard(folder)
    with tempfile.TemporaryDirectory() as folder:
        done = launch("linger", {"folder": folder, "seconds": 60.0}, Path(folder))
        ended = time.time()
        found["save, lingering 60 s"] = {
            "seconds_to_the_end_of_all": ended - float(Path(f"{folder}/failed1").read_text()),
            "words": next((line for line in done.stderr.splitlines() if line.startswith("Process 1 of 2")), None),
            "exit_status": done.returncode,
        }
    return found


# --- the cells of `benchmarks/reliability.py`

MOST_DIFFERENT, MOST_SECONDS = 1e-5, 10.0
ADAMW = 1e-8  # its own epsilon
CELLS: list[dict[str, Any]] = [
    *({"split": split, "epsilon": None} for split in SPLITS),
    {"split": "lora", "epsilon": ADAMW},
    {"failures": True},
]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """One split of the equality, or all failures."""
    return failures() if "failures" in cell else equality(**cell)


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: what, what is claimed, what was measured, whether that holds."""
    table = []
    for one in results:
        cell, found = one["cell"], one["result"]
        if "failures" in cell:
            table += [_failure_row(kind, seen) for kind, seen in found.items()]
            continue
        gaps = {name: gap for name, gap in found["largest_difference"].items() if name != "metrics"}
        is_claimed = cell["epsilon"] is None
        is_same = (
            found["equal_hashes_on_both"] == found["steps"]
            and found["equal_guards_on_both"]
            and not found["missing_in_one"]
            and found["processes"] == [2, 2, 1]
        )
        told = ", ".join(f"{name} {gap:.0e}" for name, gap in gaps.items())
        table.append(
            {
                "what": f"{cell['split']}: two processes and one, {found['steps']} steps"
                f"{'' if is_claimed else ', by AdamW'}",
                "claim": f"{f'equal to {MOST_DIFFERENT:.0e}, ' if is_claimed else ''}one hash on both at every step",
                "measured": f"largest difference: {told}; {found['equal_hashes_on_both']} equal hashes",
                "passed": is_same and (not is_claimed or max(gaps.values()) <= MOST_DIFFERENT),
            }
        )
    return table


def _failure_row(kind: str, seen: dict[str, Any]) -> dict[str, Any]:
    lingers = "exit_status" in seen
    seconds = seen["seconds_to_the_end_of_all" if lingers else "seconds_apart"]
    words = seen["words"] or "nothing"
    is_told = (seen["exit_status"] != 0) if lingers else seen["same_words"] and not seen["quotes_a_row"]
    names = f"at step {FAILS_AT}" in words and "complete checkpoint" in words and SECRET not in words
    return {
        "what": f"one process fails: {kind}",
        "claim": f"all stop within {MOST_SECONDS:g} s, with its words, its step and the newest checkpoint",
        "measured": f"{seconds:.1f} s{' to the end of all' if lingers else ' apart'}; {words[:60]}...",
        "passed": bool(is_told and names and seconds <= MOST_SECONDS),
    }
