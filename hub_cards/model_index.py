"""An audit's findings as the Hub's `model-index`, which machines read, and back."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from hf_imitate.audits.report import AuditReport, Finding
from hf_imitate.hub_cards.markdown import shortened, visible

_TASK = "text-generation"
_MOST_NAME = 300  # characters of a finding's name
_NOT_KNOWN = "rows that are not known to be on the Hub"


def evaluation_results(report: AuditReport, hub_dataset: str | None) -> list[EvalResult]:
    """
    Write every finding that has a value as an entry of the card's metadata.

    Args:
        report ([`~hf_imitate.AuditReport`]):
            What an audit found.
        hub_dataset (`str`, *optional*):
            Id of the data set of the training on the Hub. Rows of another data set are not said to be of this one;
            which rows were asked, the name says as the report does.

    Returns:
        `list[EvalResult]`: value and name as the Hub knows them; interval, unit, confidence, n and whether it is
        certified as the metric's arguments. Infinities are the strings `"inf"` and `"-inf"`, since JSON has none.
    """
    shared: dict[str, Any] = {
        "task_type": _TASK,
        "task_name": "imitation of human answers",
        "dataset_type": hub_dataset if hub_dataset is not None and _is_of(report, hub_dataset) else _NOT_KNOWN,
        "dataset_name": _shown(report.dataset),
        "dataset_args": {
            "num_questions": report.num_questions,
            "plan_hash": _shown(report.plan_hash),
            "seed": report.seed,
        },
    }
    results = []
    for finding in report.findings:
        stored = finding.to_dict()
        if stored["value"] is None:
            continue
        stated = {key: stored[key] for key in ("unit", "interval", "confidence", "n", "certified")}
        results.append(
            EvalResult(
                **shared,
                metric_type=_shown(finding.name),
                metric_name=_shown(finding.name),
                metric_value=stored["value"],
                metric_args={key: value for key, value in stated.items() if value is not None},
            )
        )
    return results


def _is_of(report: AuditReport, hub_dataset: str) -> bool:
    """Whether the rows came from the data set of this id, which `datasets` calls by its name's last part."""
    names = (report.dataset.partition(",")[0], hub_dataset.rpartition("/")[2])
    # ... in lower case, with marks of its own.
    audited, trained = (re.sub(r"[\W_]", "", name).lower() for name in names)
    return audited == trained


def _shown(name: str) -> str:
    return visible(shortened(name, _MOST_NAME))


def findings_of(card: ModelCard) -> tuple[Finding, ...]:
    """
    Read a card's `model-index` back: the same numbers as in the audit, without the words of `detail`.

    Args:
        card ([`~huggingface_hub.ModelCard`]):
            A card that [`~hf_imitate.hub_cards.model_card.render_card`] wrote, loaded from a file or the Hub.

    Returns:
        `tuple[Finding, ...]`; empty where the card has no audit.

    Raises:
        ValueError: an entry is no finding. A card is anybody's text: nothing in it is trusted.
    """
    findings = []
    # A model card's data has them; the client's own annotation is that of any card.
    results: list[EvalResult] | None = getattr(card.data, "eval_results", None)
    for result in results or []:
        stated = result.metric_args
        if not isinstance(stated, dict):
            raise ValueError(f"The entry {result.metric_type!r} of `model-index` states no unit.")
        values = {"interval": None, "confidence": None, "n": None, "certified": False, "detail": "", **stated}
        try:
            findings.append(Finding.from_dict({"name": result.metric_type, "value": result.metric_value, **values}))
        except TypeError as error:
            raise ValueError(
                f"The entry {result.metric_type!r} of `model-index` is no finding ({type(error).__name__})."
            ) from None
    return tuple(findings)
