import json

import numpy as np
import pytest

from hf_imitate.guards import PATIENCE, STOP_AFTER, Guard

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
