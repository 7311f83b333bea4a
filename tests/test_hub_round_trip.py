"""Trained, pushed, deleted, loaded: over the client's own HTTP, in processes that share nothing but a loopback Hub."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter

import exact_runs
import latent_worlds
import pytest
import torch
from hub_server import hub_environment, hub_server
from launch import TESTS
from scipy.stats import chi2_contingency
from transformers import pipeline

from hf_imitate import Imitator, RetrodictiveTrainer

pytestmark = pytest.mark.timeout(1200)  # three processes, on a machine that may be busy

TRAINERS = ("adversarial", "ensemble", "retrodictive", "latent")
NAMES = [f"me/{trainer}-{kind}" for trainer in TRAINERS for kind in ("adapter", "full")]
CARD = {"README.md", "imitation.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
OF_TWO = {"checks.json", "0/checks.json", *(f"0/{name}" for name in ADAPTER), "1/checks.json", "1/ngram.safetensors"}
BESIDE = {"adversarial": {"checks.json", *ADAPTER}, "ensemble": OF_TWO, "retrodictive": set(), "latent": ADAPTER}


@pytest.fixture(scope="module")
def trips(tmp_path_factory, tiny_model_dir):
    """What three processes saw: one that trains and pushes, and two with empty caches that load and go on."""
    folder = tmp_path_factory.mktemp("trips")
    bases = {"me/base": str(tiny_model_dir), "me/words": str(latent_worlds.save_world(folder / "words"))}
    calls = {
        "pushed": f"train_and_push({str(folder)!r}, {bases!r})",
        "loaded": f"load_back({str(folder)!r})",
        "gone_on": f"go_on({str(folder)!r})",
    }
    seen = {}
    with hub_server() as url:
        for name, call in calls.items():
            environment = hub_environment(url, folder / f"home of {name}")
            environment |= {"ACCELERATE_USE_CPU": "true", "TRANSFORMERS_VERBOSITY": "error"}
            environment["PYTHONPATH"] += os.pathsep + str(TESTS)
            program = f"import json, hub_worlds\nprint('SEEN', json.dumps(hub_worlds.{call}))"
            done = subprocess.run(
                [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False,
                stdin=subprocess.DEVNULL, cwd=folder,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
            seen[name] = json.loads(line.removeprefix("SEEN "))
    seen["notes"] = json.loads((folder / "notes.json").read_text())
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_a_push_is_one_private_commit_that_holds_all_of_it_and_no_more(trips, name):
    note, trainer = trips["notes"][name], re.match(r"me/(\w+)-", name)[1]
    beside = "retrodictor" if trainer == "latent" else "distinguisher"
    own = ADAPTER if name.endswith("adapter") else {"config.json", "model.safetensors"}
    assert set(note["files"]) == {".gitattributes", *CARD, *own, *(f"{beside}/{file}" for file in BESIDE[trainer])}
    assert note["private"]
    assert note["titles"] == ["Two steps", "initial commit"]


@pytest.mark.parametrize("name", NAMES)
def test_pushing_what_did_not_change_makes_no_commit(trips, name):
    assert len(set(trips["notes"][name]["oids"])) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_load_it_gives_the_very_logits_that_were_trained(trips, name):
    gaps = trips["loaded"][name]["gaps"]
    assert set(gaps) >= {"AutoModelForCausalLM", "pipeline", "Imitator"}
    assert ("AutoPeftModelForCausalLM" in gaps) is name.endswith("adapter")
    assert set(gaps.values()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_log_probs_are_those_of_the_seed_before_and_after(trips, name):
    assert trips["loaded"][name]["same"] == {"answers": True, "nats": True, "verified": True}
    assert trips["notes"][name]["verified"]


@pytest.mark.parametrize("name", NAMES[:4])
def test_the_distinguisher_gives_the_very_logits_and_its_text_part_nearly_by_plain_peft(trips, name):
    gaps = trips["loaded"][name]["human"]
    assert gaps["own"] == 0.0
    assert gaps["plain"] < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_all_code_in_the_pushed_card_runs_as_printed(trips, name):
    """Each block was run by the process that loaded it; the distinguisher's is one more, a thinker's two fewer."""
    assert trips["loaded"][name]["blocks"] == (4 if name in NAMES[:4] else 2 if "latent" in name else 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_named_by_its_id_and_its_very_commit(trips, name):
    note, base = trips["notes"][name], "me/words" if "latent" in name else "me/base"
    commit = trips["notes"][base]
    assert (note["facts"]["base_model"], note["facts"]["base_revision"]) == (base, commit)
    if name.endswith("adapter"):
        assert (note["base"]["base_model_name_or_path"], note["base"]["revision"]) == (base, commit)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_was_killed_is_resumed_from_the_hub_to_the_last_bit(trips, trainer):
    """By who has no other token than `hub_token`."""
    assert trips["gone_on"][f"{trainer} resumed"] == 0.0
    assert "holds no checkpoint to go on from" in trips["gone_on"][f"{trainer} not resumed"]
    assert "last-checkpoint/optimizer.pt" in trips["notes"][f"{trainer}-killed"]


def test_a_checkpoint_of_the_hub_knows_its_files_and_of_several_one_is_downloaded(trips):
    """Without a list of its own, a flipped bit of it was not found; and all of them were downloaded to take one up."""
    seen = trips["gone_on"]["checkpoints"]
    assert seen["lacking"] == []
    assert set(seen["unlisted"]) == {"README.md", "_complete.json", "imitation.json"}
    assert "optimizer.pt is not what was saved" in seen["flipped"]
    assert (seen["newest"], seen["older"]) == ("checkpoint-10", ["trainer_state.json"])


def test_a_token_that_is_given_opens_private_repos_and_their_private_bases(trips):
    """To train on, to use, to judge by; second models that lie on a base of their own, too."""
    kinds = [
        "PeftModel",
        "Imitator",
        "DistinguisherEnsemble",
        "Distinguisher",
        "LatentImitator",
        "DistinguisherEnsemble",
    ]
    seen = trips["gone_on"]["with a token of its own"]
    assert list(seen.values()) == [["RepositoryNotFoundError", kind] for kind in kinds], seen


def test_a_pushed_imitator_is_audited_by_its_id(trips):
    model, bits = trips["gone_on"]["audit"]
    assert model == "me/adversarial-adapter"
    assert bits > 0


def test_a_pushed_distinguisher_rewards_in_trls_own_trainer(trips):
    (reward,) = trips["gone_on"]["reward"]
    assert reward != 0.0


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_second_stage_goes_on_from_what_the_first_one_pushed(trips, kind):
    """Adversarial after retrodictive: the adapter itself, or a new one on the first stage's weights."""
    stage = trips["gone_on"][f"second {kind}"]
    assert stage["base"] == ("me/base" if kind == "adapter" else "me/retrodictive-full")
    assert stage["gap"] == 0.0
    assert stage["moved"] > 1e-6


