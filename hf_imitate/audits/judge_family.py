"""A family of fresh judges, each with its controls: what they saw, what is certain of it, and what they could see."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression

from hf_imitate.audits.distinguishability import SplitScores, judgement_of, score_split, swap_within_pairs
from hf_imitate.audits.evidence import Evidence
from hf_imitate.audits.judges import Judge
from hf_imitate.audits.report import Finding
from hf_imitate.audits.report_text import number_of
from hf_imitate.audits.splits import MIN_PAIRS, QuestionSplit, Split, split_questions
from hf_imitate.bounds import clopper_pearson, num_pairs_for_advantage, total_variation_lower_bound_paired
from hf_imitate.e_values import average_log_e, calibrated_payoffs, holm, log_e_process, sign_test_p_value
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer

MIN_QUESTIONS = 30
# From the largest down: the first that is missed ends the search, so that no level is shared out.
POWER_SHARES = (0.4, 0.2, 0.1)
ADVANTAGES = (0.01, 0.02, 0.05)
KINDS = {
    "paired_accuracy": "probability",
    "e_value": "e-value",
    "tv_lower": "probability",
    "judge_bits": "bits",
    "null_control": "probability",
    "power_control": "probability",
}
_LARGEST_E = 1e300

# (name, function that computes some arrays) -> the arrays, perhaps from where they were stored before.
Cached = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]


class JudgeFamily(NamedTuple):
    """What the judges found.

    Attributes:
        findings: six for each judge, see `KINDS`.
        p_values: exact one-sided p-value of each judge that could be measured, and the same after Holm.
        log_e: log e-value after each test question, nats, by judge.
        scores: scores of the human's and of the imitator's answer to each test question, by judge. [N, 2].
        seconds: CPU seconds by finding.
    """

    findings: list[Finding]
    p_values: dict[str, dict[str, float]]
    log_e: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    seconds: dict[str, float]


class _Trials(NamedTuple):
    split: Split
    scores: SplitScores

    @property
    def margins(self) -> np.ndarray:
        """Score of the human's answer minus that of the imitator's, by test pair."""
        return _margins(self.scores.test)

    @property
    def p_value(self) -> float:
        return float(sign_test_p_value((self.margins > 0).sum(), (self.margins < 0).sum()))


def audit_distinguishability(
    evidence: Evidence,
    judges: Mapping[str, Judge],
    split: QuestionSplit,
    *,
    foil: Sequence[Answer] | None = None,
    foil_name: str = "the imitator at temperature 0.7",
    confidence: float = 0.95,
    certified_confidence: float | None = None,
    seed: int = 0,
    cached: Cached = lambda name, compute: compute(),
    advance: Callable[[str], None] = lambda name: None,
) -> JudgeFamily:
    """Ask fresh judges which of two answers to a question is the human's: one trial per test question, ties 1/2.

    Where rows are independent draws of one law of questions and answers, each number is exact: the judge is fixed by
    other questions, so its trials on the test questions are independent. The p-value is the sign test's, given the
    ties, so it holds whatever the scores are.

    Args:
        evidence ([`~hf_imitate.audits.evidence.Evidence`]): both sides' answers.
        judges (`Mapping[str, Judge]`): by name.
        split ([`~hf_imitate.audits.splits.QuestionSplit`]): of the rows.
        foil (`Sequence[Answer]`, *optional*): for the power control, an answer to each row by somebody who is no
            human and whom a judge should notice.
        foil_name (`str`, *optional*): who that is.
        confidence (`float`, *optional*, defaults to `0.95`): of each interval on its own.
        certified_confidence (`float`, *optional*): of each `tv_lower`; defaults to `confidence`.
        seed (`int`, *optional*, defaults to `0`): of the judges and of the controls.
        cached (`Callable`, *optional*): keeps each judge's scores, so that an audit that was killed resumes.
        advance (`Callable[[str], None]`, *optional*): told the name of each finding when it is done.

    Returns:
        [`JudgeFamily`]. A judge that fails gives findings without value that name the error's type.
    """
    family = JudgeFamily([], {}, {}, {}, {})
    reason = _why_not(evidence, split)
    pairs = pairs_of(evidence)
    for name, judge in judges.items():
        if reason:
            family.findings.extend(not_measured(name, reason))
            continue
        try:
            _audit_judge(
                family,
                (name, judge),
                (evidence, pairs, split),
                (foil, foil_name),
                (confidence, certified_confidence or confidence, len(judges)),
                seed,
                cached,
                advance,
            )
        except Exception as error:
            family.findings[:] = [f for f in family.findings if not f.name.endswith(f"/{name}")]
            family.findings.extend(not_measured(name, f"Not measured: the judge raised {type(error).__name__}."))
            for found in (family.p_values, family.log_e, family.scores):
                found.pop(name, None)
    # A judge that failed was part of the plan: its test stays in the family, with p-value 1.
    p_values = [family.p_values.get(name, {"p": 1.0})["p"] for name in judges]
    for name, adjusted in zip(judges, holm(p_values), strict=True):
        if name in family.p_values:
            family.p_values[name]["p_holm"] = float(adjusted)
    return family


def pairs_of(evidence: Evidence) -> list[Pair]:
    """Each row's human answer with its own draw of the imitator."""
    return [
        Pair(prompt, human, (imitator,), float(weight))
        for prompt, human, imitator, weight in zip(
            evidence.prompts, evidence.human_answers, evidence.imitator_answers, evidence.weight, strict=True
        )
    ]


