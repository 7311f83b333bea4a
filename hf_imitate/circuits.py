"""Formulas that a model counter reads, and circuits that write them gate by gate."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

# A formula is somebody else's text: larger ones are refused before any memory goes into them.
MAX_VARIABLES = 1_000_000
MAX_LITERALS = 2_000_000


class FormulaTooLargeError(ValueError):
    """A formula has more variables or literals than this package passes on to a solver."""


@dataclass(frozen=True)
class Formula:
    """A Boolean formula in conjunctive normal form, with its answer bits and random bits.

    Args:
        clauses (`tuple[tuple[int, ...], ...]`): each clause is a tuple of literals of which at least one must be true;
            the literal 3 is variable 3, -3 its negation. Lists are accepted and kept as tuples.
        num_variables (`int`): variables are numbered from 1 to this.
        answer_bits (`tuple[int, ...]`): the literals that are read as the answer, in its order.
        random_bits (`tuple[int, ...]`, *optional*, defaults to `()`): the variables that the imitator draws uniformly;
            none in a constraint system.
        is_circuit (`bool`, *optional*, defaults to `False`): whether every setting of the random bits allows exactly
            one answer. [`Circuit.sampler`] knows; never set it for clauses that somebody else wrote, since p is then
            computed without counting the denominator.

    Raises:
        FormulaTooLargeError: more than `MAX_VARIABLES` variables or `MAX_LITERALS` literals.
        ValueError: a literal that is no nonzero integer, or whose variable is not between 1 and `num_variables`; a
            random bit that is negated or named twice.
    """

    clauses: tuple[tuple[int, ...], ...]
    num_variables: int
    answer_bits: tuple[int, ...]
    random_bits: tuple[int, ...] = ()
    is_circuit: bool = False

    def __post_init__(self) -> None:
        if type(self.num_variables) is not int or self.num_variables < 0:
            raise ValueError(f"`num_variables` is {self.num_variables!r}; it must be an integer, at least 0.")
        if self.num_variables > MAX_VARIABLES:
            raise FormulaTooLargeError(f"`num_variables` is {self.num_variables}; the most are {MAX_VARIABLES}.")
        clauses = []
        room = MAX_LITERALS
        for number, clause in enumerate(self.clauses):
            clauses.append(self._checked(clause, f"clause {number}"))
            room -= 1 + len(clause)
            if room < 0:
                raise FormulaTooLargeError(
                    f"The formula has more than {MAX_LITERALS} literals and clauses (passed in clause {number})."
                )
        # A frozen dataclass is written to only here, before anybody holds it.
        object.__setattr__(self, "clauses", tuple(clauses))
        object.__setattr__(self, "answer_bits", self._checked(self.answer_bits, "`answer_bits`"))
        object.__setattr__(self, "random_bits", self._checked(self.random_bits, "`random_bits`"))
        if len(set(self.random_bits)) < len(self.random_bits) or any(bit < 0 for bit in self.random_bits):
            raise ValueError("`random_bits` must be variables, positive and each named once.")

    def _checked(self, literals: Sequence[int], place: str) -> tuple[int, ...]:
        if not isinstance(literals, tuple | list):
            raise ValueError(f"{place} is a {type(literals).__name__}; it must be a tuple or list of literals.")
        for literal in literals:
            # A bool is an int to Python, and a float that is a whole number compares like one.
            if type(literal) is not int or not 1 <= abs(literal) <= self.num_variables:
                raise ValueError(
                    f"{place} holds {literal!r:.40}; a literal is an integer whose absolute value is a variable, "
                    f"from 1 to `num_variables` = {self.num_variables}."
                )
        return tuple(literals)

    @classmethod
    def from_dimacs(cls, text: str, answer_bits: Sequence[int], random_bits: Sequence[int] = ()) -> "Formula":
        """Read the clauses that somebody wrote, a language model for one, in the DIMACS format.

        Args:
            text (`str`): comment lines (`c ...`), a header `p cnf <variables> <clauses>`, then literals with a 0 after
                each clause.
            answer_bits (`Sequence[int]`): as of the class; the reader says what is read as the answer.
            random_bits (`Sequence[int]`, *optional*, defaults to `()`): as of the class.

        Raises:
            FormulaTooLargeError: as of the class.
            ValueError: no such header, something that is no integer, or not as many clauses as the header says.
        """
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("c")]
        header = re.fullmatch(r"\s*p\s+cnf\s+(\d{1,9})\s+(\d{1,9})\s*", lines[0] if lines else "")
        if header is None:
            raise ValueError("A DIMACS text begins with `p cnf <variables> <clauses>`; this one does not.")
        clauses: list[tuple[int, ...]] = []
        clause: list[int] = []
        for word in " ".join(lines[1:]).split():
            if not re.fullmatch(r"-?\d{1,9}", word):
                raise ValueError(f"Clause {len(clauses)} holds something that is no literal (an integer).")
            if word.strip("-0"):
                clause.append(int(word))
            else:
                clauses.append(tuple(clause))
                clause = []
        if clause or len(clauses) != int(header[2]):
            raise ValueError(
                f"The header announces {header[2]} clauses; {len(clauses)} are closed by a 0"
                f"{', and one is left open' if clause else ''}."
            )
        return cls(tuple(clauses), int(header[1]), tuple(answer_bits), tuple(random_bits))

    def conditioned_on(self, answer: Sequence[int]) -> "Formula":
        """Fix the answer bits: the formula that also demands this answer.

        Args:
            answer (`Sequence[int]`): one truth value (0, 1 or a bool) per answer bit, in their order.

        Raises:
            ValueError: not one truth value per answer bit.
        """
        if len(answer) != len(self.answer_bits) or any(value not in (0, 1) for value in answer):
            raise ValueError(
                f"The answer must be {len(self.answer_bits)} truth values (0 or 1), one per answer bit; "
                f"got {len(answer)} values."
            )
        fixed = tuple((bit if value else -bit,) for bit, value in zip(self.answer_bits, answer, strict=True))
        return replace(self, clauses=self.clauses + fixed)


class Circuit:
    """Writes a sampler circuit or a constraint system as a [`Formula`].

    A bit is a literal: an integer, with its negation as `-bit`. A number is a list of bits, the lowest first. Each
    gate adds one variable and the clauses that make it equal to what it computes, so a circuit of gates over random
    bits has exactly one answer for each setting of them.

    Example:

    ```python
    >>> circuit = Circuit()
    >>> left, right = circuit.random_bits(4), circuit.random_bits(4)
    >>> sampler = circuit.sampler(circuit.add(left, right))  # the sum of two uniform numbers below 16
    >>> log_prob_of_answer(sampler, [1, 1, 1, 0, 0]).log_prob  # p(7) = 8 / 256
    -3.4657...
    ```

    Source:
        Tseitin, "On the complexity of derivation in propositional calculus" (1968), for the clauses of a gate.
    """

    def __init__(self) -> None:
        self._clauses: list[tuple[int, ...]] = []
        self._num_variables = 0
        self._random_bits: list[int] = []
        self._is_circuit = True

    def random_bits(self, num_bits: int) -> list[int]:
        """Bits that the imitator draws uniformly, each on its own."""
        drawn = [self._new_bit() for _ in range(num_bits)]
        self._random_bits += drawn
        return drawn

    def free_bits(self, num_bits: int) -> list[int]:
        """Bits that may take either value: the unknowns of a constraint system."""
        self._is_circuit &= num_bits == 0
        return [self._new_bit() for _ in range(num_bits)]

    def constants(self, number: int, num_bits: int) -> list[int]:
        """The bits of a known number, such as one that stands in the question.

        Raises:
            ValueError: the number does not fit.
        """
        if not 0 <= number < 1 << num_bits:
            raise ValueError(f"{number} does not fit into {num_bits} bits; it must lie in 0 to {(1 << num_bits) - 1}.")
        return [self.all_of() if number >> place & 1 else -self.all_of() for place in range(num_bits)]

    def all_of(self, *bits: int) -> int:
        """True where every bit is; of no bits, true."""
        self._check(bits)
        gate = self._new_bit()
        self._clauses += [(-gate, bit) for bit in bits]
        self._clauses.append((gate, *(-bit for bit in bits)))
        return gate

    def any_of(self, *bits: int) -> int:
        """True where at least one bit is; of no bits, false."""
        return -self.all_of(*(-bit for bit in bits))

    def xor(self, *bits: int) -> int:
        """True where an odd number of bits is: their parity; of no bits, false."""
        if not bits:
            return self.any_of()
        parity = bits[0]
        for bit in bits[1:]:
            parity = self.choose(parity, -bit, bit)
        return parity

    def choose(self, condition: int, if_true: int, if_false: int) -> int:
        """The value of one bit or of another."""
        self._check((condition, if_true, if_false))
        gate = self._new_bit()
        self._clauses += [(-condition, -if_true, gate), (-condition, if_true, -gate)]
        self._clauses += [(condition, -if_false, gate), (condition, if_false, -gate)]
        return gate

    def add(self, left: Sequence[int], right: Sequence[int]) -> list[int]:
        """The sum of two numbers of k bits, in k + 1 bits."""
        self._check_widths(left, right)
        carry, total = self.any_of(), []
        for one, other in zip(left, right, strict=True):
            differ = self.xor(one, other)
            total.append(self.xor(differ, carry))
            carry = self.choose(differ, carry, one)
        return [*total, carry]

    def less_than(self, left: Sequence[int], right: Sequence[int]) -> int:
        """True where one number is below another of as many bits."""
        self._check_widths(left, right)
        is_less = self.any_of()
        for one, other in zip(left, right, strict=True):
            # The highest place in which they differ decides, and it comes last.
            is_less = self.choose(self.xor(one, other), other, is_less)
        return is_less

    def require(self, *bits: int) -> None:
        """Demand that at least one of the bits is true."""
        self._check(bits)
        self._is_circuit = False
        self._clauses.append(bits)

    def sampler(self, answer_bits: Sequence[int]) -> Formula:
        """The law of a circuit's output when its random bits are uniform.

        Raises:
            ValueError: there are free bits or demands, with which the output is not a function of the random bits.
        """
        if not self._is_circuit:
            raise ValueError(
                "A sampler's answer must be a function of its random bits, but this circuit has free bits or demands. "
                "Use `constraint_system`."
            )
        return self._formula(answer_bits)

    def constraint_system(self, answer_bits: Sequence[int]) -> Formula:
        """The uniform law over what meets all demands: pairs of random bits, if there are any, and answer bits."""
        return self._formula(answer_bits)

    def _formula(self, answer_bits: Sequence[int]) -> Formula:
        self._check(answer_bits)
        return Formula(
            tuple(self._clauses), self._num_variables, tuple(answer_bits), tuple(self._random_bits), self._is_circuit
        )

    def _new_bit(self) -> int:
        self._num_variables += 1
        return self._num_variables

    def _check_widths(self, left: Sequence[int], right: Sequence[int]) -> None:
        if len(left) != len(right):
            raise ValueError(f"The numbers have {len(left)} and {len(right)} bits; pad one with `constants(0, n)`.")

    def _check(self, bits: Sequence[int]) -> None:
        for bit in bits:
            if type(bit) is not int or not 1 <= abs(bit) <= self._num_variables:
                raise ValueError(f"{bit!r:.40} is no bit of this circuit; it has the bits 1 to {self._num_variables}.")
