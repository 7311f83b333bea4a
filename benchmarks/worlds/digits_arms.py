"""What is compared on the digits: a small imitator, a larger one, and the small one's answers, picked by the larger.

Everything that is trained is kept in a folder under a hash of what made it, so that the cells of an entry share it.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from benchmarks.worlds import digits as world
from hf_imitate import AdversarialConfig, AdversarialTrainer, Imitator, RetrodictiveConfig, RetrodictiveTrainer
from hf_imitate.audits.distinguishability import judge_pairs
from hf_imitate.audits.judges import Judge, lora_judge
from hf_imitate.causal_lm import load_causal_lm
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer

PARTS = Path(__file__).parent.parent / "results" / "partial" / "residual"
BATCH, SMALL_RATE, LARGE_RATE, JUDGE_LM_RATE = 128, 1.5e-2, 4e-3, 3e-3
DISTINGUISHER_BATCH, DISTINGUISHER_RATE = 64, 5e-4
JUDGE_BATCH, JUDGE_RATE = 32, 7e-4
PICKED_PER_QUESTION, DISTIL_RATE = 2, 5e-3
ANSWER_BATCH = 512


class Sizes(NamedTuple):
    """How many rows there are of each kind, and for how many steps each model is trained."""

    train: int = 20_000
    dev: int = 1000
    test: int = 3000
    scored: int = 400  # of the test questions, those whose probabilities are estimated
    judge_rows: int = 8000
    small_steps: int = 1600
    large_steps: int = 1500
    distinguisher_steps: int = 400
    judge_lm_steps: int = 800
    judge_steps: int = 300
    distil_steps: int = 600


FULL = Sizes()


class Data(NamedTuple):
    """Rows to train on, rows that choose the temperature, and rows for judges and scores."""

    train: Dataset
    dev: Dataset
    test: Dataset


@cache
def data(seed: int, sizes: Sizes) -> Data:
    """The rows of one data seed: different questions, one human answer to each."""
    total = sizes.train + sizes.dev + sizes.test
    rows = world.human_rows(world.questions(total, seed), seed)
    ends = np.cumsum([0, sizes.train, sizes.dev, sizes.test])
    return Data(*(rows.select(range(first, end)) for first, end in pairwise(ends)))


def kept(name: str, folder: Path, settings: Sequence[Any], build: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder that `build` fills, unless one of these settings and sources is there; its facts in `made.json`."""
    digest = hashlib.sha256(f"{_sources()}{settings}".encode()).hexdigest()[:10]
    path = folder / f"{name}-{digest}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
            made = Path(unfinished) / "made"
            made.mkdir()
            begun = time.process_time()
            facts = build(made)
            facts["cpu_seconds"] = round(time.process_time() - begun, 1)
            (made / "made.json").write_text(json.dumps(facts), encoding="utf-8")
            made.rename(path)
    return path


@cache
def _sources() -> str:
    """Of this world and of what is trained in it; read once, so that an edit does not part what one run makes."""
    parts: tuple[Any, ...] = (
        world,
        Sizes,
        data,
        fit,
        new_model,
        likelihood,
        residual,
        distilled,
        answers,
        judge,
        judged,
    )
    rates = (SMALL_RATE, LARGE_RATE, JUDGE_LM_RATE, JUDGE_RATE, DISTINGUISHER_RATE, DISTIL_RATE)
    return "".join(inspect.getsource(part) for part in parts) + str(
        (rates, BATCH, DISTINGUISHER_BATCH, JUDGE_BATCH, PICKED_PER_QUESTION)
    )


def made(path: Path) -> dict[str, Any]:
    """The facts that [`kept`] wrote."""
    return json.loads((path / "made.json").read_text(encoding="utf-8"))


def load(path: Path) -> Imitator:
    """An imitator of this world, on the CPU."""
    return Imitator.from_pretrained(path, device="cpu")


# --- what is trained


