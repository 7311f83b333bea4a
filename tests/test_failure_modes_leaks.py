"""What must not reach the score: format, memory, old answers, how a batch is split, rewards that say nothing."""

import math

import pytest
import torch
from distinguishers import causal_lm
from tiny_runs import (
    Watched,
    distinguisher_weights,
    imitator_weights,
    logged,
    make,
    run,
    same,
    spied,
    train,
)
from transformers import AutoTokenizer

from hf_imitate.distinguisher import Distinguisher
from hf_imitate.losses import paired_wins
from hf_imitate.pairs import Learner, Pair
from hf_imitate.rendering import Answer
from hf_imitate.replay import Entry
from hf_imitate.surface import audit_surface

# In an order in which each can be planted on top of those before it.
LEAKS = {
    "leading space": lambda text: " " + text,
    "not NFC": lambda text: text.replace("\u00e9", "e\u0301"),
    "blanks at the end": lambda text: text + " \n",
    "blanks at a line's end": lambda text: text.replace("\n", " \t\n"),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
}


def shuffled(texts, seed):
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order.tolist()]


def heldout_accuracy(tokenizer, path, human, imitator):
    """Paired accuracy on held-out pairs of a distinguisher that trained on the others."""
    pairs = [Pair("q", h, (i,)) for h, i in zip(human, imitator, strict=True)]
    torch.manual_seed(0)
    distinguisher = Distinguisher.from_causal_lm(causal_lm(path), tokenizer)
    learner = Learner(distinguisher, 3e-3)
    for start in range(0, 240, 24):
        learner.step(pairs[start : start + 24])
    wins = [paired_wins(seen.human, seen.imitator).mean().item() for seen in learner.score(pairs[240:])]
    return sum(wins) / len(wins)


def test_a_distinguisher_cannot_learn_a_planted_leak_of_format(tiny_model_dir, monkeypatch):
    """Both sides write texts of one law; every leak is planted at once on the human side, and plain to an audit."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    texts = [f"caf\u00e9 {number % 7}\nitem {number % 5}" for number in range(340)]
    imitator = [Answer(text, True) for text in shuffled(texts, 1)]
    human = shuffled(texts, 2)
    for name, leak in LEAKS.items():
        leaking = [Answer(leak(text), True) for text in texts[:100]]
        assert audit_surface(leaking, imitator[:100]).auc > 0.9, name
        human = [leak(text) for text in human]
    human = [Answer(text, True) for text in human]

    assert heldout_accuracy(tokenizer, tiny_model_dir, human, imitator) <= 0.6
    monkeypatch.setattr("hf_imitate.distinguisher.canonical_text", lambda text: text)
    assert heldout_accuracy(tokenizer, tiny_model_dir, human, imitator) > 0.9


# --- old answers


def test_replay_changes_neither_the_first_pay_nor_what_the_fresh_metric_counts(tmp_path, tiny_model_dir):
    """Old answers that are easy to tell fill the buffer before the first step: fresh accuracy must not see them."""
    trainers = {}
    for ratio in (0.0, 0.5):
        trainer = make(tmp_path, tiny_model_dir, kind=Watched, replay_ratio=ratio, distinguisher_steps=2, max_steps=3)
        for row in trainer.game.human_rows.train.tolist():
            trainer.game.replay.add(Entry(row, Answer("zzzz", True)))
        with spied(trainer.game.learner, "step") as calls:
            train(trainer)
        trainers[ratio] = trainer
        old = [sum(pair.imitator == (Answer("zzzz", True),) for pair in given[0][0]) for given in calls]
        assert any(old) == (ratio > 0)
        for batch, told in zip(trainer.batches, logged(trainer, "distinguisher/accuracy_fresh"), strict=True):
            fresh = torch.tensor([row not in trainer.game.human_rows.is_heldout for row in batch["row"].tolist()])
            wins = paired_wins(batch["human"], batch["imitator"])[fresh]
            assert len(batch["advantages"]) == 8
            assert told == pytest.approx(wins.mean().item(), abs=1e-6)
    without, with_replay = (trainers[ratio].batches for ratio in (0.0, 0.5))
    assert torch.equal(without[0]["advantages"], with_replay[0]["advantages"])
    assert torch.equal(without[0]["rewards"], with_replay[0]["rewards"])
    assert not torch.equal(without[1]["rewards"], with_replay[1]["rewards"])


# --- how a batch is split


def test_micro_batches_and_accumulation_change_neither_sides_update(tmp_path, tiny_model_dir):
    """Plain gradient descent: Adam's first step is the sign of the gradient, and would hide what splitting does."""
    found = []
    for rows_at_once, parts in ((8, 1), (4, 2), (2, 4)):
        trainer = make(
            tmp_path,
            tiny_model_dir,
            full=True,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=parts,
            replay_ratio=0.0,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            max_steps=2,
        )
        learner = trainer.game.learner
        learner.optimizer = torch.optim.SGD(learner.optimizer.param_groups, lr=0.1)
        learner.learning_rates = [0.1]
        learner.max_grad_norm = math.inf  # a clipped gradient hides its size
        start = imitator_weights(trainer), distinguisher_weights(trainer)
        train(trainer)
        found.append((imitator_weights(trainer), distinguisher_weights(trainer)))
        assert all(not same(one, two) for one, two in zip(start, found[-1], strict=True))
    for side in (0, 1):
        for other in found[1:]:
            for name, value in found[0][side].items():
                torch.testing.assert_close(other[side][name], value, atol=1e-6, rtol=0)


# --- rewards that say nothing


@pytest.mark.parametrize("why", ["a distinguisher that scores all alike", "nobody pays", "all were cut and dropped"])
def test_rewards_that_say_nothing_leave_the_imitator_where_it_is(tmp_path, tiny_model_dir, why):
    def nobody(completions, **kwargs):
        return [None] * len(completions)

    trainer = make(
        tmp_path,
        tiny_model_dir,
        full=True,
        kind=Watched,
        retrodictive_coef=0.0,
        scale_rewards="group",
        distinguisher_learning_rate=1e-30,
        arguments={"reward_funcs": nobody} if why == "nobody pays" else {},
        truncated_answers="drop" if why == "all were cut and dropped" else "score",
    )
    if why != "all were cut and dropped":
        for parameter in trainer.distinguisher.head.parameters():
            parameter.data.zero_()
    start = imitator_weights(trainer)
    train(trainer)
    assert all(batch["cut"].all() for batch in trainer.batches)
    assert (trainer.batches[0]["advantages"] == 0).all()
    assert all(batch["advantages"].abs().max() < 1e-20 for batch in trainer.batches)
    for name, value in imitator_weights(trainer).items():
        torch.testing.assert_close(value, start[name], atol=1e-12, rtol=0)
    assert all(value.isfinite().all() for value in distinguisher_weights(trainer).values())


def test_a_reward_that_is_missing_for_some_rows_leaves_the_pay_of_the_others_finite(tmp_path, tiny_model_dir):
    def sometimes(completions, **kwargs):
        return [1.0 if i % 3 == 0 else None for i in range(len(completions))]

    trainer = run(
        tmp_path, tiny_model_dir, full=True, kind=Watched, arguments={"reward_funcs": sometimes}, retrodictive_coef=0.0
    )
    assert all(batch["advantages"].isfinite().all() for batch in trainer.batches)
    assert any((batch["advantages"] != 0).any() for batch in trainer.batches)
    assert all(value.isfinite().all() for value in imitator_weights(trainer).values())
