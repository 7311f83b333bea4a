"""What a run may start from: an adapter's repo to go on with, and never a model of which nothing can learn."""

import json
import logging
import shutil
from pathlib import Path

import exact_runs
import latent_worlds
import pytest
import tiny_runs
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_imitate import Imitator
from hf_imitate.repo_checks import UnsafeRepoError

TRAINERS = ("adversarial", "retrodictive", "latent")


def make(folder, trainer, model, **given):
    """A trainer of `model`, with a new adapter only where `given` says so."""
    if trainer == "adversarial":
        arguments = {"arguments": given.pop("arguments", {}), "full": True}
        return tiny_runs.make(folder, model, **arguments, **given)
    if trainer == "retrodictive":
        return exact_runs.make(folder, model, **{"max_steps": 2, **given})
    return latent_worlds.make(folder, model, full=True, **{"max_steps": 2, **given})


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_model_dir):
    """Folders of first stages: an adapter on the tiny model, and one on a world of words."""
    folder = tmp_path_factory.mktemp("first")
    words = latent_worlds.save_world(folder / "words")
    plain = exact_runs.make(folder / "plain", tiny_model_dir, adapter=True, max_steps=2)
    thinking = latent_worlds.make(folder / "thinking", words, full=False, max_steps=2)
    for trainer in (plain, thinking):
        latent_worlds.train(trainer)
        trainer.save_model()
    return {"plain": folder / "plain" / "run", "latent": thinking.args.output_dir}


def stage(first, trainer):
    return str(first["latent" if trainer == "latent" else "plain"])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[0, 3, 1, 2, 5]])).logits


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_adapters_folder_is_trained_further(first, tmp_path, trainer):
    """It ended in transformers' "Unrecognized model", since a string was taken for full weights."""
    folder = stage(first, trainer)
    before = logits(Imitator.from_pretrained(folder, device="cpu").model)
    run = make(tmp_path, trainer, folder)
    learns = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert isinstance(run.model, PeftModel)
    assert learns
    assert all(".default." in name for name in learns)
    assert torch.equal(logits(run.model), before)
    latent_worlds.train(run)
    run.save_model()
    after = logits(Imitator.from_pretrained(run.args.output_dir, device="cpu").model)
    assert torch.equal(after, logits(run.model))
    assert (after - before).abs().max() > 1e-4
    assert "`run`, an adapter that was trained before |" in (run_folder(run) / "README.md").read_text()
    bases = [json.loads((path / "adapter_config.json").read_text()) for path in (run_folder(folder), run_folder(run))]
    assert len({base["base_model_name_or_path"] for base in bases}) == 1


def run_folder(run):
    return Path(run if isinstance(run, str) else run.args.output_dir)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_new_adapter_on_an_adapters_folder_is_refused_with_the_cure(first, tmp_path, trainer):
    asked = {"arguments": {"peft_config": tiny_runs.lora()}}
    with pytest.raises(ValueError, match=r"holds an adapter.*`peft_config` asks for a new one.*--merge"):
        make(tmp_path, trainer, stage(first, trainer), **asked)


def test_the_base_is_loaded_as_asked_and_nobody_says_otherwise(first, tmp_path, caplog):
    asked = {"dtype": "bfloat16", "revision": "main", "trust_remote_code": True}
    with caplog.at_level(logging.WARNING):
        run = make(tmp_path, "retrodictive", stage(first, "retrodictive"), model_init_kwargs=asked)
    assert run.args.model_init_kwargs == asked
    assert {p.dtype for name, p in run.model.named_parameters() if "lora" not in name} == {torch.bfloat16}
    assert "will be ignored" not in caplog.text


def test_a_strangers_adapter_is_read_before_it_is_trained(first, tmp_path):
    folder = shutil.copytree(stage(first, "retrodictive"), tmp_path / "strange")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": r"((\w+\.?)+)+!"}))
    for trainer in TRAINERS[:2]:
        with pytest.raises(UnsafeRepoError, match="`target_modules` is neither"):
            make(tmp_path, trainer, str(folder))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_an_imitators_frozen_model_is_refused_with_the_cure(first, tmp_path, tiny_model_dir, trainer, kind):
    """It failed with autograd's own words, after everything else was made."""
    if kind == "adapter":
        imitator = Imitator.from_pretrained(stage(first, trainer), device="cpu")
    else:
        base = latent_worlds.save_world(tmp_path / "words") if trainer == "latent" else tiny_model_dir
        imitator = Imitator(AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base))
        imitator.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"No parameter of the \w+ is trainable; an Imitator's `model` is frozen"):
        make(tmp_path, trainer, imitator.model)


def test_a_frozen_model_takes_a_new_adapter(tmp_path, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).requires_grad_(False)
    run = exact_runs.make(tmp_path, model, adapter=True, max_steps=1)
    assert any(p.requires_grad for p in run.model.parameters())


def test_a_base_of_pickles_alone_is_trained_on_with_a_warning(tmp_path, tiny_model_dir, caplog):
    pickled = shutil.copytree(tiny_model_dir, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    for is_told in (False, True):
        with caplog.at_level(logging.WARNING):
            exact_runs.make(tmp_path, pickled, adapter=True)
        assert ("holds its weights as pickles alone" in caplog.text) is is_told
        (pickled / "model.safetensors").unlink(missing_ok=True)
