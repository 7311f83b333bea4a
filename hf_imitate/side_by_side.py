"""Several continuations of one text in one row, side by side: the text before them is read once for all of them."""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_imitate.batching import forward_cost, similar_lengths, tokens_at_once

# Share of a batch's tokens that must be spared: below, masks of their own cost more than they save (measured).
MIN_SPARED = 0.15
# A mask has the square of this many numbers. Longer rows are for texts that leave no room for two continuations.
MAX_ROW = 2048


class SideBySide(NamedTuple):
    """One batch of rows, each a text and some continuations of it, none of which sees another.

        row         text text text  a a a a  b b  c c c
        positions     0    1    2   3 4 5 6  3 4  3 4 5

    So a continuation's states are those it has after the text alone, and gradients reach the text from all of them.
    Another text with its own continuations may follow in the row; neither sees the other.

    Attributes:
        input_ids, position_ids: [R, L].
        sees: whether a token (third axis) sees another (fourth). [R, 1, L, L], bool.
        row, start, length: where each continuation lies. [N] each.
    """

    input_ids: Tensor
    position_ids: Tensor
    sees: Tensor
    row: Tensor
    start: Tensor
    length: Tensor

    def inputs(self, model: Any) -> dict[str, Tensor]:
        """What a causal LM, or its body, is called with."""
        mask = self.sees
        if model.config._attn_implementation == "eager":  # it adds the mask to its scores
            mask = torch.zeros(mask.shape, device=mask.device, dtype=model.dtype).masked_fill_(
                ~mask, torch.finfo(model.dtype).min
            )
        return {"input_ids": self.input_ids, "attention_mask": mask, "position_ids": self.position_ids}

    def is_token(self) -> Tensor:
        """Where the continuations have tokens, each from its first on. [N, T]."""
        steps = torch.arange(int(self.length.max()), device=self.length.device)
        return steps < self.length[:, None]

    def of_continuations(self, values: Tensor) -> Tensor:
        """Values [R, L, ...] at the tokens of each continuation; past its end they mean nothing. [N, T, ...]."""
        steps = torch.arange(int(self.length.max()), device=self.length.device)
        column = (self.start[:, None] + steps).clamp(max=values.shape[1] - 1)
        return values[self.row[:, None], column]

    def scatter(self, values: Tensor, fill: int) -> Tensor:
        """[R, L] that holds `values` [N, T] at the tokens of the continuations, and `fill` elsewhere."""
        laid = torch.full_like(self.input_ids, fill)
        number, step = self.is_token().nonzero(as_tuple=True)
        laid[self.row[number], self.start[number] + step] = values[number, step]
        return laid


def rows_side_by_side(
    before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], width: int, most: int
) -> list[list[int]]:
    """Which continuations share a row: those of one text, as long as another row for them would cost more.

    A layer costs about 24 w^2 operations a token and 4 w for each pair of tokens of a row, w its width.

    Args:
        before: the text before each continuation. N.
        after: the continuations. N.
        width: of the model's states.
        most: continuations in a row.

    Returns:
        Indices, each in exactly one row.
    """
    by_text: dict[tuple[int, ...], list[int]] = {}
    for i, ids in enumerate(before):
        by_text.setdefault(tuple(ids), []).append(i)

    rows: list[list[int]] = []
    for text, indices in by_text.items():
        length = 0
        for i in sorted(indices, key=lambda i: len(after[i])):
            more, alone = len(after[i]), len(text) + len(after[i])
            fits = 0 < length <= max(MAX_ROW, 2 * len(text)) - more and len(rows[-1]) < most
            if fits and _cost(length + more, width) - _cost(length, width) <= _cost(alone, width):
                rows[-1].append(i)
                length += more
            else:
                rows.append([i])
                length = alone
    return rows


def _cost(length: int, width: int) -> float:
    """Of a row, in tokens."""
    return length + length**2 / (6 * width)


