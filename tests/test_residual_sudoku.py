"""One of K answers to a Sudoku, by a distinguisher that checks: every part runs, and rates are probabilities."""

import math

import numpy as np
import pytest
import torch

from benchmarks import residual_sudoku
from benchmarks.worlds import sudoku_arms
from examples import residual


def test_every_part_of_the_sudoku_entry_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(sudoku_arms, "START_STEPS", 60)
    monkeypatch.setattr(sudoku_arms, "READ_EVERY", 30)
    small = sudoku_arms.data()._replace(
        validation=sudoku_arms.data().validation[:20], test=sudoku_arms.data().test[:20]
    )
    monkeypatch.setattr(sudoku_arms, "data", lambda: small)
    for name, value in {
        "STARTS": tmp_path,
        "NUM_SCORED": 6,
        "NUM_PICKED": 20,
        "DISTINGUISHER_STEPS": 2,
        "DISTINGUISHER_BATCH": 8,
        "DISTIL_STEPS": 2,
        "ESTIMATES": {1: 1, 2: 2, 4: 2, 8: 2},
    }.items():
        monkeypatch.setattr(residual_sudoku, name, value)

    result = residual_sudoku.run_cell({"seed": 6})
    rows, passed = residual_sudoku.summarize([{"cell": {"seed": 6}, "result": result}])

    solve_rates = [row["solved"] for row in rows[:4]]
    assert not passed or solve_rates == sorted(solve_rates)
    assert rows[0]["gain kept"] == 0
    assert [row["law"] for row in rows] == ["K = 1", "K = 2", "K = 4", "K = 8", "distilled, K = 1"]
    assert result["check_weight"] != 0
    assert result["distilled"]["bits"] != result["K"]["1"]["bits"]
    residual_sudoku.plot([{"cell": {"seed": 6}, "result": result}], tmp_path / "sudoku.png")


def test_solved_puzzles_are_counted_by_probability():
    """Two puzzles of known probability under an untrained model: the mean of p, not p of the mean."""
    torch.manual_seed(0)
    model = residual_sudoku.arms.new_model()
    puzzles = residual_sudoku.data().test[:4]
    imitator = residual_sudoku.Imitator(model.eval(), residual_sudoku.tokenizer(), max_new_tokens=9)
    found = residual_sudoku.measured(imitator, puzzles, 1, 1, 0)
    nats = sudoku_arms.log_probs(model, puzzles)
    assert found["solved"] == pytest.approx(np.exp(nats).mean(), rel=1e-4)
    assert found["bits"] == pytest.approx(-nats.mean() / math.log(2), rel=1e-5)


def test_one_of_k_answers_is_a_law_with_a_rate_and_bits(tmp_path, monkeypatch):
    for module, name in (
        (sudoku_arms, "START_STEPS"),
        (sudoku_arms, "READ_EVERY"),
        (residual_sudoku, "DISTINGUISHER_STEPS"),
        (residual_sudoku, "DISTINGUISHER_BATCH"),
        (residual_sudoku, "STARTS"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # the small form changes it: put it back
    small = sudoku_arms.data()._replace(validation=sudoku_arms.data().validation[:6], test=sudoku_arms.data().test[:6])
    monkeypatch.setattr(sudoku_arms, "data", lambda: small)
    monkeypatch.setattr(residual, "data", lambda: small)
    found = residual.main(["--smoke", "--figure", str(tmp_path / "residual.png")])

    assert list(found) == [1, 2, 4, 8]
    assert all(0 <= law["solved"] <= 1 and law["bits"] > 0 for law in found.values())
    assert found[1]["bits"] != found[8]["bits"]
    assert (tmp_path / "residual.png").read_bytes().startswith(b"\x89PNG")
