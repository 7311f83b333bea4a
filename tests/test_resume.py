"""A run that was interrupted goes on to the last bit as if it had not been."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import distinguisher_weights, imitator_weights, make, rows, train
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hf_imitate.plateau import Plateau
from hf_imitate.trainers import adversarial_plan

TESTS = Path(__file__).parent
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

# Forks, so that nothing is imported twice: each child is a process of its own and dies by a real SIGKILL.
KILLED = """
import json, os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_resume import fingerprint, killable
from hf_imitate.trainers.checkpoints import checkpoints, damage
from tiny_runs import train

folder, model, plans = Path({folder!r}), Path({model!r}), json.loads({plans!r})

def child(where, resume, plan):
    if "opens" in plan:
        name, number = plan["opens"]
        count = 0
        def watch(event, arguments):
            nonlocal count
            if event == "open" and isinstance(arguments[0], (str, os.PathLike)) and "w" in str(arguments[1]):
                path = Path(arguments[0])
                if path.name == name and "checkpoint-" in str(path):
                    count += 1
                    if count == number:
                        path.write_bytes(path.read_bytes()[:-9] if path.exists() else b"")
                        os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
    trainer = killable(where, model)
    train(trainer, resume_from_checkpoint=resume)
    Path(where, "end.json").write_text(json.dumps(fingerprint(trainer)))

def attempt(where, resume, plan):
    pid = os.fork()
    if pid == 0:
        try:
            child(where, resume, plan)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if "after" in plan:
        time.sleep(plan["after"])
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return signal.SIGKILL if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else status

whole = folder / "whole"
whole.mkdir()
begin = time.time()
assert attempt(whole, None, {{}}) == 0
duration = time.time() - begin
killed = folder / "killed"
killed.mkdir()
report = []
for plan in [*plans, {{}}, {{}}]:  # and once more where it had ended
    if "after" in plan:
        plan = {{"after": plan["after"] * duration}}
    found = [(path.name, damage(path)) for path in checkpoints(killed / "run")]
    resume = any(lack is None for _, lack in found) or None
    status = attempt(killed, resume, plan)
    report.append({{"plan": plan, "found": found, "killed": status == signal.SIGKILL, "status": status}})
ends = [json.loads(Path(path, "end.json").read_text()) for path in (whole, killed)]
differ = [name for name in ends[0] if ends[0][name] != ends[1].get(name)]
print("REPORT", json.dumps({{"report": report, "differ": differ, "duration": duration}}))
"""


def killable(folder, model):
    """A run over all phases that saves every step and keeps two checkpoints."""
    return make(
        folder,
        model,
        dataset=half_answered(),
        arguments={"checks": [short_or_none]},
        **{"imitator_warmup_steps": 1, "distinguisher_warmup_steps": 2, "max_steps": 5, "steps_per_generation": 2},
        **{"per_device_train_batch_size": 4, "retrodictive_budget": 1.0, "allow_unlabelled": True, "use_cpu": True},
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "gradient_accumulation_steps": 1},
    )


def fingerprint(trainer):
    """The state and the history of a trainer as JSON, tensors by their bytes."""
    found = {
        name: value.contiguous().numpy().tobytes().hex() if isinstance(value, torch.Tensor) else value
        for name, value in state_of(trainer).items()
    }
    return {**found, "history": json.dumps(history(trainer), sort_keys=True)}


def kill(folder, model, plans):
    """Run `killable` once in peace, and once killed as each plan says and resumed after it."""
    code = KILLED.format(tests=str(TESTS), folder=str(folder), model=str(model), plans=json.dumps(plans))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    return json.loads(line.removeprefix("REPORT "))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_run_killed_in_the_middle_of_saving_resumes_to_the_same_bits(tmp_path, tiny_model_dir):
    """A process dies by SIGKILL while it writes one file or another of a checkpoint, and at a random moment."""
    moment = random.Random(0).uniform(0.3, 0.6)
    plans = [
        {"opens": ["adversarial_state_0.json", 2]},
        {"opens": ["trainer_state.json", 2]},
        {"opens": ["imitation.json", 2]},
        {"after": moment},
    ]
    found = kill(tmp_path, tiny_model_dir, plans)
    assert found["differ"] == []
    report = found["report"]
    assert [entry["killed"] for entry in report[:3]] == [True] * 3
    assert [entry["status"] for entry in report[4:]] == [0, 0]
    # Each kill left a checkpoint that was not whole, and it was passed over.
    for entry in report[1:4]:
        newest, *others = entry["found"]
        assert newest[1] is not None
        assert any(lack is None for _, lack in others)


# --- what a checkpoint is made of


def test_a_checkpoint_holds_no_pickle_but_transformers_own(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=1, max_steps=1)
    train(trainer)
    folder = Path(trainer.args.output_dir) / "checkpoint-1"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    pickles = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # written by transformers, read with `weights_only`
    ours = {
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
