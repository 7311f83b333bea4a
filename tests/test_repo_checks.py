"""A repo of anybody's is refused by a named error before anything of it runs, and nobody is asked anything."""

import builtins
import json
import os
import pickle
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_imitate import Distinguisher, Imitator
from hf_imitate.causal_lm import commit_of, hub_checkpoint, named_base
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


HANGS = r"((\w+\.?)+)+!"
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
    ("config.json", {"num_local_experts": 10**9}, "`num_local_experts` is larger"),
    ("config.json", {"num_labels": 10**9}, "`num_labels` is larger"),
    ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "leads to another file"),
    ("adapter_config.json", {"target_modules": HANGS}, "`target_modules` is neither"),
    ("adapter_config.json", {"exclude_modules": HANGS}, "`exclude_modules` is neither"),
    ("adapter_config.json", {"layers_pattern": HANGS}, "`layers_pattern` is neither"),
    ("adapter_config.json", {"modules_to_save": [HANGS]}, "`modules_to_save` is neither"),
    ("adapter_config.json", {"rank_pattern": {HANGS: 4}}, "`rank_pattern` is neither"),
    ("adapter_config.json", {"alpha_pattern": {HANGS: 4}}, "`alpha_pattern` is neither"),
    ("adapter_config.json", {"alpha_pattern": {str(i): 4 for i in range(5000)}}, "more modules than any model"),
    ("adapter_config.json", {"layer_replication": [[0, 2]] * 65}, "`layer_replication` is no list"),
    ("adapter_config.json", {"layer_replication": [[0, 10**9]]}, "`layer_replication` is no list"),
    ("adapter_config.json", {"layer_replication": [[0, 4000], [0, 4000]]}, "`layer_replication` is no list"),
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


@pytest.mark.parametrize(
    "pattern",
    [
        HANGS,
        r"(a|a)*!",
        r"(?:\w|[\w])+!",
        r".*.*.*.*.*.*!",
        r"\w?" * 30 + "!",
        r"(\w|\w)" * 30 + "!",
        r"[^]+)]*(\w+)+!",
        "(" * 400 + "a" + ")" * 400 + "+",
        "a" * 1001 + "*",
        "(",
        "a{1,9}",
    ],
)
def test_a_regular_expression_that_may_not_end_is_refused(repo, pattern):
    change(repo, "adapter_config.json", target_modules=pattern)
    with pytest.raises(UnsafeRepoError, match="`target_modules`"):
        check_repo(repo)


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        r".*\.(q_proj|v_proj)",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj)$",
        r"model\.layers\.[\d]+\.mlp\.(up|down)_proj",
    ],
)
def test_a_regular_expression_as_they_are_written_passes_and_soon_ends(repo, pattern):
    change(repo, "adapter_config.json", target_modules=pattern, rank_pattern={r"layers.0.mlp": 2})
    check_repo(repo)
    name = "model.layers.31." + "x.q.decoder_proj." * 3 + "!"
    started = time.process_time()
    re.fullmatch(pattern, name)
    assert time.process_time() - started < 0.5


