"""Worlds for the tests of audits: answers of two authors whose laws are known, and what an audit sees of them."""

import numpy as np

from hf_imitate.audits.evidence import AnswerScores, Evidence
from hf_imitate.rendering import Answer

WORDS = [f"w{number}" for number in range(40)]


def word_answers(rng: np.random.Generator, num: int, shift: float = 0.0, length: int = 8) -> list[Answer]:
    """Answers of independent words; `shift` moves that much probability from the last word to the first."""
    p = np.full(len(WORDS), 1 / len(WORDS))
    p[0] += shift
    p[1:] -= shift / (len(WORDS) - 1)
    return [Answer(" ".join(words), True) for words in rng.choice(WORDS, size=(num, length), p=p)]


def scores_of(nats: np.ndarray, num_tokens: int = 8, is_cut: np.ndarray | None = None) -> AnswerScores:
    """Scores with these log-probabilities, all else alike."""
    n = len(nats)
    same = np.full(n, float(num_tokens))
    cut = np.zeros(n, bool) if is_cut is None else is_cut
    return AnswerScores(nats, nats, np.full(n, num_tokens), same, same, same, cut)


def make_evidence(
    human: list[Answer],
    imitator: list[Answer],
    questions: list[str] | None = None,
    weight: np.ndarray | None = None,
    **fields,
) -> Evidence:
    """Evidence of two lists of answers; log-probabilities are standard normal noise, the same law on both sides."""
    n = len(human)
    questions = [f"question {number}" for number in range(n)] if questions is None else questions
    places = {question: place for place, question in enumerate(dict.fromkeys(questions))}
    rng = np.random.default_rng(99)
    return Evidence(
        prompts=questions,
        question=np.array([places[question] for question in questions]),
        human_answers=human,
        imitator_answers=imitator,
        human=scores_of(rng.normal(-20, 3, n)),
        imitator=scores_of(rng.normal(-20, 3, n)),
        weight=np.ones(n) if weight is None else weight,
        **fields,
    )


def evidence_of_words(num: int, seed: int, shift: float = 0.0) -> Evidence:
    """Independent word answers to `num` questions; the imitator's law is shifted."""
    rng = np.random.default_rng(seed)
    return make_evidence(word_answers(rng, num), word_answers(rng, num, shift))
