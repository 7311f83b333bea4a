"""What a linear distinguisher sees: blocks of norm one, length and overlap on their own, the same on every machine."""

import numpy as np
import pytest

from hf_imitate.ngram_features import DENSE_NAMES, NUM_BUCKETS, NUM_FEATURES, dense_features, ngram_features
from hf_imitate.rendering import Answer


def dense(prompt, text, ended=True):
    return dict(zip(DENSE_NAMES, dense_features(prompt, Answer(text, ended)), strict=True))


def test_each_hashed_block_has_norm_one_however_long_the_answer():
    found = ngram_features(["q"] * 3, [Answer("a", True), Answer("a b c d " * 30, False), Answer("", True)])
    assert found.shape == (3, NUM_FEATURES)
    for first in (0, NUM_BUCKETS):
        norms = np.sqrt((found[:, first : first + NUM_BUCKETS].toarray() ** 2).sum(axis=1))
        np.testing.assert_allclose(norms, 1.0, rtol=1e-5)  # an empty answer still has a start and an end


def test_the_dense_part_is_what_its_names_say():
    found = dense("What is the list?", "the list, the list")
    assert found["constant"] == 1.0
    assert found["ended"] == 1.0
    assert found["log_words"] == pytest.approx(np.log(6) / 2)  # four words and a comma
    assert found["log_characters"] == pytest.approx(np.log(19) / 4)
    assert found["share_from_question"] == pytest.approx(4 / 5)
    assert found["share_of_question"] == pytest.approx(2 / 5)
    assert found["repetition"] == pytest.approx(1 - 3 / 5)
    assert [name for name, value in found.items() if name.startswith("words_") and value] == ["words_5"]
    assert dense("q", "w " * 500)["words_63"] == 1.0


def test_a_conversation_is_asked_by_all_its_messages():
    messages = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
    assert dense(messages, "alpha beta gamma")["share_from_question"] == pytest.approx(2 / 3)


def test_order_of_words_start_and_end_are_seen():
    base = ngram_features(["q"], [Answer("a b", True)])
    for other in (Answer("b a", True), Answer("a b", False), Answer("a  b", True), Answer("A b", True)):
        assert abs(ngram_features(["q"], [other]) - base).sum() > 0.1


def test_the_question_is_seen_through_its_overlap_alone():
    one, two = (ngram_features([prompt], [Answer("a b", True)]) for prompt in ("x", "entirely different words"))
    assert abs(one - two).sum() == 0


def test_hashes_are_the_same_in_every_process_and_version():
    """Stored weights mean nothing under other hashes; these columns were written down once."""
    expected = [
        10401,
        18234,
        32886,
        49013,
        71502,
        92594,
        98813,
        103561,
        118943,
        129857,
        141473,
        160067,
        163958,
        250015,
        252170,
        255007,
    ]
    columns = ngram_features(["q"], [Answer("ab", True)])[:, : 2 * NUM_BUCKETS].indices.tolist()
    assert sorted(columns) == expected
