import copy
import hashlib
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare, kstest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate.rendering import Answer, Renderer
from hf_imitate.sampling import KeyedSampler, draw_answers, inverse_cdf, keyed_uniform, stream_key

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


def test_the_key_schedule_is_the_documented_one():
    text = json.dumps([7, "answer", json.dumps("caf\u00e9"), 2, 0], separators=(",", ":"))
    key = hashlib.blake2b(text.encode(), digest_size=32, person=b"hf-imitate draw").digest()
    digest = hashlib.blake2b((3).to_bytes(8, "little"), digest_size=8, key=key).digest()

    assert stream_key(7, "answer", "caf\u00e9", 2) == key
    assert keyed_uniform(key, 3) == (int.from_bytes(digest, "little") >> 11) / 2**53


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


def test_keyed_numbers_are_uniform_along_draws_and_along_positions():
    along_draws = [keyed_uniform(stream_key(0, "answer", "a", draw), 0) for draw in range(2000)]
    along_positions = [keyed_uniform(stream_key(0, "answer", "a", 0), position) for position in range(2000)]

    assert kstest(along_draws, "uniform").pvalue > 0.001
    assert kstest(along_positions, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(along_draws, along_positions)[0, 1]) < 0.05


def test_a_number_picks_the_token_whose_interval_holds_it():
    law = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log()
    numbers = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)

    picked = inverse_cdf(law.expand(6, -1), numbers)

    assert picked.tolist() == [0, 0, 2, 2, 3, 3]


def test_a_token_of_probability_zero_is_never_picked_first_or_last():
    law = torch.tensor([[0.0, 1.0, 0.0]]).log()

    assert inverse_cdf(law.expand(2, -1), torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [1, 1]


def test_the_sampler_keeps_one_token_of_each_row():
    keys = [stream_key(0, "answer", "a", draw) for draw in range(3)]
    scores = torch.randn(3, VOCAB)

    kept = KeyedSampler(keys, prompt_length=2)(torch.zeros(3, 2, dtype=torch.long), scores)

    numbers = torch.tensor([keyed_uniform(key, 0) for key in keys], dtype=torch.float64)
    assert kept.isfinite().sum(dim=1).tolist() == [1, 1, 1]
    assert torch.equal(kept.argmax(dim=1), inverse_cdf(scores, numbers))


def test_a_cut_answer_is_read_as_cut(model, renderer):
    draws = draw_answers(model, renderer, ["a"], num_answers=50, seed=0, max_new_tokens=1)[0]

    assert Answer("", True) in [draw.answer for draw in draws]
    assert {len(draw.ids) for draw in draws} == {1}
    assert any(not draw.answer.ended for draw in draws)
