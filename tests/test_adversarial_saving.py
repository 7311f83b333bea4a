"""What a run leaves behind: files that load everywhere, a push that holds no more, a checkpoint that goes on as if."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import hub_environment, hub_server
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny_runs import (
    distinguisher_weights,
    logged,
    lora,
    make,
    rows,
    run,
    same,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from hf_imitate import Distinguisher, Imitator
from hf_imitate.rendering import Answer

TESTS = Path(__file__).parent
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
COMMON = {"README.md", "generation_config.json", "imitation.json", *TOKENIZER}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
DISTINGUISHER = {f"distinguisher/{name}" for name in (*ADAPTER, "checks.json")}
CALM = {"distinguisher_learning_rate": 1e-2}


def is_short(completions, **columns):
    """A check: passes answers of fewer than four characters."""
    return [len(text) < 4 for text in completions]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def text_logits(trainer, prompts, texts):
    return trainer.distinguisher.score(prompts, [Answer(text, True) for text in texts])


QUESTIONS, ANSWERS = ["Item 3:", "Item 10:", "Item 3:"], ["abc", "de", "vwxyz"]


# --- the imitator's repo


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir):
    """A run with an adapter and a check, saved."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = run(
        folder,
        tiny_model_dir,
        arguments={"checks": [is_short]},
        imitator_warmup_steps=2,
        distinguisher_warmup_steps=2,
        log_completions=True,
        **CALM,
    )
    trainer.save_model()
    return trainer, Path(trainer.args.output_dir)


@pytest.fixture(scope="module")
def trained_fully(tmp_path_factory, tiny_model_dir):
    """A run that trained every weight, saved."""
    folder = tmp_path_factory.mktemp("saved_fully")
    trainer = run(folder, tiny_model_dir, full=True, imitator_warmup_steps=2, distinguisher_warmup_steps=2, **CALM)
    trainer.save_model()
    return trainer, Path(trainer.args.output_dir)


def test_an_adapter_run_leaves_the_contracts_files_and_no_more(trained):
    _, folder = trained
    found = {name for name in files(folder) if not name.startswith("completions/")}
    assert found == {*COMMON, *ADAPTER, *DISTINGUISHER}


def test_a_full_run_leaves_whole_weights_and_an_adapter_for_its_distinguisher(trained_fully):
    _, folder = trained_fully
    assert files(folder) == {*COMMON, *DISTINGUISHER, "config.json", "model.safetensors"}


def test_the_saved_law_is_the_one_that_was_trained(trained):
    trainer, folder = trained
    law = json.loads((folder / "generation_config.json").read_text())
    assert law["do_sample"] is True
    assert (law["temperature"], law["top_p"], law["top_k"], law["max_new_tokens"]) == (1.0, 1.0, 0, 6)
    assert law["eos_token_id"] == trainer.eos_token_ids


def test_the_facts_say_how_to_rebuild_it_and_hold_no_row(trained, tiny_model_dir):
    _, folder = trained
    facts = json.loads((folder / "imitation.json").read_text())
    assert facts["objective"] == "adversarial"
    assert (facts["base_model"], facts["base_is_local"]) == (tiny_model_dir.name, True)
    assert facts["dataset"] | {"fingerprint": None} == {
        **{"num_rows": 32, "num_labelled": 32, "num_heldout": 8, "num_truncated": 0, "fingerprint": None}
    }
    assert facts["settings"]["distinguisher_warmup_steps"] == 2
    assert facts["settings"]["max_completion_length"] == 6
    assert facts["phases"] == {
        "imitator_warmup": 2,
        "distinguisher_warmup": 2,
        "game": 2,
        "distinguisher_lm_warmup": 0,
    }
    assert facts["checks"] == ["is_short"]
    assert facts["versions"]["torch"] == torch.__version__
    texts = [path.read_text(errors="replace") for path in folder.rglob("*.json") if "tokenizer" not in path.name]
    assert all("Item 3" not in text for text in (*texts, (folder / "README.md").read_text()))


def test_the_card_names_its_paper_its_settings_and_its_numbers(trained):
    trainer, folder = trained
    card = (folder / "README.md").read_text()
    assert "1606.03476" in card
    assert "Generative Adversarial Imitation Learning" in card
    assert "is_short" in card
    assert "distinguisher_warmup_steps" in card
    facts = trainer.card_facts()
    assert facts.is_adapter
    assert facts.num_rows == 32
    assert facts.settings["learning_rate"] == 1e-3


def test_saving_elsewhere_puts_the_card_there(trained, tmp_path):
    trainer, _ = trained
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert files(tmp_path / "elsewhere") == {*COMMON, *ADAPTER, *DISTINGUISHER}


