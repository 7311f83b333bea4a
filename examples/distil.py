"""Put what a distinguisher knows into the imitator's weights: keep one of eight answers, learn those, repeat.

    python -m examples.distil                        # some minutes on one core, no network
    python -m examples.distil --smoke                # hardly any training: a test that it runs

One round is three public parts. `AdversarialTrainer(freeze_imitator=True)` fits a distinguisher to an imitator that
stands still (`discriminate`); `answer(resample=8)` keeps one answer of eight by it, also to questions that nobody
answered (`kept_answers`); `RetrodictiveTrainer` learns these beside people's own answers (`learn`). The next round
fits a distinguisher afresh: the old one knows the faults of an imitator that is no more.

People write short notes here, by a law that is written down in benchmarks/worlds/notes.py, so what a note costs at
least is known, and which notes nobody writes. An imitator could hold that law, but is shown 400 notes; the
distinguisher is a larger model that has read 5 000. The control is an imitator that learns all 5 000 itself: who can
do that needs no distinguisher. Several seeds, and judges: `make acceptance ONLY=residual_distil`.

For a model of the Hub, give its name where `new_model` stands, `peft_config=LoraConfig(...)` to the trainers, and a
hundredth of the learning rates: a network of 30 000 parameters wants all of them trained, and fast.
"""

import argparse
import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets

from benchmarks.worlds.notes import MAX_TOKENS, entropy, human_log_prob, human_rows, new_model, questions, tokenizer
from benchmarks.worlds.notes_arms import answers, log_prob
from hf_imitate import AdversarialConfig, AdversarialTrainer, Imitator, RetrodictiveConfig, RetrodictiveTrainer
from hf_imitate.log_probs import nats_to_bits

CANDIDATES = 8
ANSWERS_KEPT = 4  # to each unanswered question: two are a noise that judges see (docs/log.md)
CONTROL = "control: learns all notes"


class Sizes(NamedTuple):
    """Of the rows, and steps of each training."""

    notes: int = 5000
    dev: int = 500  # notes that say after which of ten readings a training was best
    test: int = 1000
    shown: int = 400  # of the notes, those that the imitator learns from
    unanswered: int = 1200
    scored: int = 250  # of the test questions, those whose probabilities are estimated
    first_steps: int = 300
    round_steps: int = 600
    control_steps: int = 600
    body_steps: int = 300  # of the distinguisher, as a language model
    distinguisher_steps: int = 150


SMOKE = Sizes(160, 20, 40, 40, 16, 8, 10, 6, 6, 4, 4)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--output_dir", type=Path, help="keeps every imitator and distinguisher; by default nowhere")
    parser.add_argument("--figure", default="distil.png", help="where the picture goes")
    parser.add_argument("--smoke", action="store_true", help="hardly any training, few notes")
    given = parser.parse_args(arguments)
    sizes = SMOKE if given.smoke else Sizes()

    asked = questions(sizes.notes + sizes.dev + sizes.test, given.seed)
    rows = human_rows(asked, given.seed)
    notes, dev, test = (
        rows.select(range(end - number, end))
        for number, end in zip((sizes.notes, sizes.dev, sizes.test), np.cumsum(sizes[:3]), strict=True)
    )
    with tempfile.TemporaryDirectory() as scratch:
        laws = train(given.output_dir or Path(scratch), notes, dev, sizes, given)
        nats, impossible = zip(*(measured(path, test, sizes, k) for path, k in laws.values()), strict=True)
    found = {}
    for name, own, share in zip(laws, nats, impossible, strict=True):
        saved = own - nats[0]  # on the same notes, so that their own differences drop out
        error = saved.std(ddof=1) / math.sqrt(len(saved))
        law = {"bits": -own.mean(), "saved": saved.mean(), "standard_error": error}
        found[name] = {key: nats_to_bits(float(value)) for key, value in law.items()} | {"impossible": share}
    floor = nats_to_bits(entropy(test["prompt"][: sizes.scored]))

    print(f"\n{'':30}  {'bits per human note':>19}  {'saved':>12}  {'notes that nobody writes':>24}")
    for name, law in found.items():
        saved = f"{law['saved']:.2f} ± {law['standard_error']:.2f}"
        print(f"{name:30}  {law['bits']:19.2f}  {saved:>12}  {law['impossible']:24.3f}")
    print(f"{'people themselves':30}  {floor:19.2f}")
    plot(found, floor, given.figure)
    print(f"\nThe picture is in {given.figure}.")
    return found


def train(
    folder: Path, notes: Dataset, dev: Dataset, sizes: Sizes, given: argparse.Namespace
) -> dict[str, tuple[Path, int]]:
    """Every imitator, and how many answers are drawn where one is kept."""
    shown, unanswered = notes.select(range(sizes.shown)), questions(sizes.unanswered, given.seed, reserved=True)
    seed = given.seed
    print("The control, and the imitator of few notes.")
    learn(untrained("few", seed), notes, dev, folder / "control", sizes.control_steps, 1e-2, seed)
    learn(untrained("few", seed), shown, dev, folder / "round-0", sizes.first_steps, 1e-2, seed)
    laws = {"before": (folder / "round-0", 1)}
    for number in range(1, given.rounds + 1):
        print(f"Round {number}: a distinguisher, answers kept by it, likelihood.")
        last, judged, learned = (
            folder / name for name in (f"round-{number - 1}", f"judged-{number}", f"round-{number}")
        )
        discriminate(last, notes, judged, sizes, seed)
        both = concatenate_datasets([shown, kept_answers(judged, unanswered, seed + number)])
        learn(trainable(last), both, dev, learned, sizes.round_steps, 5e-3, seed)
        name = f"one of {CANDIDATES}"
        laws[name if number == 1 else f"after round {number - 1}, {name}"] = (judged, CANDIDATES)
        laws[f"after round {number}"] = (learned, 1)
    return laws | {CONTROL: (folder / "control", 1)}


