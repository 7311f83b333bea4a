"""What a card says of an audit: sentences, rows and gaps, ready for the template; pure."""

import dataclasses
import re
from typing import NamedTuple

from hf_imitate.audits.report import AuditReport, Finding
from hf_imitate.audits.report_text import summary
from hf_imitate.hub_cards.markdown import markdown_code, markdown_text

MOST_ROWS = 200
"""Findings in the card's table; the rest stand in `audit/audit.json`."""

# Parts of a finding's name that the audit itself wrote, at its end.
_SIDES = ("human", "imitator")


_SAID_ALREADY = "Not measured: "


class Gap(NamedTuple):
    """Findings that could not be measured, all for one reason."""

    names: tuple[str, ...]
    reason: str


class AuditSection(NamedTuple):
    """
    An audit as the card shows it.

    Args:
        sentences (`tuple[str, ...]`): what it says in plain words, in Markdown, escaped.
        rows (`tuple[Finding, ...]`): findings with a value, at most `MOST_ROWS`.
        num_left_out (`int`): findings with a value that are not in `rows`.
        gaps (`tuple[Gap, ...]`): findings without one, by their reasons.
        law (`str`): what was sampled and scored.
        confidence (`float`, *optional*): with which all certified findings hold together.
    """

    sentences: tuple[str, ...]
    rows: tuple[Finding, ...]
    num_left_out: int
    gaps: tuple[Gap, ...]
    law: str
    confidence: float | None


def audit_section(report: AuditReport) -> AuditSection:
    """
    Sort an audit into what the card shows.

    Args:
        report ([`~hf_imitate.AuditReport`]):
            Perhaps from a file of anybody's; names in it are shown letter for letter and are nothing else.

    Returns:
        [`AuditSection`].
    """
    measured = [finding for finding in report.findings if finding.value is not None]
    gaps: dict[str, list[str]] = {}
    for finding in [finding for finding in report.findings if finding.value is None][:MOST_ROWS]:
        gaps.setdefault(finding.detail.removeprefix(_SAID_ALREADY), []).append(finding.name)
    return AuditSection(
        sentences=tuple(_sentences(report)),
        rows=tuple(measured[:MOST_ROWS]),
        num_left_out=max(0, len(measured) - MOST_ROWS),
        gaps=tuple(Gap(tuple(names), reason) for reason, names in gaps.items()),
        law=", ".join(f"{name} {value}" for name, value in report.decoding.items()),
        confidence=report.ledger.get("confidence"),
    )


def _sentences(report: AuditReport) -> list[str]:
    """The summary, with names taken out before it is written and put back escaped."""
    names = list(dict.fromkeys(name for finding in report.findings if (name := _own_name(finding.name))))
    # A word that stands nowhere else: what is put in has to be found again.
    stand_in = {name: f"NAME{number}OF{len(names)}" for number, name in enumerate(names)}
    plain = dataclasses.replace(
        report,
        findings=tuple(
            dataclasses.replace(finding, name=_with_name(finding.name, stand_in)) for finding in report.findings
        ),
        ledger={
            **report.ledger,
            "judges": {stand_in.get(name, ""): p for name, p in report.ledger.get("judges", {}).items()},
        },
    )
    shown = {word: name for name, word in stand_in.items()}

    def put_back(match: re.Match) -> str:
        name = shown[match["word"]]
        return markdown_code(name) if match["tick"] else markdown_text(name)

    pattern = re.compile(rf"(?P<tick>`?)(?P<word>NAME\d+OF{len(names)})`?")
    return [pattern.sub(put_back, sentence) for sentence in summary(plain)]


def _own_name(name: str) -> str:
    """The part of a finding's name that a user chose: its judge's or its check's."""
    _, slash, rest = name.partition("/")
    own, last_slash, side = rest.rpartition("/")
    if last_slash and side in _SIDES:
        return own
    return "" if not slash or rest in _SIDES else rest


def _with_name(name: str, stand_in: dict[str, str]) -> str:
    own = _own_name(name)
    if not own:
        return name
    head, _, rest = name.partition("/")
    return f"{head}/{stand_in[own]}{rest[len(own) :]}"
