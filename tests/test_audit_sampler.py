import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
from audit_evidence import by_name, evidence_of
from scipy.stats import chi2, chisquare, kstest

from hf_imitate.audits.sampler import audit_sampler, first_token_chi_square, randomised_ranks
from hf_imitate.imitator import Imitator
from hf_imitate.rendering import Answer
from hf_imitate.sampling import Draw, draw_answers

QUESTIONS = ["Return the", "Set the name of", "list", "file and"]
SEED = 11


@pytest.fixture(scope="module")
def imitator(tiny_model_dir):
    return Imitator.from_pretrained(tiny_model_dir, device="cpu")


@pytest.fixture(scope="module")
def evidence(imitator):
    """Two draws of each of four questions, as the imitator gives them."""
    answers = imitator.answer(QUESTIONS, num_answers=2, seed=SEED, max_new_tokens=6)
    texts = [text for pair in answers for text in pair]
    prompts = [question for question in QUESTIONS for _ in range(2)]
    question = np.repeat(np.arange(4), 2)
    return evidence_of(np.zeros(8), imitator_texts=texts, question=question, prompts=prompts, seed=SEED)


def audited(imitator, evidence, **settings):
    return by_name(audit_sampler(imitator, evidence, **{"num_questions": 2, "num_draws": 150, **settings}))


# --- re-execution ---


def test_what_the_imitator_drew_matches_and_leaves_next_to_nothing_to_hide(imitator, evidence):
    found = audited(imitator, evidence, max_new_tokens=6)
    assert set(found) == {"sampler_match", "sampler_conformance"}
    match = found["sampler_match"]
    assert match.value == 1.0
    assert match.n >= 40
    assert "0 of" in match.detail
    assert "bits could hide" in match.detail


def test_answers_of_another_seed_do_not_match(imitator, evidence):
    for other in (audited(imitator, evidence, seed=12), audited(imitator, dataclasses.replace(evidence, seed=12))):
        assert other["sampler_match"].value < 0.5
        assert "Nothing bounds" in other["sampler_match"].detail


def test_one_exchanged_answer_is_seen(imitator, evidence):
    answers = list(evidence.imitator_answers)
    answers[3] = Answer("list", True)
    found = audited(imitator, dataclasses.replace(evidence, imitator_answers=answers), max_new_tokens=6)
    assert 0.5 < found["sampler_match"].value < 1


def test_the_draws_of_a_question_are_numbered_in_the_order_of_its_rows(imitator, evidence):
    """Rows of different questions may be mixed; exchanging two draws of one question is a mismatch."""
    mixed = [0, 2, 4, 6, 1, 3, 5, 7]
    answers = [evidence.imitator_answers[row] for row in mixed]
    prompts = [evidence.prompts[row] for row in mixed]
    fields = {"question": evidence.question[mixed], "prompts": prompts}
    good = dataclasses.replace(evidence, imitator_answers=answers, **fields)
    assert audited(imitator, good, max_new_tokens=6)["sampler_match"].value == 1.0
    exchanged = answers[4:] + answers[:4]
    bad = dataclasses.replace(good, imitator_answers=exchanged)
    assert audited(imitator, bad, max_new_tokens=6)["sampler_match"].value < 1.0


# --- repetition ---


def test_the_packages_own_sampler_conforms(imitator, evidence):
    found = audited(imitator, evidence)["sampler_conformance"]
    assert found.value > 0.01
    assert found.n == 300
    assert "No deviation was seen" in found.detail or found.value < 0.05


def test_another_temperature_does_not_conform(imitator, evidence):
    def colder(questions, num_draws, seed, max_new_tokens):
        settings = {"num_answers": num_draws, "seed": seed, "max_new_tokens": max_new_tokens, "temperature": 0.2}
        return draw_answers(imitator.model, imitator.renderer, questions, **settings)

    found = audited(imitator, evidence, draw=colder)["sampler_conformance"]
    assert found.value < 1e-6
    assert "It does not conform" in found.detail
    # The same draws conform to the law they come from.
    assert audited(imitator, evidence, draw=colder, temperature=0.2)["sampler_conformance"].value > 0.01


def test_a_sampler_that_repeats_its_randomness_does_not_conform(imitator, evidence):
    def stuck(questions, num_draws, seed, max_new_tokens):
        settings = {"num_answers": 1, "seed": seed, "max_new_tokens": max_new_tokens}
        drawn = draw_answers(imitator.model, imitator.renderer, questions, **settings)
        return [of_question * num_draws for of_question in drawn]

    assert audited(imitator, evidence, draw=stuck)["sampler_conformance"].value < 1e-6


def test_a_sampler_that_fails_is_not_measured(imitator, evidence):
    def broken(questions, num_draws, seed, max_new_tokens):
        raise ValueError("SECRET")

    found = audited(imitator, evidence, draw=broken)["sampler_conformance"]
    assert found.value is None
    assert "ValueError" in found.detail
    assert "SECRET" not in found.detail


def test_draws_without_tokens_tell_nothing(imitator, evidence):
    found = audited(imitator, evidence, draw=lambda questions, *_: [[Draw([], Answer("", False))]] * len(questions))
    assert found["sampler_conformance"].value is None
    assert "no token" in found["sampler_conformance"].detail


