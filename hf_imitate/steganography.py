"""Steganography, planted on purpose: imitators that hide a message, to find out which audit sees which.

On any causal LM. A *keyed law* changes the next-token law and has exact log-probabilities ([`GreenList`],
[`SoftRotation`], [`RareBurst`]); a *sampler* leaves the law alone and chooses among its answers ([`RejectionHash`],
[`ArithmeticCoding`]). For planting in tests only: no cryptographic claim is made, and keys are for repeatability.

Example:

```python
scheme = SoftRotation(key, delta=0.5)
draws = draw_keyed_answers(model, renderer, questions, scheme, messages, seed=0, max_new_tokens=32)
answers = [draw.answer for draw in draws]
scores = keyed_log_prob(model, renderer, questions, human_answers, scheme, messages)
read = decode_messages(model, renderer, questions, answers, scheme)
```
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_imitate.bounds import Interval, clopper_pearson
from hf_imitate.keyed_laws import GreenList, KeyedLaw, KeyedProcessor, RareBurst, SoftRotation, check_messages
from hf_imitate.rendering import Answer, Rendered, Renderer
from hf_imitate.rows import question_key
from hf_imitate.sampling import in_fp64
from hf_imitate.scoring import answer_logits, score_answers
from hf_imitate.steganographic_draws import Scheme, draw_keyed_answers, draw_numbers
from hf_imitate.steganographic_samplers import ArithmeticCoding, RejectionHash, cumulative_counts
from hf_imitate.steganography_theory import rejection_log_ratio

__all__ = [
    "ArithmeticCoding",
    "DecodingError",
    "GreenList",
    "KeyedProcessor",
    "KeyedScores",
    "NoKeyedLawError",
    "RareBurst",
    "RejectionHash",
    "Scheme",
    "SoftRotation",
    "decode_messages",
    "decoding_error",
    "draw_keyed_answers",
    "expected_price",
    "keyed_log_prob",
]

# Probability that a list of "all" answers may leave out.
_LEFT_OUT = 1e-6


class NoKeyedLawError(ValueError):
    """The scheme's law has no exact log-probability here."""


class KeyedScores(NamedTuple):
    """What the honest law and a keyed one say of N answers. All nats, fp64, on the CPU.

    Attributes:
        log_prob (`torch.Tensor`): under the keyed law; -inf where it can never give the answer. [N].
        honest_log_prob (`torch.Tensor`): under the model's own law. [N].
        price (`torch.Tensor`): exact KL(honest || keyed) of every position the answer passes, added up; its mean over
            honest answers is the keyed law's price. NaN for samplers. [N].
    """

    log_prob: Tensor
    honest_log_prob: Tensor
    price: Tensor


class DecodingError(NamedTuple):
    """How often a decoder errs.

    Attributes:
        error (`float`): share of the messages that were read wrongly.
        interval (`Interval`): Clopper-Pearson, for independent answers.
        num_messages (`int`): answers behind it.
    """

    error: float
    interval: Interval
    num_messages: int


def keyed_log_prob(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[Answer],
    scheme: Scheme,
    messages: Sequence[int],
    *,
    every_answer: Sequence[Answer] | None = None,
    batch_size: int = 64,
) -> KeyedScores:
    """Exact log-probability of given answers under the keyed law, each with its message, and under the honest one.

    A keyed law is scored position by position by the same processor that generates. A fixed-key code gives one answer
    to a question, with probability 1 (a codeword whose coins fall within rounding of a boundary may differ between
    batches). A fresh-nonce code has the honest law. A rejection hash needs the honest probability of all answers whose
    hash is the message, so all answers must be given.

    Args:
        model, renderer, scheme, batch_size: as in [`draw_keyed_answers`].
        questions (`Sequence[str | list[dict]]`): N of them.
        answers (`Sequence[Answer]`): one to each; one that did not end is scored without an end token.
        messages (`Sequence[int]`): one for each.
        every_answer (`Sequence[Answer]`, *optional*): all answers there are, to any of the questions, for the
            rejection hash.

    Returns:
        [`KeyedScores`].

    Raises:
        NoKeyedLawError: a rejection hash without the list of all answers, or whose list leaves some out.
        ValueError: questions, answers and messages do not belong together.
    """
    check_messages(messages, len(questions), scheme.num_messages)
    if len(answers) != len(questions):
        raise ValueError(f"There are {len(answers)} answers to {len(questions)} questions; give one each.")
    rows = renderer.given(questions, answers)
    pad = renderer.tokenizer.pad_token_id or 0
    if isinstance(scheme, RejectionHash):
        honest = score_answers(model, rows, pad, batch_size)
        mass = _match_mass(model, renderer, questions, scheme, messages, every_answer, batch_size)
        both = zip(questions, answers, messages, strict=True)
        is_match = [scheme.read(question, answer) == message for question, answer, message in both]
        ratio = rejection_log_ratio(is_match, mass, scheme.honest, scheme.max_draws)
        return KeyedScores(honest + torch.from_numpy(ratio), honest, torch.full_like(honest, math.nan))
    if isinstance(scheme, ArithmeticCoding):
        honest = score_answers(model, rows, pad, batch_size)
        keyed = honest if scheme.is_nonce_fresh else _code_log_prob(model, renderer, questions, rows, scheme, messages)
        return KeyedScores(keyed.clone(), honest, torch.full_like(honest, math.nan))
    return _score_positions(model, rows, scheme, messages, pad, batch_size)


