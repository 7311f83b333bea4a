"""What an exact run leaves behind: the imitator, its law, its card, its push, and a checkpoint to go on from."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from exact_runs import ANSWERS, END, make, nats_by_hand, run
from hub_server import hub_environment, hub_server
from launch import TESTS
from peft import AutoPeftModelForCausalLM
from tiny_runs import imitator_weights, logged, lora, rows, same, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_imitate import Imitator
from hf_imitate.trainers import imitator_saving
from hf_imitate.trainers.checkpoints import checkpoint_to_resume
from hf_imitate.trainers.retrodictive_saving import damage

COMMON = {"README.md", "generation_config.json", "imitation.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(str(tiny_model_dir))


@pytest.fixture(scope="module", params=[True, False], ids=["adapter", "full"])
def saved(request, tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("saved")
    trainer = run(folder, tiny_model_dir, adapter=request.param, max_steps=3, learning_rate=0.5)
    trainer.evaluate(rows(8, ANSWERS))
    trainer.save_model()
    return trainer, folder / "run", request.param


def test_a_run_leaves_the_contracts_files_and_no_more(saved):
    _, folder, is_adapter = saved
    own = {"adapter_config.json", "adapter_model.safetensors"} if is_adapter else {"config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == COMMON | own


def test_the_saved_law_is_the_trained_one_and_its_facts_hold_no_row(saved, tiny_model_dir):
    _, folder, _ = saved
    law = json.loads((folder / "generation_config.json").read_text())
    assert (law["do_sample"], law["temperature"], law["top_p"], law["top_k"]) == (True, 1.0, 1.0, 0)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    longest = max(len(tokenizer(answer)["input_ids"]) for answer in ANSWERS) + 1
    assert (law["max_new_tokens"], law["eos_token_id"]) == (longest, [END])
    facts = json.loads((folder / "imitation.json").read_text())
    assert (facts["objective"], facts["base_model"], facts["base_is_local"]) == (
        *("retrodictive", tiny_model_dir.name, True),
    )
    assert facts["dataset"] | {"fingerprint": None} == {
        **{"num_rows": 8, "num_labelled": 8, "num_truncated": 0, "num_left_out": 0, "fingerprint": None}
    }
    assert facts["settings"]["loss_reduction"] == "answer"
    assert "Item 3" not in (folder / "imitation.json").read_text() + (folder / "README.md").read_text()


def test_whoever_loads_it_gets_the_log_probs_of_the_trainer(saved, tokenizer):
    trainer, folder, is_adapter = saved
    dataset = rows(8, ANSWERS)
    expected = -torch.tensor(nats_by_hand(trainer.model.eval(), tokenizer, dataset), dtype=torch.float64)
    nats = Imitator.from_pretrained(folder).log_prob(dataset["prompt"][:], dataset["completion"][:]).nats
    torch.testing.assert_close(nats, expected, atol=0, rtol=1e-6)
    bits = trainer.last_measured()["eval_retrodiction/bits_per_answer"]
    assert bits == pytest.approx(-nats.mean().item() / math.log(2), rel=1e-6)
    ids = torch.tensor([[40, 41, 42, 43]])
    loaders = [AutoModelForCausalLM, *([AutoPeftModelForCausalLM] if is_adapter else [])]
    with torch.no_grad():
        for loader in loaders:
            logits = loader.from_pretrained(str(folder))(input_ids=ids).logits
            torch.testing.assert_close(logits, trainer.model(input_ids=ids).logits, atol=1e-6, rtol=0)


def test_the_card_names_its_paper_its_settings_and_its_bits(saved):
    trainer, folder, is_adapter = saved
    card = (folder / "README.md").read_text()
    for text in ("Retrodictive imitation", "2407.15007", "Is Behavior Cloning All You Need?", "`loss_reduction`"):
        assert text in card
    bits = trainer.last_measured()["eval_retrodiction/bits_per_answer"]
    assert f"| `eval_retrodiction/bits_per_answer` | {bits:.4g} | bits |" in card
    assert "This repository holds no distinguisher." in card
    assert ("a PEFT adapter on the base model" in card) is is_adapter


def test_the_best_checkpoint_is_the_one_with_the_fewest_bits(tmp_path, tiny_model_dir):
    each = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    more = {"max_steps": 4, "learning_rate": 4.0, "load_best_model_at_end": True}
    trainer = run(tmp_path, tiny_model_dir, arguments={"eval_dataset": rows(8, ANSWERS)}, **each, **more)
    bits = logged(trainer, "eval_retrodiction/bits_per_answer")
    best = min(bits)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (best, 1 + bits.index(best))
    assert trainer.state.best_global_step < 4
    assert trainer.card_facts().metrics["eval_retrodiction/bits_per_answer"].value == best


@pytest.mark.parametrize(("said", "is_private"), [(None, True), (True, True), (False, False)])
def test_a_push_asks_for_a_private_repo_unless_false_is_said(tmp_path, tiny_model_dir, monkeypatch, said, is_private):
    seen = []
    monkeypatch.setattr(imitator_saving, "push_folder", lambda *args, **kwargs: seen.append(kwargs["private"]))
    trainer = make(tmp_path, tiny_model_dir)
    trainer.hub_model_id = "me/imitator"
    trainer.push_to_hub(private=said)
    assert seen == [is_private]


PUSHING = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from huggingface_hub import HfApi
import torch
torch.set_num_threads(1)
from exact_runs import run

trainer = run(Path({folder!r}), Path({model!r}), adapter=True, push_to_hub=True, hub_model_id="me/imitator",
              hub_strategy="every_save", hub_always_push=True, save_strategy="steps", save_steps=1, max_steps=2)
trainer.push_to_hub(commit_message="Done")
api = HfApi()
files = sorted(api.list_repo_files("me/imitator"))
titles = [commit.title for commit in api.list_repo_commits("me/imitator")]
print("FOUND", json.dumps([files, titles, api.model_info("me/imitator").private]))
"""


