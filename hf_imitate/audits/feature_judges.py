"""Judges of a few numbers per answer: its format, and what the imitator's own law says of it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from hf_imitate.audits.evidence import AnswerScores
from hf_imitate.audits.judges import REGULARISATIONS, Judge, Scorer
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer
from hf_imitate.rows import question_key
from hf_imitate.surface import surface_features

# What one answer's features are called by: equal questions with equal answers have equal features.
AnswerKey = tuple[str, Answer]

_CLIPPED = 6.0  # standard deviations: one odd answer must not fix a coefficient
_LOWEST = -1e4  # nats, in place of -inf, which has a feature of its own


def surface_judge(train: list[Pair], valid: list[Pair], seed: int = 0) -> Scorer:
    """A linear judge of format alone: length, ending, whitespace, Unicode ([`~hf_imitate.surface.surface_features`]).

    What it sees, every other judge could see as well: where it tells the sides apart, look at the format first.

    Args:
        train (`list[Pair]`): pairs to fit.
        valid (`list[Pair]`): pairs that choose the regularisation.
        seed (`int`, *optional*, defaults to `0`): nothing here is random.

    Returns:
        `Scorer`.
    """
    return _fit(train, valid, lambda prompt, answer: surface_features(answer.text, answer.ended))


def likelihood_judge(features: Mapping[AnswerKey, np.ndarray]) -> Judge:
    """A linear judge of what the imitator's own law says: log p, entropy, rank, and how usual its choices were.

    Each feature enters by itself and squared: sampled answers can be too usual as well as too unusual.

    Args:
        features (`Mapping[AnswerKey, np.ndarray]`): [`likelihood_features`] of every answer that will be judged, by
            [`answer_key`].

    Returns:
        `Judge`.

    Source:
        Bao et al., "Fast-DetectGPT", https://huggingface.co/papers/2310.05130, for (log p - mean) / sd; Su et al.,
        "DetectLLM", https://huggingface.co/papers/2306.05540, for the rank.
    """

    def train_judge(train: list[Pair], valid: list[Pair], seed: int) -> Scorer:
        return _fit(train, valid, lambda prompt, answer: features[answer_key(prompt, answer)])

    return train_judge


def answer_key(prompt: str | list, answer: Answer) -> AnswerKey:
    """What an answer's features are stored under."""
    return question_key(prompt), answer


def likelihood_features(scores: AnswerScores) -> np.ndarray:
    """Features of each answer under the audited law. [N, 12], finite.

    Per token and in sum: log p, entropy, log(1 + rank); the sum of log p minus its mean under the law, over the
    standard deviation (Fast-DetectGPT's statistic), and per token; number of tokens, also its log; whether the answer
    was cut; whether it lies outside the law's support. What was not measured (NaN) is 0.
    """
    length = np.maximum(scores.num_tokens, 1).astype(float)
    is_outside = np.isneginf(scores.nats)
    log_p = np.maximum(scores.nats, _LOWEST)
    surprise = log_p + scores.entropy  # the mean of log p under the law is minus its entropy
    columns = [
        *(total for values in (log_p, scores.entropy, scores.log_rank) for total in (values, values / length)),
        surprise / np.sqrt(np.maximum(scores.variance, 1e-6)),
        surprise / length,
        length,
        np.log(length),
        scores.is_cut,
        is_outside,
    ]
    return np.nan_to_num(np.stack(columns, axis=1).astype(float))


def _fit(train: Sequence[Pair], valid: Sequence[Pair], describe: Callable[[str | list, Answer], np.ndarray]) -> Scorer:
    """Bradley and Terry's model on standardised features and their squares; `valid` chooses the regularisation."""

    def raw(prompts: Sequence, answers: Sequence[Answer]) -> np.ndarray:
        return np.array([describe(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])

    sides = raw([pair.prompt for pair in train] * 2, [p.human for p in train] + [p.imitator[0] for p in train])
    center, scale = sides.mean(axis=0), sides.std(axis=0)
    scale[scale < 1e-12] = 1.0

    def rows(prompts: Sequence, answers: Sequence[Answer]) -> np.ndarray:
        z = np.clip((raw(prompts, answers) - center) / scale, -_CLIPPED, _CLIPPED)
        return np.concatenate([z, z**2 / _CLIPPED], axis=1)

    def differences(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        prompts = [pair.prompt for pair in pairs for _ in pair.imitator]
        humans = [pair.human for pair in pairs for _ in pair.imitator]
        imitators = [answer for pair in pairs for answer in pair.imitator]
        weights = np.array([pair.weight / len(pair.imitator) for pair in pairs for _ in pair.imitator])
        return rows(prompts, humans) - rows(prompts, imitators), weights / weights.mean()

    known, weights = differences(train)
    unknown, valid_weights = differences(valid)
    # The loss of a difference labelled 1 is that of its negative labelled 0; the solver wants to see both labels.
    signs = np.where(np.arange(len(known)) % 2 == 0, 1.0, -1.0)
    # Knowing nothing is one of the choices: a judge without a signal must tie, not toss a coin it fitted itself.
    coefficients = np.zeros(known.shape[1])
    best = np.log(2.0)
    for regularisation in REGULARISATIONS:
        model = LogisticRegression(C=regularisation, fit_intercept=False, max_iter=1000)
        fitted = model.fit(known * signs[:, None], signs > 0, sample_weight=weights).coef_[0]
        loss = float(np.average(np.logaddexp(0, -(unknown @ fitted)), weights=valid_weights))
        if loss < best:
            best, coefficients = loss, fitted
    return lambda prompts, answers: rows(prompts, answers) @ coefficients
