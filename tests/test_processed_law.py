"""The law that is left after temperature, top-k and top-p: the one that transformers samples from, scored exactly."""

import math

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import (
    ProcessedLaw,
    answer_statistics,
    draw_processed,
    token_statistics,
)
from hf_imitate.sampling import draw_answers
from hf_imitate.scoring import score_answers

QUESTIONS = ["Return the number", "Set the name", "Return the list of"]


@pytest.fixture(scope="module")
def imitator(tiny_model_dir):
    loaded = Imitator.from_pretrained(tiny_model_dir, device="cpu")
    loaded.max_new_tokens = 6
    return loaded


def by_hand(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Temperature, then top-k, then the smallest set of the likeliest tokens that holds top_p."""
    p = torch.softmax(logits / temperature, -1)
    if top_k:
        p = torch.where(p >= p.topk(top_k).values[..., -1:], p, 0.0)
        p = p / p.sum(-1, keepdim=True)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[order[before < top_p]] = True
    p = torch.where(keep, p, 0.0)
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 1.5, "top_k": 6, "top_p": 0.8}],
)
def test_the_law_is_the_one_worked_out_by_hand(settings):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    law = ProcessedLaw(settings).log_law(logits[None])[0]
    torch.testing.assert_close(law.exp(), by_hand(logits, **settings), atol=1e-6, rtol=1e-5)


def test_nothing_set_is_the_plain_law():
    law = ProcessedLaw(None)
    assert law.describe() == "temperature 1, untruncated"
    assert (law.temperature, law.is_truncated, law.settings) == (1.0, False, {})
    neutral = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=9)
    assert ProcessedLaw(neutral).settings == {}
    assert ProcessedLaw({"top_p": 0.9}).is_truncated
    assert ProcessedLaw({"top_p": 0.9}).temperature is None
    assert ProcessedLaw({"temperature": 0.5}).temperature == 0.5


def test_without_sampling_the_law_is_the_likeliest_token():
    law = ProcessedLaw(GenerationConfig())
    assert law.log_law(torch.tensor([[1.0, 3.0, 2.0]])).exp().tolist() == [[0.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="would have no effect"):
        ProcessedLaw({"do_sample": False, "temperature": 0.5})


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.2}, {"num_beams": 4}, {"no_repeat_ngram_size": 2}])
def test_a_law_that_depends_on_what_was_said_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ProcessedLaw(setting)
    ProcessedLaw({"repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0})


def test_statistics_of_a_token_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    nats, entropy, variance, log_rank = token_statistics(p.log(), torch.tensor([2]))[:, 0].tolist()
    assert nats == pytest.approx(math.log(0.25))
    assert entropy == pytest.approx(1.5 * math.log(2))
    assert variance == pytest.approx(0.25 * math.log(2) ** 2)  # log2 p is -1 or -2, half the time each
    assert log_rank == pytest.approx(math.log(2))  # one token is likelier
    assert token_statistics(p.log(), torch.tensor([3]))[0, 0] == -math.inf


def test_plain_scores_are_those_of_scoring(imitator):
    rows = imitator.renderer.human(QUESTIONS, ["items in it.", "of the file", "the names and return it."])
    found = answer_statistics(imitator.model, rows, 1)
    torch.testing.assert_close(found.nats, score_answers(imitator.model, rows, 1), atol=1e-5, rtol=0)
    assert found.num_tokens.tolist() == [len(row.answer_ids) for row in rows]
    # A random small model is close to uniform over its 300 tokens.
    per_token = found.entropy / found.num_tokens
    assert (per_token > 0.8 * math.log(300)).all()
    assert (per_token <= math.log(300) + 1e-6).all()


def test_draws_of_a_temperature_are_those_that_can_be_verified(imitator):
    law = ProcessedLaw({"temperature": 0.8})
    questions, numbers = [*QUESTIONS, QUESTIONS[0]], [0, 0, 0, 1]
    settings = {"seed": 3, "max_new_tokens": 6}
    mine = draw_processed(imitator.model, imitator.renderer, law, questions, numbers, **settings)
    theirs = draw_answers(imitator.model, imitator.renderer, QUESTIONS, num_answers=2, temperature=0.8, **settings)
    assert [mine[0], mine[3]] == theirs[0]
    assert [mine[1], mine[2]] == [theirs[1][0], theirs[2][0]]


def test_truncated_draws_follow_the_law_that_is_scored(imitator):
    """First tokens of 3 000 draws against the exact processed law: chi-square, and nothing outside the support."""
    law = ProcessedLaw({"temperature": 0.5, "top_k": 8})
    draws = draw_processed(
        *(imitator.model, imitator.renderer, law, [QUESTIONS[0]] * 3000, list(range(3000))),
        seed=0,
        max_new_tokens=1,
        batch_size=500,
    )
    ids = imitator.renderer.prompt_ids([QUESTIONS[0]])
    with torch.no_grad():
        logits = imitator.model(input_ids=torch.tensor(ids)).logits[0, -1:]
    p = law.log_law(logits)[0].exp().double()
    counts = torch.bincount(torch.tensor([draw.ids[0] for draw in draws]), minlength=len(p))
    assert counts[p == 0].sum() == 0
    support = p > 0
    assert int(support.sum()) == 8
    assert chisquare(counts[support].numpy(), (p[support] / p[support].sum() * 3000).numpy()).pvalue > 1e-3


def test_an_answer_outside_the_support_has_probability_zero(imitator):
    rows = imitator.renderer.human(QUESTIONS, ["zzzz", "qqqq", "xxxx"])
    found = answer_statistics(imitator.model, rows, 1, ProcessedLaw({"top_k": 1}))
    assert (found.nats == -math.inf).all()
    assert found.entropy.abs().max() < 1e-6
    drawn = draw_processed(
        *(imitator.model, imitator.renderer, ProcessedLaw({"top_k": 1}), QUESTIONS, [0, 0, 0]),
        seed=0,
        max_new_tokens=6,
    )
    again = [row._replace(answer_ids=draw.ids) for row, draw in zip(rows, drawn, strict=True)]
    assert answer_statistics(imitator.model, again, 1, ProcessedLaw({"top_k": 1})).nats.abs().max() < 1e-6
