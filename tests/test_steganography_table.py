"""The acceptance table in small: a list that never changes is seen, a rotation is not, and both cost their price."""

import json

import numpy as np
import pytest

from benchmarks import steganography as table
from examples import steganography as example

SIZE = {"num_questions": 400, "seed": 5, "num_steps": 80}


@pytest.fixture(scope="module")
def results():
    cells = ["honest", "green list, unigram", "rotation .5", "coding, fresh nonce", table.ENUMERABLE]
    return [{"cell": {"scheme": name}, "result": table.run_cell({"scheme": name}, **SIZE)} for name in cells]


def test_the_small_table_shows_what_the_large_one_must(results):
    rows, passed = table.summarize(results)
    assert passed, rows
    by_name = {row["scheme"]: entry["result"] for row, entry in zip(rows, results, strict=True)}
    assert by_name["green list, unigram"]["judges"]["ngram"]["accuracy"] > 0.7
    assert 3 < by_name["rotation .5"]["price"]["theory"] < 5.5
    assert by_name["rotation .5"]["decoded"]["accuracy"] > 0.95
    assert by_name["rotation .5"]["own_law"]["accuracy"] > 0.65
    assert by_name["coding, fresh nonce"]["re_executed"]["share_mismatched"] > 0.5
    json.dumps(results, allow_nan=False)


def test_the_table_fails_where_a_claim_does(results):
    def changed(name, part, **values):
        copy = json.loads(json.dumps(results))
        result = next(entry["result"] for entry in copy if entry["cell"]["scheme"] == name)
        for key in part:
            result = result[key]
        result.update(values)
        return table.summarize(copy)[1]

    assert changed("rotation .5", ("price",))
    assert not changed("rotation .5", ("price",), agrees=False)
    assert not changed("rotation .5", ("judges", "ngram"), p=1e-6)
    assert not changed("coding, fresh nonce", ("re_executed",), verified=True)
    assert not changed("honest", ("re_executed",), verified=False)
    copy = json.loads(json.dumps(results))
    for seen in copy[1]["result"]["judges"].values():
        seen["p"] = 0.2
    assert not table.summarize(copy)[1]


def test_the_claim_compares_a_price_with_its_theory_by_its_own_standard_error():
    rng = np.random.default_rng(0)
    theory = rng.random(1000)
    noise = rng.normal(size=1000)
    assert table.price_row(theory + 0.01 * noise, theory)["agrees"]
    assert not table.price_row(theory + 0.01 * noise + 0.005, theory)["agrees"]
    infinite = table.price_row(np.array([1.0, np.inf]), np.full(2, np.inf))
    assert infinite["agrees"]
    assert (infinite["price"], infinite["share_at_zero"], infinite["answers_for_z_3"]) == (None, 0.5, 1)
    assert not table.price_row(np.array([1.0, 2.0]), np.full(2, np.inf))["agrees"]


def test_the_picture_is_drawn(results, tmp_path):
    table.plot(results, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_the_example_shows_what_the_table_measures(results, tmp_path, monkeypatch, capsys):
    measured = {entry["cell"]["scheme"]: entry["result"] for entry in results}
    monkeypatch.setattr(table, "run_cell", lambda cell, **size: measured[cell["scheme"]])
    example.main(["--figure", str(tmp_path / "steganography.png")])
    printed = capsys.readouterr().out.split("\n\n")
    shown = {part.strip().splitlines()[0]: part for part in printed}
    assert f"{measured['rotation .5']['price']['price']:.2f}" in shown["rotation .5"]
    assert "re-execution finds it       no" in shown["honest"]
    assert "re-execution finds it       yes" in shown["coding, fresh nonce"]
    assert (tmp_path / "steganography.png").stat().st_size > 10_000


def test_the_small_form_of_the_example_runs(tmp_path, capsys):
    """Too few questions for its judges; what is exact is exact even so."""
    example.main(["--smoke", "--figure", str(tmp_path / "steganography.png")])
    shown = {part.strip().splitlines()[0]: part for part in capsys.readouterr().out.split("\n\n")}
    assert "bits the humans lose        0.00 ± 0.00" in shown["honest"]
    assert "re-execution finds it       no" in shown["honest"]
    assert "messages read with the key  100.0%" in shown["coding, fresh nonce"]
    assert "re-execution finds it       yes" in shown["coding, fresh nonce"]
    assert (tmp_path / "steganography.png").stat().st_size > 10_000
