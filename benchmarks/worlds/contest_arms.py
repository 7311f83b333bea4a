"""How each arm of the contest is trained: the same rows, the same start, and about the same CPU seconds after it.

Everything trained lies in a folder under a hash of what made it ([`kept`]), so arms share the start, the larger model
and teachers. An arm's CPU seconds are those of all the folders it needs, the start and warm-ups included.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets

from benchmarks.worlds.contest_tasks import Task
from benchmarks.worlds.contest_training import (
    Law,
    answered,
    arguments,
    cpu_seconds,
    fit,
    keep,
    load,
    sources,
    trainable,
)
from benchmarks.worlds.kept import made
from hf_imitate import AdversarialConfig, AdversarialTrainer, Distinguisher
from hf_imitate.checks import check_names
from hf_imitate.ngram_distinguisher import NgramDistinguisher

GAME_BETAS = (0.5, 0.99)
MOST_TOKENS = 600  # drawn for one answer
CERTAIN = 30.0  # nats of a check that decides alone
SFT, LARGER = ("batch", "sft"), ("batch", "larger")  # the settings that each depends on
RESIDUAL = (*SFT, "larger", "residual")
GAME = (*RESIDUAL, "game", "game_rates")
NEW_GAME, DISTILLED = (*GAME, "warmup"), (*RESIDUAL, "distil")


def _keep(
    task: Task, name: str, folder: Path, seed: int, needs: list[Path], uses: tuple[str, ...], build: Callable
) -> Path:
    settings = [getattr(task.settings, field) for field in uses]
    return keep(task, name, folder, seed, needs, [sources(_play, _members), settings], build)


def judge_body(task: Task, number: int, folder: Path) -> Path:
    """A language model of rows of its own, for a judge to start from; nothing of the contest's rows enters."""
    rows, seed, (steps, rate) = task.judge_rows(number), 7000 + number, task.settings.judge_lm
    held_out = len(rows) // 10
    own, dev = rows.select(range(held_out, len(rows))), rows.select(range(held_out))
    build = lambda path: fit(task, task.new_model("judge", seed), own, path, steps, rate, seed, dev=dev)  # noqa: E731
    return _keep(task, "judge", folder, seed, [], ("batch", "judge_lm"), build)


def start(task: Task, seed: int, folder: Path, by: str = "sft") -> Path:
    """Supervised fine-tuning by TRL's own trainer, from nothing: what all the others start from."""
    steps, rate = task.settings.sft
    build = lambda path: fit(task, task.new_model("imitator", seed), task.rows().train, path, steps, rate, seed, by)  # noqa: E731
    return _keep(task, by, folder, seed, [], SFT, build)


def larger(task: Task, seed: int, folder: Path, name: str = "larger") -> Path:
    """The larger model, by likelihood of the same rows: an arm of its own, and what larger distinguishers start as."""
    steps, rate = getattr(task.settings, name)
    model_of = lambda: task.new_model("larger", seed + 7).requires_grad_(True)  # noqa: E731
    build = lambda path: fit(task, model_of(), task.rows().train, path, steps, rate, seed)  # noqa: E731
    return _keep(task, name, folder, seed, [], ("batch", name), build)


def continued(task: Task, seed: int, folder: Path) -> Path:
    """The start after more likelihood, for as many CPU seconds as the dearest arm."""
    before, (steps, rate) = start(task, seed, folder), task.settings.more
    build = lambda path: fit(task, trainable(task, before), task.rows().train, path, steps, rate, seed, "sft")  # noqa: E731
    return _keep(task, "continued", folder, seed, [before], (*SFT, "more"), build)


# --- against a distinguisher


def _members(task: Task, kind: str, before: Path, body: Path | None) -> Any:
    """Of a new distinguisher: the larger model, n-grams beside it, or a copy of the imitator."""
    models: list[Any] = [trainable(task, body or before)]
    return ["ngram", *models] if "ngram" in kind else models[0]


