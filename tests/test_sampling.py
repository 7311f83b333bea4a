import copy
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare, gumbel_r, kstest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_imitate import sampling
from hf_imitate.rendering import Answer, Renderer
from hf_imitate.sampling import GumbelSampler, draw_answers, generate_with, gumbel_noise, stream_key

PAD, END, VOCAB = 0, 1, 5
QUESTIONS = ["a", "b c a", "c c", "a b", "b"]


@pytest.fixture(scope="module")
def renderer():
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<end>": END, "a": 2, "b": 3, "c": 4}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Renderer(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"), [END])


def _with_uneven_law(model):
    """The model with weights large enough for laws that differ much from question to question."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.6 if parameter.dim() > 1 else 0.2))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return _with_uneven_law(Qwen3ForCausalLM(config))


@pytest.fixture
def gpt2():
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    return _with_uneven_law(GPT2LMHeadModel(config))


def exact_law(model, prompt, max_new_tokens, temperature=1.0):
    """Probability of every answer, by one unpadded forward per prefix."""
    law, open_answers = {}, {(): 1.0}
    for _ in range(max_new_tokens):
        still_open = {}
        for answer, probability in open_answers.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0, -1].double()
            for token, share in enumerate(torch.softmax(logits / temperature, dim=0).tolist()):
                (law if token == END else still_open)[(*answer, token)] = probability * share
        open_answers = still_open
    return law | open_answers


def assert_frequencies_match(draws, law):
    """Chi-square; cells are pooled by the law alone, so that each expects at least 5."""
    counts = dict.fromkeys(law, 0)
    for draw in draws:
        counts[tuple(draw.ids)] += 1
    expected = np.array([law[answer] for answer in law]) * len(draws)
    observed = np.array([counts[answer] for answer in law])
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    keep = expected > 1
    assert keep.sum() >= 8
    assert chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > 0.001


def ids_of(draws):
    return [[draw.ids for draw in of_question] for of_question in draws]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_match_the_exact_law(model, renderer, temperature):
    settings = {"num_answers": 3000, "seed": 1, "max_new_tokens": 3, "batch_size": 4000}

    draws = draw_answers(model, renderer, ["b c a", "a"], temperature=temperature, **settings)

    for question, of_question in zip(["b c a", "a"], draws, strict=True):
        prompt = renderer.prompt_ids([question])[0]
        assert_frequencies_match(of_question, exact_law(model, prompt, 3, temperature))


def test_the_test_of_frequencies_sees_another_temperature(model, renderer):
    draws = draw_answers(model, renderer, ["a"], num_answers=3000, seed=1, max_new_tokens=3, batch_size=5000)[0]

    with pytest.raises(AssertionError):
        assert_frequencies_match(draws, exact_law(model, renderer.prompt_ids(["a"])[0], 3, temperature=0.8))


def test_left_padding_leaves_the_law_of_absolute_positions_alone(gpt2, renderer):
    settings = {"num_answers": 2500, "seed": 2, "max_new_tokens": 2, "batch_size": 9000}

    draws = draw_answers(gpt2, renderer, ["a", "b c a a b c c a"], **settings)[0]  # "a" gets seven columns of padding

    assert_frequencies_match(draws, exact_law(gpt2, renderer.prompt_ids(["a"])[0], 2))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_draws_do_not_depend_on_the_batch(model, renderer, batch_size):
    settings = {"num_answers": 3, "seed": 3, "max_new_tokens": 6}
    together = ids_of(draw_answers(model, renderer, QUESTIONS, **settings))

    assert ids_of(draw_answers(model, renderer, QUESTIONS, batch_size=batch_size, **settings)) == together
    backwards = draw_answers(model, renderer, QUESTIONS[::-1], batch_size=batch_size, **settings)
    assert ids_of(backwards)[::-1] == together
    alone = [draw_answers(model, renderer, [question], batch_size=batch_size, **settings)[0] for question in QUESTIONS]
    assert ids_of(alone) == together


def test_a_later_series_continues_an_earlier_one(model, renderer):
    settings = {"seed": 3, "max_new_tokens": 8}
    whole = draw_answers(model, renderer, QUESTIONS, num_answers=5, **settings)

    first = draw_answers(model, renderer, QUESTIONS, num_answers=2, **settings)
    rest = draw_answers(model, renderer, QUESTIONS, num_answers=3, first_draw=2, **settings)

    assert [a + b for a, b in zip(first, rest, strict=True)] == whole


@pytest.mark.parametrize("change", [{"seed": 4}, {"purpose": "audit"}, {"first_draw": 50}])
def test_other_keys_give_other_draws(model, renderer, change):
    settings = {"num_answers": 50, "seed": 3, "max_new_tokens": 8}
    one = draw_answers(model, renderer, ["a"], **settings)[0]
    other = draw_answers(model, renderer, ["a"], **(settings | change))[0]

    # Independent draws agree as often as two strangers' answers do, far from always.
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 25


def test_equal_questions_get_equal_draws_and_others_do_not(model, renderer):
    draws = draw_answers(model, renderer, ["a b", "a b", "b a"], num_answers=20, seed=0, max_new_tokens=8)

    assert draws[0] == draws[1] != draws[2]


def test_each_draw_ends_at_its_end_token_or_at_the_limit(model, renderer):
    draws = draw_answers(model, renderer, QUESTIONS, num_answers=40, seed=0, max_new_tokens=4)

    ended = [draw.ids[-1] == END for of_question in draws for draw in of_question]
    assert 0 < sum(ended) < len(ended)
    for draw in (draw for of_question in draws for draw in of_question):
        assert END not in draw.ids[:-1]
        assert draw.answer.ended is (draw.ids[-1] == END)
        assert draw.answer.ended or len(draw.ids) == 4
        assert draw.answer == renderer.read(draw.ids)


def test_a_tokenizer_needs_no_pad_token(model, renderer):
    settings = {"num_answers": 20, "seed": 0, "max_new_tokens": 4}
    without_pad = copy.deepcopy(renderer)
    without_pad.tokenizer.pad_token = None
    assert without_pad.tokenizer.pad_token_id is None

    draws = draw_answers(model, without_pad, QUESTIONS, **settings)

    assert ids_of(draws) == ids_of(draw_answers(model, renderer, QUESTIONS, **settings))


@pytest.mark.parametrize("is_adapted", [False, True])
def test_the_models_generation_config_does_not_bend_the_law(model, renderer, is_adapted):
    used = copy.deepcopy(model)
    config = used.generation_config
    if is_adapted:
        used = get_peft_model(used, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    settings = {"num_answers": 20, "seed": 0, "max_new_tokens": 4}
    before = draw_answers(used, renderer, QUESTIONS, **settings)

    config.update(repetition_penalty=9.0, suppress_tokens=[2], min_new_tokens=4, do_sample=True, top_k=1)

    assert draw_answers(used, renderer, QUESTIONS, **settings) == before
    assert used.generation_config is config
    assert config.repetition_penalty == 9.0


def test_the_active_adapter_answers(model, renderer):
    torch.manual_seed(0)
    lora = LoraConfig(
        target_modules=["q_proj", "o_proj"], lora_alpha=300, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(copy.deepcopy(model), lora)
    settings = {"num_answers": 2500, "seed": 5, "max_new_tokens": 2, "batch_size": 4000}

    draws = draw_answers(adapted, renderer, ["a", "b c a"], **settings)[0]

    prompt = renderer.prompt_ids(["a"])[0]
    assert_frequencies_match(draws, exact_law(adapted, prompt, 2))
    with pytest.raises(AssertionError):
        assert_frequencies_match(draws, exact_law(model, prompt, 2))


def test_prompt_tuning_is_refused_because_peft_drops_its_positions(model, renderer):
    tuned = get_peft_model(copy.deepcopy(model), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))

    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        draw_answers(tuned, renderer, ["a"], num_answers=1, seed=0, max_new_tokens=3)


def test_drawing_leaves_the_model_and_the_random_state_alone(model, renderer):
    mixed = copy.deepcopy(model).train()
    mixed.model.layers[0].eval()
    modes = [module.training for module in mixed.modules()]
    state = torch.get_rng_state()

    draw_answers(mixed, renderer, ["a"], num_answers=2, seed=0, max_new_tokens=3)

    assert [module.training for module in mixed.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_answers_to_no_questions_are_none(model, renderer):
    assert draw_answers(model, renderer, [], num_answers=2, seed=0, max_new_tokens=3) == []


def test_nan_logits_are_an_error(model, renderer):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan

    with pytest.raises(ValueError, match="NaN"):
        draw_answers(broken, renderer, ["a"], num_answers=2, seed=0, max_new_tokens=3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("num_answers", 0), ("max_new_tokens", 0), ("batch_size", 0), ("first_draw", -1), ("temperature", 0.0)],
)
def test_a_setting_out_of_range_is_named(model, renderer, setting, value):
    settings = {"num_answers": 1, "seed": 0, "max_new_tokens": 3} | {setting: value}
    with pytest.raises(ValueError, match=f"`{setting}` is {value}"):
        draw_answers(model, renderer, ["a"], **settings)


def test_a_question_without_tokens_is_named_by_its_number(model, renderer):
    with pytest.raises(ValueError, match="first is number 1"):
        draw_answers(model, renderer, ["a", ""], num_answers=1, seed=0, max_new_tokens=3)


def philox(key, number_of_blocks):
    """Philox-4x64-10 in plain integers, from the paper; the counter starts at 1. Four numbers of 64 bits a block."""
    mask, numbers = 2**64 - 1, []
    for block in range(1, number_of_blocks + 1):
        x, k = [block, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(second >> 64) ^ x[1] ^ k[0], second & mask, (first >> 64) ^ x[3] ^ k[1], first & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        numbers += x
    return numbers


def test_the_schedule_of_keys_and_noise_is_the_documented_one():
    text = json.dumps([7, "answer", json.dumps("caf\u00e9"), 2, 0], separators=(",", ":"))
    key = hashlib.blake2b(text.encode(), digest_size=32, person=b"hf-imitate draw").digest()
    digest = hashlib.blake2b((3).to_bytes(8, "little"), digest_size=16, key=key).digest()
    uniform = [((bits >> 12) + 0.5) / 2**52 for bits in philox(int.from_bytes(digest, "little"), 3)]

    assert stream_key(7, "answer", "caf\u00e9", 2) == key
    expected = [-math.log(-math.log(number)) for number in uniform]
    np.testing.assert_allclose(gumbel_noise([key], [3], 12)[0].numpy(), expected, rtol=1e-13)


def test_every_part_of_the_key_counts():
    parts = {"seed": 1, "purpose": "a", "question": "b", "draw": 2, "candidate": 3}
    changed = [parts | change for change in ({"seed": -1}, {"purpose": "ab"}, {"question": ""}, {"draw": 3})]
    changed += [parts | {"candidate": 2}, parts | {"draw": 3, "candidate": 2}, parts | {"seed": 2, "draw": 1}]

    assert len({stream_key(**these) for these in [parts, *changed]}) == len(changed) + 1
    assert stream_key(**(parts | {"seed": np.int64(1)})) == stream_key(**parts)


def test_a_message_list_is_keyed_by_what_it_says():
    one = [{"role": "user", "content": "a"}]
    padded = [{"content": "a", "role": "user", "tool_calls": None}]

    assert stream_key(0, "answer", one, 0) == stream_key(0, "answer", padded, 0)
    assert stream_key(0, "answer", one, 0) != stream_key(0, "answer", [{"role": "user", "content": "b"}], 0)


def test_noise_is_gumbel_along_draws_positions_and_tokens():
    keys = [stream_key(0, "answer", "a", draw) for draw in range(2000)]
    along_draws = gumbel_noise(keys, [0] * 2000, 1)[:, 0]
    along_positions = gumbel_noise(keys[:1] * 2000, range(2000), 1)[:, 0]
    along_tokens = gumbel_noise(keys[:1], [0], 2000)[0]

    for noise in (along_draws, along_positions, along_tokens):
        assert kstest(noise.numpy(), gumbel_r.cdf).pvalue > 0.001
    correlations = np.corrcoef([along_draws, along_positions, along_tokens])
    assert np.abs(correlations - np.eye(3)).max() < 0.08


def test_noise_does_not_depend_on_what_else_is_computed(monkeypatch):
    keys = [stream_key(0, "answer", "a", draw) for draw in range(5)]
    together = gumbel_noise(keys, [4, 3, 2, 1, 0], 50)

    one_by_one = torch.cat([gumbel_noise([key], [4 - row], 70)[:, :50] for row, key in enumerate(keys)])
    monkeypatch.setattr(sampling, "_THREADS_PAY", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    on_threads = gumbel_noise(keys, [4, 3, 2, 1, 0], 50)

    assert torch.equal(together, one_by_one)
    assert torch.equal(together, on_threads)


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_the_most_extreme_noise_is_finite(monkeypatch, bits):
    class Extreme:
        def __init__(self, key, counter):
            self.state = {"state": {}}

        def random_raw(self, size):
            return np.full(size, bits, dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Extreme)

    noise = gumbel_noise([bytes(32)], [0], 3)

    assert noise.tolist() == [[-math.log(53 * math.log(2)) if bits == 0 else pytest.approx(53 * math.log(2))] * 3]


class Forbid(LogitsProcessor):
    """Masks some tokens, as a processor before the sampler may."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor(self.tokens), -torch.inf)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_sampler_keeps_the_winner_of_each_row_and_knows_its_log_prob(temperature):
    keys = [stream_key(0, "answer", "a", draw) for draw in range(40)]
    scores = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0))
    sampler = GumbelSampler(keys, prompt_length=2, temperature=temperature)

    kept = sampler(torch.zeros(40, 5, dtype=torch.long), scores)

    law = np.exp(scores.double().numpy() / temperature)
    law /= law.sum(axis=1, keepdims=True)
    winners = (np.log(law) + gumbel_noise(keys, [3] * 40, VOCAB).numpy()).argmax(axis=1)
    assert kept.isfinite().sum(dim=1).tolist() == [1] * 40
    assert kept.argmax(dim=1).tolist() == winners.tolist()
    assert len(set(winners)) == VOCAB
    np.testing.assert_allclose(sampler.log_prob, np.log(law[range(40), winners]), rtol=1e-12)


