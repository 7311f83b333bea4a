import unicodedata

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig

from hf_imitate.rendering import (
    Answer,
    Rendered,
    Renderer,
    TurnError,
    canonical_text,
    closing_id,
    collate,
    end_token_ids,
    next_speaker,
)

QUESTION = [{"role": "user", "content": "Return the number?"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_chat_model_dir):
    return AutoTokenizer.from_pretrained(tiny_chat_model_dir)


@pytest.fixture
def renderer(tokenizer):
    return Renderer(tokenizer, [tokenizer.eos_token_id])


@pytest.fixture
def chat_renderer(chat_tokenizer):
    return Renderer(chat_tokenizer, [chat_tokenizer.eos_token_id])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a \t\nb\u3000", "a\nb"),
        ("a\n\n \n", "a"),
        ("\u212b", "\u00c5"),
    ],
)
def test_texts_a_reader_cannot_tell_apart_have_one_spelling(one, other):
    assert canonical_text(one) == canonical_text(other) == other


@pytest.mark.parametrize("text", [" a", "\n a", "a  b", "a\n\nb", "\ufb01", ""])
def test_what_a_reader_sees_stays(text):
    assert canonical_text(text) == text


def test_the_canonical_spelling_is_final():
    letters = list("ae \t\n\r\u0301\u030a\u00e9\u1100\u1161\u11a8\u3000\x0b\x1c\u2028\u00a0.")
    random = np.random.default_rng(0)
    for _ in range(2000):
        once = canonical_text("".join(random.choice(letters, size=random.integers(8))))
        assert canonical_text(once) == once
        assert unicodedata.is_normalized("NFC", once)


def test_an_answer_ends_with_one_end_token(renderer, tokenizer):
    row = renderer.human(["Name it:"], [" a name"])[0]

    assert row.ended
    assert row.answer_ids.count(tokenizer.eos_token_id) == 1
    assert row.answer_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.prompt_ids + row.answer_ids[:-1]) == "Name it: a name"


def test_a_rendered_answer_reads_back_as_its_text(renderer):
    texts = ["", " the list", "\n\u00e9\u4e2d\U0001f600", "a  b , c ."]
    rows = renderer.answer_ids(texts, [True] * len(texts))

    answers = [renderer.read(row.answer_ids) for row in rows]

    assert answers == [Answer(text, True) for text in texts]


def test_text_that_spells_the_end_token_does_not_end_an_answer(renderer, tokenizer):
    row = renderer.human(["q"], ["a<|endoftext|>b"])[0]

    assert row.answer_ids.index(tokenizer.eos_token_id) == len(row.answer_ids) - 1
    assert renderer.read(row.answer_ids) == Answer("a<|endoftext|>b", True)


def test_nothing_after_the_first_end_token_is_read(renderer, tokenizer):
    end = tokenizer.eos_token_id
    content = tokenizer("abc")["input_ids"]

    assert renderer.read([*content, end, *content, end, tokenizer.pad_token_id]) == Answer("abc", True)
    assert renderer.read(content) == Answer("abc", False)
    assert renderer.read([end]) == Answer("", True)


def test_any_end_token_of_the_model_ends_an_answer(tokenizer):
    first, second = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    renderer = Renderer(tokenizer, [first, second])

    assert renderer.read([*tokenizer("abc")["input_ids"], second, first]) == Answer("abc", True)
    assert renderer.human(["q"], ["abc"])[0].answer_ids[-1] == first


def test_a_sampled_special_token_stays_visible(renderer, tokenizer):
    reserved = tokenizer.convert_tokens_to_ids("<|reserved_0|>")

    assert renderer.read([*tokenizer("a")["input_ids"], reserved]).text == "a<|reserved_0|>"


@pytest.mark.parametrize(("limit", "is_cut"), [(4, False), (3, True), (1, True)])
def test_a_human_answer_is_cut_where_a_sampled_one_would_be(tokenizer, limit, is_cut):
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id], max_answer_tokens=limit)
    whole = [*tokenizer("xyz")["input_ids"], tokenizer.eos_token_id]
    assert len(whole) == 4

    row = renderer.human(["q"], ["xyz"])[0]

    assert row.answer_ids == whole[:limit]
    assert row.ended is not is_cut
    assert renderer.read(row.answer_ids).ended is row.ended


def test_an_answer_cut_before_stays_without_end_token(renderer, tokenizer):
    assert renderer.answer_ids(["xyz"], [False]) == [Rendered([], tokenizer("xyz")["input_ids"], False)]


