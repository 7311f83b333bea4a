from collections import Counter

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hf_imitate.human_rows import ROW_COLUMN, HumanRows, render_humans, without_internal
from hf_imitate.rendering import Answer, Renderer


@pytest.fixture(scope="module")
def renderer(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return Renderer(tokenizer, [tokenizer.eos_token_id], max_answer_tokens=6)


def dataset(num, **columns):
    rows = {"prompt": [f"q{i}" for i in range(num)], "completion": [f"a{i % 10}" for i in range(num)]}
    return Dataset.from_dict(rows | columns)


def test_every_row_comes_once_in_each_pass(renderer):
    rows = HumanRows(dataset(23), renderer, seed=1)

    drawn = [i for number in range(23) for i in rows.draw(number, 5)]  # 115 rows: 5 passes

    for start in range(0, 115, 23):
        assert sorted(drawn[start : start + 23]) == list(range(23))
    assert drawn[:23] != drawn[23:46]


def test_a_draw_depends_on_its_number_alone(renderer):
    rows = HumanRows(dataset(23), renderer, heldout_fraction=0.2, seed=1)
    first = [rows.draw(number, 5) for number in range(6)]

    again = HumanRows(dataset(23), renderer, heldout_fraction=0.2, seed=1)

    assert [again.draw(number, 5) for number in reversed(range(6))] == first[::-1]
    assert HumanRows(dataset(23), renderer, heldout_fraction=0.2, seed=2).draw(0, 5) != first[0]
    assert rows.draw(0, 5, stream=1) != first[0]


def test_a_batch_larger_than_the_data_goes_round(renderer):
    rows = HumanRows(dataset(3), renderer)

    assert Counter(rows.draw(1, 7)) <= Counter({0: 3, 1: 3, 2: 3})
    assert Counter(rows.draw(0, 6)) == Counter({0: 2, 1: 2, 2: 2})


def test_held_out_rows_are_apart_by_row_not_by_content(renderer):
    """All answers are the same; by content, holding out one would hold out all."""
    same = Dataset.from_dict({"prompt": ["q"] * 40, "completion": ["a"] * 40})

    rows = HumanRows(same, renderer, heldout_fraction=0.25)

    assert len(rows.heldout) == 10
    assert sorted([*rows.heldout.tolist(), *rows.train.tolist()]) == list(range(40))
    assert rows.is_heldout == set(rows.heldout.tolist())
    assert rows.is_heldout.isdisjoint(i for number in range(10) for i in rows.draw(number, 30))
    assert rows.is_heldout == {i for number in range(5) for i in rows.draw(number, 10, heldout=True)}
    assert rows.num_repeated_heldout == 10


def test_held_out_answers_that_nobody_else_gave_are_no_repeats(renderer):
    assert HumanRows(dataset(20), renderer, heldout_fraction=0.5).num_repeated_heldout == 0


def test_unlabelled_rows_keep_their_numbers_and_are_never_drawn(renderer):
    completions = ["a", None, "b", None, "c"]

    rows = HumanRows(Dataset.from_dict({"prompt": ["q"] * 5, "completion": completions}), renderer)

    assert sorted(rows.rows) == [0, 2, 4]
    assert set(rows.draw(0, 9)) == {0, 2, 4}
    assert [row.answer for row in rows.batch([4, 0])] == [Answer("c", True), Answer("a", True)]


def test_weights_follow_their_rows_and_default_to_one(renderer):
    data = Dataset.from_dict({"prompt": ["q"] * 3, "completion": [None, "a", "b"], "weight": [9.0, 0.5, None]})

    assert [row.weight for row in HumanRows(data, renderer).rows.values()] == [0.5, 1.0]


def test_answers_over_the_limit_are_cut_and_counted(renderer):
    data = Dataset.from_dict({"prompt": ["q"] * 3, "completion": ["xyzxy", "xyzxyz", "xyzxyzxyz"]})

    rows = HumanRows(data, renderer)

    assert rows.num_truncated == 2
    assert [row.answer for row in rows.rows.values()] == [
        Answer("xyzxy", True),
        Answer("xyzxyz", False),
        Answer("xyzxyz", False),
    ]


def test_bytes_are_those_of_the_answer_that_is_scored(renderer):
    answers = render_humans(renderer, ["q", "q"], ["\u00e9\u00e9", "xyzxyzxyz"])

    assert [answer.num_bytes for answer in answers] == [4, 6]
    assert render_humans(renderer, [], []) == []


def test_many_rows_are_rendered_as_one_by_one(renderer):
    data = dataset(1003)

    rows = HumanRows(data, renderer).rows

    assert list(rows) == list(range(1003))
    assert rows[1002] == render_humans(renderer, ["q1002"], ["a2"])[0]


def test_holding_out_everything_is_an_error(renderer):
    with pytest.raises(ValueError, match=r"`heldout_fraction`=0\.99 holds out all 3"):
        HumanRows(dataset(3), renderer, heldout_fraction=0.99)


def test_there_is_nothing_to_draw_where_nothing_is_held_out(renderer):
    with pytest.raises(ValueError, match="heldout_fraction"):
        HumanRows(dataset(3), renderer).draw(0, 1, heldout=True)


def test_checks_never_see_the_row_number():
    assert without_internal({"prompt": "q", ROW_COLUMN: 3}) == {"prompt": "q"}
