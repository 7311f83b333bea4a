"""Two real processes over gloo: one never meets a human answer in the game, both do what one would, one fails."""

import json
import os
import time

import pytest
import sharded
import torch
from launch import TESTS, in_two_processes
from tiny_runs import AtEveryStep, Watched, distinguisher_weights, imitator_weights, make, rows, train

from benchmarks.worlds.reliability import ranks as world
from hf_imitate.trainers import adversarial_plan, ranks
from hf_imitate.trainers.atomic_checkpoints import clear_leftovers
from hf_imitate.trainers.checkpoints import damage, newest_complete_checkpoint

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_two_processes import each_process
each_process(Path({folder!r}), Path({model!r}))
"""
EQUAL = ["full", "a question on two processes, accumulated", "retrodictive, accumulated, full"]
# Both warm-ups end by themselves, on readings that differ between the two: each has held-out rows of its own.
AUTO = {"imitator_warmup_steps": "auto", "distinguisher_warmup_steps": "auto", "max_steps": 1}
CLOCK = ("runtime", "per_second", "step_time")


def short_or_none(completions, **columns):
    """A check that does not apply to some answers, wherever in the batch they stand."""
    return [None if "z" in text else len(text) < 4 for text in completions]


def rarely_answered():
    """Every fourth question is answered. A generation batch asks two in a row: the first process meets a human answer
    in every other batch, the second in none, and in every other batch there is none at all."""
    answers = [("abc", "de", "fgh", "i")[i // 4 % 4] if i % 4 == 0 else None for i in range(32)]
    return rows().remove_columns("completion").add_column("completion", answers)


class Noted(Watched):
    """Also notes the state of the guard after each generation batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pauses = []
        self.add_callback(AtEveryStep(after=lambda: self.pauses.append(self.game.pause)))


def sampled(folder, model, **changes):
    """A run with everything on, in a pause of the guard out of which it may find."""
    trainer = make(
        folder,
        model,
        rarely_answered(),
        kind=Noted,
        arguments={"checks": [short_or_none]},
        **{
            **{"imitator_warmup_steps": 1, "distinguisher_warmup_steps": 2, "max_steps": 5, "retrodictive_budget": 1},
            **{"per_device_train_batch_size": 4, "allow_unlabelled": True, "shuffle_dataset": False, "use_cpu": True},
            **{"distinguisher_learning_rate": 1e-2, "logging_steps": 2, **changes},
        },
    )
    trainer.game.guard.accuracy, trainer.game.guard.num_low = 0.3, 40
    return trainer


def found(trainer):
    """What the processes are compared by."""
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return {
        "imitator": imitator_weights(trainer),
        "distinguisher": distinguisher_weights(trainer),
        "guard": json.dumps(trainer.game.guard.state()),
        "multiplier": trainer.likelihood.multiplier,
        "history": [{name: entry[name] for name in entry if not name.endswith(CLOCK)} for entry in history],
        "pauses": trainer.pauses,
        "batches": trainer.batches,
        "random": torch.get_rng_state(),
        "replay": len(trainer.game.replay.entries),
    }


def each_process(folder, model):
    """What each process does; it leaves what it found in a file of its own."""
    whole = sampled(folder / "whole", model, save_strategy="steps", save_steps=3)
    train(whole)
    results = {"whole": found(whole)}
    torch.manual_seed(999)
    again = sampled(folder / "again", model)
    train(again, resume_from_checkpoint=str(folder / "whole" / "run" / "checkpoint-3"))
    results["again"] = found(again)
    adversarial_plan.READING_EVERY = 2
    auto = sampled(folder / "auto", model, **AUTO)
    train(auto)
    results["auto"] = found(auto) | {"phases": auto.phases.state()}
    torch.save(results, folder / f"rank{whole.accelerator.process_index}.pt")
    adversarial_plan.READING_EVERY = 10
    (folder / "world" / "linger").mkdir(parents=True, exist_ok=True)
    world.each_run(str(folder / "world"), EQUAL)
    sharded.each_process(folder, model)
    world.each_failure(str(folder / "world"))
    # The last: the first process is ended by its own thread, in the middle of a collective.
    rank = whole.accelerator.process_index
    leave = os._exit
    ranks.os._exit = lambda status: (note(folder, rank, status), leave(0))
    try:
        world.linger(str(folder / "world" / "linger"), 9.0)
    except ranks.ProcessFailure:
        note(folder, rank, "left")
        leave(0)


