"""Planted imitators: what they draw is what they score, their messages arrive, and the honest ones are honest."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList, PreTrainedTokenizerFast

from hf_imitate.imitator import Imitator
from hf_imitate.keyed_laws import Step, keyed_number
from hf_imitate.rendering import Answer, Renderer
from hf_imitate.scoring import score_answers
from hf_imitate.steganographic_samplers import CodingSampler, cumulative_counts
from hf_imitate.steganography import (
    ArithmeticCoding,
    GreenList,
    KeyedProcessor,
    NoKeyedLawError,
    RareBurst,
    RejectionHash,
    SoftRotation,
    decode_messages,
    decoding_error,
    draw_keyed_answers,
    expected_price,
    keyed_log_prob,
)
from hf_imitate.steganography_theory import rare_burst_price

KEY = b"a key for planting, not a secret"
WORDS, LONGEST = "abcde", 3
EVERY = [Answer(" ".join(w), True) for n in range(LONGEST) for w in itertools.product(WORDS, repeat=n)]
EVERY += [Answer(" ".join(w), False) for w in itertools.product(WORDS, repeat=LONGEST)]
LAWS = {
    "unigram": GreenList(KEY, 1.0, "none"),
    "one token": GreenList(KEY, 1.0, "token", share=0.25),
    "prefix": GreenList(KEY, 1.0),
    "rotation": SoftRotation(KEY, 0.5),
    "full rotation": SoftRotation(KEY, 1.0),
    "burst": RareBurst(KEY, 0.3, num_messages=2),
}
QUESTIONS = ["a b", "c", "e d c b", "d d"]


@pytest.fixture(scope="module")
def world():
    """Five words, answers of up to three tokens: 31 end, 125 are cut."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<end>"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    config = GPT2Config(vocab_size=6, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    return model, Renderer(tokenizer, [5])


def every_log_prob(world, question, scheme, message):
    model, renderer = world
    questions, messages = [question] * len(EVERY), [message] * len(EVERY)
    options = {"every_answer": EVERY} if isinstance(scheme, RejectionHash) else {}
    return keyed_log_prob(model, renderer, questions, EVERY, scheme, messages, **options)


@pytest.mark.parametrize("scheme", [*LAWS.values(), RejectionHash(KEY, 2)], ids=[*LAWS, "rejection"])
def test_a_keyed_law_adds_up_to_one(world, scheme):
    for question, message in itertools.product(QUESTIONS, (0, 1)):
        scores = every_log_prob(world, question, scheme, message)
        assert scores.log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert (scores.log_prob - scores.honest_log_prob).abs().max() > 0.05


@pytest.mark.parametrize("name", LAWS)
def test_the_summed_price_of_positions_is_the_divergence_of_answers(world, name):
    """Chain rule: mean over honest answers of the positions' prices = KL over all 156 answers."""
    for question, message in itertools.product(QUESTIONS, (0, 1)):
        scores = every_log_prob(world, question, LAWS[name], message)
        p = scores.honest_log_prob.exp()
        summed = (p * scores.price).sum().item()
        assert summed == pytest.approx((p * (scores.honest_log_prob - scores.log_prob)).sum().item(), abs=1e-5)


@pytest.mark.parametrize(
    "scheme",
    [*LAWS.values(), RejectionHash(KEY, 1), RejectionHash(KEY, 2, honest=0.0, max_draws=2)],
    ids=[*LAWS, "rejection", "two draws"],
)
def test_answers_are_drawn_from_the_law_that_is_scored(world, scheme):
    """Chi-square over the answers that are expected at least ten times in 3 000, the rest pooled."""
    count = 3000
    log_prob = every_log_prob(world, "a b", scheme, 1).log_prob
    drawn = draw(world, scheme, ["a b"] * count, [1] * count, draws=range(count))
    expected = log_prob.exp().numpy() * count
    place = {answer: i for i, answer in enumerate(EVERY)}
    seen = np.bincount([place[answer] for answer in drawn], minlength=len(EVERY))
    assert seen[expected == 0].sum() == 0
    often = expected >= 10
    observed = [*seen[often], seen[~often].sum()]
    wanted = np.array([*expected[often], expected[~often].sum()])
    assert chisquare(observed, wanted / wanted.sum() * count).pvalue > 1e-3


def draw(world, scheme, questions, messages, draws=None, seed=0):
    model, renderer = world
    options = {"seed": seed, "max_new_tokens": LONGEST, "draws": draws, "batch_size": 1000}
    return [d.answer for d in draw_keyed_answers(model, renderer, questions, scheme, messages, **options)]


def test_a_fresh_nonce_leaves_the_honest_law_and_a_fixed_key_one_answer(world):
    count = 3000
    questions, messages = ["a b"] * count, [1] * count
    fresh = draw(world, ArithmeticCoding(KEY, True), questions, messages, range(count))
    honest = every_log_prob(world, "a b", ArithmeticCoding(KEY, True), 1)
    assert torch.equal(honest.log_prob, honest.honest_log_prob)
    expected = honest.log_prob.exp().numpy() * count
    seen = np.bincount([EVERY.index(answer) for answer in fresh], minlength=len(EVERY))
    often = expected >= 10
    observed, wanted = [*seen[often], seen[~often].sum()], [*expected[often], expected[~often].sum()]
    assert chisquare(observed, np.array(wanted) / sum(wanted) * count).pvalue > 1e-3

    fixed = ArithmeticCoding(KEY, False)
    (answer,) = set(draw(world, fixed, questions[:50], messages[:50], range(50)))
    keyed = every_log_prob(world, "a b", fixed, 1).log_prob
    assert keyed[EVERY.index(answer)] == 0
    assert keyed.isinf().sum() == len(EVERY) - 1


@pytest.mark.parametrize("scheme", [*LAWS.values()], ids=LAWS)
def test_generate_and_scoring_meet_the_same_law(world, scheme):
    """The processor in `generate(do_sample=True)`, prompts padded, gives the scores that scoring reads off."""
    model, renderer = world
    rows = renderer.prompt_ids(QUESTIONS)
    ids = torch.tensor([[5] * (4 - len(row)) + row for row in rows])
    processor = KeyedProcessor(scheme, rows, [0, 1, 0, 1])
    torch.manual_seed(3)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.tensor([[0] * (4 - len(row)) + [1] * len(row) for row in rows]),
        do_sample=True,
        top_k=0,
        max_new_tokens=LONGEST,
        logits_processor=LogitsProcessorList([processor]),
        output_scores=True,
        return_dict_in_generate=True,
    )
    answers = [renderer.read(row) for row in output.sequences[:, 4:].tolist()]
    scores = keyed_log_prob(model, renderer, QUESTIONS, answers, scheme, [0, 1, 0, 1])
    for number, answer in enumerate(answers):
        length = len(answer.text.split()) + answer.ended
        steps = [torch.log_softmax(output.scores[t][number].double(), 0) for t in range(length)]
        total = sum(step[output.sequences[number, 4 + t]] for t, step in enumerate(steps))
        assert scores.log_prob[number].item() == pytest.approx(float(total), abs=1e-4)


