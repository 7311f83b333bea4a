"""What is compared on the notes: an imitator of short memory, a larger model, and answers of one, picked by the other.

Everything that is trained is kept in a folder under a hash of what made it, so that the cells of an entry share it.
"""

import contextlib
import inspect
import logging
import math
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

from benchmarks.worlds import notes as world
from benchmarks.worlds.kept import kept
from hf_imitate import AdversarialConfig, AdversarialTrainer, Imitator, RetrodictiveConfig, RetrodictiveTrainer
from hf_imitate.audits.distinguishability import judge_pairs
from hf_imitate.audits.judges import Judge, lora_judge
from hf_imitate.causal_lm import load_causal_lm
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer

PARTS = Path(__file__).parent.parent / "results" / "partial" / "residual"
BATCH, SMALL_RATE, LARGE_RATE, JUDGE_LM_RATE, MORE_RATE = 64, 1e-2, 6e-3, 5e-3, 3e-3
PICKED_PER_QUESTION, DISTIL_RATE = 4, 5e-3
DISTINGUISHER_RATE = 5e-4
JUDGE_BATCH, JUDGE_RATE = 32, 7e-4
ANSWER_BATCH = 512
TIMINGS = 3


class Sizes(NamedTuple):
    """How many rows there are of each kind, and for how many steps each model is trained."""

    train: int = 5000
    few: int = 400  # of the training rows, those that an imitator of few rows is shown
    unanswered: int = 2400
    dev: int = 3000
    test: int = 3000
    scored: int = 250  # of the test questions, those whose probabilities are estimated
    judge_rows: int = 2400
    small_steps: int = 600
    few_steps: int = 300
    large_steps: int = 400
    distinguisher: tuple[int, int, float] = (200, 64, 0.1)  # steps, answers in each, share of rows held out
    same_size: tuple[int, int, float] = (250, 128, 0.3)  # enough held-out questions to say that there is no signal
    judge_lm_steps: int = 350
    judge_steps: int = 150
    distil_steps: int = 800


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


@cache
def sources(*parts: Callable[..., Any]) -> str:
    """Of this world and of what trains in it; read once, so that an edit does not part what one run makes."""
    rates = (SMALL_RATE, LARGE_RATE, JUDGE_LM_RATE, JUDGE_RATE, MORE_RATE, DISTIL_RATE, DISTINGUISHER_RATE)
    return "".join(inspect.getsource(part) for part in (world, data, new_model, fit, *parts)) + str(
        (rates, BATCH, JUDGE_BATCH, PICKED_PER_QUESTION)
    )


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
    """The imitator of this size, fitted to the human rows of this seed by likelihood; "few" is shown a few of them."""
    steps, rate = {
        "small": (sizes.small_steps, SMALL_RATE),
        "large": (sizes.large_steps, LARGE_RATE),
        "few": (sizes.few_steps, SMALL_RATE),
    }[size]
    rows = data(seed, sizes)
    shown = rows.train.select(range(sizes.few)) if size == "few" else rows.train
    return kept(
        f"{size}-{seed}",
        folder,
        [sources(likelihood), sizes, seed],
        lambda path: fit(new_model(size, seed), shown, path, steps, rate, seed, rows.dev),
    )


def continued(seed: int, sizes: Sizes, folder: Path) -> Path:
    """The small imitator after more likelihood: as many steps as the distinguisher takes as both of what it is."""
    rows = data(seed, sizes)
    before = likelihood("small", seed, sizes, folder)
    steps = sizes.large_steps + sizes.distinguisher[0]
    return kept(
        f"continued-{seed}",
        folder,
        [sources(likelihood, continued), sizes, seed],
        lambda path: fit(trainable(before), rows.train, path, steps, MORE_RATE, seed, rows.dev),
    )


def trainable(path: Path) -> Any:
    """The model saved there; what is loaded to be used is frozen."""
    return load(path).model.requires_grad_(True)


