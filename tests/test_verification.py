import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate import verification
from hf_imitate.imitator import Imitator
from hf_imitate.rendering import Renderer
from hf_imitate.sampling import GumbelSampler, draw_answers, generate_with, gumbel_noise, stream_key
from hf_imitate.verification import Verification, verify_answers

PAD, END = 0, 1
WORDS = "abcdefghij"
QUESTIONS = ["a", "b c a", "c c", "a b"]
SETTINGS = {"seed": 3, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def renderer():
    vocabulary = {"<pad>": PAD, "<end>": END} | {word: number for number, word in enumerate(WORDS, start=2)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Renderer(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"), [END])


@pytest.fixture(scope="module")
def model():
    """Weights large enough for laws that are neither flat nor certain."""
    config = Qwen3Config(
        vocab_size=2 + len(WORDS),
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
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.8 if parameter.dim() > 1 else 0.2))
        model.lm_head.weight.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def draws(model, renderer):
    return draw_answers(model, renderer, QUESTIONS, num_answers=25, **SETTINGS)


@pytest.fixture
def answers(draws):
    return texts_of(draws)


def texts_of(draws):
    return [[draw.answer.text for draw in of_question] for of_question in draws]


def decisions(model, renderer, question, draw, ids, temperature=1.0):
    """Every token's lag behind the winner at each place of an answer, by one unpadded forward per place, nats."""
    lags, prompt = [], renderer.prompt_ids([question])[0]
    for position in range(len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids[:position]]])).logits[0, -1].double()
        noise = gumbel_noise([stream_key(SETTINGS["seed"], "answer", question, draw)], [position], len(logits))[0]
        perturbed = logits / temperature + noise
        lags.append(perturbed.max() - perturbed)
    return torch.stack(lags)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_what_was_drawn_is_verified_in_any_batch_and_leaves_no_capacity(model, renderer, draws, answers, batch_size):
    result = verify_answers(model, renderer, QUESTIONS, answers, batch_size=batch_size, **SETTINGS)

    num_tokens = sum(len(draw.ids) for of_question in draws for draw in of_question)
    assert result[:2] == (num_tokens, 0)
    assert result.verified
    assert result.capacity_bits < 0.01 * num_tokens
    assert {draw.answer.ended for of_question in draws for draw in of_question} == {True, False}


def test_one_forward_per_answer_is_enough(model, renderer, answers, monkeypatch):
    monkeypatch.setattr(model, "generate", None)

    assert verify_answers(model, renderer, QUESTIONS, answers, **SETTINGS).verified


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"temperature": 0.8}, {"first_draw": 1}, {"purpose": "audit"}, {"max_new_tokens": 5}],
    ids=lambda change: next(iter(change)),
)
def test_answers_drawn_otherwise_are_flagged(model, renderer, answers, change):
    result = verify_answers(model, renderer, QUESTIONS, answers, **(SETTINGS | change))

    assert not result.verified
    assert result.num_mismatched >= 10


def test_a_limit_that_was_not_reached_shows_as_an_end_that_was_not_drawn(model, renderer, draws, answers):
    result = verify_answers(model, renderer, QUESTIONS, answers, **(SETTINGS | {"max_new_tokens": 7}))

    cut = sum(not draw.answer.ended for of_question in draws for draw in of_question)
    # After a cut answer, the token that would have followed is an end for a few.
    assert 0.5 * cut <= result.num_mismatched <= cut


@pytest.mark.parametrize(
    "tamper",
    [
        lambda text: "j " + text,
        lambda text: text + " j",
        lambda text: text.rpartition(" ")[0],
        lambda text: text.replace(text[0], "a" if text[0] != "a" else "b", 1),
        lambda text: text.replace(" ", "  ", 1),
        lambda text: text + " <end> a",
    ],
    ids=["a word before", "a word after", "a word less", "another word", "one more blank", "after the end"],
)
def test_one_changed_answer_among_many_is_flagged(model, renderer, answers, tamper):
    number = next(
        number for number, text in enumerate(answers[2]) if 2 < len(text) < 2 * SETTINGS["max_new_tokens"] - 1
    )
    changed = copy.deepcopy(answers)
    changed[2][number] = tamper(changed[2][number])
    assert changed != answers

    result = verify_answers(model, renderer, QUESTIONS, changed, **SETTINGS)

    assert not result.verified
    assert 1 <= result.num_mismatched <= SETTINGS["max_new_tokens"]


