import itertools
import math

import pytest
import torch

from hf_imitate.estimators import (
    ESTIMATORS,
    effective_sample_size,
    elbo_gap,
    importance_weighted_log_prob,
    largest_weight,
    latent_loss,
    log_mean_weight,
    normalized_weights,
    ovis_coefficients,
    retrodictor_loss,
)

# Logits of p(thought), p(answer | thought) and q: drawn once from a normal law, rounded and kept.
INSTANCE = (
    [0.52, 0.10, 0.06, -1.41, -0.37],
    [1.58, -0.45, 1.59, 1.57, -0.35],
    [0.26, -0.62, -0.72, 0.08, 0.30],
)
OTHER_INSTANCE = (
    [0.31, -1.12, 0.44, 0.85, -0.57],
    [-0.93, 1.36, -1.78, 0.22, 0.65],
    [0.72, 0.15, -0.64, -0.28, 0.91],
)


class Instance:
    """p(thought) = softmax(a), p(answer | thought) = sigmoid(b), q = softmax(c): all S^K tuples can be listed."""

    def __init__(self, logits=INSTANCE):
        self.a, self.b, self.c = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in logits)
        self.log_p_thought, self.log_p_answer = self.a.log_softmax(0), torch.nn.functional.logsigmoid(self.b)
        self.log_q = self.c.log_softmax(0)
        self.log_joint = self.log_p_thought + self.log_p_answer

    def tuples(self, num_thoughts, log_law):
        indices = torch.tensor(list(itertools.product(range(5), repeat=num_thoughts)))
        return indices, log_law[indices].sum(1).exp()

    def gradients(self, loss, *parameters):
        return torch.autograd.grad(loss, parameters, retain_graph=True)


def expected_gradients(estimator, num_thoughts):
    """Gradient of the expected surrogate over all tuples, and of the exact objective by differentiating its sum."""
    toy = Instance()
    law = toy.log_p_thought if estimator == "prior" else toy.log_q
    indices, probability = toy.tuples(num_thoughts, law)
    log_q = None if estimator == "prior" else toy.log_q[indices]
    loss = latent_loss(
        estimator, toy.log_p_thought[indices], toy.log_p_answer[indices], log_q, probability.detach(), normalizer=1.0
    )
    log_weights = (toy.log_joint - law)[indices]
    bound = log_weights.mean(1) if estimator == "elbo" else log_mean_weight(log_weights)
    exact = (probability * bound).sum()
    imitator = [-g for g in toy.gradients(loss.imitator, toy.a, toy.b)]
    exact_imitator = toy.gradients(exact, toy.a, toy.b)
    if estimator == "prior":
        return imitator, exact_imitator, None, None
    (retrodictor,) = toy.gradients(loss.retrodictor, toy.c)
    (exact_retrodictor,) = toy.gradients(exact, toy.c)
    return imitator, exact_imitator, -retrodictor, exact_retrodictor


@pytest.mark.parametrize("num_thoughts", [2, 3, 4])
@pytest.mark.parametrize("estimator", ["rws", "ovis", "elbo", "prior"])
def test_the_imitators_gradient_is_that_of_the_exact_bound_over_all_tuples(estimator, num_thoughts):
    imitator, exact, _, _ = expected_gradients(estimator, num_thoughts)
    for got, wanted in zip(imitator, exact, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
        assert wanted.abs().max() > 0.01


@pytest.mark.parametrize("num_thoughts", [2, 3, 4])
@pytest.mark.parametrize("estimator", ["ovis", "elbo"])
def test_the_retrodictors_gradient_is_unbiased_over_all_tuples(estimator, num_thoughts):
    _, _, retrodictor, exact = expected_gradients(estimator, num_thoughts)
    torch.testing.assert_close(retrodictor, exact, atol=1e-6, rtol=0)
    assert exact.abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["elbo", "prior"])
