"""A run that was interrupted goes on to the last bit as if it had not been."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    Watched,
    distinguisher_weights,
    imitator_weights,
    logged,
    make,
    run,
    train,
)
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from hf_imitate import Imitator
from hf_imitate.trainers.checkpoints import newest_complete_checkpoint


class StopAfter(TrainerCallback):
    """Ends a run after a step, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def state_of(trainer):
    moments = [trainer.optimizer.state_dict()["state"], trainer.game.learner.optimizer.state_dict()["state"]]
    return {
        **{f"i.{name}": value for name, value in imitator_weights(trainer).items()},
        **{f"d.{name}": value for name, value in distinguisher_weights(trainer).items()},
        **{
            f"m{number}.{index}.{name}": torch.as_tensor(value)
            for number, moment in enumerate(moments)
            for index, values in moment.items()
            for name, value in values.items()
        },
        "random": torch.get_rng_state(),
    }


def resumable(folder, model, **changes):
    def late(completions, **columns):
        return [None if i % 3 == 0 else len(text) < 4 for i, text in enumerate(completions)]

    return make(
        folder,
        model,
        **{
            **{"arguments": {"checks": [late]}, "imitator_warmup_steps": 2, "distinguisher_warmup_steps": 2},
            **{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "retrodictive_budget": 1.0},
            **{"lr_scheduler_type": "linear"},
            **changes,
        },
    )


def assert_resumes(tmp_path, model, stops, **changes):
    whole = resumable(tmp_path / "whole", model, **changes)
    train(whole)
    expected = state_of(whole)
    for stop in stops:
        first = resumable(tmp_path / f"stop{stop}", model, **changes)
        first.add_callback(StopAfter(stop))
        train(first)
        torch.manual_seed(999)
        second = resumable(tmp_path / f"stop{stop}", model, **changes)
        train(second, resume_from_checkpoint=True)
        assert second.state.global_step == whole.state.global_step
        got = state_of(second)
        assert got.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == [], stop
        assert json.dumps(second.game.state()) == json.dumps(whole.game.state())
        assert second.likelihood.state() == whole.likelihood.state()
        assert logged(second, "phase") == logged(whole, "phase")
        assert logged(second, "learning_rate") == logged(whole, "learning_rate")
    return whole


def test_an_interrupted_run_goes_on_to_the_last_bit_as_if_it_had_not_been(tmp_path, tiny_model_dir):
    """Interrupted within each of the three phases, and where one ends."""
    assert_resumes(tmp_path, tiny_model_dir, (1, 2, 3, 6))


def test_a_full_run_over_several_passes_goes_on_in_the_order_of_its_rows(tmp_path, tiny_model_dir):
    """TRL's sampler draws the order of each pass from where the last draw ended; a resumed run started it anew."""
    whole = assert_resumes(
        tmp_path,
        tiny_model_dir,
        (10,),
        full=True,
        per_device_train_batch_size=16,
        imitator_warmup_steps=1,
        distinguisher_warmup_steps=1,
        max_steps=18,
        max_completion_length=2,
        heldout_fraction=0.0,
        save_steps=10,
    )
    assert whole.state.epoch > 2


def test_a_generation_batch_that_serves_several_steps_is_taken_up_again(tmp_path, tiny_model_dir):
    assert_resumes(
        tmp_path,
        tiny_model_dir,
        (3,),
        imitator_warmup_steps=0,
        distinguisher_warmup_steps=0,
        max_steps=6,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )


def test_a_run_with_a_distinguisher_of_another_size_goes_on(tmp_path, tiny_model_dir):
    """transformers would have loaded its adapter into the imitator, where it does not fit."""
    config = Qwen3Config.from_pretrained(str(tiny_model_dir))
    config.hidden_size, config.intermediate_size = 48, 80
    larger = tmp_path / "larger"
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(larger)
    AutoTokenizer.from_pretrained(str(tiny_model_dir)).save_pretrained(larger)
    assert_resumes(tmp_path, tiny_model_dir, (5,), arguments={"distinguisher": str(larger)})


def test_a_resumed_run_may_be_longer_than_the_first(tmp_path, tiny_model_dir):
    first = run(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=2, imitator_warmup_steps=1)
    assert first.state.global_step == 3
    second = make(tmp_path, tiny_model_dir, max_steps=5, imitator_warmup_steps=1)
    train(second, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert second.state.global_step == second.state.max_steps == 6


def test_a_pause_survives_an_interruption(tmp_path, tiny_model_dir):
    first = make(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=2)
    guard = first.game.guard
    guard.truncated, guard.truncated_at_start, guard.num_at_start = 1.0, 0.0, 64
    train(first)
    assert first.game.pause
    second = make(tmp_path, tiny_model_dir, kind=Watched, max_steps=3)
    train(second, resume_from_checkpoint=True)
    assert second.game.guard.num_paused == 3
    assert second.game.paused_since == 0
    assert (second.batches[0]["advantages"] == 0).all()


def test_a_half_written_checkpoint_is_passed_over(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=1)
    folder = Path(trainer.args.output_dir)
    newest = folder / "checkpoint-2" / "trainer_state.json"
    newest.write_text(newest.read_text()[:-20])
    (folder / "checkpoint-3").mkdir()
    assert newest_complete_checkpoint(folder) == folder / "checkpoint-1"
    assert newest_complete_checkpoint(folder, 0) is None
    again = make(tmp_path, tiny_model_dir)
    train(again, resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_without_a_complete_checkpoint_there_is_nothing_to_go_on_from(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_weights_alone_says_what_it_lacks(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=1, save_only_model=True)
    with pytest.raises(FileNotFoundError, match=r"holds no adversarial_state\.json for this process"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_a_checkpoint_is_an_imitator_too(tmp_path, tiny_model_dir):
    run(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=1, max_steps=1)
    folder = tmp_path / "run" / "checkpoint-1"
    assert not (folder / "training_args.bin").exists()
    assert Imitator.from_pretrained(folder).human_logit(["Item 3:"], ["abc"]).shape == (1,)