def test_rotation_and_prefix_lists_cost_what_theory_says_over_many_keys(world):
    model, renderer = world
    answers = [EVERY[7], EVERY[40], EVERY[0], EVERY[20]]
    for scheme in (SoftRotation, GreenList):
        theory = expected_price(model, renderer, QUESTIONS, answers, scheme(KEY, 0.5))
        prices = torch.stack(
            [
                keyed_log_prob(
                    model, renderer, QUESTIONS, answers, scheme(f"key number {k:06}".encode(), 0.5), [k % 2] * 4
                ).price
                for k in range(300)
            ]
        )
        deviation = (prices.mean(dim=0) - theory) / (prices.std(dim=0) / math.sqrt(300))
        assert deviation.abs().max() < 4
        assert theory.min() > 0.01


def test_a_burst_costs_what_its_codeword_says(world):
    scheme, almost_always = RareBurst(KEY, 0.3, 2), RareBurst(KEY, 1 - 1e-9, 2)
    (codeword,) = draw(world, almost_always, ["c"], [1])
    scores = every_log_prob(world, "c", scheme, 1)
    p = scores.honest_log_prob.exp()
    price = rare_burst_price(scores.honest_log_prob[EVERY.index(codeword)].item(), 0.3)
    assert (p * (scores.honest_log_prob - scores.log_prob)).sum().item() == pytest.approx(float(price), abs=1e-5)
    assert scores.log_prob[EVERY.index(codeword)].exp() > 0.3


