"""The demo's latent task: its world, that thinking helps in it, and that its bound is one."""

import math

import pytest

from hf_imitate import demo_thinking
from hf_imitate.demo_thinking import MODULUS, NUM_DIGITS, Thinking, human_rows, show, think
from hf_imitate.latent_imitator import ThoughtAnswer
from hf_imitate.rendering import Answer


def test_a_thought_is_the_running_sums_and_the_answer_its_last_digit():
    rows = human_rows(50, 20, seed=0)
    for number, row in enumerate(rows):
        digits = [int(digit) for digit in row["prompt"].split()]
        assert len(digits) == NUM_DIGITS
        assert int(row["completion"]) == sum(digits) % MODULUS
        if number < 20:
            sums = [sum(digits[: place + 1]) % MODULUS for place in range(NUM_DIGITS)]
            assert row["thought"] == " ".join(map(str, sums))
        else:
            assert row["thought"] is None


def test_no_question_is_asked_twice():
    """So that no test question was trained on."""
    assert len(set(human_rows(4300, 0, seed=0)["prompt"])) == 4300


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The task with fewer steps on hidden thoughts, which cost most, and time enough not to be cut."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"NUM_ESTIMATES": 16, "KNOWN_STEPS": 300, "ALL_STEPS": 10}.items():
            patch.setattr(demo_thinking, name, value)
        return think(tmp_path_factory.mktemp("thinking"), 10_000.0, seed=3)


def test_thoughts_help_and_the_same_answers_without_them_do_not(found):
    """0.4 nats after 60 steps on hidden thoughts, which take most of the time; here are fewer."""
    assert found.num_steps == (300, 50, 10)
    assert found.plain_steps == 360
    assert found.latent < found.chance - 0.3
    assert found.plain > found.chance - 0.1


def test_the_certified_bound_costs_what_markov_asks_over_all_answers(found):
    assert found.bound - found.latent == pytest.approx(math.log(1 / 0.05) / demo_thinking.NUM_TEST)
    assert 1 <= found.effective_sample_size <= 16


def test_a_slow_machine_takes_fewer_steps(tmp_path):
    """A quarter of a second is over within the first step of every part."""
    slow = think(tmp_path, 0.25, seed=0)
    assert slow.num_steps[0] < demo_thinking.KNOWN_STEPS / 4
    assert sum(slow.num_steps) <= slow.num_steps[0] + 3
    assert math.isfinite(slow.bound)


def test_what_is_shown_names_the_hidden_thought(capsys):
    drawn = ThoughtAnswer("1 3", Answer("3", True), [1, 3], [3])
    show(Thinking(1.79, 1.85, 0.41, 0.42, 26.4, (400, 50, 60), 510, [("1 2", "3", drawn)]))
    printed = capsys.readouterr().out
    assert "1 2 = 3   thought: 1 3        answer: 3" in printed
    assert "0.420, certified at 95%" in printed
    assert "count as 26" in printed
