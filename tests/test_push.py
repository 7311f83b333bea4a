"""A push is private, one commit, and holds the imitator and nothing else: shown against a Hub that speaks HTTP."""

import json
import logging
import shutil
import subprocess
import sys
import textwrap
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hub_server import Hub, hub_environment, hub_server

from hf_imitate.hub_cards.facts import CardFacts
from hf_imitate.hub_cards.model_card import render_card
from hf_imitate.hub_cards.push import (
    IGNORED_FILES,
    MARKER,
    check_bases,
    checkpoint_files,
    published_files,
    push_folder,
)

PUBLISHED = {
    "README.md": "card",
    "config.json": "{}",
    "model.safetensors": "weights",
    "generation_config.json": "{}",
    "imitation.json": "{}",
    "distinguisher/adapter_model.safetensors": "weights",
    "distinguisher/checks.json": "{}",
    "audit/audit.json": "{}",
    "audit/judges.png": "figure",
    "reference_answers.txt": "kept: only `ref/` is left behind",
}
LEFT_BEHIND = [
    "training_args.bin",
    "distinguisher/training_args.bin",
    "pytorch_model.bin",
    "pytorch_model_fsdp_0/__0_0.distcp",
    "scaler.pt",
    "latest",
    "zero_to_fp32.py",
    "completions/completions_00001.parquet",
    "checkpoint-1/model.safetensors",
    "checkpoint-1/distinguisher/checks.json",
    "_private/notes.txt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "trainer_state.json",
    "adversarial_state.safetensors",
    "adversarial_state/replay.json",
    "audit/scores.parquet",
    "audit/cache/answers.parquet",
    "audit/by_person.parquet",
    "audit/cache/0123abcd/evidence.json",
    "audit_resampled/cache/0123abcd/answer-human.json",
    "Audit2/x/cache/0123abcd/answer-imitator.json",
    "cache/0123abcd/answer-human.json",
    "Audit2/x/scores-human-0000000.npz",
    "power_control.npz",
    "ref/adapter_model.safetensors",
    "runs/events.out.tfevents.1",
    "logs/log.txt",
    "pickled.pkl",
]


