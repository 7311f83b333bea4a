"""Bad input is refused in words before a model step, odd but allowed input trains, and no row is ever printed."""

import math
import time
import traceback

import pytest
import torch
from datasets import Dataset, Features, Json
from tiny_runs import chat_rows, imitator_weights, load, logged, make, rows, run, same, train
from transformers import AutoTokenizer

from hf_imitate import AdversarialTrainer, Distinguisher
from hf_imitate.trainers.adversarial_rewards import check_paid, check_scores

SECRET = "violet-marmalade"  # in a failing run: in the questions, the answers and a column of its own


def is_short(prompts, completions, **columns):
    return [len(text) < 3 for text in completions]


def is_wanted(prompts, completions, **columns):
    return [text == "abc" for text in completions]


def named(name, function):
    function.__name__ = name
    return function


def returning(value, name="odd"):
    """A check or reward that returns what `value` makes of the questions."""
    return named(name, lambda prompts, **columns: value(prompts))


def fails(prompts, **columns):
    raise KeyError(prompts[0])


# --- refused


def with_row(column, value, index=3):
    """Good rows, one of which has this value in a column."""
    good = rows(16)
    values = [value if i == index else old for i, old in enumerate(good[column])]
    return good.remove_columns(column).add_column(column, values)


def json_row(column, value):
    """The same in columns of any JSON value, as a JSON-lines file of mixed rows loads."""
    columns = {name: list(rows(16)[name]) for name in ("prompt", "completion")}
    columns[column][3] = value
    return Dataset.from_dict(columns, features=Features({"prompt": Json(), "completion": Json()}))


def chat_row(column, value):
    """Good conversations, one of which has these messages."""
    return Dataset.from_list([{**row, column: value} if i == 3 else row for i, row in enumerate(chat_rows(16))])


def data(dataset, **settings):
    return {"dataset": dataset, **settings}


def checks(*functions):
    return {"arguments": {"checks": list(functions)}}


def rewards(*functions, **settings):
    return {"arguments": {"reward_funcs": list(functions)}, **settings}


