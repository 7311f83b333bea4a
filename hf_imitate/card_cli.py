"""`hf-imitate card`: a folder's README.md written again from its own files, and its weights without PEFT."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import HfArgumentParser

_COPIED = ("imitation.json", "generation_config.json")
_SECOND_MODELS = ("distinguisher", "retrodictor")
_LEFT = shutil.ignore_patterns("cache", "scores.parquet")  # of an audit: answers, and numbers per question


@dataclass
class CardArguments:
    """What `hf-imitate card PATH` is told. What is said once is kept in `imitation.json`."""

    merge: str | None = field(
        default=None, metadata={"help": "also write plain weights, without PEFT, into this new folder"}
    )
    model_name: str | None = field(default=None, metadata={"help": "name at the top of the card"})
    repo_id: str | None = field(default=None, metadata={"help": "owner/name that the card's code loads"})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or name of the data set"})
    answered_by: str | None = field(default=None, metadata={"help": "whose answers the data set holds, in words"})
    license: str | None = field(default=None, metadata={"help": "licence of the weights: the Hub's id, or a name"})
    question: list[str] | None = field(
        default=None,
        metadata={"help": "ask the imitator and show its answers; they become public with the card. Default: none"},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-imitate card PATH [options]`. Returns the exit code; 2 for input that cannot be used."""
    parsed = make_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    try:
        for line in _run(Path(parsed.path), parsed):
            print(line)
    except (ValueError, OSError) as error:
        print(f"hf-imitate card: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> "HfArgumentParser":
    """The command's arguments."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(CardArguments, prog="hf-imitate card", description=__doc__)
    parser.add_argument("path", help="a trainer's output_dir, or a downloaded repo")
    return parser


def _run(folder: Path, asked: Any) -> list[str]:
    from hf_imitate.hub_cards.card_file import read_facts, write_card

    changes = {
        name: getattr(asked, name)
        for name in ("model_name", "repo_id", "dataset_name", "answered_by", "license")
        if getattr(asked, name) is not None
    }
    if asked.question:
        facts = read_facts(folder)
        changes["samples"] = _ask(folder, asked.question, facts.asks_as if facts.is_conversational else None)
    lines = [f"Wrote {write_card(folder, **changes)}."]
    if asked.merge is not None:
        target = Path(asked.merge)
        difference = merge(folder, target)
        lines.append(f"Wrote plain weights to {target}; its logits differ by at most {difference:.2g}.")
        lines += [
            f"Left out {name}/: it is an adapter on a local folder, which nobody else has."
            for name in _SECOND_MODELS
            if (folder / name).is_dir() and not (target / name).is_dir()
        ]
    return lines


def _ask(folder: Path, questions: Sequence[str], role: str | None) -> tuple[Any, ...]:
    from hf_imitate.hub_cards.facts import Sample
    from hf_imitate.imitator import Imitator

    imitator = Imitator.from_pretrained(folder)
    given: list[Any] = [[{"role": role, "content": text}] if role else text for text in questions]
    answers = imitator.answer(given, seed=0)
    return tuple(Sample(question, drawn[0]) for question, drawn in zip(questions, answers, strict=True))


def merge(folder: str | Path, target: str | Path) -> float:
    """Write an imitator as plain weights, for people without PEFT, with its law, its second models and its card.

    A second model whose base is a local folder is left out, and the card says so: nobody else could load it.

    Args:
        folder (`str` or `Path`):
            Holds the imitator as an adapter.
        target (`str` or `Path`):
            A folder that is not there yet, or is empty.

    Returns:
        `float`: the largest difference between the logits of both on one fixed sequence; adding an adapter to weights
        rounds.

    Raises:
        FileNotFoundError: `folder` holds no imitator.
        ValueError: its weights are plain already, or `target` holds files.
    """
    from peft import PeftModel

    from hf_imitate.causal_lm import load_causal_lm, repo_folder
    from hf_imitate.hub_cards.card_file import FACTS_FILE, has_stale_audit, read_facts, write_card, write_facts
    from hf_imitate.hub_cards.push import local_bases

    source, target = repo_folder(Path(folder)), Path(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} holds files, and nothing is overwritten. Name a new folder.")
    facts = read_facts(source)
    model, tokenizer = load_causal_lm(source, "cpu")
    if not isinstance(model, PeftModel):
        raise ValueError(f"{source} holds plain weights already, so there is nothing to merge.")
    before = _logits(model)
    try:
        plain = model.merge_and_unload()
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"An adapter of the kind {model.active_peft_config.peft_type} cannot be added to weights; load it by PEFT."
        ) from error
    difference = (before - _logits(plain)).abs().max().item()
    target.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    adapters = [path.relative_to(source).as_posix() for path in source.rglob("adapter_config.json")]
    left_out = {name.partition("/")[0] for name in local_bases(source, adapters)} & set(_SECOND_MODELS)
    for name in (*_SECOND_MODELS, *(() if has_stale_audit(source) else ("audit",))):
        if (source / name).is_dir() and name not in left_out:
            shutil.copytree(source / name, target / name, ignore=_LEFT)
    if "retrodictor" in left_out:
        stored = json.loads((source / FACTS_FILE).read_text(encoding="utf-8"))
        write_facts(target, {**stored, "has_retrodictor": False})
    absent = [f"Its {name} was left out: it is an adapter on a local folder." for name in sorted(left_out)]
    note = (
        f"Its adapter was added to its base's weights, which rounds: logits differ by up to {difference:.2g} from "
        "those of the adapter. An audit shown here was made of the adapter."
    )
    write_card(target, model_name=target.name, repo_id=None, limits=(*facts.limits, *absent, note))
    return difference


def _logits(model: Any) -> "torch.Tensor":
    import torch

    ids = torch.arange(min(64, model.config.vocab_size))[None]
    with torch.no_grad():
        return model(input_ids=ids).logits.float()
