"""What a linear distinguisher sees of an answer: hashed n-grams, length, and how much of the question it repeats."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

from hf_imitate.rendering import Answer

NUM_BUCKETS = 2**17  # of each of the two hashed blocks
MOST_WORDS = 63  # longer answers share a length
DENSE_NAMES = (
    *("constant", "ended", "log_characters", "log_words", "share_from_question", "share_of_question", "repetition"),
    *(f"words_{count}" for count in range(MOST_WORDS + 1)),
)
NUM_FEATURES = 2 * NUM_BUCKETS + len(DENSE_NAMES)

_WORD = re.compile(r"\w+|[^\w\s]")
_START, _END, _CUT = "\x02", "\x03", "\x04"  # an answer that was cut has another end
_HASHING = {"n_features": NUM_BUCKETS, "alternate_sign": False, "lowercase": False, "norm": "l2"}


class _Marked(NamedTuple):
    """An answer's text with its ends made visible."""

    text: str
    end: str


def ngram_features(prompts: Sequence[str | list], answers: Sequence[Answer]) -> sparse.csr_array:
    """Features of answers: character 1- to 4-grams, word 1- to 3-grams, length, overlap with the question.

    Each hashed block has Euclidean norm 1 (0 where there is no n-gram), so an answer's length is told by the features
    that are about it. Hashes are sklearn's (MurmurHash3), the same on every machine.

    Args:
        prompts: questions, plain or messages. N.
        answers: one to each.

    Returns:
        [N, NUM_FEATURES], fp32: characters, words, then `DENSE_NAMES`.
    """
    marked = [_Marked(answer.text, _END if answer.ended else _CUT) for answer in answers]
    blocks = [
        HashingVectorizer(analyzer=_characters, dtype=np.float32, **_HASHING).transform(marked),
        HashingVectorizer(analyzer=_words, dtype=np.float32, **_HASHING).transform(marked),
        np.array([dense_features(*pair) for pair in zip(prompts, answers, strict=True)], dtype=np.float32),
    ]
    return sparse.csr_array(sparse.hstack(blocks, format="csr", dtype=np.float32))


def dense_features(prompt: str | list, answer: Answer) -> list[float]:
    """Length and overlap of one answer, in the order of `DENSE_NAMES`; all between about 0 and 2."""
    question = prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)
    words = [word.lower() for word in _WORD.findall(answer.text)]
    asked, used = {word.lower() for word in _WORD.findall(question)}, set(words)
    lengths = [0.0] * (MOST_WORDS + 1)
    lengths[min(len(words), MOST_WORDS)] = 1.0
    return [
        1.0,
        float(answer.ended),
        math.log1p(len(answer.text)) / 4,
        math.log1p(len(words)) / 2,
        sum(word in asked for word in words) / max(len(words), 1),
        len(used & asked) / max(len(asked), 1),
        1 - len(used) / max(len(words), 1),
        *lengths,
    ]


def _characters(marked: _Marked) -> Iterator[str]:
    text = f"{_START}{marked.text}{marked.end}"
    for size in (1, 2, 3, 4):
        for start in range(len(text) - size + 1):
            yield text[start : start + size]


def _words(marked: _Marked) -> Iterator[str]:
    words = [_START, *_WORD.findall(marked.text), marked.end]
    for size in (1, 2, 3):
        for start in range(len(words) - size + 1):
            yield " ".join(words[start : start + size])
