"""The command line's first word: what it says, and what it passes on."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_imitate import cli

ROOT = Path(__file__).parent.parent


def test_help_lists_every_command_and_loads_no_torch():
    program = (
        "import sys; from hf_imitate.cli import main; code = main(['--help']); print('torch' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 0"
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert command.help in done.stdout


def test_no_command_is_a_call_for_help(capsys):
    assert cli.main([]) == 0
    assert "usage: hf-imitate <command>" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_those_that_exist(capsys):
    assert cli.main(["adversaril", "--config", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert "unknown command 'adversaril'" in said
    assert "demo, adversarial, retrodictive" in said
    assert "Did you mean `adversarial`?" in said
    assert cli.main(["latent"]) == 2  # known, and told what it lacks


def test_a_command_gets_what_follows_its_name_and_gives_the_exit_status(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "new", cli.Command("One line makes a command.", lambda argv: len(argv)))
    assert cli.main(["new", "--flag", "value", "more"]) == 3


@pytest.mark.parametrize(("ending", "status"), [(BrokenPipeError, 141), (KeyboardInterrupt, 130)])
@pytest.mark.parametrize("command", ["answer", "audit", "card"])
def test_a_reader_who_stops_and_control_c_end_without_a_traceback(ending, status, command, monkeypatch):
    """`hf-imitate answer ... | head -1` ended in a BrokenPipeError."""

    def stopped(argv):
        raise ending

    monkeypatch.setattr(f"hf_imitate.{command}_cli.main", stopped)
    assert cli.main([command]) == status
