"""What an audit's judges claim: right under the null, powerful where there is something, silent if broken."""

import dataclasses
import math

import numpy as np
import pytest
from audit_worlds import WORDS, evidence_of_words, make_evidence, word_answers

from hf_imitate.audits.feature_judges import surface_judge
from hf_imitate.audits.judge_family import (
    KINDS,
    audit_distinguishability,
    contaminated,
    pairs_of,
)
from hf_imitate.audits.judges import ngram_judge
from hf_imitate.audits.splits import QuestionSplit, Split, split_questions
from hf_imitate.bounds import total_variation_lower_bound_paired
from hf_imitate.e_values import sign_test_p_value
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer


def first_word_judge(train: list[Pair], valid: list[Pair], seed: int):
    """Counts the first word of the vocabulary: the best judge of a shift towards it. It learns nothing."""
    return lambda prompts, answers: np.array([-a.text.split().count(WORDS[0]) for a in answers], float)


def blind_judge(train: list[Pair], valid: list[Pair], seed: int):
    return lambda prompts, answers: np.zeros(len(answers))


def by_name(family):
    return {finding.name: finding for finding in family.findings}


def split_of(evidence, seed=0):
    return split_questions(evidence.prompts, seed)


def test_each_judge_gets_the_six_findings_of_the_contract():
    evidence = evidence_of_words(200, 0, shift=0.3)
    foil = word_answers(np.random.default_rng(1), 200, 0.6)
    family = audit_distinguishability(evidence, {"ngram": ngram_judge}, split_of(evidence), foil=foil)
    assert {f.name: f.unit for f in family.findings} == {f"{kind}/ngram": unit for kind, unit in KINDS.items()}
    assert set(family.seconds) == set(by_name(family))
    assert by_name(family)["tv_lower/ngram"].certified
    assert not by_name(family)["paired_accuracy/ngram"].certified  # its interval is marginal
    assert family.scores["ngram"].shape == (100, 2)
    assert len(family.log_e["ngram"]) == 100


def test_a_planted_difference_is_found_and_bounded_by_its_truth():
    evidence = evidence_of_words(1000, 2, shift=0.2)
    family = audit_distinguishability(evidence, {"ngram": ngram_judge}, split_of(evidence))
    found = by_name(family)
    accuracy = found["paired_accuracy/ngram"]
    # The exact accuracy of the best judge: counts of the first word are binomial, ties 1/2.
    counts = np.arange(9)
    law = [np.array([math.comb(8, k) * p**k * (1 - p) ** (8 - k) for k in counts]) for p in (1 / 40, 1 / 40 + 0.2)]
    win = sum(law[0][i] * (law[1][i + 1 :].sum() + law[1][i] / 2) for i in counts)
    total_variation = np.abs(law[0] - law[1]).sum() / 2
    assert accuracy.interval[0] <= win <= accuracy.interval[1] + 0.02
    assert 0.2 < found["tv_lower/ngram"].value <= total_variation
    assert family.p_values["ngram"]["p_holm"] < 1e-10
    assert found["e_value/ngram"].value > 1e6
    assert found["judge_bits/ngram"].value > 0.2


def test_equal_laws_are_told_apart_no_more_often_than_the_level_says():
    """End to end with two trained judges: 60 worlds here, 1 000 where it was measured."""
    smallest, accuracies = [], []
    for seed in range(60):
        evidence = evidence_of_words(80, 100 + seed)
        split = split_of(evidence, seed)
        for judge in (ngram_judge, surface_judge):
            scores = score(evidence, split, judge)
            wins, losses = (scores > 0).sum(), (scores < 0).sum()
            smallest.append(float(sign_test_p_value(wins, losses)))
            accuracies.append(np.mean((scores > 0) + 0.5 * (scores == 0)))
    # 120 tests at level 0.05, in pairs that depend on each other.
    assert np.mean(np.array(smallest) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.03)


def score(evidence, split, judge):
    parts = split.take(pairs_of(evidence))
    scorer = judge(parts.train, parts.valid, 0)
    prompts = [pair.prompt for pair in parts.test]
    return scorer(prompts, [p.human for p in parts.test]) - scorer(prompts, [p.imitator[0] for p in parts.test])


def test_a_split_by_row_praises_a_judge_that_knows_its_rows_by_heart():
    """Every question stands in four rows, with one human's answer: the laws are equal, and a judge that remembers what
    it saw finds "human" in the test rows of a split by row. A split by question leaves it nothing."""

    def memory(train, valid, seed):
        seen = {(pair.prompt, pair.human.text) for pair in (*train, *valid)}
        return lambda prompts, answers: np.array(
            [(q, a.text) in seen for q, a in zip(prompts, answers, strict=True)], float
        )

    rng = np.random.default_rng(3)
    humans = word_answers(rng, 100)
    questions = [f"question {number % 100}" for number in range(400)]
    evidence = make_evidence([humans[n % 100] for n in range(400)], word_answers(rng, 400), questions)
    order = rng.permutation(400)
    by_row = QuestionSplit(order[200:], order[160:200], order[:200])
    by_question = split_of(evidence)
    assert sign_test(score(evidence, by_row, memory)) < 1e-20
    assert sign_test(score(evidence, by_question, memory)) > 0.05


