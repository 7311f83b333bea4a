"""Imitator and retrodictor on one base: no shared weight, exact gradients, estimates that find the exact log p."""

import copy
import math
from collections import Counter

import latent_worlds as worlds
import pytest
import torch
from peft import get_peft_model
from trl.trainer.utils import add_fused_lm_head

from hf_imitate.latent_draws import Continuation
from hf_imitate.rendering import Rendered
from hf_imitate.retrodictor import Retrodictor, Thinkers
from hf_imitate.sampling import stream_key
from hf_imitate.thoughts import ThoughtLaw

ROW = Rendered([3, 3], [2, 7], True)


def shaken(model, seed: int = 1):
    """LoRA starts at zero; here every adapter has weights of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def on_one_base(path) -> Thinkers:
    model = get_peft_model(worlds.load_world(path), worlds.lora())
    retrodictor = Retrodictor.on_shared_base(model, worlds.lora())
    law = ThoughtLaw((6,), worlds.LONGEST, torch.tensor([True] * 6 + [False] * 2))
    return Thinkers(shaken(model), law, retrodictor, [7], 7, max_rows=4096)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def thinkers(world):
    return on_one_base(world)


def log_q(thinkers, thoughts=worlds.THOUGHTS):
    with torch.no_grad(), thinkers.retrodictor.active():
        return thinkers.score(thinkers.retrodictor.model, thinkers.hindsight_rows(ROW, thoughts))[0].double()


def log_p(thinkers):
    with torch.no_grad():
        return worlds.log_joint(thinkers.model, thinkers.law, ROW.prompt_ids, ROW.answer_ids)


def test_four_hundred_estimates_find_the_exact_log_p_and_their_bias_falls_as_one_over_k(thinkers, capsys):
    """102 400 thoughts are really drawn; there are only 259 weights, so each is computed once, by enumeration."""
    exact = torch.logsumexp(log_p(thinkers), dim=0).item()
    log_weights = log_p(thinkers) - log_q(thinkers)
    index = {tuple(thought): i for i, thought in enumerate(worlds.THOUGHTS)}
    keys = [stream_key(0, "test", "q", k) for k in range(400 * 256)]
    drawn = thinkers.think([ROW], [keys])[0]
    which = torch.tensor([index[tuple(one.thought_ids)] for one in drawn])
    recorded = torch.tensor([one.log_prob_thought for one in drawn], dtype=torch.float64)
    torch.testing.assert_close(recorded, log_q(thinkers)[which], atol=1e-5, rtol=0)
    drawn_weights = log_weights[which]

    def mean_and_error(number: int) -> tuple[float, float]:
        estimates = torch.logsumexp(drawn_weights.reshape(-1, number), dim=1) - math.log(number)
        return estimates.mean().item(), (estimates.std() / math.sqrt(len(estimates))).item()

    mean, error = mean_and_error(256)
    with capsys.disabled():
        print(f"\n  log p = {exact:.4f}; mean of 400 estimates at K = 256: {mean:.4f}, standard error {error:.4f}")
    assert abs(mean - exact) < 0.01
    # Of one and two thoughts the mean estimate is known exactly; it is far from log p, and half as far.
    law = log_q(thinkers).exp()
    of_two = torch.logaddexp(log_weights[:, None], log_weights[None]) - math.log(2)
    for number, expected in ((1, law @ log_weights), (2, law @ of_two @ law)):
        mean, error = mean_and_error(number)
        assert abs(mean - expected.item()) < 4 * error
        assert exact - expected.item() > 20 * error
    # Bias times K tends to minus half the variance of w / p.
    relative = (2 * log_weights + log_q(thinkers)).exp().sum() / math.exp(2 * exact) - 1
    for number in (8, 16):
        mean, error = mean_and_error(number)
        expected = -relative.item() / 2 / number
        assert abs(expected) > 4 * error + 0.25 * abs(expected)  # else no bias at all would do
        assert abs(mean - exact - expected) < 4 * error + 0.25 * abs(expected), (number, mean - exact, expected)
    assert Counter(which.tolist()).most_common(1)[0][1] < len(which) / 2


def test_neither_model_moves_when_the_other_does(thinkers):
    q, p = log_q(thinkers), log_p(thinkers)
    imitator = [parameter for parameter in thinkers.model.parameters() if parameter.requires_grad]
    assert imitator
    assert not {*map(id, imitator)} & {*map(id, thinkers.retrodictor.parameters())}
    for parameter in imitator:
        parameter.data += 0.1
    assert torch.equal(log_q(thinkers), q)
    moved = log_p(thinkers)
    assert not torch.allclose(moved, p)
    for parameter in thinkers.retrodictor.parameters():
        parameter.data += 0.1
    assert torch.equal(log_p(thinkers), moved)
    assert not torch.allclose(log_q(thinkers), q)


def test_a_copy_of_the_base_does_not_follow_the_original(world):
    """TRL puts a forward on the model object; a copy that kept it would compute with the original's weights."""
    model = worlds.load_world(world)
    add_fused_lm_head(model)
    law = ThoughtLaw((6,), worlds.LONGEST, torch.tensor([True] * 6 + [False] * 2))
    thinkers = Thinkers(model, law, Retrodictor.on_copy(model, worlds.lora()), [7], 7)
    q = log_q(thinkers)
    torch.testing.assert_close(q[0], log_q(thinkers, [[]])[0], atol=2e-6, rtol=0)
    for parameter in model.parameters():
        parameter.data += 0.1
    assert torch.equal(log_q(thinkers), q)


