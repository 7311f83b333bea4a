import json

import numpy as np
import pytest

from hf_imitate.guards import PATIENCE, STOP_AFTER, Guard, Memory

WELL = {"accuracy": 0.7, "spread": 1.0, "truncated": 0.05, "truncated_human": 0.05}


def run(guard, steps, **changes):
    return [guard.update(**WELL | changes) for _ in range(steps)]


def test_a_game_that_goes_well_is_never_paused():
    guard = Guard()

    assert set(run(guard, 200)) == {None}
    assert not guard.should_stop


def test_an_imitator_that_stops_ending_is_paused_named_and_stopped():
    """The collapse of weak distinguishers: every answer runs into the limit, all rewards of a question are alike, and
    accuracy reads 1."""
    guard = Guard()
    run(guard, 10)

    reasons = run(guard, 60, accuracy=1.0, spread=0.0, truncated=1.0)

    first = next(i for i, reason in enumerate(reasons) if reason)
    assert first <= 2
    assert all("stops ending its answers" in reason for reason in reasons[first:])
    assert guard.num_paused == 60 - first >= STOP_AFTER
    assert guard.should_stop


@pytest.mark.parametrize("humans", [[1, 0, 0, 0], [1, 0, 1, 1, 0]], ids=str)
def test_truncation_that_humans_share_is_no_collapse(humans):
    """Small batches: the human's share jumps between 0 and 1 around its mean, the imitator's stays at that mean."""
    guard, share = Guard(), sum(humans) / len(humans)

    reasons = []
    for step in range(300):
        imitator = share if step else 0.0  # its first batch happened to hold none
        reasons.append(guard.update(0.6, 1.0, imitator, float(humans[step % len(humans)])))

    assert set(reasons) == {None}


def test_an_imitator_that_was_cut_from_the_start_is_compared_with_its_start():
    assert set(run(Guard(), 100, truncated=0.4)) == {None}
    guard = Guard()
    run(guard, 1, truncated=0.4)
    assert "stops ending" in run(guard, 40, truncated=0.6)[-1]


def game_of_small_batches(seed, shares):
    """The guard and its reasons over batches of 8 answers, cut with these probabilities; 2 % of the human's are."""
    generator, guard = np.random.default_rng(seed), Guard()
    cut, human_cut = generator.binomial(8, shares) / 8, generator.binomial(8, 0.02, len(shares)) / 8
    reasons, stopped = [], False
    for imitator, human in zip(cut, human_cut, strict=True):
        reasons.append(guard.update(0.6, 1.0, imitator, human, num_answers=8))
        stopped |= guard.should_stop
    return reasons, stopped


def test_a_steady_imitator_in_small_batches_is_hardly_ever_paused_and_never_stopped():
    """A first batch without a cut answer has a probability of 27 %, and says little about the imitator's share."""
    games = [game_of_small_batches(seed, [0.15] * 500) for seed in range(100)]

    assert sum(stopped for _, stopped in games) <= 1
    assert sum(reason is not None for reasons, _ in games for reason in reasons) <= 0.01 * 100 * 500


@pytest.mark.parametrize("calm", [8, 100])
def test_a_runaway_imitator_in_small_batches_is_paused_soon_and_stopped(calm):
    """The share rises from 15 % to 90 % over 10 batches, and stays there."""
    shares = [*[0.15] * calm, *np.linspace(0.15, 0.9, 10), *[0.9] * 90]
    for seed in range(100):
        reasons, stopped = game_of_small_batches(seed, shares)
        assert any(reasons[calm : calm + 15])
        assert stopped


def test_too_few_answers_to_know_the_start_pause_nothing():
    guard = Guard()
    cut = [0.0] + [1.0] * 7

    reasons = [guard.update(0.6, 1.0, share, 0.0, num_answers=8) for share in cut]

    assert set(reasons) == {None}
    assert guard.truncated_at_start == pytest.approx(7 / 8)
    assert guard.num_at_start == 64


def test_a_collapse_within_the_first_batches_is_none_of_the_imitators_usual_ways():
    """Eight batches of eight answers: without the answers from before the game, they would be all there is to compare
    with."""
    collapse = [(0.6, 1.0, share, 0.0, 8) for share in np.linspace(0.2, 1.0, 8)]
    naive, guard = Guard(), Guard()
    for _ in range(10):
        guard.note_start(0.05, 8)

    assert not any(naive.update(*batch) for batch in collapse)
    assert any(guard.update(*batch) for batch in collapse)
    assert guard.truncated_at_start == pytest.approx(0.05)
    assert guard.num_at_start == 80


def test_too_few_answers_from_before_the_game_are_topped_up():
    guard = Guard()
    guard.note_start(0.0, 32)

    for _ in range(10):
        guard.update(0.6, 1.0, 0.5, 0.0, num_answers=16)

    assert guard.num_at_start == 64
    assert guard.truncated_at_start == pytest.approx(0.25)


def test_a_lucky_first_batch_of_the_game_does_not_make_the_usual_share_a_collapse():
    """Seen on Sudoku: 6 % of answers were cut all through the warm-up, 1 % in the game's first twelve questions; the
    12 % that the first steps of the game brought were called a collapse, and the run was stopped."""
    shares = [0.01] + [0.12] * 60
    naive, guard = Guard(), Guard()
    for _ in range(100):
        guard.note_start(0.06, 96, asks_all=False)

    assert any(naive.update(0.6, 1.0, share, 0.0, 96) for share in shares)
    assert not any(guard.update(0.6, 1.0, share, 0.0, 96) for share in shares)
    assert guard.truncated_labelled == pytest.approx(0.06)
    assert guard.num_at_start == 96  # the game's questions are of other kinds, so its own first answers count, too
    assert any(guard.update(0.6, 1.0, 0.5, 0.0, 96) for _ in range(10))


