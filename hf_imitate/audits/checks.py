"""Does the imitator do what humans always do? Pass rates of checks on the same questions, exactly."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from hf_imitate.audits.evidence import Evidence
from hf_imitate.audits.report import Finding
from hf_imitate.audits.report_text import number_of
from hf_imitate.bounds import clopper_pearson
from hf_imitate.checks import Check, check_names, check_outcomes
from hf_imitate.deviation_bounds import failure_deviation_lower_bound, num_answers_to_expose
from hf_imitate.rendering import Answer, next_speaker

_PASS = 0.5
_SIDES = ("human", "imitator")


class _Outcomes(NamedTuple):
    """One check on the first row of each question. All [num_questions]."""

    human: np.ndarray  # NaN where it does not apply
    imitator: np.ndarray
    weight: np.ndarray


def audit_checks(
    evidence: Evidence,
    checks: Sequence[Check],
    confidence: float = 0.95,
    certified_confidence: float | None = None,
    completion_role: str = "assistant",
) -> list[Finding]:
    """Compare how often human and imitator answers pass each check: one trial per question, its first row.

    Args:
        evidence ([`~hf_imitate.audits.evidence.Evidence`]): answers of both sides.
        checks (`Sequence[Callable]`): as in the trainers; each is called once per side.
        confidence (`float`, *optional*, defaults to `0.95`): of each pass rate's interval on its own.
        certified_confidence (`float`, *optional*): of `check_tv_lower`, one-sided; defaults to `confidence`.
        completion_role (`str`, *optional*, defaults to `"assistant"`): role of an answer in conversational data:
            `"assistant"`, `"user"` or `"alternating"`.

    Returns:
        `list[Finding]`: for each check `check_pass/<check>/human` and `check_pass/<check>/imitator` (exact intervals,
        the exact McNemar test in the latter's detail) and `check_tv_lower/<check>` (certified). A question to which a
        check does not apply on one of the sides is left out of both pass rates; for `check_tv_lower` it is one that
        did not fail. A check that raises is "not measured", with the kind of its error.

    Raises:
        ValueError, TypeError: a check has no name of its own, or two share one.
    """
    names = check_names(checks)
    certified = confidence if certified_confidence is None else certified_confidence
    findings = []
    for name, check in zip(names, checks, strict=True):
        try:
            outcomes = _outcomes(evidence, check, completion_role)
        except Exception as error:
            findings += _crashed(name, error)
            continue
        findings += [_pass_rate(name, side, outcomes, confidence) for side in _SIDES]
        findings.append(_deviation(name, outcomes, certified))
    return findings


def _outcomes(evidence: Evidence, check: Check, completion_role: str) -> _Outcomes:
    rows = evidence.first_of_question
    rows = np.sort(rows[evidence.weight[rows] > 0])
    prompts = [evidence.prompts[row] for row in rows]
    columns = {name: [values[row] for row in rows] for name, values in evidence.columns.items()}
    if evidence.choices is not None:
        columns.setdefault("choices", [evidence.choices[row] for row in rows])
    both = []
    for answers in (evidence.human_answers, evidence.imitator_answers):
        completions = [
            _as_completion(prompt, answers[row], completion_role) for prompt, row in zip(prompts, rows, strict=True)
        ]
        both.append(check_outcomes([check], prompts, completions, None, **columns)[:, 0].double().numpy())
    return _Outcomes(both[0], both[1], evidence.weight[rows])


def _as_completion(prompt: str | list[dict], answer: Answer, role: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return answer.text
    return [{"role": next_speaker(prompt) if role == "alternating" else role, "content": answer.text}]


def _pass_rate(name: str, side: str, outcomes: _Outcomes, confidence: float) -> Finding:
    full_name, unit = f"check_pass/{name}/{side}", "probability"
    applies = ~np.isnan(outcomes.human) & ~np.isnan(outcomes.imitator)
    if not applies.any():
        reason = f"Not measured: the check applies to none of {len(applies)} questions."
        return Finding(full_name, None, unit, detail=reason)
    weight = outcomes.weight[applies]
    passed = {s: getattr(outcomes, s)[applies] >= _PASS for s in _SIDES}
    rate = float(np.average(passed[side], weights=weight))
    # Kish's effective number of trials; exactly their number under equal weights.
    num_trials = int(weight.sum() ** 2 / np.square(weight).sum() + 1e-9)
    interval = clopper_pearson(min(round(rate * num_trials, 9), num_trials), num_trials, confidence)
    rate = min(max(rate, interval.low), interval.high)
    is_exact = np.ptp(weight) <= 1e-12 * weight.max()
    how = (
        "exact Clopper-Pearson interval, for this number alone"
        if is_exact
        else "rows weigh differently, so the Clopper-Pearson interval uses Kish's effective number and is not exact"
    )
    left_out = int((~applies).sum())
    detail = f"{int(passed[side].sum())} of {len(weight)} questions passed, one answer each; {how}. "
    questions = number_of(left_out, "question", "questions")
    detail += f"The check does not apply to {questions} on one side at least. " if left_out else ""
    detail += _mcnemar(passed) if side == "imitator" else ""
    return Finding(full_name, rate, unit, interval, confidence, num_trials, detail=detail.strip())


def _mcnemar(passed: dict[str, np.ndarray]) -> str:
    """The exact test of equal pass rates on shared questions: only those where the two sides differ tell anything."""
    only_human = int((passed["human"] & ~passed["imitator"]).sum())
    only_imitator = int((~passed["human"] & passed["imitator"]).sum())
    differing = only_human + only_imitator
    p_value = binomtest(only_human, differing, 0.5).pvalue if differing else 1.0
    sides = f"on {only_human} questions only the human passed, on {only_imitator} only the imitator"
    return f"Exact McNemar test of equal pass rates: p = {p_value:.3g} ({sides}; weights do not count)."


def _deviation(name: str, outcomes: _Outcomes, confidence: float) -> Finding:
    """An answer to which the check does not apply has not failed: so the event is one of all answers, and the bound
    holds also where whether a check applies depends on the answer."""
    failed = {side: int((getattr(outcomes, side) < _PASS).sum()) for side in _SIDES}
    num_questions = len(outcomes.human)
    full_name, unit = f"check_tv_lower/{name}", "probability"
    if not num_questions:
        return Finding(full_name, None, unit, detail="Not measured: no row has weight.")
    bound = failure_deviation_lower_bound(failed["imitator"], failed["human"], num_questions, confidence)
    sizes = ", ".join(f"{num_answers_to_expose(rate)} for {rate:.1%}" for rate in (0.001, 0.01, 0.05))
    seen = num_answers_to_expose(failed["imitator"] / num_questions) if failed["imitator"] else None
    exposed = f" An imitator that fails as often as this one did is exposed within {seen}." if seen else ""
    detail = (
        f"The imitator failed {failed['imitator']} and humans {failed['human']} of {num_questions} questions; total "
        "variation is at least the lower limit of the first rate minus the upper limit of the second, each with half "
        f"of the error; questions to which the check does not apply count as not failed, rows count alike. Answers "
        f"needed to see a failure with probability 0.95, by failure rate: {sizes}.{exposed}"
    )
    return Finding(full_name, bound, unit, (bound, 1.0), confidence, num_questions, certified=True, detail=detail)


def _crashed(name: str, error: Exception) -> list[Finding]:
    # What `check_outcomes` says of a crash quotes nothing; any other error may hold what the check returned.
    said = str(error) if isinstance(error, RuntimeError) else f"its outcomes are no numbers ({type(error).__name__})."
    reason = f"Not measured: {said}"
    names = [f"check_pass/{name}/{side}" for side in _SIDES] + [f"check_tv_lower/{name}"]
    return [Finding(full_name, None, "probability", detail=reason) for full_name in names]