def test_answers_in_another_order_are_flagged(model, renderer, answers):
    assert not verify_answers(model, renderer, QUESTIONS, [texts[::-1] for texts in answers], **SETTINGS).verified
    assert not verify_answers(model, renderer, QUESTIONS[::-1], answers, **SETTINGS).verified


def test_the_counts_are_those_of_one_forward_per_token(model, renderer, answers):
    changed = [[" ".join(reversed(text.split())) for text in texts[:6]] for texts in answers]
    tolerance = 0.3

    result = verify_answers(model, renderer, QUESTIONS, changed, tolerance=tolerance, **SETTINGS)

    num_tokens = num_mismatched = bits = 0
    for question, texts in zip(QUESTIONS, changed, strict=True):
        for draw, text in enumerate(texts):
            ids = [*renderer.tokenizer(text)["input_ids"], END][: SETTINGS["max_new_tokens"]]
            lags = decisions(model, renderer, question, draw, ids)
            num_tokens += len(ids)
            num_mismatched += (lags[range(len(ids)), ids] > tolerance).sum().item()
            bits += (lags <= tolerance).sum(dim=1).double().log2().sum().item()
    assert result[:2] == (num_tokens, num_mismatched)
    assert result.capacity_bits == pytest.approx(bits)
    assert num_mismatched > 10 < bits


