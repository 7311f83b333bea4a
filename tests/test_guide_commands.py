"""The commands that the guide names are commands, with the options and files that it gives them."""

import contextlib
import importlib
import io
import itertools
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import guide_worlds
import pytest

from benchmarks.acceptance import entry_names
from hf_imitate import answer_cli, audit_cli, card_cli, cli, train_cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in ("style", "house")]
PAGES += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
_NAMED = re.compile(
    r"(?<!`)`((?:hf-imitate|python|make|pip|trl|accelerate|examples/\w+\.py) [^`]*)`|^ {4}(hf-imitate .*)$", re.M
)


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of each: in shell blocks, between backticks, indented."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = ["".join(groups).replace("\n", " ") for groups in _NAMED.findall(text)]
        in_blocks = [block.text for block in guide_worlds.blocks(page) if block.info == ["bash"]]
        found += [(page.name, words) for part in (*in_blocks, *named) for words in guide_worlds.commands(part)]
    return found


def check(words: list[str]) -> None:
    """Raise an error where a command or one of its options does not exist; those of strangers pass."""
    program, *rest = words
    if program == "hf-imitate":
        check_ours(*rest)
    elif program == "make":
        check_make(*rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "trl":
        assert find_spec(f"trl.scripts.{rest[0]}")
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert options(rest) <= set(launch_command_parser()._option_string_actions)
    elif program.startswith("examples/"):
        check_script(program.removesuffix(".py").replace("/", "."), rest)
    elif program == "python" and rest[0] == "-m":
        check_script(rest[1], rest[2:])
    elif program == "python" and rest[0].startswith("examples/"):
        check(rest)
    elif program == "python":
        assert (ROOT / rest[0]).is_file()


def options(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def check_ours(name: str, *rest: str) -> None:
    """By the command's own parser, which reads the file of settings, too."""
    if name not in train_cli.TRAINERS:
        assert name in cli.COMMANDS
        if rest:
            {"answer": answer_cli, "audit": audit_cli, "card": card_cli}[name].make_parser().parse_args(rest)
        return
    parser = train_cli.make_parser(name)
    *_, from_file, from_line = parser.parse_args_and_config(
        list(rest), return_remaining_strings=True, separate_remaining_strings=True
    )
    train_cli._launch_arguments(parser, from_file, from_line)


def check_make(target: str, *rest: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    assert {word.removeprefix("ONLY=") for word in rest} <= set(entry_names())


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= set(extras)
    assert all((ROOT / after).is_file() for word, after in itertools.pairwise(words) if word == "-c")


def check_script(module: str, words: list[str]) -> None:
    """Its help, asked for after these words, names their options."""
    status = None
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            importlib.import_module(module).main([*words, "--help"])
        except SystemExit as ended:
            status = ended.code
    assert status == 0
    assert options(words) <= set(re.findall(r"--[\w-]+", shown.getvalue()))


def test_commands_take_their_options(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    wrong, seen = {}, set()
    for page, words in commands():
        # Such as `hf-imitate <command>`, and files of the reader's.
        if not re.search(r"[<{]|\.\.\.|file\.yaml", line := shlex.join(words)) and line not in seen:
            seen.add(line)
            try:
                check(words)
            except (Exception, SystemExit) as error:
                wrong[f"{page}: {line}"] = f"{type(error).__name__}: {error}"
    assert wrong == {}
    assert len(seen) > 40, sorted(seen)


@pytest.mark.parametrize(
    "line",
    [
        "hf-imitate retrodicitve",
        "hf-imitate retrodictive --num_train_epoch 3",
        "hf-imitate latent --config examples/laten.yaml",
        "hf-imitate audit --model me/me-imitator",
        "hf-imitate card me-imitator --licence mit",
        "make acceptance ONLY=sudok",
        "make tests",
        "pip install -c constraints.txt '.[plot]'",
        "python examples/own_dataset.py answers.csv --questions question",
        "python -m benchmarks.contest run --hours 1",
        "python docs/memry.py",
        "accelerate launch --cpus",
        "trl sftt",
    ],
)
def test_a_wrong_command_is_seen(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, OSError, SystemExit)):
        check(shlex.split(line))


def test_the_contract_lists_the_commands_there_are():
    (listed,) = re.findall(r"`hf-imitate \{(.*?)\}`", (ROOT / "docs" / "contract.md").read_text(encoding="utf-8"))
    assert listed.split(", ") == list(cli.COMMANDS)
