"""Training through hidden thoughts, in a world where every thought can be listed."""

import math
import random

import latent_worlds as worlds
import numpy as np
import pytest
import torch

from hf_imitate.latent_draws import Drawn
from hf_imitate.sampling import stream_key
from hf_imitate.trainers.latent_rows import LatentRow, collate_latent_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.save_world(tmp_path_factory.mktemp("world"))


def batch(trainer, number: int = 4) -> list[LatentRow]:
    return collate_latent_rows([trainer.train_dataset[i] for i in range(number)])["rows"].rows


def fresh_dreams(trainer, number: int) -> list:
    """Answers of the imitator's own to every question, behind which it is known what to guess."""
    asked = [row.rendered for row in batch(trainer, 8)]
    keys = [[stream_key(1, "fresh", f"{i}", k) for k in range(number)] for i in range(len(asked))]
    dreams = trainer.thinkers.dream(asked, keys, 4)
    return [row._replace(answer_ids=one.answer_ids) for row, own in zip(asked, dreams, strict=True) for one in own]


def imitator_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("estimator", "number"), [("rws", 4), ("ovis", 4), ("elbo", 4), ("elbo", 1), ("prior", 4)])
def test_training_raises_the_exact_log_p(world, tmp_path, estimator, number):
    trainer = worlds.make(
        tmp_path, world, estimator=estimator, num_thoughts=number, max_steps=12, per_device_train_batch_size=8
    )
    before = worlds.mean_exact(trainer)
    worlds.train(trainer)
    assert worlds.mean_exact(trainer) > before + 1
    kl = None if trainer.retrodictor is None else worlds.kl_to_posterior(trainer)
    assert kl is None or kl < 10


def test_with_every_thought_drawn_once_loss_and_gradient_are_those_of_the_exact_log_p(world, tmp_path, monkeypatch):
    """259 thoughts, each with log q = -log 259: the mean weight is then the sum over thoughts itself."""
    trainer = worlds.make(tmp_path, world, num_thoughts=len(worlds.THOUGHTS))
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = batch(trainer, 2)
    every = [Drawn(thought, [], -math.log(len(worlds.THOUGHTS))) for thought in worlds.THOUGHTS]
    monkeypatch.setattr(trainer.thinkers, "think", lambda asked, keys: [every for _ in asked])
    trainer.model.train()
    loss, _ = trainer.steps.loss(trainer.model, rows, 0)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)

    exact = -sum(
        torch.logsumexp(
            worlds.reference_log_joint(trainer.model, row.rendered.prompt_ids, row.rendered.answer_ids), dim=0
        )
        for row in rows
    ) / len(rows)
    assert abs(loss.item() - exact.item()) < 1e-4
    for one, other in zip(gradients, torch.autograd.grad(exact, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_the_retrodictor_follows_the_posterior(world, tmp_path):
    """The imitator stands still in the warm-up; its dreams alone bring the retrodictor nearer.

    Nearer behind answers that the imitator gives: those of the data it hardly ever dreams of here (12 bits each).
    """
    trainer = worlds.make(
        tmp_path,
        world,
        retrodictor_warmup_steps=50,
        max_steps=1,
        learning_rate=1e-9,
        retrodictor_learning_rate=1e-2,
        num_thoughts=16,
        per_device_train_batch_size=8,
    )
    dreamed = fresh_dreams(trainer, 6)
    weights, before = imitator_weights(trainer), [worlds.kl_of_row(trainer, row) for row in dreamed]
    worlds.train(trainer)
    after = [worlds.kl_of_row(trainer, row) for row in dreamed]
    gain = torch.tensor(before) - torch.tensor(after)
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))
    assert sum(after) < 2 / 3 * sum(before), (sum(after) / len(after), sum(before) / len(before))
    dreamed = [
        entry["retrodictor/dream_loss"] for entry in trainer.state.log_history if "retrodictor/dream_loss" in entry
    ]
    assert sum(dreamed[-5:]) < sum(dreamed[:5])
    moved = [(p - weights[n]).abs().max() for n, p in trainer.model.named_parameters() if n in weights]
    assert 0 < max(moved) < 1e-8
    phases = [entry["phase"] for entry in trainer.state.log_history if "phase" in entry]
    assert phases == ["retrodictor_warmup"] * 50 + ["training"]
    assert trainer.state.max_steps == 51


