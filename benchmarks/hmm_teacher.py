"""Regret of the exact trainer to a teacher whose log-probabilities are known: a hidden Markov model.

A question is eight symbols that the teacher emitted, the answer what it emits from there until it ends. Given the
question, the forward algorithm states log p(answer) exactly, and no imitator does better in the mean. Regret is the
mean difference on held-out rows, nats per token, end token included.
"""

import contextlib
import io
import tempfile
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate import Imitator, RetrodictiveConfig, RetrodictiveTrainer

NUM_STATES, NUM_SYMBOLS, QUESTION, STOP, LONGEST = 4, 8, 8, 0.12, 40
NUM_ROWS, NUM_TEST, BATCH, NUM_STEPS, RATE = 20_000, 2_000, 64, 900, 3e-3
LIMIT = 0.05  # nats per token
SEEDS = [41, 42, 43]  # chosen before their first run; the settings were found on seed 4
CELLS = [{"seed": seed} for seed in SEEDS]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per symbol."""
    names = [f"s{i}" for i in range(NUM_SYMBOLS)]
    words = models.WordLevel({name: i for i, name in enumerate([*names, "<end>", "<pad>"])}, unk_token="<pad>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


class Teacher:
    """A hidden Markov model: states change, each emits symbols, and after any symbol all may be over.

    Args:
        seed (`int`): of its tables.
    """

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.first = np.full(NUM_STATES, 1 / NUM_STATES)
        self.change = 0.8 * np.eye(NUM_STATES) + 0.2 * rng.dirichlet(np.ones(NUM_STATES), size=NUM_STATES)
        self.emit = rng.dirichlet(np.full(NUM_SYMBOLS, 0.3), size=NUM_STATES)

    def sample(self, num_rows: int, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        """Questions with their answers; an answer has at least one symbol and at most `LONGEST`."""
        rows = []
        for _ in range(num_rows):
            length = QUESTION + min(int(rng.geometric(STOP)), LONGEST)
            state, symbols = rng.choice(NUM_STATES, p=self.first), []
            for _ in range(length):
                symbols.append(int(rng.choice(NUM_SYMBOLS, p=self.emit[state])))
                state = rng.choice(NUM_STATES, p=self.change[state])
            rows.append((symbols[:QUESTION], symbols[QUESTION:]))
        return rows

    def log_prob(self, question: list[int], answer: list[int]) -> float:
        """log p(answer, end | question) by the forward algorithm, nats."""
        belief, total = self.first, 0.0
        for number, symbol in enumerate([*question, *answer]):
            joint = belief * self.emit[:, symbol]
            if number >= QUESTION:
                total += np.log(joint.sum())
            belief = joint / joint.sum() @ self.change
        ended_early = len(answer) < LONGEST
        # The first symbol always comes; after each, STOP ends it, and after the last possible one it ends anyway.
        return total + (len(answer) - 1) * np.log(1 - STOP) + (np.log(STOP) if ended_early else 0.0)


def run_cell(
    cell: dict[str, Any], num_rows: int = NUM_ROWS, num_steps: int = NUM_STEPS, num_test: int = NUM_TEST
) -> dict[str, Any]:
    """Train on one teacher's rows; regret on held-out rows, with its standard error."""
    teacher, rng = Teacher(cell["seed"]), np.random.default_rng([cell["seed"], 1])
    train, test = teacher.sample(num_rows, rng), teacher.sample(num_test, rng)
    model = _new_model(cell["seed"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = RetrodictiveConfig(
            output_dir=folder,
            use_cpu=True,
            seed=cell["seed"],
            max_steps=num_steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = Dataset.from_dict(
            {"prompt": [_spell(q) for q, _ in train], "completion": [_spell(a) for _, a in train]}
        )
        RetrodictiveTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer()).train()
    imitator = Imitator(model.eval(), tokenizer(), max_new_tokens=LONGEST + 1)
    stated = imitator.log_prob([_spell(q) for q, _ in test], [_spell(a) for _, a in test]).nats.numpy()
    best = np.array([teacher.log_prob(q, a) for q, a in test])
    num_tokens = np.array([len(a) + 1 for _, a in test])
    regret = (best - stated) / num_tokens.mean()
    return {
        "regret": float(regret.mean()),
        "standard_error": float(regret.std(ddof=1) / len(test) ** 0.5),
        "teacher_nats_per_token": float(-best.sum() / num_tokens.sum()),
        "num_test": len(test),
    }


def _new_model(seed: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def _spell(symbols: list[int]) -> str:
    return " ".join(f"s{symbol}" for symbol in symbols)


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per seed: regret in nats per token, and whether it is within the limit."""
    rows = [
        {
            "seed": entry["cell"]["seed"],
            "regret": round(entry["result"]["regret"], 4),
            "standard error": round(entry["result"]["standard_error"], 4),
            "teacher": round(entry["result"]["teacher_nats_per_token"], 3),
            "within": entry["result"]["regret"] <= LIMIT,
        }
        for entry in results
    ]
    return rows, all(row["within"] for row in rows)
