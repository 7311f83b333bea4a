"""The loopback Hub keeps the promises that tests of pushes lean on: hashes, parents, ranges, privacy, metadata.

Asked over plain HTTP where the client would be too kind to send what is wrong.
"""

import base64
import hashlib
import json
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request

import pytest
from hub_server import LICENSES, TOKEN, hub_environment, hub_server

from hf_imitate.hub_cards import licenses


@pytest.fixture(scope="module")
def url():
    with hub_server() as address:
        yield address


def ask(address, method="GET", body=None, token=TOKEN, **headers):
    """Status, body and headers of an answer."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(address, content, {**headers}, method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def commit(url, repo, *operations, branch="main", parent=None, token=TOKEN):
    head = {"key": "header", "value": {"summary": "s", "description": "", "parentCommit": parent}}
    lines = "\n".join(json.dumps(line) for line in (head, *operations)).encode()
    return ask(f"{url}/api/models/{repo}/commit/{branch}", "POST", lines, token)


def file(path, content):
    encoded = base64.b64encode(content.encode()).decode()
    return {"key": "file", "value": {"path": path, "content": encoded, "encoding": "base64"}}


def lfs_file(path, content, size=None):
    oid = hashlib.sha256(content).hexdigest()
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": size or len(content)}}


def created(url, name, **changes):
    status, body, _ = ask(f"{url}/api/repos/create", "POST", {"name": name, "type": "model", **changes})
    assert status == 200, body
    return f"me/{name}"


def head_of(url, repo):
    return json.loads(ask(f"{url}/api/models/{repo}")[1])["sha"]


def test_a_commit_on_top_of_another_than_the_newest_is_refused(url):
    repo = created(url, "parents")
    first = head_of(url, repo)
    assert commit(url, repo, file("a.txt", "1"), parent=first)[0] == 200
    assert commit(url, repo, file("a.txt", "2"), parent=first)[0] == 412
    assert ask(f"{url}/{repo}/resolve/main/a.txt")[1] == b"1"
    assert commit(url, repo, file("a.txt", "2"), parent=head_of(url, repo))[0] == 200
    assert ask(f"{url}/{repo}/resolve/{first}/a.txt")[0] == 404
    assert commit(url, repo, file("a.txt", "2"), branch="nowhere")[0] == 404


def test_an_lfs_file_is_committed_only_where_its_content_arrived_whole(url):
    repo, content = created(url, "large"), b"weights"
    oid = hashlib.sha256(content).hexdigest()
    assert commit(url, repo, lfs_file("model.safetensors", content))[0] == 400
    assert ask(f"{url}/lfs/{oid}", "PUT", b"weighty", token=None)[0] == 400
    assert ask(f"{url}/lfs/{oid}", "PUT", content, token=None)[0] == 200
    assert commit(url, repo, lfs_file("model.safetensors", content, size=3))[0] == 400
    assert commit(url, repo, lfs_file("model.safetensors", content))[0] == 200
    status, body, headers = ask(f"{url}/{repo}/resolve/main/model.safetensors")
    assert (status, body, headers["X-Linked-Etag"]) == (200, content, f'"{oid}"')


def test_a_part_of_a_file_is_given_and_nothing_beyond_its_end(url):
    repo = created(url, "ranges")
    commit(url, repo, file("a.txt", "0123456789"))
    where = f"{url}/{repo}/resolve/main/a.txt"
    for asked, expected, span in [("3-", b"3456789", "3-9"), ("2-4", b"234", "2-4"), ("8-99", b"89", "8-9")]:
        status, body, headers = ask(where, Range=f"bytes={asked}")
        assert (status, body, headers["Content-Range"]) == (206, expected, f"bytes {span}/10")
    assert ask(where, Range="bytes=10-")[0] == 416
    git_hash = hashlib.sha1(b"blob 10\x000123456789").hexdigest()
    status, body, headers = ask(where, "HEAD")
    assert (status, body, headers["ETag"], headers["X-Repo-Commit"]) == (200, b"", f'"{git_hash}"', head_of(url, repo))


def test_who_may_not_read_cannot_tell_private_from_missing_and_nobody_else_writes(url):
    repo = created(url, "mine", private=True)
    answers = [ask(f"{url}/api/models/{name}", token=None)[:2] for name in (repo, "me/missing")]
    assert answers[0] == answers[1]
    assert answers[0][0] == 401
    assert ask(f"{url}/api/models/me/missing")[0] == 404
    assert commit(url, repo, file("a.txt", "1"), token="hf_wrong")[0] == 401
    assert ask(f"{url}/api/repos/create", "POST", {"name": "mine", "type": "model"})[0] == 409


@pytest.mark.parametrize(
    "metadata",
    [
        "tags: [unclosed",
        "- a list",
        "license: [mit]",
        "license: my own",
        "tags: [1]",
        "base_model: /local/path",
        "model-index: nothing",
        "model-index:\n- name: m\n  results:\n  - task: {}\n    dataset: {type: d, name: d}\n    metrics: []",
    ],
)
def test_metadata_that_the_hub_cannot_read_is_refused_when_asked_and_when_committed(url, metadata):
    text = f"---\n{metadata}\n---\n# card\n"
    assert ask(f"{url}/api/validate-yaml", "POST", {"content": text, "repoType": "model"})[0] == 400
    repo = "me/cards" if ask(f"{url}/api/models/me/cards")[0] == 200 else created(url, "cards")
    before = head_of(url, repo)
    assert commit(url, repo, file("README.md", text))[0] == 400
    assert head_of(url, repo) == before
    assert commit(url, repo, file("README.md", f"---\nlicense: mit\n---\n# {before}\n"))[0] == 200


def test_cards_know_the_licence_ids_of_the_hub_and_no_others():
    assert licenses.LICENSES | {licenses.OTHER} == set(LICENSES)


def test_the_client_itself_pushes_lists_deletes_and_goes_on_with_a_download(url, tmp_path):
    program = textwrap.dedent("""
        import json
        from pathlib import Path
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
        api = HfApi()
        api.create_repo("me/client", private=True)
        api.create_branch("me/client", branch="other")
        add = [CommitOperationAdd(name, bytes(1000)) for name in ("a/b.txt", "a/c.safetensors", "d.txt")]
        api.create_commit("me/client", add, commit_message="add")
        tree = sorted(entry.path for entry in api.list_repo_tree("me/client"))
        whole = sorted(entry.path for entry in api.list_repo_tree("me/client", recursive=True))
        api.create_commit("me/client", [CommitOperationDelete("a/", is_folder=True)], commit_message="delete")
        errors = []
        for call in (lambda: hf_hub_download("me/client", "a/b.txt"),
                     lambda: hf_hub_download("me/client", "d.txt", revision="none"),
                     lambda: api.create_commit("me/client", [CommitOperationAdd("x", b"1")], commit_message="m",
                                               parent_commit="0" * 40)):
            try:
                call()
            except (EntryNotFoundError, RevisionNotFoundError, HfHubHTTPError) as error:
                errors.append([type(error).__name__, error.response.status_code])
        size = len(Path(hf_hub_download("me/client", "d.txt")).read_bytes())
        print(json.dumps([tree, whole, api.list_repo_files("me/client"),
                          api.list_repo_files("me/client", revision="other"), errors, size]))
    """)
    environment = hub_environment(url, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tree, whole, left, other, errors, size = json.loads(done.stdout.splitlines()[-1])
    assert tree == [".gitattributes", "a", "d.txt"]
    assert whole == [".gitattributes", "a", "a/b.txt", "a/c.safetensors", "d.txt"]
    assert (left, other, size) == ([".gitattributes", "d.txt"], [".gitattributes"], 1000)
    assert errors == [["RemoteEntryNotFoundError", 404], ["RevisionNotFoundError", 404], ["HfHubHTTPError", 412]]
