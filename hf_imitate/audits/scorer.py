"""Draws and scores answers under the audited law, in chunks that are stored one by one."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_imitate.audits.evidence_cache import EvidenceCache
from hf_imitate.audits.resampled_law import ResampledLaw
from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import ProcessedLaw, answer_statistics, draw_processed
from hf_imitate.rendering import Answer, Rendered, Renderer, canonical_text

CHUNK = 128  # rows whose answers and scores are stored together: what a killed audit loses at most


@dataclass(frozen=True)
class AnswerScores:
    """What the imitator's law says of N answers, one end token included in each.

    Attributes:
        nats (`np.ndarray`): log-probability under the audited law; -inf outside a truncated law's support. [N].
        lower_bound (`np.ndarray`): lower bound of each, for itself, where `nats` is an estimate; else `nats`. [N].
        num_tokens (`np.ndarray`): tokens, end token included. [N], int.
        entropy (`np.ndarray`): sum over the answer's positions of the next-token law's entropy, nats. [N].
        variance (`np.ndarray`): sum over positions of the variance of the next token's log-probability. [N].
        log_rank (`np.ndarray`): sum over positions of log(1 + rank of the token, from 0). [N].
        is_cut (`np.ndarray`): whether the answer reached the length limit without an end token. [N], bool.
        log_bias (`np.ndarray`, *optional*): nats, about how far `nats` lies below the truth in the mean, at most 0 and
            NaN where unknown; `None` where `nats` are exact or nothing is known of it. [N].

    Of an answer kept out of several, entropy, variance and rank are those of the law that candidates are drawn from.
    """

    nats: np.ndarray
    lower_bound: np.ndarray
    num_tokens: np.ndarray
    entropy: np.ndarray
    variance: np.ndarray
    log_rank: np.ndarray
    is_cut: np.ndarray
    log_bias: np.ndarray | None = None


class Scorer:
    """Draws and scores answers to some rows.

    Args:
        imitator ([`~hf_imitate.imitator.Imitator`]): who answers.
        law ([`~hf_imitate.processed_law.ProcessedLaw`]): of one draw.
        prompts: questions of the rows. N.
        numbers: of each row's draw among those of its question. [N].
        seed (`int`): of the draws.
        batch_size (`int`): most answers at once.
        cache ([`~hf_imitate.audits.evidence_cache.EvidenceCache`]): keeps answers and scores.
        confidence (`float`, *optional*, defaults to 0.95): of lower bounds, where scores are estimates.
        limit (`int`, *optional*): longest answer; defaults to the imitator's.
        advance (`Callable`, *optional*): told how many rows were drawn or scored.
        resampled ([`~hf_imitate.audits.resampled_law.ResampledLaw`], *optional*): the law, where one of K is kept.
        columns (`Mapping`, *optional*): the data set's other columns, for the checks behind a choice. N values each.

    Raises:
        ValueError: a law of hidden thoughts was to be truncated.
    """

    def __init__(
        self,
        imitator: Imitator,
        law: ProcessedLaw,
        prompts: list,
        numbers: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        cache: EvidenceCache,
        confidence: float = 0.95,
        limit: int | None = None,
        advance: Callable[[int], None] = lambda num_rows: None,
        resampled: ResampledLaw | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ):
        self.imitator, self.law, self.confidence = imitator, law, confidence
        self.prompts, self.numbers, self.resampled, self.columns = prompts, numbers, resampled, dict(columns or {})
        own = imitator.renderer
        self.renderer = Renderer(
            imitator.tokenizer,
            own.end_token_ids,
            limit or imitator.max_new_tokens,
            own.chat_template_kwargs,
            own.completion_role,
        )
        self.seed, self.batch_size, self.cache, self.advance = seed, batch_size, cache, advance
        if imitator.latent is not None and law.is_truncated:
            raise ValueError(
                f"The imitator thinks before it answers; its law cannot be sampled and scored with {law.describe()}. "
                "Audit it with a temperature alone, or with `generation_config=None`."
            )

    def draw(self, purpose: str = "answer") -> list[tuple[str, bool]]:
        """Text as sampled, and whether it ended, for each row."""
        drawn: list[tuple[str, bool]] = []
        for start in range(0, len(self.prompts), CHUNK):
            part = slice(start, start + CHUNK)
            stored = self.cache.json(f"{purpose}-{start:07d}", functools.partial(self._draw, part, purpose))
            drawn += [(text, ended) for text, ended in stored]
            self.advance(len(stored))
        return drawn

    def _draw(self, part: slice, purpose: str) -> list[tuple[str, bool]]:
        prompts, numbers = self.prompts[part], self.numbers[part]
        settings: dict[str, Any] = {"seed": self.seed, "purpose": purpose, "batch_size": self.batch_size}
        if self.resampled is not None:
            kept = self.resampled.draw(prompts, numbers.tolist(), self._of(part), **settings)
            return [(answer.text, answer.ended) for answer in kept]
        settings["max_new_tokens"] = self.renderer.max_answer_tokens
        latent = self.imitator.latent
        if latent is None:
            model, renderer = self.imitator.model, self.imitator.renderer
            draws = draw_processed(model, renderer, self.law, prompts, numbers.tolist(), **settings)
            return [(draw.answer.text, draw.answer.ended) for draw in draws]
        answers: dict[int, Answer] = {}
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            asked = [prompts[row] for row in chosen]
            settings |= {"first_draw": int(number), "temperature": self.law.temperature}
            found = latent.answer(asked, num_answers=1, **settings)
            answers |= {int(row): draws[0].answer for row, draws in zip(chosen, found, strict=True)}
        return [(answers[row].text, answers[row].ended) for row in range(len(prompts))]

    def _of(self, part: slice) -> dict[str, Sequence[Any]]:
        return {name: values[part] for name, values in self.columns.items()}

    def render(self, drawn: list[tuple[str, bool]]) -> list[Rendered]:
        """Ids of answers in the tokenizer's own spelling, cut at the limit, as the humans' are."""
        roles = [self.renderer.role_after(prompt) for prompt in self.prompts if not isinstance(prompt, str)]
        texts, ended = [canonical_text(text) for text, _ in drawn], [is_ended for _, is_ended in drawn]
        answers = self.renderer.answer_ids(texts, ended, bool(roles), roles or None)
        questions = self.renderer.prompt_ids(self.prompts)
        return [answer._replace(prompt_ids=ids) for ids, answer in zip(questions, answers, strict=True)]

    def read(self, rows: list[Rendered]) -> list[Answer]:
        """What the ids of answers spell."""
        return [Answer(self.renderer.read(row.answer_ids).text, row.ended) for row in rows]

    def score(self, side: str, answers: list[Answer], rows: list[Rendered]) -> AnswerScores:
        """What the law says of answers."""
        chunks = []
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            # Estimates of equal rows in two chunks, or on two sides, must not share their draws.
            number = 2 * start + (side == "human")
            compute = functools.partial(self._score, part, answers[part], rows[part], number)
            chunks.append(self.cache.arrays(f"scores-{side}-{start:07d}", compute))
            self.advance(len(rows[part]))
        arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        is_bad = np.isnan(arrays["nats"]) if self.imitator.latent is None else np.isnan(arrays["lower_bound"])
        if is_bad.any():
            raise ValueError(
                f"The log-probability of {int(is_bad.sum())} of {len(rows)} {side} answers is NaN (row "
                f"{str(np.flatnonzero(is_bad)[:5].tolist())[1:-1]}). Load the model in float32, and check that "
                "training did not diverge."
            )
        return AnswerScores(**arrays)

    def _score(self, part: slice, answers: list[Answer], rows: list[Rendered], number: int) -> dict[str, np.ndarray]:
        prompts, seed = self.prompts[part], self.seed * 2**32 + number
        settings: dict[str, Any] = {"seed": seed, "batch_size": self.batch_size}
        if self.resampled is not None:
            companions = self._companions(part)
            return self.resampled.score(
                prompts, rows, companions, self._of(part), confidence=self.confidence, **settings
            )
        pad = self.renderer.tokenizer.pad_token_id or 0
        is_cut = np.array([not row.ended for row in rows])
        if self.imitator.latent is None:
            found = answer_statistics(self.imitator.model, rows, pad, self.law, self.batch_size)
            arrays = {name: values.numpy() for name, values in found._asdict().items()}
            return {**arrays, "lower_bound": arrays["nats"], "is_cut": is_cut}
        texts = [answer.text for answer in answers]
        temperature = self.law.temperature or 1.0
        scored = self.imitator.log_prob(prompts, texts, self.confidence, temperature=temperature, **settings)
        # Only answers that end have an estimate: -inf says "at least 0" of the others.
        nats = np.where(is_cut, -np.inf, scored.nats.numpy())
        unknown = np.full(len(rows), np.nan)
        return {
            "nats": nats,
            "lower_bound": np.where(is_cut, -np.inf, scored.lower_bound.numpy()),
            "num_tokens": np.array([len(row.answer_ids) for row in rows]),
            **dict.fromkeys(("entropy", "variance", "log_rank"), unknown),
            "is_cut": is_cut,
        }

    def _companions(self, part: slice) -> np.ndarray:
        """Logits of the rows' companions, which all answers to these rows are held against."""
        law = self.resampled
        assert law is not None
        settings: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size}
        arguments = (self.prompts[part], self.numbers[part].tolist(), self._of(part))
        compute = functools.partial(law.companions, *arguments, **settings)
        return self.cache.shared_arrays(f"companions-{part.start:07d}", compute)["logits"]
