import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.optimize import minimize

from hf_imitate.losses import (
    CENTERING,
    REWARD_CLIP,
    binary_cross_entropy_loss,
    bradley_terry_loss,
    gail_reward,
    imitator_reward,
    leave_one_out,
    logit_reward,
    pair_reward,
    paired_wins,
    penalize_truncated,
    retrodictive_loss,
    updated_multiplier,
)

HUMAN = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
IMITATOR = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
LOG_RATIO = HUMAN.log() - IMITATOR.log()


def optimum(loss, human=HUMAN, imitator=IMITATOR):
    """The table of logits that minimises the expected loss over all pairs of answers."""
    weights = human[:, None] * imitator[None, :]

    def expected(logits):
        logits = torch.tensor(logits, requires_grad=True)
        value = (weights * loss(logits[:, None].expand(4, 4), logits[None, :].expand(4, 4))).sum()
        value.backward()
        return value.item(), logits.grad.numpy()

    return torch.tensor(minimize(expected, [0.0] * 4, jac=True, options={"gtol": 1e-10}).x)


def slope(logits, log_ratio=LOG_RATIO):
    """Least-squares slope of the logits over the log ratio."""
    x, y = log_ratio - log_ratio.mean(), logits - logits.mean()
    return ((x * y).sum() / x.square().sum()).item()


# --- what the distinguisher minimises


def test_bradley_terry_at_its_closed_form():
    loss = bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0]))

    expected = [math.log1p(math.exp(-3)) + 0.01, math.log(2)]
    assert loss.tolist() == pytest.approx(expected)

    with_checks = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([-1.0]), text_sum=torch.tensor([-3.0]))

    assert with_checks.tolist() == pytest.approx([math.log1p(math.exp(-3)) + 0.09])


def test_without_centring_the_optimum_is_the_log_ratio_up_to_a_constant():
    best = optimum(lambda human, imitator: bradley_terry_loss(human, imitator) - CENTERING * (human + imitator) ** 2)

    shift = (best - LOG_RATIO).mean()
    torch.testing.assert_close(best, LOG_RATIO + shift, atol=1e-6, rtol=0)


def test_centring_shrinks_the_slope_and_keeps_the_order():
    """Near the fixed point both terms are quadratic, with curvatures 1/8 and c: the slope is 1 / (1 + 8 c)."""
    near = IMITATOR * torch.tensor([1.02, 0.97, 1.01, 1.0], dtype=torch.float64)
    near = near / near.sum()
    best = optimum(bradley_terry_loss)

    assert slope(optimum(bradley_terry_loss, near), near.log() - IMITATOR.log()) == pytest.approx(
        1 / (1 + 8 * CENTERING), abs=2e-3
    )
    assert slope(best) == pytest.approx(0.856, abs=0.005)
    assert best.argsort().tolist() == LOG_RATIO.argsort().tolist()


def test_where_both_sides_are_equal_the_optimum_is_flat():
    """The fixed point of the game survives the centring term."""
    best = optimum(bradley_terry_loss, HUMAN, HUMAN)

    torch.testing.assert_close(best, torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_optimum_of_the_cross_entropy_is_the_log_ratio_itself():
    torch.testing.assert_close(optimum(binary_cross_entropy_loss), LOG_RATIO, atol=1e-6, rtol=0)


def test_cross_entropy_matches_torchs():
    torch.manual_seed(0)
    human, imitator = torch.randn(2, 5)

    both = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.stack([human, imitator]), torch.stack([torch.ones(5), torch.zeros(5)]), reduction="none"
    )

    torch.testing.assert_close(binary_cross_entropy_loss(human, imitator), both.mean(dim=0))


