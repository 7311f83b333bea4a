"""Anybody's strings as Markdown that shows them letter for letter and is nothing else; pure."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

MOST_SHOWN = 2000
"""Characters of one string that a card shows in its text; what is cut is counted."""

MOST_FENCED = 20_000
"""Characters that a card shows in one code block."""

WIDEST, _HEIGHTS = 24, "▁▂▃▄▅▆▇█"

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, bidi and zero-width marks, lone surrogates, line separators
_INLINE = re.compile(r"""[&<>"\\`*\[\]|~$#{}@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.""")
_BLOCK_START = re.compile(r"^(\s*)([-+=])|^(\s*\d{1,9})([.)])(?=\s|$)")


def visible(value: object) -> str:
    """
    Turn `value` into one line of text that shows all it holds: what has no shape is written as its Python escape.

    Args:
        value (`object`):
            Anything; `str(value)` is shown.

    Returns:
        `str`, without line breaks, control, bidirectional or zero-width characters.
    """
    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _INVISIBLE else char
        for char in str(value)
    )


def shortened(value: object, most: int = MOST_SHOWN) -> str:
    """
    Cut `value` to what a reader can read.

    Args:
        value (`object`):
            Anything; `str(value)` is shown.
        most (`int`, *optional*, defaults to `MOST_SHOWN`):
            Characters that are kept.

    Returns:
        `str`: with the number of characters that were left out at its end, where some were.
    """
    text = str(value)
    return text if len(text) <= most else f"{text[:most]} [and {len(text) - most:,} characters more]"


def markdown_text(value: object) -> str:
    """
    Escape `value` so that Markdown and HTML show it letter for letter, in a paragraph as in a table cell.

    Character references are used rather than backslashes: they can never form structure, while renderers disagree
    on what a backslash before a pipe means.

    Args:
        value (`object`):
            Anything; `str(value)` is shown.

    Returns:
        `str`, one line, without spaces around it.
    """
    return _escaped(visible(shortened(value)).strip())


def _escaped(text: str) -> str:
    text = _INLINE.sub(lambda match: f"&#{ord(match[0])};", text)
    return _BLOCK_START.sub(lambda match: f"{match[1] or match[3] or ''}&#{ord(match[2] or match[4])};", text)


def markdown_code(value: object) -> str:
    """
    Show `value` in a fixed-width font, letter for letter, in a paragraph as in a table cell.

    Args:
        value (`object`):
            Anything; `str(value)` is shown.

    Returns:
        `str`, one line: a code span where the text allows one, else `<code>` with character references.
    """
    text = visible(shortened(value))
    if text.strip() == text != "" and not set(text) & set("`|\\"):
        return f"`{text}`"
    return f"<code>{_escaped(text)}</code>"


def python_literal(value: object) -> str:
    """
    Write `value` as a Python literal in ASCII, on one line, strings in double quotes where that is possible.

    Args:
        value (`object`):
            A string, number, boolean or `None`, or lists and dictionaries of them.

    Returns:
        `str`: `ast.literal_eval` gives `value` back.
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{python_literal(key)}: {python_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(python_literal, value)) + "]"
    literal = ascii(value)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal


def fenced(text: str, language: str) -> str:
    """
    Put `text` into a code block that nothing inside it can close.

    Args:
        text (`str`):
            Lines to show as they are; invisible characters are written as escapes.
        language (`str`):
            Name of the language, for highlighting.

    Returns:
        `str`, several lines.
    """
    text = shortened(text, MOST_FENCED)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = [visible(line.expandtabs(4)) for line in text.strip().splitlines()]
    return "\n".join([f"{fence}{language}", *lines, fence])


def sparkline(values: Sequence[float]) -> str:
    """
    Draw a curve in one line of text.

    Args:
        values (`Sequence[float]`):
            At least one; those that are not finite are left out.

    Returns:
        `str`: up to `WIDEST` of eight heights, from the least value to the greatest; empty if none is finite.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    num = min(len(finite), WIDEST)
    # Of each stretch its last value, so that the last of all is drawn.
    drawn = [finite[(i + 1) * len(finite) // num - 1] for i in range(num)]
    low, high = min(drawn), max(drawn)
    span = (high - low) or 1.0
    return "".join(_HEIGHTS[min(7, int(8 * ((value - low) / span)))] for value in drawn)
