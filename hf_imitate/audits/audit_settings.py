"""What an audit asks of its settings, before anything is loaded; each with the cure in its error."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from hf_imitate.audits.answers import subgroup_names
from hf_imitate.audits.evidence import NOT_COLUMNS
from hf_imitate.candidates import check_resampling
from hf_imitate.checks import Check, check_column_names, check_names
from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import ProcessedLaw


def check_audit_settings(
    dataset: Dataset,
    checks: Sequence[Check] | None,
    generation_config: GenerationConfig | dict[str, Any] | None,
    by: str | None,
    confidence: float,
) -> ProcessedLaw:
    """Check what an audit is asked for.

    Returns:
        The law that is sampled and scored.

    Raises:
        TypeError, ValueError: a setting is of another kind, or out of range.
    """
    check_names(checks or ())
    if not (_is_number(confidence) and 0.5 <= confidence < 1):
        raise ValueError(f"`confidence` is {confidence!r}; it must lie in [0.5, 1), such as 0.95.")
    if checks:
        check_column_names(dataset.column_names)
    others = [name for name in dataset.column_names if name not in NOT_COLUMNS]
    if by is not None and by not in others:
        raise ValueError(f"`by` names the column {by!r}; besides what every data set has there are {others}.")
    if by is not None:
        subgroup_names(by, dataset[by])
    if not isinstance(generation_config, GenerationConfig | dict | None):
        raise TypeError(
            f"`generation_config` is a {type(generation_config).__name__}; give a GenerationConfig or a dict, such as "
            '`{"temperature": 0.7}`, or None for the plain law.'
        )
    return ProcessedLaw(generation_config)


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless these settings are whole numbers: `seed` at least 0, the others at least 1."""
    check_resampling(settings["resample"], None, {}, 0)
    for name, value in settings.items():
        least = 0 if name == "seed" else 1
        if not (_is_number(value) and isinstance(value, Integral) and int(value) >= least):
            raise ValueError(f"`{name}` is {value!r}; it must be a whole number, at least {least}.")


def check_is_model(model: Any, name: str) -> None:
    """Raise `TypeError` unless this is a model, or says where one is; `name` is the argument's."""
    if not isinstance(model, str | Path | PreTrainedModel | PeftModel | Imitator):
        raise TypeError(
            f"`{name}` is a {type(model).__name__}; give a repo id, a folder, a transformers or PEFT model, or an "
            "Imitator."
        )


def check_known(human_entropy: str | float | None, max_answer_bytes: int | None) -> None:
    """Raise `ValueError` unless what is said to be known of the humans can be."""
    is_nats = _is_number(human_entropy) and 0 <= float(human_entropy or 0) < np.inf
    if not (human_entropy is None or human_entropy == "unique" or is_nats):
        raise ValueError(
            f'`human_entropy` is {human_entropy!r}; give "unique", a number of nats that the mean entropy of human '
            "answers is known to be at least, or None."
        )
    is_size = _is_number(max_answer_bytes) and (max_answer_bytes or 0) >= 1 and isinstance(max_answer_bytes, Integral)
    if not (max_answer_bytes is None or is_size):
        raise ValueError(
            f"`max_answer_bytes` is {max_answer_bytes!r}; it must be a whole number, at least 1, or None."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