def test_what_an_earlier_processor_masks_is_never_drawn_and_has_no_share(model):
    """Half the rows of a batch, so that a mask which is not renormalised would show in log_prob."""
    prompt = torch.tensor([[2, 3]]).expand(2000, -1)
    sampler = GumbelSampler([stream_key(0, "thought", "a", draw) for draw in range(2000)], prompt_length=2)

    processors = LogitsProcessorList([Forbid([PAD, END]), sampler])
    drawn = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False, logits_processor=processors
    )[:, 2:]

    first = model(prompt[:1]).logits[0, -1].double()
    expected = torch.softmax(first[2:], dim=0).detach()
    assert drawn.min() == 2
    counts = torch.bincount(drawn[:, 0], minlength=VOCAB)[2:]
    assert chisquare(counts.numpy(), (expected * 2000).numpy()).pvalue > 0.001
    torch.testing.assert_close(sampler.token_log_probs[:, 0], expected.log()[drawn[:, 0] - 2], atol=1e-5, rtol=0)
    assert sampler.token_log_probs.shape == (2000, 2)
    torch.testing.assert_close(sampler.log_prob, sampler.token_log_probs.sum(dim=1))


def test_log_prob_is_that_of_the_exact_law_and_stops_at_the_end(model, renderer):
    prompts = renderer.prompt_ids(["b c a", "a"] * 20)
    keys = [stream_key(0, "answer", "a", draw) for draw in range(40)]
    sampler = GumbelSampler(keys, prompt_length=3, temperature=0.8, end_token_ids=[END])

    drawn = generate_with(sampler, model, renderer, prompts, max_new_tokens=4)

    laws = [exact_law(model, prompts[row], 4, 0.8) for row in (0, 1)]
    expected = [math.log(laws[row % 2][tuple(ids)]) for row, ids in enumerate(drawn)]
    np.testing.assert_allclose(sampler.log_prob, expected, atol=1e-4)
    lengths = [len(ids) for ids in drawn]
    assert (sampler.token_log_probs != 0).sum(dim=1).tolist() == lengths
    assert min(lengths) < max(lengths) == 4
    assert sampler.open_rows == [row for row, ids in enumerate(drawn) if END not in ids]