# --- the law that a plain pipeline gives


@pytest.fixture(params=["adapter", "full"])
def published(request, tmp_path):
    """A folder with a trained imitator whose answers are a handful of words."""
    world = latent_worlds.save_world(tmp_path / "words")
    args = exact_runs.settings(tmp_path, learning_rate=0.05, max_steps=4)
    lora = {"peft_config": latent_worlds.lora()} if request.param == "adapter" else {}
    trainer = RetrodictiveTrainer(str(world), args=args, train_dataset=latent_worlds.rows(), **lora)
    latent_worlds.train(trainer)
    trainer.save_model()
    return tmp_path / "run", request.param


def test_a_pipeline_with_the_cards_arguments_answers_as_often_as_the_imitator(published):
    """And without them it need not: an adapter's pipeline falls back on a law of its own."""
    folder, kind = published
    number, question = 4000, "a b"
    law = ast.literal_eval(re.search(r"^law = (.*)$", (folder / "README.md").read_text(), re.MULTILINE)[1])
    drawn = Imitator.from_pretrained(folder, device="cpu").answer([question], num_answers=number, seed=0)[0]
    plain = pipeline("text-generation", model=str(folder), device="cpu")

    def p_value(**arguments) -> float:
        torch.manual_seed(0)
        outputs = plain(question, return_full_text=False, num_return_sequences=number, **arguments)
        texts = [one["generated_text"] for one in outputs]
        ours, theirs = (Counter(" ".join(text.split()[:1]) for text in side) for side in (drawn, texts))
        seen = sorted(word for word in ours | theirs if ours[word] + theirs[word] >= 20)
        return chi2_contingency([[side[word] for word in seen] for side in (ours, theirs)]).pvalue

    assert p_value(**law) > 1e-3
    assert p_value(**{**law, "temperature": 0.7}) < 1e-6
    by_default = p_value(max_new_tokens=law["max_new_tokens"])
    assert (by_default > 1e-3) if kind == "full" else (by_default < 1e-6)
