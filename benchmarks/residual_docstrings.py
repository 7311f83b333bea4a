"""Docstrings: one of eight answers, kept by n-grams or by a larger model, against likelihood alone.

Real answers, no known law: the first lines of docstrings of the standard library. The imitator is a small transformer
fitted to them from nothing. Two distinguishers, each fitted to it while it stands still: hashed n-grams, and the tiny
base that has read the library's other prose, six times the imitator's size, fitted to the same rows first. Judges are
n-grams and a transformer that starts from a language model of rows of its own. Humans repeat each other word for word
more often than the imitator repeats them, and their answers are longer; so every judge is also asked without exact
repeats of training answers, and where both answers are cut after five words. Nothing is claimed: the table says what
is left where.
"""

import inspect
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.worlds.kept import kept, made
from hf_imitate import (
    AdversarialConfig,
    AdversarialTrainer,
    Imitator,
    RetrodictiveConfig,
    RetrodictiveTrainer,
    load_docstrings,
)
from hf_imitate.audits.distinguishability import judge_pairs
from hf_imitate.audits.judges import lora_judge, ngram_judge
from hf_imitate.audits.splits import MIN_PAIRS
from hf_imitate.causal_lm import load_causal_lm
from hf_imitate.log_probs import nats_to_bits
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer
from hf_imitate.tiny_base import tiny_base

PARTS = Path(__file__).parent / "results" / "partial" / "residual_docstrings"
SEED, JUDGES = 41, [0, 1, 2]
ARMS = ("likelihood", "ngram", "larger")
VIEWS = ("all", "no repeats", "five words")
LONGEST, MOST_CHARACTERS, CUT_WORDS = 40, 100, 5
IMITATOR_RATE, JUDGE_LM_RATE, LARGER_LM_RATE = 4e-3, 4e-3, 1e-3
# A base of a million parameters takes a larger rate than the n-grams do.
DISTINGUISHER_RATES = {"ngram": 2e-4, "larger": 1e-3}
CELLS = [
    {"part": "training", "arm": "likelihood"},
    {"part": "training", "arm": "ngram"},
    {"part": "training", "arm": "larger"},
    *({"part": "judges", "judge": judge} for judge in JUDGES),
    {"part": "scores"},
]


class Sizes(NamedTuple):
    """Rows of each kind, and steps of training."""

    train: int = 2800
    judge_rows: int = 1000
    test: int = 1200
    scored: int = 200
    imitator_steps: int = 500
    judge_lm_steps: int = 250
    larger_steps: int = 150
    ngram_steps: int = 250
    distinguisher_steps: int = 150
    judge_steps: int = 150


FULL = Sizes()


@cache
def rows(sizes: Sizes = FULL) -> tuple[Dataset, Dataset, Dataset]:
    """Rows to train on, those of the judges' language models, and those that are judged; no question is in two."""
    dataset = load_docstrings().select_columns(["prompt", "completion"])
    dataset = dataset.filter(lambda row: max(map(len, row.values())) <= MOST_CHARACTERS)
    by_question: dict[str, int] = {}
    for number, prompt in enumerate(dataset["prompt"]):
        by_question.setdefault(prompt, number)
    order = np.random.default_rng(SEED).permutation(list(by_question.values()))
    ends = np.cumsum([sizes.train, sizes.judge_rows, sizes.test])
    if ends[-1] > len(order):
        raise ValueError(f"There are {len(order)} questions and {ends[-1]} are needed. Lower `Sizes`.")
    return tuple(dataset.select(part) for part in np.split(order[: ends[-1]], ends[:-1]))


def tokenizer() -> Any:
    """The tiny base's."""
    return AutoTokenizer.from_pretrained(tiny_base(), trust_remote_code=False)


