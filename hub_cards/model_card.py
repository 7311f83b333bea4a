"""CardFacts -> README.md: pure, without network; every word of the card stands in `imitator_card.md`."""

import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from hf_imitate.hub_cards.facts import CardFacts

COMMON_TAGS = ("hf-imitate", "trl", "imitation-learning")
"""Tags every card carries, before those of the trainer."""

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, bidi and zero-width marks, lone surrogates, line separators
_INLINE = re.compile(r"""[&<>"\\`*\[\]|~$#{}@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.""")
_BLOCK_START = re.compile(r"^(\s*)([-+=])|^(\s*\d{1,9})([.)])(?=\s|$)")


def render_card(facts: CardFacts) -> ModelCard:
    """
    Write the model card of an imitator.

    Args:
        facts ([`CardFacts`]):
            All the card may say. Unknown facts are printed as "not stated" or "not measured", never left out.

    Returns:
        [`~huggingface_hub.ModelCard`]: metadata and text; `.save(path)` writes README.md.
    """
    body = _template().render(facts=facts).strip()
    return ModelCard(f"---\n{card_metadata(facts).to_yaml()}\n---\n\n{body}\n")


def card_metadata(facts: CardFacts) -> ModelCardData:
    """
    Collect what the Hub reads by machine; local paths never become links.

    Args:
        facts ([`CardFacts`]):
            Facts of one imitator.

    Returns:
        [`~huggingface_hub.ModelCardData`].
    """
    return ModelCardData(
        base_model=facts.hub_base_model,
        datasets=[facts.hub_dataset] if facts.hub_dataset is not None else None,
        library_name="peft" if facts.is_adapter else "transformers",
        license=None if facts.license is None else visible(facts.license),
        pipeline_tag="text-generation",
        tags=[*COMMON_TAGS, *(visible(tag) for tag in facts.tags)],
    )


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


def markdown_text(value: object) -> str:
    """
    Escape `value` so that Markdown and HTML show it letter for letter, in a paragraph as in a table cell.

    Character references are used rather than backslashes: they can never form structure, while renderers disagree
    on what a backslash before a pipe means.

    Args:
        value (`object`):
            Anything; `str(value)` is shown.

    Returns:
        `str`, one line.
    """
    text = _INLINE.sub(lambda match: f"&#{ord(match[0])};", visible(value))
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
    text = visible(value)
    if text.strip() == text != "" and not set(text) & set("`|\\"):
        return f"`{text}`"
    return f"<code>{markdown_text(text)}</code>"


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
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = [visible(line.expandtabs(4)) for line in text.strip().splitlines()]
    return "\n".join([f"{fence}{language}", *lines, fence])


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _local_name(value: str | None) -> str:
    # The folders above a local model belong to its owner's machine, not to the card.
    return "" if value is None else re.split(r"[\\/]", value.rstrip("\\/"))[-1]


@cache
def _template() -> Template:
    # StrictUndefined: a misspelt fact is an error here, not an empty line in a published card. Autoescaping would
    # protect HTML only; the filters protect Markdown and HTML both.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        text=markdown_text,
        code=markdown_code,
        literal=python_literal,
        fenced=fenced,
        number=_number,
        local_name=_local_name,
    )
    source = files("hf_imitate.hub_cards").joinpath("imitator_card.md").read_text(encoding="utf-8")
    return environment.from_string(source)
