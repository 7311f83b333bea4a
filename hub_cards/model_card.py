"""CardFacts -> README.md: pure, without network; every word of the card stands in `imitator_card.md`."""

import math
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from hf_imitate.hub_cards.audit_section import audit_section
from hf_imitate.hub_cards.engines import describe_engine
from hf_imitate.hub_cards.facts import CardFacts
from hf_imitate.hub_cards.licenses import license_metadata
from hf_imitate.hub_cards.markdown import (
    fenced,
    markdown_code,
    markdown_text,
    python_literal,
    shortened,
    sparkline,
    visible,
)
from hf_imitate.hub_cards.model_index import evaluation_results

COMMON_TAGS = ("hf-imitate", "trl", "imitation-learning")
"""Tags every card carries, before those of the trainer."""

MOST_SAMPLES, MOST_SAMPLE = 8, 1000
"""Samples a card shows, and characters of each."""

# Begins a limit on the distinguisher's numbers, which says nothing where there are none.
_OF_NUMBERS = "Numbers measured while training come from the distinguisher"

_CAPTIONS = {
    "paired_accuracy.png": "How often freshly trained judges picked the human's answer, on questions new to them",
    "e_value.png": 'What a bettor against "no difference" won, question by question',
    "losses.png": "What people's answers and its own cost the imitator",
}


def render_card(facts: CardFacts) -> ModelCard:
    """
    Write the model card of an imitator.

    Args:
        facts ([`CardFacts`]):
            All the card may say. Unknown facts are printed as "not stated" or "not measured", never left out.

    Returns:
        [`~huggingface_hub.ModelCard`]: metadata and text; `.save(path)` writes README.md.
    """
    audit = None if facts.audit is None else audit_section(facts.audit)
    samples = [(shortened(one.question, MOST_SAMPLE), shortened(one.answer, MOST_SAMPLE)) for one in facts.samples]
    known = {"settings": _shown_settings(facts.settings), "limits": _shown_limits(facts)}
    engine = None if facts.engine is None else describe_engine(facts.engine)
    body = _template().render(facts=facts, audit=audit, samples=samples[:MOST_SAMPLES], engine=engine, **known).strip()
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
    results = None if facts.audit is None else evaluation_results(facts.audit, facts.hub_dataset)
    license_id, license_name = license_metadata(facts.license)
    return ModelCardData(
        base_model=facts.hub_base_model,
        datasets=[facts.hub_dataset] if facts.hub_dataset is not None else None,
        eval_results=results or None,
        library_name="peft" if facts.is_adapter else "transformers",
        license=license_id,
        license_name=license_name,
        model_name=_metadata(facts.model_name) if results else None,
        pipeline_tag="text-generation",
        tags=[*COMMON_TAGS, *(_metadata(tag) for tag in facts.tags if tag not in COMMON_TAGS)],
    )


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they took effect."""
    shown = dict(settings)
    if "distinguisher_learning_rate" in shown and shown["distinguisher_learning_rate"] is None:
        rate = shown.get("learning_rate")
        known = isinstance(rate, int | float) and not isinstance(rate, bool)
        shown["distinguisher_learning_rate"] = f"{3 * float(rate):.4g}" if known and rate else "3 x learning_rate"
    if "retrodictive_coef" in shown and shown["retrodictive_coef"] is None:
        is_free = shown.get("retrodictive_budget") is None
        shown["retrodictive_coef"] = 1.0 if is_free else "what keeps the budget"
    steps = shown.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        shown.pop("num_train_epochs", None)  # not what ended the run
    return shown


def _shown_limits(facts: CardFacts) -> list[str]:
    has_number = any("distinguisher/" in name and metric.value is not None for name, metric in facts.metric_rows)
    return [limit for limit in facts.limits if has_number or not limit.startswith(_OF_NUMBERS)]


def _metadata(value: str) -> str:
    return visible(shortened(value, 200))


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, float) and math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _local_name(value: str | None) -> str:
    # The folders above a local model belong to its owner's machine, not to the card.
    return "" if value is None else re.split(r"[\\/]", value.rstrip("\\/"))[-1]


def _caption(figure: str) -> str:
    name = figure.rpartition("/")[2]
    return _CAPTIONS.get(name, name.removesuffix(".png").replace("_", " "))


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
        sparkline=sparkline,
        caption=_caption,
        local_name=_local_name,
    )
    source = files("hf_imitate.hub_cards").joinpath("imitator_card.md").read_text(encoding="utf-8")
    return environment.from_string(source)
