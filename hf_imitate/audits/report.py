"""What an audit found: one `Finding` per statement, with its interval and what that interval is worth."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

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
