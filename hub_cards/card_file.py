"""A card written again from the repository's own files: `imitation.json`, `audit/audit.json`, figures.

The files may be anybody's: every field is checked, and nothing in them is run, followed or taken for Markdown.
"""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_imitate.audits.report import AuditReport
from hf_imitate.hub_cards.facts import CardFacts, CardMetric, Paper, Sample, hub_id_or_none, is_figure
from hf_imitate.hub_cards.licenses import license_note
from hf_imitate.hub_cards.model_card import render_card
from hf_imitate.strict_json import StrictJSONError, read_json

logger = logging.getLogger(__name__)

FACTS_FILE, CARD_KEY = "imitation.json", "card"
STALE_AUDITS = "stale_audits"
"""Under `CARD_KEY`: the plan hashes of audits that were made of other weights than the folder's."""
EARLIER_AUDIT = "An audit of earlier weights of this run is not shown: what it found was not found of these."
MAX_FILE_BYTES = 16 * 2**20
MAX_POINTS = 100
"""Points of one training curve that are kept."""

_STRING = (str,)
_OPTIONAL = (str, type(None))
_NUMBER = (int, float)
# Fields that are stored as they are, with the type each must have.
_KINDS: dict[str, tuple[type, ...]] = {
    "model_name": _STRING,
    "objective": _STRING,
    **dict.fromkeys(("repo_id", "base_model", "started_from", "dataset_name", "answered_by", "license"), _OPTIONAL),
    "engine": _OPTIONAL,
    **dict.fromkeys(("is_conversational", "thinks_first"), (bool,)),
}
_LISTS = ("tags", "check_names", "limits")
_TO_COME = ("is_adapter", "has_distinguisher")


def facts_to_json(facts: CardFacts) -> dict[str, Any]:
    """
    Write what only the card says as plain JSON, for the key `card` of `imitation.json`.

    Settings, versions and counts stand in `imitation.json` itself; audit, figures and kind of weights are read from
    the folder. Of a local base, adapter or data set the last part of its path is kept.

    Args:
        facts ([`CardFacts`]):
            Facts of one imitator.

    Returns:
        `dict[str, Any]`.
    """
    paths = ("base_model", "started_from", "dataset_name")
    local = {name: _without_folders(getattr(facts, name)) for name in paths}
    return {
        **{name: getattr(facts, name) for name in (*_KINDS, *_TO_COME)},
        **local,
        **{name: list(getattr(facts, name)) for name in _LISTS},
        "papers": [dataclasses.asdict(paper) for paper in facts.papers],
        "metrics": {name: _metric_to_json(metric) for name, metric in facts.metric_rows},
        "curves": {
            name: [[step, _to_json(value)] for step, value in _thinned(points)] for name, points in facts.curve_rows
        },
        "generation": dict(facts.generation),
        "samples": [list(sample) for sample in facts.samples],
    }


def read_facts(folder: str | Path, with_audit: bool = True) -> CardFacts:
    """
    Read what a repository's files say about its imitator.

    Args:
        folder (`str` or `Path`):
            A trainer's `output_dir`, or a downloaded repository.
        with_audit (`bool`, *optional*, defaults to `True`):
            Read `audit/`, too, where it is there and of these weights.

    Returns:
        [`CardFacts`].

    Raises:
        FileNotFoundError: there is no `imitation.json`.
        ValueError: a file is not what it should be; the message names file and field, not its words.
    """
    folder = Path(folder)
    file = folder / FACTS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no `{FACTS_FILE}`, which the trainers write; a card says nothing that is not in it."
        )
    stored = _read_json(file)
    card = _part(stored, CARD_KEY, dict, {})
    counts = _part(stored, "dataset", dict, {})
    known: dict[str, Any] = {
        "model_name": folder.resolve().name,
        "objective": _part(stored, "objective", str, "not stated"),
        "check_names": _texts(stored, "checks"),
        "base_model": _part(stored, "base_model", str, None),
        "completion_role": _part(stored, "completion_role", str, "assistant"),
    }
    if known["base_model"] is not None and _part(stored, "base_is_local", bool, False):
        known["base_model"] = _without_folders(f"./{known['base_model']}")
    for name, kinds in _KINDS.items():
        if name in card:
            known[name] = _checked(card[name], kinds, f"card.{name}")
    known |= {name: _texts(card, name) for name in _LISTS if name in card}
    if "limits" in known:  # said when the card is rendered, and only as long as it is true
        known["limits"] = tuple(limit for limit in known["limits"] if limit != EARLIER_AUDIT)
    known["thinks_first"] = known.get("thinks_first", stored.get("objective") == "latent")
    if "generation" in card:
        known["generation"] = _plain_values(card, "generation")
    known |= _found(folder, card)
    stale = _texts(card, STALE_AUDITS)
    if with_audit and (folder / "audit" / "audit.json").is_file() and audit_hash(folder) not in stale:
        known["audit"] = AuditReport.load(folder / "audit")
        known["figures"] = _figures(folder)
    return CardFacts(
        **known,
        base_revision=_part(stored, "base_revision", str, None),
        num_rows=_count(counts, "num_rows"),
        num_labelled=_count(counts, "num_labelled"),
        settings=_plain_values(stored, "settings"),
        versions={name: str(value) for name, value in _plain_values(stored, "versions").items()},
        papers=tuple(_paper(item) for item in _part(card, "papers", list, [])),
        metrics={name: _metric(item) for name, item in _part(card, "metrics", dict, {}).items()},
        curves={name: _curve(item) for name, item in _part(card, "curves", dict, {}).items()},
        samples=tuple(_sample(item) for item in _part(card, "samples", list, [])),
    )


