"""What is not as it should be ends in an error that names it, or in numbers that are finite and counted."""

import logging
import math

import latent_worlds as worlds
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_imitate import Imitator
from hf_imitate.latent_draws import Drawn
from hf_imitate.latent_imitator import LatentImitator
from hf_imitate.scoring import num_positions
from hf_imitate.trainers.latent_rows import collate_latent_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.save_world(tmp_path_factory.mktemp("world"))


def batch(trainer, number=4):
    return collate_latent_rows([trainer.train_dataset[i] for i in range(number)])["rows"].rows


def weighted(trainer, monkeypatch, log_weights):
    """Let the thoughts of every row have these weights, whatever the models say."""
    given = torch.tensor(log_weights)
    score = trainer.thinkers.score

    def scored(model, rows, temperature=1.0):
        thought, answer = score(model, rows, temperature)
        is_forward = len(rows[0].ids) > trainer.thinkers.law.max_length + 1 or len(answer.nonzero()) > 0
        return (thought * 0, answer * 0 + given.repeat(len(rows) // len(given))) if is_forward else (thought, answer)

    monkeypatch.setattr(trainer.thinkers, "score", scored)
    think = trainer.thinkers.think
    monkeypatch.setattr(
        trainer.thinkers,
        "think",
        lambda rows, keys: [[one._replace(log_prob_thought=0.0) for one in own] for own in think(rows, keys)],
    )


# --- rows and settings


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"prompt": [""] * 8}, ValueError, "column `prompt`: 8 of 8 rows"),
        ({"prompt": ["a"] * 7 + [""]}, ValueError, "row 7"),
        ({"completion": ["a"] * 7 + [""]}, ValueError, "row 7"),
        ({"completion": [3] * 8}, TypeError, "completion"),
        ({"prompt": [3] * 8}, TypeError, "prompt"),
        ({"prompt": ["a"] * 7 + [None]}, (TypeError, ValueError), "row 7"),
        ({"weight": [1.0] * 7 + [-1.0]}, ValueError, "row 7"),
        ({"weight": [0.0] * 8}, ValueError, "weight"),
        ({"weight": [1.0] * 7 + [math.nan]}, ValueError, "row 7"),
        ({"thought": [1] * 8}, TypeError, r"column `thought`: 8 of 8 rows"),
    ],
)
def test_bad_rows_are_named(world, tmp_path, columns, error, words):
    with pytest.raises(error, match=words) as caught:
        worlds.make(tmp_path, world, worlds.rows(**columns))
    assert "a a" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "error"),
    [
        (worlds.rows().remove_columns("prompt"), ValueError),
        (worlds.rows().remove_columns("completion"), ValueError),
        (worlds.rows().select([]), ValueError),
        ([{"prompt": "a", "completion": "b"}], TypeError),
    ],
)
def test_data_sets_that_are_none_are_refused(world, tmp_path, dataset, error):
    with pytest.raises(error, match="train_dataset"):
        worlds.make(tmp_path, world, dataset)


