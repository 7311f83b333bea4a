"""An adapter added to its base's weights for as long as answers are drawn."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer


@contextlib.contextmanager
def merged_adapter(model: Any) -> Iterator[None]:
    """Inside, the active LoRA adapter is part of the weights; afterwards every weight is what it was, to the last bit.

    A token's forward is mostly overhead, and an adapter of its own triples the layers: drawing took 1.3 times as long
    (6 layers, one CPU core). The law is the same but for rounding, so weights that are not fp32 stay as they are: a
    small adapter would vanish in them. So do other kinds of adapters, weights that are shared or sharded, and weights
    on an accelerator, whose memory may not hold them twice.
    """
    layers = _layers(model)
    if not layers:
        yield
        return
    weights = [layer.get_base_layer().weight for layer in layers]
    kept = [weight.data for weight in weights]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            weight.data = weight.data.clone()
            layer.merge()
        yield
    finally:
        for layer, weight, own in zip(layers, weights, kept, strict=True):
            # Not `unmerge`, which would compute what was added again, to subtract it from a copy that goes.
            layer.merged_adapters.clear()
            weight.data = own


def _layers(model: Any) -> list[Any]:
    """The layers of an active LoRA adapter; none where one of them cannot be merged and put back exactly."""
    if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, LoraConfig):
        return []
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged or any(layer.lora_bias.values()) for layer in layers):
        return []  # somebody else's to put back; the base's bias would be merged into, too
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in layers]
    plain = [weight for weight in weights if _is_plain(weight)]
    ids = {id(weight) for weight in plain}
    causal_lm = model.get_base_model()
    ends = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    is_shared = any(id(end.weight) in ids for end in ends if end is not None and hasattr(end, "weight"))
    return layers if len(plain) == len(layers) and len(ids) == len(plain) and not is_shared else []


def _is_plain(weight: Any) -> bool:
    is_whole = type(weight) is torch.nn.Parameter and weight.dim() > 1 and weight.numel() > 0
    return is_whole and weight.dtype == torch.float32 and weight.device.type == "cpu"
