"""The tiny base: trained in seconds on a little text, whole or absent, found again by its content."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_imitate.docstrings import load_docstrings, load_prose
from hf_imitate.tiny_base import (
    NUM_RESERVED,
    RESERVED_TOKENS,
    _learning_rate_factor,
    _Recipe,
    _Threads,
    tiny_base,
)

# Its steps are limited by the text, not by the clock, so the results are the same on a busy machine.
SMALL = _Recipe(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    batch_size=4,
    learning_rate=1e-2,
    max_epochs=2.0,
)
ENDLESS = replace(SMALL, max_epochs=1e6)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    packages = ["json", "logging"]
    return load_prose(load_docstrings(packages), packages)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def build(texts, cache, **settings):
    settings = {"max_seconds": 60.0, "progress": False, "_recipe": SMALL, **settings}
    return tiny_base(cache, _prose=texts, **settings)


@pytest.fixture(scope="module")
def base(texts, cache):
    return build(texts, cache)


def load(path):
    return (
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False),
        AutoTokenizer.from_pretrained(path, trust_remote_code=False),
    )


def facts(path) -> dict:
    return json.loads((path / "base.json").read_text())


def nats_per_byte(model, tokenizer, text: str) -> float:
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        log_p = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None]).sum().item() / len(text.encode())


def test_it_keeps_to_its_time(texts, tmp_path):
    """Sized by the clock: all of the time but the margin is used, none beyond it."""
    started = time.monotonic()
    path = build(texts, tmp_path, max_seconds=6.0, _recipe=ENDLESS)
    assert 3 < facts(path)["seconds"] < time.monotonic() - started < 6


def test_the_fastest_number_of_threads_is_chosen():
    threads, tried = _Threads(4), []
    for _ in range(20):
        tried.append(threads.current)
        threads.record({1: 1.0, 2: 0.5, 4: 0.7}[threads.current])
    assert tried == [1] * 4 + [2] * 4 + [4] * 4 + [2] * 8


def test_threads_that_hinder_each_other_are_given_up_after_one_step():
    threads, tried = _Threads(2), []
    for _ in range(8):
        tried.append(threads.current)
        threads.record({1: 0.1, 2: 2.0}[threads.current])
    assert tried == [1] * 4 + [2] + [1] * 3
    threads.probe()
    assert threads.current == 1


def test_the_learning_rate_rises_and_falls_to_nothing():
    factors = [_learning_rate_factor(done / 100, 0.05) for done in range(101)]
    assert max(factors) == pytest.approx(1) == pytest.approx(factors[5])
    assert factors[:6] == sorted(factors[:6])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[0] > 0 == pytest.approx(factors[-1])


def test_it_loads_with_the_law_it_was_trained_on(base):
    model, tokenizer = load(base)
    law = model.generation_config
    assert (law.do_sample, law.temperature, law.top_p, law.top_k) == (True, 1.0, 1.0, 0)
    assert (law.eos_token_id, law.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512
    assert model.config.vocab_size == len(tokenizer) == 400
    assert model.dtype == torch.float32
    assert {file.suffix for file in base.iterdir()} == {".json", ".safetensors"}


def test_eight_reserved_ids_are_single_tokens_that_text_never_uses(base):
    _, tokenizer = load(base)
    ids = tokenizer.convert_tokens_to_ids(list(RESERVED_TOKENS))
    assert len(set(ids)) == NUM_RESERVED == 8
    assert [tokenizer.decode([number]) for number in ids] == list(RESERVED_TOKENS)
    assert not set(ids) & set(tokenizer("reserved_0 <|reserved|>")["input_ids"])


@pytest.mark.parametrize("text", ["Return the name.", "  naïve\t日本\n\n🦆 ", "def f(a, *b):\n", "\x7f\u200b"])
def test_any_text_survives_the_tokenizer(base, text):
    _, tokenizer = load(base)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None


def test_it_has_learned_from_the_prose(base):
    """Far below an untrained model (the logarithm of the vocabulary per token), on text it has not seen."""
    model, tokenizer = load(base)
    text = "Return the name of the file if it is not None, else raise an error."
    untrained = AutoModelForCausalLM.from_config(model.config).eval()
    before, after = nats_per_byte(untrained, tokenizer, text), nats_per_byte(model, tokenizer, text)
    assert before == pytest.approx(math.log(400) * len(tokenizer(text)["input_ids"]) / len(text), rel=0.2)
    assert after < 0.8 * before


def test_the_written_bits_per_byte_are_those_of_the_loaded_model(texts, base):
    """Recomputed by the definition: the held-out texts in one row, end tokens between them, rows of 128."""
    heldout = [t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:4]) < 0.02 * 2**32]
    model, tokenizer = load(base)
    ids = tokenizer("<|endoftext|>" + "".join(f"{text}<|endoftext|>" for text in heldout))["input_ids"]
    nats = 0.0
    for start in range(0, len(ids) - 1, 128):
        row = torch.tensor([ids[start : start + 129]])
        nats += model(input_ids=row, labels=row).loss.item() * (row.numel() - 1)
    num_bytes = sum(len(text.encode()) for text in heldout)
    assert facts(base)["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)
    assert facts(base)["heldout"] == {"num_texts": len(heldout), "num_tokens": len(ids), "num_bytes": num_bytes}


def test_a_second_call_returns_the_same_base_at_once(texts, cache, base):
    written = (base / "model.safetensors").stat().st_mtime_ns
    started = time.monotonic()
    assert build(texts, cache) == base
    assert time.monotonic() - started < 1
    assert (base / "model.safetensors").stat().st_mtime_ns == written


def test_the_name_follows_from_text_recipe_time_and_seed(texts, tmp_path):
    changes = [{}, {}, {"seed": 1}, {"max_seconds": 50.0}, {"texts": texts[:21]}]
    names = []
    for number, change in enumerate(changes):
        settings = {"texts": texts[:20], **change}
        names.append(build(cache=tmp_path / str(number), **settings).name)
    assert names[0] == names[1]
    assert len(set(names)) == 4


def test_equal_steps_give_equal_weights(texts, tmp_path):
    """With the steps limited by the text, the seed decides; the clock moves the first learning rate alone, by 1e-5."""
    recipe = replace(SMALL, max_epochs=0.2)
    weights = [
        load(build(texts, tmp_path / str(number), seed=seed, _recipe=recipe))[0].state_dict()
        for number, seed in enumerate([0, 0, 1])
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=0)
    assert not torch.allclose(weights[0][name], weights[2][name], atol=1e-3)


def test_the_callers_random_state_and_threads_are_left_alone(texts, tmp_path):
    num_threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    build(texts[:20], tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == num_threads


def test_a_killed_build_leaves_no_half_model(texts, tmp_path):
    """Killed in the middle of saving: nothing looks like a base, the next call works and removes what was left."""
    (tmp_path / "texts.json").write_text(json.dumps(texts[:20]))
    program = """if True:
        import json, os, pathlib, signal, sys
        from transformers import PreTrainedTokenizerFast
        from hf_imitate import tiny_base
        folder = pathlib.Path(sys.argv[1])
        # The weights are written, the tokenizer is not.
        PreTrainedTokenizerFast.save_pretrained = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        recipe = tiny_base._Recipe(vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=1, max_epochs=0.1)
        texts = json.loads((folder / "texts.json").read_text())
        tiny_base.tiny_base(folder / "cache", progress=False, _prose=texts, _recipe=recipe)
    """
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    [left] = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".")
    assert [file.suffix for file in left.glob("model.*")] == [".safetensors"]
    assert not list((tmp_path / "cache").glob("tiny-base-*"))
    build(texts[:20], tmp_path / "cache")
    assert left.exists()  # young enough to belong to a build that is under way
    os.utime(left, (0, 0))
    build(texts[:21], tmp_path / "cache")
    assert not left.exists()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_base_is_built_anew(texts, tmp_path):
    path = build(texts[:20], tmp_path)
    weights = path / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:100])
    assert build(texts[:20], tmp_path) == path
    assert weights.stat().st_size == size
    load(path)


def test_a_base_that_another_process_published_first_is_used(texts, tmp_path):
    from hf_imitate.tiny_base import _publish

    path = build(texts[:20], tmp_path)
    written = (path / "model.safetensors").stat().st_mtime_ns
    model, tokenizer = load(path)
    assert _publish(model, tokenizer, {}, path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_folder_may_be_named_by_the_environment(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_IMITATE_CACHE", str(tmp_path / "named"))
    assert build(texts[:20], None).parent == tmp_path / "named"


def test_progress_prints_bits_per_byte_parameters_tokens_and_seconds(texts, tmp_path, capsys):
    path = build(texts[:20], tmp_path, progress=True)
    printed = capsys.readouterr()
    told = facts(path)
    for words in (f"{told['bits_per_byte']:.3f} bits per byte", f"{told['num_parameters']:,} parameters", " tokens, "):
        assert words in printed.out
    assert "left" in printed.err


@pytest.mark.parametrize("max_seconds", [0, -1.0, float("nan")])
def test_no_time_is_an_error(max_seconds, tmp_path):
    with pytest.raises(ValueError, match="`max_seconds` is"):
        tiny_base(tmp_path, max_seconds=max_seconds)


def test_too_little_time_to_train_is_an_error_that_says_how_much(texts, tmp_path):
    with pytest.raises(ValueError, match=r"reading the prose took .* Give at least"):
        build(texts, tmp_path, max_seconds=0.01)
    assert list(tmp_path.iterdir()) == []


def test_the_default_recipe_has_one_to_three_million_parameters():
    from transformers import Qwen3ForCausalLM

    from hf_imitate.tiny_base import _new_config

    recipe = _Recipe()
    with torch.device("meta"):
        model = Qwen3ForCausalLM(_new_config(recipe.vocab_size, 0, 1, recipe))
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3e6
