import math
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from hf_imitate.checks import check_name, check_names, check_outcomes, first_weights


def is_short(prompts, completions, completion_ids=None, **columns):
    return [len(text) < 4 for text in completions]


def matches(prompts, completions, completion_ids=None, *, key, **columns):
    return [None if k is None else text == k for text, k in zip(completions, key, strict=True)]


def returning(value, name="odd"):
    def check(prompts, completions, completion_ids=None, **columns):
        return value

    check.__name__ = name
    return check


def test_outcomes_stand_in_the_order_of_answers_and_checks():
    outcomes = check_outcomes([is_short, matches], ["q"] * 3, ["abc", "long text", "x"], key=["abc", None, "y"])

    expected = torch.tensor([[1.0, 1.0], [0.0, torch.nan], [1.0, 0.0]])
    torch.testing.assert_close(outcomes, expected, equal_nan=True)


def test_no_checks_give_no_columns():
    assert check_outcomes([], ["q"] * 3, ["a"] * 3).shape == (3, 0)


def test_a_check_sees_questions_answers_ids_and_columns_once():
    calls = []

    def spy(prompts, completions, completion_ids=None, **columns):
        calls.append((prompts, completions, completion_ids, columns))
        return [0.25] * len(prompts)

    outcomes = check_outcomes([spy], ["q", "r"], ["a", "b"], [[1], [2]], key=[3, 4])

    assert calls == [(["q", "r"], ["a", "b"], [[1], [2]], {"key": [3, 4]})]
    assert outcomes.tolist() == [[0.25], [0.25]]


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.bool_(True), torch.tensor(1.0)])
def test_anything_that_is_a_number_is_an_outcome(value):
    assert check_outcomes([returning([value])], ["q"], ["a"]).tolist() == [[1.0]]


def test_a_check_that_raises_is_named_and_its_error_kept():
    def broken(prompts, completions, completion_ids=None, **columns):
        raise KeyError("a private answer")

    with pytest.raises(RuntimeError, match="'broken' raised KeyError on 2 answers") as raised:
        check_outcomes([is_short, broken], ["q", "r"], ["a", "b"])

    assert isinstance(raised.value.__context__, KeyError)
    printed = "".join(traceback.format_exception(raised.value))
    assert f"{Path(__file__).name}, line {broken.__code__.co_firstlineno + 1}" in printed
    # Of this file's own lines the traceback shows the source; the error's words would stand after its name.
    assert "KeyError: 'a private answer'" not in printed


def test_a_check_that_does_not_take_what_it_is_given_is_told_what_that_is():
    def narrow(completions):
        return [1.0 for _ in completions]

    with pytest.raises(RuntimeError, match=r"'narrow' raised TypeError .*`completion_ids` and every other column"):
        check_outcomes([narrow], ["q"], ["a"])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, "'odd' must return a list of 2 outcomes; got 1"),
        ([1.0] * 3, ValueError, "got 3"),
        (None, ValueError, "got a NoneType"),
        (True, ValueError, "got a bool"),
        (np.ones(2), ValueError, "got a ndarray"),
        ([1.0, "secret"], TypeError, "'odd' returned a str for answer 1"),
        ([1.0, [1.0]], TypeError, "'odd' returned a list for answer 1"),
        ([math.nan, 1.0], ValueError, "'odd' returned nan for answer 0"),
        ([1.0, math.inf], ValueError, "'odd' returned inf for answer 1"),
        ([1.0, -0.1], ValueError, "returned -0.1 for answer 1.*None where"),
        ([1.5, 1.0], ValueError, "returned 1.5 for answer 0"),
    ],
)
def test_what_is_no_outcome_is_named(returned, error, message):
    with pytest.raises(error, match=message) as raised:
        check_outcomes([returning(returned)], ["q", "r"], ["a", "b"])

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("check", [lambda **_: [], partial(is_short)], ids=["lambda", "partial"])
def test_a_check_without_a_name_of_its_own_is_an_error(check):
    with pytest.raises(ValueError, match="name of its own") as caught:
        check_name(check)
    assert "is_short" not in str(caught.value)  # what a partial was given may be a row


def test_names_must_differ():
    assert check_names([is_short, matches]) == ("is_short", "matches")
    with pytest.raises(ValueError, match=r"more than once: \['is_short'\]"):
        check_names([is_short, matches, returning([], "is_short")])


def test_what_cannot_be_called_is_no_check():
    with pytest.raises(TypeError, match="callable; got str"):
        check_names(["is_short"])


def test_a_check_begins_at_the_maximum_of_bradley_and_terrys_likelihood():
    human, imitator = 700.0, 300.0

    def loss(weight):
        return human * np.logaddexp(0, -weight) + imitator * np.logaddexp(0, weight)

    best = minimize_scalar(loss).x
    assert first_weights(torch.tensor([human]), torch.tensor([imitator])).item() == pytest.approx(best, abs=2e-3)


def test_checks_that_say_the_same_begin_with_the_weight_of_one_between_them():
    one = first_weights(torch.tensor([9.0]), torch.tensor([0.0]))
    three = first_weights(torch.full((3,), 9.0), torch.zeros(3))
    assert three.sum().item() == pytest.approx(one.item())
    assert one.item() == pytest.approx(math.log(19))
    assert first_weights(torch.zeros(2), torch.zeros(2)).tolist() == [0.0, 0.0]
