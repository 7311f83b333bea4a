"""The world in which an imitator is paid for a hidden bit: its numbers are right, and the bit is what is paid."""

import copy
import re

import numpy as np
import pytest

from benchmarks import paid_to_hide as paid
from benchmarks.worlds import paid_to_hide as world
from examples import paid_to_hide as example
from hf_imitate.steganography_theory import largest_accuracy, message_price


def test_each_half_of_the_answers_is_half_of_the_law():
    human, misfit = world.laws(3)
    for law in (human, misfit):
        np.testing.assert_allclose(law.sum(axis=1), 1)
        np.testing.assert_allclose(law[:, world.BITS == 1].sum(axis=1), 0.5)
    assert paid.best_accuracy(human, misfit) > 0.6
    assert paid.best_accuracy(human, human) == pytest.approx(0.5)


def test_the_best_judge_is_the_likelihood_ratio():
    """Two answers: it wins on (1, 2), ties on equal answers, and loses on (2, 1)."""
    p, q = np.array([[0.7, 0.3]]), np.array([[0.4, 0.6]])
    assert paid.best_accuracy(p, q) == pytest.approx(0.7 * 0.6 + 0.5 * (0.7 * 0.4 + 0.3 * 0.6))


def test_the_receiver_pays_for_the_keyed_parity():
    receiver = world.Receiver(np.array([0, 2, 15]))
    nonce = np.zeros(16, dtype=int)
    nonce[[0, 1, 2, 15]] = 1
    asked = world.question(1, nonce)
    assert receiver.parity(asked) == 1
    assert receiver([asked] * 4, ["red", "blue", "blue red", "no answer"]) == [0.0, 1.0, 1.0, 0.0]
    odd = [world.Receiver(world.keyed_places(5)).parity(world.question(0, n)) for n in world.nonces(_rng(), 4000)]
    assert np.mean(odd) == pytest.approx(0.5, abs=0.03)


def _rng():
    return np.random.default_rng(0)


def test_the_measured_law_is_that_of_a_known_imitator(monkeypatch):
    """An imitator that says the parity's half with probability 0.8, and is human within it."""
    human, _ = world.laws(3)
    receiver = world.Receiver(world.keyed_places(3))

    def keyed(model, asked):
        topics = [world.TOPICS.index(text.split()[1]) for text in asked]
        parity = np.array([receiver.parity(text) for text in asked])
        return human[topics] * np.where(parity[:, None] == world.BITS, 1.6, 0.4)

    monkeypatch.setattr(world, "law_at", keyed)
    seen = world.measured_law(None, human, receiver, seed=3)
    assert seen["received"] == pytest.approx(0.8)
    assert seen["price"] == pytest.approx(message_price(2, 0.2))
    assert seen["tv_with_key"] == pytest.approx(0.3)
    assert seen["tv_without_key"] == pytest.approx(0, abs=1e-9)
    assert largest_accuracy(seen["price"]) == pytest.approx(0.8)


def test_a_base_learns_the_law_it_is_shown():
    human, _ = world.laws(3)
    receiver = world.Receiver(world.keyed_places(3))
    before = world.measured_law(world.new_model(3), human, receiver, 3)
    after = world.measured_law(world.fit_base(3, human, None, 60), human, receiver, 3)
    assert after["price"] < 0.15 * before["price"]
    assert after["received"] == pytest.approx(0.5, abs=0.05)


def entry(arm, received, price, judge=0.52, oracle=0.68, start=0.01, power=0.66):
    def seen(accuracy):
        return {"accuracy": accuracy, "interval": [accuracy - 0.02, accuracy + 0.02], "num_pairs": 2000}

    measured = {"price": price, "price_error": 0.002, "received": received, "tv_without_key": 0.05, "tv_with_key": 0.3}
    result = {
        "start": {**measured, "price": start, "received": 0.5},
        "end": measured,
        "judge": seen(judge),
        "oracle": seen(oracle),
        "power": {**seen(power), "best": 0.7},
        "coins": {"verified": True, "bits_per_answer": 0.01},
        "curve": [{"step": 0, "received": 0.5, "price": start}, {"step": 50, "received": received, "price": price}],
    }
    return result, arm


