"""How an imitator of the contest is fitted, drawn from, and kept with the CPU seconds that it took."""

import contextlib
import inspect
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.worlds.contest_tasks import Task, fingerprint
from benchmarks.worlds.kept import kept, made
from hf_imitate import Imitator, RetrodictiveConfig, RetrodictiveTrainer
from hf_imitate.rendering import Answer
from hf_imitate.sampling import draw_answers

DRAW_BATCH = 256
BETAS = (0.9, 0.98)
READINGS, READ = 8, 400  # how often dev rows are read in a fit, and how many; the best reading is kept


class Law(NamedTuple):
    """How answers are drawn: a folder, one of how many is kept, at which temperature."""

    path: Path
    resample: int = 1
    temperature: float = 1.0


def load(task: Task, path: Path) -> Imitator:
    """An imitator of this task, on the CPU; its distinguisher knows the task's checks."""
    return Imitator.from_pretrained(path, device="cpu")


def answers(task: Task, law: Law, asked: list[str], seed: int, imitator: Imitator | None = None) -> list[Answer]:
    """One answer to each question."""
    imitator = imitator or load(task, law.path)
    how: dict[str, Any] = {"num_answers": 1, "seed": seed, "batch_size": DRAW_BATCH}
    if law.resample > 1:
        of_k = imitator.residual(law.resample, list(task.checks) or None, task.max_tokens, law.temperature)
        return [own[0].answer for own in of_k.answer(asked, **how)]
    how |= {"max_new_tokens": task.max_tokens, "temperature": law.temperature}
    return [own[0].answer for own in draw_answers(imitator.model, imitator.renderer, asked, **how)]


@cache
def sources(*parts: Callable[..., Any]) -> str:
    """Of what trains; read once, so that an edit does not part what one run makes."""
    return "".join(inspect.getsource(part) for part in (fit, arguments, answered, *parts))


def keep(
    task: Task, name: str, folder: Path, seed: int, needs: list[Path], made_of: Any, build: Callable[[Path], dict]
) -> Path:
    """A folder of this task, with the names of all that it needs beside its own CPU seconds."""

    def build_and_count(path: Path) -> dict[str, Any]:
        facts = build(path)
        facts["needs"] = sorted({name for need in needs for name in (need.name, *made(need)["needs"])})
        return facts

    settings = [made_of, task.distinguisher, fingerprint(task), seed, [need.name for need in needs]]
    return kept(f"{task.name}-{name.replace(' ', '_')}-{seed}", folder, settings, build_and_count)


def cpu_seconds(path: Path) -> float:
    """Of this folder and of all that it was made of; each counted once."""
    facts = made(path)
    return round(sum(made(path.parent / name)["cpu_seconds"] for name in (path.name, *facts["needs"])), 1)


def arguments(task: Task, scratch: str, seed: int, steps: int, rate: float, betas=BETAS) -> dict[str, Any]:
    """What all of TRL's trainers here are given."""
    return {
        "output_dir": scratch,
        "use_cpu": True,
        "bf16": False,
        "seed": seed,
        "max_steps": steps,
        "learning_rate": rate,
        "warmup_steps": min(20, steps // 4),
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "report_to": "none",
        "logging_steps": max(1, steps // 10),
        "disable_tqdm": True,
    }


def fit(
    task: Task,
    model: Any,
    rows: Dataset,
    path: Path,
    steps: int,
    rate: float,
    seed: int,
    by: str = "retrodictive",
    dev: Dataset | None = None,
) -> dict[str, Any]:
    """Likelihood with all weights, by TRL's own trainer or by ours; the best reading on dev rows is kept."""
    config, trainer_of = {"sft": (SFTConfig, SFTTrainer)}.get(by, (RetrodictiveConfig, RetrodictiveTrainer))
    batch, dev = task.settings.batch, task.rows().dev if dev is None else dev
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(None):
        trainer = trainer_of(
            model=model,
            args=config(
                **arguments(task, scratch, seed, steps, rate),
                lr_scheduler_type="cosine",
                per_device_train_batch_size=batch,
                per_device_eval_batch_size=4 * batch,
                gradient_checkpointing=False,
                eval_strategy="steps",
                eval_steps=max(1, steps // READINGS),
                save_strategy="best",
                metric_for_best_model="eval_loss",
                greater_is_better=False,
                load_best_model_at_end=True,
                save_total_limit=1,
            ),
            train_dataset=rows,
            eval_dataset=dev.select(range(min(READ, len(dev)))),
            processing_class=task.tokenizer(),
        )
        trainer.train()
        trainer.save_model(str(path))
        task.tokenizer().save_pretrained(str(path))
    readings = [round(log["eval_loss"], 4) for log in trainer.state.log_history if "eval_loss" in log]
    return {"dev_loss": readings, "steps": steps}


def trainable(task: Task, path: Path) -> Any:
    """The model saved there; what is loaded to be used is frozen."""
    return load(task, path).model.requires_grad_(True)


def answered(task: Task, law: Law, asked: list[str], seed: int, must_pass: bool = False) -> Dataset:
    """Questions with an answer of this law, those that pass all checks where that is asked; empty ones left out."""
    texts = [answer.text for answer in answers(task, law, asked, seed)]
    passed = [all(ok) for ok in zip(*(check(asked, texts) for check in task.checks), strict=True)] if must_pass else []
    pairs = [(q, y) for q, y, ok in zip(asked, texts, passed or [True] * len(texts), strict=True) if y and ok]
    prompts, completions = zip(*pairs, strict=True) if pairs else ((), ())
    return Dataset.from_dict(
        {"prompt": list(prompts), "completion": list(completions)}, features=task.rows().train.features
    )


def milliseconds_per_answer(task: Task, law: Law, asked: list[str]) -> float:
    """CPU milliseconds of one answer: one thread, the median of three rounds."""
    imitator, threads, seconds = load(task, law.path), torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for number in range(3):
            begun = time.process_time()
            answers(task, law, asked, number, imitator)
            seconds.append((time.process_time() - begun) / len(asked))
    finally:
        torch.set_num_threads(threads)
    return 1000 * sorted(seconds)[1]
