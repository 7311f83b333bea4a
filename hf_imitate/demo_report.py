"""What the demo shows people: a table, a verdict in plain words, answers beside the human's, and a picture."""

import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from hf_imitate.audits.distinguishability import Judgement
from hf_imitate.audits.figures import plot_frontier
from hf_imitate.rendering import Answer


class System(NamedTuple):
    """A way to answer the held-out questions: a model at a temperature."""

    name: str
    model: PreTrainedModel
    temperature: float


class Measured(NamedTuple):
    """What was measured of a system: bits per human answer with a 95 % interval, tokens per answer over the human's,
    one judgement per judge, and its answers."""

    system: System
    bits: float
    bits_interval: tuple[float, float]
    length_ratio: float
    judgements: dict[str, Judgement]
    answers: list[Answer]


def report(measured: list[Measured], rows: Dataset, output_dir: Path) -> None:
    """Print the table, ten answers and a verdict; write table, picture and numbers."""
    lines = table(measured)
    print("\n" + "\n".join(lines))
    print(textwrap.fill(LEGEND, 110))
    print("\n" + verdict(measured))
    print("\nTen held-out questions, what the human wrote, and what the imitator wrote:")
    imitator = measured[-1]
    for i in np.linspace(0, len(imitator.answers) - 1, 10).astype(int):
        print(f"\n  {rows[int(i)]['prompt'].strip()}")
        print(f"    human:    {rows[int(i)]['completion']}")
        print(f"    imitator: {imitator.answers[int(i)].text}")
    (output_dir / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output_dir / "demo.json").write_text(json.dumps([_as_json(m) for m in measured], indent=2), encoding="utf-8")
    plot_frontier([_as_figure_row(m) for m in measured], output_dir / "frontier.png")
    print(f"\nThe picture: {output_dir}/frontier.png")


LEGEND = (
    "bits: of one human answer under the law that is sampled from, fewer are better. Judges are trained afresh on "
    "half of the held-out questions; 'picks the human' is how often they do on the other half (0.5 is chance), "
    "'judge bits' what one answer tells them about its author (0 is nothing). Intervals hold at 95 %, each on its "
    "own, over questions; another judge's seed moves a number by a few hundredths more."
)


def table(measured: list[Measured]) -> list[str]:
    """The table's lines, in Markdown."""
    judges = list(measured[0].judgements)
    header = ["system", "bits/answer", *(f"{j} picks the human" for j in judges), *(f"{j} judge bits" for j in judges)]
    rows = [[*header, "length ratio"]]
    for m in measured:
        accuracies = [f"{j.accuracy:.3f} [{j.interval.low:.3f}, {j.interval.high:.3f}]" for j in m.judgements.values()]
        bits = [f"{j.bits:+.3f}" for j in m.judgements.values()]
        half = (m.bits_interval[1] - m.bits_interval[0]) / 2
        rows.append([m.system.name, f"{m.bits:.1f} ± {half:.1f}", *accuracies, *bits, f"{m.length_ratio:.2f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def verdict(measured: list[Measured]) -> str:
    """In plain words, whether the imitator beat the best of fine-tuning, judge by judge and in bits."""
    imitator, rivals = measured[-1], measured[1:-1]
    sentences = []
    for judge in imitator.judgements:
        best = min(rivals, key=lambda m: m.judgements[judge].accuracy)
        ours, theirs = imitator.judgements[judge], best.judgements[judge]
        if ours.interval.high < theirs.interval.low:
            word = "is harder to tell from the human than"
        elif ours.interval.low > theirs.interval.high:
            word = "is easier to tell from the human than"
        else:
            word = "cannot be ranked against"
        sentences.append(
            f"To the {judge} judge, the imitator ({ours.accuracy:.3f}) {word} the best of SFT, '{best.system.name}' "
            f"({theirs.accuracy:.3f})."
        )
    best = min(rivals, key=lambda m: m.bits)
    sentences.append(
        f"Human answers cost it {imitator.bits:.1f} bits; under '{best.system.name}' they cost {best.bits:.1f}."
    )
    return "\n".join(sentences)


def _as_json(m: Measured) -> dict[str, Any]:
    judgements = {
        name: {"accuracy": j.accuracy, "interval": list(j.interval), "bits": j.bits, "num_pairs": j.num_pairs}
        for name, j in m.judgements.items()
    }
    return {
        "system": m.system.name,
        "temperature": m.system.temperature,
        "bits_per_answer": m.bits,
        "bits_interval": list(m.bits_interval),
        "length_ratio": m.length_ratio,
        "judges": judgements,
    }


def _as_figure_row(m: Measured) -> dict[str, Any]:
    return {
        "name": m.system.name,
        "judge_accuracies": {name: (j.accuracy, *j.interval) for name, j in m.judgements.items()},
        "bits_per_answer": m.bits,
        "bits_interval": m.bits_interval,
        "length_ratio": m.length_ratio,
    }
