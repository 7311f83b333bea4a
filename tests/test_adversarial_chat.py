"""Conversations: both sides are the same ids under any template, whoever's turn is imitated and however it ends."""

import json

import pytest
import torch
from datasets import Dataset
from tiny_runs import imitator_weights, load, make, nats_of, run, same, spied, train
from transformers import AutoTokenizer, GenerationConfig

from hf_imitate import Imitator
from hf_imitate.rendering import Answer, Renderer, TurnError, canonical_text
from hf_imitate.surface import audit_surface

# ChatML with a system message of its own where a conversation brings none.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3's: an empty think block before the answer if thinking is off, and before the last assistant's answer of a
# finished conversation; thoughts of earlier turns are left out.
QWEN3 = (
    "{% for message in messages %}{% set words = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% set words = words.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set words = '<think>\n\n</think>\n\n' + words %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + words + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Refuses two turns of one role in a row, and quotes what it refuses.
STRICT = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(messages[0]['content']) }}"
    "{% endif %}{{ '[' + message['role'] + ']' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SECRET = "a private question"
SETTINGS = {
    "chatml": (CHATML, {}),
    "qwen3": (QWEN3, {}),
    "qwen3 without thinking": (QWEN3, {"enable_thinking": False}),
}


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def rows(role: str, number: int = 16, answers: tuple[str | None, ...] = ("abc", "Yes, and\nno.")) -> Dataset:
    """Questions that end with the other's turn; every fourth opens with a system message, and with thoughts in it."""
    dialogues = []
    for i in range(number):
        prompt = [say("user", f"Item {i}:")]
        if role == "user":
            prompt = [say("user", "Begin."), say("assistant", f"<think>\nHm.\n</think>\n\nItem {i}:")]
        if i % 4 == 0:
            prompt.insert(0, say("system", "Be brief."))
        answer = answers[i % len(answers)]
        dialogues.append({"prompt": prompt, "completion": None if answer is None else [say(role, answer)]})
    return Dataset.from_list(dialogues)


@pytest.fixture(scope="module")
def folder_of(tiny_chat_model_dir, tmp_path_factory):
    """The tiny model with another chat template and, where asked, other end tokens."""
    made = {}

    def make_folder(template, eos="<|im_end|>", model_eos=None):
        key = (template, eos, model_eos)
        if key not in made:
            folder = tmp_path_factory.mktemp("chat")
            tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir))
            tokenizer.chat_template, tokenizer.eos_token = template, eos
            tokenizer.save_pretrained(folder)
            model = load(tiny_chat_model_dir)
            ends = tokenizer.convert_tokens_to_ids(list(model_eos or (eos,)))
            model.config.eos_token_id = ends[0]
            model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
            model.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make_folder


@pytest.fixture(scope="module", params=[(name, role) for name in SETTINGS for role in ("assistant", "user")])
def ran(request, folder_of, tmp_path_factory):
    """A short run of every kind: a step of each warm-up and two of the game, with all that the model was given."""
    name, role = request.param
    template, kwargs = SETTINGS[name]
    given = {"chat_template_kwargs": kwargs, "imitator_warmup_steps": 1, "distinguisher_warmup_steps": 1}
    trainer = make(tmp_path_factory.mktemp("run"), folder_of(template), rows(role), max_steps=2, **given)
    before = imitator_weights(trainer)
    with spied(trainer.model, "generate") as generated, spied(trainer, "_loss_of_phase") as losses:
        train(trainer)
    trainer.found = {
        "moved": not same(before, imitator_weights(trainer)),
        "asked": [ids for _, call in generated for ids in unpadded(call["input_ids"], call["attention_mask"])],
        "batches": [args[1] for args, _ in losses if "completion_ids" in args[1]],
    }
    return name, role, trainer


def unpadded(ids, mask) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def as_sampled(trainer, text: str) -> list[int]:
    """The ids of a sampled answer that reads `text` and ended by itself."""
    ids = trainer._tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, trainer._tokenizer.convert_tokens_to_ids("<|im_end|>")]


def sides_that_differ(trainer) -> set[str]:
    """Where a human's answer is other ids than a sampled answer with the same words."""
    differ = set()
    limit = trainer.max_completion_length
    for i, row in trainer.likelihood.rows.rows.items():
        prompt, answer = trainer.train_dataset[i]["prompt"], trainer.train_dataset[i]["completion"]
        sampled = as_sampled(trainer, canonical_text(answer[0]["content"]))[:limit]
        generated_from, _, _ = trainer._tokenize_prompts([prompt])
        if row.rendered.prompt_ids + row.rendered.answer_ids != generated_from[0] + sampled:
            differ.add("likelihood")
        human, machine = trainer.distinguisher.encode([prompt] * 2, [row.answer, trainer.renderer.read(sampled)])
        if human != machine:
            differ.add("distinguisher")
    return differ


