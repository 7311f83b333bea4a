"""What one data-set row is: a question (`prompt`) and the answer a human gave (`completion`), plain or conversational.

Rows are checked by column before any model loads, and split so that no question stands on both sides.
"""

import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, IterableDataset, Json, LargeList, List, Value

from hf_imitate.grouping import choose_test_rows

COMPLETION_ROLES = ("assistant", "user")
_encode_key = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode  # built once: twice as fast as `dumps`
_ROWS_NAMED = 5
LIGHTEST, HEAVIEST = 1e-12, 1e12  # weights; 0 apart
_TEXT_TYPES = ("string", "large_string")
_BROKEN = re.compile("[\0\ud800-\udfff]")


class _Texts(NamedTuple):
    """One column, flattened: a plain text is one message without a role."""

    kinds: list[str]  # per row: "text", "messages", "missing", or the name of a wrong Python type
    owners: list[int]  # per message: the row it belongs to
    roles: list[Any]  # per message
    texts: list[Any]  # per message


def is_conversational_row(prompt: str | list[dict]) -> bool:
    """Say whether a question is a list of messages (`True`) or plain text (`False`)."""
    return isinstance(prompt, list | tuple)


def question_key(prompt: str | list) -> str:
    """Return a string that is equal exactly for equal questions, on every machine and in every process.

    It is canonical JSON: keys sorted, ASCII only, and message fields that are `None` left out, because Arrow fills
    fields that other rows have with `None`.

    Args:
        prompt (`str` or `list[dict]`):
            The question, plain or as messages.

    Returns:
        `str`: the key. It holds the question's text: never log it.
    """
    return _encode_key(prompt if isinstance(prompt, str) else _without_none(prompt))


def answer_text(completion: str | list[dict] | None) -> str | None:
    """Return the answer's text: the string itself, the content of its one message, or `None` without an answer."""
    if completion is None or isinstance(completion, str):
        return completion
    return _only_message(completion)["content"]


def last_roles(dataset: Dataset, column: str) -> list[str | None]:
    """Return the role of each row's last message in `prompt` or `completion`; `None` for plain text or no message.

    Reads the whole column at once; the rows are those that `check_columns` let pass.
    """
    texts = _read_texts(dataset, column, "dataset")
    by_row = dict(zip(texts.owners, texts.roles, strict=True))
    return [by_row.get(row) for row in range(len(texts.kinds))]


def check_columns(dataset: Dataset, *, allow_unlabelled: bool = False, name: str = "train_dataset") -> int:
    """Check every row's question, answer and weight, and count the answers.

    Works by column, so that 100 000 rows take well under a second. Errors name the data set, the column, up to five
    rows, their count and the cure; they never show a row's text.

    Args:
        dataset (`datasets.Dataset`):
            Rows with `prompt` and `completion`, both plain text or both lists of messages, and optionally `weight`.
        allow_unlabelled (`bool`, *optional*, defaults to `False`):
            Whether `completion=None` (a question without a human answer) is allowed. One row must have an answer.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            What errors call the data set.

    Returns:
        `int`: the number of rows that have an answer.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`, or a column holds something else than text or messages.
        ValueError: the data set is streamed or empty, a column is missing, or rows cannot be trained on.
    """
    _check_container(dataset, name)
    prompts, completions = _read_texts(dataset, "prompt", name), _read_texts(dataset, "completion", name)
    _check_kinds(prompts, f"`{name}` column `prompt`", is_missing_allowed=False)
    _check_kinds(completions, f"`{name}` column `completion`", is_missing_allowed=True)
    num_labelled = _check_labels(completions, f"`{name}` column `completion`", allow_unlabelled)
    _check_one_format(prompts, completions, name)
    _check_answer_messages(completions, f"`{name}` column `completion`")
    for column, texts in (("prompt", prompts), ("completion", completions)):
        _check_texts(texts, f"`{name}` column `{column}`")
    if "weight" in dataset.column_names:
        _check_weights(_read_values(dataset, "weight"), f"`{name}` column `weight`")
    return num_labelled


