"""Rows -> token ids for [`LatentRetrodictiveTrainer`]: question, answer, and the thought between them where known."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, List, Value

from hf_imitate.human_rows import CHUNK, render_humans
from hf_imitate.rendering import Rendered, Renderer, TurnError, canonical_text
from hf_imitate.retrodictor import Thinkers
from hf_imitate.thoughts import thought_ids
from hf_imitate.trainers.adversarial_inputs import named_sets
from hf_imitate.trainers.retrodictive_rows import (
    RowCounts,
    check_rows,
    check_set,
    cut_answer,
    say_what_was_cut,
    without_room,
)

logger = logging.getLogger(__name__)

PREPARED = Features(
    {
        "row": Value("int64"),
        "prompt_ids": List(Value("int32")),
        "answer_ids": List(Value("int32")),
        "ended": Value("bool"),
        "weight": Value("float32"),
        "num_bytes": Value("int32"),
        "thought_ids": List(Value("int32")),
        "has_thought": Value("bool"),
    }
)
_NAMED = 5


@dataclass(frozen=True)
class LatentRow:
    """One row as training sees it.

    Attributes:
        number: of the row in its data set: part of the key of its draws.
        rendered: ids of question and answer.
        weight: under the data set's mean weight.
        num_bytes: UTF-8 bytes of the answer.
        thought_ids: the thought behind the answer, where somebody wrote it down; may be empty.
    """

    number: int
    rendered: Rendered
    weight: float
    num_bytes: int
    thought_ids: tuple[int, ...] | None


def check_latent_rows(train_dataset: Any, eval_dataset: Any) -> str:
    """Check every row before a model loads; returns whose turn the answers are.

    Raises:
        TypeError, ValueError: rows or columns do not do; the message names them and the cure.
    """
    role = check_rows(train_dataset, eval_dataset)
    for name, dataset in named_sets(train_dataset, eval_dataset).items():
        _check_thoughts(dataset, name)
    return role


def _check_thoughts(dataset: Dataset, name: str) -> None:
    if "thought" not in dataset.column_names:
        return
    bad = [i for i, text in enumerate(dataset["thought"][:]) if not (text is None or isinstance(text, str))]
    if bad:
        raise TypeError(
            f"`{name}` column `thought`: {len(bad)} of {len(dataset)} rows (row {str(bad[:_NAMED])[1:-1]}) hold no "
            "text. Give a string, '' for an answer without a thought, or None where the thought is not known."
        )


def prepare_latent_rows(
    dataset: Dataset, renderer: Renderer, thinkers: Thinkers, limit: int | None, name: str
) -> tuple[Dataset, RowCounts]:
    """Render a data set.

    Args:
        dataset ([`~datasets.Dataset`]): rows with `prompt`, `completion` and perhaps `weight` and `thought`.
        renderer ([`Renderer`]): decides which tokens an answer has.
        thinkers ([`~hf_imitate.retrodictor.Thinkers`]): know the law of thoughts and what each model reads.
        limit (`int`, *optional*): most tokens of question and answer together. A longer answer is cut there and has no
            end token.
        name (`str`): what messages call the data set.

    Returns:
        `tuple`: rows of `PREPARED`, and what became of them.

    Raises:
        TypeError, ValueError: rows that cannot be rendered, are no thoughts, or do not fit into the model.
    """
    check_set(dataset, name, renderer.completion_role)
    _check_thoughts(dataset, name)
    columns = [c for c in ("prompt", "completion", "weight", "thought") if c in dataset.column_names]
    dataset = dataset.with_format(None).select_columns(columns)
    weights = dataset["weight"][:] if "weight" in columns else [1.0] * len(dataset)
    useful = [weight for weight in weights if weight > 0]
    rows: dict[str, list] = {column: [] for column in PREPARED}
    num_cut = 0
    for start in range(0, len(dataset), CHUNK):
        numbers = range(start, min(start + CHUNK, len(dataset)))
        num_cut += _prepare_chunk(rows, dataset[start : start + CHUNK], numbers, renderer, limit, name)
    if not rows["row"]:
        raise ValueError(without_room(dataset, renderer, limit, name))
    mean_weight = sum(useful) / len(useful)
    rows["weight"] = [weight / mean_weight for weight in rows["weight"]]
    counts = RowCounts(
        num_rows=len(dataset),
        num_truncated=num_cut,
        num_without_room=len(useful) - len(rows["row"]),
        num_weightless=len(dataset) - len(useful),
        longest_answer=max(map(len, rows["answer_ids"])),
    )
    _check_against_law(rows, thinkers, name)
    _check_positions(rows, thinkers, name)
    say_what_was_cut(counts, limit, name)
    return Dataset.from_dict(rows, features=PREPARED), counts


def _prepare_chunk(
    rows: dict[str, list],
    columns: Mapping[str, list],
    numbers: range,
    renderer: Renderer,
    limit: int | None,
    name: str,
) -> int:
    """Append a chunk's rows of positive weight that have room for an answer; returns how many answers were cut."""
    try:
        rendered = render_humans(renderer, columns["prompt"], columns["completion"], columns.get("weight"))
    except TurnError as error:
        bad = [numbers[i] for i in error.indices]
        raise ValueError(f"`{name}` column `prompt`, rows {str(bad[:_NAMED])[1:-1]}: {error}") from None
    empty = [number for number, row in zip(numbers, rendered, strict=True) if not row.rendered.prompt_ids]
    if empty:
        raise ValueError(
            f"`{name}` column `prompt`: rows {str(empty[:_NAMED])[1:-1]} have no tokens, and a causal LM needs one "
            "before an answer. Leave them out."
        )
    num_cut = 0
    thoughts = columns.get("thought", [None] * len(numbers))
    for number, row, thought in zip(numbers, rendered, thoughts, strict=True):
        answer = cut_answer(row.rendered, limit)
        if row.weight == 0 or not answer.answer_ids:
            continue
        num_cut += not answer.ended
        known = None if thought is None else thought_ids(renderer.tokenizer, canonical_text(thought))
        values = (number, answer.prompt_ids, answer.answer_ids, answer.ended, row.weight, row.num_bytes)
        for column, value in zip(PREPARED, (*values, known or [], known is not None), strict=True):
            rows[column].append(value)
    return num_cut


