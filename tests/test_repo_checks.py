"""A repo of anybody's is refused by a named error before anything of it runs, and nobody is asked anything."""

import builtins
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_imitate import Distinguisher, Imitator
from hf_imitate.hub_cards.card_file import read_facts
from hf_imitate.repo_checks import MAX_JSON_BYTES, UnsafeRepoError, check_repo, read_object


class Ran:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def adapter_repo(tiny_model_dir, tmp_path_factory) -> Path:
    """An honest repo: an adapter and its distinguisher on the tiny base."""
    folder = tmp_path_factory.mktemp("honest") / "repo"
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
        model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    facts = {"version": 1, "objective": "retrodictive", "max_answer_tokens": 8}
    (folder / "imitation.json").write_text(json.dumps(facts))
    checks = {"version": 1, "checks": {"is_short": 0.5}, "max_answer_tokens": 8}
    (folder / "distinguisher").mkdir()
    (folder / "distinguisher" / "checks.json").write_text(json.dumps(checks))
    return folder


@pytest.fixture
def repo(adapter_repo, tmp_path) -> Path:
    return shutil.copytree(adapter_repo, tmp_path / "repo")


@pytest.fixture
def full_repo(tiny_model_dir, tmp_path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "full")


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """A prompt on stdin fails the test."""

    def asked(*args):
        raise AssertionError("Somebody was asked something.")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(sys, "stdin", None)


def change(folder: Path, name: str, **fields) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **fields}))


def test_an_honest_repo_passes(repo, full_repo):
    check_repo(repo)
    check_repo(full_repo)
    assert Imitator.from_pretrained(repo, device="cpu").max_new_tokens == 8


HOSTILE = [
    ("imitation.json", {"max_answer_tokens": 10**18}, "`max_answer_tokens` is no number of tokens"),
    ("imitation.json", {"max_answer_tokens": "9" * 100_000}, "`max_answer_tokens` is a str"),
    ("imitation.json", {"max_answer_tokens": True}, "`max_answer_tokens` is a bool"),
    ("imitation.json", {"completion_role": 7}, "`completion_role` is a int"),
    ("imitation.json", {"chat_template_kwargs": [1]}, "`chat_template_kwargs` is a list"),
    ("imitation.json", {"objective": "latent", "max_answer_tokens": None}, "needs `max_answer_tokens`"),
    ("imitation.json", {"objective": "latent"}, "needs `thoughts`"),
    ("imitation.json", {"thoughts": {"max_thought_length": 10**12}}, "max_thought_length"),
    ("generation_config.json", {"max_new_tokens": 10**18}, "`max_new_tokens` is no number of tokens"),
    ("distinguisher/checks.json", {"checks": {"x": 1e300}}, "larger than any that training"),
    ("distinguisher/checks.json", {"checks": {"x": "1"}}, "a weight in `checks` is a str"),
    ("distinguisher/checks.json", {"checks": ["x"]}, "`checks` is a list"),
    ("distinguisher/checks.json", {"kind": "../x"}, "`kind` is none"),
    ("distinguisher/checks.json", {"kind": "ensemble", "num_members": "2"}, "`num_members` is a str"),
    ("distinguisher/checks.json", {"kind": "ensemble", "num_members": 10**9}, "`num_members` is no whole number"),
    ("distinguisher/0/checks.json", {"checks": {"x": 1e300}}, "larger than any that training"),
    ("adapter_config.json", {"r": 10**9}, "the rank is no whole number"),
    ("adapter_config.json", {"rank_pattern": {"q_proj": 10**9}}, "the rank is no whole number"),
    ("adapter_config.json", {"lora_alpha": 1e300}, "`lora_alpha` is larger"),
    ("adapter_config.json", {"base_model_name_or_path": "../../private/model"}, "leads out of its folder"),
    ("adapter_config.json", {"base_model_name_or_path": ["x"]}, "`base_model_name_or_path` is a list"),
    ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}, "`tokenizer_file` is no file of this folder"),
    ("model.safetensors.index.json", {"weight_map": {"w": "../../other.safetensors"}}, "outside this folder"),
    ("config.json", {"attn_implementation": "evil/kernel"}, "names a repo with code"),
    ("config.json", {"text_config": {"_attn_implementation": "evil/kernel:f"}}, "names a repo with code"),
    ("config.json", {"attn_implementation": {"": "evil/kernel"}}, "names a repo with code"),
    ("config.json", {"transformers_weights": "../x.safetensors"}, "`transformers_weights` is no file"),
    ("config.json", {"num_hidden_layers": 10**9}, "`num_hidden_layers` is larger"),
]