def test_a_perfect_distinguisher_whose_rewards_do_not_spread_pauses_the_imitator():
    reasons = run(Guard(), 3, accuracy=1.0, spread=1e-4)

    assert all("too strong to teach" in reason for reason in reasons)


@pytest.mark.parametrize("changes", [{"accuracy": 1.0, "spread": 0.5}, {"accuracy": 0.9, "spread": 0.0}])
def test_high_accuracy_alone_or_flat_rewards_alone_do_not_pause(changes):
    assert set(run(Guard(), 100, **changes)) == {None}


def test_a_distinguisher_below_chance_for_long_pauses_the_imitator():
    reasons = run(Guard(), PATIENCE + 1, accuracy=0.2)

    assert set(reasons[: PATIENCE - 1]) == {None}
    assert "below chance" in reasons[PATIENCE - 1]
    assert "80% of pairs" in reasons[PATIENCE - 1]


def test_without_labelled_questions_accuracy_is_not_judged():
    guard = Guard()

    assert set(run(guard, 100, accuracy=None, spread=0.0)) == {None}
    assert guard.accuracy is None


def test_a_game_that_recovers_goes_on():
    guard = Guard()
    run(guard, 1)
    run(guard, 30, truncated=1.0)
    assert guard.num_paused > 0

    reasons = run(guard, 60)

    assert reasons[-1] is None
    assert guard.num_paused == 0
    assert not guard.should_stop


def test_a_kind_of_reason_is_news_once_per_pause_whatever_its_numbers():
    guard = Guard()
    run(guard, 1)

    said = [guard.is_news(reason) for reason in run(guard, 30, truncated=1.0) if reason]

    assert said[0] is True
    assert not any(said[1:])
    run(guard, 60)
    again = [reason for reason in run(guard, 30, truncated=1.0) if reason]
    assert guard.is_news(again[0])


def test_the_three_reasons_are_told_apart():
    guard = Guard()
    reasons = {
        run(Guard(), 1, accuracy=1.0, spread=0.0)[-1],
        run(Guard(), PATIENCE, accuracy=0.1)[-1],
        [run(guard, 1), run(guard, 30, truncated=1.0)][1][-1],
    }

    news = Guard()
    assert [news.is_news(reason) for reason in reasons] == [True, True, True]


def test_its_state_goes_through_json_and_on():
    one = Guard()
    run(one, 5)
    run(one, 7, truncated=1.0)
    other = Guard(**json.loads(json.dumps(one.state())))

    assert other == one
    assert run(other, 5, truncated=1.0) == run(one, 5, truncated=1.0)


# --- memory


def warnings_of(memory, accuracy, accuracy_heldout, num=15, num_heldout=1, steps=400):
    said = [memory.update(accuracy, num, accuracy_heldout, num_heldout) for _ in range(steps)]
    return [(step, warning) for step, warning in enumerate(said) if warning]


def test_a_distinguisher_that_knows_only_what_it_saw_is_named_once_with_its_cures():
    (first, warning), *others = warnings_of(Memory(10_000, 500), 0.9, 0.6)

    assert 5 <= first < 40
    assert others == []
    assert "right in 90% of pairs" in warning
    assert "60% with held-out" in warning
    for cure in (
        "more human rows",
        "smaller `distinguisher`",
        "`distinguisher_steps`",
        "`distinguisher_learning_rate`",
    ):
        assert cure in warning


@pytest.mark.parametrize(("accuracy", "heldout"), [(0.9, 0.9), (0.6, 0.9), (0.9, 0.82), (1.0, 1.0), (0.5, 0.5)])
def test_a_gap_below_a_tenth_is_no_memory(accuracy, heldout):
    assert warnings_of(Memory(10_000, 500), accuracy, heldout) == []


def test_chance_is_hardly_ever_taken_for_memory():
    """Fifty runs of two hundred batches at each accuracy; each trial a coin, the widest that a win can vary."""
    generator, said = np.random.default_rng(0), 0
    for accuracy in (0.5, 0.7, 0.9, 0.97):
        for _ in range(50):
            memory = Memory(10_000, 500)
            for _ in range(200):
                num_heldout = generator.binomial(16, 0.05)
                wins = generator.binomial([16 - num_heldout, num_heldout], accuracy)
                share = wins / np.maximum([16 - num_heldout, num_heldout], 1)
                said += memory.update(share[0], 16 - num_heldout, share[1], num_heldout) is not None
    assert said <= 8


def test_three_held_out_answers_prove_nothing_however_often_they_come_back():
    assert warnings_of(Memory(60, 3), 0.9, 0.5) == []
    assert len(warnings_of(Memory(6000, 300), 0.9, 0.5)) == 1


def test_without_held_out_answers_memory_is_not_judged():
    assert warnings_of(Memory(60, 0), 1.0, float("nan"), num_heldout=0) == []


def test_memory_of_long_ago_is_forgotten():
    memory = Memory(10_000, 500)
    warnings_of(memory, 0.9, 0.88, steps=1000)
    assert warnings_of(memory, 0.9, 0.5) != []


def test_what_is_known_of_memory_goes_through_json_and_on():
    one = Memory(10_000, 500)
    warnings_of(one, 0.9, 0.6, steps=5)
    other = Memory(**json.loads(json.dumps(one.state())))

    assert other == one
    assert warnings_of(other, 0.9, 0.6) == warnings_of(one, 0.9, 0.6)


def test_a_distinguisher_that_begins_to_remember_late_is_noticed_soon():
    memory = Memory(num_rows=1000, num_heldout_rows=200)
    for _ in range(2000):
        assert memory.update(0.6, 10, 0.6, 1) is None

    assert any(memory.update(1.0, 10, 0.5, 1) for _ in range(150))