# Name, what is given, the error, words of its message; before any model is loaded.
BAD_BEFORE_A_MODEL = {
    "all questions empty": (data(rows(16).map(lambda row: {"prompt": ""})), ValueError, "`prompt`: 16 of 16 rows"),
    "one question empty": (data(with_row("prompt", "")), ValueError, "`prompt`: 1 of 16 rows (row 3) dataset.filter"),
    "answer empty": (
        data(with_row("completion", "")),
        ValueError,
        "`completion`: 1 of 16 rows (row 3) empty",
    ),
    "answer blank": (data(with_row("completion", " \n\t")), ValueError, "`completion`: (row 3) whitespace"),
    "question None": (data(with_row("prompt", None)), TypeError, "`prompt`: (row 3) None dataset.filter"),
    "questions int": (data(rows(16).map(lambda row, i: {"prompt": i}, with_indices=True)), TypeError, "`prompt` int"),
    "question int": (data(json_row("prompt", 7)), TypeError, "`prompt`: 1 of 16 rows (row 3) hold int dataset.map"),
    "answer int": (data(json_row("completion", 7)), TypeError, "`completion`: 1 of 16 rows (row 3) hold int"),
    "answer None": (data(with_row("completion", None)), ValueError, "(row 3) allow_unlabelled=True"),
    "no answer at all": (
        data(rows(16).remove_columns("completion").add_column("completion", [None] * 16), allow_unlabelled=True),
        ValueError,
        "`completion`: all 16 rows are None",
    ),
    "no prompt column": (data(rows(16).rename_column("prompt", "q")), ValueError, "no column `prompt` ['q',"),
    "no completion column": (data(rows(16).remove_columns("completion")), ValueError, "no column `completion`"),
    "no rows": (data(rows(16).select([])), ValueError, "0 rows"),
    "fewer rows than questions": (data(rows(1)), ValueError, "1 rows 2 different (`generation_batch_size`=8 over"),
    "num_generations no divisor": ({"num_generations": 3}, ValueError, "divisible by num_generations (3)"),
    "num_generations 1": ({"num_generations": 1}, ValueError, "at least 2 generations"),
    "a list": ({"arguments": {"train_dataset": [{"prompt": "q"}]}}, TypeError, "list Dataset.from_list"),
    "a stream": (data(rows(16).to_iterable_dataset()), ValueError, "IterableDataset Materialise"),
    "an evaluation stream": (
        {"arguments": {"eval_dataset": rows(8).to_iterable_dataset()}},
        ValueError,
        "`eval_dataset` IterableDataset Materialise",
    ),
    "an empty evaluation answer": (
        {"arguments": {"eval_dataset": with_row("completion", " ")}},
        ValueError,
        "`eval_dataset` column `completion`: (row 3)",
    ),
    "NUL": (data(with_row("completion", "a\0b")), ValueError, "`completion`: (row 3) NUL"),
    "text beside messages": (data(chat_row("completion", None)), ValueError, "(row 3) None"),
    "a tool's answer": (
        data(chat_row("completion", [{"role": "tool", "content": "x"}])),
        ValueError,
        "(row 3) 'assistant' or 'user'",
    ),
    "two answers": (
        data(chat_row("completion", [{"role": "assistant", "content": "x"}] * 2)),
        ValueError,
        "(row 3) exactly one message",
    ),
    "no content": (data(chat_row("prompt", [{"role": "user", "content": None}])), ValueError, "`prompt`: (row 3)"),
    "weight negative": (data(rows(16, weight=[1.0] * 15 + [-1.0])), ValueError, "`weight`: 1 of 16 rows (row 15)"),
    "weight NaN": (data(rows(16, weight=[math.nan] * 16)), ValueError, "`weight`: 16 of 16 rows finite"),
    "weight text": (data(rows(16, weight=["1"] * 16)), TypeError, "`weight`: 16 of 16 rows numbers"),
    "weights all 0": (data(rows(16, weight=[0.0] * 16)), ValueError, "`weight`: all 16 weights are 0"),
    "a column of ours": (data(rows(16, completion_ids=[0] * 16)), ValueError, "['completion_ids'] rename_column"),
    "all answers held out": (data(rows(4), heldout_fraction=0.9), ValueError, "`heldout_fraction`=0.9 all 4"),
    "learning rate 0": ({"learning_rate": 0.0}, ValueError, "`learning_rate` is 0.0 positive"),
    "learning rate NaN": ({"learning_rate": math.nan}, ValueError, "`learning_rate` is nan positive"),
    "tempered": ({"temperature": 0.7}, ValueError, "`temperature` is 0.7"),
    "no room": ({"max_completion_length": 0}, ValueError, "`max_completion_length` is 0"),
    "a check raises": (checks(fails), RuntimeError, "check 'fails' raised KeyError on 4 answers"),
    "a check with few arguments": (checks(named("few", lambda prompts: [])), RuntimeError, "'few' TypeError column"),
    "a check returns too few": (checks(returning(lambda c: [1.0])), ValueError, "'odd' a list of 4 outcomes; got 1"),
    "a check returns nothing": (checks(returning(lambda c: None)), ValueError, "'odd' a list of 4 got a NoneType"),
    "a check returns NaN": (checks(returning(lambda c: [math.nan] * 4)), ValueError, "'odd' nan Return None"),
    "a check returns text": (checks(returning(lambda c: c)), TypeError, "'odd' returned a str for answer 0"),
    "a check returns 2": (checks(returning(lambda c: [2] * 4)), ValueError, "'odd' returned 2.0 [0, 1]"),
    "a check without a name": (checks(lambda completions, **columns: [1.0]), ValueError, "name of its own"),
    "checks of one name": (checks(is_short, is_short), ValueError, "['is_short'] Rename"),
    "no check": (checks("is_short"), TypeError, "callable; got str"),
    "no reward": (rewards(3), TypeError, "`reward_funcs` is a int"),
    "a reward of our name": (rewards(returning(list, "distinguisher")), ValueError, "'distinguisher' Rename"),
    "a weight too many": (
        rewards(fails, reward_weights=[1.0, 1.0]),
        ValueError,
        "`reward_weights` 2 values for 1",
    ),
    "a weight that is NaN": (rewards(fails, reward_weights=[math.nan]), ValueError, "`reward_weights` [0] finite"),
}


