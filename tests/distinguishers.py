"""Small distinguishers of every kind that can be saved, on the tiny model of conftest.py."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_imitate.distinguisher import Distinguisher
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer

QUESTIONS = ["Return the number", "list", "Set the name of the file and return it, please", "q"]
ANSWERS = [
    Answer("of items", True),
    Answer("of items", False),
    Answer("caf\u00e9 <|endoftext|>", True),
    Answer("", True),
]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.3)
KINDS = ["shared", "adapter", "full", "nameless adapter", "nameless shared"]


def is_short(prompts, completions, completion_ids=None, **columns):
    """Applies to every answer."""
    return [len(text) < 5 for text in completions]


def is_wanted(prompts, completions, completion_ids=None, *, wanted, **columns):
    """Applies where the row says what is wanted."""
    return [None if want is None else text == want for text, want in zip(completions, wanted, strict=True)]


def causal_lm(path):
    """The tiny model in fp32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def imitator_model(path):
    """An imitator with an adapter that is not the identity."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(causal_lm(path), config)


def trained(distinguisher):
    """Away from its start, so that adapter, head and check weights all matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in distinguisher.trainable_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        distinguisher.check_weights += torch.arange(1.0, 1 + len(distinguisher.check_weights))
    return distinguisher


def make(kind, path, tokenizer, **kwargs):
    """A distinguisher of each kind that can be saved."""
    if kind == "shared":
        model = imitator_model(path)
        return trained(Distinguisher.on_shared_base(model, tokenizer, LORA, **kwargs))
    if kind == "adapter":
        return trained(Distinguisher.from_causal_lm(str(path), tokenizer, peft_config=LORA, **kwargs))
    if kind == "full":
        return trained(Distinguisher.from_causal_lm(causal_lm(path), tokenizer, **kwargs))
    if kind == "nameless adapter":
        model = causal_lm(path)
        model.name_or_path = model.config._name_or_path = ""
        return trained(Distinguisher.from_causal_lm(model, tokenizer, peft_config=LORA, **kwargs))
    model = imitator_model(path)
    model.peft_config["default"].base_model_name_or_path = ""
    return trained(Distinguisher.on_shared_base(model, tokenizer, LORA, **kwargs))


def marked_pairs(num):
    """Humans end with a mark that imitators never use."""
    words = ["the list", "a name", "it", "the number of items"]
    return [
        Pair(f"q{i % 5}", Answer(words[i % 4] + " xx", True), (Answer(words[(i + 1) % 4] + " yy", True),))
        for i in range(num)
    ]