def expected_price(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[Answer],
    scheme: KeyedLaw,
    *,
    batch_size: int = 64,
) -> Tensor:
    """Theory, without the key: KL(honest || keyed) of every position, averaged over keys, added up per answer, nats.

    Args:
        model, renderer, questions, answers, scheme, batch_size: as in [`keyed_log_prob`].

    Returns:
        [N], fp64, on the CPU.

    Raises:
        NoKeyedLawError: the scheme's keys do not average within an answer; use the `price` under its key.
    """
    rows = renderer.given(questions, answers)
    prices = torch.zeros(len(rows), dtype=torch.float64)
    for batch in answer_logits(model, rows, renderer.tokenizer.pad_token_id or 0, batch_size):
        price = scheme.expected_price(torch.log_softmax(in_fp64(batch.logits), dim=1))
        if price is None:
            raise NoKeyedLawError(
                f"A {type(scheme).__name__} whose key acts in the same way at many positions has no price averaged "
                "over keys. Take `KeyedScores.price`, which is exact under the key at hand."
            )
        prices.index_add_(0, batch.row, price.cpu())
    return prices


def decode_messages(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[Answer],
    scheme: Scheme,
    *,
    seed: int = 0,
    purpose: str = "answer",
    draws: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[int]:
    """Read the messages with the key: the likeliest one under a keyed law, the hash, or the recovered coins.

    Args:
        model, renderer, questions, answers, scheme, batch_size: as in [`keyed_log_prob`]. A rejection hash is read
            without the model.
        seed, purpose, draws: what the answers were drawn with; they are the nonce of a fresh-nonce code.

    Returns:
        `list[int]`: one message per answer.
    """
    both = list(zip(questions, answers, strict=True))
    if isinstance(scheme, RejectionHash):
        return [scheme.read(question, answer) for question, answer in both]
    rows = renderer.given(questions, answers)
    pad = renderer.tokenizer.pad_token_id or 0
    if isinstance(scheme, ArithmeticCoding):
        read, numbers = [0] * len(rows), draw_numbers(draws, len(rows))
        for batch in answer_logits(model, rows, pad, batch_size):
            counts = cumulative_counts(torch.log_softmax(in_fp64(batch.logits), dim=1))
            cells: dict[int, list[tuple[int, int]]] = {index: [] for index in batch.indices}
            for row, token, count in zip(batch.row.tolist(), batch.token.tolist(), counts, strict=True):
                cells[row].append((int(count[token]), int(count[token + 1])))
            for row, found in cells.items():
                words = scheme.pad(seed, purpose, questions[row], numbers[row], len(found))
                read[row] = scheme.read(found, words)
        return read
    likelihoods = [
        _score_positions(model, rows, scheme, [message] * len(rows), pad, batch_size).log_prob
        for message in range(scheme.num_messages)
    ]
    return torch.stack(likelihoods).argmax(dim=0).tolist()


def decoding_error(sent: Sequence[int], read: Sequence[int], confidence: float = 0.95) -> DecodingError:
    """How often messages are read wrongly, with an exact interval.

    Raises:
        ValueError: there are no messages, or not as many read as sent.
    """
    if not sent or len(sent) != len(read):
        raise ValueError(f"There are {len(sent)} sent and {len(read)} read messages; need as many, at least one.")
    num_wrong = sum(a != b for a, b in zip(sent, read, strict=True))
    return DecodingError(num_wrong / len(sent), clopper_pearson(num_wrong, len(sent), confidence), len(sent))


@torch.no_grad()
def _score_positions(
    model: Any, rows: list[Rendered], scheme: KeyedLaw, messages: Sequence[int], pad: int, batch_size: int
) -> KeyedScores:
    scores = torch.zeros(3, len(rows), dtype=torch.float64)
    for batch in answer_logits(model, rows, pad, batch_size):
        log_p = torch.log_softmax(in_fp64(batch.logits), dim=1)
        indices = batch.indices
        processor = KeyedProcessor(scheme, [rows[i].prompt_ids for i in indices], [messages[i] for i in indices])
        place_of = {index: place for place, index in enumerate(indices)}
        for position in range(int(batch.position.max()) + 1 if len(batch.position) else 0):
            here = (batch.position == position).nonzero().squeeze(1)
            owners = batch.row[here]
            answers = [rows[i].answer_ids[:position] for i in owners.tolist()]
            law = processor.law([place_of[i] for i in owners.tolist()], answers, log_p[here])
            token = batch.token[here].to(law.device)[:, None]
            honest = log_p[here]
            # 0 (-inf + inf) is 0: a token without probability costs nothing.
            price = torch.where(honest > -torch.inf, honest.exp() * (honest - law), 0.0).sum(dim=1)
            parts = law.gather(1, token).squeeze(1), honest.gather(1, token).squeeze(1), price
            for kind, part in enumerate(parts):
                scores[kind].index_add_(0, owners, part.cpu())
    return KeyedScores(*scores)


def _match_mass(
    model: Any,
    renderer: Renderer,
    questions: Sequence,
    scheme: RejectionHash,
    messages: Sequence[int],
    every_answer: Sequence[Answer] | None,
    batch_size: int,
) -> np.ndarray:
    """Honest probability, for each question, of all answers whose hash is its message. [N]."""
    if every_answer is None:
        raise NoKeyedLawError(
            "A rejection hash multiplies each answer's probability by one over that of all answers with the message's "
            "hash, a sum over every answer there is. Pass `every_answer` where they can be listed; elsewhere its law "
            "has no exact log-probability, only samples."
        )
    count = len(every_answer)
    place_of: dict[str, int] = {}
    for question in questions:
        place_of.setdefault(question_key(question), len(place_of))
    by_place = {place_of[question_key(question)]: question for question in questions}
    repeated = [by_place[place] for place in range(len(place_of)) for _ in range(count)]
    listed = list(every_answer) * len(place_of)
    rows = renderer.given(repeated, listed)
    log_p = score_answers(model, rows, renderer.tokenizer.pad_token_id or 0, batch_size)
    p = log_p.view(len(place_of), count).exp().numpy()
    total = p.sum(axis=1)
    if (np.abs(total - 1) > _LEFT_OUT).any():
        raise NoKeyedLawError(
            f"The {count} answers of `every_answer` have between {total.min():.6f} and {total.max():.6f} of the "
            "probability; a rejection hash needs all of it. List every answer once, the cut ones too."
        )
    read = np.array([scheme.read(question, a) for question, a in zip(repeated, listed, strict=True)]).reshape(p.shape)
    places = [place_of[question_key(question)] for question in questions]
    return (p[places] * (read[places] == np.asarray(messages)[:, None])).sum(axis=1)


def _code_log_prob(
    model: Any,
    renderer: Renderer,
    questions: Sequence,
    rows: list[Rendered],
    scheme: ArithmeticCoding,
    messages: Sequence[int],
) -> Tensor:
    """0 where an answer is its question's codeword, else -inf. [N]."""
    longest = max((len(row.answer_ids) for row in rows), default=1)
    # A codeword that goes on beyond the longest given answer is none of them, unless that one was cut there.
    draws = draw_keyed_answers(model, renderer, questions, scheme, messages, seed=0, max_new_tokens=max(longest, 1))
    same = [draw.ids == row.answer_ids for draw, row in zip(draws, rows, strict=True)]
    return torch.where(torch.tensor(same), 0.0, -math.inf).double()
