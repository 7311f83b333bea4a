"""The audited law where K answers are drawn and one is kept by the distinguisher: drawn from, and scored."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_imitate.checks import Check, check_name
from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import ProcessedLaw, ProcessedSampler, answer_statistics
from hf_imitate.rendering import Answer, Rendered
from hf_imitate.residual import resampled_log_prob
from hf_imitate.residual_imitator import DEFAULT_NUM_ESTIMATES_RESAMPLED
from hf_imitate.residual_verification import verify_resampled
from hf_imitate.retrodictive_bounds import log_prob_lower_bound
from hf_imitate.sampling import GumbelSampler
from hf_imitate.verification import Verification

Columns = Mapping[str, Sequence[Any]]


class ResampledLaw:
    """Draw K candidates, keep one with probability softmax(distinguisher's logits); see [`~hf_imitate.residual`].

    Of the given checks, those that the distinguisher was trained with enter the choice, with the columns of each row.
    An answer's probability has no closed form. Each row gets E sets of K - 1 companions, and its human answer, its
    imitator's answer and its foil are all held against these: E (K - 1) draws instead of three times as many.
    Companions of different rows are independent, and of all answers.

    Args:
        imitator ([`~hf_imitate.imitator.Imitator`]): whose candidates and whose distinguisher.
        law ([`~hf_imitate.processed_law.ProcessedLaw`]): of each candidate.
        resample (`int`): K, at least 2.
        checks (`Sequence[Callable]`, *optional*): the audit's.
        num_estimates (`int`, *optional*, defaults to 8): E.

    Attributes:
        residual ([`~hf_imitate.residual_imitator.ResidualImitator`]): the law at a temperature; it chooses.

    Raises:
        FileNotFoundError: the imitator came without a distinguisher.
        ValueError: the distinguisher was trained with checks that are not given, or E is below 1.
    """

    def __init__(
        self,
        imitator: Imitator,
        law: ProcessedLaw,
        resample: int,
        checks: Sequence[Check] | None = None,
        num_estimates: int = DEFAULT_NUM_ESTIMATES_RESAMPLED,
    ):
        if num_estimates < 1:
            raise ValueError(f"`num_estimates` is {num_estimates}; at least 1 estimate has to be made.")
        known = imitator.distinguisher.check_names
        chosen = [check for check in checks or () if check_name(check) in known]
        self.residual = imitator.residual(resample, chosen, temperature=law.temperature or 1.0)
        self.imitator, self.law, self.num_estimates = imitator, law, num_estimates

    @property
    def num_candidates(self) -> int:
        """K."""
        return self.residual.resample

    def describe_cost(self, num_rows: int) -> str:
        """How many candidates stand behind an audit of so many rows, in words that follow others."""
        k, e = self.num_candidates, self.num_estimates
        return (
            f" Behind each of {num_rows} rows stand {k + e * (k - 1)} candidates: {k} of which its answer was kept, "
            f"and {e} sets of {k - 1} that its scores rest on. Re-execution draws the {k} again."
        )

    def draw(
        self, prompts: list, numbers: Sequence[int], columns: Columns, *, seed: int, purpose: str, batch_size: int
    ) -> list[Answer]:
        """One kept answer per row; `numbers` are those of its question's draws."""
        choices = self.residual.choose(
            *(prompts, [[number] for number in numbers], seed, batch_size, False, self._for_checks(columns), purpose),
            make_sampler=self._sampler,
        )
        return [own[0].answer for own in choices]

    def companions(
        self, prompts: list, numbers: Sequence[int], columns: Columns, *, seed: int, batch_size: int
    ) -> dict[str, np.ndarray]:
        """Logits of each row's companions, for [`~ResampledLaw.score`]. [N, E, K - 1], by the name "logits"."""
        logits = self.residual.companion_logits(
            *(prompts, numbers, seed, self.num_estimates, batch_size, self._for_checks(columns)),
            make_sampler=self._sampler,
        )
        return {"logits": logits.numpy()}

    def score(
        self,
        prompts: list,
        rows: list[Rendered],
        companions: np.ndarray,
        columns: Columns,
        *,
        seed: int,
        confidence: float,
        batch_size: int,
    ) -> dict[str, np.ndarray]:
        """What [`~hf_imitate.audits.scorer.AnswerScores`] holds of answers given as ids.

        Entropy, variance and rank are those of the candidates' law at the answer's tokens, where it is known.
        """
        log_p, statistics = self._log_p(prompts, rows, seed, batch_size)
        factors = self.residual.log_factors(
            *(prompts, rows, torch.from_numpy(companions), batch_size), self._for_checks(columns)
        )
        found = resampled_log_prob(log_p, factors)
        return {
            **statistics,
            "nats": found.log_prob.numpy(),
            "lower_bound": log_prob_lower_bound((log_p + factors).numpy(), confidence),
            "log_bias": found.log_bias.numpy(),
            "num_tokens": np.array([len(row.answer_ids) for row in rows]),
            "is_cut": np.array([not row.ended for row in rows]),
        }

    def verify(
        self, prompts: list, texts: list[str], numbers: Sequence[int], columns: Columns, seed: int
    ) -> Verification:
        """Draw all candidates again and make every choice again; for laws that a temperature alone describes."""
        return verify_resampled(
            self.residual,
            prompts,
            [[text] for text in texts],
            seed=seed,
            columns=self._for_checks(columns),
            draws=[[int(number)] for number in numbers],
        )

    def _log_p(
        self, prompts: list, rows: list[Rendered], seed: int, batch_size: int
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        """Log p of the candidates' law: exact, [N, 1], or the logs of unbiased estimates, [N, E]; and statistics."""
        latent = self.imitator.latent
        names = ("entropy", "variance", "log_rank")
        if latent is None:
            pad = self.imitator.tokenizer.pad_token_id or 0
            found = answer_statistics(self.imitator.model, rows, pad, self.law, batch_size)
            return found.nats[:, None], {name: getattr(found, name).numpy() for name in names}
        # Of an answer that was cut after a hidden thought there is no estimate: -inf says "at least 0".
        log_p = torch.full((len(rows), self.num_estimates), -torch.inf, dtype=torch.float64)
        ended = [number for number, row in enumerate(rows) if row.ended]
        log_p[ended] = latent.log_prob(
            [prompts[number] for number in ended],
            [self.residual.renderer.read(rows[number].answer_ids).text for number in ended],
            seed=seed,
            num_estimates=self.num_estimates,
            temperature=self.residual.temperature,
            batch_size=batch_size,
        ).log_weights
        return log_p, dict.fromkeys(names, np.full(len(rows), np.nan))

    def _for_checks(self, columns: Columns) -> Columns:
        return columns if self.residual.checks else {}

    def _sampler(
        self, keys: Sequence[bytes], prompt_length: int, temperature: float, end_token_ids: Sequence[int]
    ) -> GumbelSampler:
        if not self.law.is_truncated:
            return GumbelSampler(keys, prompt_length, temperature, end_token_ids)
        return ProcessedSampler(self.law, keys, prompt_length, end_token_ids)


def resampled_law(
    imitator: Imitator, law: ProcessedLaw, resample: int, checks: Sequence[Check] | None, num_estimates: int
) -> ResampledLaw | None:
    """The law that `resample=K` speaks of; `None` where K is 1, the plain imitator, which asks no distinguisher."""
    return None if resample == 1 else ResampledLaw(imitator, law, resample, checks, num_estimates)
