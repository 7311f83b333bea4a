"""A question that is read once gives the answers of one that is read for each of them."""

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_residual_imitator import make_distinguisher, tiny_tokenizer
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_imitate import prefill
from hf_imitate.imitator import Imitator
from hf_imitate.prefill import cache_name, keeps_all_keys, read_once

ENDS = {"vocab_size": 4, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 3, "initializer_range": 0.3}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **ENDS}
QUESTIONS = ["a b c " * 12, "c", "b a " * 20, "b", "a b c " * 12]


def seeded(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def qwen():
    return seeded(Qwen3ForCausalLM, Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=8))


def llama():
    return seeded(LlamaForCausalLM, LlamaConfig(**SHAPE, num_key_value_heads=1, head_dim=8))


def gpt2():
    return seeded(GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=128, **ENDS))


def windowed():
    return seeded(MistralForCausalLM, MistralConfig(**SHAPE, num_key_value_heads=1, head_dim=8, sliding_window=8))


def adapted():
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    return seeded(lambda model: get_peft_model(model, config), qwen())


def drawn(model, least, monkeypatch, batch_size=64):
    monkeypatch.setattr(prefill, "MIN_SPARED", least)
    made, real = [], prefill.read_once

    def counted(*arguments):
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr("hf_imitate.sampling.read_once", counted)
    imitator = Imitator(model, tiny_tokenizer(), distinguisher=make_distinguisher(scale=1.0), max_new_tokens=6)
    choices = imitator.residual(8).answer(QUESTIONS, num_answers=2, seed=1, batch_size=batch_size)
    ids = [[[one.ids for one in choice.candidates] for choice in own] for own in choices]
    return ids, [cache for cache in made if cache is not None]


@pytest.mark.parametrize("make", [qwen, llama, gpt2, adapted])
@pytest.mark.parametrize("batch_size", [64, 13])
def test_candidates_are_the_same_whether_or_not_their_question_is_read_once(make, batch_size, monkeypatch):
    model = make()
    apart, unused = drawn(model, 10**9, monkeypatch, batch_size)
    shared, caches = drawn(model, 1, monkeypatch, batch_size)
    assert not unused
    assert caches
    assert shared == apart
    assert len({tuple(ids) for own in shared for choice in own for ids in choice}) > 20


def test_a_layer_that_forgets_keys_reads_every_question_for_each_answer(monkeypatch):
    shared, caches = drawn(windowed(), 1, monkeypatch)
    assert not caches
    assert shared == drawn(windowed(), 10**9, monkeypatch)[0]
    assert not keeps_all_keys(windowed())
    assert keeps_all_keys(qwen())


def test_the_cache_holds_each_rows_own_question(monkeypatch):
    """Against one forward per row, without padding."""
    monkeypatch.setattr(prefill, "MIN_SPARED", 1)
    model, prompts = qwen(), [[0, 1, 2, 0], [1, 1], [0, 1, 2, 0], [1, 1]]
    ids = torch.tensor([[3] * (4 - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (4 - len(row)) + [1] * len(row) for row in prompts])
    cache = read_once(model, prompts, ids, mask)
    assert cache.get_seq_length() == 3
    for row, own in enumerate(prompts):
        alone = model(
            input_ids=torch.tensor([own[:-1]]), use_cache=True, past_key_values=DynamicCache()
        ).past_key_values
        for layer, expected in zip(cache.layers, alone.layers, strict=True):
            kept = layer.keys[row, :, 4 - len(own) :]
            torch.testing.assert_close(kept, expected.keys[0], atol=1e-5, rtol=1e-5)


def test_keys_and_values_go_by_the_name_that_the_model_has_for_them():
    """transformers 5.24 calls them `cache`, and warned of the old name whoever drew several answers to a question."""

    class Renamed:
        def forward(self, input_ids, cache=None): ...

    assert cache_name(Renamed()) == "cache"
    assert cache_name(qwen()) in inspect.signature(qwen().forward).parameters


def test_few_or_different_questions_are_read_with_their_answers():
    model, ids, mask = qwen(), torch.zeros(2, 400, dtype=torch.long), torch.ones(2, 400, dtype=torch.long)
    assert read_once(model, [[0] * 400, [0] * 400], ids, mask) is None  # 400 tokens spared
    assert read_once(model, [[0] * 400, [1] * 400], ids, mask) is None
