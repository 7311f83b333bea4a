"""Numbers that are not finite end a run before they move a weight, on all processes; the error says where to go on."""

import math
import traceback
from pathlib import Path
from types import SimpleNamespace

import exact_runs
import latent_worlds
import pytest
import tiny_runs
import torch
from datasets import Dataset
from tiny_runs import AtEveryStep, imitator_weights, logged, same

from hf_imitate.trainers import finite

SECRET = "violet-marmalade"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return latent_worlds.save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def make(tmp_path, tiny_model_dir, world):
    """A function that gives one of the three trainers, on rows that hold the marker."""
    texts = {"prompt": [f"{SECRET} {i}" for i in range(16)], "completion": [SECRET] * 16}

    def made(name, **changes):
        rows = latent_worlds.rows() if name == "latent" else Dataset.from_dict(texts)
        changes = {"max_steps": 3, **changes}
        if name == "adversarial":
            return tiny_runs.make(tmp_path, tiny_model_dir, rows, **changes)
        if name == "retrodictive":
            return exact_runs.make(tmp_path, tiny_model_dir, rows, adapter=True, **changes)
        return latent_worlds.make(tmp_path, world, rows, **changes)

    return made


TRAINERS = ["adversarial", "retrodictive", "latent"]


def stopped(trainer, capfd, caplog, *words):
    """The message of the error that ends the run, which shows no row."""
    with caplog.at_level("DEBUG"), pytest.raises(FloatingPointError) as raised:
        trainer.train()
    said = str(raised.value)
    assert [word for word in words if word not in said] == []
    shown = "".join(capfd.readouterr()) + caplog.text + "".join(traceback.format_exception(raised.value))
    assert SECRET not in shown
    return said


@pytest.mark.parametrize(("name", "number"), [*((name, math.nan) for name in TRAINERS), ("retrodictive", math.inf)])
def test_a_gradient_that_is_not_finite_moves_nothing(make, capfd, caplog, name, number):
    """One NaN among the gradients, of a loss that is finite: the optimizer would spread it over all weights."""
    trainer = make(name)
    before = imitator_weights(trainer)
    weight = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient + number if trainer.state.global_step == 0 else None)

    stopped(
        trainer, capfd, caplog, f"imitator's gradient is {number} at step 0; nothing was updated", "`learning_rate`"
    )
    assert same(before, imitator_weights(trainer))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_rate_of_1e30_is_named_with_its_step_and_the_weights(make, capfd, caplog, name):
    """torch would say that a probability tensor contains inf, or nothing at all."""
    trainer = make(name, learning_rate=1e30, max_grad_norm=1.0)
    said = stopped(trainer, capfd, caplog, "step 1", "earning_rate`", "There is no complete checkpoint from before")
    assert "probability tensor" not in said


@pytest.mark.parametrize(("said", "tries"), [("probability tensor contains nan", 2), ("not enough memory", 1)])
def test_answers_are_drawn_again_after_nans_and_no_other_error(make, monkeypatch, said, tries):
    trainer, calls = make("adversarial"), []

    def failing(self, prompts):
        calls.append(self.generation_config.remove_invalid_values)
        raise RuntimeError(said)

    monkeypatch.setattr("trl.GRPOTrainer._generate", failing)
    with pytest.raises(RuntimeError, match=said):
        trainer._generate([])
    assert [bool(is_removed) for is_removed in calls] == [False, True][:tries]


@pytest.mark.parametrize("name", TRAINERS)
def test_the_newest_complete_checkpoint_from_before_the_step_is_named(make, capfd, caplog, name):
    """That of the step itself holds the weights whose loss is no number, and the one before it is cut off."""
    trainer = make(name, save_strategy="steps", save_steps=1, max_steps=6)
    folder = Path(trainer.args.output_dir)

    def ruin():
        if trainer.state.global_step == 4:
            (folder / "checkpoint-3" / "trainer_state.json").unlink()
            with torch.no_grad():
                next(p for p in trainer.model.parameters() if p.requires_grad).fill_(math.nan)

    trainer.add_callback(AtEveryStep(after=ruin))
    said = stopped(trainer, capfd, caplog, "step 4", str(folder / "checkpoint-2"))
    assert "checkpoint-4" not in said
    assert (folder / "checkpoint-4").is_dir()


@pytest.mark.parametrize("name", TRAINERS)
def test_an_evaluation_of_broken_weights_is_an_error_too(make, name):
    trainer = make(name)
    trainer.eval_dataset = trainer.train_dataset
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss is not finite at step 0"):
        trainer.evaluate()


def test_under_fp16_the_scaler_skips_the_step_and_that_is_counted(make, monkeypatch):
    trainer = make("retrodictive", max_steps=2)
    norms = iter([torch.tensor(math.inf), torch.tensor(1.0)])
    monkeypatch.setattr(trainer.accelerator, "scaler", SimpleNamespace())
    monkeypatch.setattr("transformers.Trainer._get_grad_norm", lambda self, model, grad_norm=None: next(norms))
    for _ in range(2):
        trainer._get_grad_norm(trainer.model)
    assert trainer._tally.flush("train")["gradients/skipped"] == 0.5


def test_the_weight_to_blame_is_named():
    model = torch.nn.Linear(2, 1)
    assert "finite, the largest is" in finite.blame(model)
    model.bias.data.fill_(math.inf)
    assert finite.blame(model) == "the first weight that is not finite is `bias`"
    assert "none of its weights is trained" in finite.blame(model.requires_grad_(False))


def test_a_run_whose_numbers_are_finite_says_nothing_of_gradients(make):
    trainer = make("retrodictive")
    tiny_runs.train(trainer)
    assert logged(trainer, "gradients/skipped") == []
