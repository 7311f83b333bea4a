"""Every setting of RetrodictiveConfig does what it says; bad ones fail before a model loads."""

import ast
import dataclasses
import re
import warnings

import pytest
import torch
from exact_runs import ANSWERS, make, run, settings
from tiny_runs import logged, rows
from transformers import AutoTokenizer
from trl import SFTConfig

from hf_imitate import RetrodictiveConfig

OWN = tuple(f for f in dataclasses.fields(RetrodictiveConfig) if f.name in RetrodictiveConfig.__annotations__)
CHANGED = ("learning_rate", "hub_private_repo")
MACHINE = ("gradient_checkpointing", "activation_checkpointing")
TESTED: set[str] = set()


def shows(*names):
    """Register a test as the one of these settings."""

    def register(function):
        TESTED.update(names)
        return function

    return register


def test_every_setting_has_a_test():
    assert {field.name for field in OWN} == TESTED


def test_the_docstring_states_every_setting_with_its_default():
    stated = RetrodictiveConfig.__doc__.split("Parameters:")[1]
    documented = re.findall(r"^        (\w+) \((`[^)]*)\):$", stated, flags=re.MULTILINE)
    fields = {field.name: field for field in OWN if field.name not in (*CHANGED, *MACHINE)}
    assert [name for name, _ in documented] == list(fields)
    for name, kind in documented:
        default = re.search(r"defaults to `(.*)`$", kind)
        assert "*optional*" in kind, name
        assert (None if default is None else ast.literal_eval(default[1])) == fields[name].default, name


def test_the_docstring_states_every_default_that_differs_from_trl():
    note = " ".join(RetrodictiveConfig.__doc__.split("Parameters:")[0].replace(">", " ").split())
    assert "`learning_rate=2e-4`" in note
    assert "`hub_private_repo=True`" in note
    theirs = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    changed = {field.name for field in OWN if field.name in theirs and field.default != theirs[field.name]}
    assert changed - set(MACHINE) == set(CHANGED)
    assert RetrodictiveConfig.__dataclass_fields__["learning_rate"].default == 2e-4


# --- what each setting does


@shows("loss_reduction")
def test_the_loss_is_per_answer_or_per_token(tmp_path, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    (answer,) = logged(run(tmp_path, tiny_model_dir), "loss")
    (token,) = logged(run(tmp_path, tiny_model_dir, loss_reduction="token"), "loss")
    num_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in rows(8, ANSWERS)["completion"])
    assert answer * 8 == pytest.approx(token * num_tokens, rel=1e-6)
    assert answer > 3 * token


@shows("chat_template_kwargs")
def test_chat_template_kwargs_reach_the_template_and_what_is_saved(tmp_path, tiny_chat_model_dir):
    from tiny_runs import chat_rows

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir))
    tokenizer.chat_template = "{% if mood is defined %}{{ mood }}{% endif %}" + tokenizer.chat_template
    given = {"arguments": {"processing_class": tokenizer}}
    plain = make(tmp_path, tiny_chat_model_dir, chat_rows(8), **given)
    moody = make(tmp_path, tiny_chat_model_dir, chat_rows(8), chat_template_kwargs='{"mood": "calm"}', **given)
    calm = tokenizer("calm")["input_ids"]
    assert moody.train_dataset[0]["input_ids"] == calm + plain.train_dataset[0]["input_ids"]
    assert moody.imitation_facts()["chat_template_kwargs"] == {"mood": "calm"}


@shows("learning_rate")
def test_the_learning_rate_is_that_of_the_steps(tmp_path, tiny_model_dir):
    assert logged(run(tmp_path, tiny_model_dir, learning_rate=3e-3), "learning_rate") == [3e-3]


@shows("hub_private_repo")
@pytest.mark.parametrize(("given", "private"), [({}, True), ({"hub_private_repo": None}, True)])
def test_pushes_are_private_unless_false_is_said(given, private):
    assert RetrodictiveConfig("x", **given).hub_private_repo is private
    assert RetrodictiveConfig("x", hub_private_repo=False).hub_private_repo is False


@shows("gradient_checkpointing", "activation_checkpointing")
def test_on_a_cpu_there_is_neither_bf16_nor_recomputing_unless_asked_for():
    plain = RetrodictiveConfig("x", use_cpu=True)
    assert (plain.bf16, bool(plain.activation_checkpointing), plain.dataloader_pin_memory) == (False, False, False)
    assert RetrodictiveConfig("x", use_cpu=True, bf16=True).bf16
    assert RetrodictiveConfig("x", use_cpu=True, activation_checkpointing=True).activation_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = RetrodictiveConfig("x", use_cpu=True, gradient_checkpointing=True)
    assert old.gradient_checkpointing or old.activation_checkpointing


