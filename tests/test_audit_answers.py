import itertools
import math

import numpy as np
import pytest
from audit_evidence import by_name, evidence_of
from scipy.stats import wasserstein_distance

from hf_imitate.audits.answers import answer_shares, audit_answers, total_variation, wasserstein

TV, CEILING = "answer_distribution_tv", "human_ceiling"
LETTERS = list("abcde")


def asked(human_law, imitator_law, num_questions=200, num_humans=20, seed=0, **fields):
    """Each question is answered by so many humans, and as often by the imitator; laws over five letters."""
    rng = np.random.default_rng(seed)
    sides = [rng.choice(LETTERS, num_questions * num_humans, p=law).tolist() for law in (human_law, imitator_law)]
    question = np.repeat(np.arange(num_questions), num_humans)
    return evidence_of(np.zeros(len(question)), texts=sides[0], imitator_texts=sides[1], question=question, **fields)


def surveyed(human_law, imitator_law, num_questions=1000, choices=LETTERS, seed=0, **fields):
    """Each question is asked once, all with the same options."""
    rng = np.random.default_rng(seed)
    sides = [rng.choice(LETTERS, num_questions, p=law).tolist() for law in (human_law, imitator_law)]
    return evidence_of(
        np.zeros(num_questions), texts=sides[0], imitator_texts=sides[1], choices=[choices] * num_questions, **fields
    )


HUMAN = [0.4, 0.3, 0.2, 0.1, 0.0]
OTHER = [0.1, 0.3, 0.2, 0.1, 0.3]


# --- distances ---


def shares(*answers, weights=None, num=5):
    codes = np.array([answers])
    return answer_shares(codes, np.ones(codes.shape) if weights is None else np.array([weights]), num)


def test_shares_are_those_of_each_sample():
    found = answer_shares(np.array([[0, 0, 2], [1, 2, 2]]), np.array([[1.0, 1, 2], [1, 1, 1]]), 3)
    assert found == pytest.approx(np.array([[0.5, 0, 0.5], [0, 1 / 3, 2 / 3]]))


def test_total_variation_by_hand():
    assert total_variation(shares(0, 0, 1, 2), shares(0, 1, 3, 3)) == pytest.approx([0.5])
    assert total_variation(shares(0, 0, 1, 2, weights=[1.0, 1, 4, 2]), shares(0, 1, 3, 3)) == pytest.approx([0.5])
    assert total_variation(shares(0, 1), shares(1, 0, weights=[7.0, 7.0])) == 0.0
    assert total_variation(shares(0, 1), shares(2, 3)) == 1.0


@pytest.mark.parametrize("options", [[1.0, 2.0, 5.0, 10.0], [10.0, 5.0, 2.0, 1.0]])
def test_wasserstein_agrees_with_scipy(options):
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 4, (2, 30))
    weights = rng.random((2, 30))
    scale = np.array(options)
    found = wasserstein(shares(*one, weights=weights[0]), shares(*two, weights=weights[1]), scale)
    assert found == pytest.approx([wasserstein_distance(scale[one], scale[two], *weights)])


def test_answers_off_the_scale_move_nothing():
    scale = np.array([0.0, 1.0])
    assert wasserstein(shares(0, 1, num=3), shares(0, 1, 2, num=3), scale) == [0.0]
    assert np.isnan(wasserstein(shares(2, num=3), shares(0, 1, num=3), scale)).all()


# --- repeated questions ---


def exact_mean_of_halves(p, q, half):
    """E TV between empirical laws of `half` draws each, by enumeration of all samples."""

    def histograms(law):
        found = {}
        for sample in itertools.product(range(len(law)), repeat=half):
            key = tuple(np.bincount(sample, minlength=len(law)))
            found[key] = found.get(key, 0) + math.prod(law[letter] for letter in sample)
        return found

    return sum(
        weight_p * weight_q * np.abs(np.array(a) - b).sum() / 2 / half
        for a, weight_p in histograms(p).items()
        for b, weight_q in histograms(q).items()
    )


def test_an_imitator_with_the_humans_law_reaches_the_human_ceiling():
    found = by_name(audit_answers(asked(HUMAN, HUMAN, num_humans=6)))
    assert set(found) == {TV, CEILING}
    exact = exact_mean_of_halves(HUMAN, HUMAN, 3)
    for name in (TV, CEILING):
        low, high = found[name].interval
        assert low < exact < high
        assert high - low < 0.1
        assert found[name].n == 200


def test_another_law_lies_above_the_ceiling_by_as_much_as_it_should():
    found = by_name(audit_answers(asked(HUMAN, OTHER, num_humans=6)))
    low, high = found[TV].interval
    assert low < exact_mean_of_halves(HUMAN, OTHER, 3) < high
    assert low > found[CEILING].interval[1]
    # Large halves come close to the distance itself, 0.3.
    assert by_name(audit_answers(asked(HUMAN, OTHER, 40, 2000)))[TV].value == pytest.approx(0.3, abs=0.02)


