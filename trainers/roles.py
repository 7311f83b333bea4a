"""Whose turn the answers of a data set are: the role that is opened after every question."""

from datasets import Dataset

from hf_imitate.rendering import next_speaker
from hf_imitate.rows import last_roles


def completion_role(dataset: Dataset) -> str:
    """Whose turn the answers to train on are.

    Args:
        dataset ([`~datasets.Dataset`]): rows that [`~hf_imitate.rows.check_columns`] let pass.

    Returns:
        `str`: `"assistant"`, `"user"`, or `"alternating"` where there are both; plain text has the first.

    Raises:
        ValueError: there are both, and a question does not tell whose turn it is.
    """
    roles = {role for role in last_roles(dataset, "completion") if role is not None}
    if len(roles) > 1:
        check_roles(dataset, "train_dataset", "alternating")
        return "alternating"
    return roles.pop() if roles else "assistant"


def check_roles(dataset: Dataset, name: str, role: str) -> None:
    """Check that every answer is of the role whose turn is opened for it, which the question alone decides.

    Args:
        dataset ([`~datasets.Dataset`]): rows that [`~hf_imitate.rows.check_columns`] let pass.
        name (`str`): what errors call the data set.
        role (`str`): what [`completion_role`] found in the rows to train on.

    Raises:
        ValueError: some answers are of another role; the message counts them and names the first rows.
    """
    found = last_roles(dataset, "completion")
    asked = last_roles(dataset, "prompt") if role == "alternating" else ()
    due = [next_speaker([{"role": last}]) for last in asked] or [role] * len(found)
    rows = [i for i, (own, other) in enumerate(zip(found, due, strict=True)) if own not in (None, other)]
    if not rows:
        return
    needed = (
        "The answers to `train_dataset` are of both roles, so the question has to tell whose turn it is: the user's "
        "after an assistant's or a system's message, else the assistant's."
        if role == "alternating"
        else f"All answers in `train_dataset` have the role '{role}', so that turn is opened after every question."
    )
    raise ValueError(
        f"`{name}` column `completion`: {len(rows)} of {len(found)} rows (row {str(rows[:5])[1:-1]}) have a role "
        f"whose turn is not opened. {needed} Train one imitator for each role: "
        '`dataset.filter(lambda row: row["completion"][0]["role"] == "user")`.'
    )