@pytest.mark.parametrize(("name", "fields", "said"), HOSTILE, ids=[f"{row[0]} {min(row[1])}" for row in HOSTILE])
def test_a_field_that_could_harm_is_named_and_its_words_are_not_repeated(repo, name, fields, said):
    change(repo, name, **fields)
    with pytest.raises(UnsafeRepoError, match=said) as error:
        Imitator.from_pretrained(repo, device="cpu")
    assert name in str(error.value)
    assert not [word for word in ("/etc/passwd", "evil", "private", "9" * 50) if word in str(error.value)]
    assert len(str(error.value)) < 300


def test_members_at_the_root_of_a_distinguishers_own_folder_are_read_too(tmp_path):
    change(tmp_path, "checks.json", kind="ensemble", num_members=2)
    change(tmp_path / "0", "adapter_config.json", base_model_name_or_path="../../../private")
    with pytest.raises(UnsafeRepoError, match=r"0/adapter_config.json: .* leads out of its folder"):
        check_repo(tmp_path)


def test_a_config_of_more_than_the_weights_beside_it_is_refused_before_they_are_made_up(full_repo):
    change(full_repo, "config.json", vocab_size=2**30)
    with pytest.raises(UnsafeRepoError, match="more than the weights beside it hold"):
        Imitator.from_pretrained(full_repo, device="cpu")


def test_a_kernel_in_the_base_of_an_adapter_is_refused_too(repo, full_repo):
    change(full_repo, "config.json", attn_implementation="evil/kernel")
    change(repo, "adapter_config.json", base_model_name_or_path=str(full_repo))
    with pytest.raises(UnsafeRepoError, match="names a repo with code"):
        Imitator.from_pretrained(repo, device="cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": NaN}', "[" * 100_000, "\xff"])
def test_what_is_no_json_object_is_refused(repo, text):
    (repo / "imitation.json").write_bytes(text.encode("latin-1"))
    for load in (lambda: Imitator.from_pretrained(repo, device="cpu"), lambda: read_facts(repo)):
        with pytest.raises(ValueError, match=r"imitation\.json"):
            load()


def test_a_file_of_any_size_is_not_read(repo):
    with (repo / "imitation.json").open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(UnsafeRepoError, match="has more than"):
        check_repo(repo)
    assert read_object(repo / "distinguisher" / "checks.json")["version"] == 1


@pytest.mark.parametrize("where", ["tokenizer.json", "distinguisher/adapter_model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_not_followed(repo, tmp_path, where):
    (tmp_path / "secret").write_text("secret")
    (repo / where).symlink_to(tmp_path / "secret")
    for load in (Imitator, Distinguisher):
        with pytest.raises(UnsafeRepoError, match="leads out of the folder"):
            load.from_pretrained(repo)


def test_the_links_of_the_hubs_own_cache_are_followed(repo, tmp_path):
    blobs, snapshot = tmp_path / "models--me--x" / "blobs", tmp_path / "models--me--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(repo / name, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    check_repo(snapshot)
    (snapshot / "notes.json").symlink_to(repo / "imitation.json")
    with pytest.raises(UnsafeRepoError, match="leads out of the folder"):
        check_repo(snapshot)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_a_pickle_is_never_loaded(repo, full_repo, tmp_path, name):
    folder = repo if name.startswith("adapter") else full_repo
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Ran(tmp_path / "ran")))
    with pytest.raises((FileNotFoundError, OSError), match="safetensors"):
        Imitator.from_pretrained(folder, device="cpu")
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / name).read_bytes())  # noqa: S301 - to see that it would have run
    assert (tmp_path / "ran").exists()


def test_code_of_a_known_kind_of_model_is_not_run_either(full_repo, tmp_path):
    change(full_repo, "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    change(full_repo, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    (full_repo / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    Imitator.from_pretrained(full_repo, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_an_adapter_of_the_wrong_shape_or_with_weights_missing_is_refused(repo):
    file = repo / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    save_file({**weights, name: torch.zeros(3, 3)}, file)
    with pytest.raises(ValueError, match="does not fit its base"):
        Imitator.from_pretrained(repo, device="cpu")
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says it by a warning, and goes on
        with pytest.raises(ValueError, match="lacks 1 weights"):
            Imitator.from_pretrained(repo, device="cpu")
    save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, file)
    with pytest.raises(ValueError, match="not finite"):
        Imitator.from_pretrained(repo, device="cpu")
    change(repo, "adapter_config.json", peft_type="NO_SUCH_KIND")
    save_file(weights, file)
    with pytest.raises((ValueError, KeyError), match=r"NO_SUCH_KIND|does not fit"):
        Imitator.from_pretrained(repo, device="cpu")
