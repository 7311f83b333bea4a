"""A run that was interrupted goes on to the last bit as if it had not been."""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import distinguisher_weights, imitator_weights, make, rows, train
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.worlds.reliability import kills
from hf_imitate.plateau import Plateau
from hf_imitate.trainers import adversarial_plan

CLOCK = ("runtime", "per_second", "step_time")


def short_or_none(completions, **columns):
    """A check that does not apply to every third answer."""
    return [None if i % 3 == 0 else len(text) < 4 for i, text in enumerate(completions)]


def mostly_letters(completions, **columns):
    """A reward beside the distinguisher's."""
    return [sum(letter.isalpha() for letter in text) / 10 for text in completions]


def half_answered(number=32):
    """Rows whose every third question nobody answered."""
    answers = [None if i % 3 == 2 else ("abc", "de")[i % 2] for i in range(number)]
    return rows(number).remove_columns("completion").add_column("completion", answers)


def state_of(trainer):
    """All that what comes next depends on, by name; tensors, and JSON of the rest."""
    moments = {"i": trainer.optimizer.state_dict()["state"], "d": trainer.game.learner.optimizer.state_dict()["state"]}
    numpy_state = np.random.get_state()
    return {
        **{f"imitator {name}": value for name, value in imitator_weights(trainer).items()},
        **{f"distinguisher {name}": value for name, value in distinguisher_weights(trainer).items()},
        **{
            f"moment {side} {index} {name}": torch.as_tensor(value)
            for side, all_moments in moments.items()
            for index, values in all_moments.items()
            for name, value in values.items()
        },
        **{
            f"buffer {i} {name}": torch.as_tensor(value)
            for i, part in enumerate(trainer._buffered_inputs or [])
            for name, value in part.items()
        },
        "random of torch": torch.get_rng_state(),
        "random of numpy": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "random of python": torch.tensor(random.getstate()[1]),
        "game, replay and guard": json.dumps(trainer.game.state()),
        "multiplier": json.dumps(trainer.likelihood.state()),
        "phases": json.dumps(trainer.phases.state()),
        "plateau": json.dumps(dataclasses.asdict(trainer._plateau)),
        "schedule": json.dumps(trainer.lr_scheduler.get_last_lr()),
        "steps": json.dumps([trainer._step, trainer.state.global_step, trainer.state.max_steps, trainer.state.epoch]),
        "seen": json.dumps([trainer.state.num_input_tokens_seen, trainer.state.total_flos]),
        "unlogged": json.dumps(
            [trainer._tally._sums["train"], trainer._tr_loss.item(), {**trainer._metrics["train"], "step_time": 0}]
        ),
    }


def history(trainer):
    """Every logged number that is not a time."""
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{name: entry[name] for name in entry if not name.endswith(CLOCK)} for entry in entries]


def assert_same(got, expected, where):
    assert got.keys() == expected.keys(), where
    differ = [
        name
        for name, value in expected.items()
        if not (torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value)
    ]
    assert differ == [], where