def test_wake_steps_bring_the_retrodictor_nearer_to_the_posterior(world, tmp_path):
    trainer = worlds.make(
        *(tmp_path, world),
        **{"max_steps": 40, "learning_rate": 1e-9, "retrodictor_learning_rate": 1e-2, "num_thoughts": 16},
        per_device_train_batch_size=8,
    )
    before = worlds.kl_to_posterior(trainer)
    worlds.train(trainer)
    assert worlds.kl_to_posterior(trainer) < 0.35 * before


def test_an_automatic_warm_up_ends_where_dreams_stop_teaching(world, tmp_path):
    trainer = worlds.make(
        tmp_path, world, retrodictor_warmup_steps="auto", retrodictor_learning_rate=1e-12, max_steps=1, num_thoughts=2
    )
    trainer.warmup.plateau.patience = 1
    worlds.train(trainer)
    assert trainer.warmup.steps in (20, 30, 40)
    assert trainer.state.global_step == trainer.state.max_steps == trainer.warmup.steps + 1


def test_a_known_thought_is_learned_by_both(world, tmp_path):
    dataset = worlds.rows(thought=["f f"] * 8)
    trainer = worlds.make(tmp_path, world, dataset, max_steps=60, per_device_train_batch_size=8)
    rows = batch(trainer, 8)

    def known() -> list[float]:
        return [worlds.log_q_of_all(trainer, row.rendered)[worlds.THOUGHTS.index([5, 5])].item() for row in rows]

    loss, _ = trainer.steps.loss(trainer.model, rows, 0)
    joint = [
        worlds.reference_log_joint(trainer.model, row.rendered.prompt_ids, row.rendered.answer_ids)[
            worlds.THOUGHTS.index([5, 5])
        ]
        for row in rows
    ]
    assert abs(loss.item() + sum(joint).item() / 8) < 1e-4
    assert max(known()) < -7
    worlds.train(trainer)
    assert min(known()) > -0.5, known()
    with torch.no_grad():
        again, _ = trainer.steps.loss(trainer.model, rows, 0)
    assert again < 1.5, again


def test_known_and_hidden_thoughts_share_a_batch(world, tmp_path):
    """None is a thought that nobody wrote down; an empty text is an answer without one."""
    trainer = worlds.make(tmp_path, world, worlds.rows(thought=["a", "", None, None] * 2))
    rows = batch(trainer)
    assert [row.thought_ids for row in rows] == [(0,), (), None, None]
    trainer.model.train()
    loss, table = trainer.steps.loss(trainer.model, rows, 0)
    assert len(table) == 4
    trainer.steps.learn_in_hindsight(1.0)
    assert all(parameter.grad is not None for parameter in trainer.learner.parameters)
    assert loss.isfinite()


def test_weights_of_rows_multiply_their_loss(world, tmp_path):
    trainer = worlds.make(tmp_path, world, worlds.rows(weight=[3.0, 1.0] * 4))
    rows = batch(trainer, 2)
    trainer.model.train()
    both, _ = trainer.steps.loss(trainer.model, rows, 0)
    alone = [trainer.steps.loss(trainer.model, [row], 0)[0].item() for row in rows]
    assert [row.weight for row in rows] == [1.5, 0.5]
    assert abs(both.item() - sum(alone) / 2) < 1e-4