def test_one_thought_without_baseline_is_unbiased_too(estimator):
    imitator, exact, retrodictor, exact_retrodictor = expected_gradients(estimator, 1)
    for got, wanted in zip(imitator, exact, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    if estimator == "elbo":
        torch.testing.assert_close(retrodictor, exact_retrodictor, atol=1e-6, rtol=0)


def test_rws_teaches_the_retrodictor_the_posterior_with_a_bias_that_falls_with_more_thoughts():
    toy = Instance()
    posterior = toy.log_joint.softmax(0).detach()
    (towards_posterior,) = toy.gradients((posterior * toy.log_q).sum(), toy.c)
    bias = [(expected_gradients("rws", k)[2] - towards_posterior).abs().max().item() for k in (2, 3, 4)]
    assert bias[0] > bias[1] > bias[2] > 0.01


def test_rws_coefficients_are_the_posterior_where_every_thought_is_drawn_once():
    toy = Instance()
    log_weights = (toy.log_joint + math.log(5)).detach()[None]  # under a uniform proposal
    coefficients = ESTIMATORS["rws"](log_weights, 0.0)
    for values in (coefficients.thought, coefficients.answer, coefficients.retrodictor):
        torch.testing.assert_close(values[0], toy.log_joint.softmax(0).detach())
    assert coefficients.bound.item() == pytest.approx(toy.log_joint.logsumexp(0).item())


def test_a_thought_as_good_as_the_others_is_neither_raised_nor_lowered():
    thought = ESTIMATORS["prior"](torch.full((1, 4), -2.0), 0.0).thought
    torch.testing.assert_close(thought, torch.zeros(1, 4))


# --- estimators of the literature that the package does not ship, for comparison ---


def log_mean_of_others(log_w, k):
    others = torch.cat([log_w[:, :k], log_w[:, k + 1 :]], 1)
    return log_mean_weight(others), others


def vimco_geometric(log_w):
    columns = []
    for k in range(log_w.shape[1]):
        _, others = log_mean_of_others(log_w, k)
        replaced = torch.cat([others, others.mean(1, keepdim=True)], 1)
        columns.append(log_mean_weight(log_w) - log_mean_weight(replaced))
    return torch.stack(columns, 1) - log_w.softmax(1)


def vimco_arithmetic(log_w):
    columns = [log_mean_weight(log_w) - log_mean_of_others(log_w, k)[0] for k in range(log_w.shape[1])]
    return torch.stack(columns, 1) - log_w.softmax(1)


def ovis_one(log_w):
    return vimco_arithmetic(log_w) + log_w.softmax(1)


def reinforce(log_w):
    return log_mean_weight(log_w)[:, None] - log_w.softmax(1)


def ovis(log_w):
    return ovis_coefficients(log_w).retrodictor


def mean_and_variance(coefficients, num_thoughts, logits=INSTANCE):
    toy = Instance(logits)
    with torch.no_grad():
        indices, probability = toy.tuples(num_thoughts, toy.log_q)
        score = torch.nn.functional.one_hot(indices, 5) - toy.log_q.exp()  # [M, K, S]
        gradient = (coefficients((toy.log_joint - toy.log_q)[indices])[..., None] * score).sum(1)
        mean = probability @ gradient
        return mean, float(probability @ (gradient - mean).square().sum(1))


@pytest.mark.parametrize("num_thoughts", [2, 3, 4])
def test_variances_are_ordered_and_only_ovis_one_is_biased(num_thoughts):
    exact = expected_gradients("ovis", num_thoughts)[3]
    means, variances = {}, {}
    for estimator in (reinforce, vimco_arithmetic, vimco_geometric, ovis, ovis_one):
        means[estimator], variances[estimator] = mean_and_variance(estimator, num_thoughts)
        bias = (means[estimator] - exact).abs().max().item()
        assert bias < 1e-9 if estimator is not ovis_one else bias > 0.01, estimator.__name__
    assert variances[ovis] < variances[vimco_geometric] <= variances[vimco_arithmetic] + 1e-12
    assert variances[vimco_arithmetic] < variances[ovis_one] < variances[reinforce]
    if num_thoughts == 2:  # one other thought: both means are that thought
        assert variances[vimco_geometric] == pytest.approx(variances[vimco_arithmetic])


def test_neither_ovis_nor_vimco_always_varies_less():
    """They differ by the constant log(1 - 1/K) times the score: which of the two helps depends on the laws."""
    first = [mean_and_variance(estimator, 2)[1] for estimator in (ovis, vimco_arithmetic)]
    second = [mean_and_variance(estimator, 2, OTHER_INSTANCE)[1] for estimator in (ovis, vimco_arithmetic)]
    assert first[0] < first[1]
    assert second[0] > second[1]


def test_ovis_is_vimco_arithmetic_up_to_a_constant():
    log_w = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ovis(log_w) + math.log(3 / 4), vimco_arithmetic(log_w))


def test_trice_and_rws_pull_the_imitator_the_same_way_in_the_limit():
    """A chain that accepts a new thought with probability min(1, w'/w) has the posterior for its law; the gradient of
    the joint under it is that of log p, which the K-thought gradient approaches."""
    toy = Instance()
    weights, q = (toy.log_joint - toy.log_q).exp().detach(), toy.log_q.exp().detach()
    move = q[None] * (weights[None] / weights[:, None]).clamp(max=1)
    chain = move + torch.diag(1 - move.sum(1))
    posterior = toy.log_joint.softmax(0).detach()
    torch.testing.assert_close(posterior @ chain, posterior, atol=1e-12, rtol=0)
    second_largest = torch.linalg.eigvals(chain).real.sort().values[-2]
    mean_weight = (q * weights).sum()
    torch.testing.assert_close(1 - second_largest, mean_weight / weights.max(), atol=1e-9, rtol=0)

    (trice,) = toy.gradients((posterior * toy.log_joint).sum(), toy.a)
    (exact,) = toy.gradients(toy.log_joint.logsumexp(0), toy.a)
    torch.testing.assert_close(trice, exact)
    distance = [(expected_gradients("rws", k)[0][0] - exact).norm().item() for k in (2, 3, 4, 5)]
    assert distance == sorted(distance, reverse=True)