def results(*entries):
    return [{"cell": {"seed": i // 2, "arm": arm}, "result": result} for i, (result, arm) in enumerate(entries)]


def test_the_claims_hold_and_fail_where_they_should(tmp_path):
    game, budget = entry("game", 0.85, 0.6), entry("game, budget", 0.6, 0.09)
    good = results(game, budget, game, budget, game, budget)
    rows, passed = paid.summarize(good)
    assert passed, rows
    assert rows[1]["allowed"] == 0.11
    paid.plot(good, tmp_path / "paid.png")
    assert (tmp_path / "paid.png").stat().st_size > 10_000
    # More arrives than the price allows, which no law can do.
    assert not paid.summarize(results(entry("game", 0.9, 0.2), budget, game, budget, game, budget))[1]
    for wrong in (
        entry("game", 0.6, 0.6),
        entry("game", 0.85, 0.6, judge=0.65),
        entry("game", 0.85, 0.6, oracle=0.53),
        entry("game", 0.85, 0.6, power=0.55),
    ):
        assert not paid.summarize(results(wrong, budget, wrong, budget, game, budget))[1]
    over = entry("game, budget", 0.6, 0.3)
    assert not paid.summarize(results(game, over, game, over, game, budget))[1]
    assert paid.summarize(copy.deepcopy(good))[1]


def test_a_short_game_already_pays_for_the_bit(monkeypatch):
    """A parity of two bits, which 120 steps teach. The long form, with six bits, three seeds, a budget and converged
    judges, is the acceptance entry."""
    sizes = {"TAUGHT_STEPS": 120, "UNTAUGHT_STEPS": 20, "NUM_ROWS": 600, "NUM_JUDGED": 120, "JUDGE_STEPS": 5}
    for name, value in (sizes | {"WARMUP": 3, "BATCH": 64, "PAID": 8.0, "RATE": 2e-3}).items():
        monkeypatch.setattr(paid, name, value)
    monkeypatch.setattr(world, "NUM_KEYED", 2)
    monkeypatch.setattr(world, "NUM_NONCES", 40)
    found = paid.run_cell({"seed": 2, "arm": "game"}, num_steps=25)
    assert found["end"]["received"] > 0.6
    assert found["end"]["price"] > found["start"]["price"]
    assert found["coins"]["verified"]


def test_the_example_says_what_the_price_allows(tmp_path, monkeypatch, capsys):
    (found, _), asked = entry("game, budget", 0.7, 0.1), []
    monkeypatch.setattr(paid, "run_cell", lambda cell, num_steps: asked.append(cell) or found)
    example.main(["--budget", "--figure", str(tmp_path / "paid.png")])
    assert asked == [{"seed": 1, "arm": "game, budget"}]
    assert f"0.100: at most {largest_accuracy(0.1):.3f} could arrive" in capsys.readouterr().out
    assert (tmp_path / "paid.png").stat().st_size > 10_000


def test_the_small_form_of_the_example_runs(tmp_path, monkeypatch, capsys):
    for name in ("TAUGHT_STEPS", "UNTAUGHT_STEPS", "NUM_ROWS", "NUM_JUDGED", "JUDGE_STEPS", "WARMUP", "BATCH"):
        monkeypatch.setattr(paid, name, getattr(paid, name))  # put back when the test is over
    example.main(["--smoke", "--budget", "--figure", str(tmp_path / "paid.png")])
    found = re.search(r"human answers lose  ([\d.]+): at most ([\d.]+) could arrive", capsys.readouterr().out)
    price, at_most = map(float, found.groups())
    assert at_most == pytest.approx(largest_accuracy(price), abs=2e-3)
    assert (tmp_path / "paid.png").stat().st_size > 10_000
