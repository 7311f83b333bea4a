import math

import pytest
import torch
from distinguishers import ANSWERS, QUESTIONS, causal_lm, make, marked_pairs
from transformers import AutoTokenizer

from hf_imitate.distinguisher import Distinguisher, fit, mean_loss_and_accuracy
from hf_imitate.pairs import Learner, Logits, Pair


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_it_learns_a_difference_and_keeps_the_weights_that_were_best_held_out(tiny_model_dir, tokenizer):
    distinguisher = Distinguisher.from_causal_lm(causal_lm(tiny_model_dir), tokenizer)
    pairs = marked_pairs(40)

    report = fit(distinguisher, pairs[:24], pairs[24:], num_steps=30, batch_size=8, learning_rate=1e-2, eval_every=5)

    assert report.heldout_accuracy == 1.0
    assert report.heldout_loss < 0.2
    seen = Learner(distinguisher, 1e-3).score(pairs[24:])
    margins = torch.cat([logits.human - logits.imitator for logits in seen])
    assert (margins > 0).all()


def test_a_fit_that_makes_things_worse_keeps_the_best_reading(tiny_model_dir, tokenizer):
    """Held-out pairs have their labels swapped, so every update after the first reading hurts."""
    distinguisher = Distinguisher.from_causal_lm(causal_lm(tiny_model_dir), tokenizer)
    pairs = marked_pairs(16)
    swapped = [Pair(pair.prompt, pair.imitator[0], (pair.human,)) for pair in pairs]

    report = fit(
        distinguisher, pairs, swapped, num_steps=40, batch_size=8, learning_rate=5e-3, eval_every=2, patience=3
    )

    assert report.num_steps < 40
    loss, accuracy = mean_loss_and_accuracy(Learner(distinguisher, 1e-3).score(swapped), "bradley_terry")
    assert loss == pytest.approx(report.heldout_loss, abs=1e-6)
    assert accuracy == report.heldout_accuracy


def test_equal_seeds_give_equal_fits(tiny_model_dir, tokenizer):
    def logits(seed):
        distinguisher = Distinguisher.from_causal_lm(causal_lm(tiny_model_dir), tokenizer, seed=seed)
        fit(distinguisher, marked_pairs(8), num_steps=3, batch_size=4, seed=seed)
        return distinguisher.score(QUESTIONS, ANSWERS)

    state = torch.random.get_rng_state()
    torch.testing.assert_close(logits(0), logits(0), atol=0, rtol=0)
    assert not torch.equal(logits(0), logits(1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_fit_to_nothing_is_an_error(tiny_model_dir, tokenizer):
    with pytest.raises(ValueError, match="at least one pair"):
        fit(make("adapter", tiny_model_dir, tokenizer), [])


def test_loss_and_accuracy_are_means_over_comparisons():
    """A pair with two comparisons counts twice; a tie counts one half; no comparison at all is no number."""
    logits = [
        Logits(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])),
        Logits(torch.tensor([0.0]), torch.tensor([3.0]), torch.tensor([3.0])),
    ]

    loss, accuracy = mean_loss_and_accuracy(logits, "bce")

    def softplus(x):
        return math.log1p(math.exp(x))

    by_hand = [0.5 * (softplus(-h) + softplus(i)) for h, i in [(2, 1), (2, 2), (0, 3)]]
    assert loss == pytest.approx(sum(by_hand) / 3)
    assert accuracy == pytest.approx(1.5 / 3)
    assert all(math.isnan(value) for value in mean_loss_and_accuracy([], "bce"))
