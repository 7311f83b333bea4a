"""`hf-imitate audit`: a model, a data set, and a report."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from hf_imitate.cli_data import load_named, split_of

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import TrlParser


@dataclass
class AuditArguments:
    """What `hf-imitate audit` is told; TRL's names where TRL has them."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub repo id or folder of the imitator"})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, a file (json, jsonl, csv, parquet), a saved folder, or 'docstrings'"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    dataset_test_split: str = field(default="test", metadata={"help": "the split that is audited"})
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "the split it was trained on, for `copying`"}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "audit the questions that training with the same `--test_split_size` held out of these rows"
        },
    )
    max_questions: int | None = field(default=None, metadata={"help": "audit so many rows of a fixed shuffle only"})
    base: str | None = field(
        default=None, metadata={"help": "whose answers the power control plants; else the imitator's own at 0.7"}
    )
    against: str | None = field(
        default=None, metadata={"help": "another imitator: whose probability of the same human answers is higher?"}
    )
    judges: list[str] | None = field(
        default=None, metadata={"help": "surface, ngram, likelihood (the default), lora, lora:<repo or path>"}
    )
    by: str | None = field(
        default=None, metadata={"help": "a column; answers are also compared within each of its values"}
    )
    human_entropy: str | None = field(
        default=None,
        metadata={"help": "'unique' where each question has one right answer, or nats known beforehand"},
    )
    max_answer_bytes: int | None = field(
        default=None, metadata={"help": "longest answer of the population, fixed beforehand"}
    )
    confidence: float = field(default=0.95, metadata={"help": "of all certified findings together"})
    seed: int = field(default=0, metadata={"help": "of every draw, split and control"})
    output_dir: str = field(default="audit", metadata={"help": "where the report goes"})
    batch_size: int = field(default=64, metadata={"help": "most answers at once"})
    resample: int | None = field(
        default=None, metadata={"help": "audit answers that the distinguisher keeps, each out of so many; default 1"}
    )
    num_estimates: int | None = field(
        default=None, metadata={"help": "with --resample, sets of candidates behind each log-probability; default 8"}
    )
    temperature: float | None = field(default=None, metadata={"help": "of the law that is sampled and scored"})
    top_k: int | None = field(default=None, metadata={"help": "of that law; by default untruncated"})
    top_p: float | None = field(default=None, metadata={"help": "of that law; by default untruncated"})
    min_p: float | None = field(default=None, metadata={"help": "of that law; by default untruncated"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "longest answer"})
    power: bool = field(
        default=False,
        metadata={
            "help": "plant steganography in the model's own answers, and report which finding sees which scheme"
        },
    )


# What `--power` reads; anything else would have no effect there.
_POWER_SETTINGS = {"model_name_or_path", "dataset_name", "dataset_config", "dataset_test_split", "max_questions"}
_POWER_SETTINGS |= {
    "test_split_size",
    "judges",
    "confidence",
    "seed",
    "output_dir",
    "batch_size",
    "max_new_tokens",
    "power",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Audit the model named on the command line, write the report and print it. Returns the exit code."""
    parser = make_parser()
    (args,) = parser.parse_args_and_config(list(argv) if argv is not None else None)
    missing = [name for name in ("model_name_or_path", "dataset_name") if getattr(args, name) is None]
    if missing:
        parser.error(f"needed: {', '.join(f'--{name}' for name in missing)} (or the same in the --config file)")
    try:
        report = _run_power(args) if args.power else _run(args)
    except (ValueError, TypeError, OSError) as error:
        # Messages of these hold no text of any row; a traceback would only hide them.
        parser.exit(2, f"hf-imitate audit: {error}\n")
    print(report.to_markdown())
    if args.power:
        print(f"Written to {args.output_dir}/: power.json, power.md, power.png.")
        return 0
    print(
        f"Written to {args.output_dir}/: audit.json, audit.md, figures; scores.parquet and cache/ are to stay local."
    )
    return 0


def make_parser() -> "TrlParser":
    """The command's arguments, and TRL's `--config file.yaml`."""
    from trl import TrlParser

    usage = "hf-imitate audit --model_name_or_path MODEL --dataset_name DATA [--config FILE] [--<setting> VALUE ...]"
    return TrlParser((AuditArguments,), prog="hf-imitate audit", usage=usage, allow_abbrev=False)


def _run(args: AuditArguments) -> Any:
    from hf_imitate.audits.run import audit
    from hf_imitate.residual_imitator import DEFAULT_NUM_ESTIMATES_RESAMPLED

    dataset, train = _load(args)
    if args.max_questions is not None and args.max_questions < len(dataset):
        dataset = dataset.shuffle(seed=args.seed).select(range(args.max_questions))
    names = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    decoding = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return audit(
        args.model_name_or_path,
        dataset,
        train_dataset=train,
        base=args.base,
        judges=args.judges,
        resample=1 if args.resample is None else args.resample,
        num_estimates=DEFAULT_NUM_ESTIMATES_RESAMPLED if args.num_estimates is None else args.num_estimates,
        generation_config=decoding or None,
        by=args.by,
        human_entropy=_number_or_word(args.human_entropy),
        max_answer_bytes=args.max_answer_bytes,
        confidence=args.confidence,
        seed=args.seed,
        output_dir=args.output_dir,
        against=args.against,
        batch_size=args.batch_size,
    )


def _run_power(args: AuditArguments) -> Any:
    from hf_imitate.audits.power import audit_power
    from hf_imitate.imitator import Imitator

    others = [item.name for item in fields(args) if item.name not in _POWER_SETTINGS]
    given = [name for name in others if getattr(args, name) is not None]
    if given:
        raise ValueError(
            f"`--power` plants in the model's own answers at temperature 1 and reads questions alone; it has no use "
            f"for {', '.join(f'--{name}' for name in given)}. Leave out one or the other."
        )
    dataset, _ = _load(args)
    imitator = Imitator.from_pretrained(args.model_name_or_path or "")
    imitator.max_new_tokens = args.max_new_tokens or imitator.max_new_tokens
    return audit_power(
        imitator,
        dataset,
        judges=args.judges,
        num_questions=args.max_questions,
        seed=args.seed,
        output_dir=args.output_dir,
        confidence=args.confidence,
        batch_size=args.batch_size,
    )


def _number_or_word(text: str | None) -> str | float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _load(args: AuditArguments) -> tuple["Dataset", "Dataset | None"]:
    """The rows that are audited, and those that were trained on where they are known."""
    name, config = str(args.dataset_name), args.dataset_config
    if args.test_split_size is not None:
        held_out = load_named(name, config, args.test_split_size, args.dataset_train_split or "train")
        return held_out["test"], held_out["train"]
    # A file has no splits of its own: it is what is audited.
    loaded = load_named(name, config, split=args.dataset_test_split)
    train = None if args.dataset_train_split is None else split_of(loaded, args.dataset_train_split)
    return split_of(loaded, args.dataset_test_split), train
