"""The humans' answers, rendered once: which rows train, which are held out, and which row comes when."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from hf_imitate.rendering import Answer, Rendered, Renderer, TurnError

logger = logging.getLogger(__name__)

ROW_COLUMN = "_hf_imitate_row"
CHUNK = 1000  # rows rendered at once


class HumanRow(NamedTuple):
    """One labelled row as training sees it."""

    rendered: Rendered
    answer: Answer
    weight: float
    num_bytes: int


class HumanRows:
    """Every labelled row of a data set, rendered; a fixed share of them held out, by row.

    Batches are drawn from (seed, number of the draw) alone, so a resumed run needs no sampler state.

    Args:
        dataset ([`~datasets.Dataset`]): rows with `prompt` and `completion`, already checked.
        renderer ([`Renderer`]): renders both sides.
        heldout_fraction (`float`): share of the labelled rows no one trains on.
        seed (`int`): decides which rows are held out, and the order of the others.

    Raises:
        ValueError: holding out leaves no row to train on.
    """

    def __init__(self, dataset: Dataset, renderer: Renderer, heldout_fraction: float = 0.0, seed: int = 0):
        self.seed = seed
        completions = dataset["completion"]
        labelled = [i for i, completion in enumerate(completions) if completion is not None]
        weights = dataset["weight"] if "weight" in dataset.column_names else None
        self.rows: dict[int, HumanRow] = {}
        for start in range(0, len(labelled), CHUNK):
            ids = labelled[start : start + CHUNK]
            chunk = dataset[ids]
            chunk_weights = None if weights is None else [weights[i] for i in ids]
            with _named_rows(ids):
                rendered = render_humans(renderer, chunk["prompt"], chunk["completion"], chunk_weights)
            self.rows.update(zip(ids, rendered, strict=True))
        # A row of weight 0 teaches nothing, so it takes no place in a batch or among the held-out rows.
        useful = [i for i in labelled if self.rows[i].weight > 0]
        num_heldout = round(heldout_fraction * len(useful))
        shuffled = np.random.default_rng([seed, 1]).permutation(useful)
        self.heldout = np.sort(shuffled[:num_heldout])
        self.train = np.sort(shuffled[num_heldout:])
        self.is_heldout = set(self.heldout.tolist())
        if len(self.train) == 0:
            raise ValueError(
                f"`heldout_fraction`={heldout_fraction} holds out all {len(useful)} answered rows of positive "
                "weight. Lower it, or add rows."
            )

    @property
    def num_truncated(self) -> int:
        """Human answers longer than the limit: cut, without an end token, as the imitator's are."""
        return sum(not row.rendered.ended for row in self.rows.values())

    @property
    def num_repeated_heldout(self) -> int:
        """Held-out rows whose question and answer also stand in a training row: memory could score them."""
        seen = {(tuple(self.rows[i].rendered.prompt_ids), self.rows[i].answer.text) for i in self.train.tolist()}
        return sum(
            (tuple(self.rows[i].rendered.prompt_ids), self.rows[i].answer.text) in seen for i in self.heldout.tolist()
        )

    def draw(self, number: int, size: int, stream: int = 0, heldout: bool = False) -> list[int]:
        """Row ids of the `number`-th batch of `size` in an endless series of shuffled passes over the rows.

        Raises:
            ValueError: held-out rows are asked for and there are none.
        """
        ids = self.heldout if heldout else self.train
        if len(ids) == 0:
            raise ValueError("There are no held-out rows to draw from. Raise `heldout_fraction`.")
        drawn: list[int] = []
        position = number * size
        while len(drawn) < size:
            epoch, offset = divmod(position + len(drawn), len(ids))
            order = np.random.default_rng([self.seed, 2, stream, epoch, int(heldout)]).permutation(ids)
            drawn += order[offset : offset + size - len(drawn)].tolist()
        return drawn

    def batch(self, ids: Sequence[int]) -> list[HumanRow]:
        """The rows with these ids."""
        return [self.rows[i] for i in ids]


def render_humans(
    renderer: Renderer,
    prompts: Sequence[str | list],
    completions: Sequence[str | list],
    weights: Sequence[float | None] | None = None,
) -> list[HumanRow]:
    """Labelled rows as training sees them. A missing weight is 1."""
    if not prompts:
        return []
    rows = []
    weights = [None] * len(prompts) if weights is None else weights
    for rendered, weight in zip(renderer.human(prompts, completions), weights, strict=True):
        answer = renderer.read(rendered.answer_ids)
        num_bytes = len(answer.text.encode("utf-8", "replace"))
        rows.append(HumanRow(rendered, answer, 1.0 if weight is None else float(weight), num_bytes))
    return rows


def question_lengths(dataset: Dataset, renderer: Renderer, known: dict[int, int] | None = None) -> dict[int, int]:
    """Tokens of each row's question, by row; `known` are not rendered again."""
    lengths = dict(known or {})
    missing = [i for i in range(len(dataset)) if i not in lengths]
    for start in range(0, len(missing), CHUNK):
        ids = missing[start : start + CHUNK]
        with _named_rows(ids):
            lengths |= zip(ids, (len(prompt) for prompt in renderer.prompt_ids(dataset[ids]["prompt"])), strict=True)
    return lengths


@contextlib.contextmanager
def _named_rows(ids: Sequence[int]) -> Iterator[None]:
    """Say of which rows of the data set a chunk's questions are that a template refuses."""
    try:
        yield
    except TurnError as error:
        rows = [ids[i] for i in error.indices]
        raise TurnError(f"Column `prompt`, rows {str(rows[:5])[1:-1]}: {error}", rows) from None


def without_internal(row: dict[str, Any]) -> dict[str, Any]:
    """A row as checks and rewards may see it."""
    return {key: value for key, value in row.items() if key != ROW_COLUMN}
