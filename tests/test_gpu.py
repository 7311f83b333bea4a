"""On a GPU: a run of each trainer in bf16, and of every engine on two; skipped where there is none."""

import subprocess
import sys
from pathlib import Path

import latent_worlds
import pytest
import torch
from exact_runs import make as make_retrodictive
from tiny_runs import imitator_weights, logged, make, same, train

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="there is no CUDA device"),
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("full", [False, True])
def test_an_adversarial_run_in_bf16_moves_both_sides(tmp_path, tiny_model_dir, full):
    trainer = make(
        tmp_path, tiny_model_dir, full=full, bf16=True, imitator_warmup_steps=1, distinguisher_warmup_steps=1
    )
    before = imitator_weights(trainer)
    train(trainer)
    assert not same(before, imitator_weights(trainer))
    assert all(torch.isfinite(torch.tensor(loss)) for loss in logged(trainer, "distinguisher/loss"))
    assert {parameter.dtype for parameter in trainer.game.learner.parameters} == {torch.float32}


def test_runs_of_likelihood_in_bf16_end_with_finite_numbers(tmp_path, tiny_model_dir):
    trainer = make_retrodictive(tmp_path, tiny_model_dir, use_cpu=False, bf16=True)
    train(trainer)
    assert torch.isfinite(torch.tensor(logged(trainer, "loss"))).all()
    world = latent_worlds.save_world(tmp_path / "world")
    latent = latent_worlds.train(latent_worlds.make(tmp_path, world, bf16=True))
    assert torch.isfinite(torch.tensor(logged(latent, "loss"))).all()


@pytest.mark.skipif(NUM_GPUS < 2, reason="shards need two GPUs")
@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("command", ["adversarial", "retrodictive", "latent"])
def test_an_engine_trains_and_leaves_an_imitator_that_answers(tmp_path, tiny_model_dir, command, name):
    from hf_imitate import Imitator

    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    line = [command, "--accelerate_config", name, "--num_processes", "2", "--model_name_or_path", str(tiny_model_dir)]
    line += [
        "--dataset_name",
        "docstrings",
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "2",
        "--bf16",
        "true",
    ]
    line += ["--per_device_train_batch_size", "4", "--report_to", "none", "--use_peft", "true"]
    line += ["--lora_target_modules", "all-linear"]
    if command == "adversarial":
        line += ["--num_generations", "4", "--imitator_warmup_steps", "1", "--distinguisher_warmup_steps", "1"]
    environment = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "hf_imitate.cli", *line], capture_output=True, text=True, cwd=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Engine | " in card
    assert len(Imitator.from_pretrained(tmp_path / "out").answer(["def a():"], num_answers=2)[0]) == 2