@pytest.fixture
def hub(tmp_path):
    """Run code in a process for which a fresh loopback server is the Hub; what it prints as JSON comes back."""

    def run(code: str) -> object:
        program = "import json, sys\nfrom huggingface_hub import HfApi\n"
        program += "from hf_imitate.hub_cards.push import push_folder\n" + textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=hub_environment(url, tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with hub_server() as url:
        yield run


@pytest.fixture
def output_dir(tmp_path) -> Path:
    folder = tmp_path / "me-imitator"
    for path, content in {**PUBLISHED, **dict.fromkeys(LEFT_BEHIND, "private")}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    render_card(CardFacts(model_name="me-imitator", objective="Adversarial imitation")).save(folder / "README.md")
    return folder


def test_what_may_be_published_arrives_privately_in_one_commit_and_nothing_else(hub, output_dir):
    seen = hub(f"""
        commit = push_folder({str(output_dir)!r}, "me/me-imitator", commit_message="My imitator")
        api = HfApi()
        titles = [commit.title for commit in api.list_repo_commits("me/me-imitator")]
        files = api.list_repo_files("me/me-imitator")
        private = api.model_info("me/me-imitator").private
        print(json.dumps([files, titles, private, commit.oid == api.model_info("me/me-imitator").sha]))
    """)
    files, titles, is_private, is_newest = seen
    assert sorted(files) == sorted([".gitattributes", *PUBLISHED])
    assert titles == ["My imitator", "initial commit"]
    assert is_private
    assert is_newest


def test_a_second_push_sends_only_what_changed(hub, output_dir):
    seen = hub(f"""
        from pathlib import Path
        folder, api = Path({str(output_dir)!r}), HfApi()
        first = push_folder(folder, "me/me-imitator")
        same = push_folder(folder, "me/me-imitator")
        (folder / "imitation.json").write_text('{{"version": 2}}')
        changed = push_folder(folder, "me/me-imitator", run_as_future=True).result()
        print(json.dumps([first.oid, same.oid, changed.oid, len(api.list_repo_commits("me/me-imitator"))]))
    """)
    first, same, changed, num_commits = seen
    assert first == same != changed
    assert num_commits == 3


def test_a_branch_is_created_and_main_stays_as_it_was(hub, output_dir):
    branch_files, main_files = hub(f"""
        push_folder({str(output_dir)!r}, "me/me-imitator", revision="step-100")
        push_folder({str(output_dir)!r}, "me/me-imitator", revision="step-100")
        api = HfApi()
        print(json.dumps([api.list_repo_files("me/me-imitator", revision=name) for name in ("step-100", "main")]))
    """)
    assert set(PUBLISHED) < set(branch_files)
    assert main_files == [".gitattributes"]


def test_private_answers_never_go_to_a_public_repository(hub, output_dir):
    message, before, after = hub(f"""
        api = HfApi()
        api.create_repo("me/public", private=False)
        try:
            push_folder({str(output_dir)!r}, "me/public")
        except ValueError as error:
            message = str(error)
        before = api.list_repo_files("me/public")
        push_folder({str(output_dir)!r}, "me/public", private=False)
        print(json.dumps([message, before, api.list_repo_files("me/public")]))
    """)
    assert "exists and is public" in message
    assert "private=False" in message
    assert before == [".gitattributes"]
    assert set(PUBLISHED) < set(after)


def test_a_model_pushed_is_the_model_loaded(hub, tiny_model_dir):
    is_private, largest_difference = hub(f"""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        push_folder({str(tiny_model_dir)!r}, "me/tiny")
        here, there = (AutoModelForCausalLM.from_pretrained(name) for name in ({str(tiny_model_dir)!r}, "me/tiny"))
        ids = AutoTokenizer.from_pretrained("me/tiny")("def f(x):", return_tensors="pt")["input_ids"]
        difference = (here(ids).logits - there(ids).logits).abs().max().item()
        print(json.dumps([HfApi().model_info("me/tiny").private, difference]))
    """)
    assert is_private
    assert largest_difference == 0.0


def test_a_stranger_sees_no_private_repository(hub, output_dir):
    names = hub(f"""
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
        from huggingface_hub import hf_hub_download
        push_folder({str(output_dir)!r}, "me/me-imitator")
        seen = []
        for call in (lambda: HfApi(token=False).model_info("me/me-imitator"),
                     lambda: hf_hub_download("me/me-imitator", "README.md", token=False),
                     lambda: push_folder({str(output_dir)!r}, "me/other", token="hf_wrong")):
            try:
                call()
            except HfHubHTTPError as error:
                seen.append([type(error).__name__, error.response.status_code])
        print(json.dumps(seen))
    """)
    assert names == [["RepositoryNotFoundError", 401], ["RepositoryNotFoundError", 401], ["HfHubHTTPError", 401]]


def test_a_card_that_the_hub_refuses_stops_the_push_before_any_file(hub, output_dir):
    (output_dir / "README.md").write_text("---\nbase_model: '/no/hub/id'\n---\n", encoding="utf-8")
    message, files = hub(f"""
        try:
            push_folder({str(output_dir)!r}, "me/me-imitator")
        except ValueError as error:
            message = str(error)
        print(json.dumps([message, HfApi().list_repo_files("me/me-imitator")]))
    """)
    assert '"base_model"' in message
    assert files == [".gitattributes"]


@pytest.mark.parametrize("path", LEFT_BEHIND)
def test_each_file_left_behind_is_named_by_a_pattern(path):
    assert any(fnmatch(path, pattern) for pattern in IGNORED_FILES)


def test_of_an_audit_only_its_report_and_its_figures_are_published(output_dir):
    for name in ("audit.md", "plan.json", "evidence.json", "answers.txt", "resampled/audit.json", "resampled/x.csv"):
        (output_dir / "audit" / name).parent.mkdir(exist_ok=True)
        (output_dir / "audit" / name).write_text("text")
    found = {name for name in published_files(output_dir) if name.startswith("audit/")}
    kept = ("audit.json", "audit.md", "plan.json", "judges.png", "resampled/audit.json")
    assert found == {f"audit/{name}" for name in kept}


@pytest.mark.parametrize("place", ["audit_resampled", "Audit2/x", "audit"])
def test_of_an_audit_anywhere_only_its_report_is_published(output_dir, place):
    (output_dir / place).mkdir(parents=True, exist_ok=True)
    for name in ("audit.json", "plan.json", "power_control.json", "by_question.csv"):
        (output_dir / place / name).write_text("{}")
    found = {name.removeprefix(f"{place}/") for name in published_files(output_dir) if name.startswith(place)}
    assert found == {"audit.json", "plan.json"} | ({"judges.png"} if place == "audit" else set())


def test_an_audit_that_was_killed_before_its_report_is_still_known_by_its_plan(output_dir):
    (output_dir / "second").mkdir()
    for name in ("plan.json", "power_control.json"):
        (output_dir / "second" / name).write_text("{}")
    assert [name for name in published_files(output_dir) if name.startswith("second/")] == ["second/plan.json"]


def test_an_audit_in_the_folder_of_the_weights_keeps_no_weights_back(output_dir):
    (output_dir / "audit.json").write_text("{}")
    assert set(published_files(output_dir)) == {*PUBLISHED, "audit.json"}


def test_an_audit_of_other_weights_is_not_published(output_dir):
    (output_dir / "audit" / "audit.json").write_text('{"plan_hash": "old"}')
    (output_dir / "imitation.json").write_text('{"card": {"stale_audits": ["old"]}}')
    assert set(published_files(output_dir)) == {name for name in PUBLISHED if not name.startswith("audit/")}
    (output_dir / "audit" / "audit.json").write_text('{"plan_hash": "new"}')
    assert set(published_files(output_dir)) == set(PUBLISHED)


def test_a_folder_that_is_none_is_said_before_anything_is_created(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a directory"):
        push_folder(tmp_path / "missing", "me/me-imitator")


# --- what a push may and may not do to what is there


def test_a_push_that_is_killed_half_way_leaves_the_last_revision_whole(tmp_path, tiny_model_dir):
    """Killed while the second of two large files arrives: the first is stored, and no commit names it."""
    folder = tmp_path / "imitator"
    shutil.copytree(tiny_model_dir, folder)
    store = Hub()
    program = "import sys\nfrom hf_imitate.hub_cards.push import push_folder\npush_folder(sys.argv[1], 'me/imitator')"

    def push() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], env=environment, stderr=subprocess.DEVNULL
        )

    with hub_server(store) as url:
        environment = hub_environment(url, tmp_path / "home")
        assert push().wait() == 0
        repo = store.repos["model", "me/imitator"]
        before, num_objects = repo.branches["main"], len(store.lfs)
        for name in ("model.safetensors", "tokenizer.json"):
            (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        arrived = []

        def kill_at_the_second() -> None:
            arrived.append(None)
            if len(arrived) == 2:
                running.kill()

        store.before_lfs = kill_at_the_second
        running = push()
        running.wait()
        assert running.returncode < 0
        assert len(store.lfs) > num_objects
        assert repo.branches["main"] is before
        store.before_lfs = lambda: None
        assert push().wait() == 0
        assert repo.branches["main"].parent is before
        assert repo.branches["main"].files["model.safetensors"].content[-1:] == b" "


def test_what_the_folder_no_longer_holds_is_no_longer_loaded(hub, output_dir):
    """An adapter is pushed over full weights, without the audit and the distinguisher that were theirs."""
    files = hub(f"""
        import shutil
        from pathlib import Path
        folder, api = Path({str(output_dir)!r}), HfApi()
        push_folder(folder, "me/me-imitator")
        api.upload_file(path_or_fileobj=b"mine", path_in_repo="LICENSE", repo_id="me/me-imitator")
        for name in ("distinguisher", "audit"):
            shutil.rmtree(folder / name)
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()
        (folder / "adapter_model.safetensors").write_bytes(b"adapter")
        push_folder(folder, "me/me-imitator")
        print(json.dumps(api.list_repo_files("me/me-imitator")))
    """)
    kept = {".gitattributes", "LICENSE", "README.md", "generation_config.json", "imitation.json"}
    assert set(files) == {*kept, "adapter_model.safetensors", "reference_answers.txt"}


def test_a_checkpoint_to_go_on_from_is_beside_the_imitator_and_never_public(hub, output_dir):
    found = hub(f"""
        from pathlib import Path
        folder, api = Path({str(output_dir)!r}), HfApi()
        for name in ("_latent_state_0.json", "_note.txt"):
            (folder / name).write_text("state")
        named = ("optimizer.bin", "config.json", "_note.txt", "training_args.bin")
        marker = {{"version": 1, "files": {{name: {{"size": 1, "sha256": "a"}} for name in named}}}}
        (folder / "_complete.json").write_text(json.dumps(marker))
        push_folder(folder, "me/run", checkpoint_name="last-checkpoint")
        (folder / "rng_state_0.pth").unlink()
        push_folder(folder, "me/run", checkpoint_name="last-checkpoint")
        try:
            push_folder(folder, "me/open", private=False, checkpoint_name="last-checkpoint")
        except ValueError as error:
            message = str(error)
        stored = json.load(open(api.hf_hub_download("me/run", "last-checkpoint/_complete.json")))
        files, number = api.list_repo_files("me/run"), len(api.list_repo_commits("me/run"))
        print(json.dumps([message, files, number, stored]))
    """)
    message, files, num_commits, marker = found
    assert "private repositories only" in message
    assert num_commits == 3
    inside = {name.removeprefix("last-checkpoint/") for name in files if name.startswith("last-checkpoint/")}
    assert marker == {
        "version": 1,
        "files": {name: {"size": 1, "sha256": "a"} for name in ("optimizer.bin", "config.json")},
    }
    states = {"_complete.json", "scaler.pt", "latest", "pytorch_model_fsdp_0/__0_0.distcp"}
    states |= {"optimizer.bin", "scheduler.pt", "rng_state.pth", "trainer_state.json", "_latent_state_0.json"}
    assert states <= inside
    assert (
        not {"rng_state_0.pth", "training_args.bin", "zero_to_fp32.py", "pickled.pkl", "audit/scores.parquet"} & inside
    )
    assert not states & set(files)


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, output_dir):
    seen = hub(f"""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError
        import hf_imitate.hub_cards.push as push
        api, create = HfApi(), HfApi.create_commit
        push_folder({str(output_dir)!r}, "me/shared")

        class Raced(HfApi):
            def create_commit(self, *args, **kwargs):
                create(self, "me/shared", [CommitOperationAdd("theirs.txt", b"1")], commit_message="Theirs")
                return create(self, *args, **kwargs)

        push.HfApi = Raced
        from pathlib import Path
        (Path({str(output_dir)!r}) / "imitation.json").write_text('{{"version": 2}}')
        try:
            push_folder({str(output_dir)!r}, "me/shared")
        except HfHubHTTPError as error:
            print(json.dumps([error.response.status_code, api.list_repo_commits("me/shared")[0].title]))
    """)
    assert seen == [412, "Theirs"]


