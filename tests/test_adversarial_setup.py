"""Every kind of row, model, distinguisher, check and reward trains, or is refused in words before a model loads."""

import itertools

import pytest
import torch
from datasets import DatasetDict
from launch import TESTS, in_two_processes
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_runs import (
    Watched,
    chat_rows,
    distinguisher_weights,
    imitator_weights,
    load,
    logged,
    lora,
    make,
    rows,
    run,
    same,
    settings,
    spied,
    train,
)
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer

from hf_imitate import AdversarialTrainer, Distinguisher
from hf_imitate.rendering import Answer
from hf_imitate.trainers.adversarial_setup import build_distinguisher

# --- rows


def test_held_out_answers_reach_neither_the_learner_nor_the_likelihood(tmp_path, tiny_model_dir):
    dataset = rows(answers=tuple(f"<{i}>" for i in range(32)))
    trainer = make(
        tmp_path,
        tiny_model_dir,
        dataset,
        heldout_fraction=0.5,
        max_completion_length=12,
        imitator_warmup_steps=3,
        distinguisher_warmup_steps=3,
        retrodictive_budget=1.0,
        max_steps=4,
    )
    heldout = {dataset[i]["completion"] for i in trainer.likelihood.rows.heldout.tolist()}
    with spied(trainer.game.learner, "step") as lessons, spied(trainer.likelihood, "_log_prob") as scored:
        train(trainer)
    learned = {pair.human.text for args, _ in lessons for pair in args[0]}
    likelihood = {row.answer.text for args, _ in scored for row in args[1]}
    assert len(heldout) == 16
    assert learned
    assert likelihood
    assert not heldout & (learned | likelihood)
    assert logged(trainer, "distinguisher/accuracy_heldout")


def test_small_batches_of_the_warmup_meet_held_out_answers_too(tmp_path, tiny_model_dir):
    """Batches of four hold no eighth of a row each; without held-out pairs the "auto" warm-up was cut at once."""
    trainer = make(tmp_path, tiny_model_dir, per_device_train_batch_size=4)
    asked = [trainer.game.draw_questions(number, 4) for number in range(16)]
    heldout = trainer.likelihood.rows.is_heldout
    assert [sum(row in heldout for row in batch) for batch in asked] == [0, 1] * 8
    assert {row for batch in asked for row in batch if row in heldout} == heldout


@pytest.mark.parametrize("is_chat", [False, True])
def test_our_questions_are_the_very_ids_that_trl_generates_from(
    tmp_path, tiny_model_dir, tiny_chat_model_dir, is_chat
):
    path, dataset = (tiny_chat_model_dir, chat_rows()) if is_chat else (tiny_model_dir, rows())
    trainer = make(tmp_path, path, dataset)
    prompts = [row["prompt"] for row in dataset]
    theirs, _, _ = GRPOTrainer._tokenize_prompts(trainer, prompts)
    assert trainer.renderer.prompt_ids(prompts) == [list(ids) for ids in theirs]
    assert [trainer.likelihood.rows.rows[i].rendered.prompt_ids for i in range(32)] == [list(ids) for ids in theirs]


def test_conversations_train_and_their_answers_end_with_the_turn(tmp_path, tiny_chat_model_dir):
    trainer = run(
        tmp_path,
        tiny_chat_model_dir,
        chat_rows(),
        imitator_warmup_steps=1,
        distinguisher_warmup_steps=1,
        arguments={"eval_dataset": chat_rows(8)},
    )
    answer = trainer.likelihood.rows.rows[0].rendered.answer_ids
    assert trainer._tokenizer.decode(answer) == "abc<|im_end|>"
    assert trainer.evaluate()["eval_retrodiction/bits_per_answer"] > 0


@pytest.mark.parametrize("pad", [None, "<|endoftext|>"])
def test_a_tokenizer_whose_pad_is_its_end_still_tells_ended_from_cut(tmp_path, tiny_model_dir, pad):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    tokenizer.pad_token = pad
    trainer = run(
        tmp_path,
        tiny_model_dir,
        kind=Watched,
        arguments={"processing_class": tokenizer},
        distinguisher_warmup_steps=1,
        max_steps=1,
    )
    assert trainer._tokenizer.pad_token_id == trainer._tokenizer.eos_token_id
    ended, cut = trainer.distinguisher.score(["Item 0:"] * 2, [Answer("abc", True), Answer("abc", False)])
    assert ended != cut
    assert trainer.batches[-1]["cut"].all()


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (rows().to_iterable_dataset(), ValueError, "Materialise it"),
        (DatasetDict(train=rows()), TypeError, r'dataset\["train"\]'),
        (None, TypeError, "`train_dataset` must be a `datasets.Dataset`"),
        (rows().rename_column("completion", "answer"), ValueError, "no column `completion`"),
        (
            rows().remove_columns("completion").add_column("completion", [None] * 32),
            ValueError,
            "all 32 rows are None",
        ),
        (rows(weight=[-1.0] * 32), ValueError, "column `weight`: 32 of 32 rows"),
        (rows(prompts=["x"] * 32), ValueError, r"reserved for the trainer: \['prompts'\]"),
        (rows(1), ValueError, "1 rows, and one generation batch asks 2"),
    ],
)
def test_bad_rows_are_named_before_a_model_loads(tmp_path, dataset, error, message):
    with pytest.raises(error, match=message):
        make(tmp_path, "no/such-model", arguments={"train_dataset": dataset})