@pytest.mark.parametrize("name", BAD_BEFORE_A_MODEL)
def test_bad_input_is_named_within_a_second_and_before_a_model_loads(tmp_path, name):
    given, error, words = BAD_BEFORE_A_MODEL[name]
    given = {"dataset": rows(16), **given}
    started = time.process_time()
    with pytest.raises(error) as raised:
        make(tmp_path, "no/such-model", **given)
    assert time.process_time() - started < 1
    missing = [word for word in words.split() if word not in str(raised.value)]
    assert missing == []


def tokens(tiny_model_dir, eos=True, pad=True):
    """The tiny model, with or without its end token and its pad."""
    model, tokenizer = load(tiny_model_dir), AutoTokenizer.from_pretrained(str(tiny_model_dir))
    if not eos:
        tokenizer.eos_token = model.config.eos_token_id = model.generation_config.eos_token_id = None
    if not pad:
        tokenizer.pad_token = None
    return {"model": model, "arguments": {"processing_class": tokenizer}}


# What only the model's tokenizer or its size can tell.
BAD_FOR_A_MODEL = {
    "question too long": (lambda _: data(with_row("prompt", "x" * 600)), "`train_dataset` column 'prompt', rows [3]"),
    "unlabelled question too long": (
        lambda _: data(
            Dataset.from_list([*rows(15), {"prompt": "x" * 600, "completion": None}]), allow_unlabelled=True
        ),
        "1 of 16 questions rows [15] 512 positions lower `max_completion_length`",
    ),
    "evaluation question too long": (
        lambda _: {"arguments": {"eval_dataset": with_row("prompt", "x" * 600)}},
        "`eval_dataset` column 'prompt', rows [3]",
    ),
    "no room for the longest answer": (
        lambda _: {"max_completion_length": 510},
        "16 of 16 rows [0, 1,",
    ),
    "no end token": (lambda path: tokens(path, eos=False), "no end token `tokenizer.eos_token`"),
    "no end token and no pad": (
        lambda path: tokens(path, eos=False, pad=False),
        "no end token `tokenizer.eos_token`",
    ),
    "no chat template": (lambda _: data(chat_rows(16)), "no chat template `processing_class`"),
}


@pytest.mark.parametrize("name", BAD_FOR_A_MODEL)
def test_input_that_does_not_fit_the_model_is_named_in_the_constructor_within_a_second(tmp_path, tiny_model_dir, name):
    make_input, words = BAD_FOR_A_MODEL[name]
    given = {"model": tiny_model_dir, "dataset": rows(16), **make_input(tiny_model_dir)}
    started = time.process_time()
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the words are checked below
        make(tmp_path, **given)
    assert time.process_time() - started < 1
    assert [word for word in words.split() if word not in str(raised.value)] == []


# --- while it trains


def only_on(side, value):
    """A check that is fine for human answers, on which it is tried, and then is not."""

    def check(prompts, completions, completion_ids=None, **columns):
        return [1.0] * len(prompts) if completion_ids is None else value(prompts)

    return named(side, check)


async def slow(prompts, **columns):
    raise KeyError(prompts[0])


