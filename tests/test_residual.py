"""The law of one answer kept out of K, and its unbiased estimate: everything against enumeration of a small law."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_imitate.residual import describe_resampling, resampled_log_prob, resampling_log_factors, two_sided_rule
from hf_imitate.retrodictive_bounds import log_prob_lower_bound

P = torch.tensor([0.45, 0.30, 0.20, 0.05], dtype=torch.float64)
LOGITS = torch.tensor([-1.2, 0.4, 2.1, -0.3], dtype=torch.float64)


def tuples(length):
    """Every tuple of outcomes and its probability under P. [4^length, length], [4^length]."""
    listed = list(itertools.product(range(4), repeat=length))
    indices = torch.tensor(listed, dtype=torch.long).reshape(len(listed), length)
    return indices, P[indices].prod(dim=1)


def law_of_the_procedure(num_candidates, logits=LOGITS):
    """Draw K, keep one: the probability of each answer, summed over every set of candidates and every choice."""
    indices, probability = tuples(num_candidates)
    kept = torch.softmax(logits[indices], dim=1) * probability[:, None]
    return torch.zeros(4, dtype=torch.float64).index_add_(0, indices.flatten(), kept.flatten())


def mean_estimates(num_candidates, logits=LOGITS):
    """E of p F for each answer, summed over every set of companions."""
    indices, probability = tuples(num_candidates - 1)
    factors = torch.stack([resampling_log_factors(s.expand(len(indices)), logits[indices]).exp() for s in logits])
    return P * (factors @ probability)


@pytest.mark.parametrize("num_candidates", [1, 2, 3, 5])
def test_the_estimate_is_unbiased_for_the_law_of_the_procedure(num_candidates):
    law = law_of_the_procedure(num_candidates)

    torch.testing.assert_close(mean_estimates(num_candidates), law, atol=1e-13, rtol=0)
    assert law.sum().item() == pytest.approx(1, abs=1e-13)


def test_simulated_procedures_keep_answers_as_often_as_the_law_says():
    rng, number = np.random.default_rng(0), 100_000
    candidates = rng.choice(4, size=(number, 3), p=P.numpy())
    noise = -np.log(-np.log(rng.random((number, 3))))
    kept = candidates[np.arange(number), (LOGITS.numpy()[candidates] + noise).argmax(axis=1)]

    law = law_of_the_procedure(3).numpy()
    deviation = (np.bincount(kept, minlength=4) / number - law) / np.sqrt(law * (1 - law) / number)
    assert np.abs(deviation).max() < 4
    assert abs(law[2] - P[2].item()) > 0.1  # far from what p alone would give


def test_one_candidate_is_the_plain_law():
    assert torch.equal(resampling_log_factors(LOGITS, torch.empty(4, 0)), torch.zeros(4, dtype=torch.float64))


def test_many_candidates_tend_to_the_reweighted_law():
    limit = P * LOGITS.exp() / (P * LOGITS.exp()).sum()
    distance = [(law_of_the_procedure(k) - limit).abs().sum() / 2 for k in (1, 2, 4, 8)]
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(distance))

    companions = np.random.default_rng(0).choice(4, size=100_000, p=P.numpy())
    factors = resampling_log_factors(LOGITS, LOGITS[companions].expand(4, -1))
    torch.testing.assert_close(P * factors.exp(), limit, atol=0.01, rtol=0)


def test_at_the_optimal_logit_many_candidates_answer_as_the_human():
    human = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    off_by = [(law_of_the_procedure(k, (human / P).log() + 7.0) - human).abs().sum() / 2 for k in (1, 2, 8)]
    assert off_by[2] < 0.4 * off_by[0]
    assert off_by[0] > off_by[1] > off_by[2]


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_factor_is_finite_and_at_most_the_number_of_candidates(scale):
    torch.manual_seed(0)
    logits = torch.randn(1000, 8) * scale

    log_factors = resampling_log_factors(logits[:, 0], logits[:, 1:])

    assert log_factors.isfinite().all()
    assert log_factors.max() <= math.log(8)
    assert log_factors.max() > math.log(8) - 0.5


def test_a_constant_added_to_every_logit_changes_nothing():
    companions = torch.tensor([[0.5, -2.0], [1.0, 3.0]], dtype=torch.float64)
    logit = torch.tensor([0.1, -0.7], dtype=torch.float64)

    shifted = resampling_log_factors(logit + 300, companions + 300)

    torch.testing.assert_close(shifted, resampling_log_factors(logit, companions))


def test_the_mean_of_estimates_is_unbiased_and_its_log_too_low_by_the_stated_bias():
    """Answer 2 at K = 2 from E = 4 estimates: all 4^4 sets of companions, so every expectation is exact."""
    indices, probability = tuples(4)
    log_factors = resampling_log_factors(LOGITS[2].expand(len(indices), 4), LOGITS[indices][..., None])
    found = resampled_log_prob(P[2].log()[None], log_factors)
    truth = law_of_the_procedure(2)[2]

    assert (found.log_prob.exp() @ probability).item() == pytest.approx(truth.item(), abs=1e-13)
    bias = (found.log_prob @ probability - truth.log()).item()
    assert bias < 0
    assert (found.log_bias @ probability).item() == pytest.approx(bias, rel=0.25)


def test_estimates_of_p_multiply_in():
    """p, too, estimated: by two values of mean p. Still unbiased, over all products."""
    p_estimates = torch.tensor([0.5, 1.5], dtype=torch.float64) * P[1]
    means = []
    for (first, second), companions in itertools.product(itertools.product(p_estimates, repeat=2), tuples(2)[0]):
        log_factors = resampling_log_factors(LOGITS[1].expand(2), LOGITS[companions][:, None])
        found = resampled_log_prob(torch.stack([first, second]).log(), log_factors)
        means.append(found.log_prob.exp() * P[companions].prod() / 4)

    assert torch.stack(means).sum().item() == pytest.approx(law_of_the_procedure(2)[1].item(), abs=1e-13)


def test_equal_estimates_count_in_full_and_one_alone_says_nothing_of_its_bias():
    even = resampled_log_prob(torch.tensor([-3.0]), torch.full((5,), 0.5, dtype=torch.float64))
    assert even.effective_sample_size.item() == pytest.approx(5)
    assert even.log_bias.item() == pytest.approx(0)
    assert even.log_prob.item() == pytest.approx(-2.5)

    alone = resampled_log_prob(torch.tensor([[-3.0]]), torch.tensor([[0.5]], dtype=torch.float64))
    assert alone.log_bias.isnan().all()
    assert alone.effective_sample_size.tolist() == [1.0]

    uneven = resampled_log_prob(torch.tensor([0.0]), torch.tensor([0.0, -40.0], dtype=torch.float64))
    assert uneven.effective_sample_size.item() == pytest.approx(1)


def test_candidates_are_described_by_their_softmax():
    found = describe_resampling(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3.0), -50.0, -50.0]]))

    torch.testing.assert_close(found.effective_candidates, torch.tensor([4.0, 1 / (1 / 16 + 9 / 16)]).double())
    torch.testing.assert_close(found.log_normalizer, torch.tensor([0.0, 0.0]).double(), atol=1e-6, rtol=0)


def test_the_normalizer_is_estimated_without_bias():
    indices, probability = tuples(3)
    mean = describe_resampling(LOGITS[indices]).log_normalizer.exp() @ probability
    assert mean.item() == pytest.approx((P * LOGITS.exp()).sum().item(), abs=1e-13)


def draw_log_weights(answer, num_candidates, shape, seed):
    """log p + log F of fresh companions, vectorised. [*shape]."""
    companions = np.random.default_rng(seed).choice(4, size=(*shape, num_candidates - 1), p=P.numpy())
    return (P[answer].log() + resampling_log_factors(LOGITS[answer].expand(shape), LOGITS[companions])).numpy()


@pytest.mark.parametrize(("answer", "num_estimates", "confidence"), [(0, 1, 0.5), (1, 4, 0.7), (2, 1, 0.6)])
def test_lower_bounds_cover_at_least_as_often_as_they_say(answer, num_estimates, confidence):
    log_weights = draw_log_weights(answer, 4, (20_000, num_estimates), seed=answer)

    bounds = log_prob_lower_bound(log_weights, confidence)

    truth = law_of_the_procedure(4)[answer].log().item()
    assert (bounds <= truth).mean() >= confidence
    # Not vacuous: the same without the price of confidence covers too rarely.
    assert 0.1 < (bounds + math.log(1 / (1 - confidence)) <= truth).mean() < 0.9


def test_the_two_sided_interval_covers_as_often_as_it_says():
    """12 000 replicates of the stopping rule at once, epsilon 1 and confidence 0.9; the first ones by the class."""
    answer, num_candidates, replicates = 1, 3, 12_000
    truth = law_of_the_procedure(num_candidates)[answer].log().item()
    rule = two_sided_rule(P[answer].log().item(), num_candidates, epsilon=1.0, confidence=0.9)
    length = int(2.5 * rule.expected_draws(truth))
    log_weights = draw_log_weights(answer, num_candidates, (replicates, length), seed=5)

    total = np.cumsum(np.exp(log_weights - rule.log_largest_weight), axis=1)
    assert (total[:, -1] >= rule.threshold).all()
    num_draws = (total >= rule.threshold).argmax(axis=1) + 1
    log_estimates = rule.log_largest_weight + np.log(rule.threshold / num_draws)

    is_covered = np.abs(log_estimates - truth) <= math.log(2)
    assert is_covered.mean() >= 0.9
    assert np.abs(log_estimates - truth).max() > 0.02  # it does vary
    for replicate in range(20):
        rule = two_sided_rule(P[answer].log().item(), num_candidates, epsilon=1.0, confidence=0.9)
        rule.add(log_weights[replicate])
        found = rule.result()
        assert found.num_draws == num_draws[replicate]
        assert found.log_prob == pytest.approx(log_estimates[replicate])
        assert found.interval.low <= truth <= found.interval.high


def test_an_interval_may_reach_above_the_plain_probability():
    """The factor is larger than 1 where the distinguisher likes an answer: nothing is cut off at F = 1."""
    truth = law_of_the_procedure(4)[2].item()
    assert truth > 1.5 * P[2].item()
    rule = two_sided_rule(P[2].log().item(), 4, epsilon=0.3)
    rule.add(draw_log_weights(2, 4, (20_000,), seed=1))
    assert rule.result().is_finished
    assert P[2].log().item() < rule.result().interval.low < math.log(truth) < rule.result().interval.high


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_counted(bad):
    with pytest.raises(ValueError, match="1 of 3 logits"):
        resampling_log_factors(torch.tensor(0.0), torch.tensor([bad, 1.0]))
    with pytest.raises(ValueError, match="1 of 2 logits"):
        describe_resampling(torch.tensor([bad, 1.0]))


def test_shapes_that_do_not_belong_together_are_named():
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(4,\)"):
        resampling_log_factors(torch.zeros(4), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"got \(4,\) and \(4,\)"):
        resampling_log_factors(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize(("log_p", "num_candidates"), [(0.1, 2), (-math.inf, 2), (math.nan, 2), (-1.0, 0)])
def test_a_rule_that_would_prove_nothing_is_refused(log_p, num_candidates):
    with pytest.raises(ValueError, match="finite `log_p`"):
        two_sided_rule(log_p, num_candidates)