def test_evaluation_estimates_the_exact_bits_and_changes_nothing(world, tmp_path):
    """The limits are four exact standard errors of the estimate, and its exact bias, both of first order in 1 / K."""
    number, rows = 4000, worlds.rows().select(range(7))  # one weight of the eighth row would outweigh all others
    trainer = worlds.make(
        tmp_path, world, rows, num_thoughts=256, num_thoughts_eval=number, arguments={"eval_dataset": rows}
    )
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    metrics = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    spread = []
    for row in batch(trainer, 7):
        log_q = worlds.log_q_of_all(trainer, row.rendered)
        ids = row.rendered.prompt_ids, row.rendered.answer_ids
        spread.append(worlds.relative_variance(trainer.model, trainer.thinkers.law, log_q, *ids) / number)
    error, bias = math.sqrt(sum(spread)) / 7, -sum(spread) / 2 / 7
    limit = 4 * error / math.log(2)
    bits = -(worlds.mean_exact(trainer) + bias) / math.log(2)
    assert limit < 0.1
    assert abs(metrics["eval_retrodiction/bits_per_answer"] - bits) < limit
    assert abs(metrics["eval_loss"] - metrics["eval_retrodiction/bits_per_answer"] * math.log(2)) < 1e-3
    assert metrics["eval_retrodiction/bits_per_byte"] == pytest.approx(
        metrics["eval_retrodiction/bits_per_answer"] / 3
    )
    for name in ("effective_sample_size", "largest_weight", "mean_length", "elbo_gap"):
        assert math.isfinite(metrics[f"eval_thoughts/{name}"])
    trainer.args.num_thoughts_eval = 8
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_a_cut_answer_has_no_end_and_no_bits(world, tmp_path, caplog):
    trainer = worlds.make(tmp_path, world, worlds.rows(), max_length=4, arguments={"eval_dataset": worlds.rows()})
    assert {len(row["answer_ids"]) for row in trainer.train_dataset} == {2}
    assert not any(trainer.train_dataset["ended"])
    assert "8 of 8" in caplog.text
    metrics = trainer.evaluate()
    assert "eval_retrodiction/bits_per_answer" not in metrics
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("estimator", ["rws", "ovis", "elbo"])
def test_answers_that_no_thought_explains_are_skipped_and_counted(world, tmp_path, monkeypatch, estimator):
    trainer = worlds.make(tmp_path, world, estimator=estimator)
    score = trainer.thinkers.score

    def impossible(model, rows, temperature=1.0):
        thought, answer = score(model, rows, temperature)
        answer = torch.where(torch.arange(len(rows)) < 4, -torch.inf, answer)  # all of the first row's
        answer = torch.where((torch.arange(len(rows)) > 4) & (torch.arange(len(rows)) < 8), -torch.inf, answer)
        return thought, answer

    trainer.model.train()
    monkeypatch.setattr(trainer.thinkers, "score", impossible)
    loss, _ = trainer.steps.loss(trainer.model, batch(trainer, 3), 0)
    loss.backward()
    trainer.steps.learn_in_hindsight(1.0)
    assert loss.isfinite()
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad.isfinite().all() for parameter in trainer.learner.parameters)
    skipped = 2 if estimator == "elbo" else 1
    trainer._record(trainer.steps.loss(trainer.model, batch(trainer, 3), 0)[1])
    assert trainer._tally.flush("train")["thoughts/skipped"] == pytest.approx(skipped / 3)


def test_the_metrics_of_a_step_are_logged(world, tmp_path):
    trainer = worlds.train(worlds.make(tmp_path, world, max_steps=1))
    entry = trainer.state.log_history[0]
    assert entry["phase"] == "training"
    assert entry["loss"] == pytest.approx(entry["retrodiction/bits_per_answer"] * math.log(2), rel=1e-4)
    assert 1 <= entry["thoughts/effective_sample_size"] <= 4
    assert 0.25 <= entry["thoughts/largest_weight"] <= 1
    assert 0 <= entry["thoughts/mean_length"] <= 3
    assert entry["thoughts/elbo_gap"] >= 0


def test_the_last_step_of_an_epoch_measures_every_batch_it_accumulates(world, tmp_path):
    """Five rows in batches of two, two and one: all of the third's size, as in an evaluation, would be three rows."""
    trainer = worlds.make(
        *(tmp_path, world, worlds.rows().select(range(5))),
        **{"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    )
    seen, add = {}, trainer._tally.add

    def count(mode, name, total, number):
        seen[name] = seen.get(name, 0) + number
        add(mode, name, total, number)

    trainer._tally.add = count
    worlds.train(trainer)
    assert seen["thoughts/skipped"] == 5


def test_full_fine_tuning_has_its_retrodictor_on_a_frozen_copy(world, tmp_path):
    trainer = worlds.make(tmp_path, world, full=True, max_steps=3)
    frozen = [p.detach().clone() for n, p in trainer.retrodictor.model.named_parameters() if "lora_" not in n]
    before, weights = worlds.mean_exact(trainer), imitator_weights(trainer)
    worlds.train(trainer)
    assert worlds.mean_exact(trainer) > before
    assert not same(weights, imitator_weights(trainer))
    after = [p for n, p in trainer.retrodictor.model.named_parameters() if "lora_" not in n]
    assert all(torch.equal(one, other) for one, other in zip(frozen, after, strict=True))


def test_all_of_a_batch_goes_through_one_forward_of_the_imitator(world, tmp_path):
    """K thoughts of a row belong to one micro-batch; with several processes a second forward would not be synced.

    Two rows with 8 thoughts each; some lie side by side.
    """
    trainer = worlds.make(tmp_path, world)
    calls = []

    def counting(**kwargs):
        calls.append(kwargs["input_ids"].shape[0])
        return trainer.model(**kwargs)

    trainer.model.train()
    trainer.steps.loss(counting, batch(trainer), 0)
    assert len(calls) == 1
    assert calls[0] <= 16
