"""A trained imitator's folder -> the Hub: private, and in one commit."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

from hf_imitate.hub_cards.card_file import FACTS_FILE, has_stale_audit
from hf_imitate.hub_cards.facts import hub_id_or_none

logger = logging.getLogger(__name__)

_STATES = (
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "trainer_state.json",
    "adversarial_state*",
    *("global_step*", "latest"),  # DeepSpeed's, and which of them is meant
    "pytorch_model_fsdp*",
    "scaler.pt",
)
_IGNORED_ANYWHERE = (
    ".git/*",
    ".cache/*",
    "_*",
    "checkpoint-*",
    "completions/*",  # sampled answers beside their questions
    "cache/*",  # an audit's: sampled answers
    *_STATES,
    "ref/*",
    "runs/*",
    "logs/*",
    "zero_to_fp32.py",  # DeepSpeed's: code has no place in a repository that runs none
)

IGNORED_FILES = (
    *_IGNORED_ANYWHERE,
    *(f"*/{pattern}" for pattern in _IGNORED_ANYWHERE),
    *("*.bin", "*.pt", "*.pth", "*.pkl"),  # pickles: loading one runs whatever code it holds
    "*.parquet",  # an audit's scores, one row per question: never public unless somebody asks for it
    "*.npz",  # the same, of a part of it
)
"""Patterns of files a push leaves behind (`fnmatch` on the path inside the folder; `*` also matches `/`)."""

AUDIT_FILES = ("*/audit.json", "*/audit.md", "*/plan.json", "*/power.json", "*/power.md", "*.png")
"""Of an audit's folder, only these are published: what else it leaves is numbers per question, or answers."""

_MADE_BY_AUDITS = ("audit.json", "plan.json")

RUN_FILES = (*_STATES, "_latent_state*", "_retrodictive_state*")
"""What a checkpoint holds beyond the imitator, to go on from; pushed only beside it, to a private repository."""

MARKER = "_complete.json"
"""A checkpoint's list of its files; what is pushed of it gets one of what is pushed."""

