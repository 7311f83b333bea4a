"""One answer kept out of K by a real distinguisher, in a world of 13 answers, so that its law can be summed exactly.

Ids 0 to 2 are the words a to c, 3 ends an answer and pads; an answer is cut after two tokens.
"""

import itertools
import math

import latent_worlds
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate.candidates import score_candidates
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.imitator import Imitator
from hf_imitate.latent_imitator import LatentImitator
from hf_imitate.rendering import Answer, Rendered
from hf_imitate.residual_imitator import ResidualImitator
from hf_imitate.retrodictive_bounds import NoCertificateError, mean_log_prob_lower_bound
from hf_imitate.retrodictor import Retrodictor, Thinkers
from hf_imitate.sampling import gumbel_noise, stream_key
from hf_imitate.thoughts import ThoughtLaw

WORDS, END, LONGEST, CHECK_WEIGHT = "abc", 3, 2, 4.0
QUESTIONS = ["a b", "c", "b b a"]
# Content and end of everything that can be drawn: ended at once, ended after a word, cut after two words.
OUTCOMES = [[END], *([x, END] for x in range(3)), *([x, y] for x in range(3) for y in range(3))]


def tiny_tokenizer():
    words = Tokenizer(models.WordLevel({**{word: i for i, word in enumerate(WORDS)}, "<end>": END}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def tiny_model(seed):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
    config = Qwen3Config(
        vocab_size=4, **shape, **ends, num_key_value_heads=1, head_dim=8, initializer_range=0.3, use_cache=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def says_wanted(prompts, completions, completion_ids=None, *, wanted, **columns):
    """A check that needs a column of the question's."""
    assert completion_ids is None
    return [want in text.split() for text, want in zip(completions, wanted, strict=True)]


def make_distinguisher(checks=(), scale=30.0):
    distinguisher = Distinguisher.from_causal_lm(tiny_model(1), tiny_tokenizer(), checks=checks)
    with torch.no_grad():
        distinguisher.head.weight *= scale
        distinguisher.check_weights += CHECK_WEIGHT
    return distinguisher


def make_imitator(**kwargs):
    return Imitator(tiny_model(0), tiny_tokenizer(), max_new_tokens=LONGEST, **kwargs)


@pytest.fixture(scope="module")
def imitator():
    return make_imitator(distinguisher=make_distinguisher())


@pytest.fixture(scope="module")
def checked():
    return make_imitator(distinguisher=make_distinguisher([says_wanted]))


def read(imitator, ids):
    return imitator.renderer.read(ids)


@torch.no_grad()
def plain_law(model, prompt_ids, temperature=1.0):
    """p of every outcome, one forward at a time. [13]."""
    laws = []
    for ids in OUTCOMES:
        log_p = 0.0
        for position, token in enumerate(ids):
            logits = model(input_ids=torch.tensor([[*prompt_ids, *ids[:position]]])).logits[0, -1].double()
            log_p += (logits / temperature).log_softmax(0)[token].item()
        laws.append(math.exp(log_p))
    return torch.tensor(laws, dtype=torch.float64)


def all_logits(imitator, question, added=None):
    answers = [read(imitator, ids) for ids in OUTCOMES]
    logits = imitator.distinguisher.score([question] * len(answers), answers).double()
    return logits if added is None else logits + torch.tensor([added(answer.text) for answer in answers])


def exact_law(imitator, question, num_candidates, added=None, temperature=1.0):
    """Probability that each outcome is kept, summed over all 13^K sets of candidates. [13]."""
    p = plain_law(imitator.model, imitator.renderer.prompt_ids([question])[0], temperature)
    logits = all_logits(imitator, question, added)
    sets = torch.tensor(list(itertools.product(range(13), repeat=num_candidates)))
    kept = logits[sets].softmax(1) * p[sets].prod(1, keepdim=True)
    return torch.zeros(13, dtype=torch.float64).index_add_(0, sets.flatten(), kept.flatten())


def check_frequencies(imitator, answers, law):
    texts = [read(imitator, ids).text for ids in OUTCOMES]
    assert len(set(texts)) == 13
    counts = torch.tensor([answers.count(text) for text in texts]).double()
    assert counts.sum() == len(answers)
    error = (counts / len(answers) - law).abs() / (law * (1 - law) / len(answers)).sqrt()
    assert error.max() < 4


def test_answers_are_kept_as_often_as_the_exact_law_says(imitator):
    law, number = exact_law(imitator, "a b", 3), 3000
    assert law.sum().item() == pytest.approx(1, abs=1e-6)
    assert (law - exact_law(imitator, "a b", 1)).abs().sum() > 0.2

    answers = imitator.answer(["a b"], num_answers=number, batch_size=1024, resample=3)[0]

    check_frequencies(imitator, answers, law)


def test_checks_reach_the_choice_by_their_questions_columns(checked):
    asked, wanted, number = ["a b", "a b"], ["c", "a"], 1500
    answers = checked.answer(asked, number, batch_size=1024, resample=2, checks=[says_wanted], wanted=wanted)

    for own, want in zip(answers, wanted, strict=True):

        def added(text, want=want):
            return CHECK_WEIGHT * ((want in text.split()) - 0.5)

        check_frequencies(checked, own, exact_law(checked, "a b", 2, added))
        assert (exact_law(checked, "a b", 2, added) - exact_law(checked, "a b", 2)).abs().sum() > 0.1


def test_one_candidate_is_the_plain_imitator_to_the_bit(imitator):
    plain = make_imitator()
    settings = {"num_answers": 20, "seed": 3, "first_draw": 5}

    assert imitator.answer(QUESTIONS, **settings, resample=1) == plain.answer(QUESTIONS, **settings)
    same = imitator.residual(1).answer(QUESTIONS, **settings)
    assert [[one.answer.text for one in own] for own in same] == plain.answer(QUESTIONS, **settings)
    assert imitator.answer(QUESTIONS, **settings, resample=4) != plain.answer(QUESTIONS, **settings)
    found = imitator.log_prob(QUESTIONS, ["a", "b", ""], resample=1)
    assert found.is_exact.all()
    assert torch.equal(found.nats, plain.log_prob(QUESTIONS, ["a", "b", ""]).nats)
    torch.testing.assert_close(imitator.residual(1).log_prob(QUESTIONS, ["a", "b", ""]).nats, found.nats)


def test_answers_do_not_depend_on_the_batch_and_series_continue(imitator):
    whole = imitator.answer(QUESTIONS, num_answers=6, seed=1, resample=4)

    alone = [imitator.answer([q], num_answers=6, seed=1, resample=4, batch_size=3)[0] for q in QUESTIONS]
    rest = imitator.answer(QUESTIONS[::-1], num_answers=4, first_draw=2, seed=1, resample=4)[::-1]

    assert alone == whole
    assert rest == [own[2:] for own in whole]
    assert imitator.answer(QUESTIONS, num_answers=6, seed=2, resample=4) != whole


def test_the_first_candidate_is_the_plain_answer_and_the_coin_is_anybodys_to_toss(imitator):
    drawn = imitator.residual(4).answer(["a b"], num_answers=5, seed=7)[0]

    plain = imitator.answer(["a b"], num_answers=5, seed=7)[0]
    assert [choice.candidates[0].answer.text for choice in drawn] == plain
    for draw, choice in enumerate(drawn):
        coin = gumbel_noise([stream_key(7, "answer choice", "a b", draw)], [0], 4)[0]
        expected = imitator.distinguisher.score(["a b"] * 4, [one.answer for one in choice.candidates])
        torch.testing.assert_close(choice.logits, expected.double(), atol=1e-5, rtol=0)
        assert choice.kept == int((expected.double() + coin).argmax())
    assert len({choice.kept for choice in drawn}) > 1


@pytest.mark.parametrize(("answer", "num_candidates"), [("a", 2), ("", 3), ("c", 3)])
def test_log_prob_is_unbiased(imitator, answer, num_candidates):
    index = [read(imitator, ids) for ids in OUTCOMES].index(Answer(answer, True))
    truth = exact_law(imitator, "b b a", num_candidates)[index]

    found = imitator.residual(num_candidates).log_prob(["b b a"], [answer], num_estimates=1500, batch_size=1024)

    estimates = found.log_weights[0].exp()
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / math.sqrt(1500)
    assert estimates.std() / math.sqrt(1500) < 0.05 * truth
    assert found.nats.item() == pytest.approx(estimates.mean().log().item())
    assert 0 < found.effective_sample_size.item() <= 1500
    plain = imitator.log_prob(["b b a"], [answer]).nats
    assert (found.log_weights <= plain + math.log(num_candidates) + 1e-9).all()


def test_log_probs_of_cut_answers_are_those_of_the_procedure(imitator):
    """All 13 outcomes, cut ones too, share probability 1."""
    prompt = imitator.renderer.prompt_ids(["c"])[0]
    rows = [Rendered(prompt, ids, ids[-1] == END) for ids in OUTCOMES]

    found = imitator.residual(2).score_rows(["c"] * 13, rows, num_estimates=150, batch_size=1024)

    torch.testing.assert_close(found.nats.exp(), exact_law(imitator, "c", 2), atol=0.03, rtol=0)
    assert found.nats.exp().sum().item() == pytest.approx(1, abs=0.04)


def test_bounds_stay_below_and_say_that_they_are_estimates(imitator):
    answers = ["a", "b", ""]
    found = imitator.log_prob(QUESTIONS, answers, resample=4)

    assert not found.is_exact.any()
    torch.testing.assert_close(found.lower_bound, found.nats - math.log(20))
    assert (found.effective_sample_size >= 1).all()
    assert (found.effective_sample_size <= 8 + 1e-9).all()
    weights = imitator.residual(4).log_prob(QUESTIONS, answers).log_weights
    assert weights.shape == (3, 8)
    assert mean_log_prob_lower_bound(found.nats.numpy())[-1] < found.nats.mean() < 0


def test_the_lower_bound_of_real_draws_misses_no_oftener_than_it_says(imitator):
    index = [read(imitator, ids) for ids in OUTCOMES].index(Answer("b", True))
    truth = exact_law(imitator, "a b", 3)[index].log()

    settings = {"confidence": 0.5, "num_estimates": 1, "batch_size": 1024, "resample": 3}
    bounds = imitator.log_prob(["a b"] * 500, ["b"] * 500, **settings).lower_bound

    assert 0 <= (bounds > truth).double().mean() <= 0.5
    assert bounds.unique().numel() > 5


def test_repeated_rows_have_companions_of_their_own(imitator):
    twice = imitator.log_prob(["a b", "a b", "a b"], ["c", "c", "b"], resample=4)
    alone = imitator.log_prob(["a b"], ["c"], resample=4, batch_size=5)

    torch.testing.assert_close(alone.nats, twice.nats[:1], atol=1e-5, rtol=0)
    assert abs(twice.nats[0] - twice.nats[1]) > 1e-3
    other = imitator.log_prob(["a b"], ["c"], resample=4, seed=1)
    assert abs(other.nats - alone.nats) > 1e-3


def test_columns_reach_the_checks_of_candidates_when_scoring(checked):
    settings = {"resample": 3, "checks": [says_wanted], "num_estimates": 600, "batch_size": 1024}
    found = checked.log_prob(["a b", "a b"], ["c", "c"], **settings, wanted=["c", "a"]).nats

    index = [read(checked, ids) for ids in OUTCOMES].index(Answer("c", True))
    for nats, want in zip(found, ["c", "a"], strict=True):
        law = exact_law(checked, "a b", 3, lambda text, want=want: CHECK_WEIGHT * ((want in text.split()) - 0.5))
        assert nats.item() == pytest.approx(law[index].log().item(), abs=0.1)
    assert found[0] - found[1] > 0.3


def test_an_answer_is_enclosed_from_both_sides(imitator):
    index = [read(imitator, ids) for ids in OUTCOMES].index(Answer("b", True))
    truth = exact_law(imitator, "c", 2)[index].log().item()

    found = imitator.residual(2).enclose_log_prob("c", "b", epsilon=0.8, confidence=0.9, batch_size=1024)

    assert found.is_finished
    assert found.interval.low < truth < found.interval.high
    assert found.interval.high - found.interval.low < 1.3
    in_steps = imitator.residual(2).enclose_log_prob("c", "b", epsilon=0.8, confidence=0.9, batch_size=8)
    assert in_steps.num_draws == found.num_draws > 32
    assert in_steps.log_prob == pytest.approx(found.log_prob, abs=1e-4)
    gave_up = imitator.residual(2).enclose_log_prob("c", "b", max_draws=10)
    assert (gave_up.is_finished, gave_up.num_draws) == (False, 10)


def test_honest_answers_are_verified_and_another_candidate_or_coin_is_not(imitator):
    law = imitator.residual(4)
    drawn = law.answer(QUESTIONS, num_answers=8, seed=1, batch_size=7)
    honest = [[choice.answer.text for choice in own] for own in drawn]

    result = imitator.verify(QUESTIONS, honest, seed=1, resample=4)
    assert result.verified
    assert result.capacity_bits < 1
    tokens = sum(len(one.ids) for own in drawn for choice in own for one in choice.candidates)
    assert result.num_tokens == tokens + 24
    assert imitator.verify(QUESTIONS, [own[3:] for own in honest], seed=1, first_draw=3, resample=4).verified

    swapped = [list(own) for own in honest]
    losers = [one.answer.text for one in drawn[0][0].candidates if one.answer.text != honest[0][0]]
    swapped[0][0] = losers[0]
    assert imitator.verify(QUESTIONS, swapped, seed=1, resample=4).num_mismatched == 1
    other_coin = [[choice.candidates[int(choice.logits.argmax())].answer.text for choice in own] for own in drawn]
    changed = sum(x != y for a, b in zip(other_coin, honest, strict=True) for x, y in zip(a, b, strict=True))
    assert imitator.verify(QUESTIONS, other_coin, seed=1, resample=4).num_mismatched == changed > 0
    assert not imitator.verify(QUESTIONS, honest, seed=1, resample=3).verified
    assert not imitator.verify(QUESTIONS, honest, seed=2, resample=4).verified
    assert not imitator.verify(QUESTIONS, honest, seed=1).verified


def test_another_distinguisher_behind_the_choice_is_noticed(imitator):
    honest = imitator.answer(QUESTIONS, num_answers=20, seed=1, resample=4)
    biased = make_imitator(distinguisher=make_distinguisher(scale=-30.0))

    assert not biased.verify(QUESTIONS, honest, seed=1, resample=4).verified


def test_a_near_tie_of_candidates_is_tolerated_and_counted(imitator):
    drawn = imitator.residual(4).answer(["a b"], num_answers=30, seed=1)[0]
    margins = []
    for choice in drawn:
        same = {one.answer.text for one in choice.candidates} - {choice.answer.text}
        if same:
            others = [k for k, one in enumerate(choice.candidates) if one.answer.text != choice.answer.text]
            runner_up = max(others, key=lambda k: choice.perturbed[k].item())
            margins.append((choice.perturbed.max().item() - choice.perturbed[runner_up].item(), choice, runner_up))
    margin, choice, runner_up = min(margins, key=lambda item: item[0])
    texts = [one.answer.text for one in drawn]
    number = next(i for i, one in enumerate(drawn) if one is choice)
    texts[number] = choice.candidates[runner_up].answer.text

    assert not imitator.verify(["a b"], [texts], seed=1, resample=4, tolerance=margin * 0.5).verified
    result = imitator.verify(["a b"], [texts], seed=1, resample=4, tolerance=margin * 1.01)
    assert result.verified
    honest = [one.answer.text for one in drawn]
    without = imitator.verify(["a b"], [honest], seed=1, resample=4, tolerance=margin * 0.999).capacity_bits
    with_tie = imitator.verify(["a b"], [honest], seed=1, resample=4, tolerance=margin * 1.001).capacity_bits
    assert with_tie - without == pytest.approx(1)  # one choice more with two answers; of tokens, none


def test_equal_candidates_have_equal_logits_and_are_scored_once(imitator):
    seen = []

    class Counting:
        check_names = ()

        def score(self, prompts, answers, outcomes=None):
            seen.extend(zip(prompts, answers, strict=True))
            return imitator.distinguisher.score(prompts, answers, outcomes)

    same, cut = Answer("a", True), Answer("a", False)
    settings = {"checks": (), "columns": {}, "batch_size": 2}
    found = score_candidates(
        Counting(), imitator.renderer, ["a b", "c"], [[same, cut, same], [same, same, same]], **settings
    )

    assert len(seen) == len(set(seen)) == 3
    assert found[0][0] == found[0][2] != found[0][1]
    expected = imitator.distinguisher.score(["a b", "a b", "c"], [same, cut, same]).double()
    torch.testing.assert_close(torch.stack([found[0][0], found[0][1], found[1][0]]), expected, atol=1e-5, rtol=0)


def test_the_effective_number_of_candidates_and_log_z_are_those_of_the_draw(imitator):
    law = imitator.residual(6)
    found = law.resampling(QUESTIONS, seed=2)

    drawn = law.answer(QUESTIONS, seed=2)
    for row, own in enumerate(drawn):
        shares = own[0].logits.softmax(0)
        assert found.effective_candidates[row].item() == pytest.approx(1 / shares.square().sum().item())
        assert found.log_normalizer[row].item() == pytest.approx(own[0].logits.exp().mean().log().item())
    many = imitator.residual(3000).resampling(["c"], batch_size=1024).log_normalizer.item()
    p = plain_law(imitator.model, imitator.renderer.prompt_ids(["c"])[0])
    assert many == pytest.approx((p * all_logits(imitator, "c").exp()).sum().log().item(), abs=0.1)
    flat = make_imitator(distinguisher=make_distinguisher(scale=0.0)).residual(6).resampling(["c"])
    assert flat.effective_candidates.item() == pytest.approx(6)


def thinking():
    """A latent imitator of latent_worlds.py whose distinguisher reads the same words."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            **{"vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3},
            **{"bos_token_id": None, "eos_token_id": 7, "pad_token_id": 7},
        )
        model = get_peft_model(Qwen3ForCausalLM(config), latent_worlds.lora()).eval()
        distinguisher = Distinguisher.from_causal_lm(Qwen3ForCausalLM(config), latent_worlds.tokenizer())
    with torch.no_grad():
        distinguisher.head.weight *= 30
    law = ThoughtLaw((6,), latent_worlds.LONGEST, torch.tensor([True] * 6 + [False] * 2))
    imitator = Imitator(model, latent_worlds.tokenizer(), distinguisher=distinguisher, max_new_tokens=1)
    thinkers = Thinkers(model, law, Retrodictor.on_shared_base(model, latent_worlds.lora()), [7], 7)
    imitator.latent = LatentImitator(thinkers, imitator.renderer, max_answer_tokens=1)
    return imitator


def test_answers_after_thoughts_are_resampled_scored_and_verified_too():
    """One-token answers: a word, cut, or the end. p is summed over all 259 thoughts."""
    imitator = thinking()
    prompt = imitator.renderer.prompt_ids(["a b"])[0]
    law = imitator.latent.thinkers.law
    p = torch.tensor([latent_worlds.exact_log_prob(imitator.model, law, prompt, [token]) for token in range(8)]).exp()
    answers = [read(imitator, [token]) for token in range(8)]
    logits = imitator.distinguisher.score(["a b"] * 8, answers).double()
    sets = torch.tensor(list(itertools.product(range(8), repeat=2)))
    kept = logits[sets].softmax(1) * p[sets].prod(1, keepdim=True)
    truth = torch.zeros(8, dtype=torch.float64).index_add_(0, sets.flatten(), kept.flatten().double())[7]

    found = imitator.residual(2).log_prob(["a b"], [""], num_estimates=400, batch_size=512)
    estimates = found.log_weights[0].exp()
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / 20
    assert estimates.std() / 20 < 0.1 * truth
    assert abs(truth - p[7]) > 5 * estimates.std() / 20  # p alone would not pass

    drawn = imitator.answer(["a b"], num_answers=20, resample=3, seed=4)
    assert imitator.verify(["a b"], drawn, resample=3, seed=4).verified
    assert not imitator.verify(["a b"], drawn, resample=3, seed=5).verified
    alone = imitator.residual(1).log_prob(["a b"], [""], num_estimates=32)
    torch.testing.assert_close(alone.nats, imitator.log_prob(["a b"], [""], num_estimates=32).nats)
    with pytest.raises(NoCertificateError, match="two-sided"):
        imitator.residual(2).enclose_log_prob("a b", "")
    with pytest.raises(NoCertificateError, match="was cut"):
        imitator.residual(2).score_rows(["a b"], [Rendered(prompt, [1], False)])


def test_progress_says_what_it_cost(imitator, capsys):
    imitator.answer(QUESTIONS, num_answers=2, resample=4, progress=True)

    shown = capsys.readouterr().err
    assert "Drew 24 candidates (" in shown
    assert "different candidates of 24 in" in shown
    imitator.answer(QUESTIONS, num_answers=2, resample=4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("resample", [0, -3, 2.5, None, "8"])
def test_a_number_of_candidates_that_is_none_is_an_error(imitator, resample):
    calls = [
        lambda: imitator.answer(QUESTIONS, resample=resample),
        lambda: imitator.log_prob(QUESTIONS, ["a"] * 3, resample=resample),
        lambda: imitator.verify(QUESTIONS, [["a"]] * 3, resample=resample),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"`resample` is {resample}"):
            call()


def test_without_a_distinguisher_the_error_says_where_one_comes_from():
    plain = make_imitator()
    assert plain.answer(["c"], resample=1)
    with pytest.raises(FileNotFoundError, match=r"distinguisher/"):
        plain.answer(["c"], resample=2)
    with pytest.raises(FileNotFoundError, match=r"distinguisher/"):
        plain.log_prob(["c"], ["a"], resample=2)


def test_missing_checks_and_columns_are_named(checked, imitator):
    with pytest.raises(ValueError, match=r"trained with the checks \['says_wanted'\]; got \[\]"):
        checked.answer(["c"], resample=2)
    with pytest.raises(ValueError, match=r"trained with the checks \[\]; got \['says_wanted'\]"):
        imitator.log_prob(["c"], ["a"], resample=2, checks=[says_wanted], wanted=["a"])
    with pytest.raises(ValueError, match="`wanted` has 1 values for 2 questions"):
        checked.answer(["c", "b"], resample=2, checks=[says_wanted], wanted=["a"])
    with pytest.raises(TypeError, match=r"unknown arguments \['num_answer'\]"):
        imitator.answer(["c"], num_answer=4)
    with pytest.raises(TypeError, match="`wanted` is a str"):
        checked.answer(["c"], resample=2, checks=[says_wanted], wanted="a")
    with pytest.raises(ValueError, match="`num_estimates` is 0"):
        imitator.log_prob(["c"], ["a"], resample=2, num_estimates=0)


def test_logits_that_are_no_numbers_are_an_error_before_a_choice(imitator):
    broken = make_imitator(distinguisher=make_distinguisher(scale=math.nan))
    with pytest.raises(ValueError, match="logits of the distinguisher are NaN"):
        broken.answer(["c"], resample=2)


def test_nothing_asked_is_nothing_resampled(imitator):
    assert imitator.answer([], resample=4) == []
    assert imitator.log_prob([], [], resample=4).nats.shape == (0,)
    assert imitator.verify([], [], resample=4).verified
    assert imitator.residual(4).resampling([]).effective_candidates.shape == (0,)
    assert imitator.verify(["c"], [[]], resample=4).num_tokens == 0
    with pytest.raises(ValueError, match="`num_answers` is 0"):
        imitator.answer(["c"], num_answers=0, resample=4)


def test_the_tempered_law_is_scored_by_tempered_companions(imitator):
    index = [read(imitator, ids) for ids in OUTCOMES].index(Answer("a", True))
    truth = exact_law(imitator, "a b", 2, temperature=2.0)[index].log().item()
    assert abs(truth - exact_law(imitator, "a b", 2)[index].log().item()) > 0.3

    found = imitator.log_prob(["a b"], ["a"], resample=2, temperature=2.0, num_estimates=600, batch_size=1024)

    assert found.nats.item() == pytest.approx(truth, abs=0.1)


def test_a_law_may_be_asked_at_another_temperature_and_length(imitator):
    cold = imitator.residual(3, temperature=1e-4, max_new_tokens=1)
    texts = {choice.answer.text for choice in cold.answer(["c"], num_answers=20)[0]}
    assert len(texts) == 1
    assert isinstance(cold, ResidualImitator)
    assert imitator.answer(["c"], 20, temperature=1e-4, max_new_tokens=1, resample=3)[0] == [texts.pop()] * 20
