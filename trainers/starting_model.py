"""The model a run starts from: one that can be trained, or the id or folder of one, also of an adapter."""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, SFTConfig

from hf_imitate.causal_lm import holds_adapter, holds_safetensors, load_to_train
from hf_imitate.distinguisher import ADAPTER_NAME

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def starting_model(
    trainer: Any,
    model: str | PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase | None,
    args: GRPOConfig | SFTConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    is_frozen: bool = False,
) -> Iterator[dict[str, Any]]:
    """Check a trainer's model; of a repo with an adapter, load base, adapter and tokenizer, the adapter to go on with.

    Args:
        trainer: notes as `started_from` which adapter it goes on with; nothing, else.
        model, processing_class, args, peft_config, quantization_config: as the trainer got them.
        is_frozen: whether the imitator stays as it is, so that nothing of it has to be trainable.

    Yields:
        `dict`: those of the arguments that TRL's trainer is given, `args` excepted.

    Raises:
        ValueError: the model could not be trained, saved or told from its second model, or an adapter comes with a
            `peft_config`.
        FileNotFoundError, UnsafeRepoError: as [`~hf_imitate.causal_lm.load_to_train`].
    """
    given = {
        "processing_class": processing_class,
        # PEFT writes this model's layers into it, and those of a second model may have other names.
        "peft_config": copy.deepcopy(peft_config),
        "quantization_config": quantization_config,
    }
    loading = dict(args.model_init_kwargs or {})
    if not isinstance(model, str) or not holds_adapter(model, loading.get("revision"), loading.get("token")):
        check_model(model, is_frozen or peft_config is not None)
        yield {"model": model, **given}
        if isinstance(model, str) and not holds_safetensors(model):
            logger.warning(
                "`model` %r holds its weights as pickles alone, which hf-imitate never reads: an adapter on it, the "
                "imitator's or a distinguisher's, will not be loaded by `from_pretrained`. Save it once as "
                "safetensors (`save_pretrained` does), and train from that.",
                model,
            )
        return
    if peft_config is not None:
        raise ValueError(
            f"`model` {model!r} holds an adapter, which is trained further, and `peft_config` asks for a new one. "
            "Leave out `peft_config`; or make plain weights of its folder, `hf-imitate card FOLDER --merge DIR`, and "
            "give DIR as `model`."
        )
    if quantization_config is not None:
        loading["quantization_config"] = quantization_config
    loaded, tokenizer = load_to_train(model, **loading)
    trainer.started_from = model
    given |= {"processing_class": processing_class or tokenizer, "quantization_config": None}
    # TRL says of a model that is there already that these were ignored.
    kept, args.model_init_kwargs = args.model_init_kwargs, None
    try:
        yield {"model": loaded, **given}
    finally:
        args.model_init_kwargs = kept


def check_model(model: Any, is_frozen: bool = False) -> None:
    """Check the imitator's model before anything is changed.

    Args:
        model: a model; a string is not looked at.
        is_frozen: whether nothing of it has to be trainable, as where it gets a new adapter.

    Raises:
        ValueError: nothing of it is trainable; or its adapter could not be saved, or told from the distinguisher's.
    """
    if isinstance(model, nn.Module) and not (is_frozen or any(p.requires_grad for p in model.parameters())):
        more = "" if isinstance(model, PeftModel) else ", give a `peft_config`, or call `model.requires_grad_(True)`"
        raise ValueError(
            f"No parameter of the {type(model).__name__} is trainable; an Imitator's `model` is frozen like that. "
            "Give the repo id or folder itself as `model`, load an adapter by `AutoPeftModelForCausalLM."
            f"from_pretrained(path, is_trainable=True)`{more}."
        )
    if not isinstance(model, PeftModel):
        return
    if model.active_adapter != "default":
        raise ValueError(
            f"The PeftModel's active adapter is {model.active_adapter!r}; the imitator is saved from the one called "
            "'default'. Load it under that name, `PeftModel.from_pretrained(base, path, is_trainable=True)`."
        )
    if ADAPTER_NAME in model.peft_config:
        raise ValueError(
            f"The PeftModel already carries an adapter '{ADAPTER_NAME}', perhaps of an earlier run. Remove it by "
            f"`model.delete_adapter('{ADAPTER_NAME}')`, or go on with that run by "
            "`trainer.train(resume_from_checkpoint=True)`."
        )