# --- values ---


def test_estimate_matches_the_sum_over_all_thoughts():
    generator = torch.Generator().manual_seed(0)
    p_thought = torch.tensor([0.7, 0.2, 0.1])
    p_answer_given_thought = torch.tensor([0.05, 0.60, 0.90])
    q_thought = torch.tensor([0.2, 0.4, 0.4])

    drawn = torch.multinomial(q_thought, 200_000, replacement=True, generator=generator)
    log_p_joint = (p_thought * p_answer_given_thought).log()[drawn]
    estimate = importance_weighted_log_prob(log_p_joint[None], q_thought.log()[drawn][None])

    exact = (p_thought * p_answer_given_thought).sum().log()
    torch.testing.assert_close(estimate.log_prob[0], exact, atol=0.01, rtol=0)


def test_the_perfect_retrodictor_needs_one_thought():
    joint = torch.tensor([0.7, 0.2, 0.1]) * torch.tensor([0.05, 0.60, 0.90])
    posterior = joint / joint.sum()
    estimate = importance_weighted_log_prob(joint.log()[:, None], posterior.log()[:, None])
    torch.testing.assert_close(estimate.log_prob, joint.sum().log().expand(3))


def test_effective_sample_size_counts_the_thoughts_that_matter():
    log_w = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -200.0, -300.0, -torch.inf], [3.0, 3.0, -torch.inf, -90.0]])
    torch.testing.assert_close(effective_sample_size(log_w), torch.tensor([4.0, 1.0, 2.0]))
    torch.testing.assert_close(largest_weight(log_w), torch.tensor([0.25, 1.0, 0.5]))


def test_weights_do_not_depend_on_a_common_factor():
    log_w = torch.tensor([[0.0, -1.0, 0.5]])
    torch.testing.assert_close(normalized_weights(log_w - 5000), normalized_weights(log_w))
    torch.testing.assert_close(log_mean_weight(log_w - 5000), log_mean_weight(log_w) - 5000)


def test_a_weight_of_zero_stays_in_the_mean():
    log_w = torch.tensor([[0.0, -torch.inf]])
    torch.testing.assert_close(log_mean_weight(log_w), torch.tensor([-math.log(2)]))
    assert elbo_gap(log_w).item() == math.inf


def test_the_gap_to_the_elbo_is_known_for_two_weights():
    # log((e^0 + e^-2) / 2) - (0 - 2) / 2
    assert elbo_gap(torch.tensor([[0.0, -2.0]])).item() == pytest.approx(math.log((1 + math.exp(-2)) / 2) + 1)


def test_a_dominating_weight_keeps_its_digits():
    """1 - v rounds to 0 in fp32 at 17 nats; clamped, the coefficient stops at 15.9 - 1."""
    coefficients = ovis_coefficients(torch.tensor([[0.0, -25.0, -60.0], [-4000.0, -4025.0, -4060.0]]))
    torch.testing.assert_close(coefficients.retrodictor[:, 0], torch.tensor([24.0, 24.0]))
    assert coefficients.retrodictor[0, 1].abs() < 1e-6
    assert not coefficients.is_draw_skipped.any()


# --- groups without a gradient ---

ZERO = -torch.inf
GROUPS = torch.tensor([[-1.0, -2.0, -0.5], [ZERO, -1.0, -2.0], [ZERO, -1.5, ZERO], [ZERO, ZERO, ZERO]])


