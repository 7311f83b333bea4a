"""The phases of one loop: which step belongs to which, how long a warm-up may last, what the imitator's rate is."""

import pytest

from hf_imitate.trainers.phases import (
    DISTINGUISHER_LM_WARMUP,
    DISTINGUISHER_WARMUP,
    GAME,
    IMITATOR_WARMUP,
    Phases,
    warmup_caps,
)


def names(phases):
    return [phases.name(step) for step in range(phases.total)]


def test_every_step_belongs_to_one_phase_in_order():
    phases = Phases(2, 3, 4)
    assert names(phases) == [IMITATOR_WARMUP] * 2 + [DISTINGUISHER_WARMUP] * 3 + [GAME] * 4
    assert [phases.step_in_phase(step) for step in range(9)] == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert phases.game_start == 5


def test_the_body_of_a_separate_distinguisher_is_fitted_between_the_imitator_and_the_classification():
    phases = Phases(2, 3, 1, distinguisher_lm_warmup=2)
    assert names(phases) == [
        *([IMITATOR_WARMUP] * 2 + [DISTINGUISHER_LM_WARMUP] * 2 + [DISTINGUISHER_WARMUP] * 3 + [GAME])
    ]
    assert [phases.step_in_phase(step) for step in range(8)] == [0, 1, 0, 1, 0, 1, 2, 0]
    phases.end(3)
    assert names(phases) == [IMITATOR_WARMUP] * 2 + [DISTINGUISHER_LM_WARMUP] + [DISTINGUISHER_WARMUP] * 3 + [GAME]


def test_a_step_past_the_end_still_belongs_to_the_game():
    """The loop asks for the learning rate of the step after the last."""
    assert Phases(1, 1, 2).name(4) == GAME


@pytest.mark.parametrize(("sizes", "first"), [((0, 0, 3), GAME), ((0, 2, 3), DISTINGUISHER_WARMUP)])
def test_a_warmup_of_no_steps_is_skipped(sizes, first):
    assert Phases(*sizes).name(0) == first


@pytest.mark.parametrize(
    ("step", "left"), [(0, (0, 5, 7)), (3, (3, 5, 7)), (10, (10, 0, 7)), (12, (10, 2, 7)), (15, (10, 5, 7))]
)
def test_ending_a_warmup_makes_its_step_the_first_of_the_next_phase(step, left):
    phases = Phases(10, 5, 7)
    before = phases.name(step)
    phases.end(step)
    assert (phases.imitator_warmup, phases.distinguisher_warmup, phases.game) == left
    assert phases.name(step) != before or before == GAME
    assert phases.step_in_phase(step) == 0


def test_the_learning_rate_rises_falls_rests_and_then_follows_the_users_schedule():
    phases = Phases(20, 2, 3)
    rates = [phases.learning_rate_factor(step, 10.0, lambda number: 1 / (1 + number)) for step in range(26)]
    assert rates[0] == pytest.approx(10 * 0.1)
    assert rates[9] == pytest.approx(10 * (1 - 0.9 * 9 / 20))
    assert max(rates[:20]) == rates[9]
    assert rates[19] == pytest.approx(10 * (1 - 0.9 * 19 / 20))
    assert rates[20:22] == [0.0, 0.0]
    assert rates[22:] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


@pytest.mark.parametrize(
    ("given", "num_rows", "rows_per_step", "caps"),
    [
        (("auto", "auto", "auto"), 800, 8, (300, 200, 300)),
        (("auto", "auto", "auto"), 10, 8, (20, 200, 20)),
        (("auto", "auto", "auto"), 801, 8, (301, 200, 301)),
        (("auto", "auto", "auto"), 10**6, 8, (1000, 200, 1000)),
        ((7, 0, 4), 800, 8, (7, 0, 4)),
        (("auto", 5, 0), 800, 0, (1000, 5, 0)),
    ],
)
def test_an_automatic_warmup_takes_at_most_three_passes_or_two_hundred_steps(given, num_rows, rows_per_step, caps):
    imitator, distinguisher, lm = given
    assert warmup_caps(imitator, distinguisher, num_rows, rows_per_step, distinguisher_lm=lm) == caps


def test_the_rate_of_a_body_rises_and_falls_within_its_own_phase_and_the_imitators_rests_there():
    phases = Phases(3, 0, 2, distinguisher_lm_warmup=20)
    rates = [phases.lm_learning_rate_factor(step) for step in range(3, 23)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1 - 0.9 * 9 / 20)
    assert rates[19] == pytest.approx(1 - 0.9 * 19 / 20)
    assert {phases.learning_rate_factor(step, 10.0, lambda number: 1.0) for step in range(3, 23)} == {0.0}


def test_the_state_rebuilds_the_phases():
    phases = Phases(10, 5, 7)
    phases.end(4)
    assert Phases(**phases.state()) == phases
