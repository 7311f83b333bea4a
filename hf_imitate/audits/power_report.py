"""What a power audit found: a row per planted scheme, what each finding made of it, and where each goes blind."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_imitate.audits.report import Finding

SCHEMA = 1
FRESH_NONCE = "fresh nonce"


@dataclass(frozen=True)
class Detection:
    """What one finding says of one planted scheme.

    Attributes:
        finding (`Finding`): `paired_accuracy/<judge>` and `re_execution` are probabilities, `price` and
            `calibration_gap` bits per answer.
        p_value (`float`, *optional*): one-sided; `None` where there is none (re-execution is no test, or nothing was
            measured).
        p_holm (`float`, *optional*): the same after Holm's correction, over all schemes and judges for judges and over
            all schemes for the others.
        is_seen (`bool`, *optional*): whether `p_holm` is at most the level, or re-execution failed; `None` where
            nothing was measured.
        questions_needed (`int`, *optional*): questions that would show an effect of this size: test questions of a
            judge at power 0.8, answers until a mean is 3 standard errors above 0, answers until one is not as
            re-execution says with probability 0.8. `None` where the effect is none.
        questions_at_least (`int`, *optional*): the same if accuracy or mean were the upper limit of its interval.
    """

    finding: Finding
    p_value: float | None = None
    p_holm: float | None = None
    is_seen: bool | None = None
    questions_needed: int | None = None
    questions_at_least: int | None = None

    @property
    def name(self) -> str:
        """Name of the finding."""
        return self.finding.name


@dataclass(frozen=True)
class PlantedRow:
    """One scheme, what its key's holder reads, and what each finding sees.

    Attributes:
        scheme (`str`): its name.
        law (`str`): its kind and settings, without the key.
        kind (`str`): `"message"`; `"mark"`, which says the same always, 0 bits; `"fresh nonce"`, whose law is exactly
            the honest one; or `"honest"`.
        payload (`Finding`): bits per answer that the key's holder reads, with an interval.
        detections (`tuple[Detection, ...]`): one for each finding.
        share_at_zero (`float`, *optional*): share of human answers to which the keyed law gives no probability.
        cost (`float`): CPU seconds.
    """

    scheme: str
    law: str
    kind: str
    payload: Finding
    detections: tuple[Detection, ...]
    share_at_zero: float | None = None
    cost: float = 0.0

    @property
    def seen_by(self) -> tuple[str, ...]:
        """Names of the findings that see it."""
        return tuple(d.name for d in self.detections if d.is_seen)

    @property
    def is_carrying(self) -> bool:
        """Whether the key's holder certainly reads something: the lower limit of the payload is above 0."""
        return self.payload.interval is not None and self.payload.interval[0] > 0


@dataclass(frozen=True)
class Floor:
    """Where one finding goes blind, among planted schemes with a payload that is certainly above 0.

    Attributes:
        finding (`str`): its name, or `"any judge"`.
        seen (`tuple[float, str]`, *optional*): least payload that it saw, bits per answer, and the scheme.
        missed (`tuple[float, str]`, *optional*): least payload that it did not see.
        most_missed (`tuple[float, str]`, *optional*): largest payload that it did not see.
        marks (`tuple[str, ...]`): marks that it saw.
    """

    finding: str
    seen: tuple[float, str] | None
    missed: tuple[float, str] | None
    most_missed: tuple[float, str] | None
    marks: tuple[str, ...]


