"""Log-probabilities of imitators that state their law as a circuit or a constraint system, by counting.

Such an imitator writes down a formula over random bits and answer bits (clauses, as in DIMACS), and its answers are
drawn uniformly from what the formula allows:

    p(answer) = #{random bits for which the answer is allowed} / #{(random bits, answer) that are allowed}

A *sampler circuit* answer = f(random bits) allows one answer for each setting of its m random bits, so the denominator
is 2**m. A *constraint system* has no random bits: p is 1 over the number of answers that satisfy it, a Sudoku's 1 over
the number of its solutions. For any formula whatever the probabilities sum to 1, so that no author of a formula can
claim more than everything. `hf_imitate.circuits` writes formulas.

The solvers come with `pip install 'hf-imitate[counting]'`: Ganak counts exactly, and where it takes too long ApproxMC
counts within a certified factor. Both run in processes of their own under limits of time and memory.
"""

import functools
import json
import math
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_imitate.bounds import Interval
from hf_imitate.circuits import Formula
from hf_imitate.retrodictive_bounds import counting_interval, log_of_ratio

_COUNTERS = ("pyganak", "pyapproxmc")
_CURES = {
    "pyganak": "pip install 'pyganak>=2.8,<2.9'",
    "pyapproxmc": "pip install 'pyapproxmc==4.1.24' (releases from 4.3.0 on lose powers of two)",
}
_REASONS = {"missing": "not installed", "counted": "its hash collisions cannot be excluded at this `delta`"}
# Structured formulas with projected variables: random ones are counted rightly even by broken releases. The first is
# that of ApproxMC's own documentation; then x1 xor x2, the pairs of two-bit numbers (x1 x2, x3 x4) with sum 3, and one
# with most of its solutions alike in what is counted.
_KNOWN_COUNTS = (
    (((1, 2, 3), (3, 20)), tuple(range(1, 21)), 11 * 2**16),
    (((1, 2), (-1, -2)), (1, 2), 2),
    (((1, 3), (-1, -3), (2, 4), (-2, -4), (5, -1, -3), (-5, 1), (-5, 3), (-5,)), (1, 2, 3, 4), 4),
    (((1, 2, 3, 4, 5),), (1, 2), 4),
)
_SELF_TEST_SECONDS = 60.0
_DEFAULT_MEMORY = 4 * 2**30


class CountingError(RuntimeError):
    """No counter gave a count within its limits; the message says what stopped each of them."""


class BrokenCounterError(CountingError):
    """An installed counter gives wrong counts for formulas whose counts are known."""


@dataclass(frozen=True)
class Count:
    """A number of solutions: the true one lies in [value / (1 + epsilon), value * (1 + epsilon)].

    Args:
        value (`int`): the count, or the estimate of it.
        epsilon (`float`): 0 for an exact count.
        delta (`float`): the probability over the counter's coins that the statement is wrong. An exact counter
            recognises parts of a formula by their hash, so it, too, has one (usually below 1e-6).
        counter (`str`): name and version of the solver, or `"none"` where the count needs no solver.
        seed (`int`): the coins. The certificate is about coins that the formula's author did not know.
    """

    value: int
    epsilon: float
    delta: float
    counter: str
    seed: int

    @property
    def is_exact(self) -> bool:
        """Whether the value is the count itself, up to the probability `delta`."""
        return self.epsilon == 0


class CountedLogProb(NamedTuple):
    """What counting says about the log-probability of one answer."""

    log_prob: float  # nats; -inf where the formula forbids the answer
    interval: Interval  # nats; `low` equals `high` where both counts are exact
    num_allowing: Count  # settings of the random bits that allow the answer
    num_outcomes: Count  # pairs of random bits and answer that the formula allows


