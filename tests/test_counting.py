import decimal
import itertools
import math
import random
import sys

import pytest
from scipy.stats import binom

from examples.counting import RULES, bits_of, groups, sudoku
from hf_imitate import counter_process, counting
from hf_imitate.bounds import clopper_pearson
from hf_imitate.circuits import Circuit, Formula
from hf_imitate.counting import (
    BrokenCounterError,
    CountingError,
    count,
    log_prob_of_answer,
    log_probs_of_answers,
)
from hf_imitate.retrodictive_bounds import log_of_ratio

_EXTRA = "needs the solvers of `pip install 'hf-imitate[counting]'`"


@pytest.fixture
def ganak():
    return pytest.importorskip("pyganak", reason=_EXTRA)


@pytest.fixture
def approxmc():
    return pytest.importorskip("pyapproxmc", reason=_EXTRA)


def bits_of_number(number, num_bits):
    return [number >> place & 1 for place in range(num_bits)]


def adder(num_bits):
    """The sum of two uniform numbers: s can come about in min(s, 2^(k+1) - 2 - s) + 1 ways."""
    circuit = Circuit()
    return circuit.sampler(circuit.add(circuit.random_bits(num_bits), circuit.random_bits(num_bits)))


def comparator(num_bits, bound):
    """Whether a uniform number is below `bound`: any dyadic probability."""
    circuit = Circuit()
    drawn = circuit.random_bits(num_bits)
    return circuit.sampler([circuit.less_than(drawn, circuit.constants(bound, num_bits))])


def random_formula(rng, num_variables, num_clauses, **bits):
    width = min(3, num_variables)
    clauses = [
        tuple(rng.choice((-1, 1)) * variable for variable in rng.sample(range(1, num_variables + 1), width))
        for _ in range(num_clauses)
    ]
    return Formula(tuple(clauses), num_variables, **{"answer_bits": ()} | bits)


def hard_formula():
    """150 variables with 2.2 clauses each: far more than Ganak counts in a second."""
    return random_formula(random.Random(0), 150, 330)


def projected_solutions(formula, variables):
    """The settings of some variables that can be completed to a solution, by trying all assignments."""
    found = set()
    for values in itertools.product((False, True), repeat=formula.num_variables):
        if all(any(values[abs(bit) - 1] == (bit > 0) for bit in clause) for clause in formula.clauses):
            found.add(tuple(values[abs(variable) - 1] == (variable > 0) for variable in variables))
    return found


# The pure parts, for which no solver need be installed.


@pytest.mark.parametrize(
    ("numerator", "denominator"),
    [(1, 1), (1, 3), (2, 3), (7, 5), (1, 10**400), (10**400 - 1, 10**400), (3**9000, 1), (2**64 - 1, 2**64), (1, 2)],
)
def test_logs_of_quotients_of_large_integers_keep_their_digits(numerator, denominator):
    with decimal.localcontext(prec=1000):
        expected = (decimal.Decimal(numerator) / decimal.Decimal(denominator)).ln()
    assert log_of_ratio(numerator, denominator) == pytest.approx(float(expected), rel=1e-15, abs=0)


def test_the_log_of_nothing_is_minus_infinity():
    assert log_of_ratio(0, 5) == -math.inf


@pytest.mark.parametrize(
    ("clauses", "projection", "expected"),
    [
        ((), (1, 2, 3), 8),
        ((), (), 1),
        (((1, -1), (2, 3, -2)), (1, 2), 4),  # clauses that are always true
        (((1,), ()), (1, 2), 0),  # an empty clause is never true
        ((), tuple(range(1, 20_001)), 2**20_000),
    ],
    ids=["nothing demanded", "nothing counted", "always true", "never true", "six thousand digits"],
)
def test_what_needs_no_solver_is_counted_without_one(clauses, projection, expected):
    counted = count(Formula(clauses, 20_000, ()), projection)
    assert (counted.value, counted.delta, counted.counter, counted.is_exact) == (expected, 0.0, "none", True)


