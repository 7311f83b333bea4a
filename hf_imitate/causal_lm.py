"""Load a causal LM and its tokenizer from a folder or the Hub, adapter or full weights, without running its code."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

# Weights in other formats, training states and checkpoints are never read, so they are not downloaded either.
_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "checkpoint-*"]


def repo_folder(repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a repo, downloaded where `repo` is a Hub id.

    Raises:
        FileNotFoundError: `repo` is no local folder and cannot be had from the Hub.
    """
    if Path(repo).is_dir():
        return Path(repo)
    try:
        return Path(snapshot_download(str(repo), revision=revision, ignore_patterns=_NOT_NEEDED))
    except (ValueError, FileNotFoundError) as error:  # no repo id at all; not in the cache and no network
        raise FileNotFoundError(
            f"`{repo}` is neither a local folder nor a Hub repo that can be reached from here. Check its spelling; "
            "without a network, give a local folder or a repo that is in the cache."
        ) from error


def load_causal_lm(
    folder: Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel | PeftModel, Any]:
    """Load the causal LM in a folder, frozen and in evaluation mode, with its tokenizer.

    Args:
        folder (`Path`):
            Holds an adapter, whose base is loaded from where its config says, or full weights.
        device (`str` or `torch.device`, *optional*):
            Defaults to the machine's accelerator, else the CPU.
        dtype (`torch.dtype`, *optional*):
            Defaults to float32 on the CPU and to the weights' own type elsewhere.

    Returns:
        `tuple`: the model, an adapter's wrapped in PEFT, with the folder's own generation config where it has one; and
        the tokenizer, the base's where the folder has none.

    Raises:
        FileNotFoundError: the folder holds neither; the message says what was found.
        ValueError: the weights are those of another kind of model, or an adapter names no base.
    """
    device = torch.device(device) if device is not None else _default_device()
    loading = {"dtype": dtype or (torch.float32 if device.type == "cpu" else "auto")}
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    if (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file():
        base_source = _base_of_adapter(folder)
        base = _load_complete(base_source, loading)
        if (folder / "generation_config.json").is_file():
            base.generation_config = GenerationConfig.from_pretrained(str(folder))
        model = PeftModel.from_pretrained(base, str(folder))
        if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            source = base_source
    elif (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        model = _load_complete(source, loading)
    else:
        found = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        raise FileNotFoundError(
            f"`{folder}` holds no causal LM. Needed: `adapter_config.json` with `adapter_model.safetensors`, or "
            f"`config.json` with safetensors weights. Found: {found[:20] or 'nothing'}."
        )
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    return model.to(device).eval().requires_grad_(False), tokenizer


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _base_of_adapter(folder: Path) -> dict[str, Any]:
    config = PeftConfig.from_pretrained(str(folder))
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
    return {"pretrained_model_name_or_path": config.base_model_name_or_path, "revision": config.revision or "main"}


def _load_complete(source: dict[str, Any], loading: dict[str, Any]) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        **source, **loading, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"`{source['pretrained_model_name_or_path']}` is no complete {type(model).__name__}: "
            f"{len(info['missing_keys'])} weights are missing, among them {min(info['missing_keys'])}, and would be "
            "random. Give a model that was saved as a causal LM."
        )
    return model
