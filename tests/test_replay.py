import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

from hf_imitate.human_rows import HumanRow
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer, Rendered
from hf_imitate.replay import Entry, ReplayBuffer


def filled(num, capacity=100, seed=0):
    buffer = ReplayBuffer(capacity, seed)
    for row in range(num):
        buffer.add(Entry(row, Answer(f"answer {row}", row % 2 == 0), (1.0, math.nan), (math.nan, 0.5)))
    return buffer


def test_a_draw_depends_on_seed_and_number_alone():
    one, other = filled(50), filled(50)
    other.draw(7, 1)  # what was drawn before leaves no trace

    assert one.draw(7, 3) == other.draw(7, 3)
    assert one.draw(7, 3) != one.draw(7, 4)
    assert one.draw(7, 3) != filled(50, seed=1).draw(7, 3)


def test_the_answers_of_one_draw_differ_and_all_come_up_alike():
    buffer = filled(10)
    counts = Counter()
    for number in range(2000):
        rows = [entry.row for entry in buffer.draw(4, number)]
        assert len(set(rows)) == 4
        counts.update(rows)

    # Each comes up in 4 of 10 draws: 800 of 2000, standard deviation 22.
    assert all(abs(count - 800) < 110 for count in counts.values())
    assert len(counts) == 10


def test_answers_to_one_row_come_in_groups_and_all_come_up_alike():
    buffer = ReplayBuffer(100, 0)
    for number in range(40):
        buffer.add(Entry(number // 4 if number < 36 else number, Answer(f"answer {number}", True)))
    counts = Counter()
    for number in range(2000):
        drawn = buffer.draw(6, number, together=2)
        assert len(set(drawn)) == 6
        counts.update(drawn)
        # Only answers that stand alone come alone; the last group may be cut.
        groups = [(row, len(list(same))) for row, same in itertools.groupby(entry.row for entry in drawn)]
        assert all(row >= 36 or length in (2, 4) for row, length in groups[:-1])

    # Each comes up in about 6 of 40 draws.
    assert len(counts) == 40
    assert all(abs(count - 300) < 80 for count in counts.values())


def test_the_oldest_answers_go_first():
    buffer = filled(10, capacity=4)

    assert [entry.row for entry in buffer.entries] == [6, 7, 8, 9]


def test_more_than_there_is_cannot_be_drawn():
    assert ReplayBuffer().draw(5, 0) == []
    assert filled(3).draw(0, 0) == []
    assert sorted(entry.row for entry in filled(3).draw(5, 0)) == [0, 1, 2]


def test_its_state_goes_through_json():
    buffer = filled(5)
    buffer.add(Entry(9, Answer("a", False)))

    text = json.dumps(buffer.state(), allow_nan=False)
    restored = ReplayBuffer(100, 0)
    restored.add(Entry(77, Answer("stale", True)))
    restored.load_state(json.loads(text))

    assert [repr(entry) for entry in restored.entries] == [repr(entry) for entry in buffer.entries]
    assert [entry.row for entry in restored.draw(3, 8)] == [entry.row for entry in buffer.draw(3, 8)]
    assert isinstance(restored.entries[0], Entry)
    assert isinstance(restored.entries[0].answer, Answer)
    assert isinstance(restored.entries[0].checks, tuple)


def test_an_entry_is_a_pair_with_what_its_row_says():
    rendered = Rendered([1], [2], True)
    human_rows = SimpleNamespace(rows={1: HumanRow(rendered, Answer("by a human", True), 0.5, 10)})
    with_checks = Entry(1, Answer("by the imitator", False), (1.0,), (0.0,)).pair(["q0", "q1"], human_rows)
    plain = Entry(1, Answer("by the imitator", False)).pair(["q0", "q1"], human_rows)

    sides = Answer("by a human", True), (Answer("by the imitator", False),)
    assert with_checks == Pair("q1", *sides, 0.5, (1.0,), ((0.0,),))
    assert plain == Pair("q1", *sides, 0.5)
