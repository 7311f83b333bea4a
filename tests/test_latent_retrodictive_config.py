"""Bad settings and bad rows fail early, and say what to do."""

import time

import latent_worlds as worlds
import pytest
from datasets import Dataset

from hf_imitate.trainers.latent_retrodictive_config import LatentRetrodictiveConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.save_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_thoughts": 1}, "needs at least 2. Set `num_thoughts=8`"),
        ({"num_thoughts": 1, "estimator": "ovis"}, "needs at least 2"),
        ({"num_thoughts": 0, "estimator": "elbo"}, "`num_thoughts` is 0"),
        ({"num_thoughts_eval": 0}, "`num_thoughts_eval` is 0"),
        ({"max_thought_length": 0}, "`max_thought_length` is 0"),
        ({"estimator": "iwae"}, "need one of"),
        ({"thought_delimiter": "\n"}, "only whitespace"),
        ({"retrodictor_learning_rate": 0.0}, "`retrodictor_learning_rate` is 0.0"),
        ({"retrodictor_warmup_steps": "many"}, "need 'auto' or a whole number"),
        ({"estimator": "prior", "retrodictor_warmup_steps": 5}, "has no retrodictor"),
        ({"packing": True}, "`packing` is True"),
        ({"loss_reduction": "token"}, "no bound on log p"),
        ({"remove_unused_columns": True}, "travel with their rows"),
        ({"fp16": True}, "bf16 or fp32"),
        ({"neftune_noise_alpha": 5}, "noise"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "schedule over steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        worlds.settings(tmp_path, **changes)


def test_defaults_are_those_of_the_contract(tmp_path):
    args = LatentRetrodictiveConfig(str(tmp_path))
    assert (args.num_thoughts, args.num_thoughts_eval, args.max_thought_length) == (8, 64, 256)
    assert (args.estimator, args.thought_delimiter, args.retrodictor_learning_rate) == ("rws", None, None)
    assert (args.retrodictor_warmup_steps, args.hub_private_repo) == ("auto", True)


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"thought": [["a"]] * 8}, TypeError, r"column `thought`: 8 of 8 rows \(row 0, 1, 2, 3, 4\) hold no text"),
        ({"completion": ["a"] * 7 + [" "]}, ValueError, r"row 7"),
        ({"completion": ["a"] * 7 + [None]}, ValueError, r"row 7"),
    ],
)
def test_bad_rows_fail_before_a_model_loads(tmp_path, columns, error, words):
    start = time.monotonic()
    with pytest.raises(error, match=words):
        worlds.make(tmp_path, tmp_path / "no model", worlds.rows(**columns))
    assert time.monotonic() - start < 5


def test_thoughts_that_the_law_forbids_are_refused_by_row(world, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 8 rows \(row 2\) have thoughts longer than `max_thought_length`=3"):
        worlds.make(tmp_path, world, worlds.rows(thought=[None, "", "a a a a"] + [None] * 5))
    with pytest.raises(ValueError, match=r"row 1\) have thoughts holding the delimiter"):
        worlds.make(tmp_path, world, worlds.rows(thought=["a", "b f"] + [None] * 6), thought_delimiter="f e")


def test_rows_longer_than_the_model_are_refused_by_row(world, tmp_path):
    questions = ["a b"] * 7 + ["a " * 30]
    with pytest.raises(ValueError, match=r"1 of 8 rows \(row 7\) need up to 67 positions"):
        worlds.make(tmp_path, world, worlds.rows(prompt=questions))
    # Without a retrodictor the question is read once.
    worlds.make(tmp_path, world, worlds.rows(prompt=questions), estimator="prior")
    with pytest.raises(ValueError, match="no question leaves room"):
        worlds.make(tmp_path, world, max_length=2)


def test_a_model_with_a_retrodictor_is_refused(world, tmp_path):
    trainer = worlds.make(tmp_path, world)
    with pytest.raises(ValueError, match="already carries an adapter 'retrodictor'"):
        type(trainer)(model=trainer.model, args=worlds.settings(tmp_path), train_dataset=worlds.rows())


def test_conversations_are_rendered_through_their_template(tiny_chat_model_dir, tmp_path):
    """A closing tag as the delimiter; the question stands twice before the retrodictor, once before the imitator."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Item {i}:"}],
            "completion": [{"role": "assistant", "content": "abc"}],
            "thought": None if i else "hm",
        }
        for i in range(4)
    ]
    trainer = worlds.make(
        tmp_path, tiny_chat_model_dir, Dataset.from_list(rows), thought_delimiter="|", max_steps=1, num_thoughts=2
    )
    tokenizer, row = trainer.processing_class, trainer.train_dataset[1]
    question = "<|im_start|>user\nItem 1:<|im_end|>\n<|im_start|>assistant\n"
    stored = worlds.Rendered(row["prompt_ids"], row["answer_ids"], row["ended"])
    assert tokenizer.decode(trainer.thinkers.opened(stored)) == question
    assert tokenizer.decode(trainer.thinkers.in_hindsight(stored)) == f"{question}abc<|im_end|>{question}"
    markers = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|pad|>", "<|endoftext|>", "|"])
    assert not trainer.thinkers.law.is_ordinary[markers].any()
    worlds.train(trainer)
