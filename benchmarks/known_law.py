"""A world whose human law is known exactly: the game must bring a misfit imitator to it, and a frozen judge must not.

Eight questions, ten answers of one to three words, a law of its own for each question; 300 human rows per question.
The base is fitted to *another* question-dependent law. Total variation to the human law is exact: ten answers are
scored, and what is left over counts as wrong.
"""

import tempfile
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from hf_imitate import AdversarialConfig, AdversarialTrainer
from hf_imitate.audits.distinguishability import judge_pairs
from hf_imitate.audits.judges import lora_judge
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer, Renderer, collate, end_token_ids
from hf_imitate.scoring import score_answers

QUESTIONS = [f"question {word} :" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight"]]
ANSWERS = ["red", "blue", "green", "black", "white"]
ANSWERS += ["red blue", "blue red", "green green", "blue blue", "red green blue"]
NUM_ROWS, NUM_STEPS, BATCH = 300, 1000, 128
NUM_JUDGED = 400  # pairs per question behind each judge: 3 200, of which 1 600 are trials
SEEDS = [21, 22, 23, 24, 25]  # chosen before their first run; the settings were found on seeds 11 and 12
CELLS = [{"seed": seed, "arm": arm} for seed in SEEDS for arm in ("game", "frozen", "likelihood")]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    special = ["<end>", "<pad>", "<unk>"]
    words = sorted({word for text in QUESTIONS + ANSWERS for word in text.split()})
    model = models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def laws(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The human law and the base's, [questions, answers] each: the same kind of law, drawn apart."""
    rng = np.random.default_rng(seed)
    human, base = (rng.dirichlet(np.full(len(ANSWERS), 0.7), size=len(QUESTIONS)) for _ in range(2))
    # A fifth of the base is the human: an answer that it never gives could never be paid for.
    return human, 0.2 * human + 0.8 * base


def new_model(seed: int) -> Qwen3ForCausalLM:
    """An untrained model of about 70 000 parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def renderer(model: Qwen3ForCausalLM) -> Renderer:
    """Renders this world's questions and answers."""
    return Renderer(tokenizer(), end_token_ids(tokenizer(), model.generation_config))


def exact_law(model: Qwen3ForCausalLM) -> np.ndarray:
    """The model's probability of each answer to each question, [questions, answers]; the rest of 1 is other text."""
    prompts = [question for question in QUESTIONS for _ in ANSWERS]
    rows = renderer(model).human(prompts, ANSWERS * len(QUESTIONS))
    log_prob = score_answers(model, rows, tokenizer().pad_token_id)
    return np.exp(np.asarray(log_prob, dtype=float)).reshape(len(QUESTIONS), len(ANSWERS))


def total_variation(law: np.ndarray, human: np.ndarray) -> float:
    """Mean over questions, in [0, 1]."""
    other = 1 - law.sum(axis=1)
    return float(np.mean((np.abs(law - human).sum(axis=1) + other) / 2))


def fit_to_law(model: Qwen3ForCausalLM, law: np.ndarray, num_steps: int = 400, rate: float = 3e-3) -> Qwen3ForCausalLM:
    """Fit a model to a law exactly: its full cross-entropy, no sampling."""
    prompts = [question for question in QUESTIONS for _ in ANSWERS]
    batch = collate(renderer(model).human(prompts, ANSWERS * len(QUESTIONS)), tokenizer().pad_token_id)
    labels = batch.input_ids.masked_fill(batch.answer_mask == 0, -100)
    weight = torch.tensor(law.flatten() / len(QUESTIONS), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, num_steps)
    for _ in range(num_steps):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        nats = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(
            1
        )
        (weight * nats).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def human_rows(human: np.ndarray, seed: int, num_rows: int = NUM_ROWS) -> Dataset:
    """What the humans of this world answered, `num_rows` per question."""
    rng = np.random.default_rng([seed, 1])
    rows = [(q, ANSWERS[a]) for i, q in enumerate(QUESTIONS) for a in rng.choice(len(ANSWERS), num_rows, p=human[i])]
    return Dataset.from_dict({"prompt": [q for q, _ in rows], "completion": [a for _, a in rows]})


def judged(model: Qwen3ForCausalLM, judge_base: Qwen3ForCausalLM, human: np.ndarray, seed: int) -> dict[str, Any]:
    """A fresh judge's paired accuracy on fresh answers of both sides. The judge starts from the base, all its weights
    trained: the kind the distinguisher is."""
    rng = np.random.default_rng([seed, 2])
    law = exact_law(model)
    other = np.clip(1 - law.sum(axis=1, keepdims=True), 0, None)
    law = np.concatenate([law, other], axis=1) / (law.sum(axis=1, keepdims=True) + other)
    shown = [*ANSWERS, "white white white"]  # stands for everything that is none of the ten answers
    pairs = [
        Pair(question, Answer(ANSWERS[h], True), (Answer(shown[m], True),))
        for i, question in enumerate(QUESTIONS)
        for h, m in zip(
            rng.choice(len(ANSWERS), NUM_JUDGED, p=human[i]), rng.choice(len(shown), NUM_JUDGED, p=law[i]), strict=True
        )
    ]
    judge = lora_judge(judge_base, tokenizer(), full=True, num_steps=300, batch_size=64, learning_rate=1e-3)
    seen = judge_pairs(pairs, judge, name="full", seed=seed, group_answers=False)
    return {"accuracy": seen.accuracy, "interval": list(seen.interval), "num_pairs": seen.num_pairs}


def play(
    base: Qwen3ForCausalLM,
    judge_base: Qwen3ForCausalLM,
    rows: Dataset,
    seed: int,
    arm: str,
    num_steps: int,
    **more: Any,
) -> list[float]:
    """Train `base` in one arm; how well its distinguisher knew fresh answers, every 50 steps."""
    with tempfile.TemporaryDirectory() as folder:
        likelihood_only = arm == "likelihood"
        args = AdversarialConfig(
            output_dir=folder,
            use_cpu=True,
            seed=seed,
            max_steps=1 if likelihood_only else num_steps,
            per_device_train_batch_size=BATCH,
            num_generations=8,
            max_completion_length=5,
            learning_rate=1e-9 if likelihood_only else 1.5e-4,
            warmup_steps=0 if likelihood_only else 20,
            adam_beta1=0.5,
            adam_beta2=0.99,
            distinguisher_learning_rate=2e-3,
            imitator_warmup_steps=250 if likelihood_only else 0,
            imitator_warmup_learning_rate=1e-3,
            distinguisher_lm_warmup_steps=0,
            distinguisher_warmup_steps=0 if likelihood_only else 50,
            distinguisher_steps=3,
            retrodictive_coef=0.0,
            replay_ratio=0.5,
            report_to="none",
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
            **more,
        )
        trainer = AdversarialTrainer(
            model=base,
            args=args,
            train_dataset=rows,
            distinguisher=judge_base,
            processing_class=tokenizer(),
        )
        if arm == "frozen":
            trainer.add_callback(_FreezeAfterWarmup(trainer))
        trainer.train()
        return [h["distinguisher/accuracy_fresh"] for h in trainer.state.log_history if "reward" in h]


def run_cell(cell: dict[str, Any], num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Train one arm from the misfit base of one seed and measure it."""
    seed, arm = cell["seed"], cell["arm"]
    human, base_law = laws(seed)
    base = fit_to_law(new_model(seed), base_law)
    judge_base = fit_to_law(new_model(seed), base_law)
    measured = {"tv_start": total_variation(exact_law(base), human)}
    if arm == "game":
        measured["judge_start"] = judged(base, judge_base, human, seed)
    measured["curve"] = play(base, judge_base, human_rows(human, seed), seed, arm, num_steps)
    measured["tv_end"] = total_variation(exact_law(base), human)
    if arm == "game":
        measured["judge_end"] = judged(base, fit_to_law(new_model(seed), base_law), human, seed)
    return measured


class _FreezeAfterWarmup(TrainerCallback):
    """Stops the distinguisher's learning when the game begins: what plain reward-model training would do."""

    def __init__(self, trainer: AdversarialTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.trainer.phases.game_start:
            self.trainer.args.distinguisher_steps = 0


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per seed: where the game and its controls ended, and whether this seed passes."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for entry in results:
        by_seed.setdefault(entry["cell"]["seed"], {})[entry["cell"]["arm"]] = entry["result"]
    rows = []
    for seed, arms in sorted(by_seed.items()):
        game, sft, frozen = arms["game"], arms["likelihood"], arms["frozen"]
        before, after = game["judge_start"], game["judge_end"]
        rows.append(
            {
                "seed": seed,
                "tv start": round(game["tv_start"], 3),
                "tv game": round(game["tv_end"], 3),
                "tv likelihood": round(sft["tv_end"], 3),
                "tv frozen": round(frozen["tv_end"], 3),
                "judge start": round(before["accuracy"], 3),
                "judge end": round(after["accuracy"], 3),
                "pairs": after["num_pairs"],
                "fell 60 %": game["tv_end"] <= 0.4 * game["tv_start"],
                "near likelihood": game["tv_end"] <= sft["tv_end"] + 0.10,
                "judge fell": before["accuracy"] >= 0.70 and after["accuracy"] <= 0.60 and after["num_pairs"] >= 1000,
                "frozen is worse": frozen["tv_end"] > game["tv_end"],
            }
        )
    good = [
        row["tv start"] >= 0.3 and row["fell 60 %"] and row["near likelihood"] and row["judge fell"] for row in rows
    ]
    return rows, sum(good) >= 4 and sum(row["frozen is worse"] for row in rows) >= 4