def untrained(size: str, seed: int) -> Any:
    """A model of this world, the same for a seed."""
    torch.manual_seed(seed)
    return new_model(size)


def trainable(folder: Path) -> Any:
    """The model saved there; what is loaded to be used is frozen."""
    return Imitator.from_pretrained(folder, device="cpu").model.requires_grad_(True)


def learn(model: Any, rows: Dataset, dev: Dataset, folder: Path, num_steps: int, rate: float, seed: int) -> None:
    """Likelihood of these answers; of ten readings on other rows, the best one's weights are saved."""
    trainer = RetrodictiveTrainer(
        model=model,
        args=RetrodictiveConfig(
            output_dir=str(folder / "training"),
            max_steps=num_steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(30, num_steps // 4),
            adam_beta2=0.98,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=512,
            eval_strategy="steps",
            eval_steps=max(1, num_steps // 10),
            save_strategy="best",
            load_best_model_at_end=True,
            save_only_model=True,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=rows,
        eval_dataset=dev,
        processing_class=tokenizer(),
    )
    with contextlib.redirect_stdout(None):
        trainer.train()
    trainer.save_model(str(folder))


def discriminate(imitator: Path, rows: Dataset, folder: Path, sizes: Sizes, seed: int) -> None:
    """Fit a larger distinguisher to an imitator that stands still, and save both."""
    trainer = AdversarialTrainer(
        model=Imitator.from_pretrained(imitator, device="cpu").model,
        args=AdversarialConfig(
            output_dir=str(folder),
            freeze_imitator=True,
            max_steps=sizes.distinguisher_steps,
            distinguisher_lm_warmup_steps=sizes.body_steps,
            distinguisher_warmup_steps=0,
            imitator_warmup_learning_rate=6e-3,  # the distinguisher's, while it is a language model
            distinguisher_learning_rate=5e-4,
            per_device_train_batch_size=64,
            num_generations=2,
            max_completion_length=MAX_TOKENS,
            heldout_fraction=0.1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=rows,
        distinguisher=untrained("large", seed + 7),
        processing_class=tokenizer(),
    )
    with contextlib.redirect_stdout(None):
        trainer.train()
    trainer.save_model()


def kept_answers(folder: Path, asked: list[str], seed: int) -> Dataset:
    """Some answers to each question, each kept out of eight; without empty ones, which teach nothing."""
    imitator = Imitator.from_pretrained(folder, device="cpu")
    drawn = imitator.answer(asked, ANSWERS_KEPT, seed=seed, resample=CANDIDATES, batch_size=512)
    pairs = [(question, text) for question, own in zip(asked, drawn, strict=True) for text in own if text.strip()]
    prompts, texts = zip(*pairs, strict=True)
    return Dataset.from_dict({"prompt": prompts, "completion": texts})


def measured(folder: Path, test: Dataset, sizes: Sizes, k: int) -> tuple[np.ndarray, float]:
    """Nats of human notes under the law that is sampled from, estimated where one of K is kept; and the share of the
    imitator's own notes to all test questions that have probability 0 under people's law."""
    imitator = Imitator.from_pretrained(folder, device="cpu")
    asked, humans = test["prompt"][:], test["completion"][:]
    scored = slice(sizes.scored)
    nats = log_prob(imitator, asked[scored], humans[scored], num_estimates=CANDIDATES, resample=k)["nats"]
    own = answers(imitator, asked, 50, resample=k)
    possible = np.isfinite(human_log_prob(asked, [answer.text for answer in own]))
    return nats, float(1 - np.mean(possible & [answer.ended for answer in own]))


def plot(found: dict[str, dict[str, float]], floor: float, path: str) -> None:
    """Bits and impossible notes after each round: where one answer is drawn, and where one is kept out of eight."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    single = [law for name, law in found.items() if "one of" not in name and name != CONTROL]
    kept = [law for name, law in found.items() if "one of" in name]
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, name, label, least in zip(
        panels,
        ("bits", "impossible"),
        ("bits per human note", "notes that nobody writes, share"),
        (floor, 0.0),
        strict=True,
    ):
        axis.axhline(found[CONTROL][name], color="#555555", lw=1, ls="--", label=CONTROL)
        axis.axhline(least, color="black", lw=1, ls=":", label="people themselves")
        axis.plot([law[name] for law in single], "o-", ms=5, color="#c06030", label="one answer drawn")
        axis.plot([law[name] for law in kept], "s", ms=5, color="#4878a8", label=f"one kept of {CANDIDATES}")
        axis.set_xticks(range(len(single)))
        axis.set_xlabel("rounds of distillation")
        axis.set_ylabel(label, fontsize=9)
    panels[0].set_ylim(bottom=0.9 * floor)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