def not_measured(judge: str, reason: str) -> list[Finding]:
    """A judge's findings, all without value."""
    return [Finding(f"{kind}/{judge}", None, unit, detail=reason) for kind, unit in KINDS.items()]


def contaminated(pairs: Sequence[Pair], foil: Sequence[Answer], share: float, seed: int) -> list[Pair]:
    """Pairs in which nothing but a share of foils can be found: the power control.

    A random `share` of the pairs hold the human's answer against the foil's. In the others the two sides are exchanged
    at random, as in the null control, so that they teach and test a judge nothing, with the noise of real pairs. A
    judge that is right with probability a on foils can be right with 1/2 + share (a - 1/2).
    """
    is_foil = np.random.default_rng([seed, 3]).random(len(pairs)) < share
    return [
        dataclasses.replace(pair, imitator=(answer,)) if chosen else swapped
        for pair, swapped, answer, chosen in zip(pairs, swap_within_pairs(pairs, seed), foil, is_foil, strict=True)
    ]


def _why_not(evidence: Evidence, split: QuestionSplit) -> str | None:
    num_rows, num_questions = len(evidence.prompts), len(evidence.first_of_question)
    if num_questions < MIN_QUESTIONS or num_rows < MIN_PAIRS or min(map(len, split)) < 2:
        return (
            f"Not measured: {num_rows} rows with {num_questions} questions are too few to train and test a judge; at "
            f"least {MIN_PAIRS} rows and {MIN_QUESTIONS} questions are needed."
        )
    if evidence.imitator.is_cut.all():
        return (
            f"Not measured: all {num_rows} answers of the imitator were cut at the length limit, so judges would "
            "learn the limit alone. Allow longer answers (`max_new_tokens`)."
        )
    return None


def _audit_judge(
    family: JudgeFamily,
    named_judge: tuple[str, Judge],
    data: tuple[Evidence, list[Pair], QuestionSplit],
    foil: tuple[Sequence[Answer] | None, str],
    levels: tuple[float, float, int],
    seed: int,
    cached: Cached,
    advance: Callable[[str], None],
) -> None:
    name, judge = named_judge
    evidence, pairs, rows = data
    confidence, certified_confidence, num_judges = levels

    def trials(kind: str, pairs: Sequence[Pair], rows: QuestionSplit) -> _Trials:
        split = rows.take(pairs)
        arrays = cached(f"{kind}-{name}", lambda: _to_arrays(score_split(split, judge, name, seed)))
        return _Trials(split, _from_arrays(arrays))

    began = time.process_time()
    main = trials("judge", pairs, rows)
    family.p_values[name] = {"p": main.p_value}
    family.log_e[name] = _log_e(main)
    family.scores[name] = np.array([[human[0], imitator[0]] for human, imitator in main.scores.test])
    level = (1 - confidence) / num_judges
    found = _main_findings(main, name, confidence, certified_confidence, level, family.log_e[name])
    family.seconds.update(dict.fromkeys((f.name for f in found), time.process_time() - began))
    family.findings.extend(found)
    advance(f"paired_accuracy/{name}")

    began = time.process_time()
    family.findings.append(_null_control(evidence, pairs, rows, name, confidence, seed, trials))
    family.seconds[f"null_control/{name}"] = time.process_time() - began
    advance(f"null_control/{name}")

    began = time.process_time()
    family.findings.append(_power_control(pairs, rows, foil, name, level, seed, trials))
    family.seconds[f"power_control/{name}"] = time.process_time() - began
    advance(f"power_control/{name}")


