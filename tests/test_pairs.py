import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from distinguishers import causal_lm, is_short, is_wanted, trained
from transformers import AutoTokenizer

from hf_imitate.checks import first_weights
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.losses import bradley_terry_loss
from hf_imitate.pairs import CHECK_LEARNING_RATE, Learner, Pair, comparable
from hf_imitate.rendering import Answer

NAN = float("nan")
PAIRS = [
    Pair("q", Answer("of items", True), (Answer("a name", True), Answer("it", False)), weight=2.0),
    Pair("list", Answer("it", True), (Answer("the list of the names", True),)),
    Pair("q", Answer("", True), (Answer("x", True), Answer("y", True), Answer("z", False)), weight=0.5),
    Pair("Return", Answer("name", True), (Answer("names", True),)),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def make(tiny_model_dir, tokenizer):
    def make(checks=()):
        return trained(Distinguisher.from_causal_lm(causal_lm(tiny_model_dir), tokenizer, checks=checks))

    return make


def parameters_after(distinguisher, steps, **settings):
    """Parameters and the gradients of the last update."""
    learner = Learner(distinguisher, 1e-3, **settings)
    gradients = []
    learner.optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in learner.parameters]))
    for pairs in steps:
        learner.step(pairs)
    return [p.detach().clone() for p in learner.parameters], gradients[-1]


def assert_all_close(ones, others, atol=1e-6):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 2, 4, 64])
def test_the_size_of_a_forward_does_not_change_the_update(make, max_rows):
    whole, gradient = parameters_after(make(), [PAIRS], max_rows=1000)

    split, split_gradient = parameters_after(make(), [PAIRS], max_rows=max_rows)

    assert_all_close(split_gradient, gradient)
    assert_all_close(split, whole)
    assert max(g.abs().max() for g in gradient) > 1e-3


def test_the_order_of_pairs_does_not_change_the_update(make):
    _, gradient = parameters_after(make(), [PAIRS])

    _, reversed_gradient = parameters_after(make(), [PAIRS[::-1]])

    assert_all_close(reversed_gradient, gradient)


def test_the_gradient_is_that_of_the_weighted_mean_over_pairs(make):
    """By autograd on the formula itself, one answer at a time."""
    distinguisher = make()
    total = 0.0
    for pair in PAIRS:
        rows = distinguisher.encode([pair.prompt] * (1 + len(pair.imitator)), [pair.human, *pair.imitator])
        logits = torch.cat([distinguisher.text_logits([row]) for row in rows])
        total = total + pair.weight * bradley_terry_loss(logits[0], logits[1:]).mean()
    loss = total / sum(pair.weight for pair in PAIRS)
    expected = torch.autograd.grad(loss, distinguisher.trainable_parameters())

    _, gradient = parameters_after(make(), [PAIRS], max_grad_norm=1e9)

    assert_all_close(gradient, expected)
    assert Learner(make(), 1e-3).step(PAIRS).loss == pytest.approx(loss.item(), abs=1e-6)


def run_together(learners, shares):
    """One update by several learners that sum over each other, as processes do, each on its own share."""
    barrier = threading.Barrier(len(shares), timeout=20)  # unequal numbers of reductions break it
    handed: dict[int, torch.Tensor] = {}

    def process(number):
        def reduce(tensor):
            handed[number] = tensor.clone()
            barrier.wait()
            tensors = list(handed.values())
            assert len({(t.dtype, t.shape) for t in tensors}) == 1  # the others reduce the same thing just now
            barrier.wait()
            return sum(tensors)

        learners[number].reduce = reduce
        try:
            return learners[number].step(shares[number])
        except Exception:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(process, range(len(shares))))


@pytest.mark.parametrize("shares", [(PAIRS[:1], PAIRS[1:]), (PAIRS[:3], PAIRS[3:]), (PAIRS, [])])
def test_processes_together_make_the_update_of_one_process_with_all_pairs(make, shares):
    """Pairs are not spread evenly, and a process may have none; its reductions must match the others' all the same."""
    alone = Learner(make(), 1e-3)
    loss = alone.step(PAIRS).loss
    learners = [Learner(make(), 1e-3) for _ in shares]

    results = run_together(learners, shares)

    for learner, result in zip(learners, results, strict=True):
        assert_all_close(learner.parameters, alone.parameters)
        assert result.loss == pytest.approx(loss, abs=1e-6)