def sign_test(margins):
    return float(sign_test_p_value((margins > 0).sum(), (margins < 0).sum()))


def test_the_order_of_the_slots_does_not_matter():
    """Labels swapped in all pairs turn every margin round, and the split stays."""
    evidence = evidence_of_words(120, 4, shift=0.3)
    mirrored = dataclasses.replace(
        evidence, human_answers=evidence.imitator_answers, imitator_answers=evidence.human_answers
    )
    one = audit_distinguishability(evidence, {"first": first_word_judge}, split_of(evidence))
    other = audit_distinguishability(mirrored, {"first": first_word_judge}, split_of(mirrored))
    assert by_name(one)["paired_accuracy/first"].value == pytest.approx(
        1 - by_name(other)["paired_accuracy/first"].value
    )


def test_one_trial_per_question_its_first_row():
    rng = np.random.default_rng(5)
    questions = [f"question {number // 3}" for number in range(300)]
    evidence = make_evidence(word_answers(rng, 300), word_answers(rng, 300, 0.5), questions)
    family = audit_distinguishability(evidence, {"ngram": ngram_judge}, split_of(evidence))
    accuracy = by_name(family)["paired_accuracy/ngram"]
    assert accuracy.n == 50
    assert set(split_of(evidence).test % 3) == {0}


def test_ties_count_half_and_prove_nothing():
    evidence = evidence_of_words(100, 6)
    family = audit_distinguishability(evidence, {"blind": blind_judge}, split_of(evidence))
    found = by_name(family)
    assert found["paired_accuracy/blind"].value == 0.5
    assert family.p_values["blind"] == {"p": 1.0, "p_holm": 1.0}
    assert found["tv_lower/blind"].value == 0
    assert found["e_value/blind"].value == pytest.approx(1.0)


def test_the_power_control_finds_the_share_that_a_judge_can_see():
    evidence = evidence_of_words(600, 7)
    foil = [Answer("robot " + a.text, True) for a in word_answers(np.random.default_rng(8), 600)]
    judges = {"ngram": ngram_judge, "blind": blind_judge}
    found = by_name(audit_distinguishability(evidence, judges, split_of(evidence), foil=foil))
    assert found["power_control/ngram"].value in (0.1, 0.2)
    assert found["power_control/blind"].value is None
    assert "proves nothing" in found["power_control/blind"].detail
    assert "40%" in found["power_control/blind"].detail
    assert "20%" not in found["power_control/blind"].detail  # the first miss ends the search


def test_contaminated_pairs_hold_foils_in_their_share_and_no_other_signal():
    evidence = evidence_of_words(4000, 9, shift=0.9)
    foil = [Answer("foil", True)] * 4000
    pairs = contaminated(pairs_of(evidence), foil, 0.2, seed=0)
    is_foil = np.array([pair.imitator[0].text == "foil" for pair in pairs])
    assert is_foil.mean() == pytest.approx(0.2, abs=0.025)
    assert all(p.human is h for p, h, f in zip(pairs, evidence.human_answers, is_foil, strict=True) if f)
    # In the others, the human's answer stands on either side equally often.
    kept = [p.human is h for p, h, f in zip(pairs, evidence.human_answers, is_foil, strict=True) if not f]
    assert np.mean(kept) == pytest.approx(0.5, abs=0.04)


def test_the_null_control_compares_humans_with_humans_where_questions_repeat():
    rng = np.random.default_rng(10)
    questions = [f"question {number // 2}" for number in range(400)]
    evidence = make_evidence(word_answers(rng, 400), word_answers(rng, 400, 0.9), questions)
    null = by_name(audit_distinguishability(evidence, {"ngram": ngram_judge}, split_of(evidence)))[
        "null_control/ngram"
    ]
    assert "human against human, 200 questions" in null.detail
    assert null.n == 100
    assert null.interval[0] <= 0.5 <= null.interval[1]
    single = evidence_of_words(200, 11, shift=0.9)
    null = by_name(audit_distinguishability(single, {"ngram": ngram_judge}, split_of(single)))["null_control/ngram"]
    assert "swapped" in null.detail
    assert null.interval[0] <= 0.5 <= null.interval[1]