def _play(
    task: Task, before: Path, distinguisher: Any, seed: int, path: Path, rows: Dataset, checks: bool = True, **own
) -> dict[str, Any]:
    """The game, or its distinguisher alone where `freeze_imitator` is set."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(None):
        args = AdversarialConfig(
            **arguments(task, scratch, seed, own.pop("steps"), own.pop("rate"), GAME_BETAS),
            max_completion_length=task.max_tokens,
            distinguisher_lm_warmup_steps=0,  # a larger one was fitted before
            save_strategy="no",
            **own,
        )
        trainer = AdversarialTrainer(
            model=trainable(task, before),
            args=args,
            train_dataset=rows,
            distinguisher=distinguisher,
            checks=list(task.checks) if checks and task.checks else None,
            processing_class=task.tokenizer(),
        )
        trainer.train()
        trainer.save_model(str(path))
    tested = [log for log in trainer.state.log_history if "distinguisher/accuracy_tested" in log]
    return {
        "steps": trainer.state.global_step,
        "stopped": trainer.state.global_step < args.max_steps,
        "held_out_accuracy": tested[-1]["distinguisher/accuracy_tested"] if tested else None,
        "check_weight": [log[key] for log in trainer.state.log_history for key in log if key.endswith("/weight")][-1:],
    }


def game(
    task: Task,
    seed: int,
    folder: Path,
    name: str,
    coef: float | None = 1.0,
    is_budgeted: bool = False,
    is_other: bool = False,
    other_questions: bool = False,
    checks: bool = True,
) -> Path:
    """The game from the start, with the weight `coef` of the likelihood of human answers.

    The distinguisher goes on from the one that was taught for one-of-K; the task's other one, and one without checks,
    is taught as long inside.
    """
    kind = task.other_distinguisher if is_other else task.distinguisher
    unlabelled = task.unlabelled != other_questions
    before, is_new = start(task, seed, folder), is_other or not checks
    body = larger(task, seed, folder) if is_new and kind != "own" else None
    taught = None if is_new else residual(task, seed, folder)
    (steps, questions, each), rates = task.settings.game, task.settings.game_rates

    def build(path: Path) -> dict[str, Any]:
        rows = task.rows().train
        if unlabelled:
            asked = task.rows().unanswered
            own = Dataset.from_dict({"prompt": asked, "completion": [None] * len(asked)}, features=rows.features)
            rows = concatenate_datasets([rows, own])
        return _play(
            task,
            before,
            Distinguisher.from_pretrained(taught, device="cpu") if taught else _members(task, kind, before, body),
            seed,
            path,
            rows,
            checks,
            steps=steps,
            rate=rates[0],
            per_device_train_batch_size=questions * each,
            num_generations=each,
            imitator_warmup_steps=0,
            distinguisher_warmup_steps=task.settings.warmup if is_new else 0,
            distinguisher_learning_rate=rates[1],
            retrodictive_coef=coef,
            retrodictive_budget=task.settings.budget if is_budgeted else None,
            allow_unlabelled=unlabelled,
            heldout_fraction=0.05,
        )

    needs = [taught] if taught else [before, *([body] if body else [])]
    return _keep(task, name, folder, seed, needs, (*(NEW_GAME if is_new else GAME), "budget"), build)


def residual(task: Task, seed: int, folder: Path, before: Path | None = None) -> Path:
    """A distinguisher beside an imitator that stands still: for one of K."""
    before = before or start(task, seed, folder)
    body = None if task.distinguisher == "own" else larger(task, seed, folder)
    steps, batch, rate = task.settings.residual

    def build(path: Path) -> dict[str, Any]:
        more = {"lr_scheduler_type": "constant"} if task.checks else {}  # a check's weight has a long way to go
        return _play(
            task,
            before,
            _members(task, task.distinguisher, before, body),
            seed,
            path,
            task.rows().train,
            steps=steps,
            rate=rate,
            freeze_imitator=True,
            per_device_train_batch_size=batch,
            num_generations=2,
            distinguisher_warmup_steps=0,
            distinguisher_learning_rate=rate,
            heldout_fraction=0.1,
            **more,
        )

    return _keep(
        task, f"residual of {before.name}", folder, seed, [before, *([body] if body else [])], RESIDUAL, build
    )


# --- learning from kept answers


def distilled(task: Task, seed: int, folder: Path, rounds: int = 1) -> Path:
    """Likelihood of the human rows and of picked answers to questions that nobody answered, from where it was."""
    before = start(task, seed, folder) if rounds == 1 else distilled(task, seed, folder, rounds - 1)
    teacher = residual(task, seed, folder, before)
    steps, rate, questions, picks = task.settings.distil

    def build(path: Path) -> dict[str, Any]:
        asked = task.rows().unanswered[(rounds - 1) * questions :][:questions] or task.rows().unanswered
        picked = [answered(task, Law(teacher, 8), asked, 10_000 + 100 * rounds + draw) for draw in range(picks)]
        both = concatenate_datasets([task.rows().train, *picked])
        return fit(task, trainable(task, before), both, path, steps, rate, seed) | {
            "num_picked": sum(map(len, picked))
        }

    return _keep(task, f"distilled {rounds}", folder, seed, [teacher], DISTILLED, build)


def rejection(task: Task, seed: int, folder: Path) -> Path:
    """Rejection sampling: likelihood of the human rows and of own answers that pass the check, in rounds."""
    before = start(task, seed, folder)
    rounds, questions, steps, rate = task.settings.rejection

    def build(path: Path) -> dict[str, Any]:
        rows, at, counts = task.rows().train, before, []
        with tempfile.TemporaryDirectory() as scratch:
            for number in range(rounds):
                asked = task.rows().unanswered[number * questions :][:questions]
                passed = answered(task, Law(at), asked, 20_000 + number, must_pass=True)
                rows = concatenate_datasets([rows, passed])
                counts.append(len(passed))
                model, is_last = trainable(task, at), number == rounds - 1
                at = path if is_last else Path(scratch) / str(number)
                facts = fit(task, model, rows, at, steps, rate, seed + number)
        return facts | {"num_passed": counts}

    return _keep(task, "rejection", folder, seed, [before], (*SFT, "rejection"), build)


def checked(task: Task, seed: int, folder: Path, before: Callable[[Task, int, Path], Path] = start) -> Path:
    """That imitator beside a distinguisher that knows nothing but the check: what passes is kept, no one is taught."""
    of = before(task, seed, folder)

    def build(path: Path) -> dict[str, Any]:
        shutil.copytree(of, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("made.json", "distinguisher*"))
        imitator = load(task, of)
        judge = NgramDistinguisher(
            task.tokenizer(),
            imitator.renderer.end_token_ids,
            checks=task.checks,
            check_weights=dict.fromkeys(check_names(task.checks), CERTAIN),
        )
        judge.save_beside(path / "distinguisher", task.tokenizer())
        return {"steps": 0}

    return _keep(task, f"checked {of.name}", folder, seed, [of], (*SFT, "rejection"), build)


# --- by name


class Arm(NamedTuple):
    """How it is trained, the settings that this depends on, and of how many answers one is kept."""

    build: Callable[[Task, int, Path], Path]
    uses: tuple[str, ...]
    resample: int = 1


def _game(name: str, uses: tuple[str, ...] = GAME, resample: int = 1, **settings: Any) -> Arm:
    return Arm(lambda task, seed, folder: game(task, seed, folder, name, **settings), uses, resample)


def _first_that_passes(before: Callable[[Task, int, Path], Path], uses: tuple[str, ...], resample: int = 8) -> Arm:
    """One of K, by the check alone; no distinguisher was taught."""
    return Arm(lambda task, seed, folder: checked(task, seed, folder, before), uses, resample)


def _after(before: Callable[[Task, int, Path], Path], uses: tuple[str, ...], resample: int = 8) -> Arm:
    """One of K, by a distinguisher that is taught beside that imitator in place of the start."""
    return Arm(lambda task, seed, folder: residual(task, seed, folder, before(task, seed, folder)), uses, resample)


ARMS = {
    "SFT": Arm(start, SFT),
    "combined 1": _game("combined 1"),
    "one of 8": Arm(residual, RESIDUAL, 8),
    "combined 1, one of 8": _game("combined 1", resample=8),
    "rejection, one of 8": _after(rejection, (*RESIDUAL, "rejection")),
    "distilled, one of 8": _after(distilled, DISTILLED),
    "SFT continued": Arm(continued, (*SFT, "more")),
    "larger model": Arm(larger, LARGER),
    "larger model, longer": Arm(
        lambda task, seed, folder: larger(task, seed, folder, "larger_longer"), ("batch", "larger_longer")
    ),
    "rejection sampling": Arm(rejection, (*SFT, "rejection")),
    "SFT, first of 8 that passes": _first_that_passes(start, (*SFT, "rejection")),
    "rejection, first of 8 that passes": _first_that_passes(rejection, (*SFT, "rejection")),
    "retrodictive": Arm(lambda task, seed, folder: start(task, seed, folder, "retrodictive"), SFT),
    "combined 3": _game("combined 3", coef=3.0),
    "combined 0.3": _game("combined 0.3", coef=0.3),
    "adversarial": _game("adversarial", coef=0.0),
    "budgeted": _game("budgeted", (*GAME, "budget"), coef=None, is_budgeted=True),
    "other distinguisher": _game("other distinguisher", NEW_GAME, is_other=True),
    "other questions": _game("other questions", other_questions=True),
    "no check": _game("no check", NEW_GAME, checks=False),
    "distilled once": Arm(distilled, DISTILLED),
    "distilled twice": Arm(lambda task, seed, folder: distilled(task, seed, folder, 2), DISTILLED),
    "larger model, one of 8": _after(larger, RESIDUAL),
    "one of 32": Arm(residual, RESIDUAL, 32),
    "rejection, one of 32": _after(rejection, (*RESIDUAL, "rejection"), 32),
    "rejection, first of 32 that passes": _first_that_passes(rejection, (*SFT, "rejection"), 32),
    "combined 3, one of 8": _game("combined 3", resample=8, coef=3.0),
    "combined 3, one of 8, taught anew": _after(
        lambda task, seed, folder: game(task, seed, folder, "combined 3", coef=3.0), GAME
    ),
}
ASK_A_CHECK = (
    "rejection sampling",
    "rejection, one of 8",
    "SFT, first of 8 that passes",
    "rejection, first of 8 that passes",
    "rejection, one of 32",
    "rejection, first of 32 that passes",
    "no check",
)
# Where an ensemble of n-grams and a larger model judges: docstrings.
OF_AN_ENSEMBLE = ("combined 3, one of 8", "combined 3, one of 8, taught anew")


def arms_of(task: Task) -> list[str]:
    """Those that make sense here, in the order of their importance: what asks a check needs one."""
    found = [name for name in ARMS if task.checks or name not in ASK_A_CHECK]
    if not task.settings.larger_longer[0]:
        found.remove("larger model, longer")
    if "+" not in task.distinguisher:
        found = [name for name in found if name not in OF_AN_ENSEMBLE]
    # A long answer times 32 takes longer than a cell may.
    return [name for name in found if ARMS[name].resample * task.max_tokens <= MOST_TOKENS]


def law_of(task: Task, arm: str, seed: int, folder: Path, temperature: float = 1.0) -> Law:
    """The trained arm, and how it answers."""
    return Law(ARMS[arm].build(task, seed, folder), ARMS[arm].resample, temperature)


def facts_of(path: Path) -> dict[str, Any]:
    """What is known of the training of a folder; `cpu_seconds` counts all that it needs."""
    facts = made(path)
    own = {key: facts[key] for key in facts if key not in ("needs", "dev_loss", "cpu_seconds")}
    return own | {"cpu_seconds": cpu_seconds(path)}
