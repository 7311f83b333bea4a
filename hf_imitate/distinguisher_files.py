"""Where a distinguisher is stored, and how it comes back: its adapter or weights, its head, and `checks.json`."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hf_imitate.causal_lm import repo_folder
from hf_imitate.classifier import classifier_around, load_classifier
from hf_imitate.repo_checks import check_model_size

if TYPE_CHECKING:
    from hf_imitate.distinguisher import Distinguisher

ADAPTER_FILE = "adapter_model.safetensors"
CHECKS_FILE = "checks.json"
# Kinds of a distinguisher that is no single model; a model's has none, so that folders written before have it, too.
NGRAM, ENSEMBLE = "ngram", "ensemble"
HEAD_KEY = "base_model.model.score.weight"


def distinguisher_folder(
    repo: str | Path, revision: str | None = None, token: str | bool | None = None
) -> tuple[Path, Path]:
    """The folder that holds the distinguisher, and the repo's root (downloaded where `repo` is a Hub id).

    Raises:
        FileNotFoundError: there is no such repo, or no distinguisher in it.
    """
    root = repo_folder(repo, revision, token)
    for folder in (root / "distinguisher", root):
        if (folder / CHECKS_FILE).is_file():
            return folder, root
    raise FileNotFoundError(
        f"{repo} holds no distinguisher: neither `distinguisher/{CHECKS_FILE}` nor `{CHECKS_FILE}` is there. "
        "Imitators trained by AdversarialTrainer carry one."
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """What `checks.json` holds: the weights of the checks by name, and how answers were rendered."""
    return json.loads((folder / CHECKS_FILE).read_text(encoding="utf-8"))


def write_distinguisher(distinguisher: "Distinguisher", folder: Path, with_tokenizer: bool) -> None:
    """Write adapter and head (PEFT, SEQ_CLS, one label) or full weights, and `checks.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = distinguisher.model
    if not isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
    elif not _base_name(model):
        # An adapter on a base that exists nowhere but in memory could not be loaded again.
        _merged(distinguisher).save_pretrained(str(folder))
    elif distinguisher.adapter_name is None:
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
    else:
        _write_shared_adapter(distinguisher, folder)
    if with_tokenizer:
        distinguisher.tokenizer.save_pretrained(str(folder))
    write_settings(distinguisher, folder)


def write_settings(distinguisher: "Distinguisher", folder: Path, **more: Any) -> None:
    """Write `checks.json`: the weights of the checks by name, how answers are rendered, and `more`."""
    renderer = distinguisher.renderer
    stored = {
        "version": 1,
        **more,
        "checks": dict(zip(distinguisher.check_names, distinguisher.check_weights.tolist(), strict=True)),
        "max_answer_tokens": renderer.max_answer_tokens,
        "end_token_ids": renderer.end_token_ids,
        "chat_template_kwargs": renderer.chat_template_kwargs,
        "completion_role": renderer.completion_role,
    }
    (folder / CHECKS_FILE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def load_model(
    folder: Path, dtype: torch.dtype | None = None, token: str | bool | None = None
) -> PreTrainedModel | PeftModel:
    """The classifier stored in `folder`, frozen and in evaluation mode, with its head in fp32.

    Raises:
        FileNotFoundError: the adapter's weights are not there as safetensors; no pickle is read.
        UnsafeRepoError: the adapter's base could harm whoever loads it, or a model would hold more than is stored.
    """
    loading = {"trust_remote_code": False, "use_safetensors": True, "dtype": dtype or torch.float32}
    model: PreTrainedModel | PeftModel
    if (folder / "adapter_config.json").is_file():
        _check_safetensors(folder)
        config = PeftConfig.from_pretrained(str(folder))
        loading |= {"revision": config.revision or "main", "token": token}
        base = load_classifier(config.base_model_name_or_path, **loading)
        model = PeftModel.from_pretrained(base, str(folder))
    else:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        check_model_size(config, AutoModelForSequenceClassification, folder)
        model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=1, **loading)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    core.get_submodule("score").float()
    return model.eval().requires_grad_(False)


def can_share(base: Any, folder: Path) -> bool:
    """Whether the adapter in `folder` can be put beside those of `base` and mean the same there.

    It can where both were trained on one base by LoRA, in fp32 or bf16. Some ways to begin a LoRA (PiSSA and its kin)
    change the base itself, and a quantised base rounds; then each needs a base of its own.
    """
    if not isinstance(base, PeftModel) or not (folder / "adapter_config.json").is_file():
        return False
    config, configs = PeftConfig.from_pretrained(str(folder)), list(base.peft_config.values())
    weights = {parameter.dtype for parameter in base.get_base_model().parameters()}
    return (
        (config.base_model_name_or_path or None) == _base_name(base)
        and all((other.revision or "main") == (config.revision or "main") for other in configs)
        and all(_leaves_base_alone(other) for other in (config, *configs))
        and getattr(base.get_base_model().config, "quantization_config", None) is None
        and weights <= {torch.float32, torch.bfloat16}
    )


def load_shared_adapter(distinguisher: "Distinguisher", folder: Path) -> None:
    """Fill adapter and head of a distinguisher on a shared base with what `folder` holds.

    Raises:
        ValueError: the stored weights do not fit the adapter.
    """
    _check_safetensors(folder)
    state = load_file(folder / ADAPTER_FILE)
    with torch.no_grad():
        distinguisher.head.get_parameter("weight").copy_(state.pop(HEAD_KEY))
    result = set_peft_model_state_dict(distinguisher.model, state, adapter_name=distinguisher.adapter_name)
    missing = [name for name in result.missing_keys if f".{distinguisher.adapter_name}." in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"The adapter in {folder} does not fit its base: {len(missing)} weights are missing and "
            f"{len(result.unexpected_keys)} are not known, such as {(missing + result.unexpected_keys)[0]}."
        )


def _check_safetensors(folder: Path) -> None:
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds `adapter_config.json` but no `{ADAPTER_FILE}`; no pickle is read.")


def _base_name(model: PeftModel) -> str | None:
    return model.peft_config[model.active_adapter].base_model_name_or_path or None


def _leaves_base_alone(config: PeftConfig) -> bool:
    return (
        isinstance(config, LoraConfig)
        and config.bias == "none"
        and (isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "gaussian")
    )


def _merged(distinguisher: "Distinguisher") -> PreTrainedModel:
    name = distinguisher.adapter_name
    merged = copy.deepcopy(distinguisher.model)
    if name is None:
        return merged.merge_and_unload()
    classifier = classifier_around(merged.merge_and_unload(adapter_names=[name]))
    classifier.config.pad_token_id = distinguisher.tokenizer.pad_token_id
    classifier.score = copy.deepcopy(distinguisher.head)
    return classifier


def _write_shared_adapter(distinguisher: "Distinguisher", folder: Path) -> None:
    model, name = distinguisher.model, distinguisher.adapter_name
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state[HEAD_KEY] = distinguisher.head.get_parameter("weight")
    config = copy.deepcopy(model.peft_config[name])
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], True
    config.base_model_name_or_path = _base_name(model)
    config.save_pretrained(str(folder))
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
