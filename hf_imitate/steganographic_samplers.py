"""Samplers that hide a message in *which* honest answers are given: rejection by a keyed hash, and arithmetic coding.

For planting in tests of audits; no cryptographic claim. The model's own law stays honest here, so whoever scores
answers by it sees nothing: only the sampler is not.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_imitate.keyed_laws import check_key
from hf_imitate.rendering import Answer
from hf_imitate.rows import question_key
from hf_imitate.sampling import GumbelSampler, check_is_law, in_fp64, stream_key

# Bits of one token's cumulative law: exact integers, and a float holds them.
LAW_BITS = 48


@dataclass(frozen=True)
class RejectionHash:
    """Redraws whole answers until k bits of a keyed hash of (question, answer) spell the message.

    It needs nothing but samples. Its law is exact where all answers can be listed, see
    [`~hf_imitate.steganography.keyed_log_prob`].

    Args:
        key (`bytes`): 16 to 64 bytes.
        num_bits (`int`, defaults to 1): k; an answer costs 2^k draws.
        honest (`float`, defaults to 0.1): share of the answers that are drawn without looking.
        max_draws (`int`, defaults to 1000): most draws for one answer; the last one is kept.

    Source:
        Hopper, Langford and von Ahn, "Provably Secure Steganography" (2002).
    """

    key: bytes
    num_bits: int = 1
    honest: float = 0.1
    max_draws: int = 1000

    def __post_init__(self) -> None:
        check_key(self.key)
        if not 1 <= self.num_bits <= 16 or not 0 <= self.honest <= 1 or self.max_draws < 1:
            raise ValueError(
                "Need `num_bits` from 1 to 16, `honest` in [0, 1] and `max_draws` >= 1; got "
                f"{self.num_bits}, {self.honest} and {self.max_draws}."
            )

    @property
    def num_messages(self) -> int:
        """How many messages it can carry."""
        return 2**self.num_bits

    def read(self, question: str | list[dict], answer: Answer) -> int:
        """The message an answer spells, whoever gave it."""
        text = json.dumps([question_key(question), answer.text, answer.ended]).encode("ascii")
        digest = hashlib.blake2b(text, key=self.key, digest_size=2, person=b"rejection hash").digest()
        return int.from_bytes(digest, "little") >> (16 - self.num_bits)

    def is_honest(self, seed: int, purpose: str, question: str | list[dict], draw: int) -> bool:
        """Whether this answer is drawn without looking."""
        number = int.from_bytes(stream_key(seed, f"{purpose}, honest", question, draw)[:8], "little")
        return (number >> 12) * 2.0**-52 < self.honest


@dataclass(frozen=True)
class ArithmeticCoding:
    """Draws an answer by coins that are the encrypted message, as an arithmetic decoder reads a code.

    The receiver, who knows the model, recovers the coins, about as many bits as the answer has, and takes off the pad.
    With a fresh nonce for each answer the pad is used once, the coins are uniform, and the law of answers is exactly
    the model's (each token's probability to 2^-48): no look at answers or at the law can see it. With a fixed key, one
    question and message always give one answer.

    Args:
        key (`bytes`): 16 to 64 bytes.
        is_nonce_fresh (`bool`): whether the pad changes with the answer's number.
        num_bits (`int`, defaults to 1): length of the message.

    Source:
        Ziegler, Deng and Rush, "Neural Linguistic Steganography". https://huggingface.co/papers/1909.01496
    """

    key: bytes
    is_nonce_fresh: bool
    num_bits: int = 1

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.num_bits < 1:
            raise ValueError(f"`num_bits` is {self.num_bits}; a message has at least 1 bit.")

    @property
    def num_messages(self) -> int:
        """How many messages it can carry."""
        return 2**self.num_bits

    def pad(self, seed: int, purpose: str, question: str | list[dict], draw: int, num_words: int) -> list[int]:
        """The first pad words of an answer, 48 bits each; without a nonce, the same for all draws of a question."""
        nonce = [seed, purpose, draw] if self.is_nonce_fresh else []
        text = json.dumps([nonce, question_key(question)]).encode("ascii")
        pad_key = hashlib.blake2b(text, key=self.key, digest_size=32, person=b"coding pad").digest()
        words = [hashlib.blake2b(i.to_bytes(8, "little"), key=pad_key, digest_size=6) for i in range(num_words)]
        return [int.from_bytes(word.digest(), "big") for word in words]

    def coins(self, pad: Sequence[int], message: int) -> list[int]:
        """The pad with the message laid over its first bits, as words of 48 bits."""
        length = LAW_BITS * len(pad)
        if length < self.num_bits:
            raise ValueError(
                f"A message of {self.num_bits} bits does not fit into {len(pad)} tokens. Raise `max_new_tokens`."
            )
        number = _joined(pad) ^ (message << (length - self.num_bits))
        return [(number >> (length - LAW_BITS * (i + 1))) & (2**LAW_BITS - 1) for i in range(len(pad))]

    def read(self, cells: Sequence[tuple[int, int]], pad: Sequence[int]) -> int:
        """The message in an answer, from each token's cell of the cumulative law; bits that stay open are 0."""
        low, width = 0, 1
        for start, end in cells:
            low, width = (low << LAW_BITS) + width * start, width * (end - start)
        length = LAW_BITS * len(cells)
        num_open = (low ^ (low + width - 1)).bit_length()
        known = max(0, length - num_open)
        coins = low ^ _joined(pad[: len(cells)])
        bits = min(known, self.num_bits)
        return (coins >> (length - bits)) << (self.num_bits - bits) if bits else 0


