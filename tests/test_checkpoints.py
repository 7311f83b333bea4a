"""Which checkpoints can be resumed, and what is said of the others."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_runs import Watched, make, rows, run, train

from hf_imitate import AdversarialConfig, Imitator
from hf_imitate.human_rows import HumanRow
from hf_imitate.rendering import Answer, Rendered
from hf_imitate.trainers.atomic_checkpoints import MARKER
from hf_imitate.trainers.checkpoints import (
    LAST_WRITTEN,
    STATE_VERSION,
    check_resumable,
    checkpoint_to_resume,
    checkpoints,
    damage,
    data_digest,
    newest_complete_checkpoint,
    settings_of_the_course,
)

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model_dir):
    """The output folder of a run of two steps with a checkpoint after each. Read-only."""
    trainer = run(tmp_path_factory.mktemp("saved"), tiny_model_dir, **SAVING)
    return Path(trainer.args.output_dir)


@pytest.fixture
def output(saved, tmp_path):
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(params=["marked", "from before markers"])
def either(output, request):
    """A run's checkpoints with our marker, or as transformers leaves them."""
    if request.param != "marked":
        for path in checkpoints(output):
            (path / MARKER).unlink()
    return output


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


# --- whole or not

FILES = [
    *("trainer_state.json", "adversarial_state_0.json", "adversarial_state_0.safetensors"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
]


def test_the_newest_checkpoint_is_that_of_the_highest_step(output):
    (output / "checkpoint-2").rename(output / "checkpoint-10")
    (output / "checkpoint-old").mkdir()
    assert [path.name for path in checkpoints(output)] == ["checkpoint-10", "checkpoint-1"]
    assert newest_complete_checkpoint(output).name == "checkpoint-10"
    assert newest_complete_checkpoint(output, 9).name == "checkpoint-1"
    assert newest_complete_checkpoint(output, 0) is None
    assert newest_complete_checkpoint(output / "nowhere") is None


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lacks_a_file_is_passed_over(either, name, caplog):
    file = either / "checkpoint-2" / name
    assert damage(file.parent) is None
    file.unlink()
    assert damage(file.parent) == f"{name} is missing"
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(either).name == "checkpoint-1"
    assert f"{name} is missing" in caplog.text


@pytest.mark.parametrize("name", [*FILES, "adapter_model.safetensors", "distinguisher/adapter_model.safetensors"])
@pytest.mark.parametrize("size", [0, 7, -2], ids=["empty", "begun", "but for its end"])
def test_a_checkpoint_with_a_file_that_was_cut_off_is_passed_over(either, name, size):
    file = either / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:size])
    assert damage(either / "checkpoint-2") == f"{name} is cut off"
    assert checkpoint_to_resume(either).name == "checkpoint-1"


def test_a_safetensors_file_is_as_long_as_its_header_says(output):
    """Half of the last tensor is gone, and all that is left can be read."""
    file = output / "checkpoint-2" / "adversarial_state_0.safetensors"
    (file.parent / MARKER).unlink()
    save_file({"a": torch.zeros(0), "b": torch.arange(100.0)}, file)
    assert damage(file.parent) is None
    file.write_bytes(file.read_bytes()[:-200])
    assert damage(file.parent) == "adversarial_state_0.safetensors is cut off"


