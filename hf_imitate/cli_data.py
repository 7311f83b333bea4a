"""Data sets as the shell names them: embedded, files, saved folders, the Hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# An answer that reads "None" or "042" is an answer, in these letters; only an empty cell holds none.
TEXTS = {"prompt": str, "completion": str}
READING = {"csv": {"keep_default_na": False, "na_values": [""], "converters": TEXTS}}
# Where rows have more cells than the header has names, pandas takes the first ones for names of the rows.
_SHIFTED = "__index_level_0__"
DOCSTRINGS_TEST_SIZE = 0.1


def load_named(
    name: str, config: str | None = None, test_size: float | None = None, split: str = "train", streaming: bool = False
) -> "DatasetDict":
    """The data set of a name, in its splits.

    Args:
        name (`str`): `"docstrings"`, a file, a folder that `datasets` saved, or a Hub id.
        config (`str`, *optional*): configuration of a Hub data set.
        test_size (`float`, *optional*): hold out this share of the questions of `split`.
        split (`str`): what a file or folder without splits is called, and what questions are held out of.
        streaming (`bool`): do not download the whole of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: questions are to be held out of a split that is not there, or a file cannot be read as what its
            name says.
    """
    import datasets

    from hf_imitate.docstrings import load_docstrings
    from hf_imitate.rows import split_by_question

    check_is_there(name)
    path = Path(name)
    if name == "docstrings":
        # Many functions share a first line: an answer seen in training must not be met again in the test.
        share = test_size or DOCSTRINGS_TEST_SIZE
        return split_by_question(load_docstrings(), test_size=share, group_by="completion")
    if path.is_file():
        loaded = _read_file(path, split, streaming)
    elif path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        saved = datasets.load_from_disk(name)
        loaded = datasets.DatasetDict({split: saved}) if isinstance(saved, datasets.Dataset) else saved
    else:
        loaded = datasets.load_dataset(name, name=config, streaming=streaming)
    return loaded if test_size is None else split_by_question(split_of(loaded, split), test_size=test_size)


def _read_file(path: Path, split: str, streaming: bool) -> "DatasetDict":
    import datasets

    kind = BUILDERS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(
            f"`dataset_name` is the file {str(path)!r}; only {', '.join(BUILDERS)} are read. Save it as one of these."
        )
    try:
        loaded = datasets.load_dataset(
            kind, data_files={split: str(path)}, streaming=streaming, **READING.get(kind, {})
        )
    except (datasets.exceptions.DatasetGenerationError, StopIteration) as error:
        cause = error.__cause__ or error
        # What these two say names places, never words; of others it is not known.
        is_safe = isinstance(cause, UnicodeDecodeError) or type(cause).__name__ == "ParserError"
        said = f"{type(cause).__name__}{f': {cause}'.rstrip() if is_safe else ''}"
        raise ValueError(
            f"`dataset_name` is {str(path)!r}, which cannot be read as {kind} ({said}). "
            "It may be empty, cut off, or not in UTF-8; or a cell of a CSV holds commas or quotes without quotes "
            "around it."
        ) from None
    if kind == "csv" and _SHIFTED in (loaded[split].column_names or ()):
        raise ValueError(
            f"`dataset_name` is {str(path)!r}, whose first row has more cells than the header has names. Put quotes "
            "around cells that hold a comma, and leave out commas at the ends of lines."
        )
    if kind == "json" and not streaming and "timestamp" in str([loaded[split].features.get(name) for name in TEXTS]):
        # Where every answer looks like a date, pyarrow makes dates of them, and their letters are gone.
        loaded = datasets.DatasetDict({split: datasets.Dataset.from_list(_read_rows(path))})
    return loaded


def _read_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    return (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.split("\n") if line.strip()]
    )


def check_is_there(name: str) -> None:
    """Raise `FileNotFoundError` if the name is that of a file, and there is none."""
    if Path(name).suffix.lower() in BUILDERS and not Path(name).exists():
        raise FileNotFoundError(
            f"`dataset_name` is {name!r}; there is no such file. Give the path of an existing one."
        )


def split_of(dataset: "DatasetDict", split: str) -> "Dataset":
    """One split, or `ValueError` with the names of those there are."""
    if split not in dataset:
        raise ValueError(
            f"The data set has no split {split!r}, only {', '.join(dataset)}. Name one with `--dataset_train_split` "
            "or `--dataset_test_split`, or hold out questions with `--test_split_size 0.1`."
        )
    return dataset[split]
