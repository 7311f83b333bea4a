"""Put what a distinguisher knows into the imitator's weights: pick one of eight answers, learn those, repeat.

    python examples/distil.py                        # a tiny base, trained here in minutes, without the network
    python examples/distil.py --distinguisher ngram  # a distinguisher of another kind than the imitator
    python examples/distil.py Qwen/Qwen3-0.6B --distinguisher Qwen/Qwen3-1.7B       # a larger one, on a GPU

One round is three public parts. `AdversarialTrainer(freeze_imitator=True)` fits a distinguisher to an imitator that
stands still; `answer(resample=8)` keeps one answer of eight by it; `RetrodictiveTrainer` learns what was kept beside
the human's own answers. What is saved in the end is the last imitator with a distinguisher of its own, fitted to it
afresh: the old one knows the faults of an imitator that is no more.

Picking needs no human answers, so questions that nobody answered can join (`questions` below). What a round keeps of
the gain is measured, not promised: an imitator that is too small for the law of the humans was at its optimum before.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, concatenate_datasets
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoTokenizer

from hf_imitate import (
    AdversarialConfig,
    AdversarialTrainer,
    Imitator,
    RetrodictiveConfig,
    RetrodictiveTrainer,
    load_docstrings,
    split_by_question,
)
from hf_imitate.tiny_base import tiny_base

CANDIDATES = 8
LONGEST = 48


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="Hub id or directory; by default a tiny base trained here")
    parser.add_argument("--output_dir", default="distilled-imitator")
    parser.add_argument("--distinguisher", help="Hub id, directory or 'ngram'; by default on the imitator's own base")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=200, help="steps of likelihood in each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="little training, few rows: a test that it runs")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.max_steps = min(given.max_steps, 6)

    # Many functions share a first line: grouped by answer, no held-out answer was seen in training.
    dataset = split_by_question(load_docstrings(), test_size=0.1, group_by="completion")
    rows, held_out = (dataset[name].select_columns(["prompt", "completion"]) for name in ("train", "test"))
    rows, held_out = rows.select(range(64 if given.smoke else 2000)), held_out.select(range(8 if given.smoke else 200))
    questions = rows["prompt"][:]

    folder = Path(given.output_dir)
    model = given.model or str(tiny_base())
    likelihood(model, rows, folder / "round-0", given, LoraConfig(r=16, target_modules="all-linear"))
    measured = []
    for number in range(given.rounds + 1):
        last, judged = folder / f"round-{number}", folder / f"residual-{number}"
        discriminate(last, rows, judged, given)
        measured.append(bits(judged, held_out, given.seed))
        print(
            "Round {}: {plain:.2f} bits per held-out answer, {picked:.2f} with one of 8.".format(
                number, **measured[-1]
            )
        )
        if number < given.rounds:
            both = concatenate_datasets([rows, picked(judged, questions, given.seed + number)])
            likelihood(resumed(last), both, folder / f"round-{number + 1}", given)
    plot(measured, folder / "distil.png")
    print(f"The picture is in {folder / 'distil.png'}.")
    gain = measured[0]["plain"] - measured[0]["picked"]
    kept = measured[0]["plain"] - measured[1]["plain"] if given.rounds else 0.0
    print(f"One of 8 gains {gain:.2f} bits. A round of distillation moves {kept:.2f} bits into the weights.")
    return measured


def resumed(folder: Path) -> Any:
    """The adapter saved there, on its base, ready to learn more."""
    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, trust_remote_code=False)


def likelihood(
    model: Any, rows: Dataset, folder: Path, given: argparse.Namespace, peft_config: LoraConfig | None = None
) -> None:
    """Learn these answers."""
    trainer = RetrodictiveTrainer(
        model=model,
        args=RetrodictiveConfig(
            output_dir=str(folder),
            max_steps=given.max_steps,
            per_device_train_batch_size=16,
            max_length=256,
            # A base of a million parameters takes ten times the rate that suits a large one.
            learning_rate=2e-4 if given.model else 2e-3,
            save_strategy="no",
            report_to="none",
            seed=given.seed,
        ),
        train_dataset=rows,
        processing_class=None
        if isinstance(model, str)
        else AutoTokenizer.from_pretrained(folder.parent / "round-0", trust_remote_code=False),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()


def discriminate(imitator: Path, rows: Dataset, folder: Path, given: argparse.Namespace) -> None:
    """Fit a distinguisher to an imitator that stands still, and save both."""
    trainer = AdversarialTrainer(
        model=resumed(imitator),
        args=AdversarialConfig(
            output_dir=str(folder),
            freeze_imitator=True,
            max_steps=2 if given.smoke else 100,
            distinguisher_warmup_steps=2 if given.smoke else "auto",
            distinguisher_lm_warmup_steps=2 if given.smoke and given.distinguisher not in (None, "ngram") else "auto",
            per_device_train_batch_size=16,
            max_completion_length=8 if given.smoke else LONGEST,
            heldout_fraction=0.1,
            save_strategy="no",
            report_to="none",
            seed=given.seed,
        ),
        train_dataset=rows,
        distinguisher=given.distinguisher,
        processing_class=AutoTokenizer.from_pretrained(imitator, trust_remote_code=False),
    )
    trainer.train()
    trainer.save_model()


def picked(imitator: Path, questions: list[str], seed: int) -> Dataset:
    """One answer to each question, kept out of eight; without those that no tokenizer spells, or that say nothing."""
    drawn = Imitator.from_pretrained(imitator).answer(questions, seed=seed, resample=CANDIDATES)
    pairs = [
        (question, own[0])
        for question, own in zip(questions, drawn, strict=True)
        if own[0].strip() and "\x00" not in own[0]
    ]
    return Dataset.from_dict(
        {"prompt": [question for question, _ in pairs], "completion": [text for _, text in pairs]}
    )


def bits(imitator: Path, rows: Dataset, seed: int) -> dict[str, float]:
    """Bits per human answer, plain (exact) and where one of eight is kept (estimated)."""
    loaded = Imitator.from_pretrained(imitator)
    asked, humans = rows["prompt"][:], rows["completion"][:]
    plain, chosen = (loaded.log_prob(asked, humans, resample=k, seed=seed).nats for k in (1, CANDIDATES))
    return {"plain": float(-plain.mean()) / math.log(2), "picked": float(-chosen.mean()) / math.log(2)}


def plot(measured: list[dict[str, float]], path: Path) -> None:
    """Bits of a held-out answer after each round: of a single draw, and of one kept out of eight."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 2.8), layout="constrained")
    for name, label, colour in (("plain", "one draw", "#c06030"), ("picked", "one kept of 8", "#4878a8")):
        axes.plot([one[name] for one in measured], "o-", ms=4, color=colour, label=label)
    axes.set_xticks(range(len(measured)))
    axes.set_xlabel("rounds of distillation")
    axes.set_ylabel("bits per held-out answer")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
