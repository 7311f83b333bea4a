"""Judges: distinguishers trained afresh for an audit, from pairs labelled human and imitator."""

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from peft import PeftConfig
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedModel

from hf_imitate.classifier import default_peft_config
from hf_imitate.distinguisher import Distinguisher, fit
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer
from hf_imitate.rows import question_key

# (questions, answers) -> scores, high means human. [N]
Scorer = Callable[[list, list[Answer]], np.ndarray]
# (training pairs, validation pairs, seed) -> scorer. Both are shown with labels; the test pairs are not.
Judge = Callable[[list[Pair], list[Pair], int], Scorer]

REGULARISATIONS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
_WORD = re.compile(r"\w+|[^\w\s]")
# Shown to the n-grams, so that an answer's first and last characters and its ending are features like any other.
_START, _ENDED, _CUT = "\x02", "\x03", "\x04"


def ngram_judge(train: list[Pair], valid: list[Pair], seed: int = 0) -> Scorer:
    """A linear judge of character and word n-grams, length, ending, repetition and overlap with the question.

    Fitted by logistic regression without intercept on the differences human minus imitator within pairs (Bradley and
    Terry's model); the regularisation with the smallest loss on `valid` is taken. It needs no model, and seconds.

    Args:
        train (`list[Pair]`): pairs to fit.
        valid (`list[Pair]`): pairs that choose the regularisation.
        seed (`int`, *optional*, defaults to `0`): nothing here is random.

    Returns:
        `Scorer`.
    """
    features = _NgramFeatures(train)
    differences, weights = features.differences(train)
    # A feature on which no training pair differs keeps the coefficient 0; most of the hashed ones are such.
    columns = np.unique(differences.indices)
    differences = sparse.csr_array(differences[:, columns])
    valid_differences, valid_weights = features.differences(valid)
    valid_differences = sparse.csr_array(valid_differences[:, columns])
    # The loss of a difference labelled 1 is that of its negative labelled 0; the solver wants to see both labels.
    signs = np.where(np.arange(len(weights)) % 2 == 0, 1.0, -1.0)
    signed = sparse.csr_array(differences.multiply(signs[:, None]))
    best_loss, best = math.inf, np.zeros(len(columns))
    for regularisation in REGULARISATIONS:
        model = LogisticRegression(C=regularisation, fit_intercept=False, max_iter=2000)
        coefficients = model.fit(signed, signs > 0, sample_weight=weights).coef_[0]
        loss = float(np.average(np.logaddexp(0, -(valid_differences @ coefficients)), weights=valid_weights))
        if loss < best_loss:
            best_loss, best = loss, coefficients
    return lambda prompts, answers: features.describe(prompts, answers)[:, columns] @ best


