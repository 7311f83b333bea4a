"""One batch of a latent run: what the imitator learns from it, and then the retrodictor."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hf_imitate.estimators import Coefficients, importance_weighted_log_prob, latent_loss, retrodictor_loss
from hf_imitate.latent_draws import Continuation, Drawn
from hf_imitate.losses import retrodictive_loss
from hf_imitate.retrodictor import Thinkers
from hf_imitate.sampling import stream_key
from hf_imitate.trainers.latent_learner import RetrodictorLearner
from hf_imitate.trainers.latent_retrodictive_config import LatentRetrodictiveConfig
from hf_imitate.trainers.latent_rows import LatentRow
from hf_imitate.trainers.latent_setup import measure_estimates, measure_known

BASELINE_DECAY = 0.95  # of the running mean that stands in for other thoughts where there is one alone


@dataclass
class Hindsight:
    """What the retrodictor is to learn from one batch, after the imitator's backward."""

    drawn: list[Continuation]  # K for each row of `weight`
    known: list[Continuation]  # one for each row of `known_weight`
    coefficients: Coefficients | None  # of those drawn
    weight: Tensor
    known_weight: Tensor
    normalizer: float


class LatentSteps:
    """Losses of imitator and retrodictor on one batch. Rows with a known thought have it for an exact sample.

    Args:
        args ([`LatentRetrodictiveConfig`]): settings.
        thinkers ([`~hf_imitate.retrodictor.Thinkers`]): both models and their law.
        learner ([`RetrodictorLearner`], *optional*): none for the estimator "prior".
        longest_answer (`int`): most tokens of an answer that the imitator dreams.
        autocast (`Callable`): context of every forward.

    Attributes:
        baseline: running mean of log p over earlier batches, for one thought per answer.
    """

    def __init__(
        self,
        args: LatentRetrodictiveConfig,
        thinkers: Thinkers,
        learner: RetrodictorLearner | None,
        longest_answer: int,
        autocast: Callable[[], contextlib.AbstractContextManager],
    ):
        self.args, self.thinkers, self.learner = args, thinkers, learner
        self.longest_answer, self.autocast = longest_answer, autocast
        self.baseline = 0.0
        self._hindsight: Hindsight | None = None
        self._dream_loss = torch.zeros(())

    def loss(self, model: Any, rows: Sequence[LatentRow], step: int) -> tuple[Tensor, Tensor]:
        """The imitator's loss, nats per answer, and what was measured of the rows, see `measure_estimates`.

        Args:
            model: the imitator, perhaps wrapped. All thoughts of the batch go through it in one forward.
            rows: the batch.
            step: of the optimizer: part of the key of the draws.
        """
        hidden, known = _by_thought(rows)
        drawn = self._think(hidden, step)
        log_p_thought, log_p_answer = self.thinkers.score(model, self._sequences(hidden, drawn, known, False))
        cut = len(hidden) * self.args.num_thoughts
        known_weight = _weights(known, log_p_thought)
        # Weights are under the data set's mean, so that a row counts the same whatever batch it falls into.
        normalizer = float(len(rows))
        log_p_known = log_p_thought[cut:] + log_p_answer[cut:]
        loss = _mean_loss(log_p_known, known_weight, normalizer)
        table, coefficients = [measure_known(known, log_p_known)], None
        if hidden:
            result = latent_loss(
                self.args.estimator,
                log_p_thought[:cut].reshape(len(hidden), -1),
                log_p_answer[:cut].reshape(len(hidden), -1),
                None if self.learner is None else log_p_thought.new_tensor(_recorded(drawn)),
                _weights(hidden, log_p_thought),
                normalizer,
                self.baseline,
            )
            loss, coefficients = loss + result.imitator, result.coefficients
            table.append(measure_estimates(hidden, result.estimate, _lengths(drawn), coefficients.is_skipped))
            self._follow(result.estimate.log_prob)
        if self.learner is not None:
            pairs = self._sequences(hidden, drawn, known, True)
            weight = _weights(hidden, log_p_thought)
            self._hindsight = Hindsight(pairs[:cut], pairs[cut:], coefficients, weight, known_weight, normalizer)
        return loss, torch.cat(table)

    def _think(self, hidden: Sequence[LatentRow], step: int) -> list[list[Drawn]]:
        try:
            return self.thinkers.think([row.rendered for row in hidden], self.keys("thought", hidden, step))
        except ValueError as error:
            who = "imitator" if self.learner is None else "retrodictor"
            setting = "learning_rate" if self.learner is None else "retrodictor_learning_rate"
            raise FloatingPointError(
                f"No thought can be drawn from the {who} at step {step}: its scores are not finite. Lower "
                f"`{setting}`, or train in fp32 or bf16."
            ) from error

    def learn_in_hindsight(self, scale: float) -> None:
        """The retrodictor's forward and backward on what the imitator has just learned from.

        Args:
            scale: share of this batch in its step.
        """
        seen, self._hindsight = self._hindsight, None
        if seen is None or self.learner is None:
            return
        with self.learner.learning(), self.autocast():
            log_q, _ = self.thinkers.score(self.learner.retrodictor.model, [*seen.drawn, *seen.known])
            cut = len(seen.drawn)
            loss = _mean_loss(log_q[cut:], seen.known_weight, seen.normalizer)
            if seen.coefficients is not None:
                own = log_q[:cut].reshape(len(seen.weight), -1)
                loss = loss + retrodictor_loss(seen.coefficients, own, seen.weight, seen.normalizer)
            (scale * loss).backward()

    def dream(self, rows: Sequence[LatentRow], step: int, scale: float) -> Tensor:
        """The retrodictor's forward and backward on thoughts and answers of the imitator's own, and on known ones.

        Returns:
            Minus log q per row, nats, before the update. Scalar.
        """
        hidden, known = _by_thought(rows)
        with self.autocast():
            questions = [row.rendered for row in hidden]
            longest = min((self.thinkers.longest_answer(one, self.longest_answer) for one in questions), default=1)
            dreams = self.thinkers.dream(questions, self.keys("dream", hidden, step), longest)
        pairs, weights = [], []
        for row, own in zip(hidden, dreams, strict=True):
            for one in own:
                ended = any(token in self.thinkers.end_token_ids for token in one.answer_ids[-1:])
                answered = row.rendered._replace(answer_ids=one.answer_ids, ended=ended)
                pairs += self.thinkers.hindsight_rows(answered, [one.thought_ids])
                weights.append(row.weight / len(own))
        for row in known:
            pairs += self.thinkers.hindsight_rows(row.rendered, [row.thought_ids or ()])
            weights.append(row.weight)
        learner = cast("RetrodictorLearner", self.learner)  # without one there is no warm-up
        with learner.learning(), self.autocast():
            log_q, _ = self.thinkers.score(learner.retrodictor.model, pairs)
            loss = _mean_loss(log_q, log_q.new_tensor(weights), float(len(rows)))
            (scale * loss).backward()
        self._dream_loss = self._dream_loss.to(loss.device) + scale * loss.detach()
        return loss.detach()

    def take_dream_loss(self) -> Tensor:
        """Mean loss of the dreams since it was last asked for."""
        loss, self._dream_loss = self._dream_loss, torch.zeros(())
        return loss

    @torch.no_grad()
    def evaluate(self, rows: Sequence[LatentRow]) -> tuple[Tensor, Tensor]:
        """Minus the estimated log p, nats per answer, and what was measured; the same thoughts at every evaluation.

        As in the bits, an answer that no thought explains is left out, and counted as skipped.

        Raises:
            ValueError: a log-probability is NaN.
        """
        keys = self.keys("evaluation", rows, 0, self.args.num_thoughts_eval)
        log_p_joint, log_q, drawn = self.thinkers.log_weights([row.rendered for row in rows], keys)
        if (log_p_joint - log_q).isnan().any():
            raise ValueError("The log-probability of a thought or an answer is NaN. Load the model in fp32 or bf16.")
        estimate = importance_weighted_log_prob(log_p_joint, log_q)
        is_skipped = ~estimate.log_prob.isfinite()
        table = measure_estimates(rows, estimate, _lengths(drawn), is_skipped)
        loss = retrodictive_loss(
            torch.where(is_skipped, 0.0, estimate.log_prob), torch.where(is_skipped, 0.0, _weights(rows, log_q))
        )
        return loss.float().to(self.thinkers.model.device), table

    def keys(self, purpose: str, rows: Sequence[LatentRow], step: int, number: int | None = None) -> list[list[bytes]]:
        """Keys of each row's draws: of (seed, step, row, number), so a resumed run needs no generator's state."""
        number = self.args.num_thoughts if number is None else number
        return [
            [stream_key(self.args.seed, purpose, f"row {row.number}", step, k) for k in range(number)] for row in rows
        ]

    def _sequences(
        self,
        hidden: Sequence[LatentRow],
        drawn: Sequence[Sequence[Drawn]],
        known: Sequence[LatentRow],
        in_hindsight: bool,
    ) -> list[Continuation]:
        lay_out = self.thinkers.hindsight_rows if in_hindsight else self.thinkers.forward_rows
        pairs = [(row, [one.thought_ids for one in own]) for row, own in zip(hidden, drawn, strict=True)]
        pairs += [(row, [list(row.thought_ids or ())]) for row in known]
        return [one for row, thoughts in pairs for one in lay_out(row.rendered, thoughts)]

    def _follow(self, log_prob: Tensor) -> None:
        values = log_prob[log_prob.isfinite()]
        if len(values):
            self.baseline = BASELINE_DECAY * self.baseline + (1 - BASELINE_DECAY) * values.mean().item()


def _by_thought(rows: Sequence[LatentRow]) -> tuple[list[LatentRow], list[LatentRow]]:
    """Rows whose thought is hidden, and rows whose thought is known."""
    return [row for row in rows if row.thought_ids is None], [row for row in rows if row.thought_ids is not None]


def _weights(rows: Sequence[LatentRow], like: Tensor) -> Tensor:
    return like.new_tensor([row.weight for row in rows])


def _recorded(drawn: Sequence[Sequence[Drawn]]) -> list[list[float]]:
    return [[one.log_prob_thought for one in own] for own in drawn]


def _lengths(drawn: Sequence[Sequence[Drawn]]) -> list[list[int]]:
    return [[len(one.thought_ids) for one in own] for own in drawn]


def _mean_loss(log_prob: Tensor, weight: Tensor, normalizer: float) -> Tensor:
    return retrodictive_loss(log_prob, weight) * weight.sum() / normalizer
