"""One generation batch before the distinguisher: scored as it is, then learned from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_imitate.checks import Check, check_outcomes
from hf_imitate.human_rows import HumanRow, without_internal
from hf_imitate.pairs import Learner, Pair
from hf_imitate.rendering import Answer


@dataclass(frozen=True)
class Round:
    """N answers of the imitator, row by row, with the human's answer to the same question.

    Attributes:
        questions: a number for each question with its human answer: equal where both are the same. N.
        heldout: whether no one may learn from the human's answer. N.
        prompts: questions. N.
        answers: what the imitator answered. N.
        humans: what the human answered; `None` where no answer is known. N.
        outcomes, human_outcomes: check outcomes, NaN where one does not apply. [N, C].
    """

    questions: Sequence[int]
    heldout: Sequence[bool]
    prompts: Sequence[str | list]
    answers: Sequence[Answer]
    humans: Sequence[HumanRow | None]
    outcomes: Tensor
    human_outcomes: Tensor

    def pair(self, i: int) -> Pair:
        """Row `i` as a pair to learn from."""
        on_human, on_imitator = self.human_outcomes[i].tolist(), self.outcomes[i].tolist()
        checks = (tuple(on_human), (tuple(on_imitator),)) if on_imitator else ((), ())
        human = self.humans[i]
        return Pair(self.prompts[i], human.answer, (self.answers[i],), human.weight, *checks)


def run_checks(
    checks: Sequence[Check],
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[str | list],
    completions: Sequence[str | list],
    completion_ids: Sequence[list[int]],
) -> tuple[Tensor, Tensor]:
    """Outcomes of the checks on the imitator's answers and on the humans', each check called once per side.

    Args:
        rows: the data set's rows behind the answers. N; every column but question and answer reaches the checks.
        prompts, completions, completion_ids: what was asked and what the imitator answered. N.

    Returns:
        Imitator's and humans' outcomes, NaN where a check does not apply or no human answered. [N, C] each.
    """
    columns = {
        key: [row[key] for row in rows]
        for key in without_internal(rows[0])
        if key not in ("prompt", "completion", "completion_ids")
    }
    outcomes = check_outcomes(checks, prompts, completions, completion_ids, **columns)
    human_outcomes = torch.full_like(outcomes, torch.nan)
    known = [i for i, row in enumerate(rows) if row["completion"] is not None]
    if known and checks:
        human_outcomes[known] = check_outcomes(
            checks,
            [prompts[i] for i in known],
            [rows[i]["completion"] for i in known],
            **{key: [values[i] for i in known] for key, values in columns.items()},
        )
    return outcomes, human_outcomes


class Scores(NamedTuple):
    """Logits of both sides before the update, NaN where there is no human answer, and the mean loss in nats (NaN if
    nothing was learned). [N], [N], float."""

    imitator: Tensor
    human: Tensor
    loss: float


def merged(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with the same question and human answer in a row become one, so that the human is read once."""
    groups: list[list[Pair]] = []
    for pair in pairs:
        same = groups and groups[-1][0].prompt == pair.prompt and groups[-1][0].human == pair.human
        if same and groups[-1][0].human_checks == pair.human_checks:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [
        Pair(
            group[0].prompt,
            group[0].human,
            tuple(pair.imitator[0] for pair in group),
            sum(pair.weight for pair in group),
            group[0].human_checks,
            tuple(checks for pair in group for checks in pair.imitator_checks),
        )
        for group in groups
    ]


def judge(
    learner: Learner,
    batch: Round,
    learn_from: Sequence[int] = (),
    replayed: Sequence[Sequence[Pair]] = (),
    lr_scale: float = 1.0,
    max_rows: int = 64,
) -> Scores:
    """Score a generation batch, then update the distinguisher on part of it.

    Rows to learn from are scored by the very forward the first update trains on; the others without gradient. All
    scores are those from before the update, so no answer is paid by a distinguisher that has already seen it.

    Args:
        learner: the distinguisher and its optimizer.
        batch: what to score.
        learn_from: rows whose comparison is learned; all need a human answer.
        replayed: for each update, old pairs to learn from beside them; as many updates as there are lists. Every
            process passes the same number of lists; none only scores.
        lr_scale: share of the learning rate.
        max_rows: most answers in one forward without gradient.
    """
    d = learner.distinguisher
    learned = sorted(learn_from) if replayed else []
    pairs = merged([batch.pair(i) for i in learned])
    imitator = torch.full((len(batch.prompts),), torch.nan, device=d.device)
    by_question: dict[int, Tensor] = {}

    rest = sorted(set(range(len(batch.prompts))) - set(learned))
    answered = {batch.questions[i]: i for i in learned}
    unseen = {
        batch.questions[i]: i for i in rest if batch.humans[i] is not None and batch.questions[i] not in answered
    }
    shown = [batch.answers[i] for i in rest] + [batch.humans[i].answer for i in unseen.values()]
    asked = [batch.prompts[i] for i in [*rest, *unseen.values()]]
    outcomes = torch.cat([batch.outcomes[rest], batch.human_outcomes[list(unseen.values())]])
    scored = d.score(asked, shown, outcomes, batch_size=max_rows)
    imitator[rest] = scored[: len(rest)]
    by_question.update(zip(unseen, scored[len(rest) :], strict=True))

    loss = float("nan")
    for step, old in enumerate(replayed):
        result = learner.step([*pairs, *old], lr_scale)
        if step == 0 and pairs:
            loss = result.loss
            seen = result.logits[: len(pairs)]
            imitator[learned] = torch.cat([logits.imitator for logits in seen])
            of_humans = torch.cat([logits.human for logits in seen])
            by_question.update(zip((batch.questions[i] for i in learned), of_humans, strict=True))
    missing = torch.full((), torch.nan, device=d.device)
    return Scores(imitator, torch.stack([by_question.get(q, missing) for q in batch.questions]), loss)
