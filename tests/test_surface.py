import random
import unicodedata

import numpy as np
import pytest

from hf_imitate.rendering import Answer
from hf_imitate.surface import FEATURE_KINDS, FEATURE_NAMES, audit_surface, surface_features

WORDS = ["café", "naïve", "list", "returns", "the", "number", "of", "items", "señor", "file", "open", "Über", "é"]


def sample_answers(num_answers: int, seed: int, num_words: tuple[int, int] = (3, 9)) -> list[Answer]:
    """Answers of one law: random words, all with an accent, one in ten cut at the limit."""
    rng = random.Random(seed)
    answers = []
    for _ in range(num_answers):
        words = [rng.choice(WORDS) for _ in range(rng.randint(*num_words))]
        text = " ".join([rng.choice(["Café", "été"]), *words]) + rng.choice([".", "", "!"])
        answers.append(Answer(unicodedata.normalize("NFC", text), rng.random() < 0.9))
    return answers


def changed(answers: list[Answer], change) -> list[Answer]:
    return [Answer(change(answer.text), answer.ended) for answer in answers]


PLANTED = {
    "leading_whitespace": lambda answers: changed(answers, lambda text: " " + text),
    "trailing_whitespace": lambda answers: changed(answers, lambda text: text + "\n"),
    "not_nfc": lambda answers: changed(answers, lambda text: unicodedata.normalize("NFD", text)),
    "special_marker": lambda answers: changed(answers, lambda text: "<think></think>" + text),
    "ended": lambda answers: [Answer(answer.text, False) for answer in answers],
    "carriage_returns": lambda answers: changed(answers, lambda text: text.replace(" ", "\r\n", 1)),
    "control_characters": lambda answers: changed(answers, lambda text: text + "\u200b"),
    "unusual_spaces": lambda answers: changed(answers, lambda text: text.replace(" ", "\u00a0", 1)),
    "replacement_characters": lambda answers: changed(answers, lambda text: text.replace("é", "\ufffd")),
    "doubled_spaces": lambda answers: changed(answers, lambda text: text.replace(" ", "  ", 1)),
    "tabs": lambda answers: changed(answers, lambda text: text.replace(" ", "\t", 1)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_leak_is_found_and_named(name):
    human = sample_answers(200, seed=1)
    leak = audit_surface(human, PLANTED[name](sample_answers(200, seed=2)))
    assert leak.auc > 0.9
    assert leak.interval.low > 0.85
    assert leak.leaking_feature == name
    assert leak.leaks[0] == name
    assert name in leak.leaks_of_kind("format")
    assert f"`{name}`" in leak.describe()


@pytest.mark.parametrize("name", ["leading_whitespace", "ended"])
def test_a_leak_on_the_human_side_is_found_too(name):
    leak = audit_surface(PLANTED[name](sample_answers(200, seed=1)), sample_answers(200, seed=2))
    assert leak.auc > 0.9
    assert leak.leaking_feature == name
    assert (leak.feature_auc[name] > 0.5) == (name == "leading_whitespace")


def test_identical_laws_are_not_told_apart():
    """Twenty null audits: one of them alone could be lucky."""
    audits = [audit_surface(sample_answers(400, 100 + k), sample_answers(400, 200 + k), seed=k) for k in range(20)]
    assert all(0.4 <= leak.auc <= 0.6 for leak in audits)
    assert abs(np.mean([leak.auc for leak in audits]) - 0.5) < 0.02
    assert sum(bool(leak.leaks) for leak in audits) <= 1
    assert sum(leak.interval.low <= 0.5 <= leak.interval.high for leak in audits) >= 18


def test_length_is_told_from_format():
    leak = audit_surface(sample_answers(300, 1), sample_answers(300, 2, num_words=(8, 16)))
    assert leak.auc > 0.9
    assert leak.leaks_of_kind("format") == ()
    assert set(leak.leaks_of_kind("length")) == {"num_characters", "num_words"}
    assert leak.feature_auc["num_words"] < 0.1


def test_the_order_of_the_answers_does_not_matter():
    human, imitator = sample_answers(120, 1), sample_answers(90, 2, num_words=(4, 10))
    first = audit_surface(human, imitator, seed=3)
    random.Random(0).shuffle(human)
    random.Random(1).shuffle(imitator)
    assert audit_surface(human, imitator, seed=3) == first


def test_auc_of_a_feature_is_the_share_of_won_comparisons():
    human = [Answer("ab " * k, True) for k in range(1, 31)]
    imitator = [Answer("ab " * k, True) for k in range(6, 36)]
    won = np.mean([(h > i) + 0.5 * (h == i) for h in range(1, 31) for i in range(6, 36)])
    leak = audit_surface(human, imitator)
    assert leak.feature_auc["num_words"] == pytest.approx(won)
    assert leak.num_pairs == 30


def test_equal_constant_answers_tell_nothing():
    same = [Answer("Yes.", True)] * 40
    leak = audit_surface(same, same)
    assert leak.auc == 0.5
    assert leak.leaks == ()
    assert set(leak.feature_auc.values()) == {0.5}


def test_two_constant_answers_are_told_apart():
    leak = audit_surface([Answer("Yes.", True)] * 40, [Answer("Yes.\n", True)] * 40)
    assert leak.auc == 1.0
    assert leak.leaking_feature == "trailing_whitespace"


def test_too_few_answers_are_refused_with_the_number_needed():
    with pytest.raises(ValueError, match="40 human and 19 imitator answers and needs at least 20"):
        audit_surface(sample_answers(40, 1), sample_answers(19, 2))


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\ufffd", "a", "\u202e\u202c", "👩‍👩‍👧", "x" * 10_000])
def test_every_text_has_finite_features(text):
    features = surface_features(text, ended=True)
    assert features.shape == (len(FEATURE_NAMES),)
    assert np.isfinite(features).all()


def test_a_stray_space_moves_one_feature_only():
    plain, spaced = surface_features("Return it.", True), surface_features(" Return it.", True)
    assert [FEATURE_NAMES[i] for i in np.flatnonzero(plain != spaced)] == ["leading_whitespace"]


def test_what_an_answer_says_moves_no_feature():
    assert np.array_equal(surface_features("Open the file.", True), surface_features("Shut the door.", True))


def test_every_feature_has_a_kind():
    assert set(FEATURE_KINDS.values()) == {"format", "style", "length"}
