"""Bits of the exact trainer: those of whole answers, by hand, in training and in evaluation."""

import math

import pytest
from exact_runs import ANSWERS, make, nats_by_hand, run
from tiny_runs import load, logged, rows
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(str(tiny_model_dir))


def test_bits_of_evaluation_are_those_of_whole_answers_by_hand(tmp_path, tiny_model_dir, tokenizer):
    held_out = rows(9, ANSWERS, weight=[0.5, 2.0, 1.0] * 3)
    trainer = run(tmp_path, tiny_model_dir, arguments={"eval_dataset": held_out}, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    nats = nats_by_hand(trainer.model.eval(), tokenizer, held_out)
    weight, size = held_out["weight"][:], [len(text.encode()) for text in held_out["completion"]]
    total = sum(w * n for w, n in zip(weight, nats, strict=True)) / math.log(2)
    assert metrics["eval_retrodiction/bits_per_answer"] == pytest.approx(total / sum(weight), rel=1e-5)
    num_bytes = sum(w * s for w, s in zip(weight, size, strict=True))
    assert metrics["eval_retrodiction/bits_per_byte"] == pytest.approx(total / num_bytes, rel=1e-5)
    assert "retrodiction/bits_per_answer" not in metrics


@pytest.mark.parametrize("reduction", ["answer", "token"])
def test_the_loss_of_evaluation_has_the_normaliser_of_training(tmp_path, tiny_model_dir, tokenizer, reduction):
    dataset = rows(8, ANSWERS)
    trainer = make(tmp_path, tiny_model_dir, arguments={"eval_dataset": dataset}, loss_reduction=reduction)
    nats = nats_by_hand(load(tiny_model_dir), tokenizer, dataset)
    number = {"answer": 8, "token": sum(len(tokenizer(row["completion"])["input_ids"]) + 1 for row in dataset)}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(nats) / number[reduction], rel=1e-5)


def test_several_evaluation_sets_and_one_given_later_have_their_own_names(tmp_path, tiny_model_dir):
    sets = {"train": rows(4, ("m",)), "long": rows(4, ("fghij klé",))}
    trainer = make(tmp_path, tiny_model_dir, arguments={"eval_dataset": sets})
    both = trainer.evaluate()
    short, long = (both[f"eval_{name}_retrodiction/bits_per_answer"] for name in sets)
    assert short < long / 2
    assert trainer.imitation_facts()["dataset"]["num_rows"] == 8
    later = trainer.evaluate(sets["long"], metric_key_prefix="later")
    assert later["later_retrodiction/bits_per_answer"] == pytest.approx(long, rel=1e-6)


def test_bits_between_two_logs_are_the_weighted_mean_of_the_answers_between_them(tmp_path, tiny_model_dir, tokenizer):
    weight = [4.0, 1.0, 2.0, 0.5, *[1.0] * 4]
    still = {"learning_rate": 1e-12, "train_sampling_strategy": "sequential"}
    half = {"max_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 2}
    trainer = run(tmp_path, tiny_model_dir, rows(8, ANSWERS, weight=weight), **still, **half)
    nats = nats_by_hand(load(tiny_model_dir), tokenizer, rows(8, ANSWERS))
    mean = sum(w * n for w, n in zip(weight[:4], nats[:4], strict=True)) / sum(weight[:4])
    assert logged(trainer, "retrodiction/bits_per_answer") == [pytest.approx(mean / math.log(2), rel=1e-5)]


def test_bits_of_the_last_step_of_an_epoch_are_of_every_batch_it_accumulates(tmp_path, tiny_model_dir, tokenizer):
    """Ten rows are batches of four, four and two; accelerate takes the last one's size for that of all."""
    dataset = rows(10, ANSWERS)
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    trainer = run(tmp_path, tiny_model_dir, dataset, **steps)
    mean = sum(nats_by_hand(load(tiny_model_dir), tokenizer, dataset)) / 10
    assert logged(trainer, "loss") == [pytest.approx(mean, rel=1e-6)]
    assert logged(trainer, "retrodiction/bits_per_answer") == [pytest.approx(mean / math.log(2), rel=1e-6)]