@pytest.mark.slow
def test_a_push_is_private_one_commit_and_holds_the_imitator_alone(tmp_path, tiny_model_dir):
    program = PUSHING.format(tests=str(TESTS), folder=str(tmp_path), model=str(tiny_model_dir))
    with hub_server() as url:
        environment = hub_environment(url, tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    files, titles, is_private = json.loads(line.removeprefix("FOUND "))
    assert set(files) == {*COMMON, "adapter_config.json", "adapter_model.safetensors", ".gitattributes"}
    # The last save held all that there was to push.
    assert titles == ["Training in progress, step 2", "Training in progress, step 1", "initial commit"]
    assert is_private


# --- resume

LONG = {"max_steps": 5, "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("adapter", [True, False])
def test_a_resumed_run_ends_where_the_whole_one_does_to_the_last_bit(tmp_path, tiny_model_dir, adapter):
    config = lora()
    config.lora_dropout = 0.1  # draws from the random state, which has to come back, too
    arguments = {"peft_config": config} if adapter else {}
    whole = run(tmp_path / "whole", tiny_model_dir, arguments=arguments, **LONG, **SAVED)
    again = make(tmp_path / "again", tiny_model_dir, arguments=arguments, **LONG)
    train(again, resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))
    assert same(imitator_weights(again), imitator_weights(whole))
    for name in ("loss", "retrodiction/bits_per_answer"):
        assert logged(again, name) == logged(whole, name)


def test_weights_alone_are_not_gone_on_from_and_the_setting_that_left_them_is_named(tmp_path, tiny_model_dir):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    run(tmp_path, tiny_model_dir, adapter=True, **settings)
    with pytest.raises(FileNotFoundError, match=r"holds no optimizer\.pt, .*`save_only_model=False`"):
        make(tmp_path, tiny_model_dir, adapter=True, max_steps=2, **settings).train(resume_from_checkpoint=True)


def test_resuming_passes_over_a_damaged_checkpoint_and_takes_no_step_too_many(tmp_path, tiny_model_dir, caplog):
    trainer = run(tmp_path, tiny_model_dir, **LONG, **SAVED)
    folder = tmp_path / "run"
    assert checkpoint_to_resume(folder, damage) == folder / "checkpoint-5"
    again = make(tmp_path, tiny_model_dir, **LONG, **SAVED)
    train(again, resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert same(imitator_weights(again), imitator_weights(trainer))
    weights_file = folder / "checkpoint-5" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    assert damage(folder / "checkpoint-5") == "model.safetensors is cut off"
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(folder, damage) == folder / "checkpoint-2"
    assert "checkpoint-4 is passed over: trainer_state.json is missing" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-5 is not whole: model.safetensors is cut off"):
        train(again, resume_from_checkpoint=str(folder / "checkpoint-5"))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint_to_resume(tmp_path, damage)