def test_where_one_process_meets_a_loss_that_is_not_finite_all_of_them_stop(make):
    """One that raised alone would leave the others waiting in a reduction for ever."""
    learners = [Learner(make(), 1e-3) for _ in range(2)]
    with torch.no_grad():
        learners[0].distinguisher.head.weight[0, 0] = torch.inf
    before = [p.detach().clone() for p in learners[1].parameters]
    raised = []
    for learner in learners:
        step = learner.step

        def told(pairs, step=step):
            with pytest.raises(FloatingPointError) as error:
                step(pairs)
            raised.append(error.value)

        learner.step = told

    run_together(learners, (PAIRS[:1], PAIRS[1:]))

    assert len(raised) == 2
    assert_all_close(learners[1].parameters, before, atol=0)


def test_logits_are_those_from_before_the_update(make):
    distinguisher = make()
    learner = Learner(distinguisher, 1e-2)
    before = learner.score(PAIRS)

    seen = learner.step(PAIRS).logits

    after = learner.score(PAIRS)
    for one, other, moved in zip(seen, before, after, strict=True):
        torch.testing.assert_close(one.human, other.human, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.imitator, other.imitator, atol=1e-6, rtol=0)
        assert not one.imitator.requires_grad
        assert (one.imitator - moved.imitator).abs().max() > 1e-3


def test_updates_bring_the_loss_down(make):
    learner = Learner(make(), 3e-3)

    losses = [learner.step(PAIRS).loss for _ in range(30)]

    assert losses[-1] < 0.5 * losses[0]


def test_a_share_of_the_learning_rate_is_a_share_of_the_step(make):
    def step(lr_scale):
        distinguisher = make()
        before = distinguisher.head.weight.detach().clone()
        Learner(distinguisher, 1e-3).step(PAIRS, lr_scale=lr_scale)
        return distinguisher.head.weight.detach() - before

    torch.testing.assert_close(step(0.5), 0.5 * step(1.0), atol=1e-6, rtol=0)
    assert step(0.0).abs().max() == 0


def test_check_weights_have_a_rate_of_their_own(make):
    """At the adapter's rate a scalar would move by 1e-5 per step and stay where it is."""
    distinguisher = make(checks=[is_short])
    pair = Pair("q", Answer("a", True), (Answer("a", True),), 1.0, (1.0,), ((0.0,),))
    before = distinguisher.check_weights.detach().clone()

    Learner(distinguisher, 1e-5).step([pair])

    assert (distinguisher.check_weights - before).item() == pytest.approx(CHECK_LEARNING_RATE, rel=1e-3)


def test_a_check_that_tells_the_sides_apart_gains_weight_and_one_that_does_not_gains_none(make):
    distinguisher = make(checks=[is_short, is_wanted])
    with torch.no_grad():
        distinguisher.check_weights.zero_()
    answer = Answer("a", True)
    pairs = [Pair("q", answer, (answer,), 1.0, (1.0, both), ((0.0, both),)) for both in (0.0, 1.0)]
    learner = Learner(distinguisher, 1e-6)

    for _ in range(40):
        learner.step(pairs)

    assert distinguisher.check_weights[0] > 1.0
    assert distinguisher.check_weights[1].abs() < 0.1