def count(
    formula: Formula,
    projection: Iterable[int] | None = None,
    *,
    epsilon: float = 0.8,
    delta: float = 0.05,
    time_limit: float = 10.0,
    memory_limit: int = _DEFAULT_MEMORY,
    seed: int | None = None,
    counters: Sequence[str] = _COUNTERS,
) -> Count:
    """Count the settings of some variables that can be completed to a solution of a formula.

    The counters are asked in turn until one answers within its limits. Each is tested once per process on formulas
    whose counts are known.

    Args:
        formula (`Formula`): the clauses.
        projection (`Iterable[int]`, *optional*): the variables whose settings are counted; defaults to all variables.
        epsilon (`float`, *optional*, defaults to `0.8`): the factor 1 + epsilon that an approximate count may be off.
        delta (`float`, *optional*, defaults to `0.05`): the probability that it is further off.
        time_limit (`float`, *optional*, defaults to `10.0`): seconds for each counter, its start included.
        memory_limit (`int`, *optional*, defaults to 4 GiB): bytes of address space for each counter (Linux).
        seed (`int`, *optional*): coins of the counter, from 0 to 2**64 - 1; drawn afresh by default, since whoever
            wrote the formula must not have known them.
        counters (`Sequence[str]`, *optional*): `"pyganak"` (exact) and `"pyapproxmc"` (approximate), by default in
            this order.

    Returns:
        [`Count`], a Python integer and what is certain about it.

    Raises:
        BrokenCounterError: a counter fails its self-test.
        CountingError: no counter answered within its limits.
        ImportError: none of the counters is installed.
        ValueError: an argument is outside its range.

    Source:
        Sharma et al., "GANAK: A Scalable Probabilistic Exact Model Counter", IJCAI 2019; Soos and Meel, "BIRD:
        Engineering an Efficient CNF-XOR SAT Solver and its Applications to Approximate Model Counting", AAAI 2019.
    """
    _check_settings(epsilon, delta, time_limit, memory_limit, counters)
    coins = _coins(seed)
    variables = range(1, formula.num_variables + 1) if projection is None else _checked_projection(formula, projection)
    simplified = _simplified(formula.clauses, variables)
    if simplified is None:
        return Count(0, 0.0, 0.0, "none", coins)
    clauses, inner_projection, num_free = simplified
    if not clauses:
        return Count(1 << num_free, 0.0, 0.0, "none", coins)
    request = {"clauses": clauses, "projection": inner_projection, "epsilon": epsilon, "delta": delta}
    request |= {"time_limit": time_limit, "memory_limit": memory_limit, "seed": coins}
    failures = {}
    for counter in counters:
        reply: dict[str, Any] = _ask(counter, request) if _is_installed_and_sound(counter) else {"status": "missing"}
        if reply["status"] == "counted" and reply["delta"] <= delta:
            value = int(reply["value"], 16) << num_free
            return Count(value, reply["epsilon"], reply["delta"], f"{counter} {reply['version']}", coins)
        failures[counter] = _REASONS.get(reply["status"]) or reply["reason"]
    reasons = "; ".join(f"{counter}: {reason}" for counter, reason in failures.items())
    if set(failures.values()) == {_REASONS["missing"]}:
        raise ImportError(f"Counting needs a solver ({reasons}). Do: pip install 'hf-imitate[counting]'")
    raise CountingError(
        f"No count of {len(clauses)} clauses ({reasons}). Raise `time_limit` or `memory_limit`, or `epsilon` and "
        "`delta`: a coarser approximation takes less time."
    )


def log_prob_of_answer(formula: Formula, answer: Sequence[int], **limits: Any) -> CountedLogProb:
    """The log-probability that a formula's law gives to one answer: [`log_probs_of_answers`] of one."""
    return log_probs_of_answers([formula], [answer], **limits)[0]


def log_probs_of_answers(
    formulas: Sequence[Formula],
    answers: Sequence[Sequence[int]],
    *,
    epsilon: float = 0.8,
    delta: float = 0.05,
    **limits: Any,
) -> list[CountedLogProb]:
    """The log-probabilities that formulas give to answers, with intervals that hold all at once.

        log p = log num_allowing - log num_outcomes

    Each count is made at an equal share of `delta`, so with probability at least 1 - `delta` *every* interval covers;
    the sum of log-probabilities then lies between the sums of the ends. The statement is about the counters' coins,
    not about the data. A denominator is counted once per formula, and not at all where `is_circuit` says 2**m.

    Args:
        formulas (`Sequence[Formula]`): one per answer: the law stated for its question.
        answers (`Sequence[Sequence[int]]`): the human's answers, a truth value per answer bit.
        epsilon (`float`, *optional*, defaults to `0.8`): relative error of a count that must be approximated; the
            interval reaches log(1 + epsilon) to both sides, twice that where both counts are approximate.
        delta (`float`, *optional*, defaults to `0.05`): probability that any interval misses.
        limits: `time_limit`, `memory_limit`, `seed`, `counters` of [`count`].

    Returns:
        `list[CountedLogProb]`, nats. An answer that its formula forbids has -inf; so has each answer of a formula that
        allows none.

    Raises:
        CountingError, ImportError, ValueError: as [`count`] does, or formulas and answers differ in number.
    """
    if len(formulas) != len(answers):
        raise ValueError(f"Each answer needs its formula; got {len(formulas)} formulas and {len(answers)} answers.")
    distinct = list(dict.fromkeys(formulas))
    num_counts = len(answers) + sum(not formula.is_circuit for formula in distinct)
    accuracy: dict[str, Any] = {"epsilon": epsilon, "delta": delta / max(num_counts, 1)}
    outcomes = {formula: _count_outcomes(formula, **accuracy, **limits) for formula in distinct}
    counted = []
    for formula, answer in zip(formulas, answers, strict=True):
        num_allowing = count(formula.conditioned_on(answer), formula.random_bits, **accuracy, **limits)
        counted.append(_log_ratio_of_counts(num_allowing, outcomes[formula]))
    return counted


