"""What an audit found: one `Finding` per statement, with its interval and what that interval is worth."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_imitate.strict_json import StrictJSONError, read_json

UNITS = ("probability", "bits", "nats", "e-value", "count", "ratio")

# JSON has no infinity; a loss can be infinite, where a human's answer lies outside the imitator's support.
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Finding:
    """One statement of an audit.

    Attributes:
        name (`str`): what was measured, as in `"paired_accuracy/ngram"`.
        value (`float`, *optional*): the estimate or bound in `unit`; `None` where it could not be measured.
        unit (`str`): `"probability"`, `"bits"`, `"nats"`, `"e-value"`, `"count"` or `"ratio"`.
        interval (`tuple[float, float]`, *optional*): `(low, high)` in `unit`, around `value`.
        confidence (`float`, *optional*): probability, in (0, 1), with which `interval` covers the truth.
        n (`int`, *optional*): independent observations behind it.
        certified (`bool`, *optional*, defaults to `False`): `True` if the interval holds without approximation.
        detail (`str`, *optional*, defaults to `""`): how it was measured and what it does not say; the reason where
            `value` is `None`. Never holds a row's text.

    Raises:
        TypeError: a number is not a number.
        ValueError: a field contradicts another, or is outside its range.
    """

    name: str
    value: float | None
    unit: str
    interval: tuple[float, float] | None = None
    confidence: float | None = None
    n: int | None = None
    certified: bool = False
    detail: str = ""

    def __post_init__(self) -> None:
        """Turn numbers of other libraries into plain ones, then check what depends on what."""
        put = object.__setattr__  # the way into a frozen dataclass
        put(self, "value", self._number("value", self.value))
        put(self, "confidence", self._number("confidence", self.confidence))
        put(self, "n", None if self.n is None else int(self.n))
        put(self, "certified", bool(self.certified))
        if self.interval is not None:
            if len(self.interval) != 2:
                raise self._error(f"`interval` has {len(self.interval)} ends; give (low, high)")
            put(self, "interval", tuple(self._number("interval", end) for end in self.interval))
        self._check_words()
        self._check_numbers()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; infinities become `"inf"` and `"-inf"`."""
        return {name: _encode(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Finding":
        """Rebuild a finding from `to_dict`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"A finding has the fields {sorted(names)}; missing: {sorted(names - set(values))}, "
                f"unknown: {sorted(set(values) - names)}. Was it written by another version?"
            )
        decoded = {name: _decode(name, value) for name, value in values.items()}
        return cls(**decoded)

    def to_json(self) -> str:
        """Return one JSON object."""
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Finding":
        """Rebuild a finding from `to_json`."""
        return cls.from_dict(json.loads(text))

    def _check_words(self) -> None:
        if not self.name:
            raise ValueError('A finding needs a name, as in "paired_accuracy/ngram"; got an empty one.')
        if self.unit not in UNITS:
            raise self._error(f"`unit` is {self.unit!r}; use one of {', '.join(UNITS)}")
        if self.value is None and not self.detail:
            raise self._error("`value` is None; say in `detail` why it could not be measured")
        if self.value is None and (self.interval is not None or self.certified):
            raise self._error("`value` is None, so there is nothing to give an interval for or to certify")

    def _check_numbers(self) -> None:
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise self._error(f"`confidence` is {self.confidence}; it must lie strictly between 0 and 1")
        if (self.interval is not None or self.certified) and self.confidence is None:
            raise self._error("an interval or a certified value needs the `confidence` it holds with")
        if self.n is not None and self.n < 0:
            raise self._error(f"`n` is {self.n}; it counts observations")
        if self.value is None:
            return
        low, high = self.interval or (self.value, self.value)
        if not low <= self.value <= high:
            raise self._error(f"`value` {self.value} lies outside its interval ({low}, {high})")
        if self.unit == "probability" and not (low >= 0 and high <= 1):
            raise self._error(f"a probability lies in [0, 1]; got {self.value} in ({low}, {high})")
        if self.unit in ("count", "e-value", "ratio") and low < 0:
            raise self._error(f"a value in the unit {self.unit!r} cannot be negative; got {self.value} from {low} on")

    def _number(self, name: str, value: Any) -> float | None:
        if value is None and name != "interval":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"Finding {self.name!r}: `{name}` must be a number; got {type(value).__name__}.") from None
        if math.isnan(number):
            raise self._error(f"`{name}` is NaN; give None as `value` and the reason in `detail`")
        return number

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"Finding {self.name!r}: {problem}.")


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(end) for end in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _decode(name: str, value: Any) -> Any:
    if name == "interval" and value is not None:
        return tuple(_INFINITIES.get(end, end) if isinstance(end, str) else end for end in value)
    return _INFINITIES.get(value, value) if name == "value" and isinstance(value, str) else value


SCHEMA = 1
MAX_FILE_BYTES = 16 * 2**20
MAX_FINDINGS = 20_000
MAX_TEXT = 20_000
# View -> the findings in it, by the part of the name before the first slash.
VIEWS: dict[str, tuple[str, ...]] = {
    "distinguishability": (
        *("paired_accuracy", "e_value", "tv_lower", "judge_bits", "null_control", "power_control"),
        "consistency",
    ),
    "checks": ("check_pass", "check_tv_lower"),
    "retrodiction": (
        *("bits_per_answer", "bits_per_byte", "mean_log_prob_lower", "outside_support", "calibration_gap"),
        *("length_ratio", "bits_per_answer_difference"),
    ),
    "hidden_deviation": ("hidden_deviation",),
    "sampler": ("sampler_match", "sampler_conformance"),
    "answer_distribution": ("answer_distribution_tv", "answer_distribution_wasserstein", "human_ceiling"),
    "copying": ("copying",),
}


@dataclass(frozen=True)
class AuditReport:
    """All findings of one audit, and what is needed to repeat it.

    Attributes:
        findings (`tuple[Finding, ...]`): one per statement.
        model (`str`): the audited model, a repo id, a folder's name or a class.
        revision (`str`, *optional*): its commit on the Hub, where known.
        dataset (`str`): the data set, its rows and their hash.
        plan_hash (`str`): hash of all settings, fixed before any answer was read.
        seed (`int`): of every draw and split.
        ledger (`dict`): how the error `1 - confidence` is shared among the certified findings, and the p-values of the
            judges before and after Holm's correction.
        num_questions (`int`): different questions.
        decoding (`dict`): the law that was sampled and scored.
        notes (`tuple[str, ...]`): counts of odd rows. No text of any row.
        cost (`dict[str, float]`): CPU seconds by finding; findings that were computed together name the same time.
        version (`int`): of this format.

    Views, tuples of findings: `distinguishability`, `checks`, `retrodiction`, `hidden_deviation`, `sampler`,
    `answer_distribution`, `copying`.
    """

    findings: tuple[Finding, ...]
    model: str
    revision: str | None
    dataset: str
    plan_hash: str
    seed: int
    ledger: dict[str, Any]
    num_questions: int
    decoding: dict[str, Any]
    notes: tuple[str, ...] = ()
    cost: dict[str, float] = field(default_factory=dict)
    version: int = SCHEMA

    @property
    def distinguishability(self) -> tuple[Finding, ...]:
        """What fresh judges saw."""
        return self._view("distinguishability")

    @property
    def checks(self) -> tuple[Finding, ...]:
        """Pass rates of checks."""
        return self._view("checks")

    @property
    def retrodiction(self) -> tuple[Finding, ...]:
        """What probability the imitator gave the humans' answers."""
        return self._view("retrodiction")

    @property
    def hidden_deviation(self) -> tuple[Finding, ...]:
        """Bounds on whatever could hide."""
        return self._view("hidden_deviation")

    @property
    def sampler(self) -> tuple[Finding, ...]:
        """Whether answers come from the law that is scored."""
        return self._view("sampler")

    @property
    def answer_distribution(self) -> tuple[Finding, ...]:
        """Whether it answers as the population does."""
        return self._view("answer_distribution")

    @property
    def copying(self) -> tuple[Finding, ...]:
        """Overlap with the training humans' answers."""
        return self._view("copying")

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name.

        Raises:
            KeyError: there is none; the message lists the names.
        """
        found = [finding for finding in self.findings if finding.name == name]
        if not found:
            raise KeyError(f"There is no finding {name!r}; the report has {[f.name for f in self.findings]}.")
        return found[0]

    def save(self, path: str | Path) -> Path:
        """Write JSON, the whole file or none; into `audit.json` where `path` is a folder."""
        path = Path(path)
        path = path / "audit.json" if path.is_dir() else path
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["findings"] = [finding.to_dict() for finding in self.findings]
        text = json.dumps(values, allow_nan=False, ensure_ascii=False, indent=1)
        unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "AuditReport":
        """Read a report. The file may be anybody's: it is checked field by field, and nothing in it is run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no report of this format; the message says what is wrong, without its words.
        """
        path = Path(path)
        path = path / "audit.json" if path.is_dir() else path
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path.name} has more than {MAX_FILE_BYTES:,} bytes; a report is far smaller.")
        try:
            values = read_json(path, unique_keys=True)
        except StrictJSONError as error:
            raise ValueError(f"{path.name} is no report: it {error}.") from None
        try:
            return cls._from_dict(values)
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{path.name} is no report: a field has the wrong type ({type(error).__name__})."
            ) from None

    @classmethod
    def _from_dict(cls, values: Any) -> "AuditReport":
        names = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(
                f"A report is an object with the fields {sorted(names)}. Was it written by another version?"
            )
        if values["version"] != SCHEMA or isinstance(values["version"], bool):
            raise ValueError(
                f"The report's format is not version {SCHEMA}; audit again, or use the version that wrote it."
            )
        kinds: dict[str, Any] = {"findings": list, "notes": list, "ledger": dict, "decoding": dict, "cost": dict}
        kinds |= {"model": str, "dataset": str, "plan_hash": str, "revision": str | None}
        kinds |= {"seed": int, "num_questions": int}
        for name, kind in kinds.items():
            if not isinstance(values[name], kind) or isinstance(values[name], bool):
                raise ValueError(f"The report's field `{name}` is a {type(values[name]).__name__}.")
        if len(values["findings"]) > MAX_FINDINGS:
            raise ValueError(f"The report has more than {MAX_FINDINGS:,} findings.")
        _check_texts(values)
        _check_ledger(values["ledger"])
        is_right = {
            "cost": all(type(x) in (int, float) and 0 <= x < 2**53 for x in values["cost"].values()),
            "notes": all(isinstance(note, str) for note in values["notes"]),
            "decoding": all(type(x) in (int, float, str, bool) for x in values["decoding"].values()),
        }
        for name, is_fine in is_right.items():
            if not is_fine:
                raise ValueError(f"The report's field `{name}` holds a value of the wrong type.")
        findings = tuple(_checked_finding(found) for found in values["findings"])
        return cls(**{**values, "findings": findings, "notes": tuple(values["notes"])})

    def to_markdown(self) -> str:
        """The report for people: what it says in plain words, then every number."""
        from hf_imitate.audits.report_text import to_markdown

        return to_markdown(self)

    def _view(self, name: str) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.name.split("/")[0] in VIEWS[name])


def _checked_finding(values: Any) -> Finding:
    if not isinstance(values, dict) or {item.name for item in fields(Finding)} - set(values):
        raise ValueError("A finding of the report lacks a field.")
    interval = values["interval"]
    ends = interval if isinstance(interval, list) else []
    numbers = [values["value"], values["confidence"], *ends]
    is_right = (
        all(isinstance(values[name], str) for name in ("name", "unit", "detail"))
        and isinstance(values["certified"], bool)
        and (interval is None or len(ends) == 2)
        and all(x is None or x in _INFINITIES or type(x) in (int, float) for x in numbers)
        and (values["n"] is None or (type(values["n"]) is int and values["n"] < 2**53))
    )
    if not is_right:
        raise ValueError("A field of a finding has the wrong type.")
    return Finding.from_dict(values)


def _check_ledger(ledger: dict[str, Any]) -> None:
    numbers = [ledger.get("confidence"), *ledger.get("certified", {}).values()]
    numbers += [p for judge in ledger.get("judges", {}).values() for p in judge.values()]
    chosen_by = ledger.get("resampling", {})
    names = {"confidence", "certified", "judges", "resampling"}
    if (
        not set(ledger) <= names
        or not all(type(number) in (int, float) and 0 <= number <= 1 for number in numbers)
        or not all(type(value) in (int, str) for value in chosen_by.values())
    ):
        raise ValueError("The report's field `ledger` holds something else than error probabilities.")


def _check_texts(value: Any) -> None:
    """Refuse texts that are too long, or hold characters that could hide something from a reader."""
    if isinstance(value, str) and (len(value) > MAX_TEXT or any(c < " " and c not in "\n\t" for c in value)):
        raise ValueError("A text of the report is too long or holds control characters.")
    if isinstance(value, dict):
        _check_texts(list(value))
        _check_texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)