def split_by_question(
    dataset: Dataset,
    test_size: float | int,
    seed: int = 0,
    group_by: str | Callable[[dict], Hashable] | None = None,
) -> DatasetDict:
    """Split rows into `train` and `test` so that no question stands on both sides.

    Rows with equal questions stay together, and so do rows with equal `group_by` values. Both relations are followed
    to their end: if A shares a question with B, and B a group with C, then A, B and C land on one side.

    Args:
        dataset (`datasets.Dataset`):
            Rows with a `prompt`.
        test_size (`float` or `int`):
            The share of the rows (between 0 and 1) or their number that `test` should hold. The reachable number
            nearest to it is taken; a difference is logged.
        seed (`int`, *optional*, defaults to `0`):
            Chooses among the splits. Equal seeds give equal splits, in every process.
        group_by (`str` or `Callable`, *optional*):
            A column, or a function from a row to a hashable value. `None` values group nothing. Where answers repeat,
            `group_by="completion"` keeps a held-out answer out of the training rows.

    Returns:
        `datasets.DatasetDict`: `train` and `test`, each in the order of `dataset`.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`, or `group_by` returns something that cannot be hashed.
        ValueError: `test_size` is impossible, a column is missing, or one group holds all rows.
    """
    _check_container(dataset, "dataset", needed=("prompt", group_by) if isinstance(group_by, str) else ("prompt",))
    relations: list[list[Hashable]] = [[question_key(prompt) for prompt in _read_values(dataset, "prompt")]]
    if group_by is not None:
        relations.append(_group_values(dataset, group_by))
    test_rows = choose_test_rows(relations, test_size, seed)
    is_test = set(test_rows)
    train_rows = [row for row in range(len(dataset)) if row not in is_test]
    return DatasetDict(train=dataset.select(train_rows), test=dataset.select(test_rows))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def _only_message(completion: list[dict]) -> dict:
    if not isinstance(completion, list | tuple) or len(completion) != 1:
        size = f"{len(completion)} messages" if isinstance(completion, list | tuple) else type(completion).__name__
        raise ValueError(f"A conversational `completion` is a list of exactly one message; got {size}.")
    return completion[0]


def _name_rows(rows: Sequence[int], num_rows: int) -> str:
    """Say how many rows and which, never what stands in them."""
    shown = ", ".join(str(row) for row in rows[:_ROWS_NAMED])
    dots = ", ..." if len(rows) > _ROWS_NAMED else ""
    return f"{len(rows)} of {num_rows} rows (row {shown}{dots})"


def _check_container(dataset: Any, name: str, needed: tuple[str, ...] = ("prompt", "completion")) -> None:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`{name}` is an IterableDataset, whose rows cannot be checked, counted or held out beforehand. "
            "Materialise it: `Dataset.from_list(list(dataset.take(n)))`, or load it without `streaming=True`."
        )
    if not isinstance(dataset, Dataset):
        cure = {
            "DatasetDict": 'Pass one of its splits, such as `dataset["train"]`.',
            "list": "Wrap it: `Dataset.from_list(rows)`.",
            "dict": "Wrap it: `Dataset.from_dict(columns)`.",
        }.get(type(dataset).__name__, "Load it with `datasets.load_dataset` or build it with `Dataset.from_list`.")
        raise TypeError(f"`{name}` must be a `datasets.Dataset`; got {type(dataset).__name__}. {cure}")
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`{name}` has no column {' and no column '.join(f'`{column}`' for column in missing)}; found "
            f"{dataset.column_names}. Rename the right one: `dataset.rename_column(old, new)`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` has 0 rows; at least one is needed. Check the split and the filters before it.")


def _read_column(dataset: Dataset, column: str) -> Any:
    """The column as an Arrow array of one or more chunks, in the data set's row order."""
    values = dataset.data.column(column)
    # After shuffle or select, reading through the public row access takes 1 s per 100 000 rows, and `take` 0.02 s.
    return values if dataset._indices is None else values.take(dataset._indices.column(0))


def _read_values(dataset: Dataset, column: str) -> list:
    feature = dataset.features[column]
    if isinstance(feature, Value) or (
        isinstance(feature, List | LargeList) and _holds_plain_messages(feature.feature)
    ):
        return _read_column(dataset, column).to_pylist()
    return dataset.with_format(None)[column][:]


