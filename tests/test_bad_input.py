"""One table of rows nobody can learn from, before every trainer and the audit: each is refused by name before a model
loads, in well under a second, and no message shows what stands in a row."""

import math
import time
import traceback

import exact_runs
import latent_worlds
import pyarrow as pa
import pytest
import tiny_runs
from datasets import Dataset, DatasetDict, Features, Json
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_imitate import AdversarialTrainer, Imitator, LatentRetrodictiveTrainer, RetrodictiveTrainer, audit
from hf_imitate.trainers import adversarial_config, latent_retrodictive_config, settings_checks

SECRET = "violet-marmalade"
NUM_ROWS = 40
NO_MODEL = "no/such-model"


def adversarial(folder, model, dataset, **arguments):
    return AdversarialTrainer(model=model, args=tiny_runs.settings(folder), train_dataset=dataset, **arguments)


def retrodictive(folder, model, dataset, **arguments):
    return RetrodictiveTrainer(model, exact_runs.settings(folder), dataset, **arguments)


def latent(folder, model, dataset, **arguments):
    return LatentRetrodictiveTrainer(model, latent_worlds.settings(folder), dataset, **arguments)


def audited(folder, model, dataset, processing_class=None):
    model = model if processing_class is None else Imitator(model, processing_class)
    law = {"max_new_tokens": 6}
    return audit(model, dataset, judges=["surface"], generation_config=law, output_dir=None, progress=False)


SURFACES = [adversarial, retrodictive, latent, audited]


def columns(**given):
    """Good rows that hold the marker everywhere, but for the columns that are given."""
    texts = {name: [f"{SECRET} {i}" for i in range(NUM_ROWS)] for name in ("prompt", "completion")}
    return {**texts, **given}


def rows(**given):
    return Dataset.from_dict(columns(**given))


def with_row(column, value, features=None):
    """The same, but for one value in the fourth row."""
    values = columns()
    values[column][3] = value
    return Dataset.from_dict(values, features=features)


def json_row(column, value):
    """As JSON lines of mixed rows load."""
    return with_row(column, value, Features({"prompt": Json(), "completion": Json()}))