@pytest.fixture
def with_base(repo, tiny_model_dir):
    """A function that puts the adapter, and a distinguisher's beside it, on another base."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, repo / "distinguisher")
    change(repo / "distinguisher", "checks.json", chat_template_kwargs={}, end_token_ids=[0])

    def put(base: str | Path) -> Path:
        for part in (repo, repo / "distinguisher"):
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                if part != repo:
                    shutil.copy(repo / file, part / file)
            change(part, "adapter_config.json", base_model_name_or_path=str(base))
        return repo

    return put


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A function that puts a folder into an empty Hub cache, under a name; no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(folder: Path, name: str, commit: str = "c" * 40) -> Path:
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        return repo / "snapshots" / commit

    return put


LOADS = [lambda repo: Imitator.from_pretrained(repo, device="cpu"), lambda repo: Distinguisher.from_pretrained(repo)]


@pytest.mark.parametrize("load", LOADS, ids=["imitator", "distinguisher"])
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_base_that_leads_on_to_another_base_is_refused(with_base, full_repo, hub_cache, tmp_path, load, place):
    deep = shutil.copytree(full_repo, tmp_path / "deep")
    change(deep, "config.json", attn_implementation="evil/kernel")
    change(full_repo, "adapter_config.json", base_model_name_or_path=str(deep), peft_type="LORA")
    base = str(full_repo)
    if place == "hub":
        hub_cache(full_repo, "me/base")
        base = "me/base"
    with pytest.raises(UnsafeRepoError, match="would lead on to another base"):
        load(with_base(base))


@pytest.mark.parametrize("load", LOADS, ids=["imitator", "distinguisher"])
def test_the_small_files_of_a_base_are_read_as_those_of_a_repo(with_base, full_repo, load):
    change(full_repo, "tokenizer_config.json", tokenizer_file="/etc/hostname")
    with pytest.raises(UnsafeRepoError, match="`tokenizer_file` is no file of this folder"):
        load(with_base(full_repo))


def test_a_base_of_the_hub_keeps_its_name_and_is_loaded_at_the_commit_that_was_read(
    with_base, full_repo, hub_cache, monkeypatch
):
    hub_cache(full_repo, "me/base")
    asked = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kw: (asked.append(kw), load(**kw))[1])
    imitator = Imitator.from_pretrained(with_base("me/base"), device="cpu")
    assert [(kw["pretrained_model_name_or_path"], kw["revision"]) for kw in asked] == [("me/base", "c" * 40)]
    assert imitator.model.get_base_model().config._name_or_path == "me/base"
    adapter = imitator.model.peft_config["default"]
    assert (adapter.base_model_name_or_path, adapter.revision) == ("me/base", None)
    assert commit_of("me/base") == "c" * 40


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1]", '{"base_model_name_or_path": 5}', "{}"])
def test_an_adapter_config_that_names_no_base_names_none(tmp_path, text):
    assert named_base(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    assert named_base(tmp_path) is None


def test_a_checkpoint_of_the_hub_is_read_before_a_run_goes_on_from_it(repo, hub_cache, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x"):
        shutil.copytree(repo, run / name)
    change(run / "checkpoint-10", "adapter_config.json", target_modules=HANGS)
    hub_cache(repo, "me/none")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        hub_checkpoint("me/none")
    snapshot = hub_cache(run, "me/run")
    with pytest.raises(UnsafeRepoError, match="`target_modules` is neither"):
        hub_checkpoint("me/run")
    shutil.rmtree(snapshot / "checkpoint-10")
    assert hub_checkpoint("me/run").name == "checkpoint-9"


@pytest.mark.parametrize("load", LOADS, ids=["imitator", "distinguisher"])
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_base_of_pickles_alone_is_refused_by_name(with_base, full_repo, hub_cache, tmp_path, load, place):
    """transformers would have looked for a conversion of somebody's, at no commit and of no size that was checked."""
    (full_repo / "model.safetensors").unlink()
    (full_repo / "pytorch_model.bin").write_bytes(pickle.dumps(Ran(tmp_path / "ran")))
    base = str(full_repo)
    if place == "hub":
        hub_cache(full_repo, "me/base")
        base = "me/base"
    with pytest.raises(FileNotFoundError, match=r"holds no safetensors weights\. Pickles"):
        load(with_base(base))
    assert not (tmp_path / "ran").exists()


def test_full_weights_beside_an_adapters_config_do_not_lead_on(full_repo):
    change(full_repo, "adapter_config.json", base_model_name_or_path="me/deep", peft_type="LORA")
    with pytest.raises(UnsafeRepoError, match="would lead on to another base"):
        Imitator.from_pretrained(full_repo, device="cpu")


@pytest.mark.parametrize("size", [2**33, 2**40], ids=["a terabyte", "more than can be counted"])
@pytest.mark.parametrize("kind", ["full", "base", "classifier", "classifier's base"])
def test_weights_that_are_not_stored_are_not_made_up(with_base, full_repo, kind, size):
    weights = load_file(full_repo / "model.safetensors")
    save_file({name: weights[name] for name in weights if ".mlp." not in name}, full_repo / "model.safetensors")
    fields = {"intermediate_size": size, "hidden_size": 2**14 if size > 2**33 else 2**7, "vocab_size": 8}
    change(full_repo, "config.json", **fields)
    change(full_repo, "checks.json", checks={}, max_answer_tokens=8, chat_template_kwargs={}, end_token_ids=[0])
    if "base" in kind:
        full_repo = with_base(full_repo)
    with pytest.raises(UnsafeRepoError, match=r"more weights than the files|no such model can be built"):
        LOADS["classifier" in kind](full_repo)


def test_what_is_nested_too_deeply_or_too_large_for_a_number_is_refused_by_name(full_repo):
    for deep in ("[" * 900 + "]" * 900, '{"a":' * 64 + "1" + "}" * 64, "[" * 64 + "]" * 64):
        (full_repo / "config.json").write_text('{"x": ' + deep + "}")
        with pytest.raises(UnsafeRepoError, match=r"config\.json is nested more than 64 deep"):
            check_repo(full_repo)
    (full_repo / "config.json").write_text('{"x": ' + "[" * 63 + "]" * 63 + "}")
    check_repo(full_repo)
    (full_repo / "config.json").write_text('{"rope_theta": 1e999}')
    with pytest.raises(UnsafeRepoError, match=r"config\.json is not valid JSON"):
        check_repo(full_repo)


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
    with pytest.raises(ValueError, match="`peft_type` or another field is not known"):
        Imitator.from_pretrained(repo, device="cpu")


@pytest.mark.parametrize("load", LOADS, ids=["imitator", "distinguisher"])
def test_weights_of_other_sizes_than_their_config_are_refused_by_name(with_base, full_repo, load):
    """It ended in transformers' "look at the above report", in a log that may not be shown."""
    change(full_repo, "config.json", intermediate_size=32)
    with pytest.raises(ValueError, match="are of other sizes than its `config"):
        load(with_base(full_repo))