def test_a_link_in_the_folder_publishes_nothing(output_dir, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (output_dir / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match=r"notes\.txt is a link"):
        published_files(output_dir)
    (output_dir / "notes.txt").unlink()
    (output_dir / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="elsewhere is a link"):
        published_files(output_dir)
    (output_dir / "elsewhere").rename(output_dir / "_elsewhere")
    assert set(published_files(output_dir)) == set(PUBLISHED)
    for name in ("optimizer.bin", MARKER):
        (output_dir / name).unlink(missing_ok=True)
        (output_dir / name).symlink_to(tmp_path / "secret.txt")
        with pytest.raises(ValueError, match=f"{name} is a link"):
            checkpoint_files(output_dir, [])
        (output_dir / name).unlink()


def test_a_local_base_is_never_published_unnoticed(output_dir, tmp_path, caplog):
    config = {"base_model_name_or_path": str(tmp_path / "my secret" / "base")}
    (output_dir / "distinguisher" / "adapter_config.json").write_text(json.dumps(config))
    files = published_files(output_dir)
    with pytest.raises(ValueError, match=r"in distinguisher/adapter_config\.json is a local path") as error:
        check_bases(output_dir, files, private=False)
    with caplog.at_level(logging.WARNING):
        check_bases(output_dir, files, private=True)
    assert "whoever lacks that folder cannot load the adapter" in caplog.text
    assert "secret" not in str(error.value) + caplog.text
    config["base_model_name_or_path"] = "me/base"
    (output_dir / "distinguisher" / "adapter_config.json").write_text(json.dumps(config))
    check_bases(output_dir, files, private=False)


@pytest.mark.parametrize("name", ["adapter_config.json", "distinguisher/adapter_config.json"])
def test_a_base_that_was_a_folder_while_training_is_local_wherever_the_push_is_made(output_dir, name):
    """A relative path looks like an id of the Hub where the folder is not."""
    (output_dir / name).write_text('{"base_model_name_or_path": "runs/base"}')
    (output_dir / "imitation.json").write_text('{"base_model": "base", "base_is_local": true}')
    cure = "--merge DIR" if name == "adapter_config.json" else "remove `distinguisher/` and write the card again"
    with pytest.raises(ValueError, match=f"is a local path.*{cure}"):
        check_bases(output_dir, [name], private=False)
    (output_dir / "imitation.json").write_text('{"base_model": "runs/base", "base_is_local": false}')
    check_bases(output_dir, [name], private=False)