def _main_findings(
    main: _Trials, name: str, confidence: float, certified_confidence: float, level: float, log_e: np.ndarray
) -> list[Finding]:
    judgement = judgement_of(main.split, main.scores, name, confidence)
    accuracy, bits = judgement.findings
    is_weighted = not accuracy.certified
    sizes = ", ".join(f"{num_pairs_for_advantage(a, 0.8, level):,} for {a:.0%}" for a in ADVANTAGES)
    detail = (
        f"One trial per test question, ties 1/2; sign test p = {main.p_value:.3g}. Questions needed to notice an "
        f"advantage with probability 0.8 at level {level:.3g}: {sizes}. {_known_answers(main)}"
    )
    caveat = "Rows have different weights, so this is approximate. " if is_weighted else ""
    accuracy = dataclasses.replace(accuracy, certified=False, detail=caveat + detail)
    num_correct = min(round(judgement.accuracy * judgement.num_pairs, 9), judgement.num_pairs)
    tv = total_variation_lower_bound_paired(num_correct, judgement.num_pairs, certified_confidence)
    rate = float(log_e[-1]) / math.log(2) / len(log_e)
    return [
        accuracy,
        Finding(
            f"e_value/{name}",
            float(np.exp(min(log_e[-1], math.log(_LARGEST_E)))),
            "e-value",
            n=len(log_e),
            detail=(
                "Wealth of a bettor who starts with 1 and cannot win on average if human and imitator answers are "
                "exchangeable: it ever reaches 1/a with probability at most a, whenever one stops. Mean of a bet on "
                f"the sign and one on the judge's calibrated odds. log2 E = {log_e[-1] / math.log(2):.2f}, "
                f"{rate:.3g} bits per pair; largest on the way {log_e.max() / math.log(2):.2f}."
            ),
        ),
        Finding(
            *(f"tv_lower/{name}", tv, "probability", (tv, 1.0), certified_confidence, judgement.num_pairs),
            certified=not is_weighted,
            detail=(
                f"{caveat}Total variation between human and imitator answers, mean over questions, is at least 1 - "
                "sqrt(2 - 2a), a the lower Clopper-Pearson limit of the paired accuracy. Rows are taken as "
                "independent draws. 0 proves nothing."
            ),
        ),
        bits,
    ]


def _null_control(
    evidence: Evidence,
    pairs: list[Pair],
    rows: QuestionSplit,
    name: str,
    confidence: float,
    seed: int,
    trials: Callable[[str, Sequence[Pair], QuestionSplit], _Trials],
) -> Finding:
    humans = _two_humans(evidence, seed)
    if len(humans) >= 2 * MIN_PAIRS:
        who = f"human against human, {len(humans)} questions with two answers"
        rows = split_questions([pair.prompt for pair in humans], seed)
        pairs = humans
    else:
        who = "labels swapped within a random half of the pairs"
        pairs = swap_within_pairs(pairs, seed)
    null = trials("null", pairs, rows)
    wins, num_pairs = float(((null.margins > 0) + 0.5 * (null.margins == 0)).sum()), len(null.margins)
    interval = clopper_pearson(wins, num_pairs, confidence)
    alarm = " Far from chance: do not trust this judge's numbers." if null.p_value < 0.001 else ""
    detail = f"Nothing is there to be found ({who}); sign test p = {null.p_value:.3g}.{alarm}"
    accuracy = wins / num_pairs
    return Finding(f"null_control/{name}", accuracy, "probability", interval, confidence, num_pairs, False, detail)