def test_without_a_complete_checkpoint_there_is_nothing_to_go_on_from(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_half_written_checkpoint_is_passed_over_and_written_again(output, tmp_path, tiny_model_dir):
    (output / "checkpoint-2" / "rng_state.pth").unlink()
    (output / "checkpoint-3").mkdir()
    again = make(tmp_path, tiny_model_dir, max_steps=3, **SAVING)
    train(again, resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert [damage(path) for path in checkpoints(output)] == [None] * 3


def test_a_checkpoint_that_is_written_again_is_no_checkpoint_until_it_is_done(output, tmp_path, tiny_model_dir):
    """Else a kill in between would leave one half of each, marked as complete."""
    again = make(tmp_path, tiny_model_dir, **SAVING)
    marked = []
    write = again._save_rng_state

    def observed(folder):
        marked.append(Path(folder, LAST_WRITTEN).exists())
        write(folder)

    again._save_rng_state = observed
    train(again, resume_from_checkpoint=str(output / "checkpoint-1"))
    assert marked == [False]
    assert damage(output / "checkpoint-2") is None


# --- of this run or not


def test_a_checkpoint_of_weights_alone_says_what_it_lacks(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, save_only_model=True, max_steps=1, **SAVING)
    with pytest.raises(FileNotFoundError, match=r"holds no adversarial_state_0\.json.*save_only_model=False"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_a_checkpoint_that_is_named_and_not_whole_is_refused_by_the_file(output, tmp_path, tiny_model_dir):
    cut_off(output / "checkpoint-2" / "adversarial_state_0.safetensors")
    trainer = make(tmp_path, tiny_model_dir)
    with pytest.raises(ValueError, match=r"is not whole: adversarial_state_0\.safetensors is cut off"):
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-2"))


def test_a_checkpoint_of_another_version_is_refused(output):
    file = output / "checkpoint-2" / "adversarial_state_0.json"
    (file.parent / MARKER).unlink()
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    with pytest.raises(ValueError, match=f"is of version 1, and {STATE_VERSION} is needed"):
        check_resumable(output / "checkpoint-2", 0, {})


def a_check(completions, **columns):
    return [True] * len(completions)


def a_reward(completions, **columns):
    return [0.0] * len(completions)


OTHERWISE = {
    "num_generations": ({"num_generations": 2}, "`num_generations` was 4 and is 2"),
    "batch": ({"per_device_train_batch_size": 16}, "`per_device_train_batch_size` was 8 and is 16"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` was 1 and is 2"),
    "reuse": ({"num_iterations": 2}, "`num_iterations` was 1 and is 2"),
    "rate": ({"learning_rate": 2e-3}, "`learning_rate` was 0.001 and is 0.002"),
    "schedule": ({"lr_scheduler_type": "linear"}, "`lr_scheduler_type` was 'constant' and is 'linear'"),
    "warm-up": ({"imitator_warmup_steps": "auto"}, "`imitator_warmup_steps` was 0 and is 'auto'"),
    "budget": ({"retrodictive_budget": 1.0}, "`retrodictive_budget` was None and is 1.0"),
    "heldout": ({"heldout_fraction": 0.5}, "`heldout_fraction` was 0.25 and is 0.5"),
    "seed": ({"seed": 7}, "`seed` was 42 and is 7"),
    "momentum": ({"adam_beta1": 0.8}, "`adam_beta1` was 0.9 and is 0.8"),
    "clipping": ({"epsilon_high": 0.3}, "`epsilon_high` was None and is 0.3"),
    "adapter": (
        {"arguments": {"peft_config": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")}},
        "`peft_config.lora_alpha` was 8 and is 16",
    ),
    "no adapter": ({"full": True}, "`imitator` was 'an adapter' and is 'all weights'"),
    "check": ({"arguments": {"checks": [a_check]}}, r"`checks` was \[\] and is \['a_check'\]"),
    "reward": (
        {"arguments": {"reward_funcs": a_reward}},
        r"`reward_funcs` was \['distinguisher'\] and is \['dis.*a_r",
    ),
    "rows": ({"dataset": rows(31)}, "`train_dataset` was '32 rows, [0-9a-f]{16}' and is '31 rows, "),
    "answers": ({"dataset": rows(answers=("abc", "dx"))}, "`train_dataset` was '32 rows, "),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_run_that_is_not_the_one_that_was_saved_is_refused_by_the_setting(saved, tmp_path, tiny_model_dir, name):
    """Each of them went through silently, and was ignored or changed the law."""
    changes, message = OTHERWISE[name]
    trainer = make(tmp_path, tiny_model_dir, **changes)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-1"))


def test_a_resumed_run_may_be_longer_than_the_first(saved, tmp_path, tiny_model_dir):
    second = make(tmp_path, tiny_model_dir, max_steps=4, logging_steps=2)
    train(second, resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert second.state.global_step == second.state.max_steps == 4


def test_a_changed_setting_goes_on_where_it_is_forced_and_the_log_names_it(saved, tmp_path, tiny_model_dir, caplog):
    again = make(tmp_path, tiny_model_dir, learning_rate=2e-3, seed=7, max_steps=3, force_resume=True)
    with caplog.at_level(logging.WARNING):
        train(again, resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert "`learning_rate` was 0.001 and is 0.002; `seed` was 42 and is 7. It goes on all the same" in caplog.text
    assert again.state.global_step == 3


@pytest.mark.parametrize("name", ["no adapter", "rows"])
def test_what_could_not_be_loaded_is_refused_even_where_it_is_forced(saved, tmp_path, tiny_model_dir, name):
    changes, message = OTHERWISE[name]
    trainer = make(tmp_path, tiny_model_dir, force_resume=True, **changes)
    with pytest.raises(ValueError, match=f"{message}.*does not help here"):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-1"))


def test_settings_that_leave_the_course_as_it_is_may_change(saved, tmp_path, tiny_model_dir):
    """As may those that a later version is the first to know."""
    other = {
        "logging_steps": 5,
        "save_total_limit": 1,
        "save_strategy": "no",
        "report_to": [],
        "per_device_eval_batch_size": 4,
    }
    trainer = make(tmp_path, tiny_model_dir, max_steps=3, **other)
    trainer.check_checkpoint(str(saved / "checkpoint-1"))
    facts = {**trainer._run_facts(), "new in this version": 1}
    check_resumable(saved / "checkpoint-1", 0, facts)


def test_a_longer_run_is_another_one_where_the_schedule_depends_on_its_length():
    def course(**given):
        return settings_of_the_course(AdversarialConfig("nowhere", report_to="none", **given))

    assert "max_steps" not in course(max_steps=5, lr_scheduler_type="constant")
    assert "max_steps" not in course(max_steps=5, lr_scheduler_type="constant_with_warmup", warmup_steps=3)
    assert course(max_steps=5, lr_scheduler_type="constant_with_warmup", warmup_steps=0.1)["max_steps"] == 5
    assert course(max_steps=5, lr_scheduler_type="linear")["max_steps"] == 5
    assert course(num_train_epochs=2, lr_scheduler_type="cosine")["num_train_epochs"] == 2


def test_a_digest_knows_every_question_answer_and_weight_and_shows_none():
    def row(text, weight=1.0):
        return HumanRow(Rendered([1], [2], True), Answer(text, True), weight, 1)

    digest = data_digest(["q", "r"], {0: row("a")})
    assert digest == data_digest(["q", "r"], {0: row("a")})
    others = [(["q", "s"], {0: row("a")}), (["q", "r"], {1: row("a")}), (["q", "r"], {0: row("b")})]
    others += [(["q", "r"], {0: row("a", 2.0)}), (["q"], {0: row("a")})]
    assert len({digest, *(data_digest(*other) for other in others)}) == 6
    assert data_digest([], {}).startswith("0 rows")


# --- what goes on


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


def test_a_run_resumed_at_its_end_takes_no_further_step(saved, tmp_path, tiny_model_dir):
    """transformers would take one: it asks whether it was the last after it took it."""
    again = make(tmp_path, tiny_model_dir, kind=Watched)
    train(again, resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert again.state.global_step == 2
    assert again.batches == []


def test_what_was_not_logged_yet_is_in_the_next_log(tmp_path, tiny_model_dir):
    """transformers and TRL forget the steps between the last log and the checkpoint."""
    whole = run(tmp_path, tiny_model_dir, max_steps=3, logging_steps=3, **SAVING)
    again = make(tmp_path / "again", tiny_model_dir, max_steps=3, logging_steps=3)
    train(again, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    (expected, _), (got, _) = whole.state.log_history, again.state.log_history
    names = ("loss", "reward", "entropy", "distinguisher/margin", "retrodiction/bits_per_answer")
    assert [got[name] for name in names] == [expected[name] for name in names]
    assert all(math.isfinite(got[name]) for name in names)


def test_a_checkpoint_is_an_imitator_too(saved):
    assert not (saved / "checkpoint-1" / "training_args.bin").exists()
    assert Imitator.from_pretrained(saved / "checkpoint-1").human_logit(["Item 3:"], ["abc"]).shape == (1,)