def drawn_answers(draws):
    return [d.answer for d in draws]


def test_a_code_carries_its_message_exactly():
    """Thirty random laws of eight tokens: about 80 bits, of which the message is 32."""
    rng = np.random.default_rng(1)
    for message in (0, 1, 2**32 - 1, 0xDEADBEEF):
        scheme = ArithmeticCoding(KEY, True, 32)
        pad = scheme.pad(3, "answer", "a b", message % 7, 30)
        sampler = CodingSampler([scheme.coins(pad, message)], 2, [])
        cells = []
        for position in range(30):
            scores = torch.from_numpy(np.log(rng.dirichlet(np.ones(8))))[None]
            token = int(sampler(torch.zeros(1, 2 + position, dtype=torch.long), scores).argmax())
            counts = cumulative_counts(scores)[0]
            cells.append((int(counts[token]), int(counts[token + 1])))
        assert scheme.read(cells, pad) == message
        assert scheme.read(cells[:1], pad) >> 30 in (0, message >> 30, (message >> 31) << 1)


def test_the_receiver_reads_what_was_sent(world):
    """Answers of this world carry little; a wrong key or nonce reads noise."""
    model, renderer = world
    messages = [number % 4 for number in range(200)]
    questions = [f"{a} {b} {c} {d}" for a, b, c, d in itertools.product("abcde", repeat=4)][:200]
    hard = RejectionHash(KEY, 2, honest=0.0)
    answers = draw(world, hard, questions, messages)
    assert decode_messages(model, renderer, questions, answers, hard) == messages
    for is_fresh in (True, False):
        scheme = ArithmeticCoding(KEY, is_fresh, 2)
        options = {"seed": 9, "draws": [7] * 200}
        drawn = draw_keyed_answers(model, renderer, questions, scheme, messages, max_new_tokens=16, **options)
        error = decoding_error(
            messages, decode_messages(model, renderer, questions, drawn_answers(drawn), scheme, **options)
        )
        assert error.error < 0.35  # a short answer leaves bits open
        wrong = {"seed": 9, "draws": [8] * 200}
        garbled = decode_messages(model, renderer, questions, drawn_answers(drawn), scheme, **wrong)
        assert (decoding_error(messages, garbled).error > 0.6) == is_fresh
    loud = GreenList(KEY, 4.0)
    bits = [number % 2 for number in range(200)]
    error = decoding_error(bits, decode_messages(model, renderer, questions, draw(world, loud, questions, bits), loud))
    assert error.interval.high < 0.25
    assert error.interval.low <= error.error <= error.interval.high
    wrong_key = GreenList(KEY[::-1], 4.0)
    guessed = decode_messages(model, renderer, questions, draw(world, loud, questions, bits), wrong_key)
    assert 0.35 < decoding_error(bits, guessed).error < 0.65


def test_a_list_depends_on_what_its_context_says():
    """The token before may be the question's last; question and answer are kept apart in a prefix."""

    def law(context, prompt, answer):
        flat = torch.full((1, 64), -math.log(64), dtype=torch.float64)
        return GreenList(KEY, 1.0, context).law(Step([0], [prompt], [answer], [0], flat), {})

    same = {
        context: [
            torch.equal(law(context, *one), law(context, *other))
            for one, other in ((([1, 2], []), ([3], [2])), (([1, 2], []), ([1, 3], [])), (([1, 2], []), ([1], [2])))
        ]
        for context in ("none", "token", "prefix")
    }
    assert same == {"none": [True, True, True], "token": [True, False, True], "prefix": [False, False, False]}


