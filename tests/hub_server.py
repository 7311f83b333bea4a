"""A small Hugging Face Hub on 127.0.0.1, in memory, that the real client pushes to and loads from.

    with hub_server() as url:
        subprocess.run([sys.executable, "-c", code], env=hub_environment(url, tmp_path), check=True)

`huggingface_hub` reads its constants when it is imported, so what talks to this server runs in a process of its own.
Models and data sets, branches, regular and LFS files (hashes and sizes are checked), commits, ranges, private
repositories. `hub_server(hub)` serves a `Hub` of one's own, to look into it or to stop an upload half-way.
Not covered: Xet, pull requests, rate limits, the Hub's rules for metadata beyond those in `_metadata_errors`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.parquet", "*.png", "tokenizer.json")
DATE = "2026-01-01T00:00:00.000Z"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# A list of its own, in the Hub's order: what our cards take for an id is checked against it.
LICENSES = [
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr",
    "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "openmdw-1.1", "openrail++", "osl-3.0", "postgresql", "ofl-1.1",
    "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", "unknown",
    "other",
]  # fmt: skip


class HubError(Exception):
    """An answer that is not 200: status, the Hub's error code, a message."""

    def __init__(self, status: int, code: str, message: str, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares with its own file: sha256 for LFS, git's blob hash otherwise."""
        blob = b"blob %d\0" % len(self.content) + self.content
        return self.sha256 if self.is_lfs else hashlib.sha1(blob).hexdigest()


@dataclass
class Commit:
    sha: str
    title: str
    parent: "Commit | None"
    files: dict[str, File]


@dataclass
class Repo:
    id: str
    kind: str
    is_private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        commit = self.branches.get(revision) or self.commits.get(revision)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def add(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        names = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(repr((parent and parent.sha, title, len(self.commits), names)).encode()).hexdigest()
        self.branches[branch] = self.commits[sha] = Commit(sha, title, parent, files)
        return self.branches[branch]


class Hub:
    """The store behind the requests; every method that changes it holds the lock."""

    def __init__(self) -> None:
        self.url = ""
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.before_lfs: Callable[[], None] = lambda: None  # called before an LFS object is stored

    def repo(self, kind: str, repo_id: str, is_signed_in: bool) -> Repo:
        repo = self.repos.get((kind, repo_id))
        # A stranger cannot tell a private repository from one that does not exist.
        if repo is None or (repo.is_private and not is_signed_in):
            raise HubError(404 if is_signed_in else 401, "RepoNotFound", "Repository not found")
        return repo

    def create(self, request: dict) -> dict:
        kind, repo_id = request.get("type") or "model", f"{request.get('organization') or 'me'}/{request['name']}"
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.repos:
            message = "You already created this model repo"
            raise HubError(409, "Conflict", message, {"error": message, "url": url})
        is_private = request.get("visibility") == "private" or bool(request.get("private"))
        repo = self.repos[kind, repo_id] = Repo(repo_id, kind, is_private)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo.add("main", "initial commit", {".gitattributes": File(attributes.encode(), False)})
        return {"url": url, "name": repo_id, "id": repo_id}

    def commit(self, repo: Repo, branch: str, lines: list[dict]) -> dict:
        if branch not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        head, files = lines[0]["value"], dict(repo.branches[branch].files)
        if head.get("parentCommit") not in (None, repo.branches[branch].sha):
            raise HubError(412, "PreconditionFailed", "A commit has happened since.")
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = File(base64.b64decode(value["content"], validate=True), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.lfs or len(self.lfs[value["oid"]]) != value["size"]:
                    raise HubError(400, "BadRequest", f"The LFS object of {path} was never uploaded whole.")
                files[path] = File(self.lfs[value["oid"]], True)
            else:  # deletedFile, deletedFolder
                gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                for name in gone:
                    del files[name]
        if "README.md" in files and (errors := _metadata_errors(files["README.md"].content.decode())):
            raise HubError(400, "BadRequest", f"Invalid metadata in README.md: {errors[0]}")
        commit = repo.add(branch, head["summary"], files)
        return {"success": True, "commitOid": commit.sha, "commitUrl": f"{self.url}/{repo.id}/commit/{commit.sha}"}

    def lfs_batch(self, objects: list[dict]) -> dict:
        def describe(item: dict) -> dict:
            upload = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            return {**item, **({} if item["oid"] in self.lfs else {"actions": upload})}

        return {"transfer": "basic", "objects": [describe(item) for item in objects]}

    def put_lfs(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "BadRequest", f"The content does not hash to {oid}.")
        self.lfs[oid] = content


def _info(repo: Repo, commit: Commit) -> dict:
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    visibility = {"private": repo.is_private, "gated": False, "disabled": False}
    dates = {"createdAt": DATE, "lastModified": DATE}
    return {"_id": repo.id, "id": repo.id, "sha": commit.sha, "tags": [], "siblings": siblings, **visibility, **dates}


def _tree(commit: Commit, inside: str, is_recursive: bool) -> list[dict]:
    folders = {str(parent) for path in commit.files for parent in Path(path).parents} - {"."}
    entries: list[dict] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
    for path, file in commit.files.items():
        entry: dict[str, Any] = {"type": "file", "oid": file.oid, "size": len(file.content), "path": path}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        entries.append(entry)
    prefix = f"{inside}/" if inside else ""
    found = [entry for entry in entries if entry["path"].startswith(prefix)]
    if inside and not found:
        raise HubError(404, "EntryNotFound", f"{inside} does not exist on this revision")
    found = found if is_recursive else [entry for entry in found if "/" not in entry["path"][len(prefix) :]]
    return sorted(found, key=lambda entry: entry["path"])


def _preupload(commit: Commit, files: list[dict]) -> dict:
    def describe(path: str) -> dict:
        old, is_lfs = commit.files.get(path), any(fnmatch(Path(path).name, pattern) for pattern in LFS_PATTERNS)
        mode = "lfs" if is_lfs else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old.oid if old else None}

    return {"commitOid": commit.sha, "files": [describe(file["path"]) for file in files]}


def _metadata_errors(content: str) -> list[str]:
    header = re.match(r"---\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    try:
        data = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["The metadata must be a mapping."]
    errors = [f'"{key}" must be a string' for key in ("library_name", "pipeline_tag", "license")
              if not isinstance(data.get(key, ""), str)]  # fmt: skip
    if data.get("license", "mit") not in LICENSES:
        errors.append('"license" must be one of the ids in https://hf.co/docs/hub/repositories-licenses')
    for key in ("tags", "datasets", "base_model"):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be an array of strings')
        elif key != "tags" and not all(REPO_ID.fullmatch(value) for value in values):
            errors.append(f'"{key}" with value {values} is not valid. Use a model id from https://hf.co/models.')
    return errors + ([] if "model-index" not in data else _index_errors(data["model-index"]))


def _index_errors(index: Any) -> list[str]:
    """What is missing where the Hub's form of evaluation results asks for it."""
    needed = {"task": {"type"}, "dataset": {"type", "name"}}
    try:
        for model in index:
            for result in model["name"] and model["results"]:
                lacking = [f"{part}.{key}" for part, keys in needed.items() for key in keys - set(result[part])]
                lacking += [
                    f"metrics.{key}" for metric in result["metrics"] for key in {"type", "value"} - set(metric)
                ]
                if lacking:
                    return [f'"model-index" lacks {sorted(lacking)}']
    except (TypeError, KeyError) as error:
        return [f'"model-index" is not of the form the Hub reads: {type(error).__name__}']
    return []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self) -> None:
        body = self._read()
        self.is_signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        path = urlsplit(self.path).path
        try:
            for method, pattern, action in _ROUTES:
                if (match := re.fullmatch(pattern, path)) and self.command in method:
                    # An object store is written through signed links, without the user's token.
                    if self.command not in "GET HEAD PUT" and not self.is_signed_in:
                        raise HubError(401, "Unauthorized", "Invalid username or password.")
                    with self.hub.lock:
                        result = action(self, body, *map(unquote, match.groups(default="")))
                    if result is not None:
                        self._send(200, json.dumps(result).encode(), {"Content-Type": "application/json"})
                    return
            raise HubError(404, "NotFound", f"This loopback Hub does not know {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error), "Content-Type": "application/json"}
            self._send(error.status, json.dumps(error.body).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _repo(self, kind: str, repo_id: str) -> Repo:
        return self.hub.repo("dataset" if kind.startswith("dataset") else "model", repo_id, self.is_signed_in)

    def whoami(self, body: bytes) -> dict:
        if not self.is_signed_in:
            raise HubError(401, "Unauthorized", "Invalid username or password.")
        return {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self, body: bytes) -> dict:
        errors = _metadata_errors(json.loads(body)["content"])
        if errors:
            messages = {"errors": [{"message": message} for message in errors], "warnings": []}
            raise HubError(400, "BadRequest", "Invalid metadata", messages)
        return {"errors": [], "warnings": []}

    def create_branch(self, body: bytes, kind: str, repo_id: str, branch: str) -> dict:
        repo = self._repo(kind, repo_id)
        if branch in repo.branches:
            raise HubError(409, "Conflict", f"Reference already exists: {branch}")
        repo.branches[branch] = repo.at(json.loads(body or b"{}").get("startingPoint", "main"))
        return {}

    def list_commits(self, body: bytes, kind: str, repo_id: str, revision: str) -> list[dict]:
        commit: Commit | None = self._repo(kind, repo_id).at(revision)
        found = []
        while commit is not None:
            found.append({"id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": DATE})
            commit = commit.parent
        return found

    def resolve(self, body: bytes, kind: str, repo_id: str, revision: str, path: str) -> None:
        commit = self._repo(kind, repo_id).at(revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found", {"error": "Entry not found"})
        file, headers = commit.files[path], {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{file.oid}"'
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        asked, size = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")), len(file.content)
        if asked is None:
            self._send(200, file.content, headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
        if start > end:
            raise HubError(416, "RangeNotSatisfiable", f"{path} has {size} bytes")
        self._send(206, file.content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})

    def put_lfs(self, body: bytes, oid: str) -> None:
        self.hub.before_lfs()
        self.hub.put_lfs(oid, body)
        self._send(200, b"", {})


_API, _ID, _REV = r"/api/(models|datasets)/", r"([^/]+/[^/]+)", r"([^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/repos/create", lambda self, body: self.hub.create(json.loads(body))),
    ("POST", rf"{_API}{_ID}/branch/{_REV}", _Handler.create_branch),
    ("POST", rf"{_API}{_ID}/preupload/{_REV}",
     lambda self, body, kind, repo, rev: _preupload(self._repo(kind, repo).at(rev), json.loads(body)["files"])),
    ("POST", rf"{_API}{_ID}/commit/{_REV}",
     lambda self, body, kind, repo, rev: self.hub.commit(
         self._repo(kind, repo), rev, [json.loads(line) for line in body.splitlines()])),
    ("POST", rf"/(datasets/)?{_ID}\.git/info/lfs/objects/batch",
     lambda self, body, kind, repo: self.hub.lfs_batch(json.loads(body)["objects"])),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.put_lfs),
    ("GET", rf"{_API}{_ID}/commits/{_REV}", _Handler.list_commits),
    ("GET", rf"{_API}{_ID}/tree/{_REV}(?:/(.+))?",
     lambda self, body, kind, repo, rev, inside: _tree(
         self._repo(kind, repo).at(rev), inside.rstrip("/"), "recursive=true" in self.path.lower())),
    ("GET", rf"{_API}{_ID}/revision/{_REV}",
     lambda self, body, kind, repo, rev: _info(self._repo(kind, repo), self._repo(kind, repo).at(rev))),
    ("GET", rf"{_API}{_ID}",
     lambda self, body, kind, repo: _info(self._repo(kind, repo), self._repo(kind, repo).at("main"))),
    ("GET HEAD", rf"/(datasets/)?{_ID}/resolve/{_REV}/(.+)", _Handler.resolve),
]  # fmt: skip


@contextmanager
def hub_server(hub: Hub | None = None) -> Iterator[str]:
    """Serve a Hub, by default an empty one, on a free port of 127.0.0.1 and give its URL."""
    hub = hub or Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """The environment of a process that takes the server at `url` for the Hub and `home` for its cache."""
    foreign = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    inherited["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), inherited.get("PYTHONPATH", "")])
    return inherited | {
        "HF_ENDPOINT": url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CI": "1",
    }