def test_bad_evaluation_rows_are_named_before_a_model_loads(tmp_path):
    evaluation = {"one": rows(8), "two": rows(8).remove_columns("completion")}
    with pytest.raises(ValueError, match="`eval_dataset two` has no column `completion`"):
        make(tmp_path, "no/such-model", arguments={"eval_dataset": evaluation})


def test_holding_out_every_answer_is_an_error_before_a_model_loads(tmp_path):
    with pytest.raises(ValueError, match=r"`heldout_fraction`=0.99 holds out all 4"):
        make(tmp_path, "no/such-model", rows(4), heldout_fraction=0.99)


def test_questions_that_leave_no_room_for_an_answer_are_named_and_not_quoted(tmp_path, tiny_model_dir):
    dataset = rows().map(lambda row, i: {"prompt": "secret " * 400 if i == 7 else row["prompt"]}, with_indices=True)
    with pytest.raises(ValueError, match=r"1 of 32 questions .*rows \[7\]") as error:
        make(tmp_path, tiny_model_dir, dataset)
    assert "secret" not in str(error.value)


# --- models


@pytest.mark.parametrize("given", ["path", "model", "PeftModel", "full model"])
def test_any_kind_of_model_trains(tmp_path, tiny_model_dir, given):
    model = tiny_model_dir if given == "path" else load(tiny_model_dir)
    arguments = {} if given != "PeftModel" else {"peft_config": None}
    if given == "PeftModel":
        model = get_peft_model(model, lora())
    trainer = make(tmp_path, model, full=given == "full model", arguments=arguments, distinguisher_warmup_steps=1)
    before = imitator_weights(trainer)
    train(trainer)
    assert not same(before, imitator_weights(trainer))
    is_shared = trainer.distinguisher.model is trainer.model
    assert is_shared == (given != "full model")


@pytest.mark.parametrize("given", ["path", "model", "classifier", "Distinguisher"])
def test_any_kind_of_distinguisher_judges(tmp_path, tiny_model_dir, given):
    distinguisher = {
        "path": lambda: str(tiny_model_dir),
        "model": lambda: load(tiny_model_dir),
        "classifier": lambda: Distinguisher.from_causal_lm(str(tiny_model_dir)).model,
        "Distinguisher": lambda: Distinguisher.from_causal_lm(str(tiny_model_dir), peft_config=lora()),
    }[given]()
    trainer = make(tmp_path, tiny_model_dir, arguments={"distinguisher": distinguisher}, max_steps=1)
    before = distinguisher_weights(trainer)
    train(trainer)
    assert trainer.distinguisher.model is not trainer.model
    assert not same(before, distinguisher_weights(trainer))


