"""A trained imitator's folder -> the Hub: private, and in one commit."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

_IGNORED_ANYWHERE = (
    "_*",
    "checkpoint-*",
    "training_args.bin",  # a pickle: loading it runs whatever code it holds
    "completions/*",  # sampled answers beside their questions
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "trainer_state.json",
    "adversarial_state*",
    "ref/*",
    "runs/*",
    "logs/*",
)

IGNORED_FILES = (
    *_IGNORED_ANYWHERE,
    *(f"*/{pattern}" for pattern in _IGNORED_ANYWHERE),
    "*.pt",
    "*.pth",
    "*.pkl",
    "audit/cache/*",  # sampled answers
    "audit/scores.parquet",  # one row per question: never public unless somebody asks for it
)
"""Patterns of files a push leaves behind (`fnmatch` on the path inside the folder; `*` also matches `/`)."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload imitator",
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """
    Push a trained imitator to the Hub: weights, card, distinguisher and audit in one commit.

    What serves only training or could hold private rows stays behind, see `IGNORED_FILES`. One commit means nobody
    can ever load new weights with an old card, or an imitator without its distinguisher.

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

    Returns:
        [`~huggingface_hub.CommitInfo`], or a `Future` of it with `run_as_future=True`.

    Raises:
        FileNotFoundError: `folder` is no directory.
        ValueError: the repository exists and is public while `private=True`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`folder` is {str(folder)!r}, which is not a directory. Pass the `output_dir` of a finished training run."
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
    upload: dict[str, Any] = {
        "folder_path": folder,
        "repo_id": repo_id,
        "commit_message": commit_message,
        "revision": revision,
        "ignore_patterns": list(IGNORED_FILES),
    }
    # Two calls, since the type of the result depends on the flag.
    return api.upload_folder(**upload, run_as_future=True) if run_as_future else api.upload_folder(**upload)
