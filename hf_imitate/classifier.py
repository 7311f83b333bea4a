"""The parts a distinguisher is made of: a sequence classifier's body, its one-logit head, and where both are stored."""

import copy
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

HEAD_STD = 0.02  # not zero: a zero head on LoRA's zero B matrix is a saddle point


def default_peft_config() -> LoraConfig:
    """LoRA for a distinguisher that is given no configuration of its own."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)


def new_head(hidden_size: int, device: torch.device) -> nn.Linear:
    """A one-logit head with small random weights, in fp32."""
    head = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
    nn.init.normal_(head.weight, std=HEAD_STD)
    return head.to(device)


def classifier_with_body_of(model: PreTrainedModel) -> PreTrainedModel:
    """A sequence classifier around a copy of a causal LM's body; the head is the caller's to set."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    setattr(classifier, classifier.base_model_prefix, copy.deepcopy(model.base_model))
    classifier.requires_grad_(True)
    return classifier


def distinguisher_folder(repo: str | Path, revision: str | None) -> tuple[Path, Path]:
    """The folder that holds the distinguisher, and the repo's root (downloaded where `repo` is a Hub id).

    Raises:
        FileNotFoundError: there is no distinguisher.
    """
    root = Path(repo)
    if not root.is_dir():
        root = Path(snapshot_download(str(repo), revision=revision, ignore_patterns=["*.bin", "*.pt", "checkpoint-*"]))
    for folder in (root / "distinguisher", root):
        if (folder / "checks.json").exists():
            return folder, root
    raise FileNotFoundError(
        f"{repo} holds no distinguisher: neither `distinguisher/checks.json` nor `checks.json` is there. "
        "Imitators trained by AdversarialTrainer carry one."
    )