def _read_texts(dataset: Dataset, column: str, name: str) -> _Texts:
    feature = dataset.features[column]
    if not isinstance(feature, Value | List | LargeList | Json):
        kind = type(feature).__name__
        raise TypeError(
            f"`{name}` column `{column}` holds {kind}; text or lists of role-and-content messages are needed."
        )
    try:
        if isinstance(feature, Value) and feature.dtype in _TEXT_TYPES:
            texts = _read_values(dataset, column)
            kinds = ["missing" if text is None else "text" for text in texts]
            present = [row for row, text in enumerate(texts) if text is not None]
            return _Texts(kinds, present, [None] * len(present), [texts[row] for row in present])
        if isinstance(feature, List | LargeList) and _holds_plain_messages(feature.feature):
            return _flatten_messages(_read_column(dataset, column))
    except UnicodeDecodeError:
        _fail_on_broken_text(_read_column(dataset, column), f"`{name}` column `{column}`")
    return _flatten_objects(_read_values(dataset, column))


def _holds_plain_messages(feature: Any) -> bool:
    return isinstance(feature, dict) and all(
        isinstance(feature.get(field), Value) and feature[field].dtype in _TEXT_TYPES for field in ("role", "content")
    )


def _flatten_messages(column: Any) -> _Texts:
    kinds, owners, roles, texts = result = _Texts([], [], [], [])
    for chunk in column.chunks:
        messages = chunk.flatten()
        roles += messages.field("role").to_pylist()
        texts += messages.field("content").to_pylist()
        for num_messages in chunk.value_lengths().to_pylist():
            owners += [len(kinds)] * (num_messages or 0)
            kinds.append("missing" if num_messages is None else "messages")
    return result


def _flatten_objects(values: Iterable[Any]) -> _Texts:
    names = {str: "text", list: "messages", type(None): "missing"}
    result = _Texts([], [], [], [])
    for row, value in enumerate(values):
        result.kinds.append(names.get(type(value), type(value).__name__))
        for role, text in _messages_of(value):
            result.owners.append(row)
            result.roles.append(role)
            result.texts.append(text)
    return result


def _messages_of(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, str):
        yield None, value
    for message in value if isinstance(value, list) else ():
        yield (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)


def _fail_on_broken_text(column: Any, where: str) -> None:
    broken = []
    for row, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError:
            broken.append(row)
    raise ValueError(
        f"{where}: {_name_rows(broken, len(column))} hold bytes that are not UTF-8. "
        'Decode the source with `errors="replace"`, or drop them.'
    )


def _check_kinds(column: _Texts, where: str, *, is_missing_allowed: bool) -> None:
    good = ("text", "messages", "missing") if is_missing_allowed else ("text", "messages")
    bad = [row for row, kind in enumerate(column.kinds) if kind not in good]
    if bad:
        found = " and ".join(sorted({"None" if column.kinds[row] == "missing" else column.kinds[row] for row in bad}))
        raise TypeError(
            f"{where}: {_name_rows(bad, len(column.kinds))} hold {found}; text or a list of messages is needed. "
            "Convert them with `dataset.map`, or drop them with `dataset.filter`."
        )


def _check_labels(column: _Texts, where: str, allow_unlabelled: bool) -> int:
    unlabelled = [row for row, kind in enumerate(column.kinds) if kind == "missing"]
    num_rows = len(column.kinds)
    if len(unlabelled) == num_rows:
        raise ValueError(
            f"{where}: all {num_rows} rows are None, so there is no human answer to learn from. "
            "Bring at least one row with an answer."
        )
    if unlabelled and not allow_unlabelled:
        raise ValueError(
            f"{where}: {_name_rows(unlabelled, num_rows)} are None, questions without a human answer. Drop them with "
            '`dataset.filter(lambda row: row["completion"] is not None)`; `AdversarialTrainer` can use them: set '
            "`allow_unlabelled=True` there."
        )
    return num_rows - len(unlabelled)