def new_model(seed: int) -> Qwen3ForCausalLM:
    """An untrained model of 155 000 parameters, two thirds of them its vocabulary."""
    config = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def fit(path: Path, dataset: Dataset, num_steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Likelihood of these rows, from nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RetrodictiveTrainer(
            model=new_model(seed),
            args=RetrodictiveConfig(
                output_dir=scratch,
                use_cpu=True,
                seed=seed,
                max_steps=num_steps,
                per_device_train_batch_size=32,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(20, num_steps // 4),
                adam_beta2=0.98,
                report_to="none",
                save_strategy="no",
                logging_steps=max(1, num_steps // 5),
                disable_tqdm=True,
            ),
            train_dataset=dataset,
            processing_class=tokenizer(),
        )
        trainer.train()
        trainer.save_model(str(path))
    bits = [log["retrodiction/bits_per_answer"] for log in trainer.state.log_history if "loss" in log]
    return {"training_bits": [round(value, 2) for value in bits]}


def likelihood(sizes: Sizes, folder: Path) -> Path:
    """The imitator."""
    return kept(
        "imitator",
        folder,
        [sizes, _source()],
        lambda path: fit(path, rows(sizes)[0], sizes.imitator_steps, IMITATOR_RATE, SEED),
    )


def residual(arm: str, sizes: Sizes, folder: Path) -> Path:
    """The imitator beside one of the distinguishers."""

    def build(path: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = AdversarialTrainer(
                model=load_causal_lm(likelihood(sizes, folder), "cpu", None)[0],
                args=AdversarialConfig(
                    output_dir=scratch,
                    use_cpu=True,
                    seed=SEED,
                    freeze_imitator=True,
                    max_steps=sizes.ngram_steps if arm == "ngram" else sizes.distinguisher_steps,
                    per_device_train_batch_size=32,
                    num_generations=2,
                    max_completion_length=LONGEST,
                    imitator_warmup_learning_rate=LARGER_LM_RATE,
                    distinguisher_lm_warmup_steps=0 if arm == "ngram" else sizes.larger_steps,
                    distinguisher_warmup_steps=0,
                    distinguisher_learning_rate=DISTINGUISHER_RATES[arm],
                    heldout_fraction=0.1,
                    report_to="none",
                    save_strategy="no",
                    logging_steps=20,
                    disable_tqdm=True,
                ),
                train_dataset=rows(sizes)[0],
                distinguisher="ngram" if arm == "ngram" else str(tiny_base()),
                processing_class=tokenizer(),
            )
            trainer.train()
            trainer.save_model(str(path))
        tested = [log for log in trainer.state.log_history if "distinguisher/accuracy_tested" in log][-1]
        return {name: tested[f"distinguisher/{name}"] for name in ("accuracy_tested", "accuracy_tested_upper")}

    return kept(f"residual-{arm}", folder, [sizes, arm, _source()], build)


@cache
def _source() -> str:
    parts: tuple[Any, ...] = (Sizes, rows, new_model, fit, residual)
    rates = (IMITATOR_RATE, JUDGE_LM_RATE, LARGER_LM_RATE, DISTINGUISHER_RATES)
    return "".join(inspect.getsource(part) for part in parts) + str((SEED, LONGEST, MOST_CHARACTERS, rates))


def load(arm: str, sizes: Sizes, folder: Path) -> tuple[Imitator, int]:
    """An arm's imitator and its K."""
    path = likelihood(sizes, folder) if arm == "likelihood" else residual(arm, sizes, folder)
    return Imitator.from_pretrained(path, device="cpu"), 1 if arm == "likelihood" else 8


def run_cell(cell: dict[str, Any], sizes: Sizes = FULL, folder: Path = PARTS) -> dict[str, Any]:
    """Train one arm, let one judge seed see all, or score them."""
    if cell["part"] == "training":
        is_plain = cell["arm"] == "likelihood"
        return made(likelihood(sizes, folder) if is_plain else residual(cell["arm"], sizes, folder))
    return scores(sizes, folder) if cell["part"] == "scores" else judges(cell["judge"], sizes, folder)


def judges(number: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Accuracy of both judges on each arm, in each view."""
    train, others, test = rows(sizes)
    path = kept(
        f"judge-{number}",
        folder,
        [sizes, number, _source()],
        lambda path: fit(path, others, sizes.judge_lm_steps, JUDGE_LM_RATE, 7000 + number),
    )
    base, own_tokenizer = load_causal_lm(path, "cpu", None)
    neural = lora_judge(base, own_tokenizer, full=True, num_steps=sizes.judge_steps, learning_rate=7e-4)
    known = set(train["completion"])
    found: dict[str, Any] = {}
    for arm in ARMS:
        imitator, k = load(arm, sizes, folder)
        drawn = imitator.answer(test["prompt"][:], seed=60 + number, resample=k, max_new_tokens=LONGEST)
        texts = [own[0] for own in drawn]
        found[arm] = {
            "repeats": float(np.mean([text in known for text in texts])),
            "human_repeats": float(np.mean([text in known for text in test["completion"]])),
            "words": float(np.mean([len(text.split()) for text in texts])),
            "human_words": float(np.mean([len(text.split()) for text in test["completion"]])),
        }
        for view in VIEWS:
            pairs = seen_as(view, test, texts, known)
            for name, judge in (("ngram", ngram_judge), ("neural", neural)):
                # A view that leaves too few pairs is not measured.
                enough = len(pairs) >= MIN_PAIRS
                accuracy = judge_pairs(pairs, judge, name=name, seed=number).accuracy if enough else None
                found[arm][f"{name}, {view}"] = [accuracy, len(pairs)]
    return found


def seen_as(view: str, test: Dataset, texts: list[str], known: set[str]) -> list[Pair]:
    """Pairs of the human's and the imitator's answers in one of the views.

    "all": as they are. "no repeats": where neither is word for word a training answer. "five words": both cut after
    five words, where both have as many; neither length nor ending can tell them apart any more.
    """
    pairs = []
    for question, human, text in zip(test["prompt"], test["completion"], texts, strict=True):
        if view == "no repeats" and (human in known or text in known):
            continue
        sides = [human, text]
        ended = view != "five words"
        if not ended:
            words = [side.split()[:CUT_WORDS] for side in sides]
            if min(map(len, words)) < CUT_WORDS:
                continue
            sides = [" ".join(side) for side in words]
        pairs.append(Pair(question, Answer(sides[0], ended), (Answer(sides[1], ended),)))
    return pairs


def scores(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Bits per held-out human answer; of the residual laws estimates, with the bias of the log."""
    test = rows(sizes)[2].select(range(sizes.scored))
    asked, humans = test["prompt"][:], test["completion"][:]
    plain = load("likelihood", sizes, folder)[0].log_prob(asked, humans).nats.numpy()
    found = {"likelihood": {"bits": nats_to_bits(float(-plain.mean())), "gained": 0.0, "se": 0.0, "bias": 0.0}}
    for arm in ARMS[1:]:
        law = load(arm, sizes, folder)[0].residual(8, max_new_tokens=LONGEST)
        seen = law.log_prob(asked, humans, num_estimates=8)
        gain = (seen.nats.numpy() - plain) / math.log(2)
        found[arm] = {
            "bits": nats_to_bits(float(-seen.nats.mean())),
            "gained": float(gain.mean()),
            "se": float(gain.std(ddof=1) / math.sqrt(len(gain))),
            "bias": nats_to_bits(-float(seen.log_bias.mean())),
        }
    return found


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per arm: bits, and each judge in each view, mean over its seeds. Nothing is claimed."""
    seen = [entry["result"] for entry in results if entry["cell"]["part"] == "judges"]
    bits = next(entry["result"] for entry in results if entry["cell"]["part"] == "scores")
    trained = {entry["cell"]["arm"]: entry["result"] for entry in results if entry["cell"]["part"] == "training"}
    table = []
    for arm in ARMS:
        row: dict[str, Any] = {"arm": arm, "held out": trained[arm].get("accuracy_tested")}
        row |= {name: round(bits[arm][name], 3) for name in ("bits", "gained", "se", "bias")}
        row |= {name: round(float(np.mean([one[arm][name] for one in seen])), 3) for name in ("repeats", "words")}
        for view in VIEWS:
            for name in ("ngram", "neural"):
                key = f"{name}, {view}"
                accuracies = [one[arm][key][0] for one in seen if one[arm][key][0] is not None]
                row[key] = round(float(np.mean(accuracies)), 3) if accuracies else None
        table.append(row)
    human = {key: round(seen[0]["likelihood"][f"human_{key}"], 3) for key in ("repeats", "words")}
    table.append({key: human.get(key, "") for key in table[0]} | {"arm": "human"})
    return table, True