@pytest.mark.parametrize(
    ("estimator", "skipped", "draw_skipped"),
    [
        ("rws", [False, False, False, True], [False, False, False, False]),
        ("ovis", [False, False, False, True], [False, False, True, False]),
        ("elbo", [False, True, True, True], [False, False, False, False]),
        ("prior", [False, False, False, True], [False, False, True, False]),
    ],
)
def test_groups_with_zero_weights_are_skipped_exactly_where_no_gradient_exists(estimator, skipped, draw_skipped):
    log_p_thought = torch.full((4, 3), -1.2, requires_grad=True)
    log_p_answer = GROUPS.clone().requires_grad_()
    log_q = None if estimator == "prior" else torch.full((4, 3), -1.2, requires_grad=True)
    loss = latent_loss(estimator, log_p_thought, log_p_answer, log_q)
    assert loss.coefficients.is_skipped.tolist() == skipped
    assert loss.coefficients.is_draw_skipped.tolist() == draw_skipped
    assert loss.imitator.isfinite()
    loss.imitator.backward(retain_graph=True)
    kept = ~loss.coefficients.is_skipped
    gradients = {"thought": log_p_thought.grad, "answer": log_p_answer.grad}
    if log_q is not None:
        loss.retrodictor.backward()
        gradients["retrodictor"] = log_q.grad
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert not gradient[~kept].any(), name
    # The only positive weight holds all of the answer's gradient.
    if estimator != "elbo":
        torch.testing.assert_close(log_p_answer.grad[2] * 4, torch.tensor([0.0, -1.0, 0.0]))
    of_the_draw = log_p_thought.grad if estimator == "prior" else log_q.grad
    assert of_the_draw[2].any().item() == (estimator == "rws")


def test_a_skipped_group_costs_nothing_and_counts_in_the_mean():
    log_p = torch.tensor([[-1.0, -2.0], [ZERO, ZERO]])
    loss = latent_loss("rws", torch.zeros(2, 2), log_p, torch.zeros(2, 2))
    assert loss.imitator.item() == pytest.approx(-log_mean_weight(log_p)[0].item() / 2)


# --- the loss ---


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_the_value_of_the_loss_is_minus_the_weighted_mean_bound(estimator):
    generator = torch.Generator().manual_seed(3)
    log_p_thought, log_p_answer, log_q = (-3 * torch.rand(6, 4, generator=generator) for _ in range(3))
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 0.5])
    log_q = log_p_thought if estimator == "prior" else log_q
    log_w = log_p_thought + log_p_answer - log_q
    bound = log_w.mean(1) if estimator == "elbo" else torch.logsumexp(log_w, 1) - math.log(4)
    loss = latent_loss(estimator, log_p_thought, log_p_answer, None if estimator == "prior" else log_q, weight)
    assert loss.imitator.item() == pytest.approx(-(weight * bound).sum().item() / 5, rel=1e-5)


def test_no_gradient_crosses_from_one_model_to_the_other():
    log_p_thought, log_p_answer, log_q = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    loss = latent_loss("ovis", log_p_thought, log_p_answer, log_q)
    assert torch.autograd.grad(loss.imitator, log_q, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(loss.retrodictor, log_p_answer, allow_unused=True) == (None,)
    assert not any(c.requires_grad for c in loss.coefficients)


def test_the_retrodictors_loss_may_come_after_the_imitators():
    log_p, log_q = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    at_once = latent_loss("rws", log_p, log_p, log_q, torch.tensor([1.0, 3.0]))
    recorded = latent_loss("rws", log_p, log_p, log_q.detach(), torch.tensor([1.0, 3.0]))
    later = retrodictor_loss(recorded.coefficients, log_q, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(later, at_once.retrodictor)
    assert torch.autograd.grad(later, log_q)[0].any()


def test_micro_batches_add_up_to_the_batch():
    generator = torch.Generator().manual_seed(5)
    log_p, log_q = -torch.rand(6, 3, generator=generator), -torch.rand(6, 3, generator=generator)
    whole = latent_loss("rws", log_p, log_p, log_q)
    parts = [latent_loss("rws", log_p[i], log_p[i], log_q[i], normalizer=6) for i in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(part.imitator for part in parts), whole.imitator)
    torch.testing.assert_close(sum(part.retrodictor for part in parts), whole.retrodictor)


# --- what is refused ---


@pytest.mark.parametrize("estimator", ["rws", "ovis"])
def test_one_thought_cannot_be_compared(estimator):
    with pytest.raises(ValueError, match=rf"'{estimator}' compares thoughts and needs at least 2.*num_thoughts=8"):
        latent_loss(estimator, torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("iwae", torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)), r"'iwae'.*\['elbo', 'ovis'"),
        (("prior", torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)), "takes None"),
        (("rws", torch.zeros(2, 2), torch.zeros(2, 2), None), "missing"),
        (("rws", torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 3)), r"\[B, K\]"),
        (("rws", torch.zeros(2, 2), torch.tensor([[0.0, 0], [math.nan, 0]]), torch.zeros(2, 2)), "first is number 1"),
        (("rws", torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[0.0, ZERO]])), "q gave 0 to a thought"),
    ],
)
def test_wrong_input_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        latent_loss(*arguments)


def test_the_prior_has_no_retrodictor_to_train():
    loss = latent_loss("prior", torch.zeros(2, 2), torch.zeros(2, 2), None)
    assert loss.retrodictor is None
    with pytest.raises(ValueError, match="no retrodictor"):
        retrodictor_loss(loss.coefficients, torch.zeros(2, 2))
