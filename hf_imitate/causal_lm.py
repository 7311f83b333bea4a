"""Load a causal LM and its tokenizer from a folder or the Hub, adapter or full weights, without running its code."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from hf_imitate.repo_checks import UnsafeRepoError, check_model_config, check_model_size, check_repo
from hf_imitate.strict_json import StrictJSONError, read_json

ADAPTER_FILE = "adapter_model.safetensors"
_CHECKPOINT, _OF_A_RUN = re.compile(r"checkpoint-(\d{1,18})"), "trainer_state.json"

# Weights in other formats, training states and checkpoints are never read, so they are not downloaded either.
_NOT_NEEDED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "original/*",
    "checkpoint-*",
    "last-checkpoint/*",
]
# Of a base, what a causal LM and its tokenizer are read from.
_BASE_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_NOT_NEEDED_OF_BASE = [*_NOT_NEEDED, "*/*", "consolidated*"]


def repo_folder(repo: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local folder of a repo, downloaded where `repo` is a Hub id. Its small files were read, and can be trusted.

    Raises:
        FileNotFoundError: `repo` is no local folder and cannot be had from the Hub.
        UnsafeRepoError: one of its files could harm whoever loads it, see [`~hf_imitate.repo_checks`].
    """
    folder = Path(repo) if Path(repo).is_dir() else _downloaded(repo, revision, token)
    check_repo(folder)
    return folder


def base_folder(name: str, revision: str | None = None, token: str | bool | None = None) -> tuple[Path, str | None]:
    """The local folder of an adapter's base, its small files read as those of a repo, and the revision to load it at.

    Returns:
        `tuple`: the folder, and the very commit that was read, so that no other one is loaded by the base's name; the
        revision as given for a local folder.

    Raises:
        FileNotFoundError: it is no local folder and cannot be had from the Hub, or holds no safetensors weights.
        UnsafeRepoError: one of its files could harm whoever loads it, or it is itself an adapter.
    """
    is_local = Path(name).is_dir()
    folder = Path(name) if is_local else _downloaded(name, revision, token, _BASE_FILES, _NOT_NEEDED_OF_BASE)
    check_repo(folder)
    check_no_adapter(folder)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"The base `{name}` holds no safetensors weights. Pickles are never read, and a conversion made on the "
            "way is not what was named. Convert it once, `AutoModelForCausalLM.from_pretrained(name).save_pretrained("
            "folder)`, add its tokenizer, push that folder, and name it as the base."
        )
    return folder, revision if is_local else folder.name


@contextlib.contextmanager
def naming_what_does_not_fit(name: str) -> Iterator[None]:
    """Say in plain words where weights are of other sizes than their config; transformers points to its log.

    Raises:
        ValueError: they are.
    """
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The weights of `{name}` are of other sizes than its `config.json` says. Save or download it again."
        ) from error


def check_no_adapter(folder: Path) -> None:
    """Stop where a model to load by transformers holds an adapter: it would follow it to another, unread, base.

    Raises:
        UnsafeRepoError: there is an `adapter_config.json`.
    """
    if (folder / "adapter_config.json").exists():
        raise UnsafeRepoError(
            "The model to load holds an `adapter_config.json`, which would lead on to another base. Merge that "
            "adapter into its base (`merge_and_unload`), save it in a folder of its own, and name that instead."
        )


def _downloaded(
    repo: str | Path,
    revision: str | None,
    token: str | bool | None = None,
    needed: list[str] | None = None,
    not_needed: list[str] | None = _NOT_NEEDED,
) -> Path:
    try:
        return Path(
            snapshot_download(
                str(repo), revision=revision, token=token, allow_patterns=needed, ignore_patterns=not_needed
            )
        )
    except (ValueError, FileNotFoundError) as error:  # no repo id at all; not in the cache and no network
        raise FileNotFoundError(
            f"`{repo}` is neither a local folder nor a Hub repo that can be reached from here. Check its spelling; "
            "without a network, give a local folder or a repo that is in the cache."
        ) from error


def commit_of(repo: str) -> str | None:
    """The commit of a Hub repo that a model was loaded from, where the cache leaves no doubt; else `None`.

    transformers no longer notes it in a model's config. Where the cache holds one commit of the repo, it was that one;
    of several it cannot be told which.
    """
    if not repo or Path(repo).is_dir():
        return None
    try:
        snapshot = Path(snapshot_download(repo, allow_patterns=["config.json"], local_files_only=True))
    except (ValueError, FileNotFoundError):  # no repo id; not in the cache
        return None
    return snapshot.name if len(list(snapshot.parent.iterdir())) == 1 else None


