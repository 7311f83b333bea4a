"""Imitate a population, not its most common answer: a survey with subgroups, whose law is known because it is made up.

    python examples/population.py                        # trains and audits in two minutes on one core, no network
    python examples/population.py --smoke                # smaller, in seconds

SYNTHETIC: no person was asked. Of 40 projects in a town, each inhabitant is asked about one, and answers yes, no or
unsure with probabilities that are written down below; young and old differ. An imitator learns from one half of the
inhabitants, and is compared with the other half. At temperature 1 it answers as the population does, as far as people
agree with each other (the ceiling). At temperature 0.3 its favourite answers are the same, and the population is gone.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_imitate import AuditReport, Imitator, RetrodictiveConfig, RetrodictiveTrainer, audit

CHOICES = ["yes", "unsure", "no"]
GROUPS = ["young", "old"]
WHAT = ["bridge", "library", "school", "stadium", "tram", "market", "park", "harbour"]
WHERE = ["north", "south", "east", "west", "centre"]
TEMPERATURES = {"temperature 1": None, "temperature 0.3": {"temperature": 0.3, "do_sample": True}}
COLOURS = {"young": "#c06030", "old": "#4878a8"}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="population")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few people, little training: a test that it runs")
    given = parser.parse_args(arguments)
    num_steps, people = (60, 3) if given.smoke else (600, 20)

    law = human_law(given.seed)
    rng = np.random.default_rng([given.seed, 1])
    train_rows, other_rows = (survey(law, people, rng) for _ in range(2))
    imitator = train(train_rows, num_steps, given)
    folder = Path(given.output_dir)
    reports = {
        name: audit(
            imitator,
            other_rows,
            generation_config=decoding,
            by="group",
            seed=given.seed,
            judges=["surface"],
            batch_size=512,
            output_dir=folder / name.replace(" ", "-"),
        )
        for name, decoding in TEMPERATURES.items()
    }
    stated = stated_law(imitator, law)
    show(reports, law, stated)
    plot(reports, law, stated, folder / "population.png")
    return {name: total_variation(law, own) for name, own in stated.items()}


def human_law(seed: int) -> dict[str, np.ndarray]:
    """Question -> probabilities of `CHOICES`: a project's and a place's appeal, and what its group makes of it."""
    rng = np.random.default_rng([seed, 0])
    appeal = {name: rng.normal(0, 1) for name in WHAT + WHERE}
    age = {name: rng.normal(0, 1) for name in WHAT}
    law = {}
    for group in GROUPS:
        for what in WHAT:
            for where in WHERE:
                liking = appeal[what] + 0.5 * appeal[where] + (1 if group == "young" else -1) * age[what]
                scores = np.exp([liking, -0.3, -liking])
                law[f"{group} : a {what} in the {where} ?"] = scores / scores.sum()
    return law


def survey(law: dict[str, np.ndarray], people: int, rng: np.random.Generator) -> Dataset:
    """So many people of each group answer each question; each answers one."""
    rows = [
        {
            "prompt": question,
            "completion": CHOICES[rng.choice(len(CHOICES), p=shares)],
            "choices": CHOICES,
            "group": question.split()[0],
        }
        for question, shares in law.items()
        for _ in range(people)
    ]
    return Dataset.from_list(rows)


def train(rows: Dataset, num_steps: int, given: argparse.Namespace) -> Imitator:
    """Likelihood of the answers, from nothing. `choices` is for the audit: the trainer reads questions and answers."""
    words = [*CHOICES, *GROUPS, *WHAT, *WHERE, ":", "a", "in", "the", "?", "<end>", "<pad>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=16,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(given.seed)
    trainer = RetrodictiveTrainer(
        model=GPT2LMHeadModel(config),
        args=RetrodictiveConfig(
            output_dir=str(Path(given.output_dir) / "imitator"),
            max_steps=num_steps,
            per_device_train_batch_size=64,
            learning_rate=5e-3 if given.smoke else 1e-3,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            seed=given.seed,
            disable_tqdm=True,
            logging_steps=100,
        ),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    trainer.train()
    return Imitator(trainer.model.eval(), tokenizer, max_new_tokens=2)


def stated_law(imitator: Imitator, law: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """What the imitator states of each choice at each temperature, by its log-probabilities."""
    questions = [question for question in law for _ in CHOICES]
    nats = imitator.log_prob(questions, CHOICES * len(law)).nats.numpy().reshape(len(law), -1)
    stated = {}
    for name, decoding in TEMPERATURES.items():
        heated = np.exp(nats / (decoding or {"temperature": 1.0})["temperature"])
        stated[name] = dict(zip(law, heated / heated.sum(axis=1, keepdims=True), strict=True))
    return stated


def total_variation(law: dict[str, np.ndarray], stated: dict[str, np.ndarray]) -> float:
    """Mean over questions; exact, since the law is known."""
    return float(np.mean([np.abs(law[question] - stated[question]).sum() / 2 for question in law]))


def show(
    reports: dict[str, AuditReport], law: dict[str, np.ndarray], stated: dict[str, dict[str, np.ndarray]]
) -> None:
    """What the audit measured of samples, beside what only a made-up world can know."""
    print(f"\n{'':24}{'audit: distance':>28}{'humans to humans':>28}{'exact distance':>16}")
    for name, report in reports.items():
        for suffix in ("", *(f"/group={group}" for group in GROUPS)):
            cells = []
            for finding in (report[f"answer_distribution_tv{suffix}"], report[f"human_ceiling{suffix}"]):
                low, high = finding.interval
                cells.append(f"{finding.value:.3f} [{low:.3f}, {high:.3f}]")
            chosen = [question for question in law if question.startswith(suffix.rpartition("=")[2])]
            exact = total_variation({one: law[one] for one in chosen}, stated[name])
            print(f"{name + suffix.replace('/group=', ', '):24}{cells[0]:>28}{cells[1]:>28}{exact:>16.3f}")
    entropy = -np.mean([(shares * np.log2(shares)).sum() for shares in law.values()])
    bits = " and ".join(f"{report['bits_per_answer'].value:.3f} ({name})" for name, report in reports.items())
    print(f"\nBits per human answer: {bits}; the humans' own entropy is {entropy:.3f}.")
    same = np.mean([law[one].argmax() == stated["temperature 1"][one].argmax() for one in law])
    print(f"Its favourite answer is the population's in {same:.0%} of the questions, at any temperature.")


def plot(
    reports: dict[str, AuditReport],
    law: dict[str, np.ndarray],
    stated: dict[str, dict[str, np.ndarray]],
    path: Path,
) -> None:
    """Shares of yes, people's against the imitator's, at both temperatures; and distances beside the ceiling."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (*panels, right) = pyplot.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for axis, (name, own) in zip(panels, stated.items(), strict=True):
        for group in GROUPS:
            chosen = [question for question in law if question.startswith(group)]
            axis.plot(
                [law[one][0] for one in chosen], [own[one][0] for one in chosen], "o", ms=3.5, color=COLOURS[group]
            )
        axis.plot([0, 1], [0, 1], color="black", lw=0.7, ls="--")
        axis.set_xlabel("share of yes, people (known law)")
        axis.set_ylabel("share of yes, imitator")
        axis.set_title(name, fontsize=10)
    panels[0].legend(GROUPS, fontsize=8, loc="upper left")

    places, labels = 0, []
    for name, report in reports.items():
        for group in GROUPS:
            for finding, marker in (("answer_distribution_tv", "o"), ("human_ceiling", "_")):
                found = report[f"{finding}/group={group}"]
                ends = [[max(0.0, found.value - found.interval[0])], [max(0.0, found.interval[1] - found.value)]]
                is_own = marker == "o"
                place = places + (-0.12 if is_own else 0.12)
                colour, size = (COLOURS[group], 4) if is_own else ("#888888", 9)
                right.errorbar(place, found.value, yerr=ends, fmt=marker, ms=size, capsize=3, color=colour)
            labels.append(f"{group}\n{name.replace('temperature', 'T =')}")
            places += 1
    right.set_xticks(range(places), labels, fontsize=8)
    right.set_xlim(-0.5, places - 0.5)
    right.set_ylim(bottom=0)
    right.set_ylabel("total variation")
    right.set_title("distance (grey: among people)", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
