"""Imitate the people who document Python: a function's signature in, the first line of its docstring out. Real text.

    python examples/docstrings.py                            # likelihood; a tiny base, trained here, no network
    python examples/docstrings.py --objective adversarial    # likelihood, then the game against a distinguisher
    python examples/docstrings.py --objective latent         # with a hidden thought before each answer
    python examples/docstrings.py Qwen/Qwen3-0.6B            # any causal language model of the Hub, on a GPU
    python examples/docstrings.py --smoke                    # hardly any training: a test that it runs

The same from the shell: `hf-imitate retrodictive --config examples/retrodictive.yaml`, and so for the others. Each
trainer takes the same rows. What they state of held-out docstrings is printed in bits, before training and after.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from datasets import DatasetDict
from peft import LoraConfig

from hf_imitate import (
    AdversarialConfig,
    AdversarialTrainer,
    Imitator,
    LatentRetrodictiveConfig,
    LatentRetrodictiveTrainer,
    RetrodictiveConfig,
    RetrodictiveTrainer,
    load_docstrings,
    split_by_question,
)
from hf_imitate.tiny_base import tiny_base


def ends_with_a_period(prompts, completions, **columns):
    """Pass an answer that ends like a sentence.

    A check is what a distinguisher can *verify*. It need not be right: people, too, pass it only sometimes, and the
    distinguisher learns how much a passed check tells about who wrote the answer.
    """
    return [completion.rstrip().endswith(".") for completion in completions]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="Hub id or directory; by default a tiny base trained here")
    parser.add_argument("--objective", choices=OBJECTIVES, default="retrodictive")
    parser.add_argument("--output_dir", default="docstring-imitator")
    parser.add_argument("--max_steps", type=int, default=200, help="warm-ups come before them")
    parser.add_argument("--smoke", action="store_true", help="two steps, few rows")
    given = parser.parse_args(arguments)

    # Many functions share a first line: grouped by answer, no held-out answer was seen in training.
    dataset = split_by_question(load_docstrings(), test_size=0.1, group_by="completion")
    dataset = dataset.select_columns(["prompt", "completion"])
    if given.smoke:
        given.max_steps, dataset["train"] = 2, dataset["train"].select(range(32))
    held_out = dataset["test"].select(range(3 if given.smoke else 200))
    questions, humans = held_out["prompt"][:], held_out["completion"][:]

    base = given.model or str(tiny_base())
    before = Imitator.from_pretrained(base).log_prob(questions, humans).nats.numpy() / -math.log(2)
    trainer = OBJECTIVES[given.objective](base, dataset, given)
    trainer.train()
    trainer.save_model()
    # trainer.push_to_hub() would publish the folder: privately, unless the config says otherwise.

    imitator = Imitator.from_pretrained(given.output_dir)
    after = imitator.log_prob(questions, humans).nats.numpy() / -math.log(2)
    for question, human, own, bits in zip(
        questions[:5], humans, imitator.answer(questions[:5], 2), after, strict=False
    ):
        print(
            f"\n{question.strip()}\n  human:    {human} ({bits:.1f} bits)\n  imitator: {own[0]}\n            {own[1]}"
        )
    told = "at most about " if given.objective == "latent" else ""
    print(f"\nBits per held-out answer: {before.mean():.1f} before, {told}{after.mean():.1f} after.")
    figure = Path(given.output_dir) / "docstrings.png"
    plot(before, after, figure)
    print(f"The picture is in {figure}.")
    return {"before": float(before.mean()), "after": float(after.mean())}


def common(given: argparse.Namespace) -> dict[str, Any]:
    """Settings that every trainer shares."""
    return {
        "output_dir": given.output_dir,
        "max_steps": given.max_steps,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "report_to": "none",
    }


def adapter(given: argparse.Namespace) -> LoraConfig | None:
    """For a large base. One of a million parameters has its say in its embeddings: all of its weights are trained, at
    rates that would be too high for a large one."""
    return LoraConfig(r=16, target_modules="all-linear") if given.model else None


def retrodictive(base: str, dataset: DatasetDict, given: argparse.Namespace) -> RetrodictiveTrainer:
    """The log-probability of what people wrote."""
    return RetrodictiveTrainer(
        model=base,
        args=RetrodictiveConfig(
            **common(given),
            max_length=256,
            learning_rate=2e-4 if given.model else 2e-3,
        ),
        train_dataset=dataset["train"],
        peft_config=adapter(given),
    )


def adversarial(base: str, dataset: DatasetDict, given: argparse.Namespace) -> AdversarialTrainer:
    """The same as a warm-up, then the game against a distinguisher that has a check."""
    return AdversarialTrainer(
        model=base,
        args=AdversarialConfig(
            **common(given),
            imitator_warmup_learning_rate=2e-4 if given.model else 2e-3,
            learning_rate=2e-5 if given.model else 1e-4,
            imitator_warmup_steps=2 if given.smoke else "auto",
            distinguisher_warmup_steps=2 if given.smoke else "auto",
            num_generations=8,
            max_completion_length=8 if given.smoke else 48,
        ),
        train_dataset=dataset["train"],
        peft_config=adapter(given),
        checks=[ends_with_a_period],
    )


def latent(base: str, dataset: DatasetDict, given: argparse.Namespace) -> LatentRetrodictiveTrainer:
    """Through hidden thoughts. Where people wrote down theirs, a column `thought` would hold it; here nobody did."""
    return LatentRetrodictiveTrainer(
        model=base,
        args=LatentRetrodictiveConfig(
            **common(given) | {"per_device_train_batch_size": 2 if given.smoke else 8},
            learning_rate=1e-4 if given.model else 1e-3,
            retrodictor_warmup_steps=1 if given.smoke else "auto",
            num_thoughts=2 if given.smoke else 4,
            max_thought_length=2 if given.smoke else 64 if given.model else 8,
            max_length=160,
        ),
        train_dataset=dataset["train"],
        peft_config=adapter(given),
    )


OBJECTIVES = {"retrodictive": retrodictive, "adversarial": adversarial, "latent": latent}


def plot(before: np.ndarray, after: np.ndarray, path: Path) -> None:
    """Each held-out docstring: bits under the base, and under the imitator."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.2, 4), layout="constrained")
    axes.plot(before, after, "o", ms=3, alpha=0.6, color="#4878a8")
    most = max(before.max(), after.max())
    axes.plot([0, most], [0, most], color="black", lw=0.7, ls="--")
    axes.set_xlabel("bits of a human's docstring under the base")
    axes.set_ylabel("bits under the imitator")
    axes.set_title("held-out docstrings; below the line is better", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