def test_two_humans_per_question_disagree_as_often_as_chance_says():
    found = by_name(audit_answers(asked(HUMAN, OTHER, num_questions=3000, num_humans=2)))
    p, q = np.array(HUMAN), np.array(OTHER)
    assert found[CEILING].value == pytest.approx(1 - p @ p, abs=0.03)
    assert found[TV].value == pytest.approx(1 - p @ q, abs=0.03)


def squared_distance_of(evidence):
    told = audit_answers(evidence)[0].detail.split("squared differences ")[1]
    low, high = told.split("(")[1].split(")")[0].split(" to ")
    return float(told.split(" ")[0]), float(low), float(high)


def test_an_imitator_of_the_commonest_answer_beats_the_ceiling_but_not_the_squared_distance():
    """Whoever always gives the mode agrees with a human more often than a human does."""
    mode = [1.0, 0, 0, 0, 0]
    evidence = asked(HUMAN, mode, num_questions=3000, num_humans=2)
    found = by_name(audit_answers(evidence))
    assert found[TV].value < found[CEILING].value
    value, low, _ = squared_distance_of(evidence)
    exact = np.square(np.array(HUMAN) - mode).sum()
    assert value == pytest.approx(exact, abs=0.05)
    assert low > 0.4
    value, low, high = squared_distance_of(asked(HUMAN, HUMAN, num_questions=3000, num_humans=2))
    assert low < 0 < high
    assert abs(value) < 0.05


def test_intervals_cover_over_questions():
    exact = exact_mean_of_halves(HUMAN, OTHER, 2)
    covers = []
    for seed in range(200):
        low, high = by_name(audit_answers(asked(HUMAN, OTHER, 60, 4, seed)))[TV].interval
        covers.append(low <= exact <= high)
    assert 0.90 < np.mean(covers) < 0.99


def test_questions_asked_once_do_not_count_beside_repeated_ones():
    question = np.append(np.repeat(np.arange(40), 2), np.arange(40, 60))
    texts, own = ["a"] * 80 + ["b"] * 20, ["a"] * 100
    found = by_name(audit_answers(evidence_of(np.zeros(100), texts=texts, imitator_texts=own, question=question)))
    assert (found[TV].value, found[TV].n) == (0.0, 40)


def test_an_answer_that_was_cut_is_another_one():
    question = np.repeat(np.arange(40), 2)
    cut = evidence_of(np.zeros(80), question=question, imitator_cut=range(80))
    assert by_name(audit_answers(cut))[TV].value == 1.0
    assert by_name(audit_answers(evidence_of(np.zeros(80), question=question)))[TV].value == 0.0


def test_weights_decide_within_and_between_questions():
    """Humans say "a" with weight 3 and "b" with weight 1; the imitator always says "a"."""
    texts = ["a", "b"] * 2 * 40
    weight = np.tile([3.0, 1.0], 80)
    fields = {"question": np.repeat(np.arange(40), 4), "texts": texts, "imitator_texts": ["a"] * 160}
    heavy = by_name(audit_answers(evidence_of(np.zeros(160), weight=weight, **fields)))[TV].value
    plain = by_name(audit_answers(evidence_of(np.zeros(160), **fields)))[TV].value
    assert heavy < plain - 0.1


# --- closed options ---


def test_options_that_all_questions_share_are_pooled():
    found = by_name(audit_answers(surveyed(HUMAN, OTHER)))
    assert found[TV].value == pytest.approx(0.3, abs=0.06)
    assert found[TV].interval[0] < 0.3 < found[TV].interval[1]
    assert found[TV].n == 1000
    assert found[CEILING].value < 0.06
    equal = by_name(audit_answers(surveyed(HUMAN, HUMAN)))
    assert equal[TV].interval[0] == 0.0


@pytest.mark.parametrize("imitator_law", [HUMAN, OTHER, [0.2] * 5])
def test_the_interval_of_pooled_options_covers(imitator_law):
    truth = np.abs(np.array(HUMAN) - imitator_law).sum() / 2
    covers = []
    for seed in range(200):
        low, high = audit_answers(surveyed(HUMAN, imitator_law, 100, seed=seed))[0].interval
        covers.append(low <= truth <= high)
    assert np.mean(covers) >= 0.95


def test_what_is_none_of_the_options_is_an_answer_too_and_counted():
    texts = ["A ", "b", "no idea", "b"] * 25
    own = ["a", "b", "a", "b"] * 25
    evidence = evidence_of(np.zeros(100), texts=texts, imitator_texts=own, choices=[["a", "b"]] * 100)
    found = by_name(audit_answers(evidence))
    assert found[TV].value == pytest.approx(0.25)
    assert "25 answers are none of the options" in found[TV].detail