def test_a_human_answer_and_a_sampled_one_with_its_words_are_the_same_ids(ran):
    _, _, trainer = ran
    assert sides_that_differ(trainer) == set()


def test_generation_and_training_stand_on_the_very_ids_before_the_human_answer(ran):
    _, _, trainer = ran
    expected = {tuple(row.rendered.prompt_ids) for row in trainer.likelihood.rows.rows.values()}
    assert {tuple(ids) for ids in trainer.found["asked"]} <= expected
    batch = trainer.found["batches"][-1]
    assert {tuple(ids) for ids in unpadded(batch["prompt_ids"], batch["prompt_mask"])} <= expected
    prompts = trainer.train_dataset["prompt"][:]
    assert trainer.distinguisher.renderer.prompt_ids(prompts) == trainer.renderer.prompt_ids(prompts)
    assert trainer.found["moved"]
    assert len(trainer.found["asked"]) >= 24


def test_a_question_ends_with_the_header_of_the_turn_that_is_imitated(ran):
    name, role, trainer = ran
    before = {
        ("chatml", "assistant"): "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nItem 1:<|im_end|>\n",
        ("chatml", "user"): "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nBegin.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nItem 1:<|im_end|>\n",
        ("qwen3", "assistant"): "<|im_start|>user\nItem 1:<|im_end|>\n",
        # As the model reads it when the user's words have come: an earlier turn, without its thoughts.
        ("qwen3", "user"): "<|im_start|>user\nBegin.<|im_end|>\n<|im_start|>assistant\nItem 1:<|im_end|>\n",
    }[name.split()[0], role]
    opened = f"<|im_start|>{role}\n"
    if (name, role) == ("qwen3 without thinking", "assistant"):
        opened += "<think>\n\n</think>\n\n"
    assert trainer._tokenizer.decode(trainer.likelihood.rows.rows[1].rendered.prompt_ids) == before + opened


@pytest.mark.parametrize("plant", ["after the end", "before the answer"])
def test_a_templates_own_words_on_the_humans_side_are_caught(folder_of, tmp_path, monkeypatch, plant):
    """What TRL's own rendering of a finished conversation does: a newline after the end, a think block before."""
    honest = Renderer.human

    def leaking(self, prompts, completions):
        rendered = honest(self, prompts, completions)
        block, newline = (self.tokenizer(text)["input_ids"] for text in ("<think>\n\n</think>\n\n", "\n"))
        after = plant == "after the end"
        return [
            row._replace(answer_ids=[*row.answer_ids, *newline] if after else [*block, *row.answer_ids])
            for row in rendered
        ]

    monkeypatch.setattr(Renderer, "human", leaking)
    trainer = make(tmp_path, folder_of(QWEN3), rows("assistant"), max_completion_length=32)
    # Nothing after the end is read, so there the distinguisher is safe, and the likelihood alone is wrong.
    caught = {"after the end": {"likelihood"}, "before the answer": {"likelihood", "distinguisher"}}
    assert sides_that_differ(trainer) == caught[plant]
    human = [row.answer for row in trainer.likelihood.rows.rows.values()] * 4
    machine = [Answer(canonical_text(("abc", "Yes, and\nno.")[i % 2]), True) for i in range(len(human))]
    auc = audit_surface(human, machine).auc
    assert auc > 0.9 if plant == "before the answer" else auc < 0.6


@pytest.mark.parametrize("model_eos", [("<|endoftext|>",), ("<|endoftext|>", "<|im_end|>")])
def test_a_turn_ends_at_its_own_token_and_at_the_tokenizers(folder_of, tmp_path, model_eos):
    """A base model with a chat template: what ends a turn is not what ends a text, and the model may not list it."""
    folder = folder_of(CHATML, "<|endoftext|>", model_eos)
    trainer = make(tmp_path, folder, rows("assistant"), max_completion_length=64, per_device_train_batch_size=16)
    end, turn_end, pad = trainer._tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|pad|>"])
    outputs = []
    generate = trainer.model.generate
    trainer.model.generate = lambda **kwargs: outputs.append((kwargs, generate(**kwargs))) or outputs[-1][1]
    train(trainer)
    assert sides_that_differ(trainer) == set()
    assert trainer.likelihood.rows.rows[0].rendered.answer_ids[-1] == turn_end
    ended = set()
    for kwargs, output in outputs:
        for row in output[:, kwargs["input_ids"].shape[1] :].tolist():
            stops = [i for i, token in enumerate(row) if token in (end, turn_end)]
            if stops:
                ended.add(row[stops[0]])
                assert set(row[stops[0] + 1 :]) <= {pad}
    assert ended == {end, turn_end}
    trainer.save_model(str(tmp_path / "saved"))
    imitator = Imitator.from_pretrained(tmp_path / "saved", device="cpu")
    assert imitator.renderer.end_token_ids == [end, turn_end]
    assert trainer.distinguisher.renderer.end_token_ids == [end, turn_end]


