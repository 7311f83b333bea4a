"""A trained distinguisher as a reward of plain TRL, and how little such a reward says of what people write.

    python examples/distinguisher_as_reward.py                   # some minutes on one core, no network
    python examples/distinguisher_as_reward.py Qwen/Qwen3-0.6B   # any causal language model of the Hub, on a GPU
    python examples/distinguisher_as_reward.py --smoke           # hardly any training: a test that it runs

`GRPOTrainer(reward_funcs=Distinguisher.from_pretrained(repo))` is all it takes: no class of ours trains here. The
policy starts as an imitator that learned people's docstrings by likelihood. The reward rises, since the policy finds
what this one distinguisher likes. Whether its law is nearer to people's is another question, which bits per human
answer decide. `AdversarialTrainer` goes on teaching the distinguisher, and holds the imitator to people's answers.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from trl import GRPOConfig, GRPOTrainer

from hf_imitate import (
    AdversarialConfig,
    AdversarialTrainer,
    Distinguisher,
    Imitator,
    RetrodictiveConfig,
    RetrodictiveTrainer,
    load_docstrings,
    split_by_question,
)
from hf_imitate.tiny_base import tiny_base

# TRL's own config asks for a GPU's number format and memory; ours do not, where there is none.
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="Hub id or directory; by default a tiny base trained here")
    parser.add_argument("--output_dir", type=Path, default=Path("distinguisher-as-reward"))
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--smoke", action="store_true", help="two steps, few rows")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.max_steps = 2
    longest = 8 if given.smoke else 24

    dataset = split_by_question(load_docstrings(), test_size=0.1, group_by="completion")
    rows, held_out = (dataset[name].select_columns(["prompt", "completion"]) for name in ("train", "test"))
    rows, held_out = rows.select(range(32 if given.smoke else 4000)), held_out.select(range(6 if given.smoke else 200))
    common: dict[str, Any] = {"per_device_train_batch_size": 16, "save_strategy": "no", "report_to": "none"}
    # A large base is given an adapter; of one of a million parameters all are trained, and faster.
    faster = 1 if given.model else 10

    learned, judged = given.output_dir / "likelihood", given.output_dir / "distinguisher-run"
    imitator = RetrodictiveTrainer(
        model=given.model or str(tiny_base()),
        args=RetrodictiveConfig(
            output_dir=str(learned),
            max_steps=2 if given.smoke else 200,
            learning_rate=faster * 2e-4,
            max_length=256,
            **common,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=16, target_modules="all-linear") if given.model else None,
    )
    imitator.train()
    imitator.save_model()

    # Who wrote it, a person or this imitator? Only the distinguisher learns.
    distinguisher = AdversarialTrainer(
        model=str(learned),
        args=AdversarialConfig(
            output_dir=str(judged),
            freeze_imitator=True,
            max_steps=2 if given.smoke else 20,
            distinguisher_warmup_steps=2 if given.smoke else 80,
            distinguisher_learning_rate=faster * 1e-4,
            max_completion_length=longest,
            **common,
        ),
        train_dataset=rows,
    )
    distinguisher.train()
    distinguisher.save_model()

    # From here on plain TRL. The reward needs questions alone.
    start = AutoPeftModelForCausalLM.from_pretrained(learned, is_trainable=True) if given.model else str(learned)
    policy = GRPOTrainer(
        model=start,
        reward_funcs=Distinguisher.from_pretrained(str(judged)),
        args=GRPOConfig(
            output_dir=str(given.output_dir / "policy"),
            max_steps=given.max_steps,
            learning_rate=faster * 1e-5,
            num_generations=8,
            max_completion_length=longest,
            **({} if torch.cuda.is_available() else ON_CPU),
            logging_steps=1 if given.smoke else 5,
            **common,
        ),
        train_dataset=rows.select_columns(["prompt"]),
        processing_class=imitator.processing_class,
    )
    before = measured(policy, held_out, longest)
    policy.train()
    after = measured(policy, held_out, longest)
    rewards = [log["reward"] for log in policy.state.log_history if "reward" in log]
    show(held_out, rewards, before, after)
    plot(rewards, policy.args.logging_steps, before.bits, after.bits, given.output_dir / "distinguisher_as_reward.png")
    return {"reward": rewards, "bits": [float(before.bits.mean()), float(after.bits.mean())]}


class Measured(NamedTuple):
    """Of held-out questions: bits of each human answer, and one answer of the policy's own to each."""

    bits: np.ndarray
    own: list[str]


def measured(policy: GRPOTrainer, rows: Dataset, longest: int) -> Measured:
    """What people's answers cost the policy, and what it says itself."""
    imitator = Imitator(policy.model.eval(), policy.processing_class, max_new_tokens=2 * longest)
    bits = imitator.log_prob(rows["prompt"][:], rows["completion"][:]).nats.numpy() / -math.log(2)
    return Measured(bits, [answers[0] for answers in imitator.answer(rows["prompt"][:])])


def show(held_out: Dataset, rewards: list[float], before: Measured, after: Measured) -> None:
    """The numbers, and what the policy says."""
    more = after.bits - before.bits
    error = more.std(ddof=1) / math.sqrt(len(more))
    print(f"\nReward (the logit for human): {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last.")
    print(
        f"Bits per held-out human answer: {before.bits.mean():.1f} before, {after.bits.mean():.1f} after; "
        f"{more.mean():+.1f} ± {error:.1f}, where fewer are better."
    )
    print(
        f"Different answers to {len(held_out)} questions: {len(set(before.own))} before, {len(set(after.own))} after."
    )
    told = zip(held_out["prompt"][:3], held_out["completion"], before.own, after.own, strict=False)
    for question, human, own_before, own_after in told:
        print(f"\n{question.strip()}\n  human:  {human}\n  before: {own_before}\n  after:  {own_after}")


def plot(rewards: list[float], every: int, before: np.ndarray, after: np.ndarray, path: Path) -> None:
    """The reward over training, and what each human answer costs before and after."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    left.plot([every * (i + 1) for i in range(len(rewards))], rewards, color="#4878a8")
    left.set_xlabel("step")
    left.set_ylabel("nats")
    left.set_title("reward: logit for human", fontsize=10)
    right.plot(before, after, "o", ms=3, alpha=0.6, color="#c06030")
    ends = [min(before.min(), after.min()), max(before.max(), after.max())]
    right.plot(ends, ends, color="black", lw=0.7, ls="--")
    right.set_xlabel(f"bits before, {before.mean():.1f} in the mean")
    right.set_ylabel(f"bits after, {after.mean():.1f} in the mean")
    right.set_title("each human answer; above the line is worse", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