def _count_outcomes(formula: Formula, **settings: Any) -> Count:
    if formula.is_circuit:
        return Count(1 << len(formula.random_bits), 0.0, 0.0, "none", 0)
    return count(formula, {*formula.random_bits, *map(abs, formula.answer_bits)}, **settings)


def _log_ratio_of_counts(num_allowing: Count, num_outcomes: Count) -> CountedLogProb:
    # A formula that allows nothing gives every answer probability 0, as one that allows something else does.
    value, total = num_allowing.value, max(num_outcomes.value, 1)
    epsilon = (1 + num_allowing.epsilon) * (1 + num_outcomes.epsilon) - 1
    log_prob = min(log_of_ratio(value, total), 0.0)
    return CountedLogProb(log_prob, counting_interval(value, total, epsilon), num_allowing, num_outcomes)


def _check_settings(
    epsilon: float, delta: float, time_limit: float, memory_limit: int, counters: Sequence[str]
) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"`epsilon` is {epsilon}; it must be above 0, since ApproxMC cannot count exactly.")
    if not 0 < delta < 1:
        raise ValueError(f"`delta` is {delta}; a probability of error must lie strictly between 0 and 1.")
    if not (0 < time_limit < math.inf and memory_limit > 0):
        raise ValueError(f"Limits must be above 0; got `time_limit` {time_limit}, `memory_limit` {memory_limit}.")
    if not counters or isinstance(counters, str) or any(counter not in _COUNTERS for counter in counters):
        raise ValueError(f"`counters` is {counters!r}; name one or more of {_COUNTERS}, in a tuple.")


def _coins(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(64)
    if not 0 <= seed < 2**64:
        raise ValueError(f"`seed` is {seed}; it must lie between 0 and 2**64 - 1.")
    return seed


def _checked_projection(formula: Formula, projection: Iterable[int]) -> set[int]:
    variables = set(projection)
    if any(type(variable) is not int or not 1 <= variable <= formula.num_variables for variable in variables):
        raise ValueError(f"`projection` must hold variables, from 1 to `num_variables` = {formula.num_variables}.")
    return variables


def _simplified(
    clauses: Sequence[Sequence[int]], projection: Iterable[int]
) -> tuple[list[list[int]], list[int], int] | None:
    """Drop what says nothing and number the rest from 1: clauses, projection, and how many variables are left free.

    A projected variable that no clause mentions doubles the count; solvers differ in whether they know. None means
    that there is no solution.
    """
    distinct = {frozenset(clause) for clause in clauses}
    if frozenset() in distinct:
        return None
    telling = [sorted(clause, key=abs) for clause in distinct if not any(-literal in clause for literal in clause)]
    telling.sort()  # so that a seed decides the count, whatever the order in which a set gives them
    new_number = {old: new for new, old in enumerate(sorted({abs(bit) for clause in telling for bit in clause}), 1)}
    renamed = [[new_number[bit] if bit > 0 else -new_number[-bit] for bit in clause] for clause in telling]
    projection = list(projection)
    inner = sorted(new_number[old] for old in projection if old in new_number)
    return renamed, inner, len(projection) - len(inner)


def _ask(counter: str, request: dict[str, Any]) -> dict[str, Any]:
    """Let a counter answer a request in a process of its own; a timeout or a crash is a reply, too."""
    # By path, since the package may be a checkout; -P keeps this folder, full of common names, off the child's path.
    command = [sys.executable, "-P", str(Path(__file__).with_name("counter_process.py"))]
    text = json.dumps(request | {"counter": counter}).encode()
    limit = request["time_limit"]
    try:
        done = subprocess.run(
            command, input=text, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"no count within {limit} seconds"}
    if done.returncode:
        is_signal = -done.returncode in set(signal.Signals)
        cause = signal.Signals(-done.returncode).name if is_signal else f"exit code {done.returncode}"
        return {"status": "failed", "reason": f"its process died ({cause}), perhaps for want of memory"}
    return json.loads(done.stdout)


@functools.cache
def _is_installed_and_sound(counter: str) -> bool:
    """Whether a counter is there; raises if it is there and counts wrongly."""
    for clauses, projection, true_count in _KNOWN_COUNTS:
        # Epsilon and seed are fixed, so that a release either passes always or never.
        request = {"clauses": clauses, "projection": projection, "epsilon": 0.8, "delta": 0.05, "seed": 1}
        reply = _ask(counter, request | {"time_limit": _SELF_TEST_SECONDS, "memory_limit": _DEFAULT_MEMORY})
        if reply["status"] == "missing":
            return False
        counted = int(reply["value"], 16) if reply["status"] == "counted" else None
        factor = 1 + reply.get("epsilon", 0.0)
        if counted is None or not true_count / factor <= counted <= true_count * factor:
            result = reply.get("reason") or f"it counts {counted} solutions of a formula that has {true_count}"
            raise BrokenCounterError(
                f"{counter} {reply.get('version', '')} fails its self-test: {result}. Its counts would be certified "
                f"wrongly. Install one that counts rightly: {_CURES[counter]}."
            )
    return True