def test_with_an_accelerator_activations_are_recomputed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []

    def stop_here(config):
        seen.append((config.activation_checkpointing, config.bf16))
        raise InterruptedError

    monkeypatch.setattr(SFTConfig, "__post_init__", stop_here)
    with pytest.raises(InterruptedError):
        RetrodictiveConfig("x")
    assert seen == [(True, None)]


def test_recomputing_activations_changes_no_number(tmp_path, tiny_model_dir):
    plain, recomputed = (
        run(tmp_path, tiny_model_dir, adapter=True, max_steps=2, activation_checkpointing=on) for on in (False, True)
    )
    assert logged(recomputed, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)


@pytest.mark.parametrize("best", [{"load_best_model_at_end": True, "eval_strategy": "epoch"}, {}])
def test_the_best_checkpoint_is_by_default_the_one_with_the_fewest_bits(best):
    args = RetrodictiveConfig("x", save_strategy="epoch" if best else "best", **best)
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_retrodiction/bits_per_answer", False)
    own = RetrodictiveConfig("x", save_strategy="best", metric_for_best_model="eval_retrodiction/bits_per_byte")
    assert own.greater_is_better is False
    other = RetrodictiveConfig("x", save_strategy="best", metric_for_best_model="eval_mean_token_accuracy")
    assert other.greater_is_better is True


# --- bad settings


@pytest.mark.parametrize(
    ("settings_given", "said"),
    [
        ({"loss_reduction": "mean"}, r"`loss_reduction` is 'mean'; need one of \['answer', 'token'\]"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0; need a positive, finite number"),
        ({"loss_type": "dft"}, "`loss_type` is 'dft', which weighs a token by its own probability"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1, which mixes a uniform law"),
        ({"completion_only_loss": False}, "`completion_only_loss` is False, which scores the question, too"),
        ({"assistant_only_loss": True}, "`assistant_only_loss` is True, which scores other turns"),
        ({"average_tokens_across_devices": False}, "is False, which normalises each process by itself"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "asks for `skip_prepare_dataset`"),
        ({"max_length": 1}, "`max_length` is 1; a question and an answer take at least 2 tokens"),
        ({"packing": True, "max_length": None}, "`packing` needs to know how long a row may be"),
        ({"eval_packing": True, "max_length": None}, "`packing` needs to know how long a row may be"),
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy` is 'wrapped', which cuts answers"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "`packing_strategy` is 'bfd_split', which cuts answers"),
        ({"padding_free": True}, "`padding_free=True` without packing goes with `max_length=None` alone; it is 1024"),
    ],
)
def test_a_bad_setting_fails_in_the_config_and_says_what_to_do(settings_given, said):
    with pytest.raises(ValueError, match=said):
        RetrodictiveConfig("x", **settings_given)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_a_question_is_not_cut_away():
    with pytest.raises(ValueError, match="`truncation_mode` is 'keep_end', which cuts the question away"):
        RetrodictiveConfig("x", truncation_mode="keep_end")


def test_what_is_allowed_with_packing_is_left_to_trl(tmp_path):
    assert settings(tmp_path, packing=True).packing_strategy == "bfd"
    assert settings(tmp_path, padding_free=True, max_length=None).padding_free
    assert settings(tmp_path, padding_free=True, packing=True).padding_free


def test_the_best_of_several_evaluation_sets_has_to_be_named(tmp_path, tiny_model_dir):
    arguments = {"eval_dataset": {"short": rows(4), "long": rows(4)}}
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match=r"'eval_short_retrodiction/bits_per_answer', 'eval_long_retrodiction/bits_"):
        make(tmp_path, tiny_model_dir, arguments=arguments, **best)


@shows("force_resume")
def test_a_run_goes_on_under_another_setting_only_where_that_is_forced(tmp_path, tiny_model_dir):
    run(tmp_path, tiny_model_dir, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"`learning_rate` was .* Give what was saved"):
        make(tmp_path, tiny_model_dir, max_steps=2, learning_rate=2e-3).train(resume_from_checkpoint=True)
    forced = make(tmp_path, tiny_model_dir, max_steps=2, learning_rate=2e-3, force_resume=True)
    forced.train(resume_from_checkpoint=True)
    assert forced.state.global_step == 2
