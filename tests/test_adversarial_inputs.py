"""Odd but allowed inputs of an adversarial run: checks in another order, rows of weight 0, an imitator passed back."""

import pytest
from tiny_runs import make, rows, train

from hf_imitate import Distinguisher


def is_short(prompts, completions, **columns):
    return [len(text) < 3 for text in completions]


def is_wanted(prompts, completions, **columns):
    return [text == "abc" for text in completions]


def test_checks_keep_their_weights_whatever_the_order_they_are_given_in(tiny_model_dir, tmp_path):
    """The game once ran the checks in the user's order beside weights in the stored one."""
    first = make(tmp_path, tiny_model_dir, arguments={"checks": [is_short, is_wanted]})
    train(first)
    first.save_model()
    loaded = Distinguisher.from_pretrained(first.args.output_dir, checks=[is_wanted, is_short])
    again = make(
        tmp_path / "again", tiny_model_dir, arguments={"checks": [is_wanted, is_short], "distinguisher": loaded}
    )
    assert [check.__name__ for check in again.game.checks] == list(loaded.check_names) == ["is_short", "is_wanted"]


def test_rows_of_weight_zero_are_asked_and_teach_nothing(tiny_model_dir, tmp_path):
    """Held-out rows of weight 0 once ended an automatic warm-up by a division by zero."""
    dataset = rows(weight=[0.0] * 16 + [1.0] * 16)
    trainer = make(
        tmp_path, tiny_model_dir, dataset, imitator_warmup_steps="auto", retrodictive_budget=1.0, max_steps=1
    )
    assert set(trainer.likelihood.rows.train) | set(trainer.likelihood.rows.heldout) == set(range(16, 32))
    train(trainer)


def test_a_folder_with_an_adapter_is_refused_before_anything_is_loaded(tiny_model_dir, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        make(tmp_path, tmp_path)
