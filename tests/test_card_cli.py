"""`hf-imitate card`: a card from a folder's own files, and weights that need no PEFT."""

import ast
import json
import re
import shutil

import pytest
import tiny_runs
import torch
from datasets import Dataset
from exact_runs import run
from transformers import AutoModelForCausalLM

from hf_imitate import Imitator, cli
from hf_imitate.card_cli import merge
from hf_imitate.hub_cards.push import check_bases, published_files


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model_dir):
    """An adapter's folder. Read-only."""
    folder = tmp_path_factory.mktemp("adapter")
    run(folder, tiny_model_dir, adapter=True, max_steps=2).save_model()
    return folder / "run"


@pytest.fixture
def folder(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "me-imitator")


def test_the_card_is_rendered_again_and_what_is_said_once_is_kept(folder, capsys):
    before = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    assert cli.main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_text() == before
    said = ["--license", "mit", "--answered_by", "a chess club", "--repo_id", "me/x", "--dataset_name", "me/answers"]
    assert cli.main(["card", str(folder), *said]) == 0
    assert cli.main(["card", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    for expected in ("license: mit", "- me/answers", "**Whose answers:** a chess club", 'model="me/x"'):
        assert expected in card
    assert "Wrote" in capsys.readouterr().out


def test_samples_are_answers_to_the_questions_that_were_asked_and_the_default_is_none(folder):
    assert cli.main(["card", str(folder), "--question", "Item 3:", "Is `this` *so*?"]) == 0
    card = (folder / "README.md").read_text()
    answers = Imitator.from_pretrained(folder).answer(["Item 3:", "Is `this` *so*?"], seed=0)
    stored = json.loads((folder / "imitation.json").read_text())["card"]["samples"]
    assert stored == [["Item 3:", answers[0][0]], ["Is `this` *so*?", answers[1][0]]]
    assert "```text\nIs `this` *so*?\n```" in card
    assert "None: samples are shown only" not in card


def test_who_speaks_in_the_users_turn_is_asked_in_the_assistants(tiny_chat_model_dir, tmp_path):
    """The card asked as the user, and showed code that opens the assistant's turn: a law that was never trained."""
    rows = [
        {"prompt": [{"role": "assistant", "content": f"Item {i}"}], "completion": [{"role": "user", "content": "abc"}]}
        for i in range(8)
    ]
    run(tmp_path, tiny_chat_model_dir, Dataset.from_list(rows)).save_model()
    folder = tmp_path / "run"
    for command in ([], ["--question", "Hello?"]):
        if command:
            assert cli.main(["card", str(folder), *command]) == 0
        card = (folder / "README.md").read_text()
        assert '[{"role": "assistant", "content": "What are you working on?"}]' in card
        assert "pipeline(" not in card
        assert "add_generation_prompt" not in card
    answers = Imitator.from_pretrained(folder).answer([[{"role": "assistant", "content": "Hello?"}]], seed=0)
    assert json.loads((folder / "imitation.json").read_text())["card"]["samples"] == [["Hello?", answers[0][0]]]


def test_merged_weights_answer_as_the_adapter_does_without_peft(folder, tmp_path, capsys):
    (folder / "audit" / "cache").mkdir(parents=True)
    (folder / "audit" / "cache" / "answers.json").write_text("private")
    (folder / "audit" / "scores.parquet").write_text("private")
    assert cli.main(["card", str(folder), "--merge", str(tmp_path / "plain")]) == 0
    plain = tmp_path / "plain"
    names = {path.name for path in plain.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert not {"adapter_config.json", "adapter_model.safetensors", "scores.parquet", "answers.json"} & names
    both = [Imitator.from_pretrained(place, device="cpu") for place in (folder, plain)]
    questions, answers = ["Item 3:", "Item 4:"], ["abc", "de"]
    ours, theirs = (imitator.log_prob(questions, answers).nats for imitator in both)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert both[0].max_new_tokens == both[1].max_new_tokens
    base = AutoModelForCausalLM.from_pretrained(both[0].model.config._name_or_path)
    ids = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        assert (both[1].model(ids).logits - base(ids).logits).abs().max() > 1e-3
    card = (plain / "README.md").read_text()
    (said,) = re.findall(r"differ by up to ([\d.e+-]+) from those of the adapter", " ".join(card.split()))
    assert float(said) < 1e-4
    assert "library_name: transformers" in card
    assert "| Weights | complete |" in card
    (repo,) = set(re.findall(r'from_pretrained\(("[^"]*")\)', card))
    assert ast.literal_eval(repo) == "plain"
    assert "by at most" in capsys.readouterr().out


def test_nothing_is_overwritten_and_nothing_plain_is_merged(folder, tmp_path, capsys):
    assert cli.main(["card", str(folder), "--merge", str(folder)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    merge(folder, tmp_path / "plain")
    assert cli.main(["card", str(tmp_path / "plain"), "--merge", str(tmp_path / "again")]) == 2
    assert "plain weights already" in capsys.readouterr().err
    assert cli.main(["card", str(tmp_path / "nowhere")]) == 2
    assert "imitation.json" in capsys.readouterr().err


def test_a_second_model_on_a_local_base_is_left_out_of_merged_weights_which_can_then_be_public(
    tmp_path, tiny_model_dir, capsys
):
    trainer = tiny_runs.run(tmp_path, tiny_model_dir, max_steps=1, distinguisher_learning_rate=1e-2)
    trainer.save_model()
    source, plain = tmp_path / "run", tmp_path / "plain"
    assert cli.main(["card", str(source), "--merge", str(plain)]) == 0
    assert "Left out distinguisher/: it is an adapter on a local folder" in capsys.readouterr().out
    card = " ".join((plain / "README.md").read_text().split())
    assert "This repository holds no distinguisher." in card
    assert "Its distinguisher was left out" in card
    check_bases(plain, published_files(plain), private=False)
    Imitator.from_pretrained(plain, device="cpu").answer(["Item 3:"], seed=0)


def test_a_retrodictor_that_was_left_out_is_not_looked_for(folder, tmp_path):
    (folder / "retrodictor").mkdir()
    config = (folder / "adapter_config.json").read_text()
    (folder / "retrodictor" / "adapter_config.json").write_text(config)
    merge(folder, tmp_path / "plain")
    assert not (tmp_path / "plain" / "retrodictor").exists()
    assert json.loads((tmp_path / "plain" / "imitation.json").read_text())["has_retrodictor"] is False


def test_of_an_audit_of_earlier_weights_and_of_its_cache_nothing_is_merged(folder, tmp_path):
    (folder / "audit" / "cache").mkdir(parents=True)
    for name in ("audit/plan.json", "audit/cache/answers.json", "audit/scores.parquet"):
        (folder / name).write_text("{}")
    merge(folder, tmp_path / "fresh")
    assert [path.name for path in (tmp_path / "fresh" / "audit").iterdir()] == ["plan.json"]
    stored = json.loads((folder / "imitation.json").read_text())
    stored["card"]["stale_audits"] = ["old"]
    (folder / "imitation.json").write_text(json.dumps(stored))
    (folder / "audit" / "audit.json").write_text('{"plan_hash": "old"}')
    merge(folder, tmp_path / "stale")
    assert not (tmp_path / "stale" / "audit").exists()
