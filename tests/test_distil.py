"""Rounds of distillation out of public parts: the example's small form."""

import json

import pytest
from datasets import Dataset

from examples import distil
from hf_imitate import Imitator, load_docstrings


@pytest.fixture(autouse=True)
def few_docstrings(monkeypatch):
    """Of two packages, so that parsing takes a moment."""
    monkeypatch.setattr(distil, "load_docstrings", lambda: load_docstrings(["json", "email", "logging"]))
    monkeypatch.setattr(distil, "LONGEST", 8)


def test_two_rounds_leave_imitators_that_load_and_a_distinguisher_for_the_last(tiny_model_dir, tmp_path, capsys):
    arguments = [str(tiny_model_dir), "--smoke", "--rounds", "2", "--output_dir", str(tmp_path)]
    measured = distil.main(arguments)

    assert len(measured) == 3
    plain = [one["plain"] for one in measured]
    assert len(set(plain)) == 3  # every round moved the weights
    assert all(one["picked"] != one["plain"] for one in measured)
    printed = capsys.readouterr().out
    assert f"Round 2: {plain[2]:.2f} bits" in printed
    assert f"moves {plain[0] - plain[1]:.2f} bits into the weights" in printed
    assert (tmp_path / "distil.png").stat().st_size > 10_000
    last = Imitator.from_pretrained(tmp_path / "residual-2", device="cpu")
    assert last.answer(["def dump(obj):\n"], resample=2, max_new_tokens=4)
    stored = json.loads((tmp_path / "residual-2" / "imitation.json").read_text())
    assert stored["settings"]["freeze_imitator"] is True


def test_picked_answers_are_those_of_the_residual_law_without_what_no_row_may_hold(monkeypatch):
    asked = {}

    class Fake:
        def answer(self, questions, **settings):
            asked.update(settings)
            return [["one"], [" "], ["three"], ["a\x00b"]]

    monkeypatch.setattr(distil.Imitator, "from_pretrained", lambda folder: Fake())
    rows = distil.picked("folder", ["a", "b", "c", "d"], seed=5)

    assert isinstance(rows, Dataset)
    assert rows.to_dict() == {"prompt": ["a", "c"], "completion": ["one", "three"]}
    assert asked == {"seed": 5, "resample": 8}
