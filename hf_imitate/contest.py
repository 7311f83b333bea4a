"""One generation batch before the distinguisher: scored as it is, then learned from."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_imitate.checks import Check, check_outcomes
from hf_imitate.human_rows import HumanRow, without_internal
from hf_imitate.pairs import Learner, Pair, comparable
from hf_imitate.rendering import Answer, Renderer, canonical_text


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
        """Row `i` as a pair to learn from.

        Raises:
            ValueError: no human answered.
        """
        human = self.humans[i]
        if human is None:
            raise ValueError(f"Row {i} has no human answer, so there is no pair to learn from.")
        on_human, on_imitator = self.human_outcomes[i].tolist(), self.outcomes[i].tolist()
        checks = (tuple(on_human), (tuple(on_imitator),)) if on_imitator else ((), ())
        return Pair(self.prompts[i], human.answer, (self.answers[i],), human.weight, *checks)


def run_checks(
    checks: Sequence[Check],
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[str | list],
    answers: Sequence[Answer],
    humans: Sequence[HumanRow | None],
    completion_ids: Sequence[list[int]],
    renderer: Renderer,
) -> tuple[Tensor, Tensor]:
    """Outcomes of the checks on the imitator's answers and on the humans', each check called once per side.

    Both sides' texts are canonical and cut at the same limit: otherwise a check would find out which side it looks at.

    Args:
        rows: the data set's rows behind the answers. N; every column but question and answer reaches the checks.
        prompts: what was asked. N.
        answers, completion_ids: what the imitator answered. N.
        humans: what the human answered, `None` where no answer is known. N.
        renderer: knows whose turn the answers are.

    Returns:
        Imitator's and humans' outcomes, NaN where a check does not apply or no human answered. [N, C] each.
    """
    columns = {
        key: [row[key] for row in rows]
        for key in without_internal(rows[0])
        if key not in ("prompt", "completion", "completion_ids")
    }
    shown = [
        renderer.as_completion(prompt, canonical_text(answer.text))
        for answer, prompt in zip(answers, prompts, strict=True)
    ]
    outcomes = check_outcomes(checks, prompts, shown, completion_ids, **columns)
    human_outcomes = torch.full_like(outcomes, torch.nan)
    known = {i: human.answer for i, human in enumerate(humans) if human is not None}
    if known and checks:
        human_outcomes[list(known)] = check_outcomes(
            checks,
            [prompts[i] for i in known],
            [renderer.as_completion(prompts[i], canonical_text(answer.text)) for i, answer in known.items()],
            **{key: [values[i] for i in known] for key, values in columns.items()},
        )
    return outcomes, human_outcomes


class Scores(NamedTuple):
    """What a distinguisher said of a generation batch before it learned from it.

    Attributes:
        imitator: logit of each of the imitator's answers. [N].
        human: logit of the human's answer to the same question, NaN where there is none. Checks that do not apply to
            both answers of a row are left out of both logits, so it can differ between rows of one question. [N].
        loss: mean loss per comparison in nats over all processes; NaN if nothing was learned here.
    """

    imitator: Tensor
    human: Tensor
    loss: float


def merged(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with the same question, human answer and weight in a row become one, so that the human is read once."""
    return [
        Pair(
            group[0].prompt,
            group[0].human,
            tuple(answer for pair in group for answer in pair.imitator),
            sum(pair.weight for pair in group),
            group[0].human_checks,
            tuple(checks for pair in group for checks in pair.imitator_checks),
        )
        for group in (list(same) for _, same in itertools.groupby(pairs, _what_a_human_said))
    ]


def _what_a_human_said(pair: Pair) -> tuple:
    # NaN differs from itself; `None` does not.
    checks = tuple(None if math.isnan(outcome) else outcome for outcome in pair.human_checks)
    return pair.prompt, pair.human, pair.weight, checks


def score_then_update(
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
    with learner.distinguisher.active():  # once for scores and updates: a switch of adapters visits every module
        return _score_then_update(learner, batch, learn_from, replayed, lr_scale, max_rows)


def _score_then_update(
    learner: Learner,
    batch: Round,
    learn_from: Sequence[int],
    replayed: Sequence[Sequence[Pair]],
    lr_scale: float,
    max_rows: int,
) -> Scores:
    d = learner.distinguisher
    learned = sorted(learn_from) if replayed else []
    pairs = merged([batch.pair(i) for i in learned])
    on_imitator, on_human = _check_logits(learner, batch)

    of_imitator = torch.full((len(batch.prompts),), torch.nan, device=d.device)
    of_human: dict[int, Tensor] = {}  # by question, of the text alone
    rest = sorted(set(range(len(batch.prompts))) - set(learned))
    in_lesson = {batch.questions[i] for i in learned}
    humans = {
        batch.questions[i]: human.answer
        for i in rest
        if (human := batch.humans[i]) is not None and batch.questions[i] not in in_lesson
    }
    first = {batch.questions[i]: i for i in rest}
    asked = [batch.prompts[i] for i in rest] + [batch.prompts[first[question]] for question in humans]
    scored = d.score(asked, [batch.answers[i] for i in rest] + list(humans.values()), batch_size=max_rows)
    of_imitator[rest] = scored[: len(rest)] + on_imitator[rest]
    of_human.update(zip(humans, scored[len(rest) :], strict=True))

    loss = float("nan")
    for step, old in enumerate(replayed):
        result = learner.step([*pairs, *old], lr_scale)
        if step == 0 and pairs:
            loss, seen = result.loss, result.logits[: len(pairs)]
            of_imitator[learned] = torch.cat([logits.imitator for logits in seen])
            texts = torch.cat([logits.human for logits in seen]) - on_human[learned]
            of_human.update(zip((batch.questions[i] for i in learned), texts, strict=True))
    missing = torch.full((), torch.nan, device=d.device)
    return Scores(of_imitator, torch.stack([of_human.get(q, missing) for q in batch.questions]) + on_human, loss)


@torch.no_grad()
def _check_logits(learner: Learner, batch: Round) -> tuple[Tensor, Tensor]:
    """What the checks add to the logits of the imitator's and of the human's answers, before the update. [N] each."""
    d = learner.distinguisher
    if not d.check_names:
        nothing = torch.zeros(len(batch.prompts), device=d.device)
        return nothing, nothing
    on_human, on_imitator = comparable(batch.human_outcomes.to(d.device), batch.outcomes.to(d.device))
    is_alone = torch.tensor([human is None for human in batch.humans], device=d.device)
    on_imitator = torch.where(is_alone[:, None], batch.outcomes.to(d.device), on_imitator)
    return d.check_logits(on_imitator), d.check_logits(on_human)
