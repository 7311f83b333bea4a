"""For any row, any tokenizer and any number among the settings: rendered token for token alike on both sides, or
refused by a named error. The same examples are drawn at every run."""

import math
import traceback

import exact_runs
import latent_worlds
import pytest
import tiny_runs
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_imitate.questions import check_pairs
from hf_imitate.rendering import Renderer, canonical_text
from hf_imitate.rows import check_columns

SAME_AT_EVERY_RUN = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# What has broken tokenizers and logs before, among plain letters.
ODD = [
    *(
        "<|endoftext|>",
        "<|im_end|>",
        "[SEP]",
        "[UNK]",
        "##a",
        "\0",
        "\ud800",
        "\udfff",
        "\ufffd",
        "\ufeff",
        "\u202e\u05d0",
    ),
    *(
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "e\u0301",
        "\r\n",
        "\u2028",
        " ",
        "\t",
        "  \n",
        "\x85",
        "\u0627\u0644",
    ),
    *("Ä", "\U000e0041", "\x1b[31m", "{{ x }}", "%s", "b" * 5000),
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=()), max_size=8)), max_size=6
).map("".join)


def is_text(text: str) -> bool:
    """Whether a tokenizer takes it: it holds no half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def byte_level(folder, starts=False, **tokens):
    """The byte-level BPE of the tiny models, in one of the forms that people have."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **tokens)
    if starts:
        start = ("<|reserved_0|>", tokenizer.convert_tokens_to_ids("<|reserved_0|>"))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{start[0]} $A", special_tokens=[start]
        )
    return tokenizer


def word_pieces():
    """As BERT's: lower case, no accents, no blanks, and one token for whatever it does not know."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    pieces = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=pieces, **names)


def refusal_of(call):
    """The error that a call ends in, of whatever type; `None` where it does not."""
    try:
        call()
    except Exception as error:
        return error
    return None


FORMS = {
    "plain": {},
    "no pad": {"pad_token": None},
    "the end pads": {"pad_token": "<|endoftext|>"},
    "pads left": {"padding_side": "left"},
    "pads right": {"padding_side": "right"},
    "starts with a token": {"starts": True},
}


@pytest.fixture(scope="module")
def tokenizers(tiny_model_dir):
    return {name: byte_level(tiny_model_dir, **form) for name, form in FORMS.items()} | {"word pieces": word_pieces()}


def renderer(tokenizer, limit=None):
    return Renderer(tokenizer, [tokenizer.eos_token_id], max_answer_tokens=limit)


@SAME_AT_EVERY_RUN
@given(text=TEXTS, limit=st.one_of(st.none(), st.integers(1, 12)))
@example(text="\U0001f468", limit=2)  # cut inside a character of four bytes
@example(text="a<|endoftext|>b", limit=None)
def test_an_answers_tokens_are_its_content_and_one_end_token(tokenizers, text, limit):
    if not is_text(text):
        return
    for name, tokenizer in tokenizers.items():
        (human,) = renderer(tokenizer, limit).human(["a question"], [text])
        content = tokenizer(text=canonical_text(text), add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        whole = [*content, tokenizer.eos_token_id]
        assert human.answer_ids == whole[:limit], name
        assert human.ended == (limit is None or len(whole) <= limit), name
        assert human.answer_ids.count(tokenizer.eos_token_id) == human.ended, name
        assert human.prompt_ids == tokenizer(text="a question")["input_ids"], name


@SAME_AT_EVERY_RUN
@given(text=TEXTS, limit=st.one_of(st.none(), st.integers(1, 12)))
@example(text="\U0001f468", limit=2)
def test_human_and_imitator_are_read_alike_and_bytes_come_back_as_they_were(tokenizers, text, limit):
    """An imitator that samples the human's very ids is shown as the human is: nothing can tell them apart."""
    if not is_text(text):
        return
    for name, tokenizer in tokenizers.items():
        one = renderer(tokenizer, limit)
        (human,) = one.human(["a question"], [text])
        answer = one.read(human.answer_ids)
        sampled = one.read([*human.answer_ids, *([tokenizer.eos_token_id, 5] if human.ended else [])])
        assert (sampled, answer.ended) == (answer, human.ended), name
        if name != "word pieces" and human.ended:
            assert answer.text == canonical_text(text), name
        (again,) = one.answer_ids([answer.text], [answer.ended])
        if human.ended and name != "word pieces":
            assert again.answer_ids == human.answer_ids, name


@SAME_AT_EVERY_RUN
@given(text=TEXTS)
def test_how_a_tokenizer_pads_changes_no_token(tokenizers, text):
    if not is_text(text):
        return
    rendered = {name: renderer(tokenizers[name]).human([text + "?"], [text])[0] for name in FORMS}
    started = rendered.pop("starts with a token")
    assert len({str(row) for row in rendered.values()}) == 1
    assert started.answer_ids == rendered["plain"].answer_ids
    assert started.prompt_ids[1:] == rendered["plain"].prompt_ids


@SAME_AT_EVERY_RUN
@given(question=TEXTS, answer=TEXTS, weight=st.one_of(st.none(), st.floats(), st.integers(-2, 2)))
def test_a_row_is_rendered_or_refused_by_name_and_not_shown(tokenizers, question, answer, weight):
    marker = "violet-marmalade"
    texts = [f"{text} {marker}" if text.strip() else text for text in (question, answer)]
    if not all(map(is_text, texts)):
        with pytest.raises(ValueError, match=r"(questions|answers)\[0\] holds a lone surrogate"):
            check_pairs(*([text] for text in texts))
        return
    dataset = Dataset.from_dict({"prompt": [texts[0]], "completion": [texts[1]], "weight": [weight]})
    refusal = refusal_of(lambda: check_columns(dataset))
    if refusal is not None:
        assert type(refusal) in (TypeError, ValueError)  # and no subclass, such as UnicodeError
        assert "`train_dataset` column `" in str(refusal)
        assert marker not in "".join(traceback.format_exception(refusal))
        return
    for tokenizer in tokenizers.values():
        (row,) = renderer(tokenizer).human(*(dataset[name] for name in ("prompt", "completion")))
        assert row.prompt_ids
        assert row.ended


NUMBERS = st.one_of(st.floats(), st.integers(-3, 3), st.sampled_from([None, "1", True, 2**40, math.inf]))
NAMES = (
    "learning_rate",
    "per_device_train_batch_size",
    "seed",
    "weight_decay",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
)


@SAME_AT_EVERY_RUN
@given(name=st.sampled_from(NAMES), value=NUMBERS)
@pytest.mark.parametrize("make", [tiny_runs.settings, exact_runs.settings, latent_worlds.settings])
def test_a_setting_is_kept_or_refused_by_its_name(tmp_path, make, name, value):
    refusal = refusal_of(lambda: make(tmp_path, **{name: value}))
    if refusal is None:
        assert getattr(make(tmp_path, **{name: value}), name) == value
    else:
        assert type(refusal) is ValueError
        assert f"`{name}`" in str(refusal) or "divisible by num_generations" in str(refusal)
