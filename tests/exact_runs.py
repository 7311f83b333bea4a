"""Exact retrodictive runs that take a second: eight rows, four answers, the tiny model of conftest.py."""

from pathlib import Path

import torch
from tiny_runs import lora, rows, train
from trl import SFTConfig, SFTTrainer

from hf_imitate import RetrodictiveConfig, RetrodictiveTrainer

ANSWERS = ("abc", "de", "fghij klé", "m")  # of different numbers of tokens and bytes
END = 0  # the tiny model's


def settings(folder, kind=RetrodictiveConfig, **changes):
    """One step on eight rows in their order, by plain gradient descent."""
    plain = {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
    }
    return kind(**{**plain, **changes})


def make(folder, model, dataset=None, adapter=False, arguments=None, **changes):
    """A trainer of all weights, or of an adapter; `arguments` go to it, `changes` to its settings."""
    given = {"train_dataset": rows(8, ANSWERS) if dataset is None else dataset, **(arguments or {})}
    if adapter:
        given["peft_config"] = lora()
    return RetrodictiveTrainer(
        model=str(model) if isinstance(model, Path) else model, args=settings(folder, **changes), **given
    )


def run(*args, **kwargs):
    """A trainer that has trained."""
    trainer = make(*args, **kwargs)
    train(trainer)
    return trainer


def nats_by_hand(model, tokenizer, dataset, ends=True, most=None):
    """Minus log p of every answer, from plain logits in fp64, one row at a time."""
    nats = []
    for row in dataset:
        question, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        ids = (question + answer + [tokenizer.eos_token_id] * ends)[:most]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        nats.append(-sum(log_p[t - 1, ids[t]].item() for t in range(len(question), len(ids))))
    return nats


def sft(folder, model, dataset, **changes):
    """TRL's own trainer under the same settings."""
    args = settings(folder, kind=SFTConfig, gradient_checkpointing=False, dataloader_pin_memory=False, **changes)
    trainer = SFTTrainer(str(model), args=args, train_dataset=dataset)
    train(trainer)
    return trainer


def scored_text(trainer, number=0):
    """The text before the answer, and that of the answer, special tokens shown."""
    row = trainer.train_dataset[number]
    start = row["labels"].count(-100)
    assert row["labels"][start:] == row["input_ids"][start:]
    return tuple(trainer._tokenizer.decode(part) for part in (row["input_ids"][:start], row["input_ids"][start:]))
