"""What an audit looks at, written by hand: N rows with the scores a test wants."""

from typing import Any

import numpy as np

from hf_imitate.audits.evidence import AnswerScores, Evidence
from hf_imitate.rendering import Answer


def scores(nats, num_tokens=5, is_cut=()) -> AnswerScores:
    nats = np.asarray(nats, dtype=float)
    cut = np.isin(np.arange(len(nats)), list(is_cut))
    zeros = np.zeros(len(nats))
    tokens = np.broadcast_to(np.asarray(num_tokens), nats.shape)
    return AnswerScores(nats, nats, tokens, zeros, zeros, zeros, cut)


def evidence_of(
    nats, imitator_nats=None, texts=None, imitator_texts=None, question=None, cut=(), imitator_cut=(), **fields: Any
) -> Evidence:
    """`nats` of the human answers; by default each row is a question of its own and every text is four bytes long."""
    num_rows = len(nats)
    texts = ["abcd"] * num_rows if texts is None else texts
    imitator_texts = ["abcd"] * num_rows if imitator_texts is None else imitator_texts
    question = np.arange(num_rows) if question is None else np.asarray(question)
    human_tokens, imitator_tokens = fields.pop("num_tokens", (5, 5))
    defaults: dict[str, Any] = {
        "prompts": [f"question {number}" for number in question],
        "weight": np.ones(num_rows),
    }
    return Evidence(
        question=question,
        human_answers=[Answer(text, row not in cut) for row, text in enumerate(texts)],
        imitator_answers=[Answer(text, row not in imitator_cut) for row, text in enumerate(imitator_texts)],
        human=scores(nats, human_tokens, cut),
        imitator=scores(nats if imitator_nats is None else imitator_nats, imitator_tokens, imitator_cut),
        **{**defaults, **fields},
    )


def by_name(findings) -> dict:
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    return named