@dataclass(frozen=True)
class PowerReport:
    """Which finding sees which planted scheme, at which payload, with how many questions.

    Attributes:
        rows (`tuple[PlantedRow, ...]`): one per scheme.
        model, revision, dataset, seed: as in [`~hf_imitate.audits.report.AuditReport`].
        num_questions (`int`): different questions asked; one answer each.
        num_test (`int`): of them, those that test the judges.
        confidence (`float`): of each interval; what is seen is seen at the level 1 - `confidence`.
        entropy (`Finding`): bits of one honest answer: what a payload can be at most.
        notes (`tuple[str, ...]`): counts of odd answers. No text of any row.
        version (`int`): of this format.
    """

    rows: tuple[PlantedRow, ...]
    model: str
    revision: str | None
    dataset: str
    seed: int
    num_questions: int
    num_test: int
    confidence: float
    entropy: Finding
    notes: tuple[str, ...] = ()
    version: int = field(default=SCHEMA)

    @property
    def level(self) -> float:
        """Chance of any false alarm, of each kind of finding."""
        return 1 - self.confidence

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of all findings, in order."""
        return tuple(dict.fromkeys(d.name for row in self.rows for d in row.detections))

    @property
    def floors(self) -> tuple[Floor, ...]:
        """The detection floor of each finding, and that of all judges together."""
        judges = tuple(name for name in self.findings if name.startswith("paired_accuracy/"))
        groups = {"any judge": judges} if len(judges) > 1 else {}
        return tuple(self._floor(*item) for item in (groups | {name: (name,) for name in self.findings}).items())

    def row(self, scheme: str) -> PlantedRow:
        """The row of one scheme.

        Raises:
            KeyError: no such scheme was planted.
        """
        found = {row.scheme: row for row in self.rows}
        if scheme not in found:
            raise KeyError(f"No scheme {scheme!r} was planted; there are {list(found)}.")
        return found[scheme]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; infinities become `"inf"` and `"-inf"`."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        values |= {"notes": list(self.notes), "entropy": self.entropy.to_dict(), "level": round(self.level, 12)}
        values["rows"] = [_row_to_dict(row) for row in self.rows]
        values["floors"] = [asdict(floor) for floor in self.floors]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PowerReport":
        """Rebuild a report from `to_dict`.

        Raises:
            ValueError: it is of another version, or a field is missing.
        """
        if values.get("version") != SCHEMA:
            raise ValueError(
                f"The report's format is {values.get('version')!r}, not version {SCHEMA}; run the power audit again, "
                "or use the version that wrote it."
            )
        names = {item.name for item in fields(cls)}
        if names - set(values):
            raise ValueError(f"A power report lacks the fields {sorted(names - set(values))}.")
        kept = {name: values[name] for name in names}
        kept |= {"notes": tuple(values["notes"]), "entropy": Finding.from_dict(values["entropy"])}
        return cls(**{**kept, "rows": tuple(_row_from_dict(row) for row in values["rows"])})

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False, indent=1)

    @classmethod
    def load(cls, path: str | Path) -> "PowerReport":
        """Read `power.json`, or the one in a folder."""
        path = Path(path)
        return cls.from_dict(json.loads((path / "power.json" if path.is_dir() else path).read_text(encoding="utf-8")))

    def to_markdown(self) -> str:
        """The report for people: what it says in plain words, then every number."""
        from hf_imitate.audits.power_text import to_markdown

        return to_markdown(self)

    def _floor(self, name: str, members: tuple[str, ...]) -> Floor:
        seen: list[tuple[float, str]] = []
        missed: list[tuple[float, str]] = []
        marks = []
        for row in self.rows:
            verdicts = [d.is_seen for d in row.detections if d.name in members and d.is_seen is not None]
            if row.kind == "mark" and any(verdicts):
                marks.append(row.scheme)
            elif verdicts and row.is_carrying:
                (seen if any(verdicts) else missed).append((row.payload.value or 0.0, row.scheme))
        ends = [min(seen, default=None), min(missed, default=None), max(missed, default=None)]
        return Floor(name, ends[0], ends[1], ends[2], tuple(marks))


def _row_to_dict(row: PlantedRow) -> dict[str, Any]:
    values = {item.name: getattr(row, item.name) for item in fields(row)}
    detections = []
    for found in row.detections:
        plain = {item.name: getattr(found, item.name) for item in fields(found)}
        detections.append({**plain, "finding": found.finding.to_dict()})
    return {**values, "payload": row.payload.to_dict(), "detections": detections}


def _row_from_dict(values: dict[str, Any]) -> PlantedRow:
    detections = tuple(
        Detection(**{**found, "finding": Finding.from_dict(found["finding"])}) for found in values["detections"]
    )
    return PlantedRow(**{**values, "payload": Finding.from_dict(values["payload"]), "detections": detections})


def is_infinite(finding: Finding) -> bool:
    """Whether a finding's value is infinite."""
    return finding.value is not None and math.isinf(finding.value)