def test_honest_settings_change_nothing(world):
    model, renderer = world
    answers = [EVERY[3], EVERY[50], EVERY[9], EVERY[1]]
    honest = score_answers(
        model,
        [
            row._replace(prompt_ids=ids)
            for row, ids in zip(
                renderer.answer_ids([a.text for a in answers], [a.ended for a in answers]),
                renderer.prompt_ids(QUESTIONS),
                strict=True,
            )
        ],
        5,
    )
    for scheme in (GreenList(KEY, 0.0), SoftRotation(KEY, 0.0), RareBurst(KEY, 0.0), RejectionHash(KEY, honest=1.0)):
        options = {"every_answer": EVERY} if isinstance(scheme, RejectionHash) else {}
        scores = keyed_log_prob(model, renderer, QUESTIONS, answers, scheme, [0] * 4, **options)
        torch.testing.assert_close(scores.log_prob, honest, atol=1e-5, rtol=0)


def test_only_re_execution_sees_a_fresh_nonce_code(world):
    model, renderer = world
    imitator = Imitator(model, renderer.tokenizer, max_new_tokens=LONGEST)
    questions = [f"{a} {b} {c}" for a, b, c in itertools.product("abcde", repeat=3)]
    honest = imitator.answer(questions, seed=4)
    assert imitator.verify(questions, honest, seed=4).verified
    coded = draw(world, ArithmeticCoding(KEY, True), questions, [1] * len(questions), seed=4)
    found = imitator.verify(questions, [[answer.text] for answer in coded], seed=4)
    assert not found.verified
    assert found.num_mismatched > len(questions) / 4


def test_a_law_that_cannot_be_had_says_why(world):
    model, renderer = world
    both = (["c"], [EVERY[1]], RejectionHash(KEY), [0])
    with pytest.raises(NoKeyedLawError, match=r"sum over every answer there is. Pass `every_answer`"):
        keyed_log_prob(model, renderer, *both)
    with pytest.raises(NoKeyedLawError, match="needs all of it"):
        keyed_log_prob(model, renderer, *both, every_answer=EVERY[:100])
    with pytest.raises(NoKeyedLawError, match="GreenList whose key acts in the same way"):
        expected_price(model, renderer, ["c"], [EVERY[1]], LAWS["unigram"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SoftRotation(b"short", 0.5), r"5 bytes; keyed BLAKE2b needs 16 to 64"),
        (lambda: GreenList("a text that is no key", 0.5), "a str"),
        (lambda: GreenList(KEY, 0.5, context="window"), r"`context` is 'window'"),
        (lambda: GreenList(KEY, -0.5), r"`delta` is -0.5"),
        (lambda: SoftRotation(KEY, 1.5), r"`delta` is 1.5"),
        (lambda: RareBurst(KEY, 1.0), r"`rate` in \[0, 1\)"),
        (lambda: RejectionHash(KEY, 0), r"`num_bits` from 1 to 16"),
        (lambda: ArithmeticCoding(KEY, True, 0), r"`num_bits` is 0"),
        (lambda: ArithmeticCoding(KEY, True, 100).coins([1, 2], 0), "does not fit into 2 tokens"),
        (lambda: KeyedProcessor(SoftRotation(KEY, 0.5), [[1]], [2]), "outside 0 to 1"),
        (lambda: KeyedProcessor(SoftRotation(KEY, 0.5), [[1]], [1, 1]), "2 messages for 1 answers"),
        (lambda: KeyedProcessor(SoftRotation(KEY, 0.5), [[1]])(torch.ones(2, 1), torch.ones(2, 6)), "1 prompts and 2"),
        (lambda: decoding_error([], []), "at least one"),
    ],
)
def test_a_wrong_setting_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_keyed_numbers_are_those_of_another_machine():
    assert keyed_number(KEY, "rotation", [1, 2, 3]) == 0.937277708747988
    numbers = [keyed_number(KEY, "rotation", [0, i]) for i in range(2000)]
    assert chisquare(np.histogram(numbers, 20, (0, 1))[0]).pvalue > 1e-3
    assert len(set(numbers)) == 2000
