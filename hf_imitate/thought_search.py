"""MATH: log p(answer | question) enclosed without chance, by listing thoughts, the most probable first. Nats."""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from hf_imitate.bounds import Interval

Tokens = tuple[int, ...]
# Sums of fp32 log-probabilities over a large vocabulary stray by less; a forgotten token strays by more.
TOLERANCE = 1e-3


class Enclosure(NamedTuple):
    """What a search has proved. No confidence level: the interval holds, up to floating point."""

    interval: Interval  # of log p, nats
    is_finished: bool  # the wanted gap was reached, or every thought was listed
    num_thoughts: int  # thoughts whose answer probability was computed
    remaining_mass: float  # prior probability of all other thoughts, at most
    num_evaluations: int  # prefixes and thoughts given to the model


def enclose_log_prob(
    next_token_log_probs: Callable[[Sequence[Tokens]], np.ndarray],
    answer_log_probs: Callable[[Sequence[Tokens]], np.ndarray],
    delimiter: int,
    max_thought_length: int,
    log_largest_answer_prob: float = 0.0,
    gap: float = 0.05,
    max_evaluations: int = 10_000,
    batch_size: int = 16,
    max_children: int = 1024,
) -> Enclosure:
    """Enclose log p by the thoughts listed so far and the prior mass of the rest (T6).

        sum_listed p(z) p(answer | z)  <=  p  <=  the same + (1 - sum_listed p(z)) c,   c >= p(answer | any other z)

    Best first over prefixes: a thought is a path of tokens that ends in the delimiter, or at `max_thought_length`,
    where the delimiter is forced with probability 1. The most probable prefix or thought is taken next.

    Assumes p(thought | question) sums to 1: a token that may not stand inside a thought (end, padding, chat markers)
    is masked *and the rest renormalised*, as it is when the model writes. With the mass of a masked token merely
    dropped, the sums still enclose something, but not the law of the model; this is checked, and what rounding leaves
    is renormalised away.

    Args:
        next_token_log_probs: prefixes (tuples of token ids, n of them) to log-probabilities of the next token, nats,
            [n, V]; -inf where a token may not follow.
        answer_log_probs: n thoughts (without the delimiter) to log p(answer | question, thought), nats, [n].
        delimiter: id of the token that ends a thought.
        max_thought_length: content tokens after which a thought is closed by force.
        log_largest_answer_prob: log c, nats, *proved* for every thought; 0 always holds.
        gap: stop when the interval is this narrow, nats.
        max_evaluations: stop after this many prefixes and thoughts, whatever was reached.
        batch_size: most prefixes or thoughts per call.
        max_children: most continuations kept per prefix; the mass of the others stays in the remainder for ever.

    Raises:
        ValueError: an argument is out of range, next-token probabilities do not sum to 1, or an answer is more
            probable than c.

    Source:
        Henrion, "Search-based methods to bound diagnostic probabilities in very large belief nets" (UAI 1991).
    """
    if max_thought_length < 0 or not gap > 0 or min(max_evaluations, batch_size, max_children) < 1:
        raise ValueError(
            "Need `max_thought_length` >= 0, `gap` > 0 and `max_evaluations`, `batch_size`, `max_children` >= 1; got "
            f"{max_thought_length}, {gap}, {max_evaluations}, {batch_size}, {max_children}."
        )
    search = _Search(delimiter, max_thought_length, log_largest_answer_prob, max_children)
    while search.frontier and search.num_evaluations < max_evaluations and not search.is_within(gap):
        nodes = search.pop(min(batch_size, max_evaluations - search.num_evaluations))
        prefixes = [node for node in nodes if not node.is_thought]
        thoughts = [node for node in nodes if node.is_thought]
        if prefixes:
            search.expand(prefixes, np.asarray(next_token_log_probs([node.tokens for node in prefixes])))
        if thoughts:
            search.close(thoughts, np.asarray(answer_log_probs([node.tokens for node in thoughts])))
    return search.enclosure(gap)


class _Node(NamedTuple):
    cost: float  # minus the log-probability of the prefix, so that a heap gives the most probable first
    tokens: Tokens
    is_thought: bool


