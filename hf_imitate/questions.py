"""Checks of the lists that people pass in by hand: questions, answers, and the columns beside them."""

from collections.abc import Mapping, Sequence
from typing import Any


def check_questions(questions: Sequence[str | list[dict]]) -> None:
    """Raise `TypeError` unless these are questions, all plain or all messages."""
    if isinstance(questions, str):
        raise TypeError("`questions` is one string; give a list, `[question]`.")
    kinds = [
        "text" if isinstance(q, str) else "messages" if isinstance(q, list) else type(q).__name__ for q in questions
    ]
    for index, kind in enumerate(kinds):
        if kind not in ("text", "messages"):
            raise TypeError(
                f"questions[{index}] is a {kind}; give text, or a list of messages such as "
                '`[[{"role": "user", "content": "..."}]]`.'
            )
        if kind == "messages" and not all(map(_is_message, questions[index])):
            raise TypeError(
                f"questions[{index}] holds something that is no message of text; a message is "
                '`{"role": "user", "content": "..."}`.'
            )
        _check_encodable(questions[index], f"questions[{index}]")
        if kind != kinds[0]:
            raise TypeError(
                f"questions[{index}] is {kind}, questions[0] is {kinds[0]}. Ask each kind in a call of its own."
            )


def check_pairs(questions: Sequence[str | list[dict]], answers: Sequence[str]) -> None:
    """Raise `TypeError` or `ValueError` unless there is one answer, a string, to each question."""
    check_questions(questions)
    if isinstance(answers, str) or len(answers) != len(questions):
        found = "one string" if isinstance(answers, str) else f"{len(answers)} answers"
        raise ValueError(f"Give one answer to each question, as a list: got {len(questions)} questions and {found}.")
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise TypeError(
                f"answers[{index}] is a {type(answer).__name__}; give one string per question. For several answers to "
                "one question, repeat the question."
            )
        _check_encodable(answer, f"answers[{index}]")


def check_answer_lists(questions: Sequence[str | list[dict]], answers: Sequence[Sequence[str]]) -> None:
    """Raise `TypeError` or `ValueError` unless each question has a list of answers, as `Imitator.answer` returns."""
    if isinstance(answers, str) or len(answers) != len(questions):
        found = "one string" if isinstance(answers, str) else f"{len(answers)} lists"
        raise ValueError(f"Give each question a list of answers: got {len(questions)} questions and {found}.")
    for index, texts in enumerate(answers):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            kind = "string" if isinstance(texts, str) else "list of other things than strings"
            raise TypeError(f"answers[{index}] is a {kind}; give a list of strings, as `Imitator.answer` returns.")
        for text in texts:
            _check_encodable(text, f"answers[{index}]")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _check_encodable(text: str | list[dict], where: str) -> None:
    """Raise `ValueError` where a text holds half of a surrogate pair, which no tokenizer takes."""
    parts = [text] if isinstance(text, str) else [message["content"] for message in text]
    if any("\ud800" <= character <= "\udfff" for part in parts if not part.isascii() for character in part):
        raise ValueError(
            f"{where} holds a lone surrogate, which is no text. Decode its source with `errors='replace'`."
        )


def check_columns(columns: Mapping[str, Sequence[Any]], num_rows: int, rows: str = "answers") -> None:
    """Raise `ValueError` unless each column has one value per row; `rows` is what the message calls them."""
    for name, values in columns.items():
        if len(values) != num_rows:
            raise ValueError(f"Column `{name}` has {len(values)} values for {num_rows} {rows}; give one each.")