def write_card(folder: str | Path, with_audit: bool = True, **changes: Any) -> Path:
    """
    Render README.md from the files of a repository.

    Args:
        folder (`str` or `Path`):
            A trainer's `output_dir`, or a downloaded repository; `imitation.json` is needed.
        with_audit (`bool`, *optional*, defaults to `True`):
            Say what `audit/` says, where it is there and of these weights.
        changes:
            Fields of [`CardFacts`] that are known better, such as `license="mit"`; they are kept in `imitation.json`.

    Returns:
        `Path` of README.md.

    Raises:
        FileNotFoundError, ValueError: as [`read_facts`]; or `license` names none.
    """
    folder = Path(folder)
    facts = read_facts(folder, with_audit)
    note = None if changes.get("license") is None else license_note(changes["license"])
    if note is not None:
        logger.warning(note)
    if changes:
        facts = dataclasses.replace(facts, **changes)
        stale = {STALE_AUDITS: list(stale_audits(folder))}
        stored = {**_read_json(folder / FACTS_FILE), CARD_KEY: {**facts_to_json(facts), **stale}}
        write_facts(folder, stored)
    if has_stale_audit(folder):
        facts = dataclasses.replace(facts, limits=(*facts.limits, EARLIER_AUDIT))
    path = folder / "README.md"
    render_card(facts).save(str(path))
    return path


def audit_hash(folder: Path) -> str | None:
    """The plan hash of the audit in a repository, or `None` where there is none that can be read."""
    file = folder / "audit" / "audit.json"
    try:
        plan_hash = _read_json(file).get("plan_hash") if file.is_file() else None
    except ValueError:
        return None
    return plan_hash if isinstance(plan_hash, str) else None


def stale_audits(folder: Path) -> tuple[str, ...]:
    """
    Plan hashes of audits that a repository says were made of other weights.

    Raises:
        ValueError: `imitation.json` is not what it should be.
    """
    file = folder / FACTS_FILE
    return _texts(_part(_read_json(file), CARD_KEY, dict, {}), STALE_AUDITS) if file.is_file() else ()


def has_stale_audit(folder: Path) -> bool:
    """Whether `audit/` speaks of other weights than the repository's."""
    return audit_hash(folder) in stale_audits(folder)