def note(folder, rank, how):
    (folder / f"ended{rank}").write_text(f"{how} {time.time()}", encoding="utf-8")


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_model_dir):
    """What the two processes found, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(PROGRAM.format(tests=str(TESTS), folder=str(folder), model=str(tiny_model_dir)), folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)], folder


def in_the_game(result):
    return [batch for batch in result["batches"] if "advantages" in batch][-5:]


def equal(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.slow
def test_one_of_the_two_meets_no_human_answer_in_the_game(both):
    """If not, the other tests of this file show less than they say."""
    (one, two), _ = both
    known = [(~batch["human"].isnan()).tolist() for batch in in_the_game(one["whole"])]
    assert known == [[False] * 4, [True] * 4] * 2 + [[False] * 4]  # of the fourth batch to the eighth
    assert all(batch["human"].isnan().all() for batch in in_the_game(two["whole"]))
    # A rank's random state is its own: two that sample alike would hide a lot.
    assert not torch.equal(one["whole"]["random"], two["whole"]["random"])
    assert not torch.equal(in_the_game(one["whole"])[0]["imitator"], in_the_game(two["whole"])[0]["imitator"])


@pytest.mark.slow
@pytest.mark.parametrize("run", ["whole", "again", "auto"])
def test_both_processes_end_with_one_imitator_and_one_distinguisher(both, run):
    (one, two), _ = both
    assert equal(one[run]["imitator"], two[run]["imitator"]) == []
    assert equal(one[run]["distinguisher"], two[run]["distinguisher"]) == []
    assert one[run]["history"] == two[run]["history"]
    assert one[run]["multiplier"] == two[run]["multiplier"]


@pytest.mark.slow
def test_both_processes_pause_and_go_on_together(both):
    (one, two), _ = both
    assert one["whole"]["pauses"] == two["whole"]["pauses"]
    states = [json.loads(result["whole"]["guard"]) for result in (one, two)]
    assert {**states[0], "said": []} == {**states[1], "said": []}  # the first process alone speaks
    assert {pause is None for pause in one["whole"]["pauses"]} == {True, False}
    for mine, theirs in zip(in_the_game(one["whole"]), in_the_game(two["whole"]), strict=True):
        assert (mine["advantages"] == 0).all() == (theirs["advantages"] == 0).all()


@pytest.mark.slow
def test_two_processes_take_up_an_interrupted_run_to_the_last_bit(both):
    results, _ = both
    for result in results:
        whole, again = result["whole"], result["again"]
        assert equal(whole["imitator"], again["imitator"]) == []
        assert equal(whole["distinguisher"], again["distinguisher"]) == []
        assert torch.equal(whole["random"], again["random"])
        assert (whole["history"], whole["replay"]) == (again["history"], again["replay"])
        assert whole["multiplier"] == again["multiplier"]


@pytest.mark.slow
def test_warm_ups_that_end_by_themselves_end_together(both):
    (one, two), _ = both
    phases = one["auto"]["phases"]
    assert phases == two["auto"]["phases"]
    assert 0 < phases["distinguisher_warmup"] < 200  # its cap
    assert [len(result["auto"]["batches"]) for result in (one, two)] == [phases["distinguisher_warmup"] + 1] * 2


@pytest.mark.slow
@pytest.mark.parametrize("split", EQUAL)
def test_two_processes_take_the_steps_of_one_with_the_same_global_batch(both, split, tmp_path):
    """Loss, rewards, distinguisher and imitator over 20 steps, with replay, held-out rows and a budget."""
    _, folder = both
    results = [torch.load(folder / "world" / f"rank{rank}.pt", weights_only=True)[split] for rank in (0, 1)]
    alone = world.one_run(str(tmp_path), split, num_processes=1)
    found = world.differences(results, alone)
    assert found["processes"] == [2, 2, 1]
    assert found["equal_hashes_on_both"] == found["steps"] == world.NUM_STEPS
    assert found["equal_guards_on_both"]
    assert found["missing_in_one"] == []
    assert max(found["largest_difference"].values()) < 1e-5, found
    assert found["imitator_moved"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", world.FAILURES[:-1])
def test_where_one_process_fails_both_say_what_it_said_at_once(both, kind):
    _, folder = both
    found = world.heard(str(folder / "world"))[kind]
    said = {
        "check": "RuntimeError: The check 'failing_check' raised KeyError on 4 answers (ranks.py, line ",
        "reward": "RuntimeError: The reward 'failing_reward' raised KeyError on 4 answers (ranks.py, line ",
        "async reward": "RuntimeError: The reward 'failing_async_reward' raised KeyError on 4 answers (ranks.py, ",
        "nan": "FloatingPointError: The imitator's loss is not finite at step 4 (game): the first weight that is not ",
    }
    assert found["words"].startswith(f"Process 1 of 2 failed at step 4: {said[kind]}")
    number = world.FAILURES.index(kind)
    newest = (
        # The weights of step 4 are those that broke.
        f"The newest complete checkpoint from before this step is /{number}/run/checkpoint-2; go on from there."
        if kind == "nan"
        else f"The newest complete checkpoint is /{number}/run/checkpoint-4; `resume_from_checkpoint=True` goes on"
    )
    assert newest in found["words"]
    assert found["kind"] == ("NotFinite" if kind == "nan" else "ProcessFailure")
    assert (found["same_words"], found["quotes_a_row"]) == (True, False)
    assert found["seconds_apart"] < 10


@pytest.mark.slow
def test_a_process_that_waits_for_one_that_failed_and_lingers_is_ended(both):
    """The disk of the second is full in a save, and it sleeps for nine seconds; the first waits in a collective."""
    _, folder = both
    failed = float((folder / "world" / "linger" / "failed1").read_text())
    how, when = (folder / "ended0").read_text().split()
    assert (how, float(when) - failed < 8) == ("1", True)
    how, when = (folder / "ended1").read_text().split()
    assert (how, float(when) - failed > 9) == ("left", True)
    assert not (folder / "world" / "linger" / "failed0").exists()


@pytest.mark.slow
def test_a_save_that_fails_on_one_process_is_told_and_leaves_the_checkpoint_before_it(both):
    """What the first one had written stays where nobody takes it for a checkpoint, until the run goes on."""
    _, folder = both
    run = folder / "world" / "linger" / "run"
    said = (folder / "world" / "linger" / "said1").read_text()
    assert said.startswith("Process 1 of 2 failed at step 4: OSError: checkpoint-4 could not be written to ")
    assert "No space left on device" in said
    assert "What is half-written is removed when the run goes on. The newest complete checkpoint is " in said
    assert f"{run}/checkpoint-2; " in said
    names = {path.name for path in run.iterdir() if path.name.startswith(("checkpoint", "_"))}
    assert names == {"checkpoint-2", "_saving-4"}
    assert (run / "_saving-4" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert damage(run / "checkpoint-2") is None
    clear_leftovers(run)
    assert not (run / "_saving-4").exists()


@pytest.mark.slow
def test_likelihood_distinguisher_and_save_are_the_same_on_weights_in_shards(both):
    _, folder = both
    one, two = (json.loads((folder / f"sharded{rank}.json").read_text()) for rank in (0, 1))
    assert (one["sharded"], one["replicated"]) == (True, True)
    for found in (one, two):
        assert max(abs(found["nats"]), abs(found["nats of one"])) < 1e-5
        assert max(found["gradients"], found["saved"]) < 1e-6
        assert found["blame"] == "the first weight that is not finite is `model.norm.weight`"
    assert one["distinguisher"] == two["distinguisher"]
    assert one["loss of none"] > 0 == two["loss of none"]


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_not_for_one(both, tmp_path, tiny_model_dir):
    _, folder = both
    trainer = sampled(tmp_path, tiny_model_dir)
    with pytest.raises(ValueError, match="`num_processes` was 2 and is 1"):
        trainer.train(resume_from_checkpoint=str(folder / "whole" / "run" / "checkpoint-3"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adversarial_state_1.json", "adversarial_state_1.safetensors", "rng_state_1.pth"])
def test_a_checkpoint_is_complete_only_when_both_processes_were_done(both, name):
    """The first process may have written its last file while the second was still at work."""
    _, folder = both
    run = folder / "whole" / "run"
    last = run / "checkpoint-8"
    assert newest_complete_checkpoint(run) == last
    file = last / name
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1])
        assert damage(last) == f"{name} is cut off"
        file.unlink()
        assert damage(last) == f"{name} is missing"
        assert newest_complete_checkpoint(run) == run / "checkpoint-6"
    finally:
        file.write_bytes(whole)