# What is given, the error, words of its message; in the first generation batch.
BAD_RETURNS = {
    "check raises": (
        checks(only_on("late", fails)),
        RuntimeError,
        "check 'late' KeyError test_adversarial_inputs",
    ),
    "check returns text": (checks(only_on("late", list)), TypeError, "'late' returned a str"),
    "check returns too many": (checks(only_on("late", lambda c: [1] * 9)), ValueError, "'late' 8 outcomes; got 9"),
    "reward raises": (rewards(fails), RuntimeError, "reward 'fails' raised KeyError on 8 answers"),
    "async reward raises": (rewards(slow), RuntimeError, "reward 'slow' raised KeyError on 8 answers"),
    "reward returns text": (rewards(returning(list)), TypeError, "'odd' returned a str for answer 0"),
    "reward returns too few": (rewards(returning(lambda c: [1.0])), ValueError, "'odd' 8 numbers got 1"),
    "reward returns nothing": (rewards(returning(lambda c: None)), TypeError, "'odd' 8 numbers; got a NoneType"),
    "reward returns NaN": (rewards(returning(lambda c: [math.nan] * 8)), ValueError, "'odd' returned nan Return None"),
    "reward returns inf": (
        rewards(returning(lambda c: [math.inf] * 8)),
        ValueError,
        "'odd' returned inf answer 0",
    ),
    "reward overflows fp32": (rewards(returning(lambda c: [1e39] * 8)), FloatingPointError, "step 0 ['odd'] 8 of 8"),
    "rate diverges": (
        {"learning_rate": 1e30, "distinguisher_learning_rate": 1e-4},
        FloatingPointError,
        "imitator's loss step 1 (game) lora_ Lower `learning_rate`",
    ),
    "warm-up rate diverges": (
        {"imitator_warmup_learning_rate": 1e30, "imitator_warmup_steps": 3},
        FloatingPointError,
        "imitator's loss step 1 (imitator_warmup) `imitator_warmup_learning_rate`",
    ),
    "distinguisher's rate diverges": (
        {"distinguisher_learning_rate": 1e30},
        FloatingPointError,
        "step 1 distinguisher's loss Lower `distinguisher_learning_rate`",
    ),
}


def private(dataset=None):
    """Rows that hold the marker everywhere, more than one of them, some cut and some held out twice."""
    number = 16
    questions = [f"{SECRET} {i // 2}:" for i in range(number)]
    return Dataset.from_dict({"prompt": questions, "completion": [SECRET] * number, "note": [SECRET] * number})


@pytest.fixture
def printed(capfd, caplog, recwarn):
    """Everything that a run has printed, logged and warned of so far."""

    def everything():
        out, err = capfd.readouterr()
        return "\n".join([out, err, caplog.text, *(str(warning.message) for warning in recwarn)])

    with caplog.at_level("DEBUG"):
        yield everything


@pytest.mark.parametrize("name", BAD_RETURNS)
def test_what_fails_in_training_is_named_and_prints_no_row(tmp_path, tiny_model_dir, printed, name):
    given, error, words = BAD_RETURNS[name]
    trainer = make(tmp_path, tiny_model_dir, private(), **{"max_steps": 3, **given})
    with pytest.raises(error) as raised:
        trainer.train()
    assert [word for word in words.split() if word not in str(raised.value)] == []
    assert SECRET not in printed() + "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("name", BAD_BEFORE_A_MODEL)
def test_errors_before_training_quote_no_row(tmp_path, name, printed):
    given, _, _ = BAD_BEFORE_A_MODEL[name]

    def marked(value):
        if isinstance(value, list):
            return [{**message, "content": marked(message["content"])} for message in value]
        return value + SECRET if isinstance(value, str) and value.strip() else value

    dataset = given.get("dataset", rows(16))
    if isinstance(dataset, Dataset) and len(dataset):
        columns = {name: [marked(value) for value in dataset[name]] for name in dataset.column_names}
        dataset = Dataset.from_dict(columns, features=dataset.features)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        make(tmp_path, "no/such-model", **{**given, "dataset": dataset})
    assert SECRET not in printed() + "".join(traceback.format_exception(raised.value))


def test_a_run_whose_rewards_are_all_none_prints_no_row(tmp_path, tiny_model_dir, printed):
    """TRL prints a whole row where no reward applies to it; the distinguisher's always does."""
    nothing = returning(lambda prompts: [None] * len(prompts))
    trainer = make(
        tmp_path,
        tiny_model_dir,
        private(),
        truncated_answers="drop",
        imitator_warmup_steps=1,
        distinguisher_warmup_steps=1,
        arguments={"reward_funcs": nothing, "checks": [nothing], "eval_dataset": private()},
    )
    trainer.train()
    trainer.evaluate()
    assert SECRET not in printed()
    assert len(logged(trainer, "loss")) == 4