def test_no_noise_is_made_for_rows_that_have_ended(model, renderer, monkeypatch):
    made = []
    monkeypatch.setattr(sampling, "gumbel_noise", lambda *given: made.append(len(given[0])) or gumbel_noise(*given))

    draws = draw_answers(model, renderer, QUESTIONS, num_answers=10, seed=0, max_new_tokens=6)

    assert sum(made) == sum(len(draw.ids) for of_question in draws for draw in of_question)


def test_scores_that_are_no_law_are_an_error():
    sampler = GumbelSampler([bytes(32)] * 2, prompt_length=1)
    scores = torch.stack([torch.zeros(VOCAB), torch.full((VOCAB,), -torch.inf)])

    with pytest.raises(ValueError, match="-inf for every token"):
        sampler(torch.zeros(2, 1, dtype=torch.long), scores)


def test_a_row_without_a_key_of_its_own_is_an_error():
    with pytest.raises(ValueError, match="1 keys and 2 rows"):
        GumbelSampler([bytes(32)], prompt_length=1)(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, VOCAB))


def test_a_cut_answer_is_read_as_cut(model, renderer):
    draws = draw_answers(model, renderer, ["a"], num_answers=50, seed=0, max_new_tokens=1)[0]

    assert Answer("", True) in [draw.answer for draw in draws]
    assert {len(draw.ids) for draw in draws} == {1}
    assert any(not draw.answer.ended for draw in draws)
