"""What every test shares: a quiet, offline environment and two tiny models on disk."""

import os

# The Hugging Face libraries read these when they are imported, so they are set before any test imports one.
# `HF_HUB_OFFLINE` alone may come from outside: a test of pushes runs a subprocess against its own loopback server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CI"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")
# Also for what tests start: two threads that wait for each other on busy cores take ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path
from typing import Any

import pytest

NUM_RESERVED = 8

# A shortened ChatML: what precedes the answer is the generation prompt, what ends it is the end token alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Enough text for a few merges, so that some tokens are longer than one byte.
_MERGE_TEXT = ["Return the number of items in the list.", "Set the name of the file and return it."] * 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep torch to one thread: on models this small, threads that wait for each other cost more than they compute.

    With both cores busy, sixty steps of the tiny model take 0.5 s on one thread and 9 to 42 s on two. A test that
    needs no torch does not load it.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _save_tiny_model(path: Path, eos_token: str, chat_template: str | None) -> Path:
    """Write a random two-layer Qwen3 with a byte-level BPE tokenizer of 300 ids; seed 0, no network."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special_tokens = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    special_tokens += [f"<|reserved_{number}|>" for number in range(NUM_RESERVED)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_MERGE_TEXT, trainer)
    names: dict[str, Any] = {"eos_token": eos_token, "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain causal LM without a chat template; its end token is `<|endoftext|>`. Read-only."""
    return _save_tiny_model(tmp_path_factory.mktemp("tiny_model"), "<|endoftext|>", None)


@pytest.fixture(scope="session")
def tiny_chat_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a ChatML template; its end token is `<|im_end|>`. Read-only."""
    return _save_tiny_model(tmp_path_factory.mktemp("tiny_chat_model"), "<|im_end|>", CHAT_TEMPLATE)
