"""A trained distinguisher as a reward of plain TRL, and how little such a reward says of what people write.

    python examples/distinguisher_as_reward.py                   # some minutes on one core, no network
    python examples/distinguisher_as_reward.py Qwen/Qwen3-0.6B   # any causal language model of the Hub, on a GPU
    python examples/distinguisher_as_reward.py --smoke           # hardly any training: a test that it runs

`GRPOTrainer(reward_funcs=Distinguisher.from_pretrained(repo))` is all it takes: no class of ours trains here. The
reward rises, since the policy finds what this one distinguisher likes. Whether its law is nearer to the humans' is
another question, answered by bits per human answer: a logit that rises by more than a nat can leave them where they
were. `AdversarialTrainer` goes on teaching the distinguisher, and holds the imitator to the humans' answers.
"""

import argparse
import math
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from hf_imitate import (
    AdversarialConfig,
    AdversarialTrainer,
    Distinguisher,
    Imitator,
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
    rows, held_out = rows.select(range(32 if given.smoke else 4000)), held_out.select(range(6 if given.smoke else 100))
    model = given.model or str(tiny_base())

    # Who wrote it, a person or this model? Only the distinguisher learns.
    judged = given.output_dir / "distinguisher-run"
    trainer = AdversarialTrainer(
        model=model,
        args=AdversarialConfig(
            output_dir=str(judged),
            freeze_imitator=True,
            max_steps=2 if given.smoke else 20,
            distinguisher_warmup_steps=2 if given.smoke else 60,
            distinguisher_learning_rate=1e-3,
            per_device_train_batch_size=16,
            max_completion_length=longest,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()

    # From here on plain TRL. The reward needs questions alone.
    policy = GRPOTrainer(
        model=model,
        reward_funcs=Distinguisher.from_pretrained(str(judged)),
        args=GRPOConfig(
            output_dir=str(given.output_dir / "policy"),
            max_steps=given.max_steps,
            learning_rate=1e-4 if given.model else 1e-3,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=longest,
            **({} if torch.cuda.is_available() else ON_CPU),
            logging_steps=1 if given.smoke else 5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows.select_columns(["prompt"]),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    before = bits(policy, held_out, longest)
    policy.train()
    after = bits(policy, held_out, longest)
    rewards = [log["reward"] for log in policy.state.log_history if "reward" in log]
    print(f"\nReward (the logit for human): {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last.")
    print(f"Bits per held-out human answer: {before:.1f} before, {after:.1f} after; fewer are better.")
    own = Imitator(policy.model.eval(), policy.processing_class, max_new_tokens=longest)
    for question, human, answers in zip(
        held_out["prompt"][:3], held_out["completion"], own.answer(held_out["prompt"][:3]), strict=False
    ):
        print(f"\n{question.strip()}\n  human:  {human}\n  policy: {answers[0]}")
    plot(rewards, policy.args.logging_steps, before, after, given.output_dir / "distinguisher_as_reward.png")
    return {"reward": rewards, "bits": [before, after]}


def bits(policy: GRPOTrainer, rows: Dataset, longest: int) -> float:
    """Mean bits of the humans' answers under the policy."""
    imitator = Imitator(policy.model.eval(), policy.processing_class, max_new_tokens=longest)
    return -imitator.log_prob(rows["prompt"][:], rows["completion"][:]).nats.mean().item() / math.log(2)


def plot(rewards: list[float], every: int, before: float, after: float, path: Path) -> None:
    """The reward over training, and what the humans' answers cost before and after."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    left.plot([every * (i + 1) for i in range(len(rewards))], rewards, color="#4878a8")
    left.set_xlabel("step")
    left.set_title("reward: logit for human", fontsize=10)
    right.bar(["before", "after"], [before, after], width=0.5, color=["#888888", "#c06030"])
    right.set_title("bits per human answer (fewer: better)", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
