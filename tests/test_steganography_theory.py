"""What hiding costs: every price against enumeration, a limit, or another road."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from hf_imitate.steganography_theory import (
    answers_needed,
    expected_green_list_price,
    green_list_law,
    green_list_price,
    largest_accuracy,
    message_price,
    rare_burst_law,
    rare_burst_price,
    rejection_log_ratio,
    rejection_price,
    soft_rotation_law,
    soft_rotation_price,
)

P = np.array([0.45, 0.25, 0.15, 0.1, 0.04, 0.01])
LOG_P = torch.from_numpy(P).log()
TURNS = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def kl(p, log_s):
    """KL of a law from many keyed ones, [N]."""
    p = torch.as_tensor(p)
    return (p * (p.log() - log_s)).sum(dim=-1)


def lists(vocab_size):
    return torch.tensor(list(itertools.product([False, True], repeat=vocab_size)))


@pytest.mark.parametrize("delta", [0.0, 0.25, 1.0, 4.0])
def test_the_price_of_a_known_green_list_is_the_divergence(delta):
    law = green_list_law(LOG_P, lists(6), delta)
    torch.testing.assert_close(law.exp().sum(dim=1), torch.ones(64, dtype=torch.float64))
    price = green_list_price(LOG_P.expand(64, 6), lists(6), delta)
    torch.testing.assert_close(price, kl(P, law), atol=1e-12, rtol=0)


@pytest.mark.parametrize("delta", [0.0, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_mean_price_of_a_green_list_is_the_sum_over_all_lists(delta, share):
    weight = torch.where(lists(6), share, 1 - share).prod(dim=1)
    enumerated = (weight * kl(P, green_list_law(LOG_P, lists(6), delta))).sum().item()
    assert expected_green_list_price(P, delta, share) == pytest.approx(enumerated, abs=1e-9)
    assert expected_green_list_price(np.stack([P, P]), delta, share) == pytest.approx([enumerated] * 2, abs=1e-9)


@pytest.mark.parametrize("delta", [0.25, 0.5, 0.9, 1.0])
def test_a_soft_rotation_is_honest_on_average(delta):
    law = soft_rotation_law(LOG_P.expand(len(TURNS), 6), TURNS, delta).exp()
    np.testing.assert_allclose(law.mean(dim=0), P, atol=1e-12)
    opposite = soft_rotation_law(LOG_P.expand(len(TURNS), 6), TURNS + 0.5, delta).exp()
    np.testing.assert_allclose((law + opposite) / 2, np.tile(P, (len(TURNS), 1)), atol=1e-12)
    assert (law - torch.from_numpy(P)).abs().max() > 0.2 * delta * 0.45


@pytest.mark.parametrize("p", [P, [0.5, 0.5], [0.9, 0.1], [0.98, 0.01, 0.01], [0.125] * 8], ids=str)
@pytest.mark.parametrize("delta", [0.0, 0.0005, 0.25, 0.5, 0.9])
def test_the_price_of_a_soft_rotation_is_the_mean_divergence_over_turns(p, delta):
    p = np.asarray(p)
    law = soft_rotation_law(torch.from_numpy(p).log().expand(len(TURNS), len(p)), TURNS, delta)
    assert soft_rotation_price(p, delta) == pytest.approx(kl(p, law).mean().item(), rel=1e-5, abs=1e-13)


def test_rare_tokens_bring_a_soft_rotation_to_its_highest_price():
    for delta in (0.25, 0.5, 0.9):
        highest = -0.5 * math.log(1 - delta**2)
        prices = [float(soft_rotation_price(np.full(k, 1 / k), delta)) for k in (2, 8, 64, 4096)]
        assert prices == sorted(prices)
        assert prices[-1] < highest < prices[-1] * 1.001
    assert soft_rotation_price([0.5, 0.5], 0.5) == pytest.approx(1 - 1.5 * math.log(1.5) - 0.5 * math.log(2))


def test_full_rotation_costs_everything_unless_one_token_is_nearly_certain():
    assert soft_rotation_price(P, 1.0) == math.inf
    assert soft_rotation_price([1.0, 0.0], 1.0) == 0
    half = soft_rotation_law(LOG_P, torch.tensor(0.0), 1.0)
    assert half.exp()[:2].tolist() == pytest.approx([0.9, 0.1])
    assert half[2:].tolist() == [-math.inf] * 4


def two_token_world():
    """Laws of the first token and of the second given the first; no end token. [3], [3, 3]."""
    rng = np.random.default_rng(5)
    return rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), size=3)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.4])
def test_a_rare_burst_multiplies_out_to_the_mixture(rate):
    first, second = two_token_world()
    codeword = (1, 2)
    one = torch.from_numpy(first).log()[None]
    law_first = rare_burst_law(one, torch.zeros(1, dtype=torch.float64), torch.tensor([1]), rate)[0].exp()
    on = torch.from_numpy(second[1]).log()[None]
    law_second = rare_burst_law(on, one[0, 1:2], torch.tensor([2]), rate)[0].exp()
    honest = first[:, None] * second
    mixture = (1 - rate) * honest
    mixture[codeword] += rate
    keyed = np.array(
        [[law_first[i] * (law_second[j] if i == 1 else second[i, j]) for j in range(3)] for i in range(3)]
    )
    np.testing.assert_allclose(keyed, mixture, atol=1e-12)
    price = rare_burst_price(math.log(honest[codeword]), rate)
    assert price == pytest.approx(entropy(honest.ravel(), mixture.ravel()), abs=1e-12)
    assert price <= -math.log1p(-rate) + 1e-15


@pytest.mark.parametrize("max_draws", [1, 3, 1000])
@pytest.mark.parametrize("honest", [0.0, 0.1, 1.0])
def test_the_law_of_rejection_is_that_of_redrawing(max_draws, honest):
    is_match = np.array([1, 0, 0, 1, 0, 1], dtype=bool)
    mass = P[is_match].sum()
    keyed = P * np.exp(rejection_log_ratio(is_match, mass, honest, max_draws))
    assert keyed.sum() == pytest.approx(1)
    # Another road: follow the draws one by one.
    looking, still = np.zeros(6), 1.0
    for draw in range(max_draws):
        is_last = draw == max_draws - 1
        looking += still * P * (is_match | is_last)
        still *= 1 - mass
    np.testing.assert_allclose(keyed, honest * P + (1 - honest) * looking, atol=1e-12)


def test_the_balanced_price_of_rejection_is_the_limit_of_its_law():
    for num_bits, honest in [(1, 0.1), (1, 0.5), (3, 0.1)]:
        count = 2**num_bits
        ratio = rejection_log_ratio(np.arange(count) == 0, 1 / count, honest, 10_000)
        assert rejection_price(num_bits, honest) == pytest.approx(-ratio.mean())
    assert rejection_price(1, 0.1) / math.log(2) == pytest.approx(1.198, abs=5e-4)
    assert rejection_price(3, 0.1) / math.log(2) == pytest.approx(2.548, abs=5e-4)
    assert rejection_price(1, 0.0) == math.inf
    assert rejection_price(1, 1.0) == 0


def test_a_bit_costs_half_the_log_of_its_odds():
    for error in (0.01, 0.1, 0.25, 0.45):
        assert message_price(2, error) == pytest.approx(0.5 * math.log(1 / (4 * error * (1 - error))))
    assert [message_price(2, 0.5), message_price(2, 0.7), message_price(2, 0.0)] == [0, 0, math.inf]
    large = [message_price(2**20, error) / math.log(2) for error in (0.5, 0.25, 0.1, 0.01)]
    assert large == pytest.approx([1, 2, 3.32, 6.64], abs=0.01)


def test_no_random_code_beats_the_price_of_its_message():
    """Any human law, any keyed laws, the best decoder: the bound holds, and is nearly met by some."""
    rng = np.random.default_rng(0)
    closest = math.inf
    for _ in range(2000):
        num_messages, size = rng.integers(2, 5), rng.integers(2, 7)
        human = rng.dirichlet(np.ones(size))
        keyed = rng.dirichlet(np.full(size, rng.choice([0.3, 1, 5])), size=num_messages)
        error = 1 - keyed.max(axis=0).sum() / num_messages
        price = np.mean([entropy(human, law) for law in keyed])
        bound = message_price(int(num_messages), error)
        assert price >= bound - 1e-12
        closest = min(closest, price - bound)
    assert closest < 0.01


def test_the_accuracy_that_a_price_allows_inverts_the_price():
    for num_messages in (2, 256):
        for error in (1e-12, 0.01, 0.2, 0.45):
            accuracy = largest_accuracy(message_price(num_messages, error), num_messages)
            assert 1 - accuracy == pytest.approx(error, rel=1e-3, abs=1e-15)
    assert largest_accuracy(0.0) == pytest.approx(0.5)
    assert largest_accuracy(math.inf) == 1


def test_answers_needed_brings_the_mean_to_z_standard_errors():
    assert answers_needed(0.5, 2.0) == 144
    assert answers_needed(0.5, 2.0, z=1.5) == 36
    assert answers_needed(math.inf, math.nan) == 1
    assert answers_needed(-0.1, 1.0) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: green_list_law(LOG_P, lists(6), -1.0),
        lambda: expected_green_list_price(P, math.inf),
        lambda: soft_rotation_law(LOG_P, torch.tensor(0.0), 1.5),
        lambda: soft_rotation_price(P, -0.1),
        lambda: rare_burst_price(-1.0, 1.0),
        lambda: rejection_log_ratio([True], 0.5, 2.0, 1),
        lambda: rejection_log_ratio([True], 0.5, 0.1, 0),
        lambda: rejection_price(0, 0.1),
        lambda: message_price(1, 0.1),
        lambda: largest_accuracy(-1.0),
    ],
)
def test_a_setting_out_of_range_is_named(call):
    with pytest.raises(ValueError, match=r"`\w+`"):
        call()
