"""Rounds of distillation out of public parts: the example's small form."""

import json
import math

import numpy as np
import pytest
from datasets import Dataset

from benchmarks.worlds import notes
from examples import distil
from hf_imitate import Imitator
from hf_imitate.rendering import Answer


def test_two_rounds_leave_imitators_that_load_and_a_picture(tmp_path, capsys):
    folder, figure = tmp_path / "kept", tmp_path / "distil.png"
    found = distil.main(["--smoke", "--output_dir", str(folder), "--figure", str(figure)])

    assert list(found) == [
        "before",
        "one of 8",
        "after round 1",
        "after round 1, one of 8",
        "after round 2",
        distil.CONTROL,
    ]
    bits = [law["bits"] for law in found.values()]
    assert len(set(bits)) == len(bits)  # every round moved the weights, and every choice the law
    assert found["after round 2"]["saved"] == pytest.approx(bits[0] - bits[4])
    assert all(0 <= law["impossible"] <= 1 for law in found.values())
    printed = capsys.readouterr().out
    assert f"{found['after round 2']['bits']:.2f}" in printed
    assert "{'loss'" not in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    last = Imitator.from_pretrained(folder / "judged-2", device="cpu")
    assert last.answer(["3071?"], resample=2, max_new_tokens=4)
    stored = json.loads((folder / "judged-2" / "imitation.json").read_text())
    assert stored["settings"]["freeze_imitator"] is True


def test_kept_answers_are_those_of_the_residual_law_without_empty_ones(monkeypatch):
    asked = {}

    class Fake:
        def answer(self, questions, num_answers, **settings):
            asked.update(settings, num_answers=num_answers)
            return [["one", " "], ["two", "two"]]

    monkeypatch.setattr(distil.Imitator, "from_pretrained", lambda folder, device: Fake())
    rows = distil.kept_answers("folder", ["a", "b"], seed=5)

    assert isinstance(rows, Dataset)
    assert rows.to_dict() == {"prompt": ["a", "b", "b"], "completion": ["one", "two", "two"]}
    assert {name: asked[name] for name in ("seed", "resample", "num_answers")} == {
        "seed": 5,
        "resample": 8,
        "num_answers": 4,
    }


def test_a_note_is_impossible_where_people_never_write_it_or_where_it_does_not_end(monkeypatch):
    """Four notes to one question: one of people's, one closed wrongly, one that says other digits, one without end."""
    test = notes.human_rows(["3071?"] * 4, 0)
    own = [
        Answer("(3071thankyou)", True),
        Answer("(3071thankyou]", True),
        Answer("(1111thankyou)", True),
        Answer("[3071farewell]", False),
    ]
    monkeypatch.setattr(distil.Imitator, "from_pretrained", lambda folder, device: None)
    monkeypatch.setattr(distil, "answers", lambda imitator, asked, seed, resample: own)
    monkeypatch.setattr(distil, "log_prob", lambda *given, **law: {"nats": np.full(2, -math.log(4))})
    nats, impossible = distil.measured("folder", test, distil.SMOKE, 1)

    assert impossible == 0.75
    assert nats.tolist() == [-math.log(4)] * 2