def test_an_imitator_of_prompt_tuning_would_think_without_its_prompt_and_is_refused(world, tmp_path):
    """It was trained on thoughts that the bare base drew, as if they were its own."""
    adapter = {"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}
    with pytest.raises(ValueError, match=r"active adapter, PROMPT_TUNING.*Use LoRA"):
        worlds.make(tmp_path, world, arguments=adapter, estimator="prior")


def test_conversations_without_a_chat_template_are_refused(world, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    with pytest.raises(ValueError, match="chat_template"):
        worlds.make(tmp_path, world, Dataset.from_list(rows))


def test_without_an_end_token_there_is_no_log_p(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(str(world))
    tokenizer.eos_token, model = None, worlds.load_world(world)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no end token"):
        worlds.LatentRetrodictiveTrainer(
            model=model, args=worlds.settings(tmp_path), train_dataset=worlds.rows(), processing_class=tokenizer
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_and_a_missing_padding_token_change_nothing(world, tmp_path, side):
    losses = []
    for name, change in (("plain", {}), ("changed", {"padding_side": side, "pad_token": None})):
        tokenizer = AutoTokenizer.from_pretrained(str(world))
        for attribute, value in change.items():
            setattr(tokenizer, attribute, value)
        trainer = worlds.make(tmp_path / name, world, arguments={"processing_class": tokenizer})
        trainer.model.train()
        losses.append(trainer.steps.loss(trainer.model, batch(trainer), 0)[0].item())
    assert losses[0] == losses[1]


def test_one_row_and_rows_that_are_all_alike_are_trained(world, tmp_path):
    one = worlds.train(worlds.make(tmp_path / "one", world, worlds.rows().select([0]), max_steps=2))
    assert one.state.global_step == 2
    alike = worlds.rows(prompt=["a b"] * 8, completion=["c"] * 8)
    trainer = worlds.train(worlds.make(tmp_path / "alike", world, alike, max_steps=2))
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_text_that_spells_an_end_token_stays_text(tiny_model_dir, tmp_path):
    dataset = worlds.rows(completion=["a <|endoftext|> b"] * 8, thought=["c <|endoftext|>"] * 8)
    trainer = worlds.make(tmp_path, tiny_model_dir, dataset, max_thought_length=40)
    row, end = trainer.train_dataset[0], trainer.renderer.end_token_ids[0]
    assert row["answer_ids"].count(end) == 1
    assert row["answer_ids"][-1] == end
    assert end not in row["thought_ids"]
    assert trainer.processing_class.decode(row["thought_ids"]) == "c <|endoftext|>"


def test_rows_of_weight_zero_and_rows_without_room_are_left_out_and_counted(world, tmp_path, caplog):
    dataset = worlds.rows(weight=[0.0, 2.0] * 4, prompt=["a b"] * 7 + ["a b c d"])
    with caplog.at_level(logging.WARNING):
        trainer = worlds.make(tmp_path, world, dataset, max_length=4)
    counts = trainer._counts["train"]
    assert (counts.num_rows, counts.num_weightless, counts.num_without_room, len(trainer.train_dataset)) == (
        8,
        4,
        1,
        3,
    )
    assert "4 of 8 rows have weight 0" in caplog.text
    assert "1 of 8 questions leave no room" in caplog.text


# --- thoughts


def test_one_thought_per_answer_is_that_path_alone(world, tmp_path):
    """At K = 1 the bound is log w, and the empty thought is a thought like others."""
    trainer = worlds.make(tmp_path, world, num_thoughts=1, estimator="elbo", num_thoughts_eval=1)
    for row in batch(trainer):
        for thought in ([], [1, 2]):
            log_q = worlds.log_q_of_all(trainer, row.rendered)[worlds.THOUGHTS.index(thought)].item()
            trainer.thinkers.think = lambda rows, keys, z=thought, q=log_q: [[Drawn(z, [], q)] for _ in rows]
            trainer.model.train()
            loss, _ = trainer.steps.loss(trainer.model, [row], 0)
            joint = worlds.log_joint(
                trainer.model, trainer.thinkers.law, row.rendered.prompt_ids, row.rendered.answer_ids
            )
            expected = log_q - joint[worlds.THOUGHTS.index(thought)].item()
            assert loss.item() == pytest.approx(expected * row.weight, abs=1e-4)


def test_a_model_that_never_thinks_is_trained_on_empty_thoughts(world, tmp_path):
    trainer = worlds.make(tmp_path, world)
    empty = [Drawn([], [], -0.1)] * 4
    trainer.thinkers.think = lambda rows, keys: [empty for _ in rows]
    worlds.train(trainer)
    entry = trainer.state.log_history[0]
    assert entry["thoughts/mean_length"] == 0
    assert entry["thoughts/effective_sample_size"] == pytest.approx(4)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("estimator", ["rws", "ovis", "elbo", "prior"])
@pytest.mark.parametrize(
    ("weights", "ess", "largest"),
    [
        ([0.0, -1e4, -1e4, -1e4], 1.0, 1.0),
        ([0.0, -math.inf, -math.inf, -math.inf], 1.0, 1.0),
        ([-math.inf] * 4, 0.0, 0.0),
        ([-700.0] * 4, 4.0, 0.25),
    ],
)
def test_dominating_and_vanishing_weights_leave_finite_steps(
    world, tmp_path, monkeypatch, estimator, weights, ess, largest
):
    trainer = worlds.make(tmp_path, world, estimator=estimator)
    weighted(trainer, monkeypatch, weights)
    trainer.model.train()
    loss, table = trainer.steps.loss(trainer.model, batch(trainer), 0)
    loss.backward()
    trainer.steps.learn_in_hindsight(1.0)
    assert loss.isfinite()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
    if trainer.learner is not None:
        assert math.isfinite(trainer.learner.step())
    trainer._record(table)
    logged = trainer._tally.flush("train")
    assert logged["thoughts/effective_sample_size"] == pytest.approx(ess)
    assert logged["thoughts/largest_weight"] == pytest.approx(largest)
    nothing_left = weights[1] == -math.inf if estimator == "elbo" else weights[0] == -math.inf
    assert logged["thoughts/skipped"] == float(nothing_left)
    assert ("retrodiction/bits_per_answer" in logged) == (weights[0] > -math.inf)


def test_an_evaluation_that_nothing_explains_counts_it_and_stays_finite(world, tmp_path, monkeypatch):
    trainer = worlds.make(tmp_path, world, arguments={"eval_dataset": worlds.rows()})
    log_weights = trainer.thinkers.log_weights

    def none_for_the_first(rows, keys, temperature=1.0):
        log_p, log_q, drawn = log_weights(rows, keys, temperature)
        log_p[0] = -torch.inf
        return log_p, log_q, drawn

    whole = trainer.evaluate()
    monkeypatch.setattr(trainer.thinkers, "log_weights", none_for_the_first)
    metrics = trainer.evaluate()
    assert metrics["eval_thoughts/skipped"] == pytest.approx(1 / 8)
    assert whole["eval_thoughts/skipped"] == 0
    assert math.isfinite(metrics["eval_loss"])
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_retrodiction/bits_per_answer"] * math.log(2), rel=1e-4)


# --- models that break, or are too short


@pytest.mark.parametrize(
    ("name", "words"), [("learning_rate", "imitator"), ("retrodictor_learning_rate", "retrodictor")]
)
def test_a_rate_that_ruins_a_model_stops_the_run_and_says_which(world, tmp_path, name, words):
    trainer = worlds.make(tmp_path, world, max_steps=5, **{"retrodictor_learning_rate": 1e-3, name: 1e30})
    with pytest.raises(FloatingPointError, match=words):
        worlds.train(trainer)
    assert trainer.state.global_step < 5


def test_dreams_stop_where_the_positions_of_the_model_end(world, tmp_path):
    """A short answer to a long question fits; the longest answer of the data after that question would not."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, bos_token_id=None, eos_token_id=7, **sizes))
    tokenizer = AutoTokenizer.from_pretrained(str(world))
    dataset = worlds.rows(prompt=["a b"] * 7 + ["a " * 9], completion=["c " * 12] * 7 + ["c"])
    trainer = worlds.LatentRetrodictiveTrainer(
        model=model,
        args=worlds.settings(tmp_path, retrodictor_warmup_steps=3, per_device_train_batch_size=8),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=worlds.lora(target_modules=["c_attn"], fan_in_fan_out=True),
    )
    assert num_positions(trainer.model) == 24
    longest = {trainer.thinkers.longest_answer(row.rendered, 13) for row in batch(trainer, 8)}
    assert longest == {13, 2}
    worlds.train(trainer)
    assert trainer.phase == "training"


def test_questions_and_answers_longer_than_the_model_are_named(world, tmp_path):
    trainer = worlds.make(tmp_path, world)
    imitator = LatentImitator(trainer.thinkers, trainer.renderer, 4)
    with pytest.raises(ValueError, match=r"1 of 2 questions with their answers \(number 1\) need up to 7\d positions"):
        imitator.log_prob(["a", "a b"], ["b", "c " * 63])
    with pytest.raises(ValueError, match=r"1 of 2 questions \(number 1\) need up to 68 positions.*has 64"):
        imitator.answer(["a", "a " * 60])
    with pytest.raises(ValueError, match="max_new_tokens"):
        imitator.answer(["a"], max_new_tokens=64)
    assert imitator.log_prob(["a " * 20], ["b " * 5], num_estimates=2).nats.isfinite().all()


def test_a_law_over_another_vocabulary_is_refused(world, tmp_path):
    trainer = worlds.make(tmp_path, world, full=True)
    trainer.save_model()
    file = tmp_path / "run" / "imitation.json"
    file.write_text(file.read_text().replace('"vocabulary": 8', '"vocabulary": 9'))
    with pytest.raises(ValueError, match="over 9 tokens, and the model has 8"):
        Imitator.from_pretrained(tmp_path / "run", device="cpu")


def test_weights_that_an_initialisation_would_move_stay_where_they_are(world, tmp_path):
    """PiSSA takes the adapter's start out of the base, which here is the imitator's, too."""
    model = worlds.load_world(world)
    ids = torch.tensor([[0, 1, 2]])
    before = model(ids).logits.detach()
    arguments = {"retrodictor_peft_config": worlds.lora(init_lora_weights="pissa")}
    trainer = worlds.make(tmp_path, world, arguments=arguments)
    torch.testing.assert_close(trainer.model(input_ids=ids).logits, before)
