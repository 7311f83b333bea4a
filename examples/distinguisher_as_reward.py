"""A trained distinguisher as a reward of plain TRL, and how little such a reward says of what people write.

    python examples/distinguisher_as_reward.py                   # some minutes on one core, no network
    python examples/distinguisher_as_reward.py Qwen/Qwen3-0.6B   # any causal language model of the Hub, on a GPU
    python examples/distinguisher_as_reward.py --smoke           # hardly any training: a test that it runs

`GRPOTrainer(reward_funcs=Distinguisher.from_pretrained(repo))` is all it takes: no class of ours trains here. The
reward rises, since the policy finds what this one distinguisher likes, until that one is fooled. Whether its law is
nearer to the humans' is another question. Two audits answer it: a judge that is trained afresh on the new answers, and
the bits of human answers. `AdversarialTrainer` goes on teaching the distinguisher, and holds the imitator to them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from hf_imitate import (
    AdversarialConfig,
    AdversarialTrainer,
    AuditReport,
    Distinguisher,
    Imitator,
    RetrodictiveConfig,
    RetrodictiveTrainer,
    audit,
    load_docstrings,
    split_by_question,
)
from hf_imitate.tiny_base import tiny_base

# TRL's own config asks for a GPU's number format and memory; ours do not, where there is none.
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}


JUDGES = {"the_one_that_pays": "the one\nthat pays", "ngram": "fresh judge\n(n-grams)"}  # and how they are called


def main(arguments: list[str] | None = None) -> tuple[list[float], dict[str, AuditReport]]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="Hub id or directory; by default a tiny base trained here")
    parser.add_argument("--output_dir", type=Path, default=Path("distinguisher-as-reward"))
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--smoke", action="store_true", help="two steps, few rows")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.max_steps = 2
    longest = 80 if given.smoke else 40  # the smallest bases read bytes

    dataset = split_by_question(load_docstrings(), test_size=0.2, group_by="completion")
    rows, held_out = (dataset[name].select_columns(["prompt", "completion"]) for name in ("train", "test"))
    rows, held_out = (
        rows.select(range(32 if given.smoke else 4000)),
        held_out.select(range(48 if given.smoke else 600)),
    )
    common = {"save_strategy": "no", "report_to": "none"}

    # Fine-tuning first: a base that was not tells itself by its form.
    tuned = RetrodictiveTrainer(
        model=given.model or str(tiny_base()),
        args=RetrodictiveConfig(
            output_dir=str(given.output_dir / "fine-tuning"),
            max_steps=2 if given.smoke else 200,
            learning_rate=2e-4 if given.model else 2e-3,
            per_device_train_batch_size=16,
            **common,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=16, target_modules="all-linear") if given.model else None,
    )
    tuned.train()
    model = str(given.output_dir / "fine-tuned")
    (tuned.model.merge_and_unload() if given.model else tuned.model).save_pretrained(model)
    tuned.processing_class.save_pretrained(model)

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
            **common,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()

    # From here on plain TRL. The reward needs questions alone.
    distinguisher = Distinguisher.from_pretrained(str(judged))
    policy = GRPOTrainer(
        model=model,
        reward_funcs=distinguisher,
        args=GRPOConfig(
            output_dir=str(given.output_dir / "policy"),
            max_steps=given.max_steps,
            learning_rate=1e-4 if given.model else 1e-3,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=longest,
            **({} if torch.cuda.is_available() else ON_CPU),
            logging_steps=1 if given.smoke else 5,
            **common,
        ),
        train_dataset=rows.select_columns(["prompt"]),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )

    def the_one_that_pays(train, valid, seed):
        """A judge as it is: it learns nothing from these pairs."""
        return distinguisher.score

    def audited(name: str) -> AuditReport:
        imitator = Imitator(policy.model.eval(), policy.processing_class, max_new_tokens=longest)
        judges = [the_one_that_pays, "ngram"]
        return audit(imitator, held_out, judges=judges, output_dir=given.output_dir / name)

    reports = {"before": audited("before")}
    policy.train()
    reports["after"] = audited("after")
    rewards = [log["reward"] for log in policy.state.log_history if "reward" in log]
    show(rewards, reports)
    own = Imitator(policy.model.eval(), policy.processing_class, max_new_tokens=longest)
    for question, human, answers in zip(
        held_out["prompt"][:3], held_out["completion"], own.answer(held_out["prompt"][:3]), strict=False
    ):
        print(f"\n{question.strip()}\n  human:  {human}\n  policy: {answers[0]}")
    plot(rewards, policy.args.logging_steps, reports, given.output_dir / "distinguisher_as_reward.png")
    return rewards, reports


def show(rewards: list[float], reports: dict[str, AuditReport]) -> None:
    """The reward, who still tells, and the bits."""
    print(f"\nReward (the logit for human): {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last.")
    for name, label in JUDGES.items():
        found = (interval(report[f"paired_accuracy/{name}"], 3) for report in reports.values())
        print(f"Right in so many pairs, {' '.join(label.split())}: {' before, '.join(found)} after.")
    found = (interval(report["bits_per_answer"], 1) for report in reports.values())
    print(f"Bits per held-out human answer: {' before, '.join(found)} after; fewer are better.")


def interval(finding, digits: int) -> str:
    low, high = finding.interval
    return f"{finding.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def plot(rewards: list[float], every: int, reports: dict[str, AuditReport], path: Path) -> None:
    """The reward over training; the pairs in which each judge is right, and the humans' bits, before and after."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 2.9), layout="constrained", width_ratios=(3, 3, 1.6))
    panels[0].plot([every * (i + 1) for i in range(len(rewards))], rewards, color="#4878a8")
    panels[0].set_xlabel("step")
    panels[0].set_title("reward: logit for human", fontsize=10)
    for shift, (time, report), colour in zip((-0.1, 0.1), reports.items(), ("#888888", "#c06030"), strict=True):
        for axes, names in (
            (panels[1], [f"paired_accuracy/{name}" for name in JUDGES]),
            (panels[2], ["bits_per_answer"]),
        ):
            found = [report[name] for name in names]
            centre = np.array([finding.value for finding in found])
            ends = np.abs(np.array([finding.interval for finding in found]).T - centre)
            places = np.arange(len(found)) + shift
            axes.errorbar(places, centre, yerr=ends, fmt="o", ms=4, capsize=3, color=colour, label=time)
    panels[1].axhline(0.5, color="black", lw=0.7, ls="--")
    panels[1].set_xticks(range(len(JUDGES)), list(JUDGES.values()))
    panels[1].set_xlim(-0.5, len(JUDGES) - 0.5)
    panels[1].set_title("right in so many pairs (dashed: chance)", fontsize=10)
    panels[1].legend(fontsize=8)
    panels[2].set_xticks([-0.1, 0.1], list(reports))
    panels[2].set_xlim(-0.4, 0.4)
    panels[2].set_title("bits per human answer", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
