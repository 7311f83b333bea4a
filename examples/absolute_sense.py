"""An imitator that fails now and then is exposed in an absolute sense: by a check that humans always pass.

    python examples/absolute_sense.py                    # trains and audits a Sudoku imitator in a few minutes
    python examples/absolute_sense.py --smoke            # smaller, in seconds

Humans solve every 4x4 Sudoku, and each has one solution. A small transformer learns from them and then solves most
puzzles of grids that it never saw. No judge of text can be right more often than 1/2 + half its failure rate. The
check needs no guessing: one failure is a thing no human does. And where each question has one right answer, what the
imitator says of the human's answers is absolute, too: total variation is exactly the mean of 1 - q(right answer).
"""

import argparse
from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_imitate import AuditReport, Imitator, RetrodictiveConfig, RetrodictiveTrainer, audit

BLANK, NUM_CLUES = ".", 12
CELLS = range(16)
ROWS = [[cell for cell in CELLS if cell // 4 == row] for row in range(4)]
COLUMNS = [[cell for cell in CELLS if cell % 4 == column] for column in range(4)]
BOXES = [[cell for cell in CELLS if (cell // 8, cell % 4 // 2) == box] for box in product(range(2), repeat=2)]
JUDGES = ("surface", "ngram", "likelihood")


def main(arguments: list[str] | None = None) -> AuditReport:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="absolute-sense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="hardly any training: a test that it runs")
    given = parser.parse_args(arguments)
    num_steps, num_puzzles = (30, 200) if given.smoke else (600, 2000)

    rng = np.random.default_rng([given.seed, 0])
    grids = rng.permutation(all_grids()).tolist()
    trained = puzzles_of(grids[:200], 500 if given.smoke else 8000, rng, set())
    rows = puzzles_of(grids[200:], num_puzzles, rng, set(trained["prompt"]))
    imitator = train(trained, num_steps, given)
    report = audit(
        imitator,
        rows,
        train_dataset=trained,
        checks=[solved],
        human_entropy="unique",
        seed=given.seed,
        batch_size=500,
        output_dir=Path(given.output_dir) / "audit",
    )
    nats = imitator.log_prob(rows["prompt"][:], rows["completion"][:]).nats
    exact = float(1 - nats.exp().mean())
    show(report, exact)
    plot(report, exact, Path(given.output_dir) / "absolute_sense.png")
    return report


def is_filled(grid: str) -> bool:
    """Whether every row, column and box holds each digit once."""
    return len(grid) == 16 and all({grid[cell] for cell in unit} == set("1234") for unit in ROWS + COLUMNS + BOXES)


def all_grids() -> list[str]:
    """The 288 filled grids."""
    lines = ["".join(line) for line in permutations("1234")]
    halves = [a + b for a, b in product(lines, repeat=2) if len({*a[:2], *b[:2]}) == len({*a[2:], *b[2:]}) == 4]
    return [grid for grid in map("".join, product(halves, repeat=2)) if is_filled(grid)]


def solved(prompts, completions, completion_ids=None, **columns) -> list[bool]:
    """The check: the answer is a filled grid and keeps the puzzle's clues."""
    return [
        is_filled(answer) and all(clue in (BLANK, digit) for clue, digit in zip(puzzle, answer, strict=True))
        for puzzle, answer in zip(prompts, completions, strict=True)
    ]


def puzzles_of(grids: list[str], number: int, rng: np.random.Generator, taken: set[str]) -> Dataset:
    """Different puzzles with one solution, and that solution: what every human answers."""
    cells = np.array([list(grid) for grid in all_grids()])
    questions: dict[str, str] = {}
    while len(questions) < number:
        grid = grids[int(rng.integers(len(grids)))]
        clues = rng.choice(16, NUM_CLUES, replace=False)
        is_only_one = (cells[:, clues] == np.array(list(grid))[clues]).all(axis=1).sum() == 1
        puzzle = "".join(digit if cell in clues else BLANK for cell, digit in enumerate(grid))
        if is_only_one and puzzle not in taken:
            questions[puzzle] = grid
    return Dataset.from_dict({"prompt": list(questions), "completion": list(questions.values())})


def train(rows: Dataset, num_steps: int, given: argparse.Namespace) -> Imitator:
    """Likelihood of the humans' solutions, from nothing."""
    vocabulary = {sign: i for i, sign in enumerate([BLANK, *"1234", "<end>", "<pad>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=40,
        n_embd=64,
        n_layer=3,
        n_head=4,
        bos_token_id=None,
        eos_token_id=vocabulary["<end>"],
        pad_token_id=vocabulary["<pad>"],
    )
    torch.manual_seed(given.seed)
    trainer = RetrodictiveTrainer(
        model=GPT2LMHeadModel(config),
        args=RetrodictiveConfig(
            output_dir=str(Path(given.output_dir) / "imitator"),
            max_steps=num_steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            warmup_steps=num_steps // 10,
            save_strategy="no",
            report_to="none",
            seed=given.seed,
            disable_tqdm=True,
            logging_steps=100,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    return Imitator(trainer.model.eval(), tokenizer, max_new_tokens=17)


def show(report: AuditReport, exact: float) -> None:
    """The table, and what it shows."""
    print(f"Exact failure rate of the imitator on these puzzles, by its log-probabilities: {exact:.4f}\n")
    names = ["check_pass/solved/human", "check_pass/solved/imitator", "check_tv_lower/solved", "hidden_deviation"]
    for name in [*names, *(f"paired_accuracy/{judge}" for judge in JUDGES), "consistency"]:
        found = report[name]
        ends = "" if found.interval is None else f"  [{found.interval[0]:.4f}, {found.interval[1]:.4f}]"
        value = "not measured" if found.value is None else f"{found.value:.4f}"
        print(f"{name:28} {value}{ends}{'  certified' if found.certified else ''}")
    print(
        "\nHumans never fail: so the imitator's failures are certain proof, within the two certified bounds around "
        f"its exact failure rate, where no judge's accuracy can exceed {0.5 + exact / 2:.4f}."
    )


def plot(report: AuditReport, exact: float, path: Path) -> None:
    """Left: who solves. Middle: the certified bounds around the truth. Right: what judges of text see."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    for place, side in enumerate(("human", "imitator")):
        found = report[f"check_pass/solved/{side}"]
        low, high = found.interval
        ends = [[found.value - low], [high - found.value]]
        left.errorbar(place, found.value, yerr=ends, fmt="o", ms=4, capsize=3, color=("#4878a8", "#c06030")[place])
    left.set_xticks([0, 1], ["human", "imitator"])
    left.set_xlim(-0.6, 1.6)
    left.set_title("puzzles solved, exact intervals", fontsize=10)

    low, high = report["check_tv_lower/solved"].value, report["hidden_deviation"].value
    middle.plot([0, 0], [low, high], color="#999999", lw=6, solid_capstyle="butt", label="between certified bounds")
    middle.plot(0, exact, "o", ms=5, color="#c06030", label="exact")
    middle.set_xticks([])
    middle.set_xlim(-1, 1)
    middle.set_ylim(0, high * 1.5)
    middle.legend(fontsize=8, loc="upper right")
    middle.set_title("total variation from the humans", fontsize=10)

    for place, judge in enumerate(JUDGES):
        found = report[f"paired_accuracy/{judge}"]
        low, high = found.interval
        ends = [[found.value - low], [high - found.value]]
        right.errorbar(place, found.value, yerr=ends, fmt="o", ms=4, capsize=3, color="#555555")
    right.axhline(0.5, color="black", lw=0.7, ls="--")
    right.axhline(0.5 + exact / 2, color="#c06030", lw=0.9, ls=":", label="most any judge can reach")
    right.set_xticks(range(len(JUDGES)), JUDGES)
    right.set_xlim(-0.6, len(JUDGES) - 0.4)
    right.set_ylim(0.4, 0.65)
    right.legend(fontsize=8, loc="upper right")
    right.set_title("paired accuracy of fresh judges", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