def _power_control(
    pairs: list[Pair],
    rows: QuestionSplit,
    foil: tuple[Sequence[Answer] | None, str],
    name: str,
    level: float,
    seed: int,
    trials: Callable[[str, Sequence[Pair], QuestionSplit], _Trials],
) -> Finding:
    answers, who = foil
    if answers is None:
        return Finding(f"power_control/{name}", None, "probability", detail="Not measured: there are no foils.")
    told, smallest = [], None
    for share in POWER_SHARES:
        found = trials(f"power{share:g}", contaminated(pairs, answers, share, seed), rows)
        accuracy = float(np.mean((found.margins > 0) + 0.5 * (found.margins == 0)))
        told.append(f"{share:.0%}: accuracy {accuracy:.3f}, p = {found.p_value:.2g}")
        if found.p_value > level:
            break
        smallest = share
    planted = f"Share of answers by {who}, planted among pairs in which nothing else can be found. "
    verdict = f"Detected at level {level:.3g}, from the largest down: " if smallest else f"At level {level:.3g}: "
    missed = "" if smallest else " Not even the largest share was noticed: this judge's silence proves nothing."
    detail = f"{planted}{verdict}{'; '.join(told)}.{missed}"
    num_pairs = None if smallest is None else len(rows.test)
    return Finding(f"power_control/{name}", smallest, "probability", n=num_pairs, detail=detail)


def _two_humans(evidence: Evidence, seed: int) -> list[Pair]:
    """Of each question with several rows, its first two human answers, in random order."""
    order = np.argsort(evidence.question, kind="stable")
    starts = np.flatnonzero(np.diff(evidence.question[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    flips = np.random.default_rng([seed, 4]).random(len(starts)) < 0.5
    pairs = []
    for start, end, is_flipped in zip(starts, ends, flips, strict=True):
        if end - start >= 2:
            one, other = order[start : start + 2][:: -1 if is_flipped else 1]
            answers = evidence.human_answers
            pairs.append(Pair(evidence.prompts[one], answers[one], (answers[other],)))
    return pairs


def _known_answers(main: _Trials) -> str:
    """Accuracy where the judge could not know an answer by heart."""
    known = {a.text for p in (*main.split.train, *main.split.valid) for a in (p.human, *p.imitator)}
    is_new = np.array([not ({p.human.text, p.imitator[0].text} & known) for p in main.split.test])
    if is_new.all() or not is_new.any():
        return "" if is_new.all() else "Every test pair holds an answer that also stands in training pairs. "
    wins = (main.margins > 0) + 0.5 * (main.margins == 0)
    hold = number_of(int((~is_new).sum()), "test pair holds", "test pairs hold")
    return (
        f"{hold} an answer that also stands, under another question, in training pairs; on the others, "
        f"{int(is_new.sum())}, the accuracy is {wins[is_new].mean():.3f}. "
    )


def _log_e(main: _Trials) -> np.ndarray:
    """Log e-value after each test pair: half the wealth bets on signs, half on the judge's calibrated odds."""
    margins, valid = main.margins, _margins(main.scores.valid)
    scale = math.sqrt(np.square(valid).mean()) or 1.0
    signs = np.where(np.arange(len(valid)) % 2 == 0, 1.0, -1.0)
    slope = 0.0
    if len(valid) > 1:
        model = LogisticRegression(C=1.0, fit_intercept=False).fit((valid * signs / scale)[:, None], signs > 0)
        slope = max(float(model.coef_[0, 0]), 0.0) / scale
    payoffs = np.stack([np.sign(margins), calibrated_payoffs(slope * margins)])
    return average_log_e(log_e_process(payoffs))


def _margins(scores: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.array([human[0] - imitator[0] for human, imitator in scores])


def _to_arrays(scores: SplitScores) -> dict[str, np.ndarray]:
    return {
        part: np.array([[human[0], imitator[0]] for human, imitator in getattr(scores, part)])
        for part in ("valid", "test")
    }


def _from_arrays(arrays: dict[str, np.ndarray]) -> SplitScores:
    return SplitScores(*([(row[:1], row[1:]) for row in arrays[part]] for part in ("valid", "test")))