def test_bradley_terry_matches_trls_reward_trainer(tiny_model_dir, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    trainer = trl.RewardTrainer(
        str(tiny_model_dir),
        args=trl.RewardConfig(
            str(tmp_path), center_rewards_coefficient=CENTERING, use_cpu=True, bf16=False, report_to="none"
        ),
        train_dataset=Dataset.from_dict({"chosen": ["Return the list", "it"], "rejected": ["a", "Set the name"]}),
    )
    torch.manual_seed(0)
    human, imitator = 3 * torch.randn(2, 6)
    logits = torch.cat([human, imitator])[:, None]

    theirs = trainer.compute_loss(
        lambda **inputs: SimpleNamespace(logits=logits), {"attention_mask": torch.ones(12, 3, dtype=torch.long)}
    )

    torch.testing.assert_close(bradley_terry_loss(human, imitator).mean(), theirs)


@pytest.mark.parametrize("loss", [bradley_terry_loss, binary_cross_entropy_loss])
def test_a_saturated_distinguisher_keeps_a_finite_loss_and_gradient(loss):
    human, imitator = torch.tensor([1e4, -1e4], requires_grad=True), torch.tensor([-1e4, 1e4], requires_grad=True)

    value = loss(human, imitator).sum()
    value.backward()

    assert torch.isfinite(value)
    assert torch.isfinite(human.grad).all()
    assert human.grad[1] < 0  # pushes the human's logit up where it is lowest


# --- what the imitator is paid


def test_leave_one_out_by_hand():
    values = torch.tensor([[3.0, 0.0, 6.0], [1.0, 1.0, 1.0]])

    assert leave_one_out(values).tolist() == [[0.0, -4.5, 4.5], [0.0, 0.0, 0.0]]


def test_leave_one_out_is_the_plain_centring_stretched():
    torch.manual_seed(0)
    values = torch.randn(5, 4)

    torch.testing.assert_close(leave_one_out(values), (values - values.mean(1, keepdim=True)) * 4 / 3)


def test_a_group_of_one_has_nothing_to_be_compared_with():
    assert leave_one_out(torch.tensor([[7.0]])).tolist() == [[0.0]]
    keep = torch.tensor([[True, False, False]])
    assert leave_one_out(torch.tensor([[7.0, 1.0, 2.0]]), keep).tolist() == [[0.0, 0.0, 0.0]]


def test_who_left_the_group_counts_in_no_mean():
    values = torch.tensor([[1.0, torch.nan, 3.0, 8.0]])
    keep = torch.tensor([[True, False, True, True]])

    assert leave_one_out(values, keep).tolist() == [[1.0 - 5.5, 0.0, 3.0 - 4.5, 8.0 - 2.0]]


@pytest.mark.parametrize("num_generations", [2, 3])
def test_the_expected_policy_gradient_is_exactly_minus_that_of_the_reverse_kl(num_generations):
    """Every group of answers, weighted by its probability; the plain mean would give 1 - 1/G of it."""
    torch.manual_seed(0)
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    human = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    log_p = theta.log_softmax(0)
    score = (human.log() - log_p).detach() + 4.2  # the optimum, up to a constant

    groups = torch.tensor(list(itertools.product(range(3), repeat=num_generations)))
    nobody_cut = torch.zeros(groups.shape, dtype=torch.bool)
    rewards = imitator_reward("logit", score[groups], torch.zeros(len(groups)), nobody_cut)
    probability = log_p.detach()[groups].sum(dim=1).exp()
    (probability * (rewards * log_p[groups]).mean(dim=1)).sum().backward()

    other = theta.detach().clone().requires_grad_(True)
    kl = (other.softmax(0) * (other.log_softmax(0) - human.log())).sum()
    kl.backward()
    torch.testing.assert_close(theta.grad, -other.grad, atol=1e-10, rtol=0)
    assert other.grad.abs().max() > 0.05


def test_clipping_keeps_the_order_and_centres_again():
    logits = torch.tensor([[100.0, 3.0, 2.0, 1.0]])

    paid = imitator_reward("logit", logits, torch.zeros(1), torch.zeros(1, 4, dtype=torch.bool))[0]

    assert paid.sum().item() == pytest.approx(0, abs=1e-5)
    assert paid.argsort().tolist() == [3, 2, 1, 0] or paid[1:].unique().numel() == 1
    assert paid[0] == paid.max()
    # Centred: 98, -31.3, -32.7, -34, so all sit at the clip before the second centring.
    torch.testing.assert_close(paid, torch.tensor([7.5, -2.5, -2.5, -2.5]))


def test_where_nothing_is_clipped_the_reward_is_the_centred_logit():
    torch.manual_seed(0)
    logits = torch.randn(6, 4)

    paid = imitator_reward("logit", logits, torch.zeros(6), torch.zeros(6, 4, dtype=torch.bool))

    torch.testing.assert_close(paid, leave_one_out(logits))
    assert paid.abs().max() < REWARD_CLIP


@pytest.mark.parametrize("kind", ["logit", "pair", "gail"])
def test_every_reward_grows_with_the_logit_and_sums_to_zero(kind):
    logits = torch.tensor([[-1.0, 0.5, 2.0], [3.0, 2.0, -4.0]])

    paid = imitator_reward(kind, logits, torch.tensor([0.3, -0.7]), torch.zeros(2, 3, dtype=torch.bool))

    torch.testing.assert_close(paid.sum(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
    assert paid.argsort(dim=1).tolist() == logits.argsort(dim=1).tolist()


@pytest.mark.parametrize("kind", ["logit", "pair"])
def test_a_constant_per_question_does_not_change_the_reward(kind):
    """c(x) is free under Bradley-Terry; what is paid must not depend on it."""
    torch.manual_seed(0)
    logits, human, shift = torch.randn(3, 4), torch.randn(3), torch.tensor([10.0, -20.0, 0.3])
    cut = torch.zeros(3, 4, dtype=torch.bool)

    paid = imitator_reward(kind, logits, human, cut)

    shifted = imitator_reward(kind, logits + shift[:, None], human + shift, cut)
    torch.testing.assert_close(shifted, paid, atol=1e-5, rtol=0)


def test_rewards_at_their_closed_forms():
    logits, human = torch.tensor([[0.0, 2.0]]), torch.tensor([1.0])

    assert logit_reward(logits, human) is logits
    expected = [1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))]
    assert pair_reward(logits, human)[0].tolist() == pytest.approx(expected)
    assert pair_reward(logits, human[:, None].expand(1, 2))[0].tolist() == pytest.approx(expected)
    assert gail_reward(logits, human)[0].tolist() == pytest.approx([math.log(2), math.log1p(math.exp(2))])


def test_a_question_without_a_human_answer_is_paid_by_the_logit():
    paid = imitator_reward("logit", torch.tensor([[0.0, 2.0]]), torch.tensor([torch.nan]), torch.zeros(1, 2).bool())

    assert paid.tolist() == [[-2.0, 2.0]]


CUT = torch.tensor([[False, True, False, False], [True, True, True, True], [False, False, False, False]])


def test_dropped_answers_leave_their_group_and_change_nobodys_pay():
    torch.manual_seed(0)
    logits = torch.randn(3, 4)

    paid = imitator_reward("logit", logits, torch.zeros(3), CUT, "drop")

    assert torch.equal(paid.isnan(), CUT)
    torch.testing.assert_close(paid[0, [0, 2, 3]], leave_one_out(logits[:1, [0, 2, 3]])[0])
    louder = torch.where(CUT, 100.0, logits)
    torch.testing.assert_close(imitator_reward("logit", louder, torch.zeros(3), CUT, "drop"), paid, equal_nan=True)


def test_penalised_answers_get_their_groups_lowest_reward_before_centring():
    logits = torch.tensor([[1.0, 4.0, 2.0, 1.5], [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])

    paid = imitator_reward("logit", logits, torch.zeros(3), CUT, "penalty")

    torch.testing.assert_close(paid[0], leave_one_out(torch.tensor([[1.0, 1.0, 2.0, 1.5]]))[0])
    assert paid[1].tolist() == [0.0] * 4  # all were cut: all alike
    torch.testing.assert_close(paid[2], leave_one_out(logits[2:])[0])
    assert penalize_truncated(logits, CUT)[0].tolist() == [1.0, 1.0, 2.0, 1.5]


def test_scored_answers_are_paid_whether_they_were_cut_or_not():
    torch.manual_seed(0)
    logits = torch.randn(3, 4)

    paid = imitator_reward("logit", logits, torch.zeros(3), CUT, "score")

    torch.testing.assert_close(paid, leave_one_out(logits))


# --- the likelihood term, wins and the budget


def test_the_likelihood_term_is_the_weighted_mean_of_sums():
    loss = retrodictive_loss(torch.tensor([-2.0, -8.0]), torch.tensor([3.0, 1.0]))

    assert loss.item() == pytest.approx((3 * 2 + 8) / 4)


def test_rows_of_weight_zero_cost_nothing():
    log_prob = torch.tensor([-2.0, -8.0], requires_grad=True)

    loss = retrodictive_loss(log_prob, torch.tensor([0.0, 0.0]))
    loss.backward()

    assert loss.item() == 0
    assert log_prob.grad.tolist() == [0.0, 0.0]


def test_its_optimum_is_the_law_of_the_humans():
    """A mean over each answer's tokens would put its optimum at p / length instead."""
    lengths = torch.tensor([1.0, 2.0, 5.0, 10.0], dtype=torch.float64)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = retrodictive_loss(theta.log_softmax(0), HUMAN)
        loss.backward()
        return loss

    optimizer.step(closure)

    torch.testing.assert_close(theta.softmax(0).detach(), HUMAN, atol=1e-4, rtol=0)
    assert ((HUMAN / lengths) / (HUMAN / lengths).sum() - HUMAN).abs().max() > 0.1


def test_a_tie_counts_one_half():
    wins = paired_wins(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))

    assert wins.tolist() == [1.0, 0.0, 0.5]


def test_a_broken_distinguisher_is_not_taken_for_a_coin():
    assert paired_wins(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, torch.nan])).isnan().all()
    assert paired_wins(torch.tensor([torch.inf]), torch.tensor([torch.inf])).tolist() == [0.5]