def test_a_formula_is_made_small_before_a_solver_sees_it():
    # Variable 9 occurs but is not projected; 5 is projected but occurs only in a clause that is always true.
    clauses = ((9, 4, 4), (4, 9), (-7,), (5, -5, 7))
    assert counting._simplified(clauses, (4, 5, 7, 8)) == ([[-2], [1, 3]], [1, 2], 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, "`epsilon` is 0"),
        ({"epsilon": math.nan}, "`epsilon` is nan"),
        ({"delta": 0.0}, "`delta` is 0"),
        ({"delta": 1.0}, "`delta` is 1"),
        ({"time_limit": 0.0}, "`time_limit` 0"),
        ({"time_limit": math.inf}, "`time_limit` inf"),
        ({"memory_limit": 0}, "`memory_limit` 0"),
        ({"counters": ()}, "`counters` is"),
        ({"counters": "pyganak"}, "`counters` is 'pyganak'"),
        ({"counters": ("os",)}, "`counters` is"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 2**64}, "`seed` is"),
        ({"projection": (3,)}, "`projection` must hold"),
        ({"projection": (-1,)}, "`projection` must hold"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        count(Formula(((1, 2),), 2, ()), **settings)


def test_formulas_and_answers_must_be_equally_many():
    with pytest.raises(ValueError, match="2 formulas and 1 answers"):
        log_probs_of_answers([Formula((), 1, (1,))] * 2, [(1,)])


def test_hash_collisions_are_charged_by_lookups_times_stores():
    # Ganak tells thousands, rounded down: 3999 look-ups and 1999 stores print as 3 and 1.
    line = "c o cache K (lookup/ stores/ hits/ dels) 3      1      2      0       -- Klookup/s:  10\n"
    assert counter_process.collision_bound(line, 1.0) == pytest.approx(2.004 * 4000 * 2000 / 2**64, abs=0)
    assert counter_process.collision_bound(2 * line, 1.0) == pytest.approx(2 * 2.004 * 4000 * 2000 / 2**64, abs=0)
    assert counter_process.collision_bound("other words", 2.0) == pytest.approx(2.004 * (2e7) ** 2 / 2**64, abs=0)
    assert counter_process.collision_bound("", 1e9) == 1.0


def test_a_solver_that_is_not_installed_is_named_with_the_cure(plant):
    for counter in ("pyganak", "pyapproxmc"):
        plant(counter, f"raise ModuleNotFoundError('gone', name={counter!r})")
    with pytest.raises(ImportError, match=r"pyganak: not installed; .*pip install 'hf-imitate\[counting\]'"):
        count(Formula(((1, 2),), 2, ()))


# Exact counts.


@pytest.mark.parametrize("num_bits", [1, 4, 8, 16, 32])
def test_sums_of_uniform_numbers_have_the_triangular_law(ganak, num_bits):
    formula = adder(num_bits)
    for total in {0, 2**num_bits - 1, 2**num_bits, 2 ** (num_bits + 1) - 3}:
        counted = log_prob_of_answer(formula, bits_of_number(total, num_bits + 1))
        ways = min(total, 2 ** (num_bits + 1) - 2 - total) + 1
        assert (counted.num_allowing.value, counted.num_allowing.is_exact) == (ways, True)
        assert counted.log_prob == pytest.approx(math.log(ways) - 2 * num_bits * math.log(2), abs=1e-12)
        assert counted.interval == (counted.log_prob, counted.log_prob)
        assert 0 < counted.num_allowing.delta < 1e-6


@pytest.mark.parametrize("num_bits", [2, 32])
def test_parity_is_a_fair_coin(ganak, num_bits):
    circuit = Circuit()
    formula = circuit.sampler([circuit.xor(*circuit.random_bits(num_bits))])
    counted = log_prob_of_answer(formula, [1])
    assert counted.num_allowing.value == 2 ** (num_bits - 1)
    assert counted.log_prob == -math.log(2)


@pytest.mark.parametrize(("num_bits", "bound"), [(3, 5), (16, 12_345), (32, 2**32 - 1), (32, 1)])
def test_a_comparator_gives_any_dyadic_probability(ganak, num_bits, bound):
    formula = comparator(num_bits, bound)
    p_less, p_not_less = (log_prob_of_answer(formula, [answer]) for answer in (1, 0))
    assert p_less.log_prob == pytest.approx(math.log(bound / 2**num_bits), rel=1e-14)
    assert p_not_less.num_allowing.value == 2**num_bits - bound


def test_random_projected_formulas_agree_with_trying_all_assignments(ganak, approxmc):
    rng = random.Random(7)
    for trial in range(12):
        formula = random_formula(rng, 9, rng.randint(2, 34))
        projection = rng.sample(range(1, 10), rng.randint(0, 9))
        expected = len(projected_solutions(formula, projection))
        assert count(formula, projection).value == expected
        # So few solutions that ApproxMC lists them.
        if trial % 3 == 0 and expected < 70:
            assert count(formula, projection, counters=("pyapproxmc",)).value == expected


def test_whatever_the_formula_its_probabilities_sum_to_one(ganak):
    """An author who leaves the answer open must not get probability 1 for every answer."""
    unlinked = Formula((), 3, (2, 3), (1,))
    assert log_prob_of_answer(unlinked, (1, 0)).log_prob == pytest.approx(-math.log(4))

    rng = random.Random(3)
    for _ in range(3):
        formula = random_formula(rng, 8, 12, answer_bits=(4, -5), random_bits=(1, 2, 3))
        pairs = projected_solutions(formula, (1, 2, 3, 4, -5))
        total = 0.0
        for answer in itertools.product((0, 1), repeat=2):
            share = sum(pair[3:] == tuple(map(bool, answer)) for pair in pairs) / len(pairs)
            p_answer = math.exp(log_prob_of_answer(formula, answer).log_prob)
            assert p_answer == pytest.approx(share)
            total += p_answer
        assert total == pytest.approx(1)


def test_a_forbidden_answer_has_no_probability(ganak):
    counted = log_prob_of_answer(adder(3), bits_of_number(15, 4))
    assert (counted.num_allowing.value, counted.log_prob) == (0, -math.inf)
    assert counted.interval == (-math.inf, -math.inf)
    contradiction = Formula(((1,), (-1,)), 1, (1,))
    assert log_prob_of_answer(contradiction, (1,)).log_prob == -math.inf


def test_counting_agrees_with_drawing_from_the_circuit(ganak):
    rng = random.Random(5)
    num_hits = sum(rng.randrange(16) + rng.randrange(16) == 11 for _ in range(20_000))
    drawn = clopper_pearson(num_hits, 20_000, confidence=0.999)
    assert drawn.low <= math.exp(log_prob_of_answer(adder(4), bits_of_number(11, 5)).log_prob) <= drawn.high


# Sudokus as constraint systems.


def grids(puzzle, rules):
    """All ways to fill a grid, by backtracking."""
    size = math.isqrt(len(puzzle))
    units = [unit for rule in rules for unit in groups(size, rule)]
    found, grid = [], list(puzzle)

    def fill(cell):
        if cell == len(grid):
            found.append(tuple(grid))
            return
        seen = {grid[other] for unit in units if cell in unit for other in unit if other != cell}
        for digit in [puzzle[cell]] if puzzle[cell] else range(1, size + 1):
            if digit not in seen:
                grid[cell] = digit
                fill(cell + 1)
                grid[cell] = puzzle[cell]

    fill(0)
    return found


@pytest.mark.parametrize(
    ("puzzle", "rules"),
    [
        ((0,) * 16, RULES),
        ((1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 2, 0, 0, 0, 0), RULES),
        ((1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 2, 0, 0, 0, 0), ("rows", "columns")),
    ],
)
def test_a_sudoku_is_scored_by_its_number_of_solutions(ganak, puzzle, rules):
    solved = grids(puzzle, rules)
    counted = log_prob_of_answer(sudoku(puzzle, rules), bits_of(solved[-1]))
    assert counted.num_outcomes.value == len(solved)
    assert counted.log_prob == pytest.approx(-math.log(len(solved)))
    wrong = (solved[0][1], solved[0][0], *solved[0][2:])
    assert log_prob_of_answer(sudoku(puzzle, rules), bits_of(wrong)).log_prob == -math.inf


def test_a_sudoku_of_full_size_is_scored(ganak):
    row = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    solved = tuple(row[(column + shift) % 9] for shift in (0, 3, 6, 1, 4, 7, 2, 5, 8) for column in range(9))
    puzzle = tuple(0 if digit <= 3 else digit for digit in solved)
    counted = log_prob_of_answer(sudoku(puzzle), bits_of(solved))
    num_solutions = len(grids(puzzle, RULES))
    assert counted.num_outcomes.value == num_solutions > 2
    assert counted.log_prob == pytest.approx(-math.log(num_solutions))
    assert log_prob_of_answer(sudoku(solved), bits_of(solved)).log_prob == 0.0


# Approximate counts.


@pytest.mark.parametrize("epsilon", [0.8, 0.3])
def test_approximate_counts_keep_their_promise(approxmc, epsilon):
    """Fifty-six counts of two formulas at each epsilon: misses no more frequent than `delta` allows."""
    delta, num_misses, ratios = 0.2, 0, set()
    rng = random.Random(11)
    for num_clauses in (5, 12):
        formula = random_formula(rng, 12, num_clauses)
        truth = len(projected_solutions(formula, range(1, 13)))
        clauses, projection, num_free = counting._simplified(formula.clauses, range(1, 13))
        request = {"clauses": clauses, "projection": projection, "epsilon": epsilon, "delta": delta}
        for seed in range(28):
            value, *promise = counter_process.count_with_approxmc(approxmc, request | {"seed": seed})
            assert promise == [epsilon, delta]
            ratio = (value << num_free) / truth
            num_misses += not 1 / (1 + epsilon) <= ratio <= 1 + epsilon
            ratios.add(ratio)
    assert binom.sf(num_misses - 1, 56, delta) > 1e-3
    assert len(ratios) > 5  # they are estimates indeed


def test_the_interval_of_an_approximate_count_reaches_the_factor_to_both_sides(approxmc):
    formula = adder(10)
    counted = log_prob_of_answer(
        formula, bits_of_number(1018, 11), epsilon=0.3, delta=0.01, counters=("pyapproxmc",), seed=1
    )
    truth = math.log(1019) - 20 * math.log(2)
    assert counted.interval.low <= truth <= counted.interval.high
    assert counted.interval == pytest.approx((counted.log_prob - math.log(1.3), counted.log_prob + math.log(1.3)))
    assert not counted.num_allowing.is_exact


def test_an_error_is_shared_among_all_counts_that_are_made(approxmc):
    circuit = Circuit()
    circuit.require(*circuit.free_bits(2))
    system, sampler = circuit.constraint_system((1, 2)), adder(2)
    answers = [(1, 0), (0, 1), bits_of_number(2, 3)]
    counted = log_probs_of_answers([system, system, sampler], answers, delta=0.08, counters=("pyapproxmc",))
    # Three answers and the one denominator that is not known.
    assert [each.num_allowing.delta for each in counted] == [0.02] * 3
    assert counted[0].num_outcomes is counted[1].num_outcomes
    assert counted[0].num_outcomes.delta == 0.02
    assert (counted[2].num_outcomes.delta, counted[2].num_outcomes.value) == (0.0, 16)
    # Two approximate counts are off by at most both factors.
    assert counted[0].interval.low == pytest.approx(counted[0].log_prob - 2 * math.log(1.8))


def test_a_seed_decides_an_approximate_count(approxmc):
    formula = random_formula(random.Random(11), 12, 5)
    values = [count(formula, counters=("pyapproxmc",), seed=seed).value for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert values[:4] == values[4:]
    assert len(set(values)) > 1


# Solvers that lie, crash, hang or are gone.

_TAMPERED = """
import importlib, os, sys
here = os.path.dirname(os.path.abspath(__file__))
tampered, path = sys.modules.pop(__name__), list(sys.path)
sys.path[:] = [folder for folder in path if os.path.abspath(folder) != here]
real = importlib.import_module(__name__)
sys.path[:] = path
sys.modules[__name__] = tampered
VERSION = real.VERSION + ".tampered"

class Counter:
    def __init__(self, **settings):
        self.real, self.num_clauses = real.Counter(**settings), 0
    def add_clauses(self, clauses):
        self.num_clauses += len(clauses)
        self.real.add_clauses(clauses)
    def set_sampling_set(self, variables):
        self.real.set_sampling_set(variables)
    def count(self, *projection):
        result = self.real.count(*projection)
"""


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Put a module of a solver's name before the real one, in the solver's process alone."""

    def write(name, program):
        (tmp_path / f"{name}.py").write_text(program, encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    counting._is_installed_and_sound.cache_clear()
    yield write
    counting._is_installed_and_sound.cache_clear()


def test_an_approximate_counter_that_loses_powers_of_two_is_refused_by_name(approxmc, plant):
    plant("pyapproxmc", _TAMPERED + "        return result[0], 0\n")
    with pytest.raises(BrokenCounterError, match=r"pyapproxmc .*tampered .* 11 .* 720896.*pyapproxmc==4\.1\.24"):
        count(Formula(((1, 2),), 2, ()), counters=("pyapproxmc",))


def test_an_exact_counter_that_forgets_the_projection_is_refused_by_name(ganak, plant):
    plant("pyganak", _TAMPERED + "        return result\n    def set_sampling_set(self, variables):\n        pass\n")
    with pytest.raises(BrokenCounterError, match=r"pyganak .*tampered .* 31 .* 4\. .*pyganak>=2\.8"):
        count(Formula(((1, 2),), 2, ()), counters=("pyganak",))


def test_a_broken_counter_stops_the_count_even_where_another_would_do(ganak, plant):
    plant("pyganak", _TAMPERED + "        return result // 2\n")
    with pytest.raises(BrokenCounterError, match="pyganak"):
        count(Formula(((1, 2),), 2, ()))


# The self-test has at most eight clauses.
_IF_ASKED_FOR_MORE = "        if self.num_clauses > 8:\n            "


def test_a_crash_of_the_exact_counter_leaves_the_approximate_one(ganak, approxmc, plant):
    plant("pyganak", _TAMPERED + _IF_ASKED_FOR_MORE + "os.abort()\n        return result\n")
    formula = adder(4).conditioned_on(bits_of_number(9, 5))
    counted = count(formula, formula.random_bits)
    assert counted.counter == "pyapproxmc 4.1.24"
    assert counted.value == 10  # fewer than ApproxMC estimates
    with pytest.raises(CountingError, match=r"pyganak: its process died \(SIGABRT\)"):
        count(formula, formula.random_bits, counters=("pyganak",))


def test_an_exception_of_a_solver_is_told(ganak, plant):
    plant("pyganak", _TAMPERED + _IF_ASKED_FOR_MORE + "raise RuntimeError('lost')\n        return result\n")
    formula = adder(4).conditioned_on(bits_of_number(9, 5))
    with pytest.raises(CountingError, match="pyganak: RuntimeError: lost"):
        count(formula, formula.random_bits, counters=("pyganak",))


def test_a_count_of_thousands_of_digits_arrives_whole(ganak, plant):
    plant("pyganak", _TAMPERED + _IF_ASKED_FOR_MORE + "return 3**10_000\n        return result\n")
    formula = adder(4)
    assert count(formula, formula.random_bits, counters=("pyganak",)).value == 3**10_000


def test_an_exact_count_with_too_likely_a_hash_collision_is_not_used(ganak, approxmc):
    formula = adder(4).conditioned_on(bits_of_number(9, 5))
    with pytest.raises(CountingError, match="pyganak: its hash collisions cannot be excluded"):
        count(formula, formula.random_bits, delta=1e-30, counters=("pyganak",))
    assert count(formula, formula.random_bits, delta=1e-30).counter.startswith("pyapproxmc")


def test_a_formula_that_takes_too_long_is_given_up_in_time(ganak, approxmc):
    count(adder(1))  # the self-tests are not counted
    with pytest.raises(
        CountingError, match=r"pyganak: no count within 0\.5 seconds; pyapproxmc: no count within 0\.5"
    ):
        count(hard_formula(), time_limit=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process")
def test_a_solver_without_memory_is_a_named_error_and_not_a_crash_here(ganak):
    with pytest.raises(CountingError, match=r"pyganak: [^)]*(bad_alloc|memory|map|died)"):
        count(hard_formula(), memory_limit=2**25, counters=("pyganak",))
