"""The trainers whose steps are compared: ours and TRL's, on one model, the same rows, batches and numbers of steps."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.worlds import speed as world
from hf_imitate import AdversarialConfig, AdversarialTrainer, RetrodictiveConfig, RetrodictiveTrainer
from hf_imitate.classifier import classifier_around

BATCH, GENERATIONS, MAX_NEW_TOKENS = 16, 8, 32
# So small that imitators stay alike and draw alike, whoever pays them: what is compared is what a step costs.
LEARNING_RATE = 1e-6
EQUAL = {"bf16": False, "gradient_checkpointing": False}  # fp32, nothing computed twice

Maker = Callable[[], Trainer]


def lora() -> LoraConfig:
    """The adapter of every trainer."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)


def settings(steps: int, **more: Any) -> dict[str, Any]:
    """What all trainers are given."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="speed-"),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **more,
    }


def grpo(base: Path, rows: Dataset, steps: int, **more: Any) -> Maker:
    """GRPO paid by a frozen reward model of the imitator's size."""

    def make() -> Trainer:
        model, tokenizer = world.load(base)
        judge = classifier_around(model, copy_body=True).requires_grad_(False).eval()
        game = {"num_generations": GENERATIONS, "max_completion_length": MAX_NEW_TOKENS, "loss_type": "dr_grpo"}
        args = GRPOConfig(**settings(steps, **(game | more)))
        tokenizer.padding_side = "left"
        return GRPOTrainer(
            model,
            [judge],
            args=args,
            train_dataset=rows.select_columns(["prompt"]),
            processing_class=tokenizer,
            reward_processing_classes=[world.load(base)[1]],
            peft_config=lora(),
        )

    return make


def adversarial(base: Path, rows: Dataset, steps: int, **more: Any) -> Maker:
    """Our game without warm-ups: its distinguisher is a second adapter on the imitator's base."""

    def make() -> Trainer:
        model, tokenizer = world.load(base)
        game = {"num_generations": GENERATIONS, "max_completion_length": MAX_NEW_TOKENS}
        warmups = {"imitator_warmup_steps": 0, "distinguisher_warmup_steps": 0}
        args = AdversarialConfig(**settings(steps, **(game | warmups | more)))
        return AdversarialTrainer(model, args, rows, processing_class=tokenizer, peft_config=lora())

    return make


def sft(base: Path, rows: Dataset, steps: int, **more: Any) -> Maker:
    """TRL's likelihood of the answers."""

    def make() -> Trainer:
        model, tokenizer = world.load(base)
        args = SFTConfig(**settings(steps, **more))
        return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora())

    return make


def retrodictive(base: Path, rows: Dataset, steps: int, **more: Any) -> Maker:
    """Ours."""

    def make() -> Trainer:
        model, tokenizer = world.load(base)
        args = RetrodictiveConfig(**settings(steps, **more))
        return RetrodictiveTrainer(model, args, rows, processing_class=tokenizer, peft_config=lora())

    return make


def reward(base: Path, rows: Dataset, steps: int, **more: Any) -> Maker:
    """TRL's reward model, on as many pairs as our distinguisher reads."""

    def make() -> Trainer:
        model, tokenizer = world.load(base)
        judge = classifier_around(model, copy_body=True)
        args = RewardConfig(**settings(steps, **({"per_device_train_batch_size": BATCH // 2} | more)))
        peft_config = lora()
        peft_config.task_type, peft_config.modules_to_save = "SEQ_CLS", ["score"]
        return RewardTrainer(judge, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)

    return make


def quietly() -> None:
    """Switch off what trainers say of themselves."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "trl", "accelerate", "hf_imitate", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