def chat_row(column, value):
    """Conversations, one of which has these messages."""
    question, answer = {"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}
    good = {"prompt": [question], "completion": [answer]}
    return Dataset.from_list([{**good, column: value} if i == 3 else good for i in range(NUM_ROWS)])


def not_utf8():
    """Text that some other program wrote into an Arrow file without looking."""
    texts = pa.array([b"violet-marmalade\xff", *[b"q"] * (NUM_ROWS - 1)])
    broken = pa.StringArray.from_buffers(NUM_ROWS, texts.buffers()[1], texts.buffers()[2])
    return Dataset(pa.table({"prompt": broken, "completion": pa.array(["a"] * NUM_ROWS)}))


def message(role, content):
    return [{"role": role, "content": content}]


ONE, ALL = f"1 of {NUM_ROWS} rows (row 3)", f"{NUM_ROWS} of {NUM_ROWS} rows"
# Name, how the data set is made, the error, parts of its message.
BAD_ROWS = {
    "no question": (lambda: with_row("prompt", ""), ValueError, ("`prompt`", ONE, "dataset.filter")),
    "no question anywhere": (lambda: rows(prompt=[""] * NUM_ROWS), ValueError, ("`prompt`", ALL)),
    "no answer": (lambda: with_row("completion", ""), ValueError, ("`completion`", ONE, "dataset.filter")),
    "a blank answer": (lambda: with_row("completion", " \t\n"), ValueError, ("`completion`", ONE, "whitespace")),
    "None asks": (lambda: with_row("prompt", None), TypeError, ("`prompt`", ONE, "None", "dataset.map")),
    "None answers": (lambda: with_row("completion", None), ValueError, ("`completion`", ONE, "dataset.filter")),
    "nobody answers": (lambda: rows(completion=[None] * NUM_ROWS), ValueError, ("`completion`", "all 40 rows")),
    "a number asks": (lambda: json_row("prompt", 7), TypeError, ("`prompt`", ONE, "int", "dataset.map")),
    "a number answers": (lambda: json_row("completion", 7), TypeError, ("`completion`", ONE, "int")),
    "numbers ask": (lambda: rows(prompt=list(range(NUM_ROWS))), TypeError, ("`prompt`", ALL, "int")),
    "no column of questions": (
        lambda: rows().remove_columns("prompt"),
        ValueError,
        ("no column `prompt`", "['completion']", "rename_column"),
    ),
    "no column of answers": (lambda: rows().remove_columns("completion"), ValueError, ("no column `completion`",)),
    "no rows": (lambda: rows().select([]), ValueError, ("0 rows",)),
    "a list": (lambda: rows().to_list(), TypeError, ("list", "Dataset.from_list")),
    "a dict": (lambda: rows().to_dict(), TypeError, ("dict", "Dataset.from_dict")),
    "several splits": (lambda: DatasetDict(train=rows()), TypeError, ("DatasetDict", '["train"]')),
    "a stream": (lambda: rows().to_iterable_dataset(), ValueError, ("IterableDataset", "Materialise")),
    "nothing": (lambda: None, TypeError, ("NoneType", "load_dataset")),
    "NUL": (lambda: with_row("completion", f"{SECRET}\0"), ValueError, ("`completion`", ONE, "NUL")),
    "bytes that are no text": (not_utf8, ValueError, ("`prompt`", "(row 0)", "UTF-8")),
    "a negative weight": (lambda: with_weight(-1.0), ValueError, ("`weight`", ONE, "finite")),
    "a weight that is NaN": (lambda: with_weight(math.nan), ValueError, ("`weight`", ONE, "finite")),
    "no weight": (lambda: with_weight(None), TypeError, ("`weight`", ONE, "numbers")),
    "a weight that is text": (lambda: rows(weight=[SECRET] * NUM_ROWS), TypeError, ("`weight`", ALL, "numbers")),
    "a weight that fp32 makes infinite": (lambda: with_weight(1e39), ValueError, ("`weight`", ONE, "mean")),
    "a weight that fp32 makes 0": (lambda: with_weight(1e-60), ValueError, ("`weight`", ONE, "mean")),
    "no weight at all": (lambda: rows(weight=[0.0] * NUM_ROWS), ValueError, ("`weight`", "all 40 weights are 0")),
    "text answers messages": (
        lambda: Dataset.from_list([{"prompt": message("user", SECRET), "completion": SECRET}] * NUM_ROWS),
        ValueError,
        ("`completion`", ALL, "format"),
    ),
    "a message of nobody": (lambda: chat_row("prompt", message(None, SECRET)), ValueError, ("`prompt`", ONE, "role")),
    "a message without words": (lambda: chat_row("prompt", message("user", None)), ValueError, ("`prompt`", ONE)),
    "no message": (lambda: chat_row("prompt", []), ValueError, ("`prompt`", ONE, "empty")),
    "two answers": (
        lambda: chat_row("completion", message("assistant", SECRET) * 2),
        ValueError,
        (ONE, "one message"),
    ),
    "a tool answers": (lambda: chat_row("completion", message("tool", SECRET)), ValueError, (ONE, "'assistant' or")),
    "content of parts": (
        lambda: Dataset.from_list(
            [
                {"prompt": message("user", [{"type": "text", "text": SECRET}]), "completion": message("user", SECRET)}
                for _ in range(NUM_ROWS)
            ]
        ),
        ValueError,
        ("`prompt`", ALL, "content parts are not read"),
    ),
}


def with_weight(value):
    return rows(weight=[value if i == 3 else 1.0 for i in range(NUM_ROWS)])


def refused(surface, error, parts, *arguments, **settings):
    """That it is, in words and at once, and that no row is shown."""
    started = time.process_time()
    with pytest.raises(error) as raised:
        surface(*arguments, **settings)
    assert time.process_time() - started < 1
    assert [part for part in parts if part not in str(raised.value)] == []
    assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_are_refused_by_name_before_a_model_loads(tmp_path, capfd, caplog, name, surface):
    make_dataset, error, parts = BAD_ROWS[name]
    with caplog.at_level("DEBUG"):
        refused(surface, error, parts, tmp_path, NO_MODEL, make_dataset())
    assert SECRET not in "".join(capfd.readouterr()) + caplog.text


@pytest.mark.parametrize("surface", SURFACES[:3])
def test_rows_to_evaluate_on_are_refused_as_well(tmp_path, surface):
    parts = ("`eval_dataset` column `completion`", ONE)
    refused(surface, ValueError, parts, tmp_path, NO_MODEL, rows(), eval_dataset=with_row("completion", " "))


# --- what only model and tokenizer can tell


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    """A model, and a function that gives its tokenizer without some of its tokens."""
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), trust_remote_code=False)
    model.config.eos_token_id = model.generation_config.eos_token_id = None

    def tokenizer(**tokens):
        return AutoTokenizer.from_pretrained(str(tiny_model_dir), trust_remote_code=False, **tokens)

    return model, tokenizer


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("tokens", [{"eos_token": None}, {"eos_token": None, "pad_token": None}])
def test_answers_that_nothing_ends_are_refused(tmp_path, loaded, surface, tokens):
    model, tokenizer = loaded
    refused(
        surface,
        ValueError,
        ("end token", "`tokenizer.eos_token`"),
        *(tmp_path, model, rows()),
        processing_class=tokenizer(**tokens),
    )