def write_facts(folder: Path, stored: Mapping[str, Any]) -> None:
    """Write `imitation.json`, the whole file or none: without it nobody knows the law of an imitator."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stored, indent=2, ensure_ascii=False, allow_nan=False)
    # A lone surrogate in somebody's string is no UTF-8; its escape is.
    text = re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    unfinished = folder / f"_unfinished-{os.getpid()}-{FACTS_FILE}"  # of a name that is never pushed
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, folder / FACTS_FILE)
    finally:
        unfinished.unlink(missing_ok=True)


def _without_folders(name: str | None) -> str | None:
    if name is None or hub_id_or_none(name) is not None:
        return name
    # Of a name that no file can have, `Path.exists` is an error.
    if not re.search(r"[\\/]", name) and not os.path.exists(name):
        return name
    # "./" keeps it from being taken for a model of the Hub.
    return "./" + re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def _thinned(points: Any) -> list[tuple[int, float]]:
    points = list(points)
    if len(points) <= MAX_POINTS:
        return points
    return [points[i * (len(points) - 1) // (MAX_POINTS - 1)] for i in range(MAX_POINTS)]


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _metric_to_json(metric: CardMetric) -> list[Any]:
    ends = None if metric.interval is None else [_to_json(end) for end in metric.interval]
    return [_to_json(metric.value), metric.unit, ends]


def _found(folder: Path, card: Mapping[str, Any]) -> dict[str, bool]:
    """What lies in the folder; where no weights do yet, what is to come."""
    is_adapter, beside = (folder / "adapter_config.json").is_file(), (folder / "distinguisher").is_dir()
    if is_adapter or (folder / "config.json").is_file():
        return {"is_adapter": is_adapter, "has_distinguisher": beside}
    return {name: _part(card, name, bool, False) for name in _TO_COME}


def _figures(folder: Path) -> tuple[str, ...]:
    found = (path for path in sorted((folder / "audit").glob("*.png")) if path.is_file() and not path.is_symlink())
    return tuple(name for path in found if is_figure(name := f"audit/{path.name}"))


# --- reading what may be anybody's


def _read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"`{file.name}` has more than {MAX_FILE_BYTES:,} bytes; the facts of a run are far fewer.")
    try:
        values = read_json(file)
    except StrictJSONError as error:
        raise ValueError(f"`{file.name}` {error}. Load the repo again.") from None
    return _checked(values, (dict,), "the whole")


def _checked(value: Any, kinds: tuple[type, ...], name: str) -> Any:
    # A bool passes for an int in Python, and for nothing else here.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        needed = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"`{FACTS_FILE}`: {name} is a {type(value).__name__}; it must be {needed}.")
    return value


def _part(values: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = values.get(name)
    return default if value is None else _checked(value, (kind,), name)


def _count(values: Mapping[str, Any], name: str) -> int | None:
    count = _part(values, name, int, None)
    if count is not None and not 0 <= count < 2**53:
        raise ValueError(f"`{FACTS_FILE}`: {name} counts rows and lies outside what can be counted.")
    return count


def _texts(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return tuple(_checked(item, _STRING, name) for item in _part(values, name, list, []))


def _plain_values(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    kinds = (str, int, float, bool, list, dict, type(None))
    return {key: _checked(item, kinds, name) for key, item in _part(values, name, dict, {}).items()}


def _number(value: Any, name: str) -> float:
    if value in ("inf", "-inf", "nan"):
        return float(value)
    number = _checked(value, _NUMBER, name)
    if isinstance(number, int) and abs(number) >= 2**53:
        raise ValueError(f"`{FACTS_FILE}`: {name} is larger than anything that is measured.")
    return number


def _row(value: Any, length: int, name: str) -> list[Any]:
    row = _checked(value, (list,), name)
    if len(row) != length:
        raise ValueError(f"`{FACTS_FILE}`: an entry of {name} has {len(row)} parts; it must have {length}.")
    return row


def _metric(item: Any) -> CardMetric:
    value, unit, ends = _row(item, 3, "metrics")
    interval = None if ends is None else _row(ends, 2, "metrics")
    return CardMetric(
        None if value is None else _number(value, "metrics"),
        _checked(unit, _STRING, "metrics"),
        None if interval is None else (_number(interval[0], "metrics"), _number(interval[1], "metrics")),
    )


def _curve(item: Any) -> tuple[tuple[int, float], ...]:
    rows = [_row(point, 2, "curves") for point in _checked(item, (list,), "curves")]
    if len(rows) > MAX_POINTS:
        raise ValueError(f"`{FACTS_FILE}`: a curve has more than {MAX_POINTS} points.")
    return tuple((_checked(step, (int,), "curves"), _number(value, "curves")) for step, value in rows)


def _paper(item: Any) -> Paper:
    given = _checked(item, (dict,), "papers")
    return Paper(
        **{name: _checked(given.get(name), _STRING, f"papers.{name}") for name in ("title", "id", "citation")}
    )


def _sample(item: Any) -> Sample:
    question, answer = _row(item, 2, "samples")
    return Sample(_checked(question, _STRING, "samples"), _checked(answer, _STRING, "samples"))
