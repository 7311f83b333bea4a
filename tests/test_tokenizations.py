"""The probability of a string is the sum over its tokenisations; here every one of them can be listed."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate.rendering import Renderer
from hf_imitate.retrodictive_bounds import log_prob_lower_bound
from hf_imitate.scoring import score_answers
from hf_imitate.tokenizations import LongAnswerError, Spellings, draw_tokenizations, string_log_prob

OVERLAPPING = ("a", "b", "ab", "ba", "aba")
QUESTION, ANSWER = "ba", "ababa"


def build(pieces, specials=("<end>", "<stop>"), model=None, decoder=None):
    """A random sharp model over some pieces and special tokens, and its renderer; every special token is an end."""
    model = model or models.Unigram([(piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)], unk_id=0)
    backend = Tokenizer(model)
    backend.decoder = decoder or decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=specials[0])
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials[1:])})
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval(), Renderer(tokenizer, tokenizer.convert_tokens_to_ids(list(specials)))


@pytest.fixture(scope="module")
def world():
    return build(OVERLAPPING)


@torch.no_grad()
def log_laws(model, prompt_ids, ids):
    """Log-law after each prefix of `ids`, by one unpadded forward. [len(ids) + 1, V], fp64."""
    logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 :]
    return torch.log_softmax(logits.double(), dim=1)


def all_spellings(renderer, text, longest):
    """Every sequence of tokens that reads as the text, found by reading all sequences there are."""
    ids = [token for token in range(len(renderer.tokenizer)) if token not in renderer.end_token_ids]
    sequences = itertools.chain.from_iterable(itertools.product(ids, repeat=n) for n in range(longest + 1))
    end = renderer.end_token_ids[0]
    return [sequence for sequence in sequences if renderer.read([*sequence, end]) == (text, True)]


def log_p_of(model, renderer, prompt_ids, sequence):
    """log p(tokens, any end token | question)."""
    laws = log_laws(model, prompt_ids, sequence)
    tokens = sum(laws[i, token].item() for i, token in enumerate(sequence))
    return tokens + torch.logsumexp(laws[-1, renderer.end_token_ids], dim=0).item()


def exact_log_prob(model, renderer, question, text, longest):
    prompt_ids = renderer.prompt_ids([question])[0]
    ways = all_spellings(renderer, text, longest)
    return float(np.logaddexp.reduce([log_p_of(model, renderer, prompt_ids, way) for way in ways], initial=-np.inf))


def canonical_log_prob(model, renderer, question, text):
    return score_answers(model, renderer.human([question], [text]), pad_token_id=0)[0].item()


def proposal(model, renderer, prompt_ids, ways):
    """Probability of drawing each way, from the list of all ways alone."""
    probability = {}
    for way in ways:
        laws, log_q = log_laws(model, prompt_ids, way), 0.0
        for i, token in enumerate(way):
            allowed = sorted({other[i] for other in ways if other[:i] == way[:i] and len(other) > i})
            log_q += laws[i, token].item() - torch.logsumexp(laws[i, allowed], dim=0).item()
        probability[way] = math.exp(log_q)
    return probability


def expected_log_weight(model, renderer, question, ways, drawn):
    """Log of the expectation of a draw's weight: paths and their probabilities from the list, weights from draws."""
    q = proposal(model, renderer, renderer.prompt_ids([question])[0], ways)
    weight = {tuple(one.ids): math.exp(one.log_weight) for one in drawn}
    assert set(weight) == set(map(tuple, ways))
    assert sum(q.values()) == pytest.approx(1, abs=1e-6)
    return math.log(sum(probability * weight[way] for way, probability in q.items()))


def test_over_all_paths_the_mean_weight_is_the_sum_over_tokenisations(world):
    model, renderer = world
    ways = all_spellings(renderer, ANSWER, len(ANSWER))
    assert len(ways) == 12
    drawn = draw_tokenizations(model, renderer, [QUESTION], [ANSWER], num_estimates=3000, seed=1)[0]
    mean = expected_log_weight(model, renderer, QUESTION, ways, drawn)
    assert mean == pytest.approx(exact_log_prob(model, renderer, QUESTION, ANSWER, len(ANSWER)), abs=1e-6)


