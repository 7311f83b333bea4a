"""What others get of a latent imitator: folder and repo give back the law that was trained, and the card says so."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap

import latent_worlds as worlds
import pytest
import torch
from hub_server import hub_environment, hub_server

from hf_imitate import Imitator
from hf_imitate.latent_imitator import LatentImitator
from hf_imitate.trainers.latent_saving import LAW_NOTE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.save_world(tmp_path_factory.mktemp("world"))


def trained(folder, world, **changes):
    given = {"max_steps": 4, "arguments": {"eval_dataset": worlds.rows()}, **changes}
    return worlds.train(worlds.make(folder, world, **given))


def of(trainer) -> LatentImitator:
    """The trainer's own models, asked as `Imitator` asks those it has loaded."""
    return LatentImitator(trainer.thinkers, trainer.renderer, trainer._counts["train"].longest_answer)


@pytest.mark.parametrize(("full", "estimator"), [(False, "rws"), (True, "rws"), (False, "prior")])
def test_the_saved_imitator_answers_scores_and_verifies_as_the_trained_one(world, tmp_path, full, estimator):
    trainer = trained(tmp_path, world, full=full, estimator=estimator)
    trainer.save_model(str(tmp_path / "saved"))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    imitator, own = Imitator.from_pretrained(tmp_path / "saved", device="cpu"), of(trainer)
    questions, answers = ["a b", "c d", "e"], ["a a", "c", "f f b"]
    drawn = own.answer(questions, num_answers=4, seed=3)
    assert imitator.latent.answer(questions, num_answers=4, seed=3) == drawn
    texts = imitator.answer(questions, num_answers=4, seed=3)
    assert texts == [[one.answer.text for one in series] for series in drawn]
    assert imitator.verify(questions, texts, seed=3).verified
    assert own.verify(questions, texts, seed=3).verified
    loaded, kept = (
        imitator.log_prob(questions, answers, num_estimates=16),
        own.log_prob(questions, answers, num_estimates=16),
    )
    torch.testing.assert_close(loaded.nats, kept.nats, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded.lower_bound, kept.lower_bound, atol=1e-5, rtol=0)
    assert not loaded.is_exact.any()


@pytest.mark.parametrize("full", [False, True])
def test_the_best_checkpoint_is_loaded_with_the_retrodictor_of_its_step(world, tmp_path, full):
    """The learning rate rises until it ruins both, so an earlier step is the best one."""
    trainer = trained(
        tmp_path,
        world,
        full=full,
        max_steps=6,
        learning_rate=0.5,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    bits = {
        entry["step"]: entry["eval_retrodiction/bits_per_answer"]
        for entry in trainer.state.log_history
        if "eval_retrodiction/bits_per_answer" in entry
    }
    best = min(bits, key=bits.get)
    assert best < 6
    assert trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_retrodiction/bits_per_answer"] == pytest.approx(bits[best], abs=1e-4)
    checkpoint = Imitator.from_pretrained(tmp_path / "run" / f"checkpoint-{best}", device="cpu")
    pair = (["a b"] * 2, ["a a", "c"])
    torch.testing.assert_close(of(trainer).log_prob(*pair).nats, checkpoint.log_prob(*pair).nats, atol=1e-4, rtol=0)
    trainer.save_model()
    facts = trainer.card_facts().metrics["eval_retrodiction/bits_per_answer"]
    assert facts.value == pytest.approx(bits[best], abs=1e-4)
    again = Imitator.from_pretrained(tmp_path / "run", device="cpu")
    torch.testing.assert_close(again.log_prob(*pair).nats, checkpoint.log_prob(*pair).nats, atol=1e-5, rtol=0)


def test_the_card_tells_the_law_the_paper_and_the_numbers(world, tmp_path):
    trainer = trained(tmp_path, world)
    metrics = trainer.evaluate()
    trainer.save_model()
    card = " ".join((tmp_path / "run" / "README.md").read_text().split())
    for note in LAW_NOTE:
        assert note.partition(".")[0] in card
    assert "1406.2751" in card
    assert "bornschein2015reweighted" in card
    for name in ("bits_per_answer", "bits_per_byte"):
        assert f"{metrics[f'eval_retrodiction/{name}']:.4g}" in card
    assert f"{metrics['eval_thoughts/effective_sample_size']:.4g}" in card
    assert "Imitator.from_pretrained" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "run" / "imitation.json").read_text()


def test_the_cards_quick_start_runs_as_printed_and_shows_the_law_before_the_weights(world, tmp_path, monkeypatch):
    trainer = trained(tmp_path, world, arguments={})
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    quick_start = card.partition("## Quick start")[2].partition("\n## ")[0]
    own, plain = re.findall(r"^```python\n(.*?)^```$", quick_start, re.DOTALL | re.MULTILINE)
    assert LAW_NOTE[0].partition(".")[0] in " ".join(quick_start.partition(own)[2].partition(plain)[0].split())
    monkeypatch.chdir(tmp_path)  # where the card's `from_pretrained("run")` finds it
    for block in (own, plain):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            exec(block, {})
        assert shown.getvalue()


@pytest.mark.parametrize("full", [False, True])
def test_a_pushed_imitator_is_private_whole_and_gives_the_same_numbers(world, tmp_path, full):
    """In a process of its own, since the client reads the Hub's address when it is imported."""
    program = f"""
        import json, sys
        sys.path.insert(0, {str(tmp_path.parent)!r})
        from pathlib import Path
        import latent_worlds as worlds
        from huggingface_hub import HfApi
        from hf_imitate import Imitator
        folder = Path({str(tmp_path)!r})
        settings = dict(max_steps=2, hub_model_id="me/thinker", push_to_hub=True, save_strategy="steps", save_steps=1)
        trainer = worlds.make(folder, {str(world)!r}, full={full}, **settings)
        worlds.train(trainer)
        trainer.push_to_hub()
        api = HfApi()
        questions, answers = ["a b", "c d"], ["a a", "c"]
        here, there = (Imitator.from_pretrained(n, device="cpu") for n in (str(folder / "run"), "me/thinker"))
        gap = (here.log_prob(questions, answers).nats - there.log_prob(questions, answers).nats).abs().max().item()
        same = here.answer(questions, num_answers=4, seed=1) == there.answer(questions, num_answers=4, seed=1)
        print(json.dumps([api.list_repo_files("me/thinker"), api.model_info("me/thinker").private, gap, same]))
    """
    with hub_server() as url:
        environment = hub_environment(url, tmp_path / "home")
        environment["PYTHONPATH"] += f":{worlds.__file__.rpartition('/')[0]}"
        environment |= {"ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    files, is_private, gap, is_same = json.loads(done.stdout.splitlines()[-1])
    own = "model.safetensors" if full else "adapter_model.safetensors"
    assert {own, "retrodictor/adapter_model.safetensors", "imitation.json", "README.md"} <= set(files)
    assert not [
        name for name in files if name.startswith(("checkpoint", "_", "latent_state", "optimizer", "training_args"))
    ]
    assert is_private
    assert gap < 1e-6
    assert is_same
