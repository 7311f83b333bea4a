import itertools
import math

import numpy as np
import pytest

from hf_imitate.thought_search import enclose_log_prob

DELIMITER = 0
VOCABULARY = 4
MAX_LENGTH = 3


class ToyModel:
    """A random next-token table over every prefix of at most three tokens; thoughts can be listed one by one."""

    def __init__(self, seed, sharpness=1.0):
        rng = np.random.default_rng(seed)
        prefixes = [p for n in range(MAX_LENGTH + 1) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
        logits = {prefix: sharpness * rng.normal(size=VOCABULARY) for prefix in prefixes}
        self.next_log_probs = {p: x - np.logaddexp.reduce(x) for p, x in logits.items()}
        self.answer_log_prob = {p: float(np.log(rng.uniform(0.01, 0.5))) for p in prefixes}
        self.evaluated = []

    def next_token_log_probs(self, prefixes):
        self.evaluated += [("prefix", p) for p in prefixes]
        return np.stack([self.next_log_probs[tuple(p)] for p in prefixes])

    def answer_log_probs(self, thoughts):
        self.evaluated += [("thought", z) for z in thoughts]
        return np.array([self.answer_log_prob[tuple(z)] for z in thoughts])

    def prior(self, thought):
        """The forced close: at three tokens the delimiter costs nothing."""
        steps = [self.next_log_probs[thought[:i]][token] for i, token in enumerate(thought)]
        close = self.next_log_probs[thought][DELIMITER] if len(thought) < MAX_LENGTH else 0.0
        return math.exp(sum(steps) + close)

    def exact(self):
        return math.log(sum(self.prior(z) * math.exp(log_p) for z, log_p in self.answer_log_prob.items()))

    def enclose(self, **options):
        return enclose_log_prob(self.next_token_log_probs, self.answer_log_probs, DELIMITER, MAX_LENGTH, **options)


def test_the_toy_models_thoughts_sum_to_one():
    model = ToyModel(0)
    assert sum(model.prior(z) for z in model.answer_log_prob) == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("largest", [1.0, 0.5])
def test_the_truth_is_enclosed_at_every_budget_and_the_enclosure_only_shrinks(batch_size, largest):
    for seed in range(10):
        model, before = ToyModel(seed), None
        for budget in range(1, 50, 3):
            found = model.enclose(
                gap=1e-9, max_evaluations=budget, batch_size=batch_size, log_largest_answer_prob=math.log(largest)
            )
            assert found.interval.low <= model.exact() + 1e-9
            assert model.exact() - 1e-9 <= found.interval.high
            assert found.num_evaluations <= budget
            if before is not None:
                assert before.low - 1e-9 <= found.interval.low
                assert found.interval.high <= before.high + 1e-9
            before = found.interval


def test_listing_everything_gives_the_exact_value():
    model = ToyModel(3)
    found = model.enclose(gap=1e-12)
    assert found.is_finished
    assert found.interval.low == found.interval.high == pytest.approx(model.exact())
    assert found.num_thoughts == len(model.answer_log_prob) == 40
    assert found.remaining_mass == 0.0


def test_no_thought_is_listed_twice_and_forced_closes_cost_no_call():
    model = ToyModel(4)
    model.enclose(gap=1e-12)
    assert len(set(model.evaluated)) == len(model.evaluated)
    assert max(len(tokens) for kind, tokens in model.evaluated if kind == "prefix") == MAX_LENGTH - 1


def test_the_remaining_mass_is_that_of_the_thoughts_not_listed():
    model = ToyModel(5)
    found = model.enclose(gap=1e-9, max_evaluations=20)
    listed = [tokens for kind, tokens in model.evaluated if kind == "thought"]
    assert found.num_thoughts == len(listed) > 0
    assert found.remaining_mass == pytest.approx(1 - sum(model.prior(z) for z in listed))
    low = math.log(sum(model.prior(z) * math.exp(model.answer_log_prob[z]) for z in listed))
    assert found.interval.low == pytest.approx(low)
    assert found.interval.high == pytest.approx(math.log(math.exp(low) + found.remaining_mass))


def test_probable_thoughts_come_first():
    model = ToyModel(6, sharpness=3.0)
    model.enclose(gap=1e-9, batch_size=1)
    masses = [model.prior(tokens) for kind, tokens in model.evaluated if kind == "thought"]
    assert masses == sorted(masses, reverse=True)


def test_the_search_stops_at_the_gap():
    model = ToyModel(7, sharpness=3.0)
    found = model.enclose(gap=0.5, batch_size=1)
    assert found.is_finished
    assert found.interval.high - found.interval.low <= 0.5
    assert found.num_thoughts < 40


def test_pruned_continuations_stay_in_the_remainder():
    model = ToyModel(8)
    found = model.enclose(gap=1e-9, max_children=2)
    assert not found.is_finished
    assert found.remaining_mass > 0.05
    assert found.interval.low < model.exact() < found.interval.high


def test_no_thought_allowed_means_one_thought():
    model = ToyModel(9)
    found = enclose_log_prob(model.next_token_log_probs, model.answer_log_probs, DELIMITER, 0)
    assert found.interval == pytest.approx((model.answer_log_prob[()],) * 2)


def test_an_impossible_answer_has_log_probability_minus_infinity():
    model = ToyModel(10)
    model.answer_log_prob = dict.fromkeys(model.answer_log_prob, -math.inf)
    found = model.enclose()
    assert found.is_finished
    assert found.interval == (-math.inf, -math.inf)


def test_tokens_masked_without_renormalising_are_refused():
    model = ToyModel(11)
    for log_probs in model.next_log_probs.values():
        log_probs[2] = -math.inf
    with pytest.raises(ValueError, match=r"sum to 0\.\d+, not 1\. Mask every token.*renormalise"):
        model.enclose()
    for prefix, log_probs in model.next_log_probs.items():
        model.next_log_probs[prefix] = log_probs - np.logaddexp.reduce(log_probs)
    assert model.enclose(gap=1e-12).num_thoughts == 15  # two content tokens: 1 + 2 + 4 + 8


def test_a_bound_on_answers_that_does_not_hold_is_refused():
    with pytest.raises(ValueError, match="proved bound"):
        ToyModel(12).enclose(gap=1e-9, log_largest_answer_prob=math.log(0.05))


def test_wrong_shapes_are_refused():
    model = ToyModel(13)
    with pytest.raises(ValueError, match=r"\[n, V\]"):
        enclose_log_prob(lambda p: np.zeros(4), model.answer_log_probs, DELIMITER, 3)
    with pytest.raises(ValueError, match=r"need \[n\]"):
        enclose_log_prob(model.next_token_log_probs, lambda z: np.zeros((len(z), 2)), DELIMITER, 3)


@pytest.mark.parametrize("options", [{"gap": 0.0}, {"max_evaluations": 0}, {"batch_size": 0}, {"max_children": 0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="Need `max_thought_length`"):
        ToyModel(14).enclose(**options)