def test_what_cannot_be_verified_is_not(imitator, evidence):
    truncated = audited(imitator, dataclasses.replace(evidence, is_truncated_law=True))
    assert truncated["sampler_match"].value is truncated["sampler_conformance"].value is None
    assert "truncated" in truncated["sampler_match"].detail
    estimated = audited(imitator, dataclasses.replace(evidence, is_exact=False))
    assert estimated["sampler_conformance"].value is None
    assert "hidden thoughts" in estimated["sampler_conformance"].detail


# --- the two tests of the law ---


def test_chi_square_agrees_with_scipy_where_no_token_is_rare():
    law = np.array([0.5, 0.3, 0.2])
    counts = np.array([40, 45, 15])
    found = first_token_chi_square(counts, law)
    assert found.degrees == 2
    assert found.statistic == pytest.approx(chisquare(counts, 100 * law).statistic)


def test_rare_tokens_share_a_cell_that_is_large_enough():
    # 100 draws: 48, 44, 5 | 2, 1 are rare, and 3 together; so the cell of 5 joins them.
    law = np.array([0.02, 0.48, 0.05, 0.44, 0.01])
    counts = np.array([0, 50, 8, 40, 2])
    found = first_token_chi_square(counts, law)
    assert found.degrees == 2
    assert found.statistic == pytest.approx(chisquare([50, 40, 10], [48, 44, 8]).statistic)
    assert first_token_chi_square(np.array([99, 1]), np.array([0.99, 0.01])).degrees == 0
    assert first_token_chi_square(np.full(500, 1), np.full(500, 1 / 500)).degrees == 0
    with pytest.raises(ValueError, match="one probability per token"):
        first_token_chi_square(np.ones(3), np.ones(2))


def test_both_tests_keep_their_level_on_honest_draws():
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.full(32, 0.5))
    counts = rng.multinomial(300, law, 2000)
    tests = [first_token_chi_square(row, law) for row in counts]
    rejected = np.mean([chi2.sf(*test) < 0.05 for test in tests])
    assert 0.03 < rejected < 0.07
    tokens = rng.choice(32, 300 * 400, p=law)
    ranks = randomised_ranks(np.broadcast_to(law, (len(tokens), 32)), tokens, rng).reshape(400, 300)
    assert 0.02 < np.mean([kstest(row, "uniform").pvalue < 0.05 for row in ranks]) < 0.09


def test_randomised_ranks_by_hand():
    laws = np.array([[0.2, 0.5, 0.2, 0.1]] * 4)
    coin = type("Coin", (), {"random": staticmethod(lambda n: np.full(n, 0.5))})
    # Likelier tokens first; of equals, the first by id.
    assert randomised_ranks(laws, np.array([1, 0, 2, 3]), coin) == pytest.approx([0.25, 0.6, 0.8, 0.95])


@pytest.mark.parametrize(("strength", "power_at_300"), [(0.25, 0.55), (0.5, 0.95)])
def test_a_fixed_key_rotation_is_seen_as_often_as_measured_before(strength, power_at_300):
    """Half of the circle of coins is preferred, always the same half: unbiased over keys, not for one."""
    rng = np.random.default_rng(0)
    found = []
    for key in range(300):
        law = rng.dirichlet(np.ones(32))
        turn = int.from_bytes(hashlib.blake2b(bytes([key % 256, key // 256]), digest_size=8).digest()) / 2**64
        is_preferred = rng.random(300) < (1 + strength) / 2
        coins = (turn + 0.5 * rng.random(300) + np.where(is_preferred, 0, 0.5)) % 1
        counts = np.bincount(np.searchsorted(law.cumsum(), coins).clip(0, 31), minlength=32)
        found.append(chi2.sf(*first_token_chi_square(counts, law)) < 0.05)
    # Measured by others: .64 and 1.00 with 32 tokens and 300 draws.
    assert np.mean(found) > power_at_300


def test_the_law_compared_with_is_the_models_own(imitator, evidence):
    """By another road: one plain forward, and the exact chi-square of the draws' first tokens."""
    kept = {}

    def kept_draws(questions, num_draws, seed, max_new_tokens):
        settings = {"num_answers": num_draws, "seed": seed, "max_new_tokens": 1}
        kept["draws"] = draw_answers(imitator.model, imitator.renderer, questions, **settings)
        kept["questions"] = questions
        return kept["draws"]

    found = audited(imitator, evidence, draw=kept_draws)["sampler_conformance"]
    statistic, degrees = 0.0, 0
    for question, draws in zip(kept["questions"], kept["draws"], strict=True):
        with torch.no_grad():
            logits = imitator.model(torch.tensor(imitator.renderer.prompt_ids([question]))).logits[0, -1]
        law = torch.softmax(logits.double(), 0).numpy()
        test = first_token_chi_square(np.bincount([draw.ids[0] for draw in draws], minlength=len(law)), law)
        statistic, degrees = statistic + test.statistic, degrees + test.degrees
    told = float(found.detail.split("first token p = ")[1].split(" ")[0]) if degrees else math.nan
    assert degrees == 0 or told == pytest.approx(chi2.sf(statistic, degrees), rel=0.02)
