"""A chat model that thinks between <think> and </think>: its tags are the law's, for humans and for samples."""

import latent_worlds as worlds
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_imitate import Imitator
from hf_imitate.rendering import Rendered
from hf_imitate.sampling import stream_key

# What counts in Qwen3's: thoughts of earlier turns are not shown, a last one is, and thinking can be switched off.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last and not add_generation_prompt %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if opens is defined and opens %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
LAW = {"thought_delimiter": "</think>", "max_thought_length": 4, "num_thoughts": 2}


@pytest.fixture(scope="module")
def thinker(tiny_chat_model_dir, tmp_path_factory):
    """A model with both tags as tokens of their own, that are not special, as in Qwen3."""
    folder = tmp_path_factory.mktemp("thinker")
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(str(tiny_chat_model_dir))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(role: str = "assistant", **columns) -> Dataset:
    asks = "user" if role == "assistant" else "assistant"
    given = {
        "prompt": [[{"role": asks, "content": f"Item {i}:"}] for i in range(4)],
        "completion": [[{"role": role, "content": "abc"}]] * 4,
        **columns,
    }
    return Dataset.from_dict(given)


def stored(trainer, number: int = 0) -> Rendered:
    row = trainer.train_dataset[number]
    return Rendered(row["prompt_ids"], row["answer_ids"], row["ended"])


def ids_of(trainer, *tokens: str) -> list[int]:
    return trainer.processing_class.convert_tokens_to_ids(list(tokens))


def test_a_thought_is_opened_once_and_its_closing_tag_stands_in_no_thought(thinker, tmp_path):
    trainer = worlds.make(tmp_path, thinker, conversations(), **LAW)
    opening, closing = ids_of(trainer, "<think>", "</think>")
    thinkers, tokenizer = trainer.thinkers, trainer.processing_class
    before = thinkers.opened(stored(trainer))
    assert tokenizer.decode(before) == "<|im_start|>user\nItem 0:<|im_end|>\n<|im_start|>assistant\n<think>"
    assert before.count(opening) == 1
    hindsight = tokenizer.decode(thinkers.in_hindsight(stored(trainer)))
    assert hindsight == f"{tokenizer.decode(before).removesuffix('<think>')}abc<|im_end|>{tokenizer.decode(before)}"
    assert thinkers.law.delimiter_ids == (closing,)
    assert not thinkers.law.is_ordinary[[opening, closing]].any()
    keys = [[stream_key(0, "test", "q", k) for k in range(40)]]
    for drawn in (thinkers.think([stored(trainer)], keys)[0], thinkers.dream([stored(trainer)], keys, 4)[0]):
        assert not any({opening, closing} & {*one.thought_ids} for one in drawn)


def test_a_template_that_opens_the_thought_itself_is_left_alone(thinker, tmp_path):
    trainer = worlds.make(tmp_path, thinker, conversations(), chat_template_kwargs={"opens": True}, **LAW)
    text = trainer.processing_class.decode(trainer.thinkers.opened(stored(trainer)))
    assert text.endswith("<|im_start|>assistant\n<think>\n")


def test_a_template_with_thinking_switched_off_is_refused(thinker, tmp_path):
    with pytest.raises(ValueError, match=r"opened and closed again.*enable_thinking"):
        worlds.make(tmp_path, thinker, conversations(), chat_template_kwargs={"enable_thinking": False}, **LAW)


def test_line_breaks_after_the_closing_tag_belong_to_the_delimiter(thinker, tmp_path):
    trainer = worlds.make(tmp_path, thinker, conversations(), **{**LAW, "thought_delimiter": "</think>\n\n"})
    law = trainer.thinkers.law
    assert trainer.processing_class.decode(list(law.delimiter_ids)) == "</think>\n\n"
    assert law.opening_ids == tuple(ids_of(trainer, "<think>"))
    worlds.train(trainer)


def test_a_known_thought_that_spells_the_closing_tag_is_refused_by_row(thinker, tmp_path):
    rows = conversations(thought=["ok", None, "a</think>b", ""])
    with pytest.raises(ValueError, match=r"1 of 4 rows \(row 2\) have thoughts holding the delimiter"):
        worlds.make(tmp_path, thinker, rows, **{**LAW, "max_thought_length": 20})


@pytest.mark.parametrize("role", ["assistant", "user"])
def test_what_is_sampled_has_the_tokens_of_what_humans_wrote(thinker, tmp_path, role):
    """All thoughts are known and all alike, so a trained imitator writes them; loaded, it still does, in its turn."""
    rows = conversations(role, thought=["hm"] * 4)
    trainer = worlds.make(
        tmp_path, thinker, rows, full=True, max_steps=40, learning_rate=1e-2, logging_steps=40, **LAW
    )
    worlds.train(trainer)
    trainer.save_model()
    imitator = Imitator.from_pretrained(tmp_path / "run", device="cpu")
    drawn = imitator.latent.answer(rows["prompt"][:], num_answers=5, seed=1)
    thinkers, human = imitator.latent.thinkers, stored(trainer, 0)
    tokenizer = trainer.processing_class
    answer = tokenizer("hm")["input_ids"], tokenizer("abc")["input_ids"] + ids_of(trainer, "<|im_end|>")
    expected = thinkers.law.join(*answer)
    assert trainer.thinkers.forward_rows(human, [answer[0]])[0].ids == expected
    sampled = [thinkers.law.join(one.thought_ids, one.ids) for own in drawn for one in own]
    assert sampled.count(expected) >= 15
    assert all(one.answer.text == "abc" for own in drawn for one in own if one.ids == answer[1])
    asked = imitator.renderer.prompt_ids(rows["prompt"][:])
    assert thinkers.opened(Rendered(asked[0], [], False)) == trainer.thinkers.opened(human)
    assert tokenizer.decode(thinkers.opened(human)).endswith(f"<|im_start|>{role}\n<think>")


def test_turns_of_both_roles_are_opened_as_each_question_asks(thinker, tmp_path):
    """An answer in a turn that its question does not open is refused."""
    mixed = Dataset.from_list([conversations("assistant")[0], conversations("user")[1]] * 2)
    trainer = worlds.make(tmp_path, thinker, mixed, shuffle_dataset=False, **LAW)
    texts = [trainer.processing_class.decode(trainer.thinkers.opened(stored(trainer, i))) for i in (0, 1)]
    assert [text.rpartition("<|im_start|>")[2] for text in texts] == ["assistant\n<think>", "user\n<think>"]
    wrong = Dataset.from_list(
        [conversations("assistant")[0], {**conversations("user")[1], "prompt": mixed[0]["prompt"]}]
    )
    with pytest.raises(ValueError, match="whose turn is not opened"):
        worlds.make(tmp_path / "wrong", thinker, wrong, **LAW)
