"""Check by re-execution that answers were kept out of their candidates by the committed choice."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_imitate.questions import check_answer_lists
from hf_imitate.residual_imitator import NO_COLUMNS, Columns, ResidualImitator
from hf_imitate.sampling import check_drawing
from hf_imitate.verification import CountingSampler, Verification, settle_tolerance


def verify_resampled(
    imitator: ResidualImitator,
    questions: Sequence[str | list[dict]],
    answers: Sequence[Sequence[str]],
    seed: int = 0,
    first_draw: int = 0,
    tolerance: float | None = None,
    batch_size: int = 64,
    progress: bool = False,
    columns: Columns = NO_COLUMNS,
    draws: Sequence[Sequence[int]] | None = None,
) -> Verification:
    """Draw all candidates again, score them again, toss the committed coin again, and compare.

    The losers are not shown, so nothing can follow them: every candidate is drawn again, at K times the cost of an
    answer. An answer counts as one mismatch unless it says what the winner says, or a candidate whose perturbed logit
    is within the tolerance of the winner's. An honest answer is flagged where rounding chose another of two *tokens*
    within the tolerance: in float32 next to never; in lower precision verify in the very batches in which the answers
    were drawn (the same questions, numbers and `batch_size`), or use float32 for both.

    Args:
        imitator ([`~hf_imitate.residual_imitator.ResidualImitator`]): the law.
        questions, answers, seed, first_draw, columns: what was asked, with what, and what came out.
        tolerance: nats by which two logits may be off against each other through rounding, the imitator's and the
            distinguisher's. Defaults to 1e-3 in float32 and to 0.25 in lower precision, for each on its own.
        batch_size: most sequences in one forward.
        progress: show progress bars and say what it took.
        draws: numbers of each question's draws, where they are not `first_draw` and those that follow. A question with
            other columns in another row is asked there under its own numbers.

    Returns:
        [`~hf_imitate.verification.Verification`]: `num_tokens` counts the tokens of all candidates, thoughts included,
        and one for each choice. `capacity_bits` adds, to what near ties of tokens leave open in all candidates, log2
        of the number of different answers within the tolerance at each choice.
    """
    check_answer_lists(questions, answers)
    check_drawing(imitator.model, imitator.temperature, first_draw, {"batch_size": batch_size})
    margin = settle_tolerance(imitator.model, tolerance)
    margin_of_choice = settle_tolerance(imitator.distinguisher.model, tolerance)
    samplers: list[_DecisionCounter] = []

    def make_sampler(keys: Any, length: int, temperature: float, end_token_ids: Any) -> "_DecisionCounter":
        samplers.append(_DecisionCounter(keys, length, temperature, end_token_ids, tolerance=margin))
        return samplers[-1]

    numbers = [range(first_draw, first_draw + len(texts)) for texts in answers] if draws is None else draws
    choices = imitator.choose(questions, numbers, seed, batch_size, progress, columns, make_sampler=make_sampler)
    num_mismatched, bits = 0, [bit for sampler in samplers for bit in sampler.bits]
    for own, texts in zip(choices, answers, strict=True):
        for choice, text in zip(own, texts, strict=True):
            is_near = choice.perturbed >= choice.perturbed.max() - margin_of_choice
            near = {choice.candidates[k].answer.text for k in is_near.nonzero().flatten().tolist()}
            num_mismatched += text not in near
            bits.append(math.log2(len(near)))
    num_tokens = sum(sampler.num_decisions for sampler in samplers) + sum(map(len, answers))
    return Verification(num_tokens, num_mismatched, math.fsum(bits), num_mismatched == 0)


class _DecisionCounter(CountingSampler):
    """Counts the tokens that it draws."""

    num_decisions = 0

    def pick(self, perturbed: Tensor, drawn_ids: Tensor) -> Tensor:
        self.num_decisions += len(self.open_rows)
        return super().pick(perturbed, drawn_ids)