@pytest.mark.parametrize("which", ["trained", "trained_fully"])
def test_whatever_loads_the_imitator_gets_the_same_logits(which, request):
    trainer, folder = request.getfixturevalue(which)
    ids = torch.tensor([[40, 41, 42, 43]])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path)
        assert (base(input_ids=ids).logits - expected).abs().max() > 1e-2
        loaders = [AutoModelForCausalLM] + [AutoPeftModelForCausalLM] * (which == "trained")
        loaded = [loader.from_pretrained(str(folder)) for loader in loaders]
        loaded += [pipeline("text-generation", str(folder)).model, Imitator.from_pretrained(folder).model]
        for model in loaded:
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("which", ["trained", "trained_fully"])
def test_whatever_loads_the_distinguisher_gets_the_same_logits(which, request):
    trainer, folder = request.getfixturevalue(which)
    expected = text_logits(trainer, QUESTIONS, ANSWERS)
    assert expected.std() > 1e-4
    loaded = Distinguisher.from_pretrained(folder)
    torch.testing.assert_close(
        loaded.score(QUESTIONS, [Answer(text, True) for text in ANSWERS]), expected, atol=1e-5, rtol=0
    )
    # In a local folder of whole weights transformers takes those for the adapter's base, so it is given the folder.
    where = (
        {"pretrained_model_name_or_path": str(folder), "adapter_kwargs": {"subfolder": "distinguisher"}}
        if which == "trained"
        else {"pretrained_model_name_or_path": str(folder / "distinguisher")}
    )
    plain = AutoModelForSequenceClassification.from_pretrained(**where, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for question, answer, logit in zip(QUESTIONS, ANSWERS, expected, strict=True):
        ids = tokenizer(question)["input_ids"] + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            got = plain(input_ids=torch.tensor([ids])).logits
        torch.testing.assert_close(got[0, 0], logit, atol=1e-5, rtol=0)


def test_an_imitator_asks_the_distinguisher_it_was_saved_with(trained):
    trainer, folder = trained
    imitator = Imitator.from_pretrained(folder)
    outcomes = torch.tensor([[1.0], [1.0], [0.0]])
    expected = text_logits(trainer, QUESTIONS, ANSWERS) + trainer.distinguisher.check_logits(outcomes)
    got = imitator.human_logit(QUESTIONS, ANSWERS, checks=[is_short])
    torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=0)
    assert trainer.distinguisher.check_weights.abs().item() > 1e-2


def test_a_distinguisher_of_its_own_base_brings_its_tokenizer(tmp_path, tiny_model_dir, tiny_chat_model_dir):
    trainer = run(tmp_path, tiny_model_dir, arguments={"distinguisher": str(tiny_chat_model_dir)}, max_steps=1)
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    assert {f"distinguisher/{name}" for name in TOKENIZER} <= files(folder)
    loaded = Distinguisher.from_pretrained(folder)
    torch.testing.assert_close(
        loaded.score(QUESTIONS, [Answer(text, True) for text in ANSWERS]),
        text_logits(trainer, QUESTIONS, ANSWERS),
        atol=1e-5,
        rtol=0,
    )