class _Search:
    def __init__(self, delimiter: int, max_length: int, log_largest_answer_prob: float, max_children: int) -> None:
        self.delimiter = delimiter
        self.max_length = max_length
        self.log_c = log_largest_answer_prob
        self.max_children = max_children
        self.frontier = [_Node(0.0, (), max_length == 0)]
        self.pruned = 0.0
        self.open_mass = 1.0  # of the frontier, kept by adding and subtracting; `remaining_mass` sums it afresh
        self.log_low = -math.inf
        self.num_thoughts = 0
        self.num_evaluations = 0
        self._num_at_last_sum = 1

    def pop(self, num_wanted: int) -> list[_Node]:
        nodes = [heapq.heappop(self.frontier) for _ in range(min(num_wanted, len(self.frontier)))]
        self.open_mass -= math.fsum(math.exp(-node.cost) for node in nodes)
        self.num_evaluations += len(nodes)
        return nodes

    def expand(self, nodes: list[_Node], log_probs: np.ndarray) -> None:
        log_probs = np.asarray(log_probs, dtype=np.float64)
        if log_probs.ndim != 2 or len(log_probs) != len(nodes):
            raise ValueError(
                f"`next_token_log_probs` gave shape {log_probs.shape} for {len(nodes)} prefixes; need [n, V]."
            )
        total = logsumexp(log_probs, axis=1)
        if not (np.abs(total) <= TOLERANCE).all():
            raise ValueError(
                f"Next-token probabilities sum to {math.exp(total[np.argmax(np.abs(total))]):.6g}, not 1. Mask every "
                "token that may not stand inside a thought and renormalise the rest, as when thoughts are drawn."
            )
        for node, row in zip(nodes, log_probs - total[:, None], strict=True):
            self._push_children(node, row)

    def _push_children(self, node: _Node, log_probs: np.ndarray) -> None:
        kept = np.flatnonzero(log_probs > -np.inf)
        if len(kept) > self.max_children:
            order = kept[np.argpartition(-log_probs[kept], self.max_children)]
            kept = order[: self.max_children]
            self.pruned += math.exp(-node.cost) * float(np.exp(log_probs[order[self.max_children :]]).sum())
        for token in kept.tolist():
            is_end = token == self.delimiter
            tokens = node.tokens if is_end else (*node.tokens, token)
            is_thought = is_end or len(tokens) == self.max_length
            heapq.heappush(self.frontier, _Node(node.cost - float(log_probs[token]), tokens, is_thought))
        self.open_mass += math.exp(-node.cost) * float(np.exp(log_probs[kept]).sum())

    def close(self, nodes: list[_Node], log_probs: np.ndarray) -> None:
        log_probs = np.asarray(log_probs, dtype=np.float64)
        if log_probs.shape != (len(nodes),):
            raise ValueError(f"`answer_log_probs` gave shape {log_probs.shape} for {len(nodes)} thoughts; need [n].")
        if not (log_probs <= self.log_c + TOLERANCE).all():
            raise ValueError(
                f"An answer has log-probability {log_probs.max():.6g} after some thought, NaN or above "
                f"`log_largest_answer_prob` = {self.log_c:.6g}. Pass a proved bound; 0 always holds."
            )
        self.num_thoughts += len(nodes)
        joint = log_probs - np.array([node.cost for node in nodes])
        self.log_low = float(np.logaddexp(self.log_low, logsumexp(joint)))

    def remaining_mass(self) -> float:
        return min(math.fsum(math.exp(-node.cost) for node in self.frontier) + self.pruned, 1.0)

    def interval(self, remaining: float) -> Interval:
        rest = math.log(remaining) + self.log_c if remaining > 0 else -math.inf
        return Interval(min(self.log_low, 0.0), min(float(np.logaddexp(self.log_low, rest)), 0.0))

    def is_within(self, gap: float) -> bool:
        """Whether the interval is narrow enough; the frontier is summed afresh only where that could decide it."""
        num_now = self.num_evaluations
        if self._width(max(self.open_mass, 0.0) + self.pruned) > gap and num_now < 2 * self._num_at_last_sum:
            return False
        self._num_at_last_sum = num_now
        remaining = self.remaining_mass()
        self.open_mass = remaining - self.pruned
        return self._width(remaining) <= gap

    def _width(self, remaining: float) -> float:
        interval = self.interval(remaining)
        return 0.0 if remaining == 0 else interval.high - interval.low

    def enclosure(self, gap: float) -> Enclosure:
        remaining = self.remaining_mass()
        is_finished = self._width(remaining) <= gap
        return Enclosure(self.interval(remaining), is_finished, self.num_thoughts, remaining, self.num_evaluations)
