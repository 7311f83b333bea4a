import itertools

import numpy as np
import pytest

from hf_imitate import circuits
from hf_imitate.circuits import Circuit, Formula, FormulaTooLargeError


def solutions(formula):
    """Every assignment that satisfies all clauses, by trying all of them. [S, num_variables]."""
    assert formula.num_variables <= 20
    values = (np.arange(1 << formula.num_variables)[:, None] >> np.arange(formula.num_variables) & 1).astype(bool)
    for clause in formula.clauses:
        values = values[
            np.any([values[:, abs(bit) - 1] == (bit > 0) for bit in clause] or [np.zeros(len(values), bool)], 0)
        ]
    return values


def read(values, bits):
    """The bits of each solution as one integer, the lowest first."""
    columns = [values[:, abs(bit) - 1] == (bit > 0) for bit in bits]
    return sum(column.astype(int) << place for place, column in enumerate(columns))


@pytest.mark.parametrize(
    ("build", "meaning"),
    [
        (lambda circuit, a, b, c: circuit.all_of(a, b, c), lambda a, b, c: a and b and c),
        (lambda circuit, a, b, c: circuit.any_of(a, -b, c), lambda a, b, c: a or not b or c),
        (lambda circuit, a, b, c: circuit.xor(a, b, c), lambda a, b, c: (a + b + c) % 2),
        (lambda circuit, a, b, c: circuit.xor(a, -b), lambda a, b, c: a == b),
        (lambda circuit, a, b, c: circuit.choose(a, b, c), lambda a, b, c: b if a else c),
        (lambda circuit, a, b, c: -circuit.choose(-a, b, -c), lambda a, b, c: c if a else not b),
        (lambda circuit, a, b, c: circuit.all_of(), lambda a, b, c: True),
        (lambda circuit, a, b, c: circuit.any_of(), lambda a, b, c: False),
        (lambda circuit, a, b, c: circuit.xor(), lambda a, b, c: False),
    ],
)
def test_a_gate_has_one_value_for_each_input_and_it_is_the_right_one(build, meaning):
    circuit = Circuit()
    inputs = circuit.random_bits(3)
    gate = build(circuit, *inputs)
    values = solutions(circuit.sampler([gate]))
    computed = sorted(zip(read(values, inputs), read(values, [gate]), strict=True))
    expected = [(a + 2 * b + 4 * c, int(meaning(a, b, c))) for a, b, c in itertools.product((0, 1), repeat=3)]
    assert computed == sorted(expected)


@pytest.mark.parametrize(
    ("build", "meaning"),
    [
        (lambda circuit, left, right: circuit.add(left, right), lambda left, right: left + right),
        (lambda circuit, left, right: [circuit.less_than(left, right)], lambda left, right: left < right),
    ],
)
def test_sums_and_comparisons_agree_with_integers(build, meaning):
    circuit = Circuit()
    left, right = circuit.random_bits(3), circuit.random_bits(3)
    result = build(circuit, left, right)
    values = solutions(circuit.sampler(result))
    one, other = read(values, left), read(values, right)
    assert len(set(zip(one, other, strict=True))) == len(values) == 64
    assert (read(values, result) == meaning(one, other)).all()


def test_constants_are_their_bits():
    circuit = Circuit()
    bits = circuit.constants(6, 4)
    assert read(solutions(circuit.sampler(bits)), bits).tolist() == [6]
    with pytest.raises(ValueError, match="16 does not fit into 4 bits"):
        circuit.constants(16, 4)


def test_only_gates_over_random_bits_are_a_sampler():
    circuit = Circuit()
    bits = circuit.random_bits(2)
    assert circuit.sampler(bits).is_circuit
    circuit.require(*bits)
    with pytest.raises(ValueError, match="constraint_system"):
        circuit.sampler(bits)
    assert not circuit.constraint_system(bits).is_circuit

    circuit = Circuit()
    with pytest.raises(ValueError, match="constraint_system"):
        circuit.sampler(circuit.free_bits(1))


def test_demands_leave_the_solutions_that_meet_them():
    circuit = Circuit()
    one, other, third = circuit.free_bits(3)
    circuit.require(one, other)
    circuit.require(-third)
    assert sorted(read(solutions(circuit.constraint_system([])), (one, other, third))) == [1, 2, 3]


