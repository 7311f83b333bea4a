"""The demo's latent task: an imitator that thinks before it answers, and what is certain of it.

A world where thinking pays: a check digit is asked for, the sum of five digits modulo six, and few humans wrote down
the running sums by which they came to it.
"""

import dataclasses
import math
import textwrap
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from hf_imitate.estimators import importance_weighted_log_prob
from hf_imitate.imitator import Imitator
from hf_imitate.latent_imitator import LatentImitator, ThoughtAnswer
from hf_imitate.retrodictive_bounds import log_mean_of_weights, mean_log_prob_lower_bound

NUM_DIGITS, MODULUS = 5, 6
NUM_ROWS, NUM_KNOWN, NUM_TEST = 4000, 400, 300
BATCH, NUM_THOUGHTS, NUM_ESTIMATES, RATE = 64, 4, 32, 3e-3
BASE_STEPS, BASE_RATE = 250, 3e-3
KNOWN_STEPS, DREAM_STEPS, ALL_STEPS = 400, 50, 60
# Of the seconds given; the rest is for measuring. On a slow machine each part takes fewer steps.
SHARES = {"base": 0.1, "known": 0.22, "all": 0.38, "plain": 0.15}
CONFIDENCE = 0.95


class Thinking(NamedTuple):
    """What was measured on the test questions, nats per human answer.

    Attributes:
        chance: of an imitator that knows the options alone.
        plain: of the exact trainer's imitator, which does not think.
        latent: of the one that thinks, estimated: a lower bound of its log-probability in the mean.
        bound: its mean nats are at most this, at `CONFIDENCE`, for these answers together.
        effective_sample_size: thoughts that an estimate rests on, of `NUM_ESTIMATES`, mean.
        num_steps: on known thoughts, of dreams, and on all rows.
        plain_steps: of the imitator that does not think.
        examples: a question, the human's answer, and what was thought and answered.
    """

    chance: float
    plain: float
    latent: float
    bound: float
    effective_sample_size: float
    num_steps: tuple[int, int, int]
    plain_steps: int
    examples: list[tuple[str, str, ThoughtAnswer]]


def show(found: Thinking) -> None:
    """Print what was measured, and three questions with what was thought."""
    known, dreams, hidden = found.num_steps
    print(
        textwrap.fill(
            f"Asked for the sum of {NUM_DIGITS} digits modulo {MODULUS}, {NUM_ROWS} humans answered, and {NUM_KNOWN} "
            f"of them wrote down the running sums. An imitator learned from those for {known} steps; then, for "
            f"{hidden}, from all, guessing what the others thought with a retrodictor that had practised on {dreams} "
            f"batches of its dreams. Another learned from the answers alone, without thoughts, for "
            f"{found.plain_steps} steps.",
            110,
        )
    )
    rows = (
        ("any digit (chance)", found.chance, ""),
        ("does not think", found.plain, ""),
        (
            "thinks",
            found.latent,
            f", estimated from {NUM_ESTIMATES} thoughts, which count as {found.effective_sample_size:.0f}",
        ),
        ("thinks, at most", found.bound, f", certified at {CONFIDENCE:.0%} for the mean of these answers"),
    )
    print(f"\nNats per human answer to {NUM_TEST} other questions:")
    for name, nats, told in rows:
        print(f"    {name:20} {nats:.3f}{told}")
    print("\nThree of them, with what it thought before it answered:")
    for question, human, drawn in found.examples:
        print(f"    {question} = {human}   thought: {drawn.thought:10} answer: {drawn.answer.text}")


