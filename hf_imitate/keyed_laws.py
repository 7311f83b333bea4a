"""Answer laws that depend on a secret key, with exact log-probabilities: transformers logits processors.

For planting in tests of audits. Keys make the numbers repeatable and unlearnable in practice; no cryptographic claim
is made, and nothing here should carry a secret.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_imitate.sampling import in_fp64
from hf_imitate.steganography_theory import (
    expected_green_list_price,
    green_list_law,
    rare_burst_law,
    soft_rotation_law,
    soft_rotation_price,
)

SHORTEST_KEY, LONGEST_KEY = 16, 64
CONTEXTS = ("none", "token", "prefix")


def keyed_digest(key: bytes, purpose: str, numbers: Sequence[int], size: int = 16) -> int:
    """Keyed BLAKE2b of a list of integers (8 bytes each, little endian), as an integer of `size` bytes.

    Args:
        key: 16 to 64 bytes.
        purpose: up to 16 bytes of ASCII; digests for different purposes are unrelated.
        numbers: token ids and the like.
        size: bytes of the digest, up to 64.
    """
    text = np.asarray(numbers, dtype="<i8").tobytes()
    digest = hashlib.blake2b(text, key=key, digest_size=size, person=purpose.encode("ascii")).digest()
    return int.from_bytes(digest, "little")


def keyed_number(key: bytes, purpose: str, numbers: Sequence[int]) -> float:
    """The same as a number in [0, 1), of 52 bits."""
    return (keyed_digest(key, purpose, numbers, size=8) >> 12) * 2.0**-52


def check_key(key: bytes) -> None:
    """Raise `ValueError` unless the key is 16 to 64 bytes; its value is not shown."""
    if not isinstance(key, bytes) or not SHORTEST_KEY <= len(key) <= LONGEST_KEY:
        given = f"{len(key)} bytes" if isinstance(key, bytes) else f"a {type(key).__name__}"
        raise ValueError(f"`key` is {given}; keyed BLAKE2b needs {SHORTEST_KEY} to {LONGEST_KEY} bytes.")


class Step(NamedTuple):
    """One position of some answers. R of them.

    Attributes:
        rows (`list[int]`): numbers of the answers, stable over positions.
        prompts (`list[list[int]]`): token ids of their questions.
        answers (`list[list[int]]`): token ids before the position.
        messages (`list[int]`): what each answer says.
        log_p (`torch.Tensor`): honest log-probability of the next token, nats, fp64. [R, V].
    """

    rows: list[int]
    prompts: list[list[int]]
    answers: list[list[int]]
    messages: list[int]
    log_p: Tensor

    def numbers(self, place: int, with_message: bool = False) -> list[int]:
        """The whole prefix of one answer, question and answer kept apart, for a digest."""
        first = [self.messages[place]] if with_message else []
        return [*first, len(self.prompts[place]), *self.prompts[place], *self.answers[place]]


class KeyedLaw(Protocol):
    """A next-token law under a key and a message."""

    @property
    def num_messages(self) -> int:
        """How many messages an answer can carry; 2 is one bit."""
        ...

    def law(self, step: Step, memory: dict[int, Any]) -> Tensor:
        """Log-probability of the next token under the keyed law, nats, fp64. [R, V]. `memory` is the caller's, one
        entry per answer, kept from position to position."""
        ...

    def expected_price(self, log_p: Tensor) -> Tensor | None:
        """KL(honest || keyed) of positions with these laws, averaged over keys, nats. [M, V] -> [M]; `None` where keys
        do not average within an answer."""
        ...


@dataclass(frozen=True)
class GreenList:
    """Favours the tokens of a keyed list. Message 1 favours the others instead.

    Args:
        key (`bytes`): 16 to 64 bytes.
        delta (`float`): what a listed token gains, nats; 0 is honest.
        context (`str`, defaults to `"prefix"`): what the list depends on: `"none"` is one list for ever, `"token"` the
            token before, `"prefix"` question and answer so far.
        share (`float`, defaults to 0.5): chance that a token is listed, each on its own.

    Source:
        Kirchenbauer et al., "A Watermark for Large Language Models". https://huggingface.co/papers/2301.10226
    """

    key: bytes
    delta: float
    context: str = "prefix"
    share: float = 0.5

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.context not in CONTEXTS:
            raise ValueError(f"`context` is {self.context!r}; need one of {list(CONTEXTS)}.")
        if not 0 < self.share < 1:
            raise ValueError(f"`share` is {self.share}; need a share between 0 and 1, such as 0.5.")
        green_list_law(torch.zeros(2), torch.zeros(2, dtype=torch.bool), self.delta)

    @property
    def num_messages(self) -> int:
        """How many messages it can carry."""
        return 2

    def law(self, step: Step, memory: dict[int, Any]) -> Tensor:
        """The next-token laws of these steps under the key, nats. [R, V]."""
        vocab_size = step.log_p.shape[1]
        green = np.stack([self._list(step, place, vocab_size) for place in range(len(step.rows))])
        green ^= np.array(step.messages, dtype=bool)[:, None]
        return green_list_law(step.log_p, torch.from_numpy(green).to(step.log_p.device), self.delta)

    def _list(self, step: Step, place: int, vocab_size: int) -> np.ndarray:
        prompt, answer = step.prompts[place], step.answers[place]
        before = answer[-1:] or prompt[-1:]
        seen = {"none": [], "token": before, "prefix": step.numbers(place)}[self.context]
        # Counter-based numbers under a keyed digest: as many as the vocabulary has tokens, at 7 ns each.
        bits = np.random.Philox(key=keyed_digest(self.key, "green list", seen)).random_raw(vocab_size)
        return (bits >> np.uint64(12)) * 2.0**-52 < self.share

    def expected_price(self, log_p: Tensor) -> Tensor | None:
        """What a human answer loses at each position, averaged over keys, nats; see [`KeyedLaw`]. [M, V] -> [M]."""
        if self.context != "prefix":
            return None
        return torch.from_numpy(expected_green_list_price(log_p.exp().cpu().numpy(), self.delta, self.share))


@dataclass(frozen=True)
class SoftRotation:
    """Draws by a coin that prefers one half of a circle, turned by the key, the question and the answer so far.

    Message 1 prefers the other half. Averaged over turns, or over the two messages, every next-token law is exactly
    the honest one, so whoever cannot predict the turns sees nothing as long as no prefix is repeated.

    Args:
        key (`bytes`): 16 to 64 bytes.
        delta (`float`): from 0 (honest) to 1 (the other half is never drawn).
    """

    key: bytes
    delta: float

    def __post_init__(self) -> None:
        check_key(self.key)
        soft_rotation_law(torch.zeros(1), torch.zeros(()), self.delta)

    @property
    def num_messages(self) -> int:
        """How many messages it can carry."""
        return 2

    def law(self, step: Step, memory: dict[int, Any]) -> Tensor:
        """The next-token laws of these steps under the key, nats. [R, V]."""
        turns = [keyed_number(self.key, "rotation", step.numbers(place)) for place in range(len(step.rows))]
        start = torch.tensor(turns, dtype=torch.float64) + 0.5 * torch.tensor(step.messages, dtype=torch.float64)
        return soft_rotation_law(step.log_p, start.to(step.log_p.device), self.delta)

    def expected_price(self, log_p: Tensor) -> Tensor | None:
        """What a human answer loses at each position, averaged over keys, nats; see [`KeyedLaw`]. [M, V] -> [M]."""
        return torch.from_numpy(np.asarray(soft_rotation_price(log_p.exp().cpu().numpy(), self.delta)))


@dataclass(frozen=True)
class RareBurst:
    """With a small chance the whole answer is a codeword of key, question and message; else it is honest.

    A codeword is what honest sampling gives under keyed coins. The message may be as long as the answer's entropy.

    Args:
        key (`bytes`): 16 to 64 bytes.
        rate (`float`): chance of a codeword, per answer; in [0, 1).
        num_messages (`int`, defaults to 256): how many messages there are.
    """

    key: bytes
    rate: float
    num_messages: int = 256

    def __post_init__(self) -> None:
        check_key(self.key)
        if not 0 <= self.rate < 1 or self.num_messages < 1:
            raise ValueError(
                f"Need `rate` in [0, 1) and `num_messages` >= 1; got {self.rate} and {self.num_messages}."
            )

    def law(self, step: Step, memory: dict[int, Any]) -> Tensor:
        """The next-token laws of these steps under the key, nats. [R, V]."""
        is_on, log_prefix = [], []
        for row, answer in zip(step.rows, step.answers, strict=True):
            if not answer:
                is_on.append(True)
                log_prefix.append(0.0)
                continue
            was_on, log_p_prefix, codeword, log_p = memory[row]
            is_on.append(was_on and answer[-1] == codeword)
            log_prefix.append(log_p_prefix + log_p[answer[-1]].item())
        numbers = range(len(step.rows))
        coins = [keyed_number(self.key, "burst", step.numbers(place, with_message=True)) for place in numbers]
        codewords = _drawn_by(step.log_p, torch.tensor(coins, dtype=torch.float64))
        for place, row in enumerate(step.rows):
            memory[row] = (is_on[place], log_prefix[place], codewords[place].item(), step.log_p[place])
        so_far = torch.tensor(log_prefix, dtype=torch.float64, device=step.log_p.device)
        keyed = rare_burst_law(step.log_p, so_far, codewords, self.rate)
        return torch.where(torch.tensor(is_on, device=keyed.device)[:, None], keyed, step.log_p)

    def expected_price(self, log_p: Tensor) -> Tensor | None:
        """What a human answer loses at each position, averaged over keys, nats; see [`KeyedLaw`]. [M, V] -> [M]."""
        return None


def _drawn_by(log_p: Tensor, coins: Tensor) -> Tensor:
    """The token in whose part of the cumulative law each coin falls. [R, V], [R] -> [R]."""
    cdf = log_p.exp().cumsum(dim=1)
    point = coins.to(cdf.device)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, point, right=True).squeeze(1).clamp(max=log_p.shape[1] - 1)


class KeyedProcessor(LogitsProcessor):
    """Turns honest scores into a keyed law's, in `generate(do_sample=True)` and, position by position, in scoring.

    Put it last, so that it reads the law that would be sampled, and leave temperature and truncation to processors
    before it. Rows of `generate` may not be reordered (no beams).

    Args:
        scheme ([`KeyedLaw`]): [`GreenList`], [`SoftRotation`] or [`RareBurst`].
        prompts (`Sequence[Sequence[int]]`): token ids of each row's question, without padding; generation pads on the
            left.
        messages (`Sequence[int]`, *optional*): what each row says, 0 by default.

    Raises:
        ValueError: messages do not fit; when called: there are other rows than prompts.

    Example:

    ```python
    processor = KeyedProcessor(SoftRotation(key, delta=0.5), tokenizer(questions)["input_ids"], messages=[0, 1])
    model.generate(**batch, do_sample=True, logits_processor=LogitsProcessorList([processor]))
    ```
    """

    def __init__(self, scheme: KeyedLaw, prompts: Sequence[Sequence[int]], messages: Sequence[int] | None = None):
        self.scheme, self.prompts = scheme, [list(ids) for ids in prompts]
        self.messages = [0] * len(self.prompts) if messages is None else list(messages)
        check_messages(self.messages, len(self.prompts), scheme.num_messages)
        self.prompt_length = max(map(len, self.prompts), default=0)
        self._memory: dict[int, Any] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(scores) != len(self.prompts):
            raise ValueError(
                f"There are {len(self.prompts)} prompts and {len(scores)} rows. Repeat prompts and messages for every "
                "answer instead of setting `num_return_sequences` or beams."
            )
        answers = input_ids[:, self.prompt_length :].tolist()
        law = self.law(range(len(scores)), answers, torch.log_softmax(in_fp64(scores), dim=1))
        return law.to(scores)

    def law(self, rows: Sequence[int], answers: Sequence[Sequence[int]], log_p: Tensor) -> Tensor:
        """The keyed law of the next token of some rows, whose answers so far are given, nats, fp64. [R, V].

        Positions of a row come in order, each once.
        """
        rows = list(rows)
        step = Step(
            rows,
            [self.prompts[row] for row in rows],
            [list(answer) for answer in answers],
            [self.messages[row] for row in rows],
            log_p,
        )
        return self.scheme.law(step, self._memory)


def check_messages(messages: Sequence[int], num_rows: int, num_messages: int) -> None:
    """Raise `ValueError` unless there is one message per row, each below `num_messages`."""
    if len(messages) != num_rows:
        raise ValueError(f"There are {len(messages)} messages for {num_rows} answers; give one each.")
    outside = sum(not 0 <= message < num_messages for message in messages)
    if outside:
        raise ValueError(
            f"{outside} of {num_rows} messages are outside 0 to {num_messages - 1}, what this scheme can say."
        )
