"""One model count in a process of its own: a JSON request on stdin, a JSON reply on stdout.

`hf_imitate.counting` starts this file by its path, since a solver may crash, run forever or use up the memory on a
formula that somebody wrote to make it do so. It needs the standard library, one solver and nothing of this package.
"""

import contextlib
import importlib
import json
import os
import re
import sys
import tempfile
import time
from typing import Any

# The solvers print progress. A file that may not grow past this holds it.
MAX_CHATTER_BYTES = 2**24

# Ganak recognises a part of the formula that it has counted before by a 64-bit hash. Two parts that differ collide
# with probability 2.004 / 2**64 (https://huggingface.co/papers/1503.03465), and then the count may be wrong.
_COLLISION_PROBABILITY = 2.004 / 2**64
# Where Ganak does not say how often it looked parts up: more than a processor can look up in a second.
_MOST_LOOKUPS_PER_SECOND = 1e7
_CACHE_LINE = re.compile(r"cache K \(lookup/ stores/ hits/ dels\)\s+(\d+)\s+(\d+)")


def collision_bound(chatter: str, seconds: float) -> float:
    """Bound the probability that Ganak took two different parts of a formula for the same one.

    Every look-up is compared with at most as many stored parts as there were stores, each time with the collision
    probability of the hash: the union bound is its product with both numbers.

    Args:
        chatter (`str`): what Ganak printed at verbosity 1; it tells look-ups and stores in thousands, rounded down.
        seconds (`float`): processor time it took, used where it printed no such line.

    Returns:
        `float`, a probability over the seed of the hash, at most 1.
    """
    lines = _CACHE_LINE.findall(chatter)
    pairs: float = sum(1000 * (int(lookups) + 1) * 1000 * (int(stores) + 1) for lookups, stores in lines)
    if not lines:
        pairs = (_MOST_LOOKUPS_PER_SECOND * seconds) ** 2
    return min(1.0, _COLLISION_PROBABILITY * pairs)


def count_with_ganak(solver: Any, request: dict[str, Any]) -> tuple[int, float, float]:
    """Count exactly. Returns the count, the epsilon 0 and the probability of a hash collision."""
    started = time.process_time()
    with _captured_stdout() as chatter:
        counter = solver.Counter(verbose=1, seed=request["seed"])
        counter.add_clauses(request["clauses"])
        counter.set_sampling_set(request["projection"])
        value = counter.count()
    return value, 0.0, collision_bound("".join(chatter), time.process_time() - started)


def count_with_approxmc(solver: Any, request: dict[str, Any]) -> tuple[int, float, float]:
    """Count up to a factor 1 + epsilon. Returns the count, epsilon and delta as asked."""
    epsilon, delta = request["epsilon"], request["delta"]
    with _captured_stdout():
        counter = solver.Counter(seed=request["seed"] % 2**32, epsilon=epsilon, delta=delta)
        counter.add_clauses(request["clauses"])
        solutions_per_cell, num_hashes = counter.count(request["projection"])
    return solutions_per_cell << num_hashes, epsilon, delta


COUNTERS = {"pyganak": count_with_ganak, "pyapproxmc": count_with_approxmc}


def reply_to(request: dict[str, Any]) -> dict[str, Any]:
    """Count as asked; what goes wrong is told in the reply."""
    try:
        # By name: each solver is optional, and a missing one is an answer.
        solver = importlib.import_module(request["counter"])
    except Exception as error:  # a library it needs, too little memory to load it: whatever it is, it has a reason
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == request["counter"]
        return {"status": "missing" if is_missing else "failed", "reason": _said(error)}
    version = str(getattr(solver, "VERSION", "of unknown version"))
    try:
        value, epsilon, delta = COUNTERS[request["counter"]](solver, request)
    except MemoryError:
        return {"status": "failed", "version": version, "reason": "ran out of memory"}
    except Exception as error:  # whatever a solver raises belongs in the reply, for it is the caller's to judge
        return {"status": "failed", "version": version, "reason": _said(error)}
    # Hexadecimal: Python refuses to write or read integers of many decimal digits.
    return {"status": "counted", "version": version, "value": hex(value), "epsilon": epsilon, "delta": delta}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


@contextlib.contextmanager
def _captured_stdout():
    """Send file descriptor 1 to a file meanwhile; the list it gives holds that file's text afterwards."""
    text: list[str] = []
    stdout = os.dup(1)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 1)
        try:
            yield text
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            chatter.seek(0)
            text.append(chatter.read().decode("utf-8", "replace"))


def _limit_resources(memory_limit: int, time_limit: float) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits; the parent still ends this process in time
        return
    wanted = {
        "RLIMIT_AS": memory_limit,
        "RLIMIT_CPU": int(time_limit) + 5,  # the parent kills earlier, unless it has died itself
        "RLIMIT_FSIZE": MAX_CHATTER_BYTES,
        "RLIMIT_CORE": 0,
    }
    for name, limit in wanted.items():
        # A system may know a limit and not allow it to be set (macOS: RLIMIT_AS).
        with contextlib.suppress(AttributeError, OSError, ValueError):
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(number, (lowest, lowest))


def main() -> None:
    """Read one request from stdin, write one reply to stdout."""
    # Ganak's own count passes through decimal text on its way into a Python integer.
    sys.set_int_max_str_digits(0)
    request = json.load(sys.stdin)
    _limit_resources(request["memory_limit"], request["time_limit"])
    json.dump(reply_to(request), sys.stdout)


if __name__ == "__main__":
    main()