def test_a_null_control_far_from_chance_is_called_out():
    """A judge that cheats, since it knows who wrote what whatever the labels say."""
    evidence = evidence_of_words(200, 12)
    calls = []

    def cheat(train, valid, seed):
        def scorer(prompts, answers):
            calls.append(len(answers))
            return np.where(np.arange(len(answers)) % 2 == 0, 1.0, 0.0)  # the human's answer is asked first

        return scorer

    null = by_name(audit_distinguishability(evidence, {"cheat": cheat}, split_of(evidence)))["null_control/cheat"]
    assert null.value == 1.0
    assert "do not trust" in null.detail


@pytest.mark.parametrize("broken", ["raises", "nan", "wrong shape"])
def test_a_broken_judge_is_not_measured_and_the_others_are(broken):
    def judge(train, valid, seed):
        if broken == "raises":
            raise RuntimeError("private words of a row")
        return lambda prompts, answers: np.full(len(answers) + (broken == "wrong shape"), np.nan)

    evidence = evidence_of_words(100, 13, shift=0.4)
    family = audit_distinguishability(evidence, {"bad": judge, "first": first_word_judge}, split_of(evidence))
    found = by_name(family)
    assert all(found[f"{kind}/bad"].value is None for kind in KINDS)
    error = "RuntimeError" if broken == "raises" else "ValueError"
    assert error in found["paired_accuracy/bad"].detail
    assert "private" not in found["paired_accuracy/bad"].detail
    # The judge that failed was part of the plan: Holm's correction counts it.
    assert found["paired_accuracy/first"].value is not None
    assert family.p_values["first"]["p_holm"] == pytest.approx(min(1, 2 * family.p_values["first"]["p"]))


def test_too_few_questions_or_answers_that_never_end_are_not_measured():
    few = evidence_of_words(35, 14)
    assert "at least 40 rows" in audit_distinguishability(few, {"x": blind_judge}, split_of(few)).findings[0].detail
    evidence = evidence_of_words(100, 15)
    cut = dataclasses.replace(evidence.imitator, is_cut=np.ones(100, bool))
    all_cut = dataclasses.replace(evidence, imitator=cut)
    family = audit_distinguishability(all_cut, {"x": blind_judge}, split_of(evidence))
    assert all(f.value is None and "length limit" in f.detail for f in family.findings)


def test_weights_that_differ_take_the_certificate_away():
    weight = np.where(np.arange(200) % 2 == 0, 1.0, 5.0)
    evidence = dataclasses.replace(evidence_of_words(200, 16, shift=0.5), weight=weight)
    found = by_name(audit_distinguishability(evidence, {"first": first_word_judge}, split_of(evidence)))
    assert not found["tv_lower/first"].certified
    assert found["tv_lower/first"].n < 100


def test_the_bound_spends_the_error_it_is_given():
    evidence = evidence_of_words(200, 17, shift=0.5)
    family = audit_distinguishability(
        evidence, {"first": first_word_judge}, split_of(evidence), certified_confidence=0.99
    )
    margins = family.scores["first"] @ [1, -1]
    correct = (margins > 0).sum() + 0.5 * (margins == 0).sum()
    tv = by_name(family)["tv_lower/first"]
    assert tv.value == total_variation_lower_bound_paired(correct, 100, 0.99)
    assert tv.confidence == 0.99


def test_scores_come_from_the_cache_when_they_are_there():
    evidence = evidence_of_words(100, 18, shift=0.5)
    stored: dict[str, dict] = {}

    def cached(name, compute):
        return stored.setdefault(name, None) or stored.update({name: compute()}) or stored[name]

    settings = {"foil": word_answers(np.random.default_rng(0), 100, 0.9), "cached": cached}
    one = audit_distinguishability(evidence, {"first": first_word_judge}, split_of(evidence), **settings)
    assert {"judge-first", "null-first", "power0.4-first"} <= set(stored)

    def never(train, valid, seed):
        raise AssertionError("trained again")

    other = audit_distinguishability(evidence, {"first": never}, split_of(evidence), **settings)
    assert other.findings == one.findings


def test_questions_that_differ_in_case_and_spacing_stay_together():
    prompts = [f"Who is number {n // 2}?" if n % 2 else f"who  is\nNUMBER {n // 2}?" for n in range(200)]
    split = split_questions(prompts)
    sides = [{int(row) // 2 for row in rows} for rows in split]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert len(split.test) == 50
    assert len(split.train) == 80
    assert isinstance(split.take([Pair("q", Answer("a", True), (Answer("b", True),))] * 200), Split)


def test_a_split_knows_questions_only_and_depends_on_the_seed():
    prompts = [f"q{n}" for n in range(100)]
    one, same, other = split_questions(prompts, 0), split_questions(prompts, 0), split_questions(prompts, 1)
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert set(one.test) != set(other.test)
    assert sorted(np.concatenate(one)) == list(range(100))