def test_a_conversation_is_rendered_as_its_template_renders_it(chat_renderer, chat_tokenizer):
    answer = [{"role": "assistant", "content": " It is 3."}]

    row = chat_renderer.human([QUESTION], [answer])[0]

    whole = chat_tokenizer.apply_chat_template(QUESTION + answer, tokenize=False)
    # The newline that the template puts after the end token is nothing a sampled answer could have.
    assert chat_tokenizer.decode(row.prompt_ids + row.answer_ids) + "\n" == whole
    assert row.answer_ids[-1] == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_conversation_ends_with_the_end_token_of_its_template(chat_tokenizer):
    other, own = chat_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    renderer = Renderer(chat_tokenizer, [other, own])

    assert renderer.human([QUESTION], ["yes"])[0].answer_ids[-1] == own
    assert renderer.human(["plain"], ["yes"])[0].answer_ids[-1] == other


def test_a_template_without_end_token_falls_back_to_the_first(chat_tokenizer):
    other, reserved = chat_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|reserved_1|>"])

    assert Renderer(chat_tokenizer, [other, reserved]).turn_end_id == other


def test_template_arguments_reach_the_template(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ tone }}: {{ messages[0]['content'] }}")
    renderer = Renderer(chat_tokenizer, [chat_tokenizer.eos_token_id], chat_template_kwargs={"tone": "calm"})

    assert chat_tokenizer.decode(renderer.prompt_ids([QUESTION])[0]) == "calm: Return the number?"


def test_a_question_is_rendered_the_same_in_any_company(chat_renderer):
    other = [{"role": "system", "content": "Be brief, and do not repeat yourself."}, *QUESTION]

    alone = chat_renderer.prompt_ids([QUESTION])[0]

    assert chat_renderer.prompt_ids([other, QUESTION])[1] == alone


def test_rows_are_padded_on_the_right_and_scored_on_the_answer_only():
    batch = collate([Rendered([5, 6], [7, 2], True), Rendered([5], [2], True)], pad_token_id=2)

    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [5, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.answer_mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_end_tokens_are_the_models_led_by_an_unlisted_tokenizer_token(tokenizer):
    eos = tokenizer.eos_token_id

    assert end_token_ids(tokenizer, None) == [eos]
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=3)) == [eos, 3]
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=[3, eos])) == [3, eos]


def test_a_model_without_end_token_is_an_error_that_says_how_to_set_one(tokenizer):
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token"):
        Renderer(tokenizer, [])


def with_template(tokenizer, monkeypatch, template, ends, **settings):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return Renderer(tokenizer, tokenizer.convert_tokens_to_ids(ends), **settings)


MESSAGES = "{% for m in messages %}<|im_start|>{{ m['content'] }}"


@pytest.mark.parametrize(
    ("template", "ends", "expected"),
    [
        # What a template puts at the end of the whole conversation is not what ends a turn.
        (MESSAGES + "<|im_end|>\n{% endfor %}<|endoftext|>", ["<|endoftext|>", "<|im_end|>"], "<|im_end|>"),
        # A question's own end marker comes before the answer.
        (MESSAGES + "<|im_end|>{% endfor %}", ["<|reserved_1|>", "<|im_end|>"], "<|im_end|>"),
        (
            "{{ messages[0]['content'] }}<|im_end|>{{ messages[1]['content'] }}",
            ["<|reserved_1|>", "<|im_end|>"],
            "<|reserved_1|>",
        ),
        # Closed by a token that ends nothing.
        (MESSAGES + "<|im_end|>{% endfor %}", ["<|endoftext|>", "<|reserved_1|>"], "<|endoftext|>"),
        # The answer is not in the text at all.
        ("{{ messages[0]['content'] }}<|im_end|>", ["<|endoftext|>", "<|im_end|>"], "<|endoftext|>"),
    ],
)
def test_the_end_of_a_turn_is_the_first_end_token_after_the_answer(
    chat_tokenizer, monkeypatch, template, ends, expected
):
    renderer = with_template(chat_tokenizer, monkeypatch, template, ends)

    assert renderer.turn_end_id == chat_tokenizer.convert_tokens_to_ids(expected)