def test_each_path_is_drawn_as_often_as_the_restricted_law_says(world):
    model, renderer = world
    ways = all_spellings(renderer, ANSWER, len(ANSWER))
    q = np.array(list(proposal(model, renderer, renderer.prompt_ids([QUESTION])[0], ways).values()))
    drawn = draw_tokenizations(model, renderer, [QUESTION], [ANSWER], num_estimates=3000, seed=2)[0]
    counts = [sum(tuple(one.ids) == way for one in drawn) for way in ways]
    assert chisquare(counts, 3000 * q / q.sum()).pvalue > 0.001


def test_the_string_is_likelier_than_its_canonical_ids(world):
    model, renderer = world
    answers = ["a", "ab", "aba", "ababa", "bab", ""]
    exact = [exact_log_prob(model, renderer, QUESTION, answer, len(answer)) for answer in answers]
    canonical = [canonical_log_prob(model, renderer, QUESTION, answer) for answer in answers]
    estimate = string_log_prob(model, renderer, [QUESTION] * 6, answers, num_estimates=1000)
    assert all(p > ids for p, ids in zip(exact, canonical, strict=True))
    np.testing.assert_allclose(estimate.nats, exact, atol=0.1)
    assert (estimate.nats > torch.tensor(canonical)).all()
    # Where one way is left but for the end, nothing is left to chance.
    np.testing.assert_allclose(estimate.nats[[0, 5]], [exact[0], exact[5]], atol=1e-6)


def test_with_one_spelling_and_one_end_it_is_the_canonical_log_prob_without_variance():
    model, renderer = build(("a", "b", "c"), specials=("<end>",))
    answers = ["abc", "cab", "b", ""]
    estimate = string_log_prob(model, renderer, ["ab"] * 4, answers, num_estimates=8)
    for own in draw_tokenizations(model, renderer, ["ab"] * 4, answers, num_estimates=8):
        assert len({one.log_weight for one in own}) == 1
    canonical = [canonical_log_prob(model, renderer, "ab", answer) for answer in answers]
    np.testing.assert_allclose(estimate.nats, canonical, atol=1e-6)
    np.testing.assert_allclose(estimate.effective_sample_size, 8)
    np.testing.assert_allclose(estimate.lower_bound, estimate.nats + math.log(0.05), atol=1e-9)


def test_a_draw_never_runs_into_a_dead_end():
    """After "a" nothing spells "bc", so "ab" is the only way."""
    model, renderer = build(("a", "ab", "c"), specials=("<end>",))
    drawn = draw_tokenizations(model, renderer, ["c"], ["abc"], num_estimates=20)[0]
    exact = exact_log_prob(model, renderer, "c", "abc", 3)
    assert [one.ids for one in drawn] == [[1, 2]] * 20
    np.testing.assert_allclose([one.log_weight for one in drawn], exact, atol=1e-6)


def test_a_string_that_no_tokens_spell_has_probability_zero():
    model, renderer = build(("a", "ab", "c"), specials=("<end>",))
    estimate = string_log_prob(model, renderer, ["c"], ["ax"])
    assert estimate.nats.tolist() == estimate.lower_bound.tolist() == [-math.inf]
    assert estimate.effective_sample_size.tolist() == [0]


def test_tokens_that_do_not_read_back_as_the_string_count_as_nothing():
    """This decoder reads "bb" as "b", across tokens too, so what single tokens show does not tell what all do."""
    decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("bb", "b")])
    model, renderer = build(("a", "b", "bb", "ab"), specials=("<end>",), decoder=decoder)
    drawn = draw_tokenizations(model, renderer, ["a"], ["abb"], num_estimates=300)[0]
    reads = [renderer.read([*one.ids, *renderer.end_token_ids]).text == "abb" for one in drawn]
    assert 0 < sum(reads) < 300
    assert [one.log_weight > -math.inf for one in drawn] == reads
    # The ways that no draw takes are missing, so this is the probability of less than the string.
    estimate = string_log_prob(model, renderer, ["a"], ["abb"], num_estimates=300).nats.item()
    assert estimate < exact_log_prob(model, renderer, "a", "abb", 4)


