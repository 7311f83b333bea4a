"""The world whose law is known: its measures are right, and a short game already brings the imitator nearer."""

import numpy as np
import pytest

from benchmarks import known_law


def test_a_law_has_no_distance_from_itself_and_full_distance_from_silence():
    human, base = known_law.laws(3)
    assert known_law.total_variation(human, human) == pytest.approx(0)
    assert known_law.total_variation(np.zeros_like(human), human) == pytest.approx(1)
    assert known_law.total_variation(base, human) == pytest.approx(np.abs(base - human).sum(axis=1).mean() / 2)


def test_the_base_is_a_misfit_that_uses_the_question():
    human, base = known_law.laws(known_law.SEEDS[0])
    assert known_law.total_variation(base, human) >= 0.3
    assert np.abs(base - base.mean(axis=0)).sum(axis=1).mean() / 2 > 0.2


def test_the_model_states_the_law_it_was_fitted_to():
    human, _ = known_law.laws(3)
    model = known_law.fit_to_law(known_law.new_model(3), human, num_steps=300)
    law = known_law.exact_law(model)
    assert known_law.total_variation(law, human) < 0.03
    assert (law.sum(axis=1) <= 1 + 1e-6).all()


def test_a_short_game_moves_the_imitator_towards_the_human():
    """The long form, with judges, controls and five seeds, is the acceptance entry."""
    measured = known_law.run_cell({"seed": 12, "arm": "game, not judged"}, num_steps=110)
    assert measured["tv_end"] < 0.92 * measured["tv_start"]
