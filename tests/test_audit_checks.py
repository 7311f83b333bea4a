import math

import numpy as np
import pytest
from audit_evidence import by_name, evidence_of
from scipy.stats import binom

from hf_imitate.audits.checks import audit_checks
from hf_imitate.bounds import clopper_pearson
from hf_imitate.deviation_bounds import failure_deviation_lower_bound


def passes(prompts, completions, completion_ids=None, **columns):
    return [text == "good" for text in completions]


def passes_or_none(prompts, completions, completion_ids=None, **columns):
    return [None if text == "none" else text == "good" for text in completions]


def evidence_with(human, imitator, **fields):
    """`g`ood, `b`ad, or `n`one: the check does not apply."""
    words = {"g": "good", "b": "bad", "n": "none"}
    texts = [[words[letter] for letter in side] for side in (human, imitator)]
    return evidence_of(np.zeros(len(human)), texts=texts[0], imitator_texts=texts[1], **fields)


def test_pass_rates_are_exact_and_the_bound_is_certified():
    found = by_name(audit_checks(evidence_with("g" * 100, "b" * 20 + "g" * 80), [passes], 0.9, 0.99))
    assert set(found) == {"check_pass/passes/human", "check_pass/passes/imitator", "check_tv_lower/passes"}
    human, imitator, lower = found.values()
    assert (human.value, imitator.value) == (1.0, 0.8)
    assert human.interval == pytest.approx(tuple(clopper_pearson(100, 100, 0.9)))
    assert imitator.interval == pytest.approx(tuple(clopper_pearson(80, 100, 0.9)))
    assert (imitator.confidence, imitator.n) == (0.9, 100)
    assert lower.value == failure_deviation_lower_bound(20, 0, 100, 0.99)
    assert lower.interval == (lower.value, 1.0)
    assert (lower.certified, lower.confidence) == (True, 0.99)
    assert "imitator failed 20 and humans 0 of 100" in lower.detail
    assert "2995 for 0.1%, 299 for 1.0%, 59 for 5.0%" in lower.detail
    # At its own rate of a fifth: 0.8^14 < 0.05 < 0.8^13.
    assert "within 14" in lower.detail
    assert by_name(audit_checks(evidence_with("g" * 40, "b" * 40), [passes], 0.9))[lower.name].confidence == 0.9


def test_the_exact_mcnemar_test_by_hand():
    # Five questions only the human passes, none the other way: p = 2 / 2^5.
    found = by_name(audit_checks(evidence_with("g" * 30 + "b" * 10, "b" * 5 + "g" * 25 + "b" * 10), [passes]))
    assert "p = 0.0625 (on 5 questions only the human passed, on 0 only" in found["check_pass/passes/imitator"].detail
    even = by_name(audit_checks(evidence_with("g" * 40, "g" * 40), [passes]))
    assert "p = 1 " in even["check_pass/passes/imitator"].detail


def test_an_imitator_as_good_as_humans_is_accused_in_no_more_audits_than_allowed():
    """10 000 audits of 50 questions, both sides fail one in five; the counts decide, so a table replaces audits."""
    n, delta = 50, 0.05
    table = np.zeros((n + 1, n + 1))
    for i in range(n + 1):
        for h in range(n + 1):
            table[i, h] = failure_deviation_lower_bound(i, h, n, 1 - delta)
    imitator, human = np.random.default_rng(0).binomial(n, 0.2, (2, 10_000))
    assert (table[imitator, human] > 0).sum() <= binom.isf(1e-5, 10_000, delta)
    audited = audit_checks(evidence_with("b" * 7 + "g" * 43, "b" * 31 + "g" * 19), [passes])[-1]
    assert audited.value == table[31, 7]


def test_the_first_row_of_each_question_is_its_one_trial():
    evidence = evidence_with("gbbb" * 40, "bggg" * 40, question=np.repeat(np.arange(40), 4))
    human, imitator, lower = audit_checks(evidence, [passes])
    assert (human.value, imitator.value, lower.n) == (1.0, 0.0, 40)


def test_what_does_not_apply_on_one_side_is_left_out_on_both_and_counted():
    evidence = evidence_with("nggggb" + "g" * 34, "gnbggg" + "g" * 34)
    human, imitator, lower = audit_checks(evidence, [passes_or_none])
    assert human.n == imitator.n == 38
    assert (human.value, imitator.value) == (37 / 38, 37 / 38)
    assert "does not apply to 2 questions" in human.detail
    assert lower.n == 40