def test_an_imitated_user_is_saved_answers_and_is_scored_as_a_user(folder_of, tmp_path):
    dataset = rows("user")
    trainer = run(tmp_path, folder_of(CHATML), dataset, max_steps=1)
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "imitation.json").read_text())["completion_role"] == "user"
    imitator = Imitator.from_pretrained(tmp_path / "saved", device="cpu")
    questions = dataset["prompt"][:2]
    nats = imitator.log_prob(questions, ["abc", "de"]).nats
    header = "<|im_start|>user\n"
    for question, answer, found in zip(questions, ("abc", "de"), nats, strict=True):
        text = trainer._tokenizer.apply_chat_template(question, tokenize=False) + header
        prompt = trainer._tokenizer(text, add_special_tokens=False)["input_ids"]
        row = trainer.renderer.answer_ids([answer], [True], conversational=True)[0]._replace(prompt_ids=prompt)
        torch.testing.assert_close(found, -nats_of(imitator.model, row).double(), atol=1e-4, rtol=0)
    with spied(imitator.model, "generate") as calls:
        imitator.answer(questions, seed=1)
    asked = unpadded(calls[0][1]["input_ids"], calls[0][1]["attention_mask"])
    assert all(imitator.tokenizer.decode(ids).endswith(header) for ids in asked)
    assert imitator.distinguisher.renderer.prompt_ids(questions) == imitator.renderer.prompt_ids(questions)


def test_checks_and_rewards_are_shown_a_users_words_as_a_users(folder_of, tmp_path):
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    run(tmp_path, folder_of(CHATML), rows("user"), arguments={"reward_funcs": reward}, max_steps=1)
    assert {(len(answer), answer[0]["role"]) for answer in seen} == {(1, "user")}


def test_an_imitator_of_both_sides_opens_the_turn_that_is_due(folder_of, tmp_path):
    dataset = Dataset.from_list([*rows("user", 8, ("abc", None)), *rows("assistant", 8, ("de", None))])
    trainer = run(tmp_path, folder_of(CHATML), dataset, allow_unlabelled=True, heldout_fraction=0.0, max_steps=2)
    assert trainer.renderer.completion_role == "alternating"
    assert sides_that_differ(trainer) == set()
    ends = [trainer._tokenizer.decode(ids) for ids in trainer.renderer.prompt_ids(dataset["prompt"])]
    assert all(end.endswith("<|im_start|>user\n") for end in ends[:8])
    assert all(end.endswith("<|im_start|>assistant\n") for end in ends[8:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # A system's message is followed by the user, an assistant's by the user.
        ([("system", "assistant"), ("assistant", "user")], r"`train_dataset` .*1 of 16 rows \(row 0\).*filter"),
        ([("assistant", "assistant"), ("user", "assistant")], r"`train_dataset` .*1 of 16 rows \(row 0\)"),
    ],
)
def test_rows_of_both_roles_whose_question_does_not_tell_whose_turn_it_is_are_named(tmp_path, change, message):
    odd = [{"prompt": [say(asked, SECRET)], "completion": [say(answered, SECRET)]} for asked, answered in change]
    dataset = Dataset.from_list([*odd, *rows("user", 14)])
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path, "no/such-model", dataset)
    assert SECRET not in str(error.value)


def test_evaluation_rows_of_another_role_are_named_before_a_model_loads(tmp_path):
    with pytest.raises(ValueError, match=r"`eval_dataset` .*8 of 8 rows \(row 0, 1, 2, 3, 4\).*'user', so that turn"):
        make(tmp_path, "no/such-model", rows("user"), arguments={"eval_dataset": rows("assistant", 8)})


def test_a_template_that_cannot_open_the_users_turn_is_named_with_the_rows_and_quotes_nothing(folder_of, tmp_path):
    folder = folder_of(STRICT)
    good = [row for row in rows("user", 20) if row["prompt"][0]["role"] == "user"]
    bad = {"prompt": [say("user", SECRET)], "completion": [say("user", "abc")]}
    make(tmp_path, folder, Dataset.from_list(good))
    with pytest.raises(TurnError, match=r"Column `prompt`, rows 3: .*user's turn after 1 of 16") as error:
        make(tmp_path, folder, Dataset.from_list([*good[:3], bad, *good[3:]]))
    assert SECRET not in str(error.value)


def test_conversations_without_a_template_are_an_error_that_names_the_argument(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no chat template.*`processing_class`"):
        make(tmp_path, tiny_model_dir, rows("assistant"))
