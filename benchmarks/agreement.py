"""The log-probabilities we state are those that lm-evaluation-harness measures of the saved model.

The harness tokenises question and answer as one text, counts blanks at a question's end to the answer, and scores no
end token unless the text spells one. So questions here end in no blank, pairs whose ids come out otherwise in one text
are counted apart, and both are compared: the answer without its end token, and with it spelled out.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_imitate import Imitator, RetrodictiveConfig, RetrodictiveTrainer, load_docstrings, split_by_question
from hf_imitate.scoring import score_answers
from hf_imitate.tiny_base import tiny_base

TOLERANCE = 1e-4  # nats per answer, in fp32; rounding reaches 1e-5
CELLS = [{"seed": 0, "num_steps": 100, "num_pairs": 200}]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Fit a tiny base to docstrings, save it, and score held-out ones in both ways."""
    harness()  # before minutes of training
    data = load_docstrings().map(_without_blank_at_the_seam).select_columns(["prompt", "completion"])
    data = split_by_question(data, test_size=0.1, seed=cell["seed"], group_by="completion")
    with tempfile.TemporaryDirectory() as folder:
        train(str(tiny_base()), folder, data["train"], cell)
        held_out = data["test"].select(range(cell["num_pairs"]))
        return measure(folder, held_out["prompt"][:], held_out["completion"][:])


def train(model: str, folder: str, dataset: Dataset, cell: dict[str, Any]) -> None:
    """Train all weights, since the harness then reads the folder as any other model's."""
    args = RetrodictiveConfig(
        folder,
        max_steps=cell["num_steps"],
        per_device_train_batch_size=16,
        learning_rate=5e-4,
        max_length=256,
        seed=cell["seed"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = RetrodictiveTrainer(model, args, dataset)
    trainer.train()
    trainer.save_model()


def measure(folder: str | Path, questions: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Score the same pairs by [`Imitator`] and by the harness.

    Args:
        folder: an imitator of all weights.
        questions: plain text, without a blank at the end. N of them.
        answers: one to each.

    Returns:
        `dict`: per way of scoring, with and without the end token, the nats of both on pairs of equal ids; and how
        many pairs have other ids in one text.

    Raises:
        ModuleNotFoundError: lm-evaluation-harness is not installed.
        ValueError: a question ends in a blank.
    """
    if blank := [i for i, question in enumerate(questions) if question != question.rstrip()]:
        raise ValueError(
            f"{len(blank)} of {len(questions)} questions ({str(blank[:5])[1:-1]}) end in a blank, which the harness "
            "counts to the answer. Let the answer begin with it."
        )
    model, request = harness()
    imitator = Imitator.from_pretrained(str(folder), device="cpu")
    rows = imitator.renderer.human(list(questions), list(answers))
    whole = [imitator.tokenizer(q + a)["input_ids"] for q, a in zip(questions, answers, strict=True)]
    same = [i for i, row in enumerate(rows) if row.prompt_ids + row.answer_ids[:-1] == whole[i]]
    open_ended = [row._replace(answer_ids=row.answer_ids[:-1], ended=False) for row in (rows[i] for i in same)]
    ours = {
        "without end": score_answers(imitator.model, open_ended, imitator.tokenizer.pad_token_id or 0),
        "with end": imitator.log_prob([questions[i] for i in same], [answers[i] for i in same]).nats,
    }
    ends = {"without end": "", "with end": imitator.tokenizer.eos_token}
    judge = model(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    nats = {}
    for way, end in ends.items():
        pairs = [
            request("loglikelihood", {}, (questions[i], answers[i] + end), number) for number, i in enumerate(same)
        ]
        theirs = [found for found, _ in judge.loglikelihood(pairs, disable_tqdm=True)]
        nats[way] = {"ours": ours[way].tolist(), "theirs": theirs}
    return {"num_pairs": len(rows), "num_other_ids": len(rows) - len(same), "nats": nats}


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The largest difference per answer; the claim holds where all stay within rounding."""
    table = []
    for entry in results:
        result = entry["result"]
        for way, nats in result["nats"].items():
            differences = [abs(a - b) for a, b in zip(nats["ours"], nats["theirs"], strict=True)]
            table.append(
                {
                    "scored": way,
                    "pairs": len(differences),
                    "other_ids": result["num_other_ids"],
                    "mean_nats": sum(nats["ours"]) / len(differences),
                    "max_difference": max(differences),
                }
            )
    return table, all(row["max_difference"] < TOLERANCE for row in table)


def harness() -> tuple[Any, Any]:
    """The harness's model and its request.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"This entry compares with lm-evaluation-harness, and {error.name!r} is not installed: `pip install "
            "lm_eval`.",
            name=error.name,
        ) from error
    return HFLM, Instance


def _without_blank_at_the_seam(row: dict[str, Any]) -> dict[str, Any]:
    question = row["prompt"].rstrip()
    return {"prompt": question, "completion": row["prompt"][len(question) :] + row["completion"]}