def test_a_trained_weight_of_the_shared_base_is_refused(world):
    model = get_peft_model(worlds.load_world(world), worlds.lora())
    next(p for n, p in model.named_parameters() if "norm" in n).requires_grad_(True)
    with pytest.raises(ValueError, match="trains 1 weights of the shared base"):
        Retrodictor.on_shared_base(model, worlds.lora())


def test_modules_that_the_imitator_saves_are_its_own(world):
    model = get_peft_model(worlds.load_world(world), worlds.lora(modules_to_save=["norm"], target_modules=["q_proj"]))
    law = ThoughtLaw((6,), worlds.LONGEST, torch.tensor([True] * 6 + [False] * 2))
    thinkers = Thinkers(model, law, Retrodictor.on_shared_base(model, worlds.lora()), [7], 7)
    q = log_q(thinkers)
    for parameter in model.parameters():
        parameter.data += 0.1 if parameter.requires_grad else 0.0
    assert torch.equal(log_q(thinkers), q)


def test_switching_to_the_retrodictor_leaves_every_flag_as_it_was(thinkers):
    flags = [parameter.requires_grad for parameter in thinkers.model.parameters()]
    with thinkers.retrodictor.active():
        assert all(parameter.requires_grad for parameter in thinkers.retrodictor.parameters())
    assert [parameter.requires_grad for parameter in thinkers.model.parameters()] == flags
    assert thinkers.model.active_adapter == "default"


def test_the_gradients_of_both_are_the_same_with_and_without_checkpointing(thinkers):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        own = copy.deepcopy(thinkers.model)
        pair = Thinkers(own, thinkers.law, Retrodictor(own, "retrodictor"), [7], 7)
        if checkpointing:
            own.activation_checkpointing_enable()
            own.enable_input_require_grads()
        own.train()
        thoughts = worlds.THOUGHTS[::20]
        imitator = [parameter for parameter in own.parameters() if parameter.requires_grad]
        sum(pair.score(own, pair.forward_rows(ROW, thoughts)))[:].sum().backward()
        with pair.retrodictor.active():
            pair.score(own, pair.hindsight_rows(ROW, thoughts))[0].sum().backward()
        return [p.grad.clone() for p in (*imitator, *pair.retrodictor.parameters())]

    plain, saved = gradients(False), gradients(True)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    for one, other in zip(plain, saved, strict=True):
        scale = max(one.abs().max().item(), 1.0)
        torch.testing.assert_close(other / scale, one / scale, atol=1e-6, rtol=0)


def test_what_the_two_read_before_they_think():
    law = ThoughtLaw((6,), 3, torch.tensor([True] * 5 + [False] * 3), opening_ids=(5,))
    pair = Thinkers(None, law, Retrodictor(None), [7], 7)
    assert pair.forward_rows(ROW, [[4]]) == [Continuation([3, 3, 5], [4, 6, 2, 7])]
    assert pair.hindsight_rows(ROW, [[4]]) == [Continuation([3, 3, 2, 7, 3, 3, 5], [4, 6])]
    assert pair.longest(ROW) == 7 + 3 + 1