def test_the_multiplier_moves_by_its_closed_form():
    assert updated_multiplier(2.0, 1.0, rate=0.05) == pytest.approx(2 * math.exp(0.05))
    assert updated_multiplier(2.0, -1.0, rate=0.05) == pytest.approx(2 * math.exp(-0.05))
    assert updated_multiplier(2.0, 0.0) == 2.0


def test_the_multiplier_grows_with_the_violation_and_stays_within_its_bounds():
    moved = [updated_multiplier(1.0, violation / 10) for violation in range(-60, 61)]
    assert moved == sorted(moved)
    assert moved[20] < moved[60] < moved[100]
    assert max(moved) == pytest.approx(math.exp(0.2))  # one wild batch moves it by a bounded factor

    high = low = 1.0
    for _ in range(1000):
        high, low = updated_multiplier(high, 1e9), updated_multiplier(low, -1e9)
    assert (high, low) == (100.0, 0.01)


def test_a_reward_that_was_not_given_is_nobodys_lowest():
    rewards = torch.tensor([[1.0, float("nan"), 0.2, 3.0], [float("nan"), float("nan"), 1.0, 2.0]])
    cut = torch.tensor([[False, False, False, True], [True, False, False, False]])
    penalized = penalize_truncated(rewards, cut)
    assert penalized[0, 3] == pytest.approx(0.2)
    assert penalized[1, 0] == pytest.approx(1.0)
    assert penalized[0, 1].isnan()