class Smuggler(GumbelSampler):
    """Says a secret: where a second token is within the tolerance, the next bit chooses."""

    tolerance = 0.4

    def __init__(self, *given):
        super().__init__(*given)
        self.said = []

    def pick(self, perturbed, drawn_ids):
        best = perturbed.topk(2, dim=1)
        picked = best.indices[:, 0].clone()
        for row in (best.values[:, 0] - best.values[:, 1] <= self.tolerance).nonzero().flatten().tolist():
            self.said.append((len(self.said) * 7 // 3) % 2)
            picked[row] = best.indices[row, self.said[-1]]
        return picked


def test_a_secret_within_the_tolerance_passes_and_is_no_longer_than_the_capacity(model, renderer):
    keys = [stream_key(3, "answer", "a", draw) for draw in range(40)]
    sampler = Smuggler(keys, 1, 1.0, [END])
    drawn = generate_with(sampler, model, renderer, renderer.prompt_ids(["a"] * 40), SETTINGS["max_new_tokens"])
    said = [[renderer.read(ids).text for ids in drawn]]

    with_tolerance = verify_answers(model, renderer, ["a"], said, tolerance=0.4, **SETTINGS)
    strict = verify_answers(model, renderer, ["a"], said, **SETTINGS)

    assert with_tolerance.verified
    assert len(sampler.said) >= 20
    assert len(sampler.said) <= with_tolerance.capacity_bits < 2 * len(sampler.said)
    assert strict.num_mismatched == sum(sampler.said)
    assert strict.capacity_bits < 2


def test_rounding_to_bfloat16_is_within_its_tolerance(model, renderer):
    rounded = copy.deepcopy(model).bfloat16()
    exact, flipped = (
        texts_of(draw_answers(each, renderer, QUESTIONS, num_answers=100, **SETTINGS)) for each in (model, rounded)
    )
    assert exact != flipped

    of_rounded = verify_answers(rounded, renderer, QUESTIONS, flipped, batch_size=9, **SETTINGS)

    assert of_rounded.verified
    assert 0.1 < of_rounded.capacity_bits / of_rounded.num_tokens < 0.5
    assert verify_answers(rounded, renderer, QUESTIONS, exact, **SETTINGS).verified
    assert verify_answers(model, renderer, QUESTIONS, flipped, tolerance=0.25, **SETTINGS).verified
    assert not verify_answers(model, renderer, QUESTIONS, flipped, **SETTINGS).verified


@pytest.mark.parametrize("temperature", [0.01, 1.7])
def test_other_temperatures_are_verified_at_their_own(model, renderer, temperature):
    drawn = draw_answers(model, renderer, QUESTIONS, num_answers=20, temperature=temperature, **SETTINGS)

    result = verify_answers(model, renderer, QUESTIONS, texts_of(drawn), temperature=temperature, **SETTINGS)

    assert result.verified


def test_the_tolerance_is_that_of_logits_whatever_the_temperature(model, renderer, answers):
    def bits(temperature, tolerance):
        law = {"temperature": temperature, "tolerance": tolerance}
        return verify_answers(model, renderer, QUESTIONS, answers, **law, **SETTINGS).capacity_bits

    expected = sum(
        (decisions(model, renderer, question, draw, ids, 0.5) <= 0.6).sum(dim=1).double().log2().sum().item()
        for question, texts in zip(QUESTIONS, answers, strict=True)
        for draw, text in enumerate(texts)
        for ids in [[*renderer.tokenizer(text)["input_ids"], END][: SETTINGS["max_new_tokens"]]]
    )
    assert bits(0.5, 0.3) == pytest.approx(expected)


def test_a_later_series_is_verified_at_its_number(model, renderer, answers):
    later = [texts[10:] for texts in answers]

    assert verify_answers(model, renderer, QUESTIONS, later, first_draw=10, **SETTINGS).verified
    assert not verify_answers(model, renderer, QUESTIONS, later, **SETTINGS).verified


def test_lists_of_answers_need_not_be_equally_long(model, renderer, answers):
    uneven = [answers[0][:3], [], answers[2], answers[3][:1]]

    assert verify_answers(model, renderer, QUESTIONS, uneven, **SETTINGS).verified


def test_noise_in_small_blocks_is_the_same(model, renderer, answers, monkeypatch):
    whole = verify_answers(model, renderer, QUESTIONS, answers, tolerance=0.3, **SETTINGS)

    monkeypatch.setattr(verification, "_MAX_NOISE", 3 * (2 + len(WORDS)))

    assert verify_answers(model, renderer, QUESTIONS, answers, tolerance=0.3, **SETTINGS) == pytest.approx(whole)


@pytest.fixture(scope="module")
def bytewise(tiny_model_dir):
    """A random model over bytes: next to none of its draws are spelled in the tokenizer's own ids."""
    imitator = Imitator.from_pretrained(tiny_model_dir, device="cpu")
    with torch.no_grad():
        for parameter in imitator.model.parameters():
            parameter.mul_(3)
    return imitator


def test_draws_in_other_ids_than_the_tokenizers_own_are_verified_by_drawing_again(bytewise):
    questions = ["Return the", "Set the name of the file and return"]
    settings = {"seed": 1, "max_new_tokens": 10}
    draws = draw_answers(bytewise.model, bytewise.renderer, questions, num_answers=20, **settings)
    drawn = [draw for of_question in draws for draw in of_question]
    own = [bytewise.renderer.answer_ids([draw.answer.text], [draw.answer.ended])[0].answer_ids for draw in drawn]
    assert sum(ids != draw.ids for ids, draw in zip(own, drawn, strict=True)) > 20

    result = verify_answers(bytewise.model, bytewise.renderer, questions, texts_of(draws), **settings)

    assert result.verified
    assert result.num_tokens == sum(len(draw.ids) for draw in drawn)
    assert result.capacity_bits < 0.01 * result.num_tokens
    changed = [[text + "!" if number == 7 else text for number, text in enumerate(t)] for t in texts_of(draws)]
    assert not verify_answers(bytewise.model, bytewise.renderer, questions, changed, **settings).verified


def test_drawing_again_keeps_to_the_text_where_two_tokens_are_within_the_tolerance(model):
    """With `a`, `b` and `ab` in the vocabulary, most draws are not in the tokenizer's own ids; in bfloat16 some tokens
    flip, after which a draw that does not keep to the text would say something else."""
    pieces = ["a", "b", "c", "d", "ab", "bc", "cd", "da"]
    vocabulary = {"<pad>": PAD, "<end>": END} | {piece: n for n, piece in enumerate(pieces, 2)}
    syllables = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]))
    syllables.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=syllables, pad_token="<pad>", eos_token="<end>")
    renderer, rounded = Renderer(tokenizer, [END]), copy.deepcopy(model).bfloat16()
    settings = {"seed": 2, "max_new_tokens": 8}
    exact, rough = (draw_answers(each, renderer, ["a"], num_answers=300, **settings)[0] for each in (model, rounded))
    flipped = [draw for draw in range(300) if exact[draw].ids != rough[draw].ids]
    assert len(flipped) >= 5

    verified = [
        verify_answers(rounded, renderer, ["a"], [[exact[draw].answer.text]], first_draw=draw, **settings).verified
        for draw in flipped
    ]

    # Not all: where both tokens keep to the text for a while, it may follow the wrong one.
    assert sum(verified) >= 0.7 * len(flipped)


