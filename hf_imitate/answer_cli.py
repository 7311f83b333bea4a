"""`hf-imitate answer`: questions in, answers out, one line of JSON to a question."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class AnswerArguments:
    """What `hf-imitate answer` is told; TRL's names where TRL has them."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub repo id or folder of the imitator"})
    question: list[str] | None = field(
        default=None, metadata={"help": "one or several; default: the lines of standard input"}
    )
    num_answers: int = field(default=1, metadata={"help": "answers to each question"})
    seed: int = field(default=0, metadata={"help": "another seed, other answers"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "longest answer; default: the trained law's"})
    resample: int = field(default=1, metadata={"help": "keep one of so many draws, by the distinguisher beside it"})
    batch_size: int = field(default=64, metadata={"help": "most answers at once"})


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the imitator named on the command line and print its answers. Returns the exit code."""
    parser = make_parser()
    (args,) = parser.parse_args_and_config(list(argv) if argv is not None else None)
    if args.model_name_or_path is None:
        parser.error("needed: --model_name_or_path (or the same in the --config file)")
    try:
        questions = args.question or [line for line in map(str.strip, sys.stdin) if line]
        if not questions:
            parser.error("no question: give `--question`, or lines on standard input")
        answers = _ask(questions, args)
    except (ValueError, TypeError, OSError) as error:
        # Messages of these hold no text of any question; a traceback would only hide them.
        parser.exit(2, f"hf-imitate answer: {error}\n")
    for question, drawn in zip(questions, answers, strict=True):
        print(json.dumps({"question": question, "answers": drawn}, ensure_ascii=False))
    return 0


def make_parser() -> "TrlParser":
    """The command's arguments, and TRL's `--config file.yaml`."""
    from trl import TrlParser

    usage = "hf-imitate answer --model_name_or_path MODEL --question TEXT [TEXT ...] [--<setting> VALUE ...]"
    return TrlParser((AnswerArguments,), prog="hf-imitate answer", usage=usage, allow_abbrev=False)


def _ask(questions: Sequence[str], args: AnswerArguments) -> list[list[str]]:
    from hf_imitate.causal_lm import repo_folder
    from hf_imitate.hub_cards.card_file import FACTS_FILE, read_facts
    from hf_imitate.imitator import Imitator

    folder = repo_folder(args.model_name_or_path or "")
    imitator = Imitator.from_pretrained(folder)
    # A model that was trained elsewhere has no such file, and is asked in plain text.
    is_conversational = (folder / FACTS_FILE).is_file() and read_facts(folder).is_conversational
    asks = "assistant" if imitator.renderer.completion_role == "user" else "user"
    given: list[Any] = [[{"role": asks, "content": text}] if is_conversational else text for text in questions]
    return imitator.answer(
        given,
        num_answers=args.num_answers,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        resample=args.resample,
    )
