"""Rows -> labelled token ids for [`RetrodictiveTrainer`]: what is scored, with what weight, which answers are whole.

Two numbers travel beside the labels of an answer, one for each of its tokens, so that they are packed as tokens are:
`answer_weight`, the row's weight under the mean weight of the rows, and `answer_bytes`, the UTF-8 bytes of the whole
answer, 0 where it was cut. Both are 0 on a question's tokens.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import GenerationConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_imitate.human_rows import CHUNK, question_lengths, render_humans
from hf_imitate.rendering import Rendered, Renderer, TurnError, closing_id, end_token_ids
from hf_imitate.rows import check_columns, is_conversational_row
from hf_imitate.trainers.adversarial_inputs import named_sets
from hf_imitate.trainers.roles import check_roles, completion_role

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that is not scored
WEIGHT, BYTES, ROW = "answer_weight", "answer_bytes", "answer_row"
ANSWER_COLUMNS = (WEIGHT, BYTES)
PREPARED = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        WEIGHT: List(Value("float32")),
        BYTES: List(Value("int32")),
    }
)
# TRL's SFTTrainer reads these per row; a law that differs from row to row could not be saved with the imitator.
_PER_ROW = ("chat_template_kwargs", "tools")


class RowCounts(NamedTuple):
    """What became of the rows of one data set.

    Attributes:
        num_rows (`int`): rows given.
        num_truncated (`int`): answers cut at the length limit, without an end token.
        num_without_room (`int`): rows left out because the question alone fills the limit.
        num_weightless (`int`): rows left out because their weight is 0.
        longest_answer (`int`): tokens of the longest answer, its end token included.
    """

    num_rows: int
    num_truncated: int
    num_without_room: int
    num_weightless: int
    longest_answer: int


def check_rows(train_dataset: Any, eval_dataset: Any) -> str:
    """Check every row before a model loads.

    Returns:
        `str`: whose turn the answers are, `"assistant"`, `"user"` or `"alternating"`; plain text has the first.

    Raises:
        TypeError, ValueError: rows or columns do not do; the message names them and the cure.
    """
    check_columns(train_dataset)
    role = completion_role(train_dataset)
    for name, dataset in named_sets(train_dataset, eval_dataset).items():
        check_set(dataset, name, role)
    return role


def check_set(dataset: Any, name: str, role: str) -> None:
    """Check the rows of one data set, which errors call `name`, for answers in the turn of `role`.

    Raises:
        TypeError, ValueError: rows or columns do not do; the message names them and the cure.
    """
    check_columns(dataset, name=name)
    check_roles(dataset, name, role)
    per_row = [column for column in _PER_ROW if column in dataset.column_names]
    if per_row:
        raise ValueError(
            f"`{name}` has the columns {per_row}, which would change the chat template from row to row. Remove them "
            "with `dataset.remove_columns`; `chat_template_kwargs` for all rows is a setting of RetrodictiveConfig."
        )


def check_padding(tokenizer: Any) -> None:
    """Check, before anything is loaded, that a given tokenizer can fill up a batch.

    Raises:
        ValueError: it has neither a padding nor an end token.
    """
    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer names neither an end token nor one to pad with, so an answer has no end and a batch cannot "
            "be filled up. Set `tokenizer.eos_token`."
        )


def plain_columns(dataset: Dataset) -> Dataset:
    """The columns that are read here; TRL would take some of the others for images."""
    return dataset.select_columns([c for c in ("prompt", "completion", "weight") if c in dataset.column_names])


def settle_renderer(
    tokenizer: Any,
    generation_config: GenerationConfig,
    question: str | list,
    role: str,
    chat_template_kwargs: Any,
) -> Renderer:
    """The renderer of a run; what a chat template closes a turn with ends an answer, too, where nobody lists it.

    Args:
        tokenizer: of the model.
        generation_config ([`~transformers.GenerationConfig`]): the model's.
        question (`str` or `list`): one of the data set's, plain or messages.
        role (`str`): whose turn the answers are.
        chat_template_kwargs (`dict[str, Any]`, *optional*): passed to the chat template.

    Raises:
        ValueError: nothing ends an answer.
    """
    ends = end_token_ids(tokenizer, generation_config)
    if is_conversational_row(question):
        roles = ("assistant", "user") if role == "alternating" else (role,)
        closing = [closing_id(tokenizer, one, chat_template_kwargs) for one in roles]
        ends += [token for token in dict.fromkeys(closing) if token is not None and token not in ends]
    return Renderer(tokenizer, ends, chat_template_kwargs=chat_template_kwargs, completion_role=role)


def prepare_rows(
    dataset: Dataset, renderer: Renderer, limit: int | None, name: str, num_proc: int | None = None
) -> tuple[Dataset, RowCounts]:
    """Render a data set: question and answer in one row, labels on the answer's tokens alone.

    Args:
        dataset ([`~datasets.Dataset`]): rows with `prompt`, `completion` and perhaps `weight`, already checked.
        renderer ([`Renderer`]): decides which tokens an answer has.
        limit (`int`, *optional*): most tokens of question and answer together. A longer answer is cut there and has no
            end token.
        name (`str`): what messages call the data set.
        num_proc (`int`, *optional*): processes to render in.

    Returns:
        `tuple`: rows with `input_ids`, `labels`, `answer_weight`, `answer_bytes`; and what became of them.

    Raises:
        ValueError: a question cannot be rendered, has no tokens, or no row has room for an answer.
    """
    dataset = plain_columns(dataset.with_format(None))
    weights = dataset["weight"][:] if "weight" in dataset.column_names else [1.0] * len(dataset)
    useful = [i for i, weight in enumerate(weights) if weight > 0]
    mean_weight = sum(weights) / len(useful)
    rendered = dataset.map(
        _prepare_chunk,
        batched=True,
        batch_size=CHUNK,
        with_indices=True,
        fn_kwargs={"renderer": renderer, "limit": limit, "mean_weight": mean_weight, "name": name},
        remove_columns=dataset.column_names,
        features=Features({**PREPARED, "is_cut": Value("bool"), "num_answer_tokens": Value("int32")}),
        num_proc=num_proc,
        desc=f"Rendering {name}",
    )
    if len(rendered) == 0:
        raise ValueError(without_room(dataset, renderer, limit, name))
    counts = RowCounts(
        num_rows=len(dataset),
        num_truncated=sum(rendered["is_cut"][:]),
        num_without_room=len(useful) - len(rendered),
        num_weightless=len(dataset) - len(useful),
        longest_answer=max(rendered["num_answer_tokens"][:]),
    )
    say_what_was_cut(counts, limit, name)
    return rendered.remove_columns(["is_cut", "num_answer_tokens"]), counts


def without_room(dataset: Dataset, renderer: Renderer, limit: int | None, name: str) -> str:
    """What to say of a data set whose questions all fill the limit, with how long they are."""
    lengths = sorted(question_lengths(dataset, renderer).values())
    spread = f"{lengths[0]} to {lengths[-1]} tokens, {lengths[len(lengths) // 2]} in the middle"
    return (
        f"`{name}`: no question leaves room for an answer within {limit} tokens. The questions have {spread}. Raise "
        "`max_length`, shorten the questions, or take a model with more positions."
    )


def _prepare_chunk(
    columns: Mapping[str, list],
    numbers: list[int],
    renderer: Renderer,
    limit: int | None,
    mean_weight: float,
    name: str,
) -> dict[str, list]:
    weights = columns.get("weight", [1.0] * len(numbers))
    try:
        rows = render_humans(renderer, columns["prompt"], columns["completion"], weights)
    except TurnError as error:
        # A plain error, since that of a turn does not survive the way back from another process.
        bad = [numbers[i] for i in error.indices]
        raise ValueError(f"`{name}` column `prompt`, rows {str(bad[:5])[1:-1]}: {error}") from None
    empty = [number for number, row in zip(numbers, rows, strict=True) if not row.rendered.prompt_ids]
    if empty:
        raise ValueError(
            f"`{name}` column `prompt`: rows {str(empty[:5])[1:-1]} have no tokens, and a causal LM needs one before "
            "an answer. Leave them out."
        )
    prepared: dict[str, list] = {column: [] for column in (*PREPARED, "is_cut", "num_answer_tokens")}
    for row in rows:
        answer = cut_answer(row.rendered, limit)
        if row.weight == 0 or not answer.answer_ids:
            continue
        before, length = len(answer.prompt_ids), len(answer.answer_ids)
        prepared["input_ids"].append(answer.prompt_ids + answer.answer_ids)
        prepared["labels"].append([IGNORED] * before + answer.answer_ids)
        prepared[WEIGHT].append([0.0] * before + [row.weight / mean_weight] * length)
        prepared[BYTES].append([0] * before + [row.num_bytes if answer.ended else 0] * length)
        prepared["is_cut"].append(not answer.ended)
        prepared["num_answer_tokens"].append(length)
    return prepared


def cut_answer(row: Rendered, limit: int | None) -> Rendered:
    """The row with as much of its answer as fits into `limit` tokens with its question; a cut answer has no end."""
    room = len(row.answer_ids) if limit is None else max(limit - len(row.prompt_ids), 0)
    return row._replace(answer_ids=row.answer_ids[:room], ended=row.ended and len(row.answer_ids) <= room)


def say_what_was_cut(counts: RowCounts, limit: int | None, name: str) -> None:
    """Log how many rows of a data set were cut or left out, and why."""
    said = {
        "answers do not fit into %d tokens with their question; they are cut there, without an end token, and left "
        "out of every bits figure": counts.num_truncated,
        "questions leave no room for an answer within %d tokens and are left out": counts.num_without_room,
    }
    for what, number in said.items():
        if number:
            logger.warning(
                f"`%s`: %d of %d {what}. Raise `max_length` if the model has more positions.",
                *(name, number, counts.num_rows, limit),
            )
    if counts.num_weightless:
        logger.warning(
            "`%s`: %d of %d rows have weight 0 and are left out.", name, counts.num_weightless, counts.num_rows
        )


class AnswerCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which here also lays out what belongs to the answers, and which row of the batch a token is of.

    Adds `answer_weight`, `answer_bytes` and `answer_row`, each of the shape of `labels`.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        lengths = [len(example["input_ids"]) for example in examples]
        columns = {name: [torch.tensor(example[name]) for example in examples] for name in ANSWER_COLUMNS}
        columns[ROW] = [torch.full((length,), row) for row, length in enumerate(lengths)]
        for name, rows in columns.items():
            rows = [torch.cat(rows)] if self.padding_free else rows
            width = batch["labels"].shape[1]
            batch[name] = torch.stack([F.pad(values, (0, width - len(values))) for values in rows])
        return batch


def first_tokens(labels: Tensor) -> Tensor:
    """Where answers begin: at a scored token after one that is not. Every answer has its question before it.

    Args:
        labels: `-100` where nothing is scored. [B, T].

    Returns:
        [B, T], bool.
    """
    is_scored = labels != IGNORED
    return is_scored & ~F.pad(is_scored, (1, -1))


def sums_by_row(values: Sequence[Tensor], row: Tensor) -> Tensor:
    """Sums over the tokens of each row of a batch, padded or flattened into one line.

    Args:
        values: M quantities per token. [B, T] each.
        row: which row a token is of. [B, T].

    Returns:
        [number of rows, M], fp32.
    """
    flat = torch.stack([value.float().flatten() for value in values], dim=1)
    sums = torch.zeros(int(row.max()) + 1, len(values), device=flat.device)
    return sums.index_add_(0, row.flatten(), flat)