def without_padding(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> list[list[int]]:
    """Some of the rows one after another, so that all are about equally long and little is padded.

    Args:
        rows: indices of the continuations of each row, from [`rows_side_by_side`].
        lengths: of the rows, in tokens.
        width: of the model's states.

    Returns:
        Indices, by row: fewer and longer ones at the least cost of all padded tokens, as it is counted there.
    """
    order = sorted(range(len(rows)), key=lambda r: -lengths[r])
    best, least, tried = list[list[int]](), math.inf, 0
    for number in range(1, len(rows) + 1):
        longest = lengths[order[0]]
        room = max(longest, -(-sum(lengths) // number))
        if room == tried:
            break  # the longest row needs that much
        if room > max(MAX_ROW, longest):
            continue
        tried, found, filled = room, list[list[int]](), list[int]()
        for r in order:
            place = next((n for n, length in enumerate(filled) if length + lengths[r] <= room), len(found))
            if place == len(found):
                found.append([])
                filled.append(0)
            found[place] += rows[r]
            filled[place] += lengths[r]
        cost = len(found) * _cost(max(filled), width)
        if cost < least:
            best, least = found, cost
    return best


def row_batches(
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    width: int,
    most: int,
    device: torch.device | str,
) -> Iterator[list[list[int]]]:
    """Rows of similar length that go into one forward without gradient, with at most `most` continuations in it; the
    longest come first, so that too little memory shows at once."""
    rows = rows_side_by_side(before, after, width, most)
    lengths = [len(before[row[0]]) + sum(len(after[i]) for i in row) for row in rows]
    counts, limit = [len(row) for row in rows], tokens_at_once(device)
    for batch in reversed(similar_lengths(lengths, most, forward_cost(device), counts, limit)):
        yield [rows[i] for i in batch]


def lay_side_by_side(
    rows: Sequence[Sequence[int]],
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device | str,
) -> tuple[SideBySide, list[int]]:
    """One batch of rows, and the order in which the continuations stand in it.

    Args:
        rows: indices of the continuations of each row, those of one text one after another; from [`rows_side_by_side`]
            or [`without_padding`].
        before, after: as there.
        pad_token_id: fills; it is never read.
        device: of the model.
    """
    order = [i for row in rows for i in row]
    flat = [_Row(row, before, after) for row in rows]
    shape = (len(rows), max(len(row.ids) for row in flat))
    ids, positions = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    # Padding sees itself: no token sees nothing.
    branch, stem = torch.full(shape, -1), torch.full(shape, -1)
    for r, row in enumerate(flat):
        for all_rows, own in zip((ids, positions, branch, stem), (row.ids, row.at, row.branch, row.stem), strict=True):
            all_rows[r, : len(own)] = torch.tensor(own, dtype=torch.long)
    branch, stem = branch.to(device), stem.to(device)
    is_earlier = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril_()
    sees = ((branch[:, None, :] == stem[:, :, None]) | (branch[:, None, :] == branch[:, :, None])) & is_earlier
    row_of = torch.tensor([r for r, row in enumerate(rows) for _ in row], device=device)
    start_of = torch.tensor([start for row in flat for start in row.starts], device=device)
    length_of = torch.tensor([len(after[i]) for i in order], device=device)
    laid = SideBySide(ids.to(device), positions.to(device), sees[:, None], row_of, start_of, length_of)
    return laid, order


class _Row:
    """Tokens of one row: their ids and positions, the text or continuation each belongs to, and the text before it."""

    def __init__(self, indices: Sequence[int], before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]):
        self.ids, self.at = list[int](), list[int]()
        self.branch, self.stem, self.starts = list[int](), list[int](), list[int]()
        number, stem, text = 0, -1, None
        for i in indices:
            if text is None or before[i] != text:
                text, stem = before[i], number
                self._add(text, 0, number, number)
                number += 1
            self.starts.append(len(self.ids))
            self._add(after[i], len(text), number, stem)
            number += 1

    def _add(self, ids: Sequence[int], first: int, branch: int, stem: int) -> None:
        self.ids += ids
        self.at += range(first, first + len(ids))
        self.branch += [branch] * len(ids)
        self.stem += [stem] * len(ids)


def side_by_side(
    model: Any, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[SideBySide, list[int]] | None:
    """All continuations in one batch, equal texts read once, and the order in which they stand in it.

    On a CPU, which pays for every padded token, rows are put one after another where that leaves less padding.

    Args:
        model: a causal LM, or its body.
        before: the text before each continuation. N.
        after: the continuations. N.
        pad_token_id: fills; it is never read.

    Returns:
        `None` where the model cannot read such rows, and where so little would be spared that each continuation had
        better be read on its own, padded to the longest.
    """
    device, width = model.device, model.config.get_text_config().hidden_size
    is_cpu = device.type == "cpu"
    if not sharing_pays(before, after, is_padded=is_cpu) or not reads_side_by_side(model):
        return None
    rows = rows_side_by_side(before, after, width, len(after))
    if is_cpu:
        lengths = [len(before[row[0]]) + sum(len(after[i]) for i in row) for row in rows]
        rows = without_padding(rows, lengths, width)
    return lay_side_by_side(rows, before, after, pad_token_id, device)


def sharing_pays(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], is_padded: bool = False) -> bool:
    """Whether so much of the texts before is equal that reading it once is worth masks of its own.

    Args:
        before: the text before each continuation. N.
        after: the continuations. N.
        is_padded: whether the padding of each to the longest is spared, too.
    """
    lengths = [len(text) + len(more) for text, more in zip(before, after, strict=True)]
    whole = len(lengths) * max(lengths, default=0) if is_padded else sum(lengths)
    laid = sum(map(len, after)) + sum(map(len, {tuple(ids) for ids in before}))
    return whole - laid > MIN_SPARED * whole


def split_before_last(prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """A question and what is scored after it, as the text before and the continuation that predicts each scored token.

    The question's last token, which predicts the first of them, goes with each continuation; the last scored token
    predicts none.
    """
    return list(prompt_ids[:-1]), [prompt_ids[-1], *ids[:-1]]


def reads_side_by_side(causal_lm: Any) -> bool:
    """Whether a model can read rows like these: each layer sees all that its mask shows, wherever it stands.

    A sliding window or a recurrent state goes by the place in the row; flash attention takes no such mask; and where
    positions cannot be given, they are the places in the row.
    """
    config, text = causal_lm.config, causal_lm.config.get_text_config()
    # Models from before there were caches make masks of a kind of their own.
    takes = {"position_ids", "past_key_values"} <= set(inspect.signature(causal_lm.forward).parameters)
    if not takes or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    # Falcon's ALiBi and the loss that balances experts read a mask of the tokens that are not padding.
    if getattr(text, "alibi", False) or getattr(text, "output_router_logits", False):
        return False
    if _sees_what_comes_later(text) or _counts_from_padding(causal_lm.base_model):
        return False
    if "local" in (getattr(text, "attention_layers", None) or ()):
        return False  # GPT-Neo's window does not show in its cache
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def adapts_each_token_alone(model: Any) -> bool:
    """Whether an adapter, if there is one, does: prompt tuning puts tokens in front, and aLoRA looks for words."""
    if not isinstance(model, PeftModel):
        return True
    config = model.active_peft_config
    return not config.is_prompt_learning and not getattr(config, "alora_invocation_tokens", None)


def _sees_what_comes_later(config: Any) -> bool:
    """Whether it is an encoder's configuration: GPT-NeoX, too, says that it is no decoder, but knows of no encoder."""
    is_encoder = hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True)
    return is_encoder or not getattr(config, "is_causal", True)


def _counts_from_padding(body: Any) -> bool:
    """RoBERTa's first position is the padding's id and one."""
    return getattr(getattr(body, "embeddings", None), "padding_idx", None) is not None