def test_refusing_to_be_checked_is_no_failure_and_fakes_no_distance():
    """Whether a check applies may depend on the answer; then the rest of one side is no sample of its law."""
    lower = audit_checks(evidence_with("g" * 100, "n" * 100), [passes_or_none])[-1]
    assert lower.value == 0.0
    none_apply = audit_checks(evidence_with("g" * 100, "n" * 100), [passes_or_none])[0]
    assert none_apply.value is None
    assert "applies to none of 100" in none_apply.detail


def test_checks_are_called_once_per_side_with_every_column():
    calls = []

    def seen(prompts, completions, completion_ids=None, **columns):
        calls.append((prompts, completions, completion_ids, columns))
        return [True] * len(prompts)

    fields = {"columns": {"level": list("abcdef")}, "choices": [["x"], ["y"]] * 3}
    evidence = evidence_with("gggbbb", "bbbggg", question=[0, 0, 1, 1, 2, 2], **fields)
    audit_checks(evidence, [seen])
    questions = ["question 0", "question 1", "question 2"]
    columns = {"level": ["a", "c", "e"], "choices": [["x"]] * 3}
    assert calls == [
        (questions, ["good", "good", "bad"], None, columns),
        (questions, ["bad", "bad", "good"], None, columns),
    ]


@pytest.mark.parametrize(("role", "expected"), [("assistant", "assistant"), ("user", "user"), ("alternating", "user")])
def test_conversations_get_their_answers_as_messages(role, expected):
    roles = []

    def looks(prompts, completions, completion_ids=None, **columns):
        roles.extend(message["role"] for (message,) in completions)
        return [message["content"] == "good" for (message,) in completions]

    prompts = [[{"role": "assistant", "content": str(number)}] for number in range(3)]
    human = audit_checks(evidence_with("ggb", "ggg", prompts=prompts), [looks], completion_role=role)[0]
    assert set(roles) == {expected}
    assert human.value == pytest.approx(2 / 3)


def test_a_crashing_check_is_not_measured_and_the_others_are():
    def crashes(prompts, completions, completion_ids=None, **columns):
        raise KeyError("SECRET " + completions[0])

    found = by_name(audit_checks(evidence_with("g" * 40, "g" * 40), [crashes, passes]))
    for name in ("check_pass/crashes/human", "check_pass/crashes/imitator", "check_tv_lower/crashes"):
        assert found[name].value is None
        assert "KeyError" in found[name].detail
        assert "SECRET" not in found[name].detail
    assert found["check_pass/passes/human"].value == 1.0


@pytest.mark.parametrize(
    "returned", [[0.5], ["good"] * 40, [1.5] * 40, [np.array("SECRET")] * 40, "SECRET" * 40, None, [math.inf] * 40]
)
def test_a_check_that_returns_no_outcomes_is_not_measured(returned):
    def odd(prompts, completions, completion_ids=None, **columns):
        return returned

    found = audit_checks(evidence_with("g" * 40, "g" * 40), [odd])
    assert [finding.value for finding in found] == [None] * 3
    assert all("Not measured" in finding.detail and "SECRET" not in finding.detail for finding in found)


def test_weights_count_in_rates_and_make_them_inexact():
    weight = np.tile([3.0, 1.0], 20)
    human, imitator, lower = audit_checks(evidence_with("g" * 40, "gb" * 20, weight=weight), [passes])
    assert imitator.value == pytest.approx(0.75)
    assert imitator.n == 32  # Kish: 80^2 / (20 * 9 + 20)
    assert "not exact" in imitator.detail
    assert lower.value == failure_deviation_lower_bound(20, 0, 40, 0.95)
    assert human.value == 1.0


def test_a_row_without_weight_is_no_trial():
    weight = np.append(np.ones(40), np.zeros(5))
    assert audit_checks(evidence_with("g" * 40 + "b" * 5, "g" * 45, weight=weight), [passes])[0].value == 1.0


def test_no_check_no_finding_and_two_of_one_name_are_refused():
    assert audit_checks(evidence_with("g", "g"), []) == []
    with pytest.raises(ValueError, match="more than once"):
        audit_checks(evidence_with("g", "g"), [passes, passes])