def think(output_dir: Path, seconds: float, seed: int) -> Thinking:
    """Train an imitator that thinks and one that does not, on the same answers and as many steps; measure both.

    Args:
        output_dir: gets the base, and the thinking imitator as users would save it.
        seconds: time for all of it; what does not fit is left out, step by step.
        seed: of questions, weights and draws.
    """
    rows = human_rows(NUM_ROWS + NUM_TEST, NUM_KNOWN, seed)
    train, test = rows.select(range(NUM_ROWS)), rows.select(range(NUM_ROWS, len(rows)))
    base = str(output_dir / "base")
    _train_base(base, SHARES["base"] * seconds, seed)
    folder, arguments = str(output_dir), (seed, seconds)
    # Known thoughts first: from thoughts at random nothing could be learned.
    known = train.select(range(NUM_KNOWN))
    # No retrodictor yet: it would learn these few thoughts by heart, and dreams teach it better.
    first = _latent(folder, base, known, KNOWN_STEPS, 0, "known", *arguments, estimator="prior")
    num_known = first.state.global_step
    num_dreams = max(1, DREAM_STEPS * num_known // KNOWN_STEPS)
    latent = _latent(folder, first.model, train, ALL_STEPS, num_dreams, "all", *arguments)
    num_dreams = min(num_dreams, latent.state.global_step)
    num_steps = (num_known, num_dreams, latent.state.global_step - num_dreams)
    latent.save_model()
    plain = _plain(folder, base, train.remove_columns("thought"), sum(num_steps), *arguments)
    return _measure(output_dir, plain, test, num_steps, seed)


def _measure(output_dir: Path, plain: Any, test: Dataset, num_steps: tuple[int, int, int], seed: int) -> Thinking:
    questions, humans = test["prompt"][:], test["completion"][:]
    imitator = Imitator.from_pretrained(str(output_dir), device="cpu")
    # As many thoughts in hindsight as without it, since a retrodictor this young misses some. Every draw counts, and
    # models and seed were fixed before: the mean weight is then unbiased, and the bound needs nothing else.
    latent = imitator.latent
    if latent is None:
        raise RuntimeError("What was saved does not think before it answers.")
    foresight = LatentImitator(
        dataclasses.replace(latent.thinkers, retrodictor=None), latent.renderer, latent.max_answer_tokens
    )
    log_weights = torch.cat(
        [
            one.log_prob(
                questions, humans, seed=own_seed, num_estimates=NUM_ESTIMATES // 2, batch_size=512
            ).log_weights
            for one, own_seed in ((latent, seed), (foresight, seed + 1))
        ],
        dim=1,
    )
    found = importance_weighted_log_prob(log_weights, torch.zeros_like(log_weights))
    bound = mean_log_prob_lower_bound(log_mean_of_weights(log_weights.numpy()), CONFIDENCE)[-1]
    unthinking = Imitator(plain.model.eval(), tokenizer(), max_new_tokens=2)
    answered = latent.answer(questions[:3], seed=seed)
    return Thinking(
        chance=math.log(MODULUS),
        plain=-unthinking.log_prob(questions, humans, batch_size=256).nats.mean().item(),
        latent=-found.log_prob.mean().item(),
        bound=-float(bound),
        effective_sample_size=found.effective_sample_size.mean().item(),
        num_steps=num_steps,
        plain_steps=plain.state.global_step,
        examples=[(q, h, drawn[0]) for q, h, drawn in zip(questions, humans, answered, strict=False)],
    )


# --- the world


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit; the model has one more row of embeddings, which closes thoughts."""
    names = [*map(str, range(MODULUS)), "<end>", "<pad>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def human_rows(num_rows: int, num_known: int, seed: int) -> Dataset:
    """Rows of different questions; the first `num_known` of them have the human's thought."""
    numbers = np.random.default_rng(seed).choice(MODULUS**NUM_DIGITS, num_rows, replace=False)
    digits = numbers[:, None] // MODULUS ** np.arange(NUM_DIGITS) % MODULUS
    sums = digits.cumsum(axis=1) % MODULUS
    thoughts = _spelled(sums)
    return Dataset.from_dict(
        {
            "prompt": _spelled(digits),
            "completion": [str(row[-1]) for row in sums],
            "thought": [text if i < num_known else None for i, text in enumerate(thoughts)],
        }
    )


def _spelled(digits: np.ndarray) -> list[str]:
    return [" ".join(map(str, row)) for row in digits]


def _train_base(path: str, seconds: float, seed: int) -> None:
    """Save a model of some 50 000 parameters that has read digits said three times, and knows no sum."""
    began = time.perf_counter()
    config = Qwen3Config(
        vocab_size=len(tokenizer()) + 1,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, BASE_STEPS)
    generator = torch.Generator().manual_seed(seed)
    end = torch.full((BATCH, 1), tokenizer().eos_token_id)
    for step in range(BASE_STEPS):
        digits, other = (torch.randint(0, MODULUS, (BATCH, n), generator=generator) for n in (NUM_DIGITS, 1))
        between = [other, end] if step % 2 else []
        ids = torch.cat([digits, *between, digits, digits, end], dim=1)
        start = ids.shape[1] - 2 * NUM_DIGITS - 1
        logits = model(input_ids=ids).logits[:, start - 1 : -1]
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, start:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if time.perf_counter() - began > seconds:
            break
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)


# --- the trainers


def _latent(
    folder: str,
    model: Any,
    rows: Dataset,
    num_steps: int,
    num_dreams: int,
    part: str,
    seed: int,
    seconds: float,
    estimator: str = "rws",
) -> Any:
    from hf_imitate.trainers.latent_retrodictive_config import LatentRetrodictiveConfig
    from hf_imitate.trainers.latent_retrodictive_trainer import LatentRetrodictiveTrainer

    args = LatentRetrodictiveConfig(
        **_settings(folder, num_steps, seed),
        num_thoughts=NUM_THOUGHTS,
        max_thought_length=NUM_DIGITS,
        retrodictor_warmup_steps=num_dreams,
        estimator=estimator,
    )
    trainer = LatentRetrodictiveTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=_lora() if isinstance(model, str) else None,
    )
    return _trained(trainer, SHARES[part] * seconds)


def _plain(folder: str, model: str, rows: Dataset, num_steps: int, seed: int, seconds: float) -> Any:
    from hf_imitate.trainers.retrodictive_config import RetrodictiveConfig
    from hf_imitate.trainers.retrodictive_trainer import RetrodictiveTrainer

    trainer = RetrodictiveTrainer(
        model=model,
        args=RetrodictiveConfig(**_settings(folder, num_steps, seed)),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=_lora(),
    )
    return _trained(trainer, SHARES["plain"] * seconds)


def _settings(folder: str, num_steps: int, seed: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "seed": seed,
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _lora() -> LoraConfig:
    return LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", lora_dropout=0.0)


def _trained(trainer: Any, seconds: float) -> Any:
    trainer.add_callback(_Deadline(time.perf_counter() + seconds))
    with redirect_stdout(StringIO()):  # of what transformers prints without a bar
        trainer.train()
    return trainer


class _Deadline(TrainerCallback):
    """Ends a training that runs late; the rate is constant, so that any step may be the last."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.perf_counter() > self.deadline