def _check_one_format(prompts: _Texts, completions: _Texts, name: str) -> None:
    num_rows = len(prompts.kinds)
    by_kind = {kind: [row for row, k in enumerate(prompts.kinds) if k == kind] for kind in ("text", "messages")}
    if all(by_kind.values()):
        rarer = min(by_kind, key=lambda kind: len(by_kind[kind]))
        raise ValueError(
            f"`{name}` column `prompt` mixes plain text and messages: {_name_rows(by_kind[rarer], num_rows)} hold "
            f"{rarer}, the others do not. Convert all rows to one format."
        )
    pairs = zip(prompts.kinds, completions.kinds, strict=True)
    odd = [row for row, (prompt, completion) in enumerate(pairs) if completion not in (prompt, "missing")]
    if odd:
        raise ValueError(
            f"`{name}` column `completion`: {_name_rows(odd, num_rows)} are not in the format of their `prompt` "
            f"({prompts.kinds[odd[0]]}). Give both as plain text or both as messages."
        )


def _check_answer_messages(column: _Texts, where: str) -> None:
    num_messages = [0] * len(column.kinds)
    for row in column.owners:
        num_messages[row] += 1
    bad = [row for row, kind in enumerate(column.kinds) if kind == "messages" and num_messages[row] != 1]
    if bad:
        raise ValueError(
            f"{where}: {_name_rows(bad, len(column.kinds))} hold other than exactly one message. Put what came before "
            "the human's answer into `prompt`, and its one message into `completion`."
        )
    owned_roles = zip(column.owners, column.roles, strict=True)
    bad = [row for row, role in owned_roles if column.kinds[row] == "messages" and role not in COMPLETION_ROLES]
    if bad:
        raise ValueError(
            f"{where}: {_name_rows(bad, len(column.kinds))} have a role other than 'assistant' or 'user'. "
            "These are the two that answer: 'user' for user simulation, else 'assistant'."
        )


def _check_texts(column: _Texts, where: str) -> None:
    num_rows = len(column.kinds)
    filled: set[int] = set()
    unreadable: list[int] = []
    malformed: list[int] = []
    for row, role, text in zip(column.owners, column.roles, column.texts, strict=True):
        if not isinstance(text, str) or (column.kinds[row] == "messages" and not (isinstance(role, str) and role)):
            malformed.append(row)
        elif _BROKEN.search(text):
            unreadable.append(row)
        elif text and not text.isspace():
            filled.add(row)
    if malformed:
        raise ValueError(
            f"{where}: {_name_rows(list(dict.fromkeys(malformed)), num_rows)} hold a message without a `role` or "
            'without text as its `content`. A message is `{"role": "user", "content": "..."}`; images and content '
            "parts are not read."
        )
    if unreadable:
        raise ValueError(
            f"{where}: {_name_rows(list(dict.fromkeys(unreadable)), num_rows)} hold a NUL character or a lone "
            "surrogate, which do not survive a tokenizer. Remove them from the text."
        )
    blank = [row for row, kind in enumerate(column.kinds) if kind != "missing" and row not in filled]
    if blank:
        raise ValueError(
            f"{where}: {_name_rows(blank, num_rows)} are empty or only whitespace. Drop them with `dataset.filter`."
        )


def _check_weights(weights: list, where: str) -> None:
    num_rows = len(weights)
    bad = [row for row, w in enumerate(weights) if isinstance(w, bool) or not isinstance(w, int | float)]
    if bad:
        raise TypeError(
            f"{where}: {_name_rows(bad, num_rows)} are not numbers. Give every row a weight >= 0; 1.0 is plain."
        )
    bad = [row for row, weight in enumerate(weights) if not (weight == 0 or LIGHTEST <= weight <= HEAVIEST)]
    if bad:
        raise ValueError(
            f"{where}: {_name_rows(bad, num_rows)} are negative or not finite, or no size for sums in fp32. "
            f"Give 0 or weights from {LIGHTEST:g} to {HEAVIEST:g}, such as those you have over their mean."
        )
    if not any(weights):
        raise ValueError(f"{where}: all {num_rows} weights are 0, so no row teaches anything. Raise some of them.")


def _group_values(dataset: Dataset, group_by: str | Callable[[dict], Hashable]) -> list[Hashable]:
    if isinstance(group_by, str):
        values = _read_values(dataset, group_by)
        return [question_key([value]) if isinstance(value, list | dict) else value for value in values]
    groups = [group_by(row) for row in dataset.with_format(None)]
    for row, group in enumerate(groups):
        if not isinstance(group, Hashable):
            raise TypeError(
                f"`group_by` returned {type(group).__name__} for row {row}; it must return something hashable. "
                "Return a string, a number or a tuple of them."
            )
    return groups