def test_the_markov_bound_holds_as_often_as_it_says(world):
    """At a confidence so low that a bound of one weight does fail at times; equal rows are independent draws."""
    model, renderer = world
    exact = exact_log_prob(model, renderer, QUESTION, ANSWER, len(ANSWER))
    num_runs, confidence = 600, 0.1
    repeated = [QUESTION] * num_runs, [ANSWER] * num_runs
    bound = string_log_prob(model, renderer, *repeated, num_estimates=1, confidence=confidence).lower_bound
    missed = (bound > exact).double().mean().item()
    assert 0.05 < missed < 1 - confidence
    strict = string_log_prob(model, renderer, *repeated, num_estimates=1).lower_bound
    assert (strict > exact).double().mean().item() <= 0.05


def test_draws_belong_to_the_row_and_not_to_its_batch(world):
    model, renderer = world
    questions, answers = ["ba", "a", "ba", "ba"], ["ababa", "aba", "ababa", "bab"]
    given = {"num_estimates": 16, "seed": 3}
    together = draw_tokenizations(model, renderer, questions, answers, **given)
    apart = draw_tokenizations(model, renderer, questions, answers, batch_size=1, **given)
    alone = [
        draw_tokenizations(model, renderer, [q], [a], **given)[0] for q, a in zip(questions, answers, strict=True)
    ]
    other = draw_tokenizations(model, renderer, questions, answers, num_estimates=16, seed=4)

    def ids(drawn):
        return [[one.ids for one in own] for own in drawn]

    assert ids(together) == ids(apart)
    assert [ids(together)[i] for i in (0, 1, 3)] == [ids(alone)[i] for i in (0, 1, 3)]
    assert ids(together)[2] != ids(together)[0]  # the same pair again
    assert ids(together) != ids(other)


