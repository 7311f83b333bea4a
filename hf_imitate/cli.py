"""`hf-imitate <command>`: the shell's way in, with TRL's conventions.

Training commands take `--config file.yaml`, every config field as a flag (a flag beats the file), and the options of
`accelerate launch`. A new command is one line in `COMMANDS`. Heavy imports wait until a command needs them.
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple


class Command(NamedTuple):
    """
    One word after `hf-imitate`.

    Args:
        help (`str`):
            One line for `hf-imitate --help`.
        run (`Callable[[list[str]], int]`):
            Gets the arguments after the command's name, returns the exit status.
    """

    help: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command of `hf-imitate`.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments after the program's name; by default those of this process.

    Returns:
        `int`: the exit status; 2 if the arguments make no sense, said on standard error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from hf_imitate import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        print(f"hf-imitate: unknown command {name!r}; there are: {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
        return 2
    return COMMANDS[name].run(rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: hf-imitate <command> [options]", "", "commands:", *lines, "",
                      "`hf-imitate <command> --help` shows the options of a command."])  # fmt: skip


def _printing(run: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a command that prints what it found: who stops it, or stops reading as `| head -1` does, meets no error."""
    try:
        status = run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # what is left would be flushed at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _demo(argv: list[str]) -> int:
    from hf_imitate.demo import main as run_demo

    return run_demo(argv) or 0


def _answer(argv: list[str]) -> int:
    from hf_imitate.answer_cli import main as run_answer

    return run_answer(argv)


def _audit(argv: list[str]) -> int:
    from hf_imitate.audit_cli import main as run_audit

    return run_audit(argv)


def _card(argv: list[str]) -> int:
    from hf_imitate.card_cli import main as run_card

    return run_card(argv)


def _train(name: str, argv: list[str]) -> int:
    from hf_imitate.train_cli import train

    return train(name, argv)


COMMANDS: dict[str, Command] = {
    "demo": Command("Train and judge a small imitator of real text, here and now, without the network.", _demo),
    "adversarial": Command(
        "Train an imitator against a distinguisher (AdversarialTrainer).", partial(_train, "adversarial")
    ),
    "retrodictive": Command(
        "Train an imitator on the log-probability of the answers (RetrodictiveTrainer).",
        partial(_train, "retrodictive"),
    ),
    "latent": Command(
        "Train an imitator that thinks before it answers (LatentRetrodictiveTrainer).", partial(_train, "latent")
    ),
    "answer": Command("Ask an imitator: answers drawn by its law, as JSON.", partial(_printing, _answer)),
    "audit": Command(
        "Audit any causal LM against what people answered; every claim with a confidence.", partial(_printing, _audit)
    ),
    "card": Command(
        "Write a folder's card again from its own files; --merge writes weights without PEFT.",
        partial(_printing, _card),
    ),
}
"""Every command, by the word that calls it."""


if __name__ == "__main__":
    raise SystemExit(main())
