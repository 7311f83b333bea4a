"""One of eight docstrings: every part runs on few rows, and each view hides what it says it hides."""

import pytest
from datasets import Dataset

from benchmarks import residual_docstrings
from hf_imitate import load_docstrings

TINY = residual_docstrings.Sizes(
    train=90,
    judge_rows=40,
    test=60,
    scored=4,
    imitator_steps=4,
    judge_lm_steps=4,
    larger_steps=3,
    ngram_steps=4,
    distinguisher_steps=3,
    judge_steps=3,
)


@pytest.fixture(autouse=True)
def few_docstrings(monkeypatch, tiny_model_dir):
    packages = ["json", "email", "logging", "argparse", "pathlib"]
    monkeypatch.setattr(residual_docstrings, "load_docstrings", lambda: load_docstrings(packages))
    monkeypatch.setattr(residual_docstrings, "tiny_base", lambda: tiny_model_dir)
    monkeypatch.setattr(residual_docstrings, "LONGEST", 8)
    residual_docstrings.rows.cache_clear()
    yield
    residual_docstrings.rows.cache_clear()


def test_every_cell_runs_and_is_summed_up(tmp_path):
    cells = [cell for cell in residual_docstrings.CELLS if cell.get("judge", 0) == 0]
    results = [{"cell": cell, "result": residual_docstrings.run_cell(cell, TINY, tmp_path)} for cell in cells]
    rows, passed = residual_docstrings.summarize(results)

    assert passed  # nothing is claimed
    assert [row["arm"] for row in rows] == ["likelihood", "ngram", "larger", "human"]
    assert rows[0]["gained"] == 0
    assert rows[1]["bits"] != rows[0]["bits"] != rows[2]["bits"]
    assert all(set(row) == set(rows[0]) for row in rows)


def test_no_question_is_in_two_parts():
    parts = [set(part["prompt"]) for part in residual_docstrings.rows(TINY)]
    assert [len(part) for part in parts] == [90, 40, 60]
    assert len(set.union(*parts)) == 190


def test_too_few_docstrings_are_an_error():
    with pytest.raises(ValueError, match="are needed"):
        residual_docstrings.rows(TINY._replace(train=10**6))


def test_views_leave_out_repeats_and_length():
    test = Dataset.from_dict(
        {"prompt": ["a", "b", "c"], "completion": ["Known one.", "Say this and that again.", "Too short."]}
    )
    texts = ["Another.", "Do so until it is done.", "Known one."]
    views = {
        view: residual_docstrings.seen_as(view, test, texts, {"Known one."}) for view in residual_docstrings.VIEWS
    }

    assert [pair.prompt for pair in views["all"]] == ["a", "b", "c"]
    assert [pair.prompt for pair in views["no repeats"]] == ["b"]
    (pair,) = views["five words"]
    assert (pair.human.text, pair.imitator[0].text) == ("Say this and that again.", "Do so until it is")
    assert not pair.human.ended
    assert not pair.imitator[0].ended