def test_the_estimate_is_that_of_the_weights(world):
    model, renderer = world
    questions, answers = ["ba", "a"], ["ababa", "abab"]
    drawn = draw_tokenizations(model, renderer, questions, answers, num_estimates=10, seed=5)
    log_w = np.array([[one.log_weight for one in own] for own in drawn])
    estimate = string_log_prob(model, renderer, questions, answers, num_estimates=10, seed=5, confidence=0.9)
    weights = np.exp(log_w)
    np.testing.assert_allclose(estimate.nats, np.log(weights.mean(axis=1)), rtol=1e-12)
    np.testing.assert_allclose(estimate.effective_sample_size, weights.sum(1) ** 2 / (weights**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(estimate.lower_bound, log_prob_lower_bound(log_w, 0.9), rtol=1e-12)
    assert estimate.nats.dtype == torch.float64


# --- tokenizers people have


@pytest.fixture(scope="module")
def byte_level(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return model, Renderer(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize("text", ["the name", "it é", " 模", "<|pad|>"])
def test_byte_level_tokens_are_summed_over_their_bytes(byte_level, text):
    """Every cut of the bytes into known tokens, by recursion over the vocabulary; characters may be split."""
    model, renderer = byte_level
    alphabet = {token: bytes_of(renderer.tokenizer, token) for token in range(len(renderer.tokenizer))}
    ordinary = {t: b for t, b in alphabet.items() if t not in renderer.tokenizer.all_special_ids and b}
    special = set(renderer.tokenizer.added_tokens_decoder)

    def ways(rest):
        starts = [(t, b) for t, b in ordinary.items() if t not in special and rest.startswith(b)]
        return [[]] if not rest else [[t, *way] for t, b in starts for way in ways(rest[len(b) :])]

    prompt_ids = renderer.prompt_ids(["Return the"])[0]
    listed = ways(text.encode())
    exact = np.logaddexp.reduce([log_p_of(model, renderer, prompt_ids, way) for way in listed])
    estimate = string_log_prob(model, renderer, ["Return the"], [text], num_estimates=400)
    assert estimate.nats.item() == pytest.approx(exact, abs=0.1)
    assert exact >= canonical_log_prob(model, renderer, "Return the", text) - 1e-6
    assert renderer.answer_ids([text], [False])[0].answer_ids in listed


def bytes_of(tokenizer, token):
    """The bytes of a byte-level token, by the symbols that the library itself gives to single bytes."""
    symbols = {}
    for char in map(chr, range(256)):
        for symbol, byte in zip(
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(char)[0][0],
            char.encode(),
            strict=True,
        ):
            symbols[symbol] = byte
    # Bytes that occur in no character below U+0100.
    for char in "\u0800\u1000\u2000\u3000\u4000\u5000\u6000\u7000\u8000\u9000\ua000\ub000\uc000\ud000\ue000\uf000":
        known = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(char)[0][0]
        symbols |= dict(zip(known, char.encode(), strict=True))
    piece = tokenizer.convert_ids_to_tokens(token)
    return bytes(symbols[s] for s in piece) if all(s in symbols for s in piece) else b""


def test_words_are_spelled_with_the_blank_that_decoding_puts_before_them():
    words = models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")
    model, renderer = build((), specials=("<end>",), model=words)
    renderer.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    renderer.tokenizer.backend_tokenizer.decoder = None
    estimate = string_log_prob(model, renderer, ["a b"], ["b c a"], num_estimates=4)
    canonical = canonical_log_prob(model, renderer, "a b", "b c a")
    assert estimate.nats.item() == pytest.approx(canonical, abs=1e-6)


def test_sentencepiece_tokens_are_spelled_with_their_byte_pieces_and_first_blanks():
    pieces = ["<unk>", "▁a", "a", "▁", "é", "▁é", *(f"<0x{byte:02X}>" for byte in range(256))]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    unigram = models.Unigram([(piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)], 0, True)
    model, renderer = build((), specials=("<end>",), model=unigram, decoder=decoders.Sequence(steps))
    renderer.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    id_of = {piece: i for i, piece in enumerate(pieces)}
    spellings = Spellings(renderer.tokenizer, renderer.end_token_ids)
    starts = {token for token, _ in spellings.moves(b"a \xc3\xa9")[0]}
    # A first blank is not shown, so "▁a" says "a" there and " a" later.
    assert starts == {id_of["▁a"], id_of["a"], id_of["<0x61>"]}
    later = spellings.moves(b"a \xc3\xa9")[1]
    assert {token for token, _ in later} == {id_of["▁"], id_of["▁é"], id_of["<0x20>"]}
    drawn = draw_tokenizations(model, renderer, ["a"], ["a é"], num_estimates=2000)[0]
    prompt_ids = renderer.prompt_ids(["a"])[0]
    blanks, last = ["▁", "<0x20>"], [["é"], ["<0xC3>", "<0xA9>"]]
    ends = [["▁é"], *([blank, *rest] for blank in blanks for rest in last)]
    listed = [tuple(id_of[p] for p in (first, *end)) for first in ("▁a", "a", "<0x61>") for end in ends]
    exact = np.logaddexp.reduce([log_p_of(model, renderer, prompt_ids, way) for way in listed])
    assert expected_log_weight(model, renderer, "a", listed, drawn) == pytest.approx(exact, abs=1e-6)


# --- what cannot be done


def test_answers_too_long_are_named_by_their_number(world):
    model, renderer = world
    with pytest.raises(LongAnswerError, match=r"1 of 3 answers \(number 1\).*max_tokens") as caught:
        string_log_prob(model, renderer, ["a"] * 3, ["a", "ababab", "b"], max_tokens=1)
    assert caught.value.indices == [1]
    assert "ababab" not in str(caught.value)
    with pytest.raises(LongAnswerError, match="positions"):
        string_log_prob(model, renderer, ["a"], ["aba" * 11])
    cut = Renderer(renderer.tokenizer, renderer.end_token_ids, max_answer_tokens=1)
    with pytest.raises(LongAnswerError, match="max_answer_tokens"):
        string_log_prob(model, cut, ["a"], ["ab"])


def test_bad_settings_and_broken_models_are_said(world):
    model, renderer = world
    with pytest.raises(ValueError, match="num_estimates"):
        string_log_prob(model, renderer, ["a"], ["a"], num_estimates=0)
    with pytest.raises(ValueError, match="confidence"):
        string_log_prob(model, renderer, ["a"], ["a"], confidence=1.0)
    broken, _ = build(OVERLAPPING)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="no law to draw from"):
        string_log_prob(broken, renderer, ["a"], ["a"])


def test_no_answers_give_no_estimates(world):
    assert string_log_prob(*world, [], []).nats.shape == (0,)
