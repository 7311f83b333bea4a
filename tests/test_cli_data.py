"""Data sets by the name that a shell gives them."""

import json

import pytest
from test_train_cli import write_rows

from hf_imitate.cli_data import load_named, split_of


def load(name: str, test_split_size: float | None = None):
    return load_named(name, test_size=test_split_size)


def test_files_and_folders_of_rows_load_by_their_path(tmp_path):
    from datasets import Dataset, DatasetDict

    jsonl = write_rows(tmp_path / "rows.jsonl")
    rows = load(str(jsonl))["train"]
    assert rows.num_rows == 24
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "folder" / "train.parquet")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "saved_splits")
    for name in ("rows.csv", "folder/train.parquet", "folder", "saved", "saved_splits"):
        assert load(str(tmp_path / name))["train"].to_list() == rows.to_list(), name
    assert load(str(tmp_path / "saved_splits"))["test"].num_rows == 1
    assert isinstance(rows, Dataset)


def test_held_out_rows_share_no_question_with_the_training_rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    path.write_text(path.read_text() * 2)  # every question twice
    split = load(str(path), test_split_size=0.25)
    assert (split["train"].num_rows, split["test"].num_rows) == (36, 12)
    assert not set(split["train"]["prompt"]) & set(split["test"]["prompt"])


def test_the_embedded_data_hold_out_answers_too():
    split = load("docstrings")
    assert split["train"].num_rows + split["test"].num_rows > 5000
    assert not set(split["train"]["completion"]) & set(split["test"]["completion"])


def test_a_missing_split_is_named_with_those_that_exist(tmp_path):
    rows = load(str(write_rows(tmp_path / "rows.jsonl")))
    with pytest.raises(ValueError, match=r"no split 'test', only train\..*--test_split_size"):
        split_of(rows, "test")


def test_a_csv_holds_answers_in_the_letters_of_people(tmp_path):
    """pandas took "None" for a missing value, hence for a question that nobody answered, and "042" for a number."""
    (tmp_path / "rows.csv").write_text("prompt,completion\n1,None\n2,N/A\n3,042\n4,\n")
    rows = load(str(tmp_path / "rows.csv"))["train"]
    assert rows["completion"][:] == ["None", "N/A", "042", None]
    assert rows["prompt"][:] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("first", ["q1,a1,", "Well, is it,yes"])
def test_a_csv_whose_rows_have_more_cells_than_its_header_is_refused(first, tmp_path):
    """pandas took the first cell for the row's name, so that answers became questions, and nothing was said."""
    (tmp_path / "rows.csv").write_text(f"prompt,completion\n{first}\n")
    with pytest.raises(ValueError, match="more cells than the header"):
        load(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", "prompt,completion\nq,SECRET\xe9\n".encode("latin1"), "UnicodeDecodeError.*not in UTF-8"),
        ("rows.csv", b"prompt,completion\nq,a\nq,SECRET,b,c\n", "Expected 2 fields in line 3, saw 4"),
        ("rows.jsonl", b'{"prompt": "SECRET", "completion": "SEC', "cannot be read as json"),
        ("rows.jsonl", b"", "cannot be read as json"),
        ("rows.tsv", b"prompt\tcompletion\nq\tSECRET\n", "only .json, .jsonl, .csv, .parquet are read"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_without_its_words(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load(str(tmp_path / name))
    assert "SECRET" not in str(caught.value)


def test_a_missing_file_is_not_looked_for_on_the_hub_and_endings_may_be_capitals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(str(tmp_path / "rows.jsonl"))
    (tmp_path / "ROWS.CSV").write_text("prompt,completion\nq,042\n")
    assert load(str(tmp_path / "ROWS.CSV"))["train"]["completion"][:] == ["042"]


@pytest.mark.parametrize("is_list", [False, True])
def test_answers_that_look_like_dates_stay_text(is_list, tmp_path):
    """All of them together were read as dates, and the rows refused as no text, which no flag could cure."""
    rows = [
        {"prompt": f"When was {name}?", "completion": day} for name, day in (("A", "1999-01-02"), ("B", "2001-03-04"))
    ]
    text = json.dumps(rows) if is_list else "\n".join(map(json.dumps, rows))
    (tmp_path / "rows.json").write_text(text)
    assert load(str(tmp_path / "rows.json"))["train"].to_list() == rows