def lora_judge(
    base: str | PreTrainedModel,
    tokenizer: Any = None,
    peft_config: PeftConfig | None = None,
    *,
    full: bool = False,
    num_steps: int = 400,
    batch_size: int = 32,
    learning_rate: float | None = None,
    progress: bool = False,
) -> Judge:
    """A judge that starts from a language model's weights and is fine-tuned for the purpose.

    Args:
        base (`str` or `PreTrainedModel`): repo id, path or causal LM; a loaded one is copied, never changed. A base
            that shares the imitator's weights shares its blind spots.
        tokenizer (*optional*): the base's tokenizer; loaded with it if `base` is a string.
        peft_config (`PeftConfig`, *optional*): the adapter; LoRA of rank 16, alpha 32, on all linear layers.
        full (`bool`, *optional*, defaults to `False`): train all weights instead; for tiny bases.
        num_steps (`int`, *optional*, defaults to `400`): most updates; the weights best on the validation pairs stay.
        batch_size (`int`, *optional*, defaults to `32`): pairs per update.
        learning_rate (`float`, *optional*): defaults to 1e-3 for an adapter, 5e-4 for all weights.
        progress (`bool`, *optional*, defaults to `False`): show a bar.

    Returns:
        `Judge`.

    Raises:
        ValueError: both `full` and a `peft_config` are given, or a loaded base comes without tokenizer.
    """
    if full and peft_config is not None:
        raise ValueError("`full=True` trains all weights and `peft_config` an adapter; give one of the two.")
    if tokenizer is None and not isinstance(base, str):
        raise ValueError("A loaded `base` needs its `tokenizer`; pass it, or pass the base as a repo id or path.")
    config = None if full else peft_config or default_peft_config()
    rate = learning_rate or (5e-4 if full else 1e-3)

    def train_judge(train: list[Pair], valid: list[Pair], seed: int) -> Scorer:
        distinguisher = Distinguisher.from_causal_lm(base, tokenizer, peft_config=config, seed=seed)
        settings: dict[str, Any] = {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": rate}
        fit(distinguisher, train, valid, **settings, seed=seed, progress=progress)
        return lambda prompts, answers: distinguisher.score(prompts, answers).double().cpu().numpy()

    return train_judge


class _NgramFeatures:
    """Sparse features of (question, answer); scales and the known whole answers come from the training pairs."""

    def __init__(self, train: Sequence[Pair]):
        hashing: dict[str, Any] = {"n_features": 2**18, "alternate_sign": False, "lowercase": False, "norm": "l2"}
        self.characters = HashingVectorizer(analyzer="char", ngram_range=(1, 4), **hashing)
        self.words = HashingVectorizer(analyzer=_word_ngrams, **hashing)
        # An answer that occurs in one pair only would let the judge learn that pair by heart.
        counts = Counter(
            key
            for pair in train
            for key in {k for answer in (pair.human, *pair.imitator) for k in _whole_answers(pair.prompt, answer)}
        )
        self.known = {key: i for i, key in enumerate(key for key, count in counts.items() if count > 1)}
        sides = [(pair.prompt, answer) for pair in train for answer in (pair.human, pair.imitator[0])]
        dense = np.array([_dense_features(*side) for side in sides])
        self.center, self.scale = dense.mean(axis=0), dense.std(axis=0)
        self.scale[self.scale == 0] = 1.0

    def describe(self, prompts: Sequence[str | list], answers: Sequence[Answer]) -> sparse.csr_array:
        """One row per answer."""
        both = list(zip(prompts, answers, strict=True))
        marked = [f"{_START}{answer.text}{_ENDED if answer.ended else _CUT}" for answer in answers]
        dense = (np.array([_dense_features(*pair) for pair in both]) - self.center) / self.scale
        places = [
            (row, self.known[key])
            for row, pair in enumerate(both)
            for key in _whole_answers(*pair)
            if key in self.known
        ]
        rows, columns = zip(*places, strict=True) if places else ((), ())
        whole = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(both), max(len(self.known), 1)))
        blocks = [
            self.characters.transform(marked),
            self.words.transform(marked),
            sparse.csr_array(np.clip(dense, -5, 5) / 2),
            whole,
        ]
        return sparse.csr_array(sparse.hstack(blocks))

    def differences(self, pairs: Sequence[Pair]) -> tuple[sparse.csr_array, np.ndarray]:
        """Human minus imitator for every comparison, and its weight: a pair's weight is shared by its generations."""
        rows = self.describe(*_flatten(pairs))
        humans = np.cumsum([0, *(1 + len(pair.imitator) for pair in pairs[:-1])])
        sizes = [len(pair.imitator) for pair in pairs]
        human_of = np.repeat(humans, sizes)
        imitators = np.setdiff1d(np.arange(rows.shape[0]), humans)
        mean_weight = np.mean([pair.weight for pair in pairs])  # the scale of the weights must not act on the penalty
        weights = np.repeat([pair.weight / len(pair.imitator) / mean_weight for pair in pairs], sizes)
        return sparse.csr_array(rows[human_of] - rows[imitators]), weights


def _flatten(pairs: Sequence[Pair]) -> tuple[list, list[Answer]]:
    """Questions and answers, each pair's human first and then the imitator's."""
    prompts = [pair.prompt for pair in pairs for _ in range(1 + len(pair.imitator))]
    return prompts, [answer for pair in pairs for answer in (pair.human, *pair.imitator)]


def _whole_answers(prompt: str | list, answer: Answer) -> Iterator[Hashable]:
    yield (answer.text.strip(), answer.ended)
    yield (question_key(prompt), answer.text.strip(), answer.ended)


def _word_ngrams(marked: str) -> Iterator[str]:
    words = [marked[0], *_WORD.findall(marked[1:-1]), marked[-1]]
    for size in (1, 2, 3):
        for start in range(len(words) - size + 1):
            yield " ".join(words[start : start + size])


def _dense_features(prompt: str | list, answer: Answer) -> list[float]:
    question = (
        prompt if isinstance(prompt, str) else "\n".join(str(message.get("content") or "") for message in prompt)
    )
    words = [word.lower() for word in _WORD.findall(answer.text)]
    asked = {word.lower() for word in _WORD.findall(question)}
    distinct, bigrams = set(words), list(pairwise(words))
    num_repeated_in_a_row = sum(first == second for first, second in bigrams)
    return [
        math.log1p(len(answer.text)),
        math.log1p(len(words)),
        float(answer.ended),
        sum(word in asked for word in words) / max(len(words), 1),
        len(distinct & asked) / max(len(asked), 1),
        1 - len(distinct) / max(len(words), 1),
        1 - len(set(bigrams)) / max(len(bigrams), 1),
        math.log1p(num_repeated_in_a_row),
        float(bool(answer.text.strip()) and answer.text.strip() in question),
    ]
