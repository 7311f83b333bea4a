"""Whoever can be imitated gets imitated: training, until the judges that told the base from the human cannot any more.

    python examples/realizable.py                        # trains a tiny transformer and audits it, in a few minutes
    python examples/realizable.py --smoke                # smaller, in seconds

The human is a small transformer of unknown weights, so some imitator of the same kind has exactly the human's law. The
base has other weights, and every judge tells it from the human. Trained on answers of the human alone, the imitator
cannot be told any more by the same judges, freshly trained, on questions that it was not trained on. Their power
controls say what they would have noticed: an answer in so many that is not the human's.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_imitate import AuditReport, Imitator, RetrodictiveConfig, RetrodictiveTrainer, audit

WORDS = [first + second for first in "bdgm" for second in "aei"]
ASK, END, PAD = range(len(WORDS), len(WORDS) + 3)
QUESTION_WORDS = 4
LONGEST = 40
JUDGES = ("surface", "ngram", "likelihood")
HUMAN_ENDS, BASE_ENDS = 1.5, -0.5  # how readily each ends an answer, nats: the base's are longer


def main(arguments: list[str] | None = None) -> dict[str, AuditReport]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="realizable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--smoke", action="store_true", help="little training, few questions: a test that it runs")
    given = parser.parse_args(arguments)
    num_audited, num_trained = (300, 2000) if given.smoke else (4000, 16_000)
    num_steps = given.max_steps or (60 if given.smoke else 1200)

    human, base = new_imitator(given.seed, HUMAN_ENDS), new_imitator(given.seed + 1, BASE_ENDS)
    numbers = np.random.default_rng([given.seed, 0]).permutation(len(WORDS) ** QUESTION_WORDS)
    questions = [question_of(number) for number in numbers[: num_audited + num_trained].tolist()]
    answers = [drawn[0] for drawn in human.answer(questions, seed=given.seed + 1000, batch_size=1000)]
    rows = Dataset.from_dict({"prompt": questions, "completion": answers})
    held_out, training = rows.select(range(num_audited)), rows.select(range(num_audited, len(rows)))

    folder = Path(given.output_dir)
    settings = {"base": base, "batch_size": 500, "seed": given.seed}
    reports = {"before": audit(base, held_out, output_dir=folder / "before", **settings)}
    trained = train(base, training, num_steps, given)
    settings["base"] = new_imitator(given.seed + 1, BASE_ENDS)  # training has changed the other one
    reports["after"] = audit(trained, held_out, output_dir=folder / "after", **settings)
    nats = human.log_prob(held_out["prompt"][:], held_out["completion"][:]).nats
    show(reports, float(-nats.mean()) / math.log(2))
    plot(reports, folder / "realizable.png")
    return reports


def question_of(number: int) -> str:
    """Four words and a question mark."""
    base = len(WORDS)
    return " ".join([*(WORDS[number // base**place % base] for place in range(QUESTION_WORDS)), "?"])


def new_imitator(seed: int, ends: float) -> Imitator:
    """A transformer of random weights, with a bias for the end of an answer."""
    config = GPT2Config(
        vocab_size=PAD + 1,
        n_positions=LONGEST + 8,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        # The first coordinate is 1 everywhere, so that its column of the head is a bias.
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[END, 0] = ends
        model.lm_head.weight[[ASK, PAD], 0] = -20.0
        # The second one is large after the question mark and small elsewhere: no answer is empty.
        model.transformer.wpe.weight[QUESTION_WORDS, 1] = 20.0
        model.lm_head.weight[:, 1] = 0.0
        model.lm_head.weight[END, 1] = -5.0
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?", "<end>", "<pad>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    return Imitator(model, tokenizer, max_new_tokens=LONGEST)


def train(base: Imitator, rows: Dataset, num_steps: int, given: argparse.Namespace) -> Imitator:
    """Likelihood of the human's answers, all weights of the base."""
    trainer = RetrodictiveTrainer(
        model=base.model,
        args=RetrodictiveConfig(
            output_dir=str(Path(given.output_dir) / "imitator"),
            max_steps=num_steps,
            per_device_train_batch_size=128,
            learning_rate=5e-3,
            warmup_steps=num_steps // 20,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            seed=given.seed,
            disable_tqdm=True,
            logging_steps=200,
        ),
        train_dataset=rows,
        processing_class=base.tokenizer,
    )
    trainer.train()
    return Imitator(trainer.model.eval(), base.tokenizer, max_new_tokens=LONGEST)


def show(reports: dict[str, AuditReport], entropy: float) -> None:
    """The table, and what it shows."""
    print(f"{'':12} {'before':>24} {'after':>24}   smallest share of the base's answers noticed")
    for judge in JUDGES:
        cells = []
        for report in reports.values():
            found = report[f"paired_accuracy/{judge}"]
            cells.append(f"{found.value:.3f} [{found.interval[0]:.3f}, {found.interval[1]:.3f}]")
        power = reports["after"][f"power_control/{judge}"].value
        print(f"{judge:12} {cells[0]:>24} {cells[1]:>24}   {'none' if power is None else f'{power:.0%}'}")
    before, after = (reports[time]["bits_per_answer"].value for time in ("before", "after"))
    print(f"\nBits per human answer: {before:.3f} before, {after:.3f} after; {entropy:.3f} under the human's own law.")
    highest = max(reports["after"][f"paired_accuracy/{judge}"].interval[1] for judge in JUDGES)
    num_pairs = reports["after"][f"paired_accuracy/{JUDGES[0]}"].n
    print(
        f"The judges that told the base from the human are at chance after training: with {num_pairs} pairs, the "
        f"upper end of each 95 % interval is at most {highest:.3f}."
    )


def plot(reports: dict[str, AuditReport], path: Path) -> None:
    """The judges' accuracies before and after training."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.axhline(0.5, color="black", lw=0.7, ls="--", label="chance")
    for shift, (time, report), colour in zip((-0.1, 0.1), reports.items(), ("#c06030", "#4878a8"), strict=True):
        found = [report[f"paired_accuracy/{judge}"] for judge in JUDGES]
        centre = np.array([finding.value for finding in found])
        ends = np.abs(np.array([finding.interval for finding in found]).T - centre)
        places = np.arange(len(JUDGES)) + shift
        axes.errorbar(places, centre, yerr=ends, fmt="o", ms=4, capsize=3, color=colour, label=f"{time} training")
    highest = max(reports["after"][f"paired_accuracy/{judge}"].interval[1] for judge in JUDGES)
    axes.axhline(highest, color="#4878a8", lw=0.9, ls=":", label=f"after training, at most {highest:.3f}")
    axes.set_xticks(range(len(JUDGES)), JUDGES)
    axes.set_xlim(-0.5, len(JUDGES) - 0.5)
    axes.set_ylim(0.4, 1.02)
    axes.set_ylabel("paired accuracy, 95 % intervals")
    axes.legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