def residual(size: str, seed: int, sizes: Sizes, folder: Path, imitator: Path | None = None) -> Path:
    """A distinguisher of this size beside an imitator that stands still, by default the small one.

    A large one begins as a language model of the same rows; a small one as the imitator itself.
    """
    imitator = imitator or likelihood("small", seed, sizes, folder)
    rows = data(seed, sizes)
    steps, batch, share_held_out = sizes.distinguisher if size == "large" else sizes.same_size

    def build(path: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            args = AdversarialConfig(
                output_dir=scratch,
                use_cpu=True,
                seed=seed,
                freeze_imitator=True,
                max_steps=steps,
                per_device_train_batch_size=batch,
                num_generations=2,
                max_completion_length=world.MAX_TOKENS,
                imitator_warmup_learning_rate=LARGE_RATE,
                distinguisher_lm_warmup_steps=sizes.large_steps if size == "large" else 0,
                distinguisher_warmup_steps=0,
                distinguisher_learning_rate=DISTINGUISHER_RATE,
                heldout_fraction=share_held_out,
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

    return kept(f"residual-{size}-{imitator.name}", folder, [sources(residual), sizes, size, imitator.name], build)


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
    """The imitator of few rows after so many rounds: likelihood of its rows and of picked answers, from where it was.

    Picked are answers to questions that no human answered in training.
    """
    if number == 0:
        return likelihood("few", seed, sizes, folder)
    before = distilled(seed, number - 1, sizes, folder)
    teacher = residual("large", seed, sizes, folder, before)
    rows = data(seed, sizes)

    def build(path: Path) -> dict[str, Any]:
        imitator, asked = load(teacher), world.questions(sizes.unanswered, seed, reserved=True)
        picked = [
            (question, answer.text)
            for draw in range(PICKED_PER_QUESTION)
            for question, answer in zip(asked, answers(imitator, asked, 10_000 + draw, resample=8), strict=True)
            if answer.text  # an empty answer is none to learn from
        ]
        prompts, texts = zip(*picked, strict=True)
        own_rows = Dataset.from_dict({"prompt": prompts, "completion": texts})
        both = concatenate_datasets([rows.train.select(range(sizes.few)), own_rows])
        return fit(trainable(before), both, path, sizes.distil_steps, DISTIL_RATE, seed, rows.dev)

    return kept(f"distilled{number}-{seed}", folder, [sources(distilled, answers), teacher.name], build)


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

    path = kept(f"judge-{number}", folder, [sources(judge), sizes, number], build)
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


def log_prob(
    imitator: Imitator, asked: list[str], texts: list[str], num_estimates: int = 1, seed: int = 0, **law: Any
) -> dict[str, np.ndarray]:
    """Nats of these answers under a law, and how far they are too low: estimates only where one of K is kept."""
    resample = law.pop("resample", 1)
    if resample == 1:
        return {"nats": imitator.log_prob(asked, texts, **law).nats.numpy(), "bias": np.zeros(len(asked))}
    found = imitator.residual(resample, max_new_tokens=world.MAX_TOKENS).log_prob(
        asked, texts, seed=seed, num_estimates=num_estimates, batch_size=ANSWER_BATCH
    )
    return {"nats": found.nats.numpy(), "bias": found.log_bias.numpy()}


def seconds_per_answer(laws: dict[str, tuple[Imitator, dict[str, Any]]], asked: Sequence[str]) -> dict[str, float]:
    """CPU seconds of one answer under each law: one thread, batches of 512, the median of three interleaved rounds."""
    threads, seconds = torch.get_num_threads(), {name: [] for name in laws}
    torch.set_num_threads(1)
    try:
        for number in range(TIMINGS):
            for name, (imitator, law) in laws.items():
                begun = time.process_time()
                answers(imitator, asked, number, **law)
                seconds[name].append((time.process_time() - begun) / len(asked))
    finally:
        torch.set_num_threads(threads)
    return {name: float(np.median(values)) for name, values in seconds.items()}
