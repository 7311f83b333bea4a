"""What the demo shows people: a table, a verdict in plain words, answers beside the human's, and a picture."""

import json
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hf_imitate.audits.figures import plot_frontier
from hf_imitate.audits.report import AuditReport, Finding
from hf_imitate.audits.report_text import summary
from hf_imitate.cluster_intervals import ClusterEstimate, paired_cluster_mean
from hf_imitate.imitator import Imitator
from hf_imitate.log_probs import nats_to_bits

CONFIDENCE = 0.95
WIDTH = 110


class System(NamedTuple):
    """A way to answer the held-out questions: an imitator at a temperature, one answer kept out of `resample`."""

    name: str
    imitator: Imitator
    temperature: float
    resample: int = 1


class Measured(NamedTuple):
    """What `audit` found of a system.

    Attributes:
        system: who was audited.
        report: all findings.
        scores: the audit's numbers per question, as in its `scores.parquet`. [N] each.
    """

    system: System
    report: AuditReport
    scores: dict[str, np.ndarray]

    @property
    def judges(self) -> list[str]:
        """Names of the judges that were asked."""
        names = (finding.name for finding in self.report.distinguishability)
        return [name.removeprefix("paired_accuracy/") for name in names if name.startswith("paired_accuracy/")]

    @property
    def proven_distance(self) -> float | None:
        """Certified lower bound of the total variation to the human's answers; `None` if nobody could judge."""
        bounds = [self.report[f"tv_lower/{judge}"].value for judge in self.judges]
        return max((bound for bound in bounds if bound is not None), default=None)


class Resampled(NamedTuple):
    """The imitator whose distinguisher keeps one of several answers, and its single draws on the same questions."""

    kept: Measured
    single: Measured


def read_scores(path: Path) -> dict[str, np.ndarray]:
    """The columns of an audit's `scores.parquet`."""
    shows_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            stored = Dataset.from_parquet(str(path), cache_dir=folder, keep_in_memory=True)
            return {name: np.array(stored[name][:]) for name in stored.column_names}
    finally:
        if shows_bars:
            enable_progress_bars()


def report(measured: list[Measured], resampled: Resampled, rows: Dataset, output_dir: Path, seed: int) -> None:
    """Print the table, a verdict, the imitator's audit and ten answers; write table, picture and numbers."""
    lines, imitator = table([*measured, resampled.kept]), measured[-1]
    print("\n" + "\n".join(lines))
    print(textwrap.fill(LEGEND, WIDTH))
    print("\n" + verdict(measured))
    print("\n" + verdict_on_resampling(resampled))
    print(f"\nThe imitator's audit ({output_dir}/audit/audit.md has every number):")
    for sentence in summary(imitator.report):
        print(textwrap.fill(sentence, WIDTH, initial_indent="* ", subsequent_indent="  "))
    print("\nTen held-out questions, what the human wrote, and what the imitator wrote:")
    chosen = rows.select(np.linspace(0, len(rows) - 1, 10).astype(int))
    answers = imitator.system.imitator.answer(chosen["prompt"][:], seed=seed)
    for row, drawn in zip(chosen, answers, strict=True):
        print(f"\n  {row['prompt'].strip()}\n    human:    {row['completion']}\n    imitator: {drawn[0]}")
    (output_dir / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output_dir / "demo.json").write_text(
        json.dumps([_as_json(m) for m in [*measured, resampled.kept]], indent=2), encoding="utf-8"
    )
    plot_frontier([_as_figure_row(m) for m in measured], output_dir / "frontier.png")
    print(f"\nThe pictures: {output_dir}/frontier.png, and three in {output_dir}/audit/")