REPLACED_FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"),
    *("model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("generation_config.json", "imitation.json", "distinguisher/*", "retrodictor/*", "audit/*"),
)
"""Patterns of files that a push removes from the repository where the folder no longer holds them: beside new weights,
old ones would be loaded, and an old audit would speak of others. What else lies there is left alone."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload imitator",
    run_as_future: bool = False,
    checkpoint_name: str | None = None,
    leave_out: Sequence[str] = (),
) -> CommitInfo | Future[CommitInfo]:
    """
    Push a trained imitator to the Hub: weights, card, distinguisher and audit in one commit.

    What serves only training or could hold private rows stays behind, see `IGNORED_FILES`. One commit means nobody
    can ever load new weights with an old card, or an imitator without its distinguisher: a push that is killed
    half-way leaves the repository as it was. Where nothing changed, there is no commit.

    Args:
        folder (`str` or `Path`):
            The trainer's `output_dir`.
        repo_id (`str`):
            `owner/name`; created if it does not exist.
        private (`bool`, *optional*, defaults to `True`):
            Who may see the repository: only its owner, or everybody.
        token (`str`, *optional*):
            Hub token; by default the one saved by `hf auth login`.
        revision (`str`, *optional*):
            Branch to push to, created if it does not exist; by default `main`.
        commit_message (`str`, *optional*, defaults to `"Upload imitator"`):
            First line of the commit.
        run_as_future (`bool`, *optional*, defaults to `False`):
            Upload in the background and return at once.
        checkpoint_name (`str`, *optional*):
            Where `folder` is a checkpoint: a folder of the repository that gets all a run can be taken up from, such
            as `"last-checkpoint"`. The state of an adversarial run holds answers of the imitator, so it is never
            public.
        leave_out (`Sequence[str]`, *optional*):
            Further patterns of files that stay behind.

    Returns:
        [`~huggingface_hub.CommitInfo`], or a `Future` of it with `run_as_future=True`.

    Raises:
        FileNotFoundError: `folder` is no directory.
        ValueError: the repository exists and is public while `private=True`; or something in the folder cannot be
            published: a link, an adapter on a local base where everybody may read, a checkpoint there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`folder` is {str(folder)!r}, which is not a directory. Pass the `output_dir` of a finished training run."
        )
    files = published_files(folder, leave_out)
    check_bases(folder, files, private)
    if checkpoint_name is not None and not private:
        raise ValueError(
            "A checkpoint to go on from holds what serves the run alone, of an adversarial one the imitator's answers "
            "to the training questions, so it is pushed to private repositories only. Set `hub_private_repo=True`, or "
            '`hub_strategy="every_save"`, which pushes the imitator alone.'
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # `exist_ok` leaves the visibility of an existing repository as it is.
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"The repository {repo_id!r} exists and is public, but `private=True`. "
            "Pass `private=False` to publish there, or choose another `repo_id`."
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    arguments = (api, folder, files, repo_id, revision, commit_message, checkpoint_name)
    # Two calls, since the type of the result depends on the flag.
    return api.run_as_future(_commit, *arguments) if run_as_future else _commit(*arguments)


def published_files(folder: Path, leave_out: Sequence[str] = ()) -> list[str]:
    """
    Name the files of a folder that a push publishes.

    Args:
        folder (`Path`):
            The trainer's `output_dir`.
        leave_out (`Sequence[str]`, *optional*):
            Patterns beyond `IGNORED_FILES`.

    Returns:
        `list[str]`: paths inside the folder, sorted; without an `audit/` that was made of other weights.

    Raises:
        ValueError: one of them is a link, which could publish a file of anywhere.
    """
    ignored = (*IGNORED_FILES, *leave_out)
    found = _files(folder)
    # Whoever audits may write anywhere; in the folder of the weights themselves the patterns above have to do.
    audits = {
        f"{PurePosixPath(name).parent}/" for name in found if name.endswith(tuple(f"/{n}" for n in _MADE_BY_AUDITS))
    }
    names = [name for name in found if not _matches(name, ignored)]
    names = [name for name in names if not name.startswith(("audit/", *audits)) or _matches(name, AUDIT_FILES)]
    if has_stale_audit(folder):
        names = [name for name in names if not name.startswith("audit/")]
    for name in names:
        _check_no_link(folder, name)
    return names


def checkpoint_files(folder: Path, files: Sequence[str]) -> dict[str, Path | bytes]:
    """
    Gather what is pushed of a checkpoint, so that a run can be taken up from it.

    Args:
        folder (`Path`):
            The checkpoint.
        files (`Sequence[str]`):
            What is published of it, as `published_files` says.

    Returns:
        `dict[str, Path | bytes]`: paths inside the checkpoint, and what lies there; its `MARKER` lists these alone,
        since whoever takes it up would look in vain for what stays behind.

    Raises:
        ValueError: one of them is a link.
    """
    states = [name for name in _files(folder) if _matches(name, RUN_FILES) or name == MARKER]
    for name in states:
        _check_no_link(folder, name)
    found: dict[str, Path | bytes] = {name: folder / name for name in (*files, *states)}
    if MARKER in found:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        marker["files"] = {name: entry for name, entry in marker["files"].items() if name in found}
        found[MARKER] = json.dumps(marker).encode()
    return found


def check_bases(folder: Path, files: Sequence[str], private: bool) -> None:
    """
    Say, before anything is pushed, which adapters others could not load because their base is a local folder.

    Args:
        folder (`Path`):
            The trainer's `output_dir`.
        files (`Sequence[str]`):
            What is to be published.
        private (`bool`):
            Whether the repository is. There it is a warning: its owner has the base.

    Raises:
        ValueError: such an adapter would be public.
    """
    for name in local_bases(folder, files):
        cure = (
            "push plain weights: `hf-imitate card PATH --merge DIR`"
            if (folder / "adapter_config.json").is_file()
            else f"remove `{name.partition('/')[0]}/` and write the card again: `hf-imitate card PATH`"
        )
        problem = (
            f"`base_model_name_or_path` in {name} is a local path, so whoever lacks that folder cannot load the "
            f"adapter. Push the base to the Hub and train from its id, or {cure}."
        )
        if not private:
            raise ValueError(f"{problem} Nothing was pushed.")
        _warn_once(problem)


def local_bases(folder: Path, files: Sequence[str]) -> list[str]:
    """
    Name the adapters' configs whose base is a local folder.

    Args:
        folder (`Path`):
            The trainer's `output_dir`.
        files (`Sequence[str]`):
            Paths inside it.

    Returns:
        `list[str]`: those of `files` that are such a config.
    """
    bases = {name: _base_of(folder / name) for name in files if name.rpartition("/")[2] == "adapter_config.json"}
    return [
        name
        for name, base in bases.items()
        if base and (hub_id_or_none(base) is None or _is_the_local_base(base, folder))
    ]


def _base_of(file: Path) -> str | None:
    return json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")


def _is_the_local_base(base: str, folder: Path) -> bool:
    """Whether `imitation.json` says that this base is a folder, though from here it looks like an id."""
    facts = folder / FACTS_FILE
    stored = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    if stored.get("base_is_local") is not True:
        return False
    own = folder / "adapter_config.json"
    if own.is_file():
        return base == _base_of(own)
    return PurePosixPath(base.replace("\\", "/")).name == stored.get("base_model")


@cache
def _warn_once(problem: str) -> None:
    logger.warning(problem)


def _commit(
    api: HfApi,
    folder: Path,
    files: Sequence[str],
    repo_id: str,
    revision: str | None,
    commit_message: str,
    checkpoint_name: str | None,
) -> CommitInfo:
    """One commit on top of the newest one, or none where nothing changed."""
    # Not `upload_folder`: where Xet is there, huggingface_hub 2 makes several commits of it.
    added: dict[str, Path | bytes] = {name: folder / name for name in files}
    replaced = list(REPLACED_FILES)
    if checkpoint_name is not None:
        added |= {f"{checkpoint_name}/{name}": file for name, file in checkpoint_files(folder, files).items()}
        replaced.append(f"{checkpoint_name}/*")
    info = api.model_info(repo_id, revision=revision)
    there = [sibling.rfilename for sibling in info.siblings or []]
    gone = [name for name in there if name not in added and _matches(name, replaced)]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in gone),
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in sorted(added.items())),
    ]
    return api.create_commit(
        repo_id, operations, commit_message=commit_message, revision=revision, parent_commit=info.sha
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()
    )


def _check_no_link(folder: Path, name: str) -> None:
    parts = Path(name).parts
    if any(folder.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts))):
        raise ValueError(
            f"{name} is a link. What it leads to may be private, so nothing was pushed; put the file itself there."
        )
