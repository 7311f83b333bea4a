import numpy as np
import pytest
from audit_evidence import by_name, evidence_of
from scipy import stats

from hf_imitate.audits.copying import audit_copying
from hf_imitate.bounds import clopper_pearson

WORDS = [f"w{number}" for number in range(400)]


def sentences(num, seed, length=9):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(num)]


TRAINING = sentences(50, 0)


def copying(human, imitator, training=TRAINING, **fields):
    evidence = evidence_of(
        np.zeros(len(human)), texts=human, imitator_texts=imitator, train_answers=training, **fields
    )
    return by_name(audit_copying(evidence))


def test_whole_copies_are_counted_against_those_of_new_humans():
    human = TRAINING[:2] + sentences(38, 1)
    imitator = TRAINING[:10] + sentences(30, 2)
    found = copying(human, imitator)
    assert set(found) == {"copying", "copying/human", "copying/runs", "copying/runs/human"}
    assert (found["copying"].value, found["copying/human"].value) == (0.25, 0.05)
    assert found["copying"].interval == pytest.approx(tuple(clopper_pearson(10, 40)))
    assert found["copying"].n == 40
    # Eight only the imitator's, none only the human's: 2 / 2^8.
    assert (
        "p = 0.00781 (only the imitator's is a copy on 8 questions, only the human's on 0)" in found["copying"].detail
    )


def test_case_and_spacing_make_no_new_answer_and_a_word_does():
    changed = [TRAINING[0].upper(), "  " + TRAINING[1].replace(" ", "  ") + " \n", TRAINING[2] + " more"]
    assert copying(sentences(3, 1), changed)["copying"].value == pytest.approx(2 / 3)


def test_runs_of_words_are_found_inside_new_answers():
    """Five of nine words copied: of the five runs of five words one is known."""
    halves = [" ".join(text.split()[:5]) + " x y z v" for text in TRAINING[:40]]
    found = copying(sentences(40, 1), halves)
    assert found["copying"].value == 0
    assert found["copying/runs"].value == pytest.approx(0.2)
    assert found["copying/runs/human"].value == 0
    assert "+0.2 (" in found["copying/runs"].detail


def test_the_interval_of_runs_is_over_questions():
    shares = np.repeat([0.2, 0.0], 20)
    halves = [" ".join(text.split()[:5]) + " x y z v" for text in TRAINING[:20]] + sentences(20, 2)
    found = copying(sentences(40, 1), halves)["copying/runs"]
    assert found.interval == pytest.approx(tuple(stats.ttest_1samp(shares, 0).confidence_interval(0.95)))


def test_stock_phrases_of_the_trade_show_up_on_both_sides():
    human = ["Yes."] * 30 + sentences(10, 1)
    found = copying(human, list(reversed(human)), ["yes .", *TRAINING])
    assert found["copying"].value == found["copying/human"].value == 0.75
    assert "p = 1 " in found["copying"].detail


def test_one_answer_per_question_counts():
    found = copying(sentences(40, 1), (TRAINING[:1] + sentences(3, 2)) * 10, question=np.repeat(np.arange(10), 4))
    assert (found["copying"].value, found["copying"].n) == (1.0, 10)


def test_questions_that_were_asked_in_training_are_said():
    found = copying(sentences(40, 1), sentences(40, 2), train_questions=["question 3", "question 5", "elsewhere"])
    assert "2 of 40 questions were asked in training" in found["copying"].detail


@pytest.mark.parametrize("training", [None, []])
def test_without_training_answers_nothing_is_measured(training):
    found = copying(sentences(40, 1), sentences(40, 2), training)
    assert list(found) == ["copying"]
    assert found["copying"].value is None
    assert "train_dataset" in found["copying"].detail


def test_empty_and_short_answers_have_no_share():
    found = copying([""] * 40, [""] * 40, ["", *TRAINING])
    assert all(finding.value is None for finding in found.values())
    assert "empty" in found["copying"].detail
    some = copying(sentences(40, 1), ["", "Yes."] * 20, ["", "yes.", *TRAINING])
    assert (some["copying"].value, some["copying"].n) == (1.0, 20)
    assert "20 questions with an empty answer left out" in some["copying"].detail
    assert some["copying/runs"].value is None
    assert "0 questions have answers of at least 5 words" in some["copying/runs"].detail


def test_no_finding_quotes_an_answer():
    found = copying(sentences(40, 1), TRAINING[:40])
    assert not any(word in finding.detail for finding in found.values() for word in TRAINING[0].split()[:3])