def test_ordered_numbers_have_a_distance_along_the_scale():
    scale = ["1", "2", "3", "4", "5"]
    rng = np.random.default_rng(0)
    fields = {"choices": [scale] * 400}
    near = evidence_of(np.zeros(400), texts=["1"] * 400, imitator_texts=["2"] * 400, **fields)
    far = evidence_of(np.zeros(400), texts=["1"] * 400, imitator_texts=["5"] * 400, **fields)
    for evidence, distance in ((near, 0.25), (far, 1.0)):
        found = by_name(audit_answers(evidence))
        assert found[TV].value == 1.0
        assert found[f"{TV}/wasserstein"].value == pytest.approx(distance)
        assert found[f"{TV}/wasserstein"].unit == "ratio"
        assert found[f"{CEILING}/wasserstein"].value == 0.0
    repeated = rng.choice(scale, 400).tolist()
    question = np.repeat(np.arange(40), 10)
    evidence = evidence_of(np.zeros(400), texts=repeated, imitator_texts=repeated, question=question, **fields)
    found = by_name(audit_answers(evidence))
    assert found[f"{TV}/wasserstein"].interval[0] < found[f"{CEILING}/wasserstein"].value
    assert f"{TV}/wasserstein" not in by_name(audit_answers(surveyed(HUMAN, OTHER)))


def test_an_answer_off_the_scale_takes_the_interval_of_the_distance_along_it():
    fields = {"choices": [[1, 2, 3]] * 60}
    evidence = evidence_of(np.zeros(60), texts=["1", "2"] * 30, imitator_texts=["1"] * 59 + ["?"], **fields)
    found = by_name(audit_answers(evidence))
    assert found[TV].interval is not None
    assert found[f"{TV}/wasserstein"].interval is None


def test_unequal_weights_take_the_interval_of_pooled_options():
    weight = np.random.default_rng(0).uniform(0.5, 2, 1000)
    found = by_name(audit_answers(surveyed(HUMAN, OTHER, weight=weight)))[TV]
    assert found.interval is None
    assert "weigh differently" in found.detail


# --- subgroups ---


def test_subgroups_are_compared_on_their_own():
    """Overall the imitator agrees with humans; within each group it answers as the other one does."""
    group = ["old", "young"] * 300
    texts = ["a" if g == "old" else "b" for g in group]
    own = ["b" if g == "old" else "a" for g in group]
    evidence = evidence_of(
        np.zeros(600), texts=texts, imitator_texts=own, choices=[["a", "b"]] * 600, columns={"age": group}
    )
    found = by_name(audit_answers(evidence, by="age"))
    assert found[TV].value == 0.0
    assert found[f"{TV}/age=old"].value == found[f"{TV}/age=young"].value == 1.0
    assert found[f"{CEILING}/age=old"].value == 0.0
    assert found[f"{TV}/age=old"].n == 300


def test_a_report_with_subgroups_of_any_name_can_be_read_again(tmp_path):
    """A carriage return in a value made the whole report unreadable, and two long values had one name."""
    values = ["old\rest", "x" * 50, "x" * 49 + "y"]
    evidence = evidence_of(np.zeros(90), choices=[["a", "b"]] * 90, columns={"who": values * 30})
    names = [f.name for f in audit_answers(evidence, by="who") if f.name.startswith(f"{TV}/")]
    assert names == [f"{TV}/who=old est", f"{TV}/who={'x' * 40}", f"{TV}/who={'x' * 40} (2)"]


def test_a_column_that_is_missing_or_too_fine_is_refused():
    evidence = evidence_of(np.zeros(60), columns={"id": list(range(60))})
    with pytest.raises(ValueError, match=r"no column 'age'.*\['id'\]"):
        audit_answers(evidence, by="age")
    with pytest.raises(ValueError, match="60 different values"):
        audit_answers(evidence, by="id")


# --- rounding ---


def test_no_rounding_takes_a_distance_above_1():
    """Ten answers, each another on the other side, were 1.0000000000000002 apart, and the audit of them raised."""
    for num_rows in range(1, 80):
        codes, weights = np.arange(num_rows)[None], np.ones((1, num_rows))
        shares = [answer_shares(codes + start, weights, 2 * num_rows) for start in (0, num_rows)]
        assert total_variation(*shares) <= 1, num_rows


def test_humans_who_never_agree_are_at_distance_1_from_each_other():
    texts = [f"answer {row}" for row in range(30 * 58)]
    evidence = evidence_of(np.zeros(len(texts)), texts=texts, question=np.repeat(np.arange(30), 58))
    assert by_name(audit_answers(evidence))[CEILING].value == pytest.approx(1.0)


# --- none ---


@pytest.mark.parametrize(
    "evidence",
    [
        evidence_of(np.zeros(100)),
        evidence_of(np.zeros(58), question=np.repeat(np.arange(29), 2)),
        evidence_of(np.zeros(29), choices=[["a", "b"]] * 29),
        evidence_of(np.zeros(60), choices=[None] * 60),
        evidence_of(np.zeros(60), choices=[["a"]] * 60),
    ],
)
def test_answers_that_cannot_be_compared_are_not(evidence):
    found = by_name(audit_answers(evidence))
    assert set(found) == {TV, CEILING}
    assert all(finding.value is None for finding in found.values())
    assert "need at least 30" in found[TV].detail


def test_the_same_seed_gives_the_same_numbers():
    assert audit_answers(asked(HUMAN, OTHER)) == audit_answers(asked(HUMAN, OTHER))