def test_a_template_that_needs_an_argument_gets_it_when_its_end_is_looked_for(chat_tokenizer, monkeypatch):
    template = (
        "{% if tone is not defined %}{{ raise_exception('tone?') }}{% endif %}" + MESSAGES + "<|im_end|>{% endfor %}"
    )
    ends = ["<|endoftext|>", "<|im_end|>"]
    renderer = with_template(chat_tokenizer, monkeypatch, template, ends, chat_template_kwargs={"tone": "calm"})

    row = renderer.human([QUESTION], [[{"role": "assistant", "content": "yes"}]])[0]

    assert row.answer_ids[-1] == chat_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_nothing_asked_is_nothing_rendered(renderer):
    assert renderer.prompt_ids([]) == []
    assert renderer.human([], []) == []
    assert renderer.answer_ids([], []) == []


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_that_leaves_no_room_for_the_end_is_an_error(tokenizer, limit):
    with pytest.raises(ValueError, match=f"`max_answer_tokens` is {limit}.*None"):
        Renderer(tokenizer, [tokenizer.eos_token_id], max_answer_tokens=limit)


def test_an_empty_question_is_an_error_where_it_would_leave_a_token_unscored():
    rows = [Rendered([5], [7, 2], True), Rendered([], [7, 2], True)]

    with pytest.raises(ValueError, match=r"1 of 2 questions.*number 1.*start token"):
        collate(rows, pad_token_id=0)


@pytest.mark.parametrize(
    ("roles", "speaker"),
    [
        ([], "user"),
        (["system"], "user"),
        (["user"], "assistant"),
        (["user", "assistant"], "user"),
        (["user", "assistant", "tool"], "assistant"),
    ],
)
def test_two_take_turns_and_the_user_begins(roles, speaker):
    assert next_speaker([{"role": role, "content": "x"} for role in roles]) == speaker


def test_a_users_turn_is_opened_by_what_the_template_puts_before_a_users_words(chat_tokenizer):
    renderer = Renderer(chat_tokenizer, [chat_tokenizer.eos_token_id], completion_role="user")
    told = [*QUESTION, {"role": "assistant", "content": "3."}]

    row = renderer.human([told], [[{"role": "user", "content": " Thanks."}]])[0]

    whole = chat_tokenizer.apply_chat_template([*told, {"role": "user", "content": " Thanks."}], tokenize=False)
    assert chat_tokenizer.decode(row.prompt_ids + row.answer_ids) + "\n" == whole
    assert renderer.as_completion(told, "x") == [{"role": "user", "content": "x"}]


def test_each_role_ends_its_turn_with_its_own_token(chat_tokenizer, monkeypatch):
    ends = chat_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{{ '<|im_end|>' if m['role'] == 'user' else '<|endoftext|>' }}{% endfor %}"
    )
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    renderer = Renderer(chat_tokenizer, ends, completion_role="alternating")
    told = [*QUESTION, {"role": "assistant", "content": "3."}]

    rows = renderer.human([QUESTION, told], ["yes", "yes"])

    assert [row.answer_ids[-1] for row in rows] == ends
    # What schemes are planted in and read from ended every turn as the assistant's.
    assert renderer.given([QUESTION, told], [Answer("yes", True)] * 2) == rows
    assert [closing_id(chat_tokenizer, role) for role in ("assistant", "user")] == ends


def test_an_answer_in_another_role_than_the_opened_turn_is_an_error_without_its_text(chat_renderer):
    with pytest.raises(ValueError, match=r"Answer 1 .*'assistant'.*`completion_role`") as error:
        chat_renderer.human([QUESTION] * 2, ["yes", [{"role": "user", "content": "secret"}]])
    assert "secret" not in str(error.value)


def test_a_role_that_never_answers_is_an_error(chat_tokenizer):
    with pytest.raises(ValueError, match=r"`completion_role` is 'tool'; need one of"):
        Renderer(chat_tokenizer, [1], completion_role="tool")


def test_a_template_that_shows_a_message_twice_cannot_open_a_users_turn(chat_tokenizer, monkeypatch):
    """Cut at the first of the two, the answer would stand in its own question."""
    monkeypatch.setattr(chat_tokenizer, "chat_template", MESSAGES + "{{ m['content'] }}<|im_end|>{% endfor %}")
    renderer = Renderer(chat_tokenizer, [chat_tokenizer.eos_token_id], completion_role="user")

    with pytest.raises(
        TurnError, match=r"the user's turn after 2 of 2 questions \(number 0, 1; ValueError\)"
    ) as error:
        renderer.prompt_ids([QUESTION, QUESTION])
    assert error.value.indices == [0, 1]
