"""Rows of the exact trainer: which tokens are an answer's, what is cut, what is refused."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from exact_runs import ANSWERS, END, make, nats_by_hand, run, scored_text, settings
from tiny_runs import chat_rows, load, logged, rows
from transformers import AutoTokenizer, GenerationConfig
from trl import SFTTrainer

from hf_imitate import Imitator, RetrodictiveTrainer
from hf_imitate.trainers.retrodictive_rows import first_tokens, settle_renderer, sums_by_row


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(str(tiny_model_dir))


def test_answers_begin_where_scored_tokens_do():
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7, -100], [-100, 3, -100, -100, -100, -100, 4]])
    expected = torch.tensor([[0, 0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1]]).bool()
    assert torch.equal(first_tokens(labels), expected)


def test_sums_by_row_know_padded_and_flattened_batches():
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    padded = sums_by_row([values, -values], torch.tensor([[0, 0, 0], [1, 1, 1]]))
    assert padded.tolist() == [[7.0, -7.0], [56.0, -56.0]]
    flat = sums_by_row([values.reshape(1, 6)], torch.tensor([[0, 0, 1, 1, 1, 2]]))
    assert flat.tolist() == [[3.0], [28.0], [32.0]]


# --- which tokens are an answer's


def test_a_conversations_answer_is_its_content_and_one_end_token(tmp_path, tiny_chat_model_dir):
    trainer = make(tmp_path, tiny_chat_model_dir, chat_rows(8))
    question = "<|im_start|>user\nItem 0:<|im_end|>\n<|im_start|>assistant\n"
    assert scored_text(trainer) == (question, "abc<|im_end|>")


def test_what_a_template_writes_before_the_answer_belongs_to_the_question(tmp_path, tiny_chat_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir))
    opening = "{% if thinking is defined %}<think></think>{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.removesuffix("{% endif %}") + opening + "{% endif %}"
    arguments = {"processing_class": tokenizer}
    kwargs = {"chat_template_kwargs": {"thinking": False}}
    trainer = make(tmp_path, tiny_chat_model_dir, chat_rows(8), arguments=arguments, **kwargs)
    before, answer = scored_text(trainer)
    assert before.endswith("<|im_start|>assistant\n<think></think>")
    assert answer == "abc<|im_end|>"


def user_rows():
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": f"Item {i}"}],
                "completion": [{"role": "user", "content": ANSWERS[i % 4]}],
            }
            for i in range(8)
        ]
    )


def test_a_users_answer_stands_in_the_users_turn_and_is_scored_so_after_loading(tmp_path, tiny_chat_model_dir):
    trainer = run(tmp_path, tiny_chat_model_dir, user_rows())
    before, answer = scored_text(trainer)
    assert before.endswith("<|im_start|>assistant\nItem 0<|im_end|>\n<|im_start|>user\n")
    assert answer == "abc<|im_end|>"
    trainer.save_model()
    imitator = Imitator.from_pretrained(tmp_path / "run")
    nats = imitator.log_prob(user_rows()["prompt"][:], [ANSWERS[i % 4] for i in range(8)]).nats
    metrics = trainer.evaluate(user_rows())
    assert metrics["eval_retrodiction/bits_per_answer"] == pytest.approx(-nats.mean().item() / math.log(2), rel=1e-5)


def test_what_closes_a_turn_ends_an_answer_where_nobody_lists_it(tiny_chat_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir), eos_token="<|endoftext|>")
    law, closing = GenerationConfig(eos_token_id=END), tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [
        settle_renderer(tokenizer, law, question, "assistant", None).end_token_ids
        for question in ("Hello", [{"role": "user", "content": "Hello"}])
    ]
    assert ends == [[END], [END, closing]]


def test_text_that_spells_an_end_token_does_not_end_an_answer(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, rows(8, ("a<|endoftext|>b",)))
    labels = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    assert labels.count(END) == 1
    assert labels[-1] == END


def test_a_column_of_the_users_called_labels_is_not_taken_for_ours(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, rows(8, labels=[[1, 2]] * 8, image=["x"] * 8))
    assert scored_text(trainer) == ("Item 0:", "abc<|endoftext|>")


# --- what is cut or left out


def test_a_cut_answer_has_no_end_is_counted_and_left_out_of_bits_but_not_of_the_loss(
    tmp_path, tiny_model_dir, tokenizer, caplog
):
    dataset = rows(8, ANSWERS)
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in dataset]
    limit = max(lengths) - 1
    is_whole = [length <= limit for length in lengths]
    assert 0 < is_whole.count(False) < 4
    with caplog.at_level(logging.WARNING):
        trainer = run(tmp_path, tiny_model_dir, dataset, max_length=limit)
    assert f"{is_whole.count(False)} of 8 answers do not fit into {limit} tokens" in caplog.text
    ends = [row["labels"][-1] == END for row in trainer.train_dataset]
    assert ends == is_whole
    model = load(tiny_model_dir)
    whole, cut = (nats_by_hand(model, tokenizer, dataset, most=most) for most in (None, limit))
    assert logged(trainer, "loss") == [pytest.approx(sum(cut) / 8, rel=1e-6)]
    kept = [nats for nats, is_kept in zip(whole, is_whole, strict=True) if is_kept]
    bits = sum(kept) / len(kept) / math.log(2)
    assert logged(trainer, "retrodiction/bits_per_answer") == [pytest.approx(bits, rel=1e-6)]
    assert trainer.imitation_facts()["dataset"]["num_truncated"] == is_whole.count(False)
    assert "training answers were cut" in " ".join(trainer.card_facts().limits)


def test_where_every_answer_is_cut_there_are_no_bits(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, rows(8, ("fghij klé",)), max_length=9)
    assert logged(trainer, "retrodiction/bits_per_answer") == []
    assert len(logged(trainer, "loss")) == 1


def test_a_question_that_leaves_no_room_is_left_out_and_counted(tmp_path, tiny_model_dir, caplog):
    dataset = rows(8, ANSWERS)
    prompts = ["A long question, and a longer one, and more of it:", *dataset["prompt"][1:]]
    dataset = dataset.remove_columns("prompt").add_column("prompt", prompts)
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, tiny_model_dir, dataset, max_length=20)
    assert "1 of 8 questions leave no room for an answer within 20 tokens" in caplog.text
    assert "longer one" not in caplog.text
    assert len(trainer.train_dataset) == 7
    with pytest.raises(
        ValueError,
        match=r"no question leaves room for an answer within 3 tokens\. The questions have 6 to 6 tokens.* Raise",
    ):
        make(tmp_path, tiny_model_dir, max_length=3)


def test_answers_longer_than_the_model_are_cut_at_its_positions(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, rows(8, ("m", "x " * 600)), max_length=None)
    assert len(trainer.train_dataset[1]["input_ids"]) == 512
    assert trainer.imitation_facts()["dataset"]["num_truncated"] == 4


def test_rows_of_weight_zero_are_left_out_and_counted(tmp_path, tiny_model_dir, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, tiny_model_dir, rows(8, ANSWERS, weight=[0.0, 1.0] * 4))
    assert "4 of 8 rows have weight 0" in caplog.text
    assert len(trainer.train_dataset) == 4


# --- rows that cannot be trained on


def without_answers():
    answers = [None, "a", None, "b", "c", "d", "e", "f"]
    return rows(8).remove_columns("completion").add_column("completion", answers)


def test_parallelism_that_cuts_answers_is_refused(tmp_path, tiny_model_dir, monkeypatch):
    cutting = SimpleNamespace(cp_enabled=True, sp_enabled=False)
    after = SFTTrainer.__init__

    def with_context_parallelism(self, *args, **kwargs):
        after(self, *args, **kwargs)
        monkeypatch.setattr(type(self.accelerator), "parallelism_config", cutting)

    monkeypatch.setattr(SFTTrainer, "__init__", with_context_parallelism)
    with pytest.raises(ValueError, match="Context and sequence parallelism cut answers into parts"):
        make(tmp_path, tiny_model_dir)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (without_answers(), r"`completion`: 2 of 8 rows \(row 0, 2\) are None"),
        (rows(8, ("abc", "")), r"`completion`: 4 of 8 rows \(row 1, 3, 5, 7\) are empty or only whitespace"),
        (
            rows(8, weight=[1.0, float("nan")] * 4),
            r"`weight`: 4 of 8 rows \(row 1, 3, 5, 7\) are negative or not finite",
        ),
        (rows(8, weight=[1.0] * 7 + [-1.0]), r"`weight`: 1 of 8 rows \(row 7\) are negative or not finite"),
        (rows(8, weight=[None] + [1.0] * 7), r"`weight`: 1 of 8 rows \(row 0\) are not numbers"),
        (rows(8, weight=[0.0] * 8), "all 8 weights are 0"),
        (rows(8).to_iterable_dataset(), "IterableDataset, whose rows cannot be checked"),
        (rows(8).remove_columns("completion"), "no column `completion`"),
        (rows(8, tools=["[]"] * 8), r"columns \['tools'\], which would change the chat template"),
        (None, "must be a `datasets.Dataset`; got NoneType"),
    ],
)
def test_bad_rows_fail_before_a_model_loads(tmp_path, dataset, said):
    with pytest.raises((ValueError, TypeError), match=said):
        RetrodictiveTrainer("no/such-model", settings(tmp_path), train_dataset=dataset)


def test_bad_evaluation_rows_fail_before_a_model_loads_and_in_evaluate(tmp_path, tiny_model_dir):
    said = r"`eval_dataset` column `completion`: 2 of 8 rows"
    with pytest.raises(ValueError, match=said):
        RetrodictiveTrainer("no/such-model", settings(tmp_path), rows(8), eval_dataset=without_answers())
    with pytest.raises(ValueError, match=said):
        make(tmp_path, tiny_model_dir).evaluate(without_answers())


def test_answers_in_another_turn_than_those_of_training_are_refused(tmp_path, tiny_chat_model_dir):
    arguments = {"eval_dataset": user_rows()}
    with pytest.raises(ValueError, match=r"8 of 8 rows .* have a role whose turn is not opened"):
        make(tmp_path, tiny_chat_model_dir, chat_rows(8), arguments=arguments)


def test_a_question_the_template_refuses_is_named_by_its_row(tmp_path, tiny_chat_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir))
    refusal = "{% if messages[0]['content'] == 'Item 5:' %}{{ raise_exception(messages[0]['content']) }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    with pytest.raises(ValueError, match="`train_dataset` column `prompt`, rows 5: ") as caught:
        make(tmp_path, tiny_chat_model_dir, chat_rows(8), arguments={"processing_class": tokenizer})
    assert "Item 5" not in str(caught.value)
