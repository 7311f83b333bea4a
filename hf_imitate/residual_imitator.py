"""An imitator that draws several answers and keeps one by its distinguisher's logits: its law, used and scored.

[`~hf_imitate.imitator.Imitator`] hands over to [`ResidualImitator`] where `resample` is not 1.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_imitate.candidates import check_resampling, checks_in_order, draw_candidates, score_candidates
from hf_imitate.checks import Check
from hf_imitate.defensive_bounds import RelativeEstimate
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.latent_imitator import LatentImitator
from hf_imitate.rendering import Answer, Rendered, Renderer
from hf_imitate.residual import (
    Resampling,
    check_logits,
    describe_resampling,
    resampled_log_prob,
    resampling_log_factors,
    two_sided_rule,
)
from hf_imitate.retrodictive_bounds import NoCertificateError, log_prob_lower_bound
from hf_imitate.rows import question_key
from hf_imitate.sampling import Draw, GumbelSampler, check_drawing, gumbel_noise, stream_key
from hf_imitate.scoring import score_answers

DEFAULT_NUM_ESTIMATES_RESAMPLED = 8
Columns = Mapping[str, Sequence[Any]]
NO_COLUMNS: Columns = {}


class Choice(NamedTuple):
    """One answer, kept out of K candidates.

    Attributes:
        candidates (`list[Draw]`): all of them, in the order of their numbers.
        logits (`torch.Tensor`): the distinguisher's, of each. [K], fp64.
        perturbed (`torch.Tensor`): logits plus the coin's Gumbel noise; the largest one is kept. [K], fp64.
    """

    candidates: list[Draw]
    logits: Tensor
    perturbed: Tensor

    @property
    def kept(self) -> int:
        """Number of the candidate that is kept; of equals, the first."""
        return int(self.perturbed.argmax())

    @property
    def answer(self) -> Answer:
        """What the kept candidate says."""
        return self.candidates[self.kept].answer


class ResampledLogProb(NamedTuple):
    """Log-probability of each answer under the resampled law, estimated. Nats, [N], fp64, on the CPU.

    Attributes:
        nats: log of the mean of E unbiased estimates of p_K(answer | question).
        lower_bound: what log p_K is at least, for each answer on its own, at the asked confidence (Markov).
        effective_sample_size: of the E estimates, 1 / (sum of their squared shares), from 1 to E.
        log_bias: about how far `nats` lies below log p_K in the mean, at most 0; NaN where E is 1.
        log_weights: log of each estimate. [N, E]. They are what the joint bounds of
            [`~hf_imitate.retrodictive_bounds`] take.
    """

    nats: Tensor
    lower_bound: Tensor
    effective_sample_size: Tensor
    log_bias: Tensor
    log_weights: Tensor


class ResidualImitator:
    """The law of an answer that is kept out of K candidates with probability softmax(distinguisher's logit).

    See [`~hf_imitate.residual`] for the law. Checks see the text of an answer and its question's columns, never ids;
    so the logit is a function of the answer alone, as the law asks. Wherever `columns` are taken, they are the data
    set's other columns, one value per question each, for the checks.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): draws the candidates.
        renderer ([`~hf_imitate.rendering.Renderer`]): turns questions and answers into ids.
        distinguisher ([`~hf_imitate.distinguisher.Distinguisher`]): its logit may not depend on chance.
        resample (`int`): K.
        checks (`Sequence[Callable]`, *optional*): the ones the distinguisher was trained with.
        max_new_tokens (`int`): where a candidate is cut, its end token included; it is scored as cut.
        temperature (`float`, defaults to 1.0): of the law that candidates are drawn from, not of the choice.
        latent ([`~hf_imitate.latent_imitator.LatentImitator`], *optional*): where thoughts come before candidates.

    Raises:
        ValueError: `checks` are not those of the distinguisher, or K is below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        renderer: Renderer,
        distinguisher: Distinguisher,
        *,
        resample: int,
        max_new_tokens: int,
        checks: Sequence[Check] | None = None,
        temperature: float = 1.0,
        latent: LatentImitator | None = None,
    ):
        check_resampling(resample, checks, {}, 0)
        self.model, self.renderer, self.distinguisher, self.latent = model, renderer, distinguisher, latent
        self.checks = checks_in_order(distinguisher, checks)
        self.resample, self.max_new_tokens, self.temperature = resample, max_new_tokens, temperature

    def answer(
        self,
        questions: Sequence[str | list[dict]],
        num_answers: int = 1,
        seed: int = 0,
        first_draw: int = 0,
        batch_size: int = 64,
        progress: bool = False,
        columns: Columns = NO_COLUMNS,
        purpose: str = "answer",
    ) -> list[list[Choice]]:
        """Draw K candidates for each answer and keep one.

        Candidate k of draw n has the random numbers of (seed, purpose, question, n, k), so candidate 0 is what the
        plain imitator answers, and the choice has those of (seed, "<purpose> choice", question, n).

        Args:
            questions: all plain or all messages. N.
            num_answers: to each, each out of candidates of its own.
            seed, first_draw: as of the plain imitator.
            batch_size: most sequences in one forward.
            progress: show progress bars and say what it took.
            columns: for the checks.
            purpose: draws for another purpose are independent of these.
        """
        check_drawing(self.model, self.temperature, first_draw, {"num_answers": num_answers})
        draws = [range(first_draw, first_draw + num_answers)] * len(questions)
        return self.choose(questions, draws, seed, batch_size, progress, columns, purpose)

    def choose(
        self,
        questions: Sequence[str | list[dict]],
        draws: Sequence[Sequence[int]],
        seed: int,
        batch_size: int,
        progress: bool,
        columns: Columns,
        purpose: str = "answer",
        make_sampler: Callable[..., GumbelSampler] = GumbelSampler,
    ) -> list[list[Choice]]:
        """As [`~ResidualImitator.answer`], given the numbers of each question's draws and the candidates' sampler."""
        check_resampling(self.resample, self.checks, columns, len(questions))
        keys = [
            [stream_key(seed, purpose, question, draw, k) for draw in own for k in range(self.resample)]
            for question, own in zip(questions, draws, strict=True)
        ]
        drawn = self._draw(questions, keys, batch_size, progress, make_sampler)
        logits = self._score(questions, [[one.answer for one in own] for own in drawn], batch_size, progress, columns)
        choices = []
        for question, own, candidates, scores in zip(questions, draws, drawn, logits, strict=True):
            coins = [stream_key(seed, f"{purpose} choice", question, draw) for draw in own]
            by_draw = scores.reshape(len(coins), self.resample)
            perturbed = by_draw + gumbel_noise(coins, [0] * len(coins), self.resample)
            firsts = range(0, len(candidates), self.resample)
            parts = [candidates[first : first + self.resample] for first in firsts]
            choices.append(list(map(Choice, parts, by_draw, perturbed)))
        return choices

    def _draw(
        self,
        questions: Sequence[str | list[dict]],
        keys: Sequence[Sequence[bytes]],
        batch_size: int,
        progress: bool,
        make_sampler: Callable[..., GumbelSampler] = GumbelSampler,
    ) -> list[list[Draw]]:
        return draw_candidates(
            *(self.model, self.renderer, self.latent, questions, keys),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=batch_size,
            make_sampler=make_sampler,
            progress=progress,
        )

    def _score(
        self,
        questions: Sequence,
        answers: Sequence[Sequence[Answer]],
        batch_size: int,
        progress: bool,
        columns: Columns,
    ) -> list[Tensor]:
        law = (self.distinguisher, self.renderer, questions, answers, self.checks, columns)
        logits = score_candidates(*law, batch_size=batch_size, progress=progress)
        if logits:
            check_logits(torch.cat(logits))
        return logits

    def resampling(
        self, questions: Sequence[str | list[dict]], seed: int = 0, columns: Columns = NO_COLUMNS, **settings: Any
    ) -> Resampling:
        """How much the distinguisher says about K candidates of each question: those of `answer`'s first draw.

        Args:
            questions: N of them.
            seed, columns, settings: as of [`~ResidualImitator.answer`].

        Returns:
            [`~hf_imitate.residual.Resampling`]: `effective_candidates` (from 1 to K) and `log_normalizer` (the
            estimate of log Z, nats), each [N], fp64. Near K, resampling changes nothing; near 1, it takes more
            candidates to come near p exp(s) / Z.
        """
        drawn = self.answer(questions, seed=seed, columns=columns, **settings)
        logits = [own[0].logits for own in drawn]
        return describe_resampling(torch.stack(logits) if logits else torch.zeros(0, self.resample))

    def log_prob(
        self,
        questions: Sequence[str | list[dict]],
        answers: Sequence[str],
        confidence: float = 0.95,
        seed: int = 0,
        num_estimates: int = DEFAULT_NUM_ESTIMATES_RESAMPLED,
        batch_size: int = 64,
        progress: bool = False,
        columns: Columns = NO_COLUMNS,
    ) -> ResampledLogProb:
        """Estimate log p_K(answer | question) from companions that lose or win against the answer.

        The answer is spelled canonically and scored as the tokenizer's own ids, as a human's always is. Each of E
        estimates has K - 1 companions of its own, so it costs E (K - 1) draws per answer; companions of different rows
        are independent, also where question and answer are the same. Where thoughts come first, p itself is estimated
        from E thoughts, and the e-th estimates are multiplied.

        Args:
            questions: N of them.
            answers: one to each. One longer than `max_new_tokens` is scored whole, though a candidate would be cut.
            confidence: of `lower_bound`, for each answer on its own.
            seed: of the draws.
            num_estimates: E.
            batch_size: most sequences in one forward.
            progress: show progress bars and say what it took.
            columns: for the checks.
        """
        rows = self.renderer.human(questions, answers) if questions else []
        return self.score_rows(questions, rows, confidence, seed, num_estimates, batch_size, progress, columns)

    def score_rows(
        self,
        questions: Sequence[str | list[dict]],
        rows: Sequence[Rendered],
        confidence: float = 0.95,
        seed: int = 0,
        num_estimates: int = DEFAULT_NUM_ESTIMATES_RESAMPLED,
        batch_size: int = 64,
        progress: bool = False,
        columns: Columns = NO_COLUMNS,
    ) -> ResampledLogProb:
        """As [`~ResidualImitator.log_prob`], of answers given as ids: also ones that were cut at `max_new_tokens`.

        Raises:
            NoCertificateError: a cut answer that follows a hidden thought.
        """
        if num_estimates < 1:
            raise ValueError(f"`num_estimates` is {num_estimates}; at least 1 estimate has to be made.")
        log_p = self._log_p(questions, rows, seed, num_estimates, batch_size)
        log_factors = self._log_factors(questions, rows, seed, range(num_estimates), batch_size, progress, columns)
        found = resampled_log_prob(log_p, log_factors)
        log_weights = log_p + log_factors
        lower = torch.as_tensor(log_prob_lower_bound(log_weights.numpy(), confidence), dtype=torch.float64)
        return ResampledLogProb(found.log_prob, lower, *found[1:], log_weights)

    def _log_p(
        self, questions: Sequence, rows: Sequence[Rendered], seed: int, num_estimates: int, batch_size: int
    ) -> Tensor:
        """Log p of the candidates' law: exact, [N, 1], or the logs of unbiased estimates, [N, E]."""
        if self.latent is None:
            pad = self.renderer.tokenizer.pad_token_id or 0
            return score_answers(self.model, rows, pad, batch_size, self.temperature)[:, None]
        if not all(row.ended for row in rows):
            raise NoCertificateError(
                "Of an answer that follows a hidden thought and was cut, not even the plain law has an estimate. "
                "Score answers that ended."
            )
        texts = [self.renderer.read(row.answer_ids).text for row in rows]
        settings: dict[str, Any] = {"temperature": self.temperature, "batch_size": batch_size}
        return self.latent.log_prob(questions, texts, seed=seed, num_estimates=num_estimates, **settings).log_weights

    def _log_factors(
        self,
        questions: Sequence[str | list[dict]],
        rows: Sequence[Rendered],
        seed: int,
        estimates: range,
        batch_size: int,
        progress: bool,
        columns: Columns,
    ) -> Tensor:
        """Log F of each row, from companions of its own for each of these estimates. [N, E], fp64."""
        check_resampling(self.resample, self.checks, columns, len(questions))
        seen: Counter[tuple[str, str]] = Counter()
        keys = []
        for question, row in zip(questions, rows, strict=True):
            pair = (question_key(question), str(row.answer_ids))
            purpose = f"resampled log_prob {seen[pair]} {row.answer_ids}"
            seen[pair] += 1
            companions = [(e, k) for e in estimates for k in range(1, self.resample)]
            keys.append([stream_key(seed, purpose, question, e, k) for e, k in companions])
        drawn = self._draw(questions, keys, batch_size, progress)
        # As if the answer itself had been drawn: read from its ids.
        own = [Answer(self.renderer.read(row.answer_ids).text, row.ended) for row in rows]
        answers = [[answer, *(one.answer for one in others)] for answer, others in zip(own, drawn, strict=True)]
        scored = self._score(questions, answers, batch_size, progress, columns)
        shape = (len(rows), len(estimates), self.resample - 1)
        logits = torch.stack(scored) if scored else torch.zeros(0, 1, dtype=torch.float64)
        companion_logits = logits[:, 1:].reshape(shape)
        return resampling_log_factors(logits[:, :1].expand(shape[:2]), companion_logits)

    def companion_logits(
        self,
        questions: Sequence[str | list[dict]],
        draws: Sequence[int],
        seed: int,
        num_estimates: int,
        batch_size: int = 64,
        columns: Columns = NO_COLUMNS,
        make_sampler: Callable[..., GumbelSampler] = GumbelSampler,
    ) -> Tensor:
        """Logits of E sets of K - 1 fresh candidates for each question, [N, E, K - 1], to hold any answers against.

        Estimates that share companions depend on each other; each of them is unbiased. Equal questions with different
        numbers, one per question in `draws`, get independent companions.
        """
        check_resampling(self.resample, self.checks, columns, len(questions))
        companions = [(e, k) for e in range(num_estimates) for k in range(1, self.resample)]
        keys = [
            [stream_key(seed, f"companions {draw}", question, *companion) for companion in companions]
            for question, draw in zip(questions, draws, strict=True)
        ]
        drawn = self._draw(questions, keys, batch_size, False, make_sampler)
        logits = self._score(questions, [[one.answer for one in own] for own in drawn], batch_size, False, columns)
        return torch.cat(logits).reshape(len(questions), num_estimates, self.resample - 1)

    def log_factors(
        self,
        questions: Sequence[str | list[dict]],
        rows: Sequence[Rendered],
        companion_logits: Tensor,
        batch_size: int = 64,
        columns: Columns = NO_COLUMNS,
    ) -> Tensor:
        """Log F of each of N rows, at least one, against companions drawn beforehand. [N, E], fp64."""
        own = [[Answer(self.renderer.read(row.answer_ids).text, row.ended)] for row in rows]
        logits = torch.stack(self._score(questions, own, batch_size, False, columns))
        return resampling_log_factors(logits.expand(companion_logits.shape[:2]), companion_logits)

    def enclose_log_prob(
        self,
        question: str | list[dict],
        answer: str,
        epsilon: float = 0.2,
        confidence: float = 0.95,
        max_draws: int = 10_000,
        seed: int = 0,
        batch_size: int = 64,
        columns: Columns = NO_COLUMNS,
    ) -> RelativeEstimate:
        """Enclose log p_K of one answer to a factor 1 + epsilon, from both sides, where log p is exact.

        See [`~hf_imitate.residual.two_sided_rule`]; one draw of the rule takes K - 1 answers.

        Raises:
            NoCertificateError: a hidden thought comes first, so p itself is only estimated.
        """
        if self.latent is not None:
            raise NoCertificateError(
                "Where a hidden thought comes before the answer, p itself is an estimate that nothing bounds, so its "
                "product has no two-sided certificate. `log_prob` gives the lower bound."
            )
        rows = self.renderer.human([question], [answer])
        log_p = self._log_p([question], rows, seed, 1, batch_size).item()
        rule = two_sided_rule(log_p, self.resample, epsilon, confidence, max_draws)
        step, first = max(1, 8 * batch_size // self.resample), 0
        while rule.wants_more():
            estimates = range(first, min(first + step, max_draws))
            log_factors = self._log_factors([question], rows, seed, estimates, batch_size, False, columns)
            rule.add((log_p + log_factors[0]).numpy())
            first += step
        return rule.result()