# --- allowed


def test_rewards_that_are_none_do_not_apply_and_the_others_count(tmp_path, tiny_model_dir):
    half = returning(lambda prompts: [None if i % 2 else 1.0 for i in range(len(prompts))])
    trainer = run(tmp_path, tiny_model_dir, arguments={"reward_funcs": half}, max_steps=1)
    assert logged(trainer, "rewards/odd/mean") == [1.0]
    assert math.isfinite(logged(trainer, "loss")[0])


def test_a_check_that_never_applies_stays_at_weight_zero(tmp_path, tiny_model_dir):
    never = returning(lambda prompts: [None] * len(prompts), "never")
    trainer = run(tmp_path, tiny_model_dir, arguments={"checks": [never]})
    assert logged(trainer, "checks/never/weight") == [0.0, 0.0]
    assert logged(trainer, "checks/never/human") == []
    assert all(math.isfinite(loss) for loss in logged(trainer, "distinguisher/loss"))


def test_scores_that_are_not_finite_are_an_error_and_a_dropped_answer_is_none():
    paid = torch.tensor([[0.5, math.nan], [math.nan, 1.0]])
    check_paid(paid, ["distinguisher", "mine"])
    with pytest.raises(FloatingPointError, match=r"\['mine'\] of 1 of 1 answers"):
        check_paid(torch.tensor([[0.5, math.inf]]), ["distinguisher", "mine"])

    human, has_human = torch.tensor([[1.0, math.nan]]), torch.tensor([[True, False]])
    check_scores(torch.tensor([[0.5, 2.0]]), human, has_human)
    for score in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="logits of 1 of 2 pairs"):
            check_scores(torch.tensor([[0.5, score]]), human, has_human)
    with pytest.raises(FloatingPointError, match="logits of 1 of 2 pairs"):
        check_scores(torch.tensor([[0.5, 2.0]]), human, ~torch.tensor([[False, False]]))


@pytest.mark.parametrize("settings", [{}, {"truncated_answers": "drop"}])
def test_a_broken_distinguisher_is_named_in_evaluation_too(tmp_path, tiny_model_dir, settings):
    trainer = make(tmp_path, tiny_model_dir, arguments={"eval_dataset": rows(4)}, **settings)
    trainer.distinguisher.head.weight.data.fill_(math.nan)

    with pytest.raises(FloatingPointError, match="distinguisher's logits"):
        trainer.evaluate()


def test_other_rows_are_checked_before_they_are_evaluated(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir)

    with pytest.raises(ValueError, match="completion"):
        trainer.evaluate(rows(4).remove_columns("completion"))
    with pytest.raises(TypeError, match="list"):
        trainer.evaluate([{"prompt": "q", "completion": "a"}])


def test_a_single_check_needs_no_list_and_a_column_may_be_called_checks(tmp_path, tiny_model_dir):
    def has_its_column(prompts, completions, checks=None, **columns):
        return [isinstance(number, int) for number in checks]

    dataset = rows(16).add_column("checks", list(range(16)))
    trainer = run(tmp_path, tiny_model_dir, dataset, arguments={"checks": has_its_column}, max_steps=1)

    assert logged(trainer, "checks/has_its_column/human") == [1.0]


