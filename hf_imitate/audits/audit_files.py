"""What an audit leaves on disk: report, figures, and numbers per question that stay local."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hf_imitate.audits.evidence import Evidence
from hf_imitate.audits.evidence_cache import write_text
from hf_imitate.audits.figures import plot_e_values, plot_losses, plot_paired_accuracies
from hf_imitate.audits.judge_family import JudgeFamily
from hf_imitate.audits.report import AuditReport
from hf_imitate.audits.splits import QuestionSplit


def write_audit(
    folder: Path, report: AuditReport, evidence: Evidence, family: JudgeFamily, split: QuestionSplit
) -> None:
    """Write `audit.json`, `audit.md`, three figures and `scores.parquet`; one without data is noted."""
    _write_scores(folder / "scores.parquet", evidence, family, split)
    figures: list[tuple[str, Callable[[Path], object]]] = [
        ("paired_accuracy.png", lambda path: plot_paired_accuracies(report.findings, path)),
        ("e_value.png", lambda path: plot_e_values(family.log_e, path)),
        ("losses.png", lambda path: plot_losses(-evidence.human.nats, -evidence.imitator.nats, path)),
    ]
    notes = []
    for name, draw in figures:
        try:
            draw(folder / name)
        except ImportError:
            notes.append(f"{name} was not drawn: matplotlib is not installed.")
        except ValueError:
            notes.append(f"{name} was not drawn: there is nothing to show.")
    report = dataclasses.replace(report, notes=(*report.notes, *notes))
    write_text(folder / "audit.md", report.to_markdown())
    report.save(folder / "audit.json")


def _write_scores(path: Path, evidence: Evidence, family: JudgeFamily, split: QuestionSplit) -> None:
    """Numbers per row: no text, but one person's answer each, so they stay local."""
    num_rows = len(evidence.prompts)
    part = np.full(num_rows, "unused", dtype=object)
    for name, rows in split._asdict().items():
        part[rows] = name
    columns: dict[str, Any] = {"row": np.arange(num_rows) if evidence.row is None else evidence.row}
    columns |= {"question": evidence.question, "part": part.astype(str), "weight": evidence.weight}
    for side, scores in (("human", evidence.human), ("imitator", evidence.imitator)):
        columns |= {f"{side}_{name}": values for name, values in vars(scores).items() if values is not None}
    for judge, scores_of in family.scores.items():
        for place, side in enumerate(("human", "imitator")):
            values = np.full(num_rows, np.nan)
            values[split.test] = scores_of[:, place]
            columns[f"judge_{judge}_{side}"] = values
    # As in the cache: another audit into this folder must not take this one's file away.
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    shows_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        Dataset.from_dict(columns).to_parquet(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
        if shows_bars:
            enable_progress_bars()
