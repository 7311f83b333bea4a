"""Judges of a few numbers per answer: format, and what the imitator's own law says."""

import numpy as np
import pytest
from audit_worlds import scores_of, word_answers

from hf_imitate.audits.evidence import AnswerScores
from hf_imitate.audits.feature_judges import answer_key, likelihood_features, likelihood_judge, surface_judge
from hf_imitate.audits.judge_family import pairs_of
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer


def accuracy(judge, pairs):
    half, valid = len(pairs) // 2, len(pairs) // 2 + len(pairs) // 10
    scorer = judge(pairs[:half], pairs[half:valid], 0)
    test = pairs[valid:]
    prompts = [pair.prompt for pair in test]
    margins = scorer(prompts, [p.human for p in test]) - scorer(prompts, [p.imitator[0] for p in test])
    return np.mean((margins > 0) + 0.5 * (margins == 0))


def make_pairs(change, num=400):
    rng = np.random.default_rng(0)
    both = zip(word_answers(rng, num), word_answers(rng, num), strict=True)
    return [Pair(f"q{n}", human, (change(n, imitator),)) for n, (human, imitator) in enumerate(both)]


@pytest.mark.parametrize(
    "change",
    [
        lambda n, a: Answer(a.text + " ", True),
        lambda n, a: Answer(a.text, False),
        lambda n, a: Answer(a.text[: len(a.text) // 2], True),
        lambda n, a: Answer(a.text if n % 2 else a.text + " more words", True),  # lengths to both sides of the human's
    ],
)
def test_the_surface_judge_sees_format(change):
    assert accuracy(surface_judge, make_pairs(change)) > 0.7


def test_the_surface_judge_reads_nothing():
    shouted = make_pairs(lambda n, a: Answer(a.text.replace("w3", "v3"), True))
    assert accuracy(surface_judge, shouted) == pytest.approx(0.5, abs=0.1)


def test_a_judge_without_a_signal_ties():
    pairs = make_pairs(lambda n, a: a)
    same = [Pair(p.prompt, p.human, (p.human,)) for p in pairs]
    assert accuracy(surface_judge, same) == 0.5


def judge_of(human_nats, imitator_nats, pairs):
    features = {}
    for side, nats in (([p.human for p in pairs], human_nats), ([p.imitator[0] for p in pairs], imitator_nats)):
        for pair, answer, row in zip(pairs, side, likelihood_features(scores_of(nats)), strict=True):
            features[answer_key(pair.prompt, answer)] = row
    return likelihood_judge(features)


def test_the_likelihood_judge_sees_answers_that_are_too_usual_and_too_unusual():
    pairs = make_pairs(lambda n, a: a)
    rng = np.random.default_rng(1)
    human = rng.normal(-20, 1, 400)
    for shifted in (rng.normal(-16, 1, 400), rng.normal(-24, 1, 400)):
        assert accuracy(judge_of(human, shifted, pairs), pairs) > 0.95
    wider = rng.normal(-20, 4, 400)  # one mean, another spread: only the square tells
    assert accuracy(judge_of(human, wider, pairs), pairs) > 0.7
    assert accuracy(judge_of(human, rng.normal(-20, 1, 400), pairs), pairs) == pytest.approx(0.5, abs=0.12)


def test_likelihood_features_by_hand():
    scores = AnswerScores(
        nats=np.array([-6.0, -np.inf]),
        lower_bound=np.array([-6.0, -np.inf]),
        num_tokens=np.array([3, 2]),
        entropy=np.array([4.5, 1.0]),
        variance=np.array([2.25, np.nan]),
        log_rank=np.array([3.0, 0.0]),
        is_cut=np.array([False, True]),
    )
    first, second = likelihood_features(scores)
    # log p, entropy, rank (sum and per token), Fast-DetectGPT, its cousin per token, length, its log, cut, outside
    np.testing.assert_allclose(first, [-6, -2, 4.5, 1.5, 3, 1, -1.5 / 1.5, -0.5, 3, np.log(3), 0, 0])
    assert np.isfinite(second).all()
    assert second[-2:].tolist() == [1, 1]


def test_pairs_join_a_row_with_its_own_draw():
    from audit_worlds import evidence_of_words

    evidence = evidence_of_words(5, 0)
    pairs = pairs_of(evidence)
    assert [p.human for p in pairs] == evidence.human_answers
    assert [p.imitator[0] for p in pairs] == evidence.imitator_answers