def _check_against_law(rows: dict[str, list], thinkers: Thinkers, name: str) -> None:
    problems: dict[str, list[int]] = {}
    for number, ids in zip(rows["row"], rows["thought_ids"], strict=True):
        problem = thinkers.law.problem(ids)
        if problem is not None:
            problems.setdefault(problem, []).append(number)
    for problem, bad in problems.items():
        raise ValueError(
            f"`{name}` column `thought`: {len(bad)} of {len(rows['row'])} rows (row {str(bad[:_NAMED])[1:-1]}) have "
            f"thoughts {problem}, which the law of thoughts gives probability 0. Change them, set them to None (not "
            "known), raise `max_thought_length` or take another `thought_delimiter`."
        )


def _check_positions(rows: dict[str, list], thinkers: Thinkers, name: str) -> None:
    pairs = zip(rows["prompt_ids"], rows["answer_ids"], strict=True)
    needed, positions = (
        [thinkers.longest(Rendered(prompt, answer, True)) for prompt, answer in pairs],
        thinkers.positions,
    )
    if positions is None:
        return
    bad = [number for number, length in zip(rows["row"], needed, strict=True) if length > positions]
    if bad:
        raise ValueError(
            f"`{name}`: {len(bad)} of {len(needed)} rows (row {str(bad[:_NAMED])[1:-1]}) need up to {max(needed)} "
            f"positions for question, thought (`max_thought_length`={thinkers.law.max_length}) and answer, and for "
            f"the retrodictor the question twice; the model has {positions}. Lower `max_length` or "
            "`max_thought_length`, shorten or drop these rows, or take a model with more positions."
        )


def collate_latent_rows(examples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: the rows as they are (their thoughts are drawn anew at each step), and their numbers."""
    rows = [
        LatentRow(
            number=example["row"],
            rendered=Rendered(list(example["prompt_ids"]), list(example["answer_ids"]), example["ended"]),
            weight=example["weight"],
            num_bytes=example["num_bytes"],
            thought_ids=tuple(example["thought_ids"]) if example["has_thought"] else None,
        )
        for example in examples
    ]
    return {"row": torch.tensor([row.number for row in rows]), "rows": Rows(rows)}


class Rows:
    """The rows of a batch, opaque to what moves tensors between devices."""

    def __init__(self, rows: list[LatentRow]):
        self.rows = rows