def assert_resumes(tmp_path, model, build, steps=None):
    """Train once, saving every step; then go on from each checkpoint (or those of `steps`) with a trainer of its own.

    Returns:
        The uninterrupted trainer, and what each checkpoint holds as its JSON state.
    """
    whole = build(tmp_path / "whole", model, save_strategy="steps", save_steps=1)
    train(whole)
    expected, expected_history, total = state_of(whole), history(whole), whole.state.global_step
    folder = Path(whole.args.output_dir)
    states = {}
    for step in range(1, total + 1):
        states[step] = json.loads((folder / f"checkpoint-{step}" / "adversarial_state_0.json").read_text())
    for step in range(1, total + 1) if steps is None else steps:
        torch.manual_seed(999)
        random.seed(999)
        np.random.seed(999)
        again = build(tmp_path / "again", model)
        train(again, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same(state_of(again), expected, f"from step {step}")
        assert history(again) == expected_history, f"from step {step}"
    return whole, states


# --- every step of one run that has everything


def with_everything(folder, model, **changes):
    """Both warm-ups "auto" and ended early; one generation batch serves four optimizer steps of two micro-batches."""
    trainer = make(
        folder,
        model,
        dataset=half_answered(),
        arguments={"checks": [short_or_none], "reward_funcs": mostly_letters},
        **{
            **{"imitator_warmup_steps": "auto", "distinguisher_warmup_steps": "auto", "max_steps": 10},
            **{"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2},
            **{"per_device_train_batch_size": 4, "distinguisher_learning_rate": 1e-2, "distinguisher_steps": 2},
            **{"retrodictive_budget": 1.0, "allow_unlabelled": True, "lr_scheduler_type": "linear"},
            **{"logging_steps": 3, "reward_weights": [0.5], **changes},
        },
    )
    # As if the distinguisher had been below chance for long: a pause, out of which it finds.
    trainer.game.guard.accuracy, trainer.game.guard.num_low = 0.3, 40
    return trainer


@pytest.mark.slow
@pytest.mark.timeout(900)  # 15 s of work, and a busy machine may take long over them
def test_a_run_goes_on_from_every_one_of_its_steps_to_the_last_bit(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(adversarial_plan, "READING_EVERY", 1)
    monkeypatch.setattr(adversarial_plan, "Plateau", lambda: Plateau(patience=1, min_delta=100.0))
    whole, states = assert_resumes(tmp_path, tiny_model_dir, with_everything)

    # What the sweep has to have met, or it shows less than it says.
    assert whole.phases.state() == {
        "imitator_warmup": 2,
        "distinguisher_lm_warmup": 0,
        "distinguisher_warmup": 2,
        "game": 10,
    }
    assert {state["entered_phase"] for state in states.values()} == {
        *("imitator_warmup", "distinguisher_warmup", "game")
    }
    assert states[1]["phases"]["imitator_warmup"] == 20  # the cap: the warm-up was not over yet
    games = [state for state in states.values() if state["entered_phase"] == "game"]
    assert {state["step"] % 8 for state in games} == {0, 2, 4, 6}
    assert {state["game"]["pause"] is None for state in games} == {True, False}
    assert len({state["likelihood"]["multiplier"] for state in games}) > 5
    assert len({len(state["game"]["replay"]) for state in games}) > 2
    assert any(state["unlogged"]["tally"] for state in games)
    assert any(state["question_widths"] for state in games)


# --- other runs, at the steps where they differ


def fully(folder, model, **changes):
    """Every weight trains, the imitator is paused for good and not pulled back, several passes over the rows."""
    trainer = make(
        folder,
        model,
        dataset=rows(8),
        full=True,
        **{
            **{"imitator_warmup_steps": 2, "distinguisher_warmup_steps": 2, "max_steps": 7, "retrodictive_coef": 0.0},
            **{"distinguisher_loss": "bce", "replay_ratio": 0.0, "logging_steps": 2, **changes},
        },
    )
    guard = trainer.game.guard
    guard.truncated, guard.truncated_at_start, guard.num_at_start = 1.0, 0.0, 64
    return trainer


def test_a_full_run_in_a_pause_goes_on_over_several_passes(tmp_path, tiny_model_dir):
    """TRL's sampler draws the order of each pass from where the last draw ended; a resumed run started it anew."""
    whole, states = assert_resumes(tmp_path, tiny_model_dir, fully, steps=(1, 2, 4, 5, 9))
    assert whole.state.epoch > 2
    assert all(states[step]["game"]["pause"] for step in (5, 9))
    assert states[9]["game"]["paused_since"] == 4


def test_a_run_with_a_distinguisher_of_another_size_goes_on(tmp_path, tiny_model_dir):
    """transformers would have loaded its adapter into the imitator, where it does not fit."""
    config = Qwen3Config.from_pretrained(str(tiny_model_dir))
    config.hidden_size, config.intermediate_size = 48, 80
    larger = tmp_path / "larger"
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(larger)
    AutoTokenizer.from_pretrained(str(tiny_model_dir)).save_pretrained(larger)

    def build(folder, model, **changes):
        return make(folder, model, arguments={"distinguisher": str(larger)}, distinguisher_warmup_steps=1, **changes)

    assert_resumes(tmp_path, tiny_model_dir, build, steps=(1, 2))


# --- a process that is killed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_run_killed_while_it_saves_rotates_or_learns_resumes_to_the_same_bits():
    """A few points of the sweep in `benchmarks/reliability.py`: each child dies by a real SIGKILL."""
    points = [
        {"step": 3, "event": "store optimizer.pt", "torn": True},
        {"step": 4, "event": "flush adversarial_state_0.safetensors", "torn": True},
        {"step": 7, "event": "rename new", "torn": False},
        {"step": 5, "event": "remove adapter_config.json", "torn": False},
        {"step": 8, "moment": "on_pre_optimizer_step"},  # one generation batch serves steps 4 to 7, the next step 8
        {"step": 6, "at": "random"},
    ]
    found = kills.sweep_apart("adversarial", points)
    assert found["differs"] == []
    assert len(found["points"]) >= 5  # the last may have ended before its time
    assert all(point["killed"] and point["resumed"] and point["identical"] for point in found["points"])
    # What was half deleted is passed over; what was half written is no checkpoint at all.
    assert [bool(point["passed_over"]) for point in found["points"][:4]] == [False, False, False, True]


# --- what a checkpoint is made of


def test_a_checkpoint_holds_no_pickle_but_transformers_own(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=1, max_steps=1)
    train(trainer)
    folder = Path(trainer.args.output_dir) / "checkpoint-1"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    pickles = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # written by transformers, read with `weights_only`
    ours = {
        "_complete.json",
        *("adversarial_state_0.json", "adversarial_state_0.safetensors", "imitation.json", "README.md"),
        *("distinguisher/adapter_config.json", "distinguisher/adapter_model.safetensors", "distinguisher/checks.json"),
    }
    theirs = {
        *("adapter_config.json", "adapter_model.safetensors", "generation_config.json", "trainer_state.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert files.keys() == pickles | ours | theirs
    for name in (ours | theirs) - {"README.md"}:
        if name.endswith(".json"):
            json.loads(files[name].read_text())
        else:
            with safe_open(files[name], "pt") as tensors:
                assert len(tensors.keys()) > 0


PLANTED = {"prompt": "Quincy", "completion": "Zebulon"}  # no imitator comes to these by itself


def planted(number=24, as_chat=False):
    """Rows that all hold the planted words; conversations of one question, if `as_chat`."""
    data = rows(number, answers=(PLANTED["completion"],))
    questions = [f"{PLANTED['prompt']} in {i}:" for i in range(number)]
    data = data.remove_columns("prompt").add_column("prompt", questions)
    chat = {"prompt": "user", "completion": "assistant"}
    return data.map(lambda row: {k: [{"role": chat[k], "content": row[k]}] for k in chat}) if as_chat else data


def runs_of_numbers(value):
    """Every list of whole numbers in JSON or in a tensor."""
    if isinstance(value, torch.Tensor):
        floating = value.is_floating_point()
        return [] if floating or not value.dim() else value.reshape(-1, value.shape[-1]).tolist()
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [one for child in children for one in runs_of_numbers(child)]
    return [*found, [one for one in children if isinstance(one, int)]] if isinstance(value, list) else found


def holds(numbers, ids):
    return any(numbers[i : i + len(ids)] == ids for i in range(len(numbers)))


@pytest.mark.parametrize("as_chat", [False, True])
def test_no_file_of_a_checkpoint_holds_a_word_or_the_tokens_of_a_row(tmp_path, request, as_chat):
    """In every phase, with old, held-out and format-audited answers, and in the middle of a generation batch."""
    model = request.getfixturevalue("tiny_chat_model_dir" if as_chat else "tiny_model_dir")
    trainer = make(
        tmp_path,
        model,
        dataset=planted(as_chat=as_chat),
        arguments={"checks": [short_or_none]},
        **{"imitator_warmup_steps": 1, "distinguisher_warmup_steps": 2, "max_steps": 3, "steps_per_generation": 2},
        **{"gradient_accumulation_steps": 1, "max_completion_length": 16, "save_strategy": "steps", "save_steps": 1},
    )
    train(trainer)
    checkpoints = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))
    states = [json.loads((folder / "adversarial_state_0.json").read_text()) for folder in checkpoints]
    # What there has to be to look through, or it shows less than it says.
    assert all(any(state["game"][name] for state in states) for name in ("replay", "surface"))
    assert any(state["game"]["heldout"]["entries"] and state["game"]["heldout"]["tested"][0] for state in states)
    assert any(state["question_widths"] for state in states)
    ids = {side: trainer._tokenizer(word, add_special_tokens=False)["input_ids"] for side, word in PLANTED.items()}
    rendered = trainer.likelihood.rows.rows[0].rendered
    assert holds(rendered.prompt_ids, ids["prompt"])
    assert holds(rendered.answer_ids, ids["completion"])
    for file in (path for folder in checkpoints for path in folder.rglob("*") if path.is_file()):
        if file.name in ("tokenizer.json", "chat_template.jinja"):
            continue
        content = file.read_bytes()
        assert [word for word in PLANTED.values() if word.encode() in content] == [], file
        values = []
        if file.suffix in (".json", ".safetensors"):
            values = list(load_file(file).values()) if file.suffix == ".safetensors" else [json.loads(content)]
        numbers = [run for value in values for run in runs_of_numbers(value)]
        assert not any(holds(run, one) for run in numbers for one in ids.values()), file
