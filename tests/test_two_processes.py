"""Two real processes over gloo, of which one never meets a human answer in the game."""

import json

import pytest
import torch
from launch import TESTS, in_two_processes
from tiny_runs import AtEveryStep, Watched, distinguisher_weights, imitator_weights, make, rows, train

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
    """Also notes the state of the guard after each generation batch, and the distinguisher's gradients."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pauses, self.gradients = [], []
        self.add_callback(AtEveryStep(after=lambda: self.pauses.append(self.game.pause)))
        learner = self.game.learner
        learner.optimizer = self._optimizer_of(learner)
        update = learner.optimizer.step

        def step():
            self.gradients.append([None if p.grad is None else p.grad.clone() for p in learner.parameters])
            update()

        learner.optimizer.step = step

    def _optimizer_of(self, learner):
        return learner.optimizer


class Scripted(Noted):
    """Answers by a script instead of sampling: what is answered does not depend on how many processes there are.

    Both sides learn by plain gradient descent: Adam turns a rounding error in a tiny gradient into a whole step.
    """

    def _optimizer_of(self, learner):
        return torch.optim.SGD(learner.optimizer.param_groups, momentum=0.5)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        end = self.eos_token_ids[0]
        texts = ("abc", "zz", "de!", "a list, and another one")
        answers = [self._tokenizer(texts[i % 4])["input_ids"] for i in range(len(prompt_ids))]
        return [([*ids, end] if len(ids) < 6 else ids)[:6] for ids in answers], None


def sampled(folder, model, **changes):
    """A run with everything on, in a pause of the guard out of which it may find."""
    trainer = make(
        folder,
        model,
        rarely_answered(),
        kind=Noted,
        arguments={"checks": [short_or_none]},
        **{"imitator_warmup_steps": 1, "distinguisher_warmup_steps": 2, "max_steps": 5, "retrodictive_budget": 1.0},
        **{"per_device_train_batch_size": 4, "allow_unlabelled": True, "shuffle_dataset": False, "use_cpu": True},
        **{"distinguisher_learning_rate": 1e-2, "logging_steps": 2, **changes},
    )
    trainer.game.guard.accuracy, trainer.game.guard.num_low = 0.3, 40
    return trainer


def scripted(folder, model, batch_size):
    """A run whose answers and rows are given, so that one process with `batch_size` 8 does what two with 4 do."""
    return make(
        folder,
        model,
        rarely_answered(),
        kind=Scripted,
        arguments={"checks": [short_or_none]},
        **{"imitator_warmup_steps": 1, "distinguisher_warmup_steps": 1, "max_steps": 3, "retrodictive_budget": 1.0},
        **{"per_device_train_batch_size": batch_size, "allow_unlabelled": True, "shuffle_dataset": False},
        **{"heldout_fraction": 0.0, "replay_ratio": 0.0, "use_cpu": True},
        **{"optim": "sgd", "learning_rate": 1e-2, "imitator_warmup_learning_rate": 1e-2},
    )


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
        "gradients": trainer.gradients,
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
    alike = scripted(folder / "scripted", model, batch_size=4)
    train(alike)
    results["scripted"] = found(alike)
    torch.save(results, folder / f"rank{whole.accelerator.process_index}.pt")


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
@pytest.mark.parametrize("run", ["whole", "again", "scripted"])
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
def test_two_processes_take_the_step_of_one_with_both_batches(both, tmp_path, tiny_model_dir):
    (one, _), _ = both
    alone = scripted(tmp_path, tiny_model_dir, batch_size=8)
    train(alone)
    got, expected = one["scripted"], found(alone)
    assert len(got["gradients"]) == len(expected["gradients"])
    for theirs, ours in zip(got["gradients"], expected["gradients"], strict=True):
        for gradient, whole in zip(theirs, ours, strict=True):
            torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=0)
    for name in ("imitator", "distinguisher"):
        for key, value in expected[name].items():
            torch.testing.assert_close(got[name][key], value, atol=1e-6, rtol=0, msg=f"{name} {key}")
    start = make(tmp_path, tiny_model_dir, rarely_answered(), allow_unlabelled=True)
    for name, value in imitator_weights(start).items():
        if "lora_B" in name:
            assert (expected["imitator"][name] - value).abs().max() > 1e-5
    for theirs, ours in zip(got["history"], expected["history"], strict=True):
        assert theirs.keys() == ours.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, abs=1e-5, nan_ok=True), name


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
