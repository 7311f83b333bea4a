"""Two real processes over gloo train one imitator and one retrodictor: those of one process with both batches."""

import latent_worlds as worlds
import pytest
import torch
from launch import TESTS, in_two_processes

from hf_imitate.trainers.latent_saving import lacks

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_latent_two_processes import each_process
each_process(Path({folder!r}), Path({world!r}))
"""
CLOCK = ("runtime", "per_second")


def some_thoughts_known():
    """Sixteen rows; two batches of four in a row know every thought, so that now and then a process guesses none."""
    questions = [f"{one} {two}" for one in "abcd" for two in "abcf"]
    return worlds.rows(
        prompt=questions,
        completion=[f"{question[0]} {question[0]}" for question in questions],
        thought=["a", "", "b c", "f"] + [None] * 4 + ["d", None] * 4,
        weight=[1.0, 2.0] * 8,
    )


def run(folder, world, batch_size, full=False, **changes):
    """Both sides learn by plain gradient descent: Adam turns a rounding error in a tiny gradient into a whole step."""
    trainer = worlds.make(
        folder,
        world,
        some_thoughts_known(),
        full=full,
        **{"per_device_train_batch_size": batch_size, "max_steps": 4, "retrodictor_warmup_steps": 2},
        **{"optim": "sgd", "learning_rate": 0.02, "shuffle_dataset": False, "use_cpu": True, "num_thoughts": 3},
        **{"max_grad_norm": 1.0, "arguments": {"eval_dataset": worlds.rows()}, **changes},
    )
    learner = trainer.learner
    learner.optimizer = torch.optim.SGD(learner.optimizer.param_groups, momentum=0.5)
    return trainer


def found(trainer):
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    weights = dict(trainer.model.named_parameters())
    return {
        "imitator": {name: weights[name].detach().clone() for name in names},
        "retrodictor": {str(i): p.detach().clone() for i, p in enumerate(trainer.learner.parameters)},
        "history": [{k: v for k, v in entry.items() if not k.endswith(CLOCK)} for entry in entries],
        "eval": {k: v for k, v in trainer.evaluate().items() if not k.endswith(CLOCK)},
    }


def each_process(folder, world):
    """What each process does; it leaves what it found in a file of its own."""
    whole = worlds.train(run(folder / "lora", world, 4, save_strategy="steps", save_steps=3))
    results = {"lora": found(whole)}
    torch.manual_seed(999)
    again = run(folder / "again", world, 4)
    worlds.train(again, resume_from_checkpoint=str(folder / "lora" / "run" / "checkpoint-3"))
    results["again"] = found(again)
    results["full"] = found(worlds.train(run(folder / "full", world, 4, full=True)))
    torch.save(results, folder / f"rank{whole.accelerator.process_index}.pt")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def both(tmp_path_factory, world):
    """What the two processes found, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(PROGRAM.format(tests=str(TESTS), folder=str(folder), world=str(world)), folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)], folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "again", "full"])
def test_both_processes_end_with_one_imitator_and_one_retrodictor(both, kind):
    (one, two), _ = both
    for side in ("imitator", "retrodictor"):
        assert one[kind][side].keys() == two[kind][side].keys()
        assert all(torch.equal(value, two[kind][side][name]) for name, value in one[kind][side].items())
    assert one[kind]["history"] == two[kind]["history"]


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_two_processes_take_the_steps_of_one_with_both_batches(both, world, tmp_path, full):
    (one, _), _ = both
    alone = run(tmp_path, world, 8, full=full)
    start = {name: p.detach().clone() for name, p in alone.model.named_parameters() if p.requires_grad}
    expected, got = found(worlds.train(alone)), one["full" if full else "lora"]
    for side in ("imitator", "retrodictor"):
        for name, value in expected[side].items():
            torch.testing.assert_close(got[side][name], value, atol=1e-5, rtol=0, msg=f"{side} {name}")
    assert max((expected["imitator"][name] - value).abs().max() for name, value in start.items()) > 1e-3
    for mine, theirs in zip(expected["history"], got["history"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, abs=1e-4), name
    assert {**got["eval"], **expected["eval"]} == pytest.approx(got["eval"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_take_up_an_interrupted_run_to_the_last_bit(both):
    results, _ = both
    for result in results:
        for side in ("imitator", "retrodictor"):
            assert all(torch.equal(value, result["again"][side][n]) for n, value in result["lora"][side].items())


@pytest.mark.slow
def test_a_checkpoint_is_complete_only_when_both_processes_were_done(both, world, tmp_path):
    _, folder = both
    checkpoint = folder / "lora" / "run" / "checkpoint-3"
    assert lacks(checkpoint) is None
    with pytest.raises(ValueError, match="`num_processes` was 2 and is 1"):
        worlds.train(run(tmp_path, world, 4), resume_from_checkpoint=str(checkpoint))
    for name in ("_latent_state_1.json", "_latent_state_1.safetensors", "rng_state_1.pth", "_latent_state_0.json"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-1])
        assert lacks(checkpoint) == f"{name} is cut off"
        (checkpoint / name).unlink()
        assert name == "_latent_state_0.json" or lacks(checkpoint) == f"{name} is missing"
        (checkpoint / name).write_bytes(whole)