@pytest.mark.parametrize("surface", SURFACES)
def test_conversations_need_a_chat_template(tmp_path, tiny_model_dir, surface):
    parts = ("no chat template", "`processing_class`")
    refused(surface, ValueError, parts, tmp_path, str(tiny_model_dir), chat_row("prompt", message("user", SECRET)))


@pytest.mark.parametrize("surface", [adversarial, latent, audited])
def test_questions_longer_than_the_model_are_named(tmp_path, tiny_model_dir, surface):
    """The exact trainer leaves them out, and counts them."""
    refused(
        surface, ValueError, ("3", "512", "positions"), tmp_path, str(tiny_model_dir), with_row("prompt", "x" * 600)
    )


def test_where_no_question_leaves_room_the_error_says_how_long_they_are(tmp_path, tiny_model_dir):
    parts = ("`train_dataset`", "leaves room", "600 to 600 tokens", "`max_length`")
    refused(retrodictive, ValueError, parts, tmp_path, str(tiny_model_dir), rows(prompt=["x" * 600] * NUM_ROWS))


def test_an_audit_of_too_few_rows_is_refused(tmp_path):
    refused(audited, ValueError, ("1 rows", "at least 30"), tmp_path, NO_MODEL, rows().select([0]))


# --- settings


COMMON = dict.fromkeys(settings_checks.COMMON, (0, -2, math.nan, "7"))
COMMON |= {"seed": (-1, 2**32, 0.5), "data_seed": (-1, 2**32, True), "learning_rate": (0.0, -1.0, math.inf, None)}
COMMON |= dict.fromkeys(("weight_decay", "max_grad_norm", "adam_epsilon"), (-1.0, math.nan, "0"))
COMMON |= {"max_steps": (-2, 1.5, "7"), "num_train_epochs": (-1.0, math.inf)}
COMMON |= dict.fromkeys(("adam_beta1", "adam_beta2"), (1.0, math.nan))
OF_OWN = {
    tiny_runs.settings: dict.fromkeys(adversarial_config.OWN_NUMBERS, (-1, math.nan, math.inf, "1")),
    latent_worlds.settings: dict.fromkeys(latent_retrodictive_config.OWN_NUMBERS, (0, math.nan, "1")),
}


@pytest.mark.parametrize("make", [tiny_runs.settings, exact_runs.settings, latent_worlds.settings])
def test_a_number_that_is_none_or_out_of_range_is_named_in_the_config(tmp_path, make):
    for name, values in (COMMON | OF_OWN.get(make, {})).items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}` is {value!r}; need a "):
                make(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        *(({name: value}, ValueError) for name in ("seed", "batch_size", "num_estimates") for value in (-1, 1.5, "1")),
        *(({"confidence": value}, ValueError) for value in (math.nan, 1, "0.9")),
        *(({"max_answer_bytes": value}, ValueError) for value in (math.nan, 1.5, "8")),
        ({"resample": 0}, ValueError),
        ({"by": "nowhere"}, ValueError),
        *(({name: 7}, TypeError) for name in ("base", "against", "generation_config")),
    ],
)
def test_an_audits_settings_are_refused_before_a_model_loads(setting, error):
    (name,) = setting
    with pytest.raises(error, match=f"`{name}`"):
        audit(NO_MODEL, rows(), output_dir=None, **setting)


@pytest.mark.parametrize(
    ("questions", "error", "said"),
    [
        ("a question", TypeError, "`questions` is one string"),
        ([7], TypeError, r"questions\[0\] is a int"),
        (["a", ["b"]], TypeError, r"questions\[1\] holds something that is no message"),
        ([[{"content": "a"}]], TypeError, r"questions\[0\] holds something that is no message"),
        ([[{"role": "user", "content": "\ud800"}]], ValueError, r"questions\[0\] holds a lone surrogate"),
        (["x" * 600], ValueError, r"1 of 1 questions \(number 0\) need up to 606 positions; the model has 512"),
    ],
)
def test_questions_passed_by_hand_are_refused_by_their_number(tiny_model_dir, questions, error, said):
    imitator = Imitator.from_pretrained(tiny_model_dir, device="cpu")
    with pytest.raises(error, match=said):
        imitator.answer(questions, max_new_tokens=6)