def hub_configs(repo: str) -> Path | None:
    """The folder of a Hub repo's configs, at the commit that its name stands for now, which is the folder's name.

    The Hub says which, or, where it cannot be asked, the cache; `None` where neither knows the repo.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=["config.json", "adapter_config.json"]))
    except (ValueError, OSError):  # no repo id; not on the Hub, or not for this token
        return None


def named_base(folder: Path) -> str | None:
    """The base that the adapter in a folder names; `None` where there is no adapter, or none that can be read."""
    try:
        config = read_json(folder / "adapter_config.json")
    except (OSError, StrictJSONError):
        return None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return base if isinstance(base, str) else None


def hub_checkpoint(repo: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The newest checkpoint of a run in a Hub repo, `last-checkpoint/` where there is one; it alone is downloaded.

    Raises:
        FileNotFoundError: `repo` cannot be had from the Hub, or holds no checkpoint.
        UnsafeRepoError: one of its files could harm whoever loads it.
    """
    # Each has this small file, so the names are known before anything large is asked for.
    root = _downloaded(repo, revision, token, [f"last-checkpoint/{_OF_A_RUN}", f"checkpoint-*/{_OF_A_RUN}"], None)
    last = root / "last-checkpoint"
    steps = {int(match[1]): path for path in root.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))}
    found = [last] if last.is_dir() else [steps[step] for step in sorted(steps)]
    if not found:
        raise FileNotFoundError(
            f"`{repo}` holds no checkpoint to go on from; `push_folder(checkpoint, repo, "
            "checkpoint_name='last-checkpoint')` puts one there. To train its imitator further from its weights "
            "alone, give its id as `model`."
        )
    # The very commit whose names were read; a push may have come in between.
    folder = _downloaded(repo, root.name, token, [f"{found[-1].name}/*"], None) / found[-1].name
    check_repo(folder)
    return folder


def load_causal_lm(
    folder: Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    token: str | bool | None = None,
) -> tuple[PreTrainedModel | PeftModel, Any]:
    """Load the causal LM in a folder, frozen and in evaluation mode, with its tokenizer.

    Args:
        folder (`Path`):
            Holds an adapter, whose base is loaded from where its config says, or full weights.
        device (`str` or `torch.device`, *optional*):
            Defaults to the machine's accelerator, else the CPU.
        dtype (`torch.dtype`, *optional*):
            Defaults to float32 on the CPU and to the weights' own type elsewhere.
        token (`str` or `bool`, *optional*):
            Of the Hub, for an adapter's base.

    Returns:
        `tuple`: the model, an adapter's wrapped in PEFT, with the folder's own generation config where it has one; and
        the tokenizer, the base's where the folder has none.

    Raises:
        FileNotFoundError: the folder holds neither; the message says what was found.
        ValueError: the weights are those of another kind of model or do not fit it, or an adapter names no base.
        UnsafeRepoError: the base could harm whoever loads it, is itself an adapter, or would hold more than is stored.
    """
    device = torch.device(device) if device is not None else _default_device()
    loading = {"dtype": dtype or (torch.float32 if device.type == "cpu" else "auto"), "token": token}
    model, tokenizer = _load(folder, loading)
    return model.to(device).eval().requires_grad_(False), tokenizer