def fit(
    model: Any, rows: Dataset, folder: Path, num_steps: int, rate: float, seed: int, dev: Dataset | None = None
) -> dict[str, Any]:
    """Supervised fine-tuning of all weights; with `dev`, the best of ten readings on those rows is kept."""
    reads = {} if dev is None else {"eval_strategy": "steps", "eval_steps": max(1, num_steps // 10)}
    if reads:
        reads |= {"save_strategy": "best", "load_best_model_at_end": True, "save_total_limit": 1}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RetrodictiveTrainer(
            model=model,
            args=RetrodictiveConfig(
                output_dir=scratch,
                use_cpu=True,
                seed=seed,
                max_steps=num_steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=ANSWER_BATCH,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(30, num_steps // 4),
                adam_beta2=0.98,
                report_to="none",
                logging_steps=max(1, num_steps // 10),
                disable_tqdm=True,
                **({"save_strategy": "no", "save_only_model": True} | reads),
            ),
            train_dataset=rows,
            eval_dataset=dev,
            processing_class=world.tokenizer(),
        )
        with contextlib.redirect_stdout(None):
            trainer.train()
        trainer.save_model(str(folder))
        history = trainer.state.log_history
    readings = [log["eval_retrodiction/bits_per_answer"] for log in history if "eval_loss" in log]
    return {"dev_bits": [round(bits, 3) for bits in readings]}


def new_model(size: str, seed: int) -> Any:
    """An untrained model of this world."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return world.new_model(size)


def likelihood(size: str, seed: int, sizes: Sizes, folder: Path) -> Path:
    """The imitator of this size, fitted to the human rows of this seed by likelihood."""
    steps, rate = (sizes.small_steps, SMALL_RATE) if size == "small" else (sizes.large_steps, LARGE_RATE)
    rows = data(seed, sizes)
    return kept(
        f"{size}-{seed}",
        folder,
        [sizes, seed],
        lambda path: fit(new_model(size, seed), rows.train, path, steps, rate, seed, rows.dev),
    )


def residual(size: str, seed: int, sizes: Sizes, folder: Path, imitator: Path | None = None, name: str = "") -> Path:
    """A distinguisher of this size beside the small imitator, which stands still.

    A large one begins as a language model of the same rows; a small one as the imitator itself.
    """
    imitator = imitator or likelihood("small", seed, sizes, folder)
    rows = data(seed, sizes)

    def build(path: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            args = AdversarialConfig(
                output_dir=scratch,
                use_cpu=True,
                seed=seed,
                freeze_imitator=True,
                max_steps=sizes.distinguisher_steps,
                per_device_train_batch_size=DISTINGUISHER_BATCH,
                num_generations=2,
                max_completion_length=world.MAX_TOKENS,
                imitator_warmup_learning_rate=LARGE_RATE,
                distinguisher_lm_warmup_steps=sizes.large_steps if size == "large" else 0,
                distinguisher_warmup_steps=0,
                distinguisher_learning_rate=DISTINGUISHER_RATE,
                heldout_fraction=0.1,
                report_to="none",
                save_strategy="no",
                logging_steps=20,
                disable_tqdm=True,
            )
            begins_as = new_model(size, seed + 7) if size == "large" else load(imitator).model
            said = _Warnings()
            with said.heard(), contextlib.redirect_stdout(None):
                trainer = AdversarialTrainer(
                    model=load(imitator).model,
                    args=args,
                    train_dataset=rows.train,
                    distinguisher=begins_as,
                    processing_class=world.tokenizer(),
                )
                trainer.train()
            trainer.save_model(str(path))
        tested = [log for log in trainer.state.log_history if "distinguisher/accuracy_tested" in log]
        names = ("accuracy_tested", "accuracy_tested_upper", "pairs_tested")
        facts: dict[str, Any] = {key: tested[-1][f"distinguisher/{key}"] if tested else None for key in names}
        stopping = [log.get("distinguisher/accuracy_stopping") for log in trainer.state.log_history]
        facts["accuracy_stopping"] = [round(value, 3) for value in stopping if value is not None]
        facts["says_no_signal"] = any("no adversarial signal" in text for text in said.texts)
        return facts

    return kept(f"residual-{name or size}-{seed}", folder, [sizes, seed, size, str(imitator.name)], build)


class _Warnings(logging.Handler):
    """Collects what the library warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    @contextlib.contextmanager
    def heard(self):
        """Listen inside."""
        listened = logging.getLogger("hf_imitate")
        listened.addHandler(self)
        try:
            yield
        finally:
            listened.removeHandler(self)


def distilled(seed: int, number: int, sizes: Sizes, folder: Path) -> Path:
    """The small imitator after so many rounds: likelihood of picked answers and the human rows, from where it was."""
    if number == 0:
        return likelihood("small", seed, sizes, folder)
    rows = data(seed, sizes)
    before = distilled(seed, number - 1, sizes, folder)
    teacher = residual("large", seed, sizes, folder, before, "" if number == 1 else f"round{number}")

    def build(path: Path) -> dict[str, Any]:
        imitator, asked = load(teacher), rows.train["prompt"][:]
        draw: dict[str, Any] = {
            "num_answers": PICKED_PER_QUESTION,
            "seed": 10_000 + number,
            "batch_size": ANSWER_BATCH,
        }
        picked = imitator.answer(asked, resample=8, max_new_tokens=world.MAX_TOKENS, **draw)
        # An empty answer is none to learn from; a small imitator gives a few.
        pairs = [(question, text) for question, own in zip(asked, picked, strict=True) for text in own if text]
        prompts, texts = zip(*pairs, strict=True)
        own_rows = Dataset.from_dict({"prompt": prompts, "completion": texts})
        both = concatenate_datasets([rows.train, own_rows])
        # What is loaded to be used is frozen.
        student = load(before).model.requires_grad_(True)
        return fit(student, both, path, sizes.distil_steps, DISTIL_RATE, seed, rows.dev)

    return kept(f"distilled{number}-{seed}", folder, [sizes, seed, number, teacher.name], build)


# --- what is measured


def answers(imitator: Imitator, asked: Sequence[str], seed: int, **law: Any) -> list[Answer]:
    """One answer to each question; `law` is a temperature or a `resample`."""
    drawn = imitator.answer(asked, seed=seed, max_new_tokens=world.MAX_TOKENS, batch_size=ANSWER_BATCH, **law)
    # One token per character: an answer of full length had no room for its end.
    return [Answer(own[0], len(own[0]) < world.MAX_TOKENS) for own in drawn]


def judge(number: int, sizes: Sizes, folder: Path) -> Judge:
    """A judge that starts from a language model of its own: another seed, other rows, another rate."""

    def build(path: Path) -> dict[str, Any]:
        seed = 7000 + number
        rows = world.human_rows(world.questions(sizes.judge_rows, seed, reserved=True), seed)
        return fit(new_model("large", seed), rows, path, sizes.judge_lm_steps, JUDGE_LM_RATE, seed)

    path = kept(f"judge-{number}", folder, [sizes, number], build)
    base, tokenizer = load_causal_lm(path, "cpu", None)
    settings: dict[str, Any] = {"num_steps": sizes.judge_steps, "batch_size": JUDGE_BATCH, "learning_rate": JUDGE_RATE}
    return lora_judge(base, tokenizer, full=True, **settings)


def judged(rows: Dataset, given: Sequence[Answer], of: Judge, seed: int) -> dict[str, Any]:
    """What a freshly trained judge makes of these answers beside the human's."""
    pairs = [
        Pair(question, Answer(human, True), (answer,))
        for question, human, answer in zip(rows["prompt"], rows["completion"], given, strict=True)
    ]
    seen = judge_pairs(pairs, of, name="full", seed=seed, group_answers=False)
    return {"accuracy": seen.accuracy, "interval": list(seen.interval), "num_pairs": seen.num_pairs}


def oracle(
    rows: Dataset, given: Sequence[Answer], log_prob: Callable[[list[str], list[str]], np.ndarray]
) -> dict[str, float]:
    """The judge who knows both laws: its paired accuracy, and the share of answers that no human gives.

    Args:
        rows: questions, and the human's answers.
        given: the imitator's.
        log_prob: (questions, answers) -> nats of the law that gave them, or the log of an unbiased estimate: then the
            oracle is a little too weak.
    """
    asked, humans, texts = rows["prompt"][:], rows["completion"][:], [answer.text for answer in given]
    of_human = world.human_log_prob(asked, texts)
    possible = np.isfinite(of_human) & np.array([answer.ended for answer in given])
    on_human = world.human_log_prob(asked, humans) - log_prob(asked, humans)
    on_given = np.full(len(texts), -math.inf)
    if possible.any():
        which = np.flatnonzero(possible).tolist()
        on_given[which] = of_human[which] - log_prob([asked[i] for i in which], [texts[i] for i in which])
    wins = (on_human > on_given) + 0.5 * (on_human == on_given)
    return {"oracle": float(wins.mean()), "impossible": float(1 - possible.mean())}


def log_probs(imitator: Imitator, rows: Dataset, resample: int, num_estimates: int, seed: int = 0) -> dict[str, Any]:
    """Nats of the human's answers under the law that keeps one of K: estimates and about how far they are too low."""
    asked, humans = rows["prompt"][:], rows["completion"][:]
    if resample == 1:
        return {"nats": imitator.log_prob(asked, humans).nats.numpy(), "bias": np.zeros(len(asked))}
    found = imitator.residual(resample, max_new_tokens=world.MAX_TOKENS).log_prob(
        asked, humans, seed=seed, num_estimates=num_estimates, batch_size=ANSWER_BATCH
    )
    return {"nats": found.nats.numpy(), "bias": found.log_bias.numpy()}


def seconds_per_answer(imitator: Imitator, asked: Sequence[str], seed: int = 0, **law: Any) -> float:
    """CPU seconds of one answer, in batches of 512."""
    begun = time.process_time()
    answers(imitator, asked, seed, **law)
    return (time.process_time() - begun) / len(asked)


def forget(folder: Path) -> None:
    """Remove everything that was kept there."""
    shutil.rmtree(folder, ignore_errors=True)
