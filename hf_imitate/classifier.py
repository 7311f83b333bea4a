"""The parts a distinguisher is made of: a sequence classifier's body, its one-logit head and its adapter."""

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_imitate.causal_lm import base_folder, naming_what_does_not_fit
from hf_imitate.repo_checks import check_model_config, check_model_size

HEAD_STD = 0.02  # not zero: a zero head on LoRA's zero B matrix is a saddle point


def default_peft_config() -> LoraConfig:
    """LoRA for a distinguisher that is given no configuration of its own."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)


def adapter_config(peft_config: PeftConfig, **changes: Any) -> PeftConfig:
    """A copy of an adapter's configuration for a second model: of the weights, without dropout, with `changes`.

    Raises:
        ValueError: it adapts no weights: what it puts before a text, the body alone would never read.
    """
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"A {type(peft_config).__name__} adapts no weights but puts tokens before a text: a distinguisher or "
            "retrodictor would never read them. Give it a LoraConfig, as `distinguisher_peft_config` or "
            "`retrodictor_peft_config`."
        )
    config = copy.deepcopy(peft_config)
    config.inference_mode = False
    if isinstance(config, LoraConfig):
        config.lora_dropout = 0.0
        config.alora_invocation_tokens = None  # it would look for its words in the imitator's prompts
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def new_head(hidden_size: int, device: torch.device) -> nn.Linear:
    """A one-logit head with small random weights, in fp32."""
    head = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
    nn.init.normal_(head.weight, std=HEAD_STD)
    return head.to(device)


def classifier_around(model: PreTrainedModel, copy_body: bool = False) -> PreTrainedModel:
    """A sequence classifier with one label and a new head around a causal LM's body, its own or a copy of it."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    setattr(
        classifier, classifier.base_model_prefix, copy.deepcopy(model.base_model) if copy_body else model.base_model
    )
    if getattr(classifier, "score", None) is not None:
        classifier.score = new_head(config.get_text_config().hidden_size, model.device)
    # It says which tokens end an answer; a classifier has none of its own.
    classifier.generation_config = getattr(model, "generation_config", None)
    return classifier.train(model.training)


def load_classifier(name_or_path: str, **loading: Any) -> PreTrainedModel:
    """A sequence classifier with one label: the one stored there, or a new head on the causal LM stored there."""
    body = load_body(name_or_path, **loading)
    return body if is_classifier(body) else classifier_around(body)


def load_body(name_or_path: str, **loading: Any) -> PreTrainedModel:
    """What is stored there: a sequence classifier, loaded with one label, or a causal LM.

    A causal LM is loaded as such and then given its head, since loading it as a classifier reports weights as missing.

    Raises:
        FileNotFoundError: it is neither a local folder nor a Hub repo that can be reached.
        UnsafeRepoError: one of its files could harm whoever loads it, or it is an adapter.
    """
    folder, revision = base_folder(name_or_path, loading.get("revision"), loading.get("token"))
    loading = loading | {"revision": revision, "trust_remote_code": False}
    check_model_config(PreTrainedConfig.get_config_dict(str(folder))[0])
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    if is_classifier_config(config):
        check_model_size(config, AutoModelForSequenceClassification, folder)
        with naming_what_does_not_fit(name_or_path):
            return AutoModelForSequenceClassification.from_pretrained(name_or_path, num_labels=1, **loading)
    check_model_size(config, AutoModelForCausalLM, folder)
    with naming_what_does_not_fit(name_or_path):
        return AutoModelForCausalLM.from_pretrained(name_or_path, **loading)


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether a model is a sequence classifier."""
    return type(model).__name__.endswith("ForSequenceClassification")


def is_classifier_config(config: PreTrainedConfig) -> bool:
    """Whether the weights this configuration belongs to were saved with a classifier's head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off for good: a score is the forward that trains, and the same whatever mode the model is in."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0
    return model