def test_checks_at_weight_0_begin_where_the_first_pairs_say_and_others_stay(make):
    distinguisher = make(checks=[is_short, is_wanted])
    answer = Answer("a", True)
    pairs = [
        Pair("q", answer, (answer,) * 2, 3.0, (1.0, 1.0), ((0.0, NAN), (0.0, 0.0))),  # thrice the next
        Pair("q", answer, (answer,), 1.0, (0.0, 1.0), ((1.0, 1.0),)),
    ]

    trained_ones = distinguisher.check_weights.detach().clone()
    Learner(distinguisher, 1e-6).step(pairs)
    assert (distinguisher.check_weights - trained_ones).abs().max() < 1.1 * CHECK_LEARNING_RATE

    with torch.no_grad():
        distinguisher.check_weights.zero_()
    learner = Learner(distinguisher, 1e-6, reduce=lambda tensor: 2 * tensor)  # as if another process had the same
    learner.step(pairs)
    # Of 6 comparisons the first is passed by the human alone in 3/4, the second in half of 3/4.
    begun = first_weights(torch.tensor([4.5, 2.25]), torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(distinguisher.check_weights.detach(), begun)

    with torch.no_grad():
        distinguisher.check_weights.zero_()
    learner.step(pairs)  # it is no beginner any more
    assert distinguisher.check_weights.abs().max() < 1.1 * CHECK_LEARNING_RATE


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_the_unit_of_the_rows_weights_does_not_move_where_checks_begin(make, unit):
    distinguisher, answer = make(checks=[is_short]), Answer("a", True)
    with torch.no_grad():
        distinguisher.check_weights.zero_()

    Learner(distinguisher, 1e-6).step([Pair("q", answer, (answer,), unit, (1.0,), ((0.0,),))] * 9)

    assert distinguisher.check_weights.item() == pytest.approx(math.log(9.5 / 0.5), abs=1.1 * CHECK_LEARNING_RATE)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_a_check_that_both_sides_pass_or_fail_says_nothing_about_its_weight(make, outcome):
    """The constant of a question is pinned for the texts alone; else passing together would pull the weight to 0."""
    distinguisher = make(checks=[is_short])
    pairs = [Pair(p.prompt, p.human, p.imitator, 1.0, (outcome,), ((outcome,),) * len(p.imitator)) for p in PAIRS]

    _, gradient = parameters_after(distinguisher, [pairs])

    assert gradient[-1].shape == (1,)
    assert gradient[-1].abs().max() < 1e-7
    assert max(g.abs().max() for g in gradient[:-1]) > 1e-3


def test_checks_that_do_not_apply_to_one_side_are_left_out_on_both(make):
    distinguisher = make(checks=[is_short, is_wanted])  # weights 1 and 2
    answer = Answer("a", True)
    text = distinguisher.score(["q"], [answer]).item()
    pair = Pair("q", answer, (answer,) * 3, 1.0, (1.0, NAN), ((0.0, 1.0), (NAN, 0.0), (NAN, NAN)))

    seen = Learner(distinguisher, 1e-3).score([pair])[0]

    assert (seen.human - text).tolist() == pytest.approx([0.5, 0.0, 0.0], abs=1e-5)
    assert (seen.imitator - text).tolist() == pytest.approx([-0.5, 0.0, 0.0], abs=1e-5)


def test_a_check_without_an_outcome_on_one_side_gets_no_gradient(make):
    distinguisher = make(checks=[is_short])
    pair = Pair("q", Answer("a", True), (Answer("b", True),), 1.0, (1.0,), ((NAN,),))

    before = distinguisher.check_weights.detach().clone()
    Learner(distinguisher, 1e-3).step([pair])

    assert torch.equal(distinguisher.check_weights, before)


def test_comparable_outcomes_by_hand():
    on_human, on_imitator = comparable(torch.tensor([1.0, NAN, 0.0, NAN]), torch.tensor([0.0, 1.0, NAN, NAN]))

    torch.testing.assert_close(on_human, torch.tensor([1.0, NAN, NAN, NAN]), equal_nan=True)
    torch.testing.assert_close(on_imitator, torch.tensor([0.0, NAN, NAN, NAN]), equal_nan=True)


def test_a_loss_that_is_not_finite_stops_before_any_update(make):
    distinguisher = make(checks=[is_short])
    learner = Learner(distinguisher, 1e-3)
    learner.step(PAIRS[:1])
    with torch.no_grad():
        distinguisher.head.weight[0, 0] = torch.inf
    before = [p.detach().clone() for p in learner.parameters]
    steps = [state["step"].item() for state in learner.optimizer.state.values()]

    with pytest.raises(FloatingPointError, match="nothing was updated"):
        learner.step(PAIRS)

    assert all(torch.equal(p, q) for p, q in zip(learner.parameters, before, strict=True))
    assert [state["step"].item() for state in learner.optimizer.state.values()] == steps
    assert all(parameter.grad is None for parameter in learner.parameters)


def test_a_saturated_distinguisher_stays_finite_and_can_go_back(make):
    distinguisher = make()
    with torch.no_grad():
        distinguisher.head.weight.mul_(1e6)
    learner = Learner(distinguisher, 1e-3)

    losses = [learner.step(PAIRS).loss for _ in range(5)]

    assert all(0 <= loss < float("inf") for loss in losses)
    assert all(torch.isfinite(p).all() for p in learner.parameters)
    assert losses[-1] < losses[0]


def test_a_step_without_pairs_moves_nothing(make):
    """Not by momentum either, which a process whose gradients were reduced to zeros would follow."""
    distinguisher = make()
    learner = Learner(distinguisher, 1e-3, reduce=lambda tensor: tensor.clone())
    learner.step(PAIRS)
    before = [p.detach().clone() for p in distinguisher.trainable_parameters()]

    result = learner.step([])

    assert result == (0.0, [])
    assert_all_close(distinguisher.trainable_parameters(), before, atol=0)