def test_conversations_are_verified(tiny_chat_model_dir):
    imitator = Imitator.from_pretrained(tiny_chat_model_dir, device="cpu")
    questions = [[{"role": "user", "content": text}] for text in ("Return the", "list")]

    answers = imitator.answer(questions, num_answers=3, max_new_tokens=5)

    assert imitator.verify(questions, answers, max_new_tokens=5).verified
    assert not imitator.verify(questions[::-1], answers, max_new_tokens=5).verified


def test_verifying_leaves_the_model_and_the_random_state_alone(model, renderer, answers):
    mixed = copy.deepcopy(model).train()
    mixed.model.layers[0].eval()
    modes = [module.training for module in mixed.modules()]
    state = torch.get_rng_state()

    assert not verify_answers(mixed, renderer, QUESTIONS, answers[::-1], **SETTINGS).verified

    assert [module.training for module in mixed.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_claimed_is_verified(model, renderer):
    assert verify_answers(model, renderer, [], [], **SETTINGS) == Verification(0, 0, 0.0, True)
    assert verify_answers(model, renderer, ["a"], [[]], **SETTINGS) == Verification(0, 0, 0.0, True)


def test_nan_logits_are_an_error(model, renderer):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan

    with pytest.raises(ValueError, match="NaN"):
        verify_answers(broken, renderer, ["a"], [["b"]], **SETTINGS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("tolerance", -1e-3),
        ("tolerance", math.nan),
        ("temperature", 0.0),
        ("batch_size", 0),
        ("max_new_tokens", 0),
        ("first_draw", -1),
    ],
)
def test_a_setting_out_of_range_is_named(model, renderer, setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` is {value}"):
        verify_answers(model, renderer, ["a"], [["b"]], **(SETTINGS | {setting: value}))


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        (["secret", "b"], TypeError, r"answers\[0\] is a string"),
        ([["b"], ["secret", None]], TypeError, r"answers\[1\] is a list of other things"),
        ([["secret"]], ValueError, "2 questions and 1 lists"),
        ("secret", ValueError, "2 questions and one string"),
    ],
)
def test_answers_in_another_form_are_named_without_their_text(model, renderer, answers, error, message):
    with pytest.raises(error, match=message) as raised:
        verify_answers(model, renderer, ["a", "b"], answers, **SETTINGS)

    assert "secret" not in str(raised.value)


class _RepeatsItself(Qwen3ForCausalLM):
    """Its own `generate` says what it said before, whoever asks: it hides a message and repeats it."""

    def generate(self, input_ids, **kwargs):
        hidden = torch.tensor([[2, 3, 2, END]]).expand(len(input_ids), -1)
        return torch.cat([input_ids, hidden], dim=1)


def test_a_model_cannot_vouch_for_itself_by_its_own_generate(model, renderer):
    """Re-execution asks a model for scores alone; its own loop would say yes to anything it said."""
    dishonest = _RepeatsItself(model.config).eval()
    dishonest.load_state_dict(model.state_dict())
    said = texts_of(draw_answers(dishonest, renderer, QUESTIONS, num_answers=2, **SETTINGS))
    assert said == [["a b a"] * 2] * len(QUESTIONS)
    found = verify_answers(dishonest, renderer, QUESTIONS, said, **SETTINGS)
    assert found.num_mismatched >= 7
    honest = texts_of(draw_answers(model, renderer, QUESTIONS, num_answers=2, **SETTINGS))
    assert verify_answers(dishonest, renderer, QUESTIONS, honest, **SETTINGS).verified
