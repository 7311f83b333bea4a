"""Two imitators with equal scores, one perfect and one bad: only absolute findings tell them apart.

    python examples/equal_scores.py                      # two audits of 5,000 questions, in a few minutes
    python examples/equal_scores.py --smoke              # smaller, in seconds

Humans answer with words of which each admits four followers. In world A they slip now and then, and the imitator has
their very law. In world B they never slip, and the imitator slips at one step in eleven. How often A's humans slip is
chosen so that both imitators give their humans' answers the same number of bits, in closed form: the score is a loss
plus an entropy that nobody knows, so equal scores say nothing of who is good.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from scipy.optimize import brentq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_imitate import AuditReport, Imitator, audit

WORDS = [first + second for first in "bdfgklmn" for second in "aeio"]
ASK, END, PAD = range(len(WORDS), len(WORDS) + 3)
NUM_FOLLOWERS, STOP, LONGEST = 4, 0.15, 96
CARELESS = 0.1  # share of the steps at which B's imitator takes any word
JUDGES = ("surface", "ngram", "likelihood")


def main(arguments: list[str] | None = None) -> dict[str, AuditReport]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="equal-scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few questions: a test that it runs")
    given = parser.parse_args(arguments)
    num_questions = 300 if given.smoke else 5000

    rng = np.random.default_rng([given.seed, 0])
    followers = np.array([rng.choice(len(WORDS), NUM_FOLLOWERS, replace=False) for _ in WORDS])

    def keeps_to_the_followers(prompts, completions, completion_ids=None, **columns):
        """The check: every word is followed by one of its four followers."""
        answers = [[WORDS.index(word) for word in completion.split()] for completion in completions]
        return [all(b in followers[a] for a, b in pairwise(ids)) for ids in answers]

    # A step costs B's flawless humans as much as the steps of A's humans have entropy.
    careless = brentq(lambda share: step_entropy(share) - step_loss(CARELESS), 0.0, CARELESS)
    worlds = {"A, perfect": (careless, careless), "B, bad": (0.0, CARELESS)}
    exact = answer_bits(step_loss(CARELESS))
    reports = {}
    for number, (name, (human_share, imitator_share)) in enumerate(worlds.items()):
        human, imitator = chain_imitator(followers, human_share), chain_imitator(followers, imitator_share)
        questions = ask(num_questions, rng)
        answers = [drawn[0] for drawn in human.answer(questions, seed=given.seed + 1000, batch_size=500)]
        reports[name] = audit(
            imitator,
            Dataset.from_dict({"prompt": questions, "completion": answers}),
            base=chain_imitator(followers, 1.0),
            checks=[keeps_to_the_followers],
            seed=given.seed,
            batch_size=500,
            output_dir=Path(given.output_dir) / "AB"[number],
        )
    show(reports, exact)
    plot(reports, exact, Path(given.output_dir) / "equal_scores.png")
    return reports


def step_loss(share: float) -> float:
    """What a step that keeps to the followers costs under an imitator that takes any word with this probability."""
    return -math.log((1 - share) / NUM_FOLLOWERS + share / len(WORDS))


def step_entropy(share: float) -> float:
    """Entropy of a step of somebody who takes any word with this probability, nats."""
    slip = share * (1 - NUM_FOLLOWERS / len(WORDS))
    other = len(WORDS) - NUM_FOLLOWERS
    return (1 - slip) * step_loss(share) + (slip * math.log(other / slip) if slip else 0.0)


def answer_bits(step: float) -> float:
    """Bits of an answer: a first word, a number of steps that is geometric, and the end."""
    num_steps = (1 - STOP) / STOP
    return (math.log(len(WORDS)) + num_steps * (step - math.log(1 - STOP)) - math.log(STOP)) / math.log(2)


def chain_imitator(followers: np.ndarray, share: float) -> Imitator:
    """A GPT-2 whose law is exactly that of a chain which takes any word with probability `share`, else a follower."""
    size = PAD + 1
    law = torch.full((size, size), 1e-12)
    law[: len(WORDS), : len(WORDS)] += share / len(WORDS) * (1 - STOP)
    for word, after in enumerate(followers):
        law[word, after] += (1 - share) / NUM_FOLLOWERS * (1 - STOP)
    law[: len(WORDS), END] = STOP
    law[ASK:, : len(WORDS)] += 1 / len(WORDS)

    config = GPT2Config(
        vocab_size=size,
        n_positions=128,
        n_embd=size,
        n_layer=1,
        n_head=1,
        tie_word_embeddings=False,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # The block adds nothing. A one-hot embedding, normalised, is one-hot again; the head holds the chain's table.
        model.transformer.wte.weight.copy_(torch.eye(size))
        variance = 1 / size * (1 - 1 / size)
        model.transformer.ln_f.weight.fill_(math.sqrt(variance + config.layer_norm_epsilon))
        model.transformer.ln_f.bias.fill_(1 / size)
        model.lm_head.weight.copy_(law.log().T)
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?", "<end>", "<pad>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    return Imitator(model, tokenizer, max_new_tokens=LONGEST)


def ask(num_questions: int, rng: np.random.Generator) -> list[str]:
    """Different questions of three words."""
    numbers = rng.choice(len(WORDS) ** 3, num_questions, replace=False)
    base = len(WORDS)
    return [f"{WORDS[n // base**2]} {WORDS[n // base % base]} {WORDS[n % base]} ?" for n in numbers.tolist()]


def show(reports: dict[str, AuditReport], exact: float) -> None:
    """The table, and what it shows."""
    name = "keeps_to_the_followers"
    print(f"Bits per human answer of both imitators, in closed form: {exact:.3f}\n")
    print(f"{'':11} {'bits per answer':>24} {'calibration gap':>24} {'human':>6} {'imitator':>8} {'TV at least':>11}")
    for world, report in reports.items():
        bits, gap = (interval(report[finding]) for finding in ("bits_per_answer", "calibration_gap"))
        human, imitator = (report[f"check_pass/{name}/{side}"].value for side in ("human", "imitator"))
        tv = report[f"check_tv_lower/{name}"].value
        print(f"{world:11} {bits:>24} {gap:>24} {human:6.3f} {imitator:8.3f} {tv:11.3f}")
        seen = ", ".join(f"{judge} {interval(report[f'paired_accuracy/{judge}'])}" for judge in JUDGES)
        print(f"{'':11} paired accuracies: {seen}")
    print(
        "\nThe scores agree, and only what is measured against the humans themselves (the check, the judges, the "
        "calibration gap) tells the perfect imitator from the bad one."
    )


def interval(finding) -> str:
    low, high = finding.interval
    return f"{finding.value:.3f} [{low:.3f}, {high:.3f}]"


def plot(reports: dict[str, AuditReport], exact: float, path: Path) -> None:
    """Left: the equal scores. Middle: judges. Right: the check."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    check = "check_pass/keeps_to_the_followers"
    parts = (
        ("bits per human answer (dashed: exact)", ("bits_per_answer",), ("",), exact),
        ("paired accuracy of fresh judges", tuple(f"paired_accuracy/{judge}" for judge in JUDGES), JUDGES, 0.5),
        ("answers that pass the check", (f"{check}/human", f"{check}/imitator"), ("human", "imitator"), None),
    )
    figure, panels = pyplot.subplots(1, 3, figsize=(10, 2.9), layout="constrained", width_ratios=(2.2, 3, 2))
    for axes, (title, names, labels, line) in zip(panels, parts, strict=True):
        for shift, (world, report), colour in zip((-0.12, 0.12), reports.items(), ("#4878a8", "#c06030"), strict=True):
            found = [report[name] for name in names]
            centre = np.array([finding.value for finding in found])
            ends = np.abs(np.array([finding.interval for finding in found]).T - centre)
            places = np.arange(len(found)) + shift
            axes.errorbar(places, centre, yerr=ends, fmt="o", ms=4, capsize=3, color=colour, label=world)
        if line is not None:
            axes.axhline(line, color="black", lw=0.7, ls="--")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_title(title, fontsize=10)
    panels[0].set_ylim(exact - 2, exact + 2)
    panels[0].set_xticks([-0.12, 0.12], ["A", "B"])
    panels[1].legend(title="world and imitator", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
