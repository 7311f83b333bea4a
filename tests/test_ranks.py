"""What one process tells another of its failure; that all then stop is shown by tests/test_two_processes.py."""

import errno
import inspect

import pytest
import torch
from accelerate import Accelerator

from hf_imitate.checks import check_outcomes
from hf_imitate.trainers import ranks
from hf_imitate.trainers.adversarial_rewards import guarded, raise_first
from hf_imitate.trainers.ranks import NotFinite, ProcessFailure, agreed, stopping_together, words_of


def raised(function, *args):
    with pytest.raises(Exception) as found:  # noqa: PT011
        function(*args)
    return found.value


def quoting_check(prompts, **kwargs):
    raise KeyError(prompts[0])


def fails(error):
    raise error


def test_our_own_words_are_told_in_full_for_they_quote_no_row():
    error = raised(check_outcomes, [quoting_check], ["a secret"], ["an answer"])
    told = words_of(error)
    assert told == f"RuntimeError: {error}"
    assert "The check 'quoting_check' raised KeyError on 1 answers (test_ranks.py, line " in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("a secret"), "KeyError in test_ranks, line "),
        (OSError(errno.ENOSPC, "No space left on device", "a secret"), "OSError (No space left on device) in test_"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), "OutOfMemoryError: Tried to allocate 2 GiB"),
    ],
)
def test_of_other_errors_kind_and_place_are_told_and_no_words_that_may_quote_a_row(error, told):
    found = words_of(raised(fails, error))
    assert found.startswith(told)
    assert "secret" not in found


def test_what_python_says_in_a_line_of_ours_is_told_by_kind_and_place_alone():
    """A key or a number that is none would be quoted, and either may be a row's."""
    error = raised(notes_of_a_reward, {"a secret": 1})
    assert error.args == ("a secret",)
    assert words_of(error).startswith("KeyError in hf_imitate.made_up, line 2; its own words may quote a row")
    said = raised(notes_of_a_reward, {})
    assert words_of(said) == "ValueError: our own words"


def notes_of_a_reward(row):
    """A function of ours that raises words of its own, or lets Python speak."""
    made_up = {"__name__": "hf_imitate.made_up"}
    exec("def f(row):\n    return {}[next(iter(row))] if row else g()\n", made_up)
    exec("def g():\n    raise ValueError('our own words')\n", made_up)
    made_up["f"](row)


def test_torchs_store_is_found_where_we_look_for_it():
    """`torch.distributed` has no public way to the store by which its processes found each other."""
    assert list(inspect.signature(ranks._get_default_store).parameters) == []
    assert {"compare_set", "check", "get", "add"} <= set(dir(torch.distributed.PrefixStore))


def test_one_process_alone_raises_its_error_as_it_is():
    with pytest.raises(KeyError, match="mine"), agreed(Accelerator(cpu=True), 3):
        raise KeyError("mine")

    class Trainer:
        accelerator = Accelerator(cpu=True)

        @stopping_together
        def train(self):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Trainer().train()


def test_numbers_that_are_not_finite_stay_what_they_are_on_every_process():
    assert issubclass(NotFinite, FloatingPointError)
    assert issubclass(NotFinite, ProcessFailure)


def test_a_reward_that_raises_pays_nothing_until_all_processes_meet():
    failures = []
    reward = guarded(quoting_check, failures)
    assert reward(prompts=["a secret", "two"]) == [None, None]
    assert reward(prompts=["a secret"]) == [None]
    with pytest.raises(RuntimeError, match="The reward 'quoting_check' raised KeyError on 2 answers"):
        raise_first(failures)
    raise_first(failures)  # nothing is left of them
