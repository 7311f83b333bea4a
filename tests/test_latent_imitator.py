"""An imitator that thinks: its answers hide the thought, its log-probabilities are bounded from below."""

import math

import latent_worlds as worlds
import pytest
import torch
from peft import get_peft_model

from hf_imitate.latent_imitator import LatentImitator
from hf_imitate.rendering import Renderer
from hf_imitate.retrodictor import Retrodictor, Thinkers
from hf_imitate.thoughts import ThoughtLaw


@pytest.fixture(scope="module")
def imitator(tmp_path_factory):
    model = get_peft_model(worlds.load_world(worlds.save_world(tmp_path_factory.mktemp("world"))), worlds.lora())
    law = ThoughtLaw((6,), worlds.LONGEST, torch.tensor([True] * 6 + [False] * 2))
    thinkers = Thinkers(model.eval(), law, Retrodictor.on_shared_base(model, worlds.lora()), [7], 7)
    return LatentImitator(thinkers, Renderer(worlds.tokenizer(), [7]), max_answer_tokens=4)


def exact(imitator, question: str, answer: str) -> float:
    row = imitator.renderer.human([question], [answer])[0]
    return worlds.exact_log_prob(imitator.thinkers.model, imitator.thinkers.law, row.prompt_ids, row.answer_ids)


def test_estimates_come_near_the_exact_log_p_and_bounds_stay_below(imitator):
    questions, answers = ["d d", "d d", "a b"], ["c", "d", "f"]
    result = imitator.log_prob(questions, answers, num_estimates=256)
    truth = torch.tensor([exact(imitator, q, a) for q, a in zip(questions, answers, strict=True)], dtype=torch.float64)
    assert (result.nats[:2] - truth[:2]).abs().max() < 0.3
    assert (result.lower_bound < truth).all()
    torch.testing.assert_close(result.lower_bound, result.nats - math.log(20))
    assert result.log_weights.shape == (3, 256)
    assert (result.effective_sample_size >= 1).all()


def test_the_bound_misses_no_oftener_than_it_says(imitator):
    """400 estimates from one thought each, at confidence one half: at most half may exceed the truth."""
    truth, number = exact(imitator, "a b", "f"), 400
    bounds = imitator.log_prob(["a b"] * number, ["f"] * number, confidence=0.5, num_estimates=1).lower_bound
    missed = (bounds > truth).double().mean().item()
    assert 0 < missed < 0.5


def test_repeated_rows_are_estimated_from_thoughts_of_their_own(imitator):
    """A bound over a test set multiplies estimates, so no two may share their randomness."""
    twice = imitator.log_prob(["a b", "a b", "a b"], ["f", "f", "e"], num_estimates=8)
    assert twice.nats[0] != twice.nats[1]
    alone = imitator.log_prob(["a b"], ["f"], num_estimates=8)
    torch.testing.assert_close(alone.nats, twice.nats[:1], atol=1e-6, rtol=0)
    again = imitator.log_prob(["a b"], ["f"], num_estimates=8, seed=1)
    assert again.nats[0] != alone.nats[0]


def test_answers_do_not_show_the_thought_and_do_not_depend_on_the_batch(imitator):
    drawn = imitator.answer(["a b", "d d c"], num_answers=6, seed=2)
    assert all(one.answer.text == imitator.renderer.read(one.ids).text for own in drawn for one in own)
    assert any(one.thought for own in drawn for one in own)
    alone = imitator.answer(["d d c"], num_answers=4, seed=2, first_draw=2, batch_size=3)
    assert alone[0] == drawn[1][2:]
    assert all(len(one.ids) <= 4 for own in drawn for one in own)


def test_settings_out_of_range_are_refused(imitator):
    with pytest.raises(ValueError, match="num_estimates"):
        imitator.log_prob(["a"], ["b"], num_estimates=0)
    with pytest.raises(ValueError, match="temperature"):
        imitator.answer(["a"], temperature=0.0)
    assert imitator.log_prob([], []).nats.shape == (0,)
    assert imitator.answer([]) == []


def test_answers_after_thoughts_are_verified_by_drawing_them_again(imitator):
    questions = ["a b", "d d c"]
    texts = [[one.answer.text for one in own] for own in imitator.answer(questions, num_answers=3, seed=5)]
    found = imitator.verify(questions, texts, seed=5, batch_size=2)
    drawn = imitator.answer(questions, num_answers=3, seed=5)
    assert found.verified
    assert found.num_mismatched == 0
    assert found.num_tokens == sum(len(one.thought_ids) + 1 + len(one.ids) for own in drawn for one in own)
    assert found.capacity_bits < 0.1
    assert imitator.verify(questions, texts, seed=5, tolerance=50.0).capacity_bits > found.num_tokens


def test_an_answer_of_another_seed_or_one_changed_word_is_a_mismatch(imitator):
    questions = ["a b", "d d c"]
    texts = [[one.answer.text for one in own] for own in imitator.answer(questions, num_answers=3, seed=5)]
    texts[1][2] = texts[1][2] + " a"
    assert imitator.verify(questions, texts, seed=5).num_mismatched == 1
    assert imitator.verify(questions, texts, seed=6).num_mismatched > 1
    continued = [own[1:] for own in texts[:1]]
    assert imitator.verify(questions[:1], continued, seed=5, first_draw=1).verified
    assert not imitator.verify(questions[:1], continued, seed=5).verified


def test_progress_and_batches_change_no_estimate(imitator):
    questions, answers = ["a b"] * 5, ["f", "e", "f", "d", "c"]
    whole = imitator.log_prob(questions, answers, num_estimates=8)
    parts = imitator.log_prob(questions, answers, num_estimates=8, batch_size=1)
    torch.testing.assert_close(whole.log_weights, parts.log_weights, atol=1e-5, rtol=0)


def test_every_draw_counts_also_those_that_are_no_number(imitator, monkeypatch):
    """Weights of 0 and NaN stay in the mean, and the bound with them; all of them together are -inf, not an error."""
    whole = imitator.log_prob(["a b"], ["f"], num_estimates=8)
    log_weights = imitator.thinkers.log_weights

    def broken(rows, keys, temperature=1.0, number=4):
        log_p, log_q, drawn = log_weights(rows, keys, temperature)
        log_p[:, : number // 2], log_p[:, number // 2 : number] = math.nan, -math.inf
        return log_p, log_q, drawn

    monkeypatch.setattr(imitator.thinkers, "log_weights", broken)
    half = imitator.log_prob(["a b"], ["f"], num_estimates=8)
    expected = torch.logsumexp(whole.log_weights[:, 4:], dim=1) - math.log(8)
    torch.testing.assert_close(half.nats, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(half.lower_bound, expected - math.log(20), atol=1e-6, rtol=0)
    assert half.effective_sample_size <= 4
    monkeypatch.setattr(imitator.thinkers, "log_weights", lambda *given: broken(*given, number=8))
    nothing = imitator.log_prob(["a b"], ["f"], num_estimates=8)
    assert nothing.nats == nothing.lower_bound == -math.inf
    assert nothing.effective_sample_size == 0
