"""Your own answers -> an imitator of whoever gave them, audited on questions it never saw, with a card.

    python examples/own_dataset.py answers.csv --question question --answer answer --model Qwen/Qwen3-0.6B
    python examples/own_dataset.py answers.jsonl --question q --answer a --answered_by "our support team"
    python examples/own_dataset.py               # writes a CSV of Python's docstrings first, and takes that
    python examples/own_dataset.py --smoke       # hardly any training: a test that it runs

One row is one question and what one person answered; questions may repeat. Nothing leaves the machine: the audit's
`scores.parquet` and `cache/`, which hold numbers and answers for each question, are never pushed either.
"""

import argparse
from pathlib import Path

import transformers
from datasets import Dataset, load_dataset
from peft import LoraConfig

from hf_imitate import (
    AuditReport,
    Imitator,
    RetrodictiveConfig,
    RetrodictiveTrainer,
    audit,
    load_docstrings,
    split_by_question,
)
from hf_imitate.hub_cards.card_file import write_card
from hf_imitate.tiny_base import tiny_base

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def main(arguments: list[str] | None = None) -> AuditReport:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help=f"one of {', '.join(BUILDERS)}")
    parser.add_argument("--question", default="question", help="name of the column")
    parser.add_argument("--answer", default="answer", help="name of the column")
    parser.add_argument("--answered_by", default="people who document Python", help="whose answers these are")
    parser.add_argument("--model", help="Hub id or directory; by default a tiny base trained here")
    parser.add_argument("--output_dir", type=Path, default=Path("my-imitator"))
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--max_questions", type=int, default=400, help="held-out rows to audit: the more, the sharper")
    parser.add_argument("--smoke", action="store_true", help="two steps, few rows")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.max_steps, given.max_questions = 2, 40
    given.output_dir.mkdir(parents=True, exist_ok=True)
    file = given.file or made_up_file(given.output_dir / "answers.csv", given.smoke)

    # 1. Rows {"prompt", "completion"}; a question is either trained on or held out, with all its answers.
    #    A CSV is read as text, so that an answer may be "None" or "042"; rows without an answer teach nothing here.
    columns = {given.question: "prompt", given.answer: "completion"}
    as_text = {"keep_default_na": False, "converters": dict.fromkeys(columns, str)} if file.suffix == ".csv" else {}
    rows = load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train", **as_text)
    rows = rows.rename_columns(columns).select_columns(["prompt", "completion"])
    whole = rows.filter(lambda row: all((text or "").strip() for text in row.values()))
    print(f"{len(rows) - len(whole)} of {len(rows)} rows left out: no question, or no answer.")
    dataset = split_by_question(whole, test_size=0.2)

    # 2. Likelihood of what people answered.
    trainer = RetrodictiveTrainer(
        model=given.model or str(tiny_base()),
        args=RetrodictiveConfig(
            output_dir=str(given.output_dir),
            max_steps=given.max_steps,
            per_device_train_batch_size=16,
            learning_rate=2e-4 if given.model else 2e-3,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset["train"],
        # A base of a million parameters has its say in its embeddings: all of its weights are trained, at ten times
        # the rate that suits an adapter of a large one.
        peft_config=LoraConfig(r=16, target_modules="all-linear") if given.model else None,
    )
    trainer.train()
    trainer.save_model()

    # 3. How do its answers differ from people's, on the questions it never saw?
    imitator = Imitator.from_pretrained(given.output_dir)
    held_out = dataset["test"].select(range(min(len(dataset["test"]), given.max_questions)))
    report = audit(
        str(given.output_dir),
        held_out,
        train_dataset=dataset["train"],
        judges=["surface"] if given.smoke else None,
        output_dir=given.output_dir / "audit",
        progress=not given.smoke,
    )

    # 4. A card that says whose answers are imitated, and what the audit found. A push would take all of it.
    card = write_card(given.output_dir, answered_by=given.answered_by)
    show(report, imitator, held_out, given)
    print(f"\nThe imitator is in {given.output_dir}, its card in {card}, the audit in {given.output_dir / 'audit'}.")
    return report


def made_up_file(path: Path, is_small: bool) -> Path:
    """Docstrings as if they were yours: a CSV with the columns `question` and `answer`."""
    rows = load_docstrings(["json", "email", "logging"] if is_small else None)
    questions, answers = rows["prompt"][:], rows["completion"][:]
    Dataset.from_dict({"question": questions, "answer": answers}).to_csv(str(path))
    return path


def show(report: AuditReport, imitator: Imitator, held_out: Dataset, given: argparse.Namespace) -> None:
    """A few findings and a few answers; the whole is in audit.md."""
    for finding in report.findings:
        if finding.name.startswith(("paired_accuracy", "bits_per_answer", "copying", "length_ratio", "sampler_match")):
            ends = "" if finding.interval is None else "  [{:.3g}, {:.3g}]".format(*finding.interval)
            value = "not measured" if finding.value is None else f"{finding.value:.3g} {finding.unit}"
            print(f"{finding.name:28} {value}{ends}")
    questions = held_out["prompt"][:3]
    for question, human, own in zip(questions, held_out["completion"], imitator.answer(questions), strict=False):
        print(f"\n{question.strip()}\n  human:    {human}\n  imitator: {own[0]}")


if __name__ == "__main__":
    main()
