"""A stored distinguisher, whatever its kind: a model, n-grams, or several of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer

from hf_imitate.checks import Check
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.distinguisher_ensemble import DistinguisherEnsemble
from hf_imitate.distinguisher_files import (
    ENSEMBLE,
    NGRAM,
    can_share,
    distinguisher_folder,
    load_model,
    load_shared_adapter,
    read_settings,
)
from hf_imitate.ngram_distinguisher import NgramDistinguisher


def load_distinguisher(
    repo: str | Path,
    checks: Sequence[Check] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    revision: str | None,
    base: PeftModel | None,
    token: str | bool | None,
) -> Distinguisher:
    """See [`Distinguisher.from_pretrained`]."""
    folder, root = distinguisher_folder(repo, revision, token)
    stored = read_settings(folder)
    if stored.get("kind") == ENSEMBLE:
        members: list[Distinguisher] = []
        for i in range(stored["num_members"]):
            # One adapter finds room on the imitator's base.
            is_taken = any(member.adapter_name is not None for member in members)
            members.append(_one(folder / str(i), root, device, dtype, None if is_taken else base, token))
        distinguisher: Distinguisher = DistinguisherEnsemble(members, check_weights=stored["checks"])
    else:
        distinguisher = _one(folder, root, device, dtype, base, token)
    if checks:
        distinguisher.set_checks(checks)
    return distinguisher


def _one(
    folder: Path,
    root: Path,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    base: PeftModel | None,
    token: str | bool | None,
) -> Distinguisher:
    """A distinguisher of a single model."""
    stored = read_settings(folder)
    tokenizer_folder = folder if (folder / "tokenizer_config.json").is_file() else root
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), trust_remote_code=False)
    settings: dict[str, Any] = {
        "check_weights": stored["checks"],
        "max_answer_tokens": stored["max_answer_tokens"],
        "chat_template_kwargs": stored["chat_template_kwargs"],
        "end_ids": stored["end_token_ids"],
        "completion_role": stored.get("completion_role", "assistant"),
    }
    if stored.get("kind") == NGRAM:
        ngram = NgramDistinguisher.load(folder, tokenizer, settings)
        ngram.move(device)
        return ngram
    if base is not None and can_share(base, folder):
        config = PeftConfig.from_pretrained(str(folder))
        shared = Distinguisher.on_shared_base(base, tokenizer, config, **settings)
        load_shared_adapter(shared, folder)
        return shared
    model = load_model(folder, dtype, token)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    core.config.pad_token_id = tokenizer.pad_token_id
    return Distinguisher(model if device is None else model.to(device), tokenizer, **settings)