def test_adapters_name_the_commit_of_their_base_where_it_is_known(tmp_path, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
    model.config._commit_hash = "0123456789abcdef0123456789abcdef01234567"
    trainer = make(tmp_path, model)
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    for name in ("adapter_config.json", "distinguisher/adapter_config.json"):
        assert json.loads((folder / name).read_text())["revision"] == model.config._commit_hash, name
    assert json.loads((folder / "imitation.json").read_text())["base_revision"] == model.config._commit_hash
    Imitator.from_pretrained(folder)


def test_the_best_checkpoint_is_the_one_with_the_fewest_bits(tmp_path, tiny_model_dir):
    trainer = run(
        tmp_path,
        tiny_model_dir,
        arguments={"eval_dataset": rows(8)},
        imitator_warmup_steps=3,
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    bits = logged(trainer, "eval_retrodiction/bits_per_answer")
    assert trainer.state.best_metric == min(bits)
    assert trainer.state.best_global_step == 1 + bits.index(min(bits))


def run_to_a_best_of_two(folder, model, full=False, **changes):
    """Three steps of the game at a rate that destroys the imitator: the first is the best."""
    return run(
        folder,
        model,
        full=full,
        arguments={"eval_dataset": rows(8)},
        max_steps=3,
        learning_rate=0.3,
        imitator_warmup_steps=2,
        distinguisher_learning_rate=1e-2,
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        **changes,
    )


@pytest.mark.parametrize("full", [False, True])
def test_with_the_best_imitator_comes_its_own_distinguisher_and_the_card_of_both(tmp_path, tiny_model_dir, full):
    trainer = run_to_a_best_of_two(tmp_path, tiny_model_dir, full)
    best = trainer.state.best_global_step
    assert best < trainer.state.global_step
    stored, last = (
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "adversarial_state_0.safetensors")
        for step in (best, trainer.state.global_step)
    )
    weights = distinguisher_weights(trainer)
    assert same(weights, {name: stored[f"parameter.{name}"] for name in weights})
    assert not same(weights, {name: last[f"parameter.{name}"] for name in weights})
    for name in ("eval_retrodiction/bits_per_answer", "eval_distinguisher/accuracy_fresh"):
        (expected,) = [e[name] for e in trainer.state.log_history if name in e and e["step"] == best]
        assert trainer.card_facts().metrics[name].value == expected


def test_a_best_checkpoint_without_a_state_file_leaves_the_distinguisher_and_says_so(tmp_path, tiny_model_dir, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = run_to_a_best_of_two(tmp_path, tiny_model_dir, save_only_model=True)
    best = trainer.state.best_model_checkpoint
    assert any(f"{best} holds no adversarial_state" in record.getMessage() for record in caplog.records)


def test_the_best_of_several_evaluation_sets_has_to_be_named(tmp_path, tiny_model_dir):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    arguments = {"eval_dataset": {"short": rows(8), "long": rows(8)}}
    with pytest.raises(ValueError, match=r"'eval_short_retrodiction/bits_per_answer', 'eval_long_retrodiction/bits_"):
        make(tmp_path, tiny_model_dir, arguments=arguments, eval_steps=1, **best)
    run(
        tmp_path,
        tiny_model_dir,
        arguments=arguments,
        eval_steps=1,
        metric_for_best_model="eval_long_retrodiction/bits_per_answer",
        **best,
    )


# --- pushes


PUSHING = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from huggingface_hub import HfApi
import torch
torch.set_num_threads(1)
from tiny_runs import make, train

api = HfApi()
common = dict(push_to_hub=True, imitator_warmup_steps=1, log_completions=True, save_strategy="steps", save_steps=1)
each = dict(
    end=dict(hub_strategy="end"),
    every_save=dict(hub_strategy="every_save", hub_always_push=True, save_total_limit=1),
)
for name, changes in each.items():
    trainer = make(Path({folder!r}) / name, Path({model!r}), hub_model_id="me/" + name, **common, **changes)
    train(trainer)
    if name == "end":
        trainer.push_to_hub(commit_message="Done")
    files = sorted(api.list_repo_files("me/" + name))
    titles = [commit.title for commit in api.list_repo_commits("me/" + name)]
    print("FOUND", json.dumps([name, files, titles, api.model_info("me/" + name).private]))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, tiny_model_dir):
    """Two runs push to a Hub on this machine, one at its end and one with every save: files, commits, privacy."""
    folder = tmp_path_factory.mktemp("pushed")
    with hub_server() as url:
        done = subprocess.run(
            [sys.executable, "-c", PUSHING.format(tests=str(TESTS), folder=str(folder), model=str(tiny_model_dir))],
            env=hub_environment(url, folder / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return {name: found for name, *found in map(json.loads, lines)}


def test_a_push_is_private_one_commit_and_holds_the_imitator_alone(pushed):
    found, commits, is_private = pushed["end"]
    assert set(found) == {*COMMON, *ADAPTER, *DISTINGUISHER, ".gitattributes"}
    assert commits == ["Done", "initial commit"]
    assert is_private


def test_every_save_is_pushed_whole_while_training(pushed):
    found, commits, is_private = pushed["every_save"]
    assert set(found) == {*COMMON, *ADAPTER, *DISTINGUISHER, ".gitattributes"}
    assert commits == [*(f"Training in progress, step {step}" for step in (3, 2, 1)), "initial commit"]
    assert is_private


def test_a_push_that_fails_does_not_end_the_run(tmp_path, tiny_model_dir, caplog):
    trainer = run(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=1)
    # As after `init_hf_repo`; the environment of these tests has no network.
    trainer.hub_model_id, trainer.push_in_progress = "me/me-imitator", None
    with caplog.at_level(logging.WARNING):
        trainer._push_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
        trainer._finish_current_push()
    assert trainer.push_in_progress.is_done()
    assert any("A push in the background failed" in record.getMessage() for record in caplog.records)


def test_two_adapters_of_one_config_do_not_share_their_weights(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, arguments={"peft_config": lora()})
    own = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert not own & {id(p) for p in trainer.game.learner.parameters}
