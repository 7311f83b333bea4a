"""A latent run goes on where it stopped, and what it saves is the law it trained."""

import json
from pathlib import Path

import latent_worlds as worlds
import pytest
import torch

from hf_imitate.causal_lm import load_causal_lm
from hf_imitate.latent_imitator import LatentImitator
from hf_imitate.rendering import Rendered, Renderer, end_token_ids
from hf_imitate.sampling import stream_key


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.save_world(tmp_path_factory.mktemp("world"))


def everything(trainer) -> list[torch.Tensor]:
    moments = trainer.learner.optimizer.state_dict()["state"] if trainer.learner else {}
    own = [moments[index][name] for index in sorted(moments) for name in sorted(moments[index])]
    return [*trainer.model.parameters(), *own]


def load(folder: Path) -> LatentImitator:
    model, tokenizer = load_causal_lm(folder, "cpu")
    stored = json.loads((folder / "imitation.json").read_text())
    renderer = Renderer(tokenizer, end_token_ids(tokenizer, model.generation_config))
    return LatentImitator.load(folder, stored, model, tokenizer, renderer)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_without_a_marker_is_no_fresh_start_where_a_file_is_missing(world, tmp_path, name):
    """As from before there were markers; transformers would begin with a new optimizer and say nothing."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    worlds.train(worlds.make(tmp_path, world, **settings))
    last = tmp_path / "run" / "checkpoint-2"
    (last / "_complete.json").unlink()
    (last / name).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=name):
        worlds.make(tmp_path, world, **{**settings, "max_steps": 3}).train(resume_from_checkpoint=str(last))


@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_run_ends(world, tmp_path, full):
    """Stopped in the warm-up and in training; half the thoughts known, two batches to a step."""
    changes = {
        "full": full,
        "max_steps": 3,
        "retrodictor_warmup_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 3,
    }
    dataset = worlds.rows(thought=["a b", None] * 4)
    whole = worlds.train(worlds.make(tmp_path / "whole", world, dataset, **changes))
    for step in (1, 4) if not full else (3,):
        again = worlds.make(tmp_path / f"again{step}", world, dataset, **{**changes, "save_strategy": "no"})
        worlds.train(again, resume_from_checkpoint=str(tmp_path / "whole" / "run" / f"checkpoint-{step}"))
        assert again.state.global_step == whole.state.global_step == 5
        pairs = zip(everything(whole), everything(again), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        if full:
            continue
        for one, other in zip(whole.state.log_history, again.state.log_history, strict=True):
            assert {k: v for k, v in one.items() if k.startswith(("retro", "thoughts", "loss", "phase"))} == {
                k: v for k, v in other.items() if k.startswith(("retro", "thoughts", "loss", "phase"))
            }


def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(world, tmp_path):
    worlds.train(worlds.make(tmp_path, world, max_steps=1, save_strategy="steps", save_steps=1))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    other = worlds.make(tmp_path / "other", world, max_steps=2, num_thoughts=5)
    before = [parameter.detach().clone() for parameter in other.model.parameters()]
    with pytest.raises(ValueError, match="`num_thoughts` was 4 and is 5"):
        worlds.train(other, resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(one, now) for one, now in zip(before, other.model.parameters(), strict=True))
    (checkpoint / "_complete.json").unlink()  # as one from before there were markers
    (checkpoint / "_latent_state_0.json").unlink()
    with pytest.raises(FileNotFoundError, match="save_only_model=False"):
        worlds.train(worlds.make(tmp_path / "third", world, max_steps=2), resume_from_checkpoint=str(checkpoint))
    (checkpoint / "_latent_state_0.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"_latent_state_0\.safetensors is cut off"):
        worlds.train(worlds.make(tmp_path / "fourth", world, max_steps=2), resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(("full", "estimator"), [(False, "rws"), (True, "rws"), (False, "prior")])
def test_what_was_saved_scores_and_draws_as_what_was_trained(world, tmp_path, full, estimator):
    trainer = worlds.train(worlds.make(tmp_path, world, full=full, estimator=estimator, max_steps=2))
    folder = tmp_path / "run"
    trainer.save_model()
    assert not list(folder.rglob("*.bin"))
    assert (folder / "retrodictor").is_dir() == (estimator == "rws")
    stored = json.loads((folder / "imitation.json").read_text())
    assert stored["objective"] == "latent"
    assert stored["thoughts"]["delimiter_ids"] == [6]
    assert stored["thoughts"]["max_thought_length"] == 3
    assert str(tmp_path) not in json.dumps(stored)

    imitator = load(folder)
    row = Rendered(**{name: trainer.train_dataset[0][name] for name in ("prompt_ids", "answer_ids", "ended")})
    keys = [[stream_key(5, "test", "q", k) for k in range(8)]]
    trained, loaded = (thinkers.log_weights([row], keys) for thinkers in (trainer.thinkers, imitator.thinkers))
    torch.testing.assert_close(loaded[0], trained[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded[1], trained[1], atol=1e-5, rtol=0)
    assert [one.thought_ids for one in loaded[2][0]] == [one.thought_ids for one in trained[2][0]]


def test_a_repo_without_its_retrodictor_is_refused(world, tmp_path):
    trainer = worlds.make(tmp_path, world)
    trainer.save_model()
    for file in (tmp_path / "run" / "retrodictor").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match="no pickle is read"):
        load(tmp_path / "run")
