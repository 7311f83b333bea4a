"""lm-evaluation-harness measures the log-probabilities that we state, where it is installed."""

import sys

import pytest
from tiny_runs import rows

from benchmarks import acceptance, agreement

ANSWERS = (" abc", " de fgh", " m", " Return the number of items in the list.")


def test_a_harness_that_is_missing_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    with pytest.raises(ModuleNotFoundError, match="`pip install lm_eval`"):
        agreement.run_cell(agreement.CELLS[0])


def test_a_blank_that_the_harness_would_count_to_the_answer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 2 questions \(1\) end in a blank"):
        agreement.measure(tmp_path, ["a:", "b: "], ["x", "y"])


def test_the_claim_fails_where_one_answer_is_off_by_more_than_rounding():
    nats = {"with end": {"ours": [-3.0, -4.0], "theirs": [-3.0, -4.0 - 2 * agreement.TOLERANCE]}}
    table, passed = agreement.summarize([{"cell": {}, "result": {"num_other_ids": 1, "nats": nats}}])
    assert not passed
    assert table[0]["max_difference"] == pytest.approx(2 * agreement.TOLERANCE)
    nats["with end"]["theirs"][1] = -4.0
    assert agreement.summarize([{"cell": {}, "result": {"num_other_ids": 1, "nats": nats}}])[1]


def test_it_is_an_entry_of_the_acceptance_run():
    assert acceptance.load_entry("agreement") is agreement


def test_a_trained_imitators_log_probs_are_the_harness_s(tmp_path, tiny_model_dir):
    pytest.importorskip("lm_eval")
    dataset = rows(40, ANSWERS)
    agreement.train(str(tiny_model_dir), str(tmp_path), dataset, {"num_steps": 20, "seed": 0})
    result = agreement.measure(tmp_path, dataset["prompt"][:], dataset["completion"][:])
    table, passed = agreement.summarize([{"cell": {}, "result": result}])
    assert passed
    without_end, with_end = table
    assert without_end["pairs"] == with_end["pairs"] == 40
    assert with_end["mean_nats"] < without_end["mean_nats"] - 0.01
    assert max(row["max_difference"] for row in table) < 1e-4
