"""JSON that anybody may have written, read in one way: numbers are finite, and nothing is nested without end."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
"""How deep one object or list may lie in others."""


class StrictJSONError(ValueError):
    """A file is not that. The message goes on from the file's name, and repeats none of its words."""


def read_json(file: Path, *, unique_keys: bool = False) -> Any:
    """Read a file that may be anybody's. How long it may be is for the caller to check.

    Args:
        file (`Path`): where it is.
        unique_keys (`bool`, *optional*, defaults to `False`): refuse an object that gives a key twice.

    Raises:
        FileNotFoundError: there is none.
        StrictJSONError: it is no JSON (`NaN` and `Infinity` are none), a number is larger than floats are, or it is
            nested too deeply.
    """
    pairs = _without_repeats if unique_keys else dict
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise StrictJSONError(f"is not valid JSON ({type(error).__name__})") from None
    if _depth(value) > MAX_DEPTH:
        raise StrictJSONError(f"is nested more than {MAX_DEPTH} deep")
    return value


def children(value: Any) -> Iterable[Any]:
    """What lies directly in an object or a list."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _depth(value: Any) -> int:
    """How many objects and lists lie in one another, counted without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, Mapping | list)]:
        depth, level = depth + 1, [child for item in level for child in children(item)]
    return depth


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("A number is too large.")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("A key is repeated.")
    return values