class Copying(AdversarialTrainer):
    """Its imitator says the human's own words."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        humans = [row.rendered for row in self.likelihood.rows.rows.values()]
        by_question = {tuple(human.prompt_ids): human.answer_ids for human in humans}
        return [list(by_question[tuple(ids)]) for ids in prompt_ids], None


def test_where_human_and_imitator_say_the_same_nobody_wins_and_nothing_is_paid(tmp_path, tiny_model_dir):
    trainer = make(
        tmp_path, tiny_model_dir, kind=Copying, distinguisher_warmup_steps=1, retrodictive_coef=0.0, max_steps=3
    )
    before = imitator_weights(trainer)
    train(trainer)
    # Equal texts in batches of other shapes differ by rounding; the first batch has none.
    assert logged(trainer, "distinguisher/accuracy_fresh")[0] == 0.5
    assert logged(trainer, "distinguisher/margin") == pytest.approx([0.0] * 4, abs=1e-6)
    assert logged(trainer, "distinguisher/loss") == pytest.approx([math.log(2)] * 4, abs=1e-3)
    after = imitator_weights(trainer)
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 1e-8  # a step is 1e-3


def test_answers_that_are_all_alike_train_with_finite_numbers(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, rows(answers=("abc",)), distinguisher_warmup_steps=1)
    for name in ("loss", "distinguisher/loss", "distinguisher/accuracy_fresh", "retrodiction/bits_per_answer"):
        assert all(math.isfinite(value) for value in logged(trainer, name))


def test_one_row_is_enough_for_one_question(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, rows(1), heldout_fraction=0.0, per_device_train_batch_size=4)
    assert len(logged(trainer, "loss")) == 2


ODD_TEXTS = {
    "special tokens": "a<|endoftext|>b<|im_end|>",
    "right to left": "\u05d0\u05d1 \u0627\u0628 \u202eabc",
    "an emoji of many code points": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "a line of a megabyte": "b" * 2**20,
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_text_is_read_back_as_it_was_written(tmp_path, tiny_model_dir, name):
    text = ODD_TEXTS[name]
    dataset = with_row("completion", text)
    trainer = run(tmp_path, tiny_model_dir, dataset, max_completion_length=128, max_steps=1)
    row = trainer.likelihood.rows.rows[3]
    assert text.startswith(row.answer.text)
    assert row.answer.ended == (len(text) < 1000) == (row.answer.text == text)
    assert trainer._tokenizer.eos_token_id not in row.rendered.answer_ids[:-1]


def test_a_tokenizer_that_pads_on_the_other_side_changes_nothing(tmp_path, tiny_model_dir):
    found = []
    for side in ("left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir), padding_side=side)
        trainer = run(tmp_path, tiny_model_dir, arguments={"processing_class": tokenizer}, max_steps=1)
        found.append(imitator_weights(trainer))
    assert same(*found)


def test_a_tokenizer_that_names_no_token_uses_the_models_end(tmp_path, tiny_model_dir):
    given = tokens(tiny_model_dir, eos=False, pad=False)
    given["model"].generation_config.eos_token_id = 0
    trainer = run(tmp_path, **given, max_steps=1)
    assert trainer.eos_token_ids == [0]
    assert trainer._tokenizer.pad_token_id == 0
    assert trainer.likelihood.rows.rows[0].rendered.answer_ids[-1] == 0


def test_checks_keep_their_weights_whatever_the_order_they_are_given_in(tiny_model_dir, tmp_path):
    """The game once ran the checks in the user's order beside weights in the stored one."""
    first = make(tmp_path, tiny_model_dir, arguments={"checks": [is_short, is_wanted]})
    train(first)
    first.save_model()
    loaded = Distinguisher.from_pretrained(first.args.output_dir, checks=[is_wanted, is_short])
    again = make(
        tmp_path / "again", tiny_model_dir, arguments={"checks": [is_wanted, is_short], "distinguisher": loaded}
    )
    assert [check.__name__ for check in again.game.checks] == list(loaded.check_names) == ["is_short", "is_wanted"]


def test_rows_of_weight_zero_are_asked_and_teach_nothing(tiny_model_dir, tmp_path):
    """Held-out rows of weight 0 once ended an automatic warm-up by a division by zero."""
    dataset = rows(weight=[0.0] * 16 + [1.0] * 16)
    trainer = make(
        tmp_path, tiny_model_dir, dataset, imitator_warmup_steps="auto", retrodictive_budget=1.0, max_steps=1
    )
    assert set(trainer.likelihood.rows.train) | set(trainer.likelihood.rows.heldout) == set(range(16, 32))
    train(trainer)