LEGEND = (
    "bits: of one human answer under the law that is sampled from, fewer are better. 'picks the human': how often a "
    "judge does, trained afresh on some of the held-out questions, on others (0.5 is chance); intervals hold at 95 %, "
    "each on its own, over questions. 'proven distance': total variation between its answers and people's is at least "
    "so much; certain at 95 % of all that one audit certifies, and 0 proves nothing. 'resample 8': the distinguisher "
    "keeps one of 8 answers. Its bits are estimates, rather too many; its judges learned from fewer questions, so it "
    "is to be compared with single draws below, not with the rows above."
)


def table(measured: list[Measured]) -> list[str]:
    """The table's lines, in Markdown."""
    judges = measured[0].judges
    header = ["system", "bits/answer", *(f"{judge} picks the human" for judge in judges), "proven distance"]
    rows = [[*header, "length ratio"]]
    for m in measured:
        bits, length, distance = m.report["bits_per_answer"], m.report["length_ratio"], m.proven_distance
        half = 0.0 if bits.interval is None else (bits.interval[1] - bits.interval[0]) / 2
        rows.append(
            [
                m.system.name,
                _told(bits, f"{bits.value:.1f} ± {half:.1f}" if bits.value is not None else ""),
                *(_accuracy(m.report[f"paired_accuracy/{judge}"]) for judge in judges),
                "not measured" if distance is None else f"{distance:.2f}",
                _told(length, f"{length.value:.2f}" if length.value is not None else ""),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _accuracy(finding: Finding) -> str:
    low, high = finding.interval or (0.0, 1.0)
    return _told(finding, f"{finding.value:.3f} [{low:.3f}, {high:.3f}]" if finding.value is not None else "")


def _told(finding: Finding, text: str) -> str:
    return "not measured" if finding.value is None else text


# --- who is better


def differences(one: Measured, other: Measured, confidence: float) -> dict[str, ClusterEstimate]:
    """How often each judge is right about `one` minus about `other`, and bits of a human answer under each.

    Both were audited on the same questions and judged on the same part of them, so what makes a question easy for
    everybody cancels. What was not measured of both is left out.

    Args:
        one, other: audits of two systems.
        confidence: of each interval, Student's t over questions; the judges are taken as they were trained.

    Returns:
        `dict[str, ClusterEstimate]`: by judge, and "bits"; below 0, `one` is better.

    Raises:
        ValueError: the two were audited on different questions.
    """
    a, b = one.scores, other.scores
    if not np.array_equal(a["question"], b["question"]) or not np.array_equal(a["part"], b["part"]):
        raise ValueError(
            f"The audits of {one.system.name!r} and {other.system.name!r} asked different questions; audit both with "
            "one data set and one seed."
        )
    found = {}
    for judge in one.judges:
        if f"judge_{judge}_human" in a and f"judge_{judge}_human" in b:
            tested = a["part"] == "test"
            ours, theirs = (_is_right(scores, judge)[tested] for scores in (a, b))
            found[judge] = paired_cluster_mean(ours, theirs, a["question"][tested], confidence)
    usable = ~(a["human_is_cut"] | b["human_is_cut"]) & np.isfinite(a["human_nats"] + b["human_nats"])
    if usable.sum() > 1:
        ours, theirs = (nats_to_bits(-scores["human_nats"][usable]) for scores in (a, b))
        found["bits"] = paired_cluster_mean(ours, theirs, a["question"][usable], confidence)
    return found


def _is_right(scores: dict[str, np.ndarray], judge: str) -> np.ndarray:
    """1 where the judge prefers the human's answer, 1/2 where it ties. [N]."""
    human, imitator = scores[f"judge_{judge}_human"], scores[f"judge_{judge}_imitator"]
    return (human > imitator) + 0.5 * (human == imitator)


def verdict(measured: list[Measured]) -> str:
    """In plain words, whether the imitator beat fine-tuning, judge by judge and in bits.

    It ranks only where the paired difference's interval excludes 0; all of them together hold at `CONFIDENCE`.
    """
    imitator, rivals = measured[-1], measured[1:-1]
    num_comparisons = len(rivals) * (len(imitator.judges) + 1)
    confidence = 1 - (1 - CONFIDENCE) / num_comparisons
    compared = {rival.system.name: differences(imitator, rival, confidence) for rival in rivals}
    sentences = []
    for judge in imitator.judges:
        own = imitator.report[f"paired_accuracy/{judge}"].value
        if own is None:
            sentences.append(f"The {judge} judge could not be measured.")
            continue
        words = ("is harder to tell from the human than", "is easier to tell from the human than")
        against = {name: found[judge] for name, found in compared.items() if judge in found}
        sentences.append(f"To the {judge} judge, the imitator ({own:.3f}) {_ranked(against, words, 3)}.")
    bits = imitator.report["bits_per_answer"].value
    if bits is not None:
        against = {name: found["bits"] for name, found in compared.items() if "bits" in found}
        words = ("surprise it less than", "surprise it more than")
        sentences.append(f"Human answers cost it {bits:.1f} bits: they {_ranked(against, words, 1)}.")
    sentences.append(
        f"Paired over the same questions; these {num_comparisons} intervals hold together at {CONFIDENCE:.0%}."
    )
    return "\n".join(sentences)


def verdict_on_resampling(resampled: Resampled) -> str:
    """In plain words, whether keeping one of several answers beat single draws on the same questions."""
    kept, single = resampled
    confidence = 1 - (1 - CONFIDENCE) / (len(kept.judges) + 1)
    sentences = [
        f"Where the distinguisher keeps one of {kept.system.resample} answers, on {len(kept.scores['question'])} of "
        f"the questions, against single draws there (all intervals together at {CONFIDENCE:.0%}):"
    ]
    for name, found in differences(kept, single, confidence).items():
        low, high = found.interval
        what, digits = ("bits of a human answer", 2) if name == "bits" else (f"the {name} judge is right", 3)
        words = ("fewer", "more") if name == "bits" else ("less often", "more often")
        certain = words[0] if high < 0 else words[1] if low > 0 else "which way is not certain"
        sentences.append(f"* {what}: {found.value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], {certain}.")
    return "\n".join(sentences)


def _ranked(against: dict[str, ClusterEstimate], words: tuple[str, str], digits: int) -> str:
    """Better than all, worse than those named, or neither, with the differences that say so."""

    def told(name: str) -> str:
        value, (low, high) = against[name].value, against[name].interval
        return f"'{name}' (difference {value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"

    if not against:
        return "cannot be compared: no fine-tuned system could be measured"
    worse = [name for name, found in against.items() if found.interval.low > 0]
    not_better = [name for name, found in against.items() if found.interval.high >= 0]
    if worse:
        return f"{words[1]} {' and '.join(map(told, worse))}"
    if not_better:
        return f"cannot be ranked against {' and '.join(map(told, not_better))}"
    return f"{words[0]} {' and '.join(map(told, against))}"


# --- for files and pictures

_KEPT = ("paired_accuracy/", "tv_lower/", "judge_bits/", "e_value/", "bits_per_answer", "length_ratio")


def _as_json(m: Measured) -> dict[str, Any]:
    findings = [finding.to_dict() for finding in m.report.findings if finding.name.startswith(_KEPT)]
    told = {"system": m.system.name, "temperature": m.system.temperature, "resample": m.system.resample}
    return {**told, "num_rows": len(m.scores["question"]), "findings": findings}


def _as_figure_row(m: Measured) -> dict[str, Any]:
    accuracies = {judge: m.report[f"paired_accuracy/{judge}"] for judge in m.judges}
    bits = m.report["bits_per_answer"]
    return {
        "name": m.system.name,
        "judge_accuracies": {
            judge: (f.value, *(f.interval or (f.value, f.value)))
            for judge, f in accuracies.items()
            if f.value is not None
        },
        "bits_per_answer": bits.value,
        "bits_interval": bits.interval,
        "length_ratio": m.report["length_ratio"].value,
    }