def gpt2(num_positions):
    """A model of another architecture than the tiny one."""
    config = GPT2Config(vocab_size=400, n_positions=num_positions, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
    return GPT2LMHeadModel(config)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT says so of each layer of GPT-2's kind
def test_a_distinguisher_of_another_architecture_is_adapted_in_layers_of_its_own(tmp_path, tiny_model_dir):
    """GPT-2 has no `q_proj`, which is what "all-linear" had become on the imitator."""
    trainer = make(tmp_path, tiny_model_dir, arguments={"distinguisher": gpt2(64)})
    layers = {name.split(".")[-1] for name in trainer.distinguisher.model.peft_config["default"].target_modules}
    assert layers == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("several", [False, True])
def test_questions_too_long_for_the_distinguisher_are_named_before_the_first_step(tmp_path, tiny_model_dir, several):
    """The imitator reads them; the distinguisher would have ended the run with an IndexError after the warm-up."""
    dataset = rows(20).map(lambda row, i: {"prompt": row["prompt"] * (3 if i == 7 else 1)}, with_indices=True)
    distinguisher = ["ngram", gpt2(16)] if several else gpt2(16)
    with pytest.raises(
        ValueError, match=r"1 of 20 questions \(`train_dataset` column 'prompt', rows \[7\]\).*16 positions"
    ):
        make(tmp_path, tiny_model_dir, dataset, arguments={"distinguisher": distinguisher})


def test_beside_an_imitator_of_prompt_tuning_a_model_of_its_own_gets_an_adapter_that_it_reads(
    tmp_path, tiny_model_dir
):
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    arguments = {"peft_config": prompts, "distinguisher": str(tiny_model_dir)}
    trainer = make(tmp_path, tiny_model_dir, arguments=arguments)
    assert isinstance(trainer.distinguisher.model.peft_config["default"], LoraConfig)


def test_an_adapter_that_cannot_be_trained_saved_or_told_apart_is_an_error(tmp_path, tiny_model_dir):
    saved = get_peft_model(load(tiny_model_dir), lora())
    saved.save_pretrained(str(tmp_path / "adapter"))
    frozen = PeftModel.from_pretrained(load(tiny_model_dir), str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="is_trainable=True"):
        make(tmp_path, frozen, arguments={"peft_config": None})
    other = get_peft_model(load(tiny_model_dir), lora(), adapter_name="mine")
    with pytest.raises(ValueError, match="active adapter is 'mine'"):
        make(tmp_path, other, arguments={"peft_config": None})
    used = make(tmp_path, tiny_model_dir).model
    with pytest.raises(ValueError, match="already carries an adapter 'distinguisher'"):
        make(tmp_path, used, arguments={"peft_config": None})


def test_a_quantization_config_reaches_the_loading_of_the_model(tmp_path, tiny_model_dir, monkeypatch):
    """bitsandbytes needs a GPU, so TRL's loading is replaced by one that notes what it is asked for."""
    asked = {}

    def loading(path, **kwargs):
        asked.update(kwargs, path=path)
        return load(tiny_model_dir)

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", loading)
    config = object()
    make(tmp_path, tiny_model_dir, arguments={"quantization_config": config})
    assert asked["quantization_config"] is config
    assert asked["path"] == str(tiny_model_dir)
    assert asked["trust_remote_code"] is False


def test_without_settings_the_run_is_named_after_the_model(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load(tiny_model_dir)
    model.config.max_position_embeddings = 1024  # the default leaves room for 512 tokens of answer
    trainer = AdversarialTrainer(model, train_dataset=rows(), peft_config=lora())
    assert trainer.args.output_dir == f"{tiny_model_dir.name}-imitator"
    assert trainer.args.distinguisher_loss == "bradley_terry"


def test_an_optimizer_of_the_users_own_follows_the_phases(tmp_path, tiny_model_dir):
    model = load(tiny_model_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = run(
        tmp_path,
        model,
        full=True,
        arguments={"optimizers": (optimizer, None)},
        imitator_warmup_steps=1,
        imitator_warmup_learning_rate=0.02,
        distinguisher_warmup_steps=1,
    )
    rates = logged(trainer, "learning_rate")
    assert rates == pytest.approx([0.002, 0.0, 0.5, 0.5])  # a tenth of the warm-up's rate in its first of ten steps


def test_training_twice_keeps_the_users_schedule_over_the_game(tmp_path, tiny_model_dir):
    model = load(tiny_model_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trainer = make(tmp_path, model, full=True, arguments={"optimizers": (optimizer, schedule)})
    train(trainer)
    first = logged(trainer, "learning_rate")
    train(trainer)
    assert first == pytest.approx([0.5, 0.25])
    assert logged(trainer, "learning_rate")[0] == pytest.approx(0.5 / 3)  # the user's own schedule goes on


# --- checks and rewards


def test_the_weight_of_a_check_that_only_humans_pass_grows_and_pays_who_passes_it(tmp_path, tiny_model_dir):
    def is_short(completions, completion_ids, **columns):
        return [len(text) < 4 for text in completions]

    trainer = run(tmp_path, tiny_model_dir, arguments={"checks": [is_short]}, distinguisher_warmup_steps=4)
    learned = logged(trainer, "checks/is_short/weight")
    assert len(learned) == 6
    assert all(before < after for before, after in itertools.pairwise(learned))
    assert trainer.distinguisher.check_weights.item() >= learned[-1]


def test_rewards_of_the_users_own_are_weighted_beside_the_distinguishers(tmp_path, tiny_model_dir):
    def number_of_vowels(completions, **kwargs):
        return [float(sum(c in "aeiou" for c in text)) + i % 3 for i, text in enumerate(completions)]

    config = settings(tmp_path, reward_weights=[0.25], max_steps=1)
    trainer = Watched(str(tiny_model_dir), config, rows(), reward_funcs=number_of_vowels, peft_config=lora())
    assert config.reward_weights == [0.25]
    train(trainer)
    batch = trainer.batches[0]
    paid, own = (batch["rewards"][:, i].view(-1, 4) for i in (0, 1))
    expected = paid + 0.25 * (own - own.mean(dim=1, keepdim=True))
    torch.testing.assert_close(batch["advantages"].view(-1, 4), expected, atol=1e-5, rtol=0)
    again = make(tmp_path, tiny_model_dir, arguments={"reward_funcs": [number_of_vowels]}, reward_weights=[2.0])
    assert again.reward_weights.tolist() == [1.0, 2.0]


def test_wrong_weights_and_a_reward_by_the_distinguishers_name_are_errors_before_a_model_loads(tmp_path):
    def fine(completions, **kwargs):
        return [0.0] * len(completions)

    def distinguisher(completions, **kwargs):
        return [0.0] * len(completions)

    for number in (0, 2):
        with pytest.raises(ValueError, match=rf"`reward_weights` has {number} values for 1 functions"):
            make(tmp_path, "no/model", arguments={"reward_funcs": [fine]}, reward_weights=[1.0] * number)
    with pytest.raises(ValueError, match="called 'distinguisher'"):
        make(tmp_path, "no/model", arguments={"reward_funcs": distinguisher})


def test_a_distinguisher_is_a_reward_of_plain_grpo(tmp_path, tiny_model_dir):
    trained = run(tmp_path, tiny_model_dir, distinguisher_warmup_steps=2, max_steps=1)
    trained.save_model(str(tmp_path / "saved"))
    plain = GRPOConfig(
        output_dir=str(tmp_path / "plain"),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    reward = Distinguisher.from_pretrained(str(tmp_path / "saved"))
    trainer = GRPOTrainer(str(tiny_model_dir), reward_funcs=reward, args=plain, train_dataset=rows())
    train(trainer)
    prompts, completions = list(trainer._logs["prompt"]), list(trainer._logs["completion"])
    got = list(trainer._logs["rewards"]["distinguisher"])
    expected = reward.score(prompts, [Answer(text, False) for text in completions]).tolist()
    assert got == pytest.approx(expected, abs=1e-5)


# --- processes


def test_building_a_distinguisher_leaves_the_random_state_to_the_process(tmp_path, tiny_model_dir):
    """TRL seeds every process differently; a common seed after it made them all sample the same answers."""
    trainer = make(tmp_path, tiny_model_dir)
    trainer.model.delete_adapter("distinguisher")
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    build_distinguisher(None, trainer.model, trainer.renderer, trainer.args, [], lora(), None, trainer.engine)
    assert torch.equal(torch.get_rng_state(), before)


PROGRAM = """
import sys
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from tiny_runs import Watched, distinguisher_weights, imitator_weights, lora, make, rows, train
from pathlib import Path
from hf_imitate import Distinguisher

answers = [("abc" if i % 8 == 0 else None) for i in range(32)]
dataset = rows().remove_columns("completion").add_column("completion", answers)
trainer = make(Path({folder!r}), Path({model!r}), dataset, kind=Watched, allow_unlabelled=True, heldout_fraction=0.25,
               imitator_warmup_steps=1, distinguisher_warmup_steps=2, per_device_train_batch_size=2, max_steps=3,
               use_cpu=True, arguments={{"eval_dataset": dataset.select(range(8))}}, per_device_eval_batch_size=2)
start = torch.get_rng_state()
train(trainer)
trainer.evaluate()
rank = trainer.accelerator.process_index
# Each process makes a distinguisher of its own; the first one's holds.
given = Distinguisher.from_causal_lm({model!r}, peft_config=lora(), seed=rank)
other = make(Path({folder!r}), Path({model!r}), dataset, allow_unlabelled=True, use_cpu=True,
             per_device_train_batch_size=2, arguments={{"distinguisher": given}}, max_steps=1)
found = {{"start": start, "batches": trainer.batches, "imitator": imitator_weights(trainer),
         "distinguisher": distinguisher_weights(trainer), "other": distinguisher_weights(other)}}
torch.save(found, {folder!r} + f"/rank{{rank}}.pt")
"""


@pytest.mark.slow
def test_two_processes_keep_one_distinguisher_though_most_questions_are_unlabelled(tmp_path, tiny_model_dir):
    in_two_processes(PROGRAM.format(tests=str(TESTS), folder=str(tmp_path), model=str(tiny_model_dir)), tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(one["distinguisher"], two["distinguisher"])
    assert same(one["imitator"], two["imitator"])
    assert same(one["other"], two["other"])
    assert not torch.equal(one["start"], two["start"])
    # A question's four generations lie on both processes; what is paid is centred over all of them.
    game = [batch for batch in one["batches"] if "advantages" in batch][2:5]
    others = [batch for batch in two["batches"] if "advantages" in batch][2:5]
    for mine, theirs in zip(game, others, strict=True):
        assert torch.equal(mine["rewards"], theirs["rewards"])
        scores = torch.cat([mine["imitator"], theirs["imitator"]])
        expected = scores - (scores.sum() - scores) / 3
        torch.testing.assert_close(mine["rewards"][:, 0], expected, atol=1e-5, rtol=0)
        assert torch.cat([mine["row"], theirs["row"]]).unique().numel() == 1