def test_a_bit_of_nowhere_and_unequal_widths_are_refused():
    circuit = Circuit()
    bits = circuit.random_bits(3)
    for use in (lambda: circuit.xor(1, 9), lambda: circuit.require(0), lambda: circuit.sampler([True])):
        with pytest.raises(ValueError, match="no bit of this circuit"):
            use()
    with pytest.raises(ValueError, match="3 and 2 bits"):
        circuit.add(bits, bits[:2])
    with pytest.raises(ValueError, match="3 and 2 bits"):
        circuit.less_than(bits, bits[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((((1, 3),), 2, ()), "clause 0 holds 3"),
        ((((1,), (0,)), 2, ()), "clause 1 holds 0"),
        ((((True,),), 2, ()), "clause 0 holds True"),
        ((((1.0,),), 2, ()), r"clause 0 holds 1\.0"),
        (((("1",),), 2, ()), "clause 0 holds '1'"),
        ((("12",), 2, ()), "clause 0 is a str"),
        (((), 2, (3,)), "`answer_bits` holds 3"),
        (((), 2, (), (-1,)), "positive and each named once"),
        (((), 2, (), (1, 1)), "positive and each named once"),
        (((), -1, ()), "`num_variables` is -1"),
        (((), "2", ()), "`num_variables` is '2'"),
    ],
)
def test_what_is_no_formula_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Formula(*arguments)


def test_a_formula_beyond_the_limits_is_refused(monkeypatch):
    with pytest.raises(FormulaTooLargeError, match="1000000"):
        Formula((), 10**12, ())
    monkeypatch.setattr(circuits, "MAX_LITERALS", 9)
    Formula(((1, 2),) * 3, 2, ())
    with pytest.raises(FormulaTooLargeError, match="clause 3"):
        Formula(((1, 2),) * 4, 2, ())
    with pytest.raises(FormulaTooLargeError, match="clause 9"):
        Formula(((),) * 10, 2, ())


def test_lists_are_kept_as_tuples_so_that_nobody_can_change_a_formula():
    formula = Formula([[1, -2]], 2, [1], [2])
    assert formula == Formula(((1, -2),), 2, (1,), (2,))
    assert hash(formula) == hash(Formula(((1, -2),), 2, (1,), (2,)))


def test_conditioning_keeps_the_solutions_with_that_answer():
    formula = Formula(((1, 2), (-1, 3)), 3, (3, -1))
    everything = solutions(formula)
    for answer in itertools.product((0, 1), repeat=2):
        kept = everything[(everything[:, 2] == answer[0]) & (everything[:, 0] != answer[1])]
        assert solutions(formula.conditioned_on(answer)).tolist() == kept.tolist()


@pytest.mark.parametrize("answer", [(1,), (1, 0, 1), (1, 2), (1, -1)])
def test_an_answer_that_is_not_one_truth_value_per_bit_is_refused(answer):
    with pytest.raises(ValueError, match="2 truth values"):
        Formula((), 2, (1, 2)).conditioned_on(answer)


def test_dimacs_text_is_read():
    text = "c the rules\n p cnf 3 3\n1 -2 0 3\n0\nc more\n-1 2 -3 0\n"
    assert Formula.from_dimacs(text, [1, 2], [3]) == Formula(((1, -2), (3,), (-1, 2, -3)), 3, (1, 2), (3,))
    assert Formula.from_dimacs("p cnf 2 1\n0", []) == Formula(((),), 2, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with `p cnf"),
        ("1 2 0", "begins with `p cnf"),
        ("p cnf 2", "begins with `p cnf"),
        ("p cnf 2 1\n1 secret 0", "Clause 0 holds something"),
        ("p cnf 2 1\n1 1e3 0", "Clause 0 holds something"),
        ("p cnf 2 1\n" + "9" * 5000 + " 0", "Clause 0 holds something"),
        ("p cnf 2 2\n1 0", "announces 2 clauses; 1 are closed"),
        ("p cnf 2 1\n1 0 2", "one is left open"),
        ("p cnf 2 1\n3 0", "clause 0 holds 3"),
        ("p cnf 999999999 0", "the most are"),
    ],
)
def test_text_that_is_no_dimacs_is_refused_and_not_quoted(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        Formula.from_dimacs(text, [])
    assert "secret" not in str(caught.value)
