"""Small runs of the three trainers that visit every phase and save every step; imports torch and TRL."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate.trainers import (
    AdversarialConfig,
    AdversarialTrainer,
    LatentRetrodictiveConfig,
    LatentRetrodictiveTrainer,
    RetrodictiveConfig,
    RetrodictiveTrainer,
)

KINDS = ("adversarial", "retrodictive", "latent")
# Steps of each run, warm-ups included.
STEPS = {"adversarial": 8, "retrodictive": 8, "latent": 7}
CLOCK = ("runtime", "per_second", "step_time")
_TRAINERS = {
    "adversarial": (AdversarialTrainer, AdversarialConfig),
    "retrodictive": (RetrodictiveTrainer, RetrodictiveConfig),
    "latent": (LatentRetrodictiveTrainer, LatentRetrodictiveConfig),
}


def save_base(folder: Path, width: int = 32, layers: int = 2) -> Path:
    """A random Qwen3 with a byte-level tokenizer of 300 ids; seed 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<pad>", *(f"<free_{i}>" for i in range(8))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["Return the number of items.", "Set the name of the file."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def rows(number: int = 24) -> Dataset:
    """Questions that differ, and two answers in turn."""
    return Dataset.from_dict(
        {"prompt": [f"Item {i}:" for i in range(number)], "completion": [("abc", "de")[i % 2] for i in range(number)]}
    )


def is_short(completions: list[str], **columns: list) -> list[bool]:
    """A check."""
    return [len(text) < 4 for text in completions]


def make(kind: str, folder: Path, base: Path, **changes: Any) -> Any:
    """A trainer that saves every step and keeps two checkpoints.

    The adversarial one goes through both warm-ups, and one generation batch serves four steps of its game; the latent
    one warms its retrodictor up; the exact one accumulates and draws dropout. All log every third step.
    """
    own: dict[str, dict[str, Any]] = {
        "adversarial": {
            **{"imitator_warmup_steps": 1, "distinguisher_warmup_steps": 2, "distinguisher_lm_warmup_steps": 0},
            **{"max_steps": 5, "steps_per_generation": 2, "num_iterations": 2, "num_generations": 4},
            **{"max_completion_length": 6, "heldout_fraction": 0.25, "retrodictive_budget": 1.0},
            **{"imitator_warmup_learning_rate": 1e-2, "per_device_train_batch_size": 4},
        },
        "retrodictive": {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "latent": {
            **{"max_steps": 5, "retrodictor_warmup_steps": 2, "num_thoughts": 2, "max_thought_length": 3},
            **{"per_device_train_batch_size": 2},
        },
    }
    settings: dict[str, Any] = {
        **{"output_dir": str(folder), "learning_rate": 1e-3, "lr_scheduler_type": "linear", "logging_steps": 3},
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "report_to": "none"},
        **{"disable_tqdm": True, "use_cpu": True, **own[kind], **changes},
    }
    trainer, config = _TRAINERS[kind]
    eval_dataset = settings.pop("eval_dataset", None)
    dropout = 0.1 if kind == "retrodictive" else 0.0
    arguments = {"checks": [is_short]} if kind == "adversarial" else {}
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer(
            model=str(base),
            args=config(**settings),
            train_dataset=rows(),
            eval_dataset=eval_dataset,
            peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"),
            **arguments,
        )


def train(trainer: Any, resume: bool | str | None = None) -> None:
    """Train quietly."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume)


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """Every number that was logged up to a checkpoint and is not a time."""
    entries = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [{name: entry[name] for name in entry if not name.endswith(CLOCK)} for entry in entries]