def holds_adapter(repo: str, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether a local folder or Hub repo holds an adapter.

    Raises:
        OSError: there is no such repo, or it may not be read.
    """
    return find_adapter_config_file(repo, revision=revision, token=token) is not None


def holds_safetensors(repo: str) -> bool:
    """Whether the weights that were loaded from a local folder or Hub repo can be read without pickle; `True` where
    none are found."""
    try:
        folder = Path(repo) if Path(repo).is_dir() else Path(snapshot_download(repo, local_files_only=True))
    except (ValueError, FileNotFoundError):  # not in the cache
        return True
    return any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))


def load_to_train(repo: str, revision: str | None = None, **loading: Any) -> tuple[PeftModel, Any]:
    """Load an adapter to train it further, its base as it is used: frozen, read before it is loaded, no code run.

    Args:
        repo (`str`):
            Local folder or Hub id with an adapter.
        revision (`str`, *optional*):
            Of the repo; its adapter says which one of the base.
        loading (`Any`):
            How the base is loaded, as [`~transformers.AutoModelForCausalLM`] takes it; in float32 by default. A
            `token` is that of the repo, too.

    Returns:
        `tuple`: the adapter on its base, and the tokenizer, as of [`load_causal_lm`].

    Raises:
        FileNotFoundError, ValueError, UnsafeRepoError: as [`load_causal_lm`].
    """
    return _load(
        repo_folder(repo, revision, loading.get("token")), {"dtype": torch.float32, **loading}, is_trainable=True
    )


def _load(folder: Path, loading: dict[str, Any], is_trainable: bool = False) -> tuple[Any, Any]:
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    if (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file():
        base_source, base_files = _base_of_adapter(folder, loading.get("token"))
        base = _load_complete(base_source, loading, base_files)
        if (folder / "generation_config.json").is_file():
            base.generation_config = GenerationConfig.from_pretrained(str(folder))
        model: PreTrainedModel | PeftModel = _with_adapter(base, folder, is_trainable)
        if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            source = base_source
    elif (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        check_no_adapter(folder)
        model = _load_complete(source, loading, folder)
    else:
        found = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        raise FileNotFoundError(
            f"`{folder}` holds no causal LM. Needed: `adapter_config.json` with `adapter_model.safetensors`, or "
            f"`config.json` with safetensors weights. Found: {found[:20] or 'nothing'}."
        )
    return model, AutoTokenizer.from_pretrained(**source, trust_remote_code=False)


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _base_of_adapter(folder: Path, token: str | bool | None) -> tuple[dict[str, Any], Path]:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"`adapter_config.json` in {folder} is none that PEFT can read ({type(error).__name__}): `peft_type` or "
            "another field is not known to it. Update PEFT, or download the repo again."
        ) from error
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"`{folder}` holds an adapter for the task {config.task_type}, not a causal LM's. A distinguisher is "
            "loaded by `Distinguisher.from_pretrained`."
        )
    if not config.base_model_name_or_path:
        raise ValueError(
            f"`{folder}` holds an adapter whose `adapter_config.json` names no base. Load the base yourself and use "
            "`Imitator(PeftModel.from_pretrained(base, folder), tokenizer)`."
        )
    name = config.base_model_name_or_path
    files, revision = base_folder(name, config.revision or "main", token)
    return {"pretrained_model_name_or_path": name, "revision": revision, "token": token}, files


def _with_adapter(base: PreTrainedModel, folder: Path, is_trainable: bool = False) -> PeftModel:
    with safe_open(folder / ADAPTER_FILE, framework="pt") as stored:
        names = set(stored.keys())
        if not all(bool(stored.get_tensor(name).isfinite().all()) for name in names):
            raise ValueError(
                f"{ADAPTER_FILE} in {folder} holds numbers that are not finite. Save or download it again."
            )
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
    except (RuntimeError, KeyError) as error:  # sizes that do not fit; a kind of adapter that PEFT does not know
        raise ValueError(
            f"The adapter in {folder} does not fit its base ({type(error).__name__}). Load it with the base that it "
            "was trained on, as its `adapter_config.json` names it."
        ) from error
    # PEFT only warns where weights are missing, and what it leaves out would answer as the base does.
    missing = sorted(set(get_peft_model_state_dict(model, save_embedding_layers=False)) - names)
    if missing:
        raise ValueError(
            f"{ADAPTER_FILE} in {folder} lacks {len(missing)} weights that its `adapter_config.json` speaks of, among "
            f"them {missing[0]}. Save or download it again."
        )
    return model


def _load_complete(source: dict[str, Any], loading: dict[str, Any], folder: Path) -> PreTrainedModel:
    check_model_config(PretrainedConfig.get_config_dict(str(folder))[0])
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    check_model_size(config, AutoModelForCausalLM, folder)
    safely = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    with naming_what_does_not_fit(source["pretrained_model_name_or_path"]):
        model, info = AutoModelForCausalLM.from_pretrained(**{**loading, **source, **safely})
    if info["missing_keys"]:
        raise ValueError(
            f"`{source['pretrained_model_name_or_path']}` is no complete {type(model).__name__}: "
            f"{len(info['missing_keys'])} weights are missing, among them {min(info['missing_keys'])}, and would be "
            "random. Give a model that was saved as a causal LM."
        )
    return model