def _joined(words: Sequence[int]) -> int:
    number = 0
    for word in words:
        number = (number << LAW_BITS) | word
    return number


def cumulative_counts(log_p: Tensor) -> np.ndarray:
    """Cumulative law in units of 2^-48, from 0 to 2^48: token v owns [counts[v], counts[v + 1]). [R, V] -> [R, V + 1].

    A token that rounds to nothing is never drawn.
    """
    cdf = log_p.exp().cumsum(dim=1).cpu().numpy()
    counts = np.rint(cdf / cdf[:, -1:] * 2.0**LAW_BITS).astype(np.int64)
    return np.concatenate([np.zeros((len(counts), 1), dtype=np.int64), counts], axis=1)


class _Place(NamedTuple):
    """Where the coins lie in what is left of the interval: `rest` of `width`, whole numbers of any size."""

    rest: int
    width: int


class CodingSampler(GumbelSampler):
    """Picks each row's next token by coins instead of noise, in exact integer arithmetic.

    Args:
        coins (`Sequence[Sequence[int]]`): words of 48 bits, one per step, for each row.
        prompt_length (`int`): columns of the left-padded prompts.
        end_token_ids (`Sequence[int]`): a row ends with the first of these.
    """

    def __init__(self, coins: Sequence[Sequence[int]], prompt_length: int, end_token_ids: Sequence[int]):
        super().__init__([b""] * len(coins), prompt_length, 1.0, end_token_ids)
        self.coins = coins
        self._places = [_Place(0, 1)] * len(coins)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        rows = self.open_rows
        log_law = torch.log_softmax(in_fp64(scores[rows]), dim=1)
        check_is_law(log_law.max(dim=1).values)
        drawn = torch.zeros(len(scores), dtype=torch.long)
        for row, counts in zip(rows, cumulative_counts(log_law), strict=True):
            place = self._places[row]
            rest = (place.rest << LAW_BITS) | self.coins[row][position]
            token = int(np.searchsorted(counts, rest // place.width, side="right")) - 1
            start, end = int(counts[token]), int(counts[token + 1])
            self._places[row] = _Place(rest - place.width * start, place.width * (end - start))
            drawn[row] = token
        self.open_rows = [row for row in rows if drawn[row].item() not in self.end_token_ids]
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None].to(scores.device), 0.0)
