"""`hf-imitate answer`: what it prints is what `Imitator.answer` draws."""

import io
import json

import pytest
from datasets import Dataset
from exact_runs import run

from hf_imitate import Imitator, cli

QUESTIONS = ["Wie geht's? 🙂", 'Say "it":']


def printed(capsys, *arguments: str) -> list[dict]:
    assert cli.main(["answer", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_any_causal_lm_answers_as_its_imitator_does_from_that_seed(tiny_model_dir, tmp_path, capsys):
    """A flag beats the file."""
    config = tmp_path / "answer.yaml"
    config.write_text(f"model_name_or_path: {tiny_model_dir}\nnum_answers: 2\nmax_new_tokens: 5\nseed: 3\n")
    found = printed(capsys, "--config", str(config), "--seed", "4", "--question", *QUESTIONS)
    expected = Imitator.from_pretrained(tiny_model_dir).answer(QUESTIONS, num_answers=2, max_new_tokens=5, seed=4)
    assert found == [{"question": q, "answers": a} for q, a in zip(QUESTIONS, expected, strict=True)]


@pytest.mark.parametrize(("asks", "answers"), [("user", "assistant"), ("assistant", "user")])
def test_an_imitator_of_conversations_is_asked_in_the_others_turn(
    asks, answers, tiny_chat_model_dir, tmp_path, capsys, monkeypatch
):
    """By lines of standard input; blank ones are no questions."""
    rows = [
        {"prompt": [{"role": asks, "content": f"Item {i}"}], "completion": [{"role": answers, "content": "abc"}]}
        for i in range(8)
    ]
    trainer = run(tmp_path, tiny_chat_model_dir, Dataset.from_list(rows))
    trainer.save_model()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["", *QUESTIONS, " "])))
    found = printed(capsys, "--model_name_or_path", str(tmp_path / "run"))
    expected = Imitator.from_pretrained(tmp_path / "run").answer(
        [[{"role": asks, "content": question}] for question in QUESTIONS]
    )
    assert [one["answers"] for one in found] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--question", "a"], "--model_name_or_path"),
        (["--model_name_or_path", "{model}"], "no question: give `--question`"),
        (["--model_name_or_path", "no/such-model", "--question", "a"], "neither a local folder nor a Hub repo"),
        (["--model_name_or_path", "{model}", "--question", "a", "--resample", "2"], "no distinguisher"),
        (["--model_name_or_path", "{model}", "--question", "a", "--num_answers", "-1"], "`num_answers`"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(arguments, said, tiny_model_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as ended:
        cli.main(["answer", *(word.format(model=tiny_model_dir) for word in arguments)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_bytes_that_are_no_text_are_no_questions(tiny_model_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["answer", "--model_name_or_path", str(tiny_model_dir)])
    assert ended.value.code == 2
    assert "'utf-8' codec can't decode" in capsys.readouterr().err
