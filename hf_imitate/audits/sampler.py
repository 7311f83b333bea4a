"""Are answers drawn from the law that is scored? By re-execution, and by repeating a question."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import chi2, kstest

from hf_imitate.audits.evidence import Evidence, for_checks
from hf_imitate.audits.report import Finding
from hf_imitate.audits.resampled_law import ResampledLaw
from hf_imitate.imitator import Imitator
from hf_imitate.rendering import Rendered
from hf_imitate.sampling import Draw, draw_answers
from hf_imitate.scoring import answer_logits
from hf_imitate.verification import Verification

# (questions, draws per question, seed, most tokens of a draw) -> draws of each question
DrawFunction = Callable[[list, int, int, int], list[list[Draw]]]

MIN_EXPECTED = 5.0
# Probabilities at once: 128 MiB.
_MAX_NUMBERS = 2**24


class ChiSquare(NamedTuple):
    """How far counted tokens are from their law: Pearson's statistic and its degrees of freedom."""

    statistic: float
    degrees: int


def audit_sampler(
    imitator: Imitator,
    evidence: Evidence,
    confidence: float = 0.95,
    seed: int | None = None,
    *,
    draw: DrawFunction | None = None,
    num_questions: int = 4,
    num_draws: int = 300,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    resampled: ResampledLaw | None = None,
) -> list[Finding]:
    """Verify the evidence's answers by re-execution, and compare fresh draws of a few questions with the stated law.

    What only the sampler knows, no score shows: a sampler that takes its randomness from a message draws exactly from
    the scored law (Cachin). Re-execution from a public seed is the one remedy. Repeating a question finds samplers
    whose randomness repeats, too.

    Args:
        imitator ([`~hf_imitate.imitator.Imitator`]): whose answers they are.
        evidence ([`~hf_imitate.audits.evidence.Evidence`]): the answers, as sampled: draws 0, 1, ... of each question.
        confidence (`float`, *optional*, defaults to `0.95`): 1 minus the level that the conformance test is read at.
        seed (`int`, *optional*): that the answers were drawn with; defaults to the evidence's.
        draw (`Callable`, *optional*): the sampler to be tested for conformance; by default the package's own. Called
            with (questions, draws per question, seed, most tokens), it returns a list of
            [`~hf_imitate.sampling.Draw`] for each question.
        num_questions, num_draws (`int`, *optional*, default to `4` and `300`): questions repeated, and how often.
        max_new_tokens, temperature (*optional*): what the evidence's answers were drawn with; default to the
            imitator's limit and 1.
        resampled ([`~hf_imitate.audits.resampled_law.ResampledLaw`], *optional*): the law, where an answer was kept
            out of several: all candidates are drawn again, and each choice is made again.

    Returns:
        `list[Finding]`: `sampler_match`, the share of decisions that an honest sampler with that seed takes, with the
        bits that could still hide in its detail; and `sampler_conformance`, the p-value of a chi-square test of the
        first tokens and a Kolmogorov-Smirnov test of all, Bonferroni-corrected.
    """
    seed = evidence.seed if seed is None else seed
    return [
        _match(imitator, evidence, seed, max_new_tokens, temperature, resampled),
        _conformance(imitator, evidence, confidence, seed, draw, num_questions, num_draws, temperature),
    ]


# --- by re-execution


def _match(
    imitator: Imitator,
    evidence: Evidence,
    seed: int,
    max_new_tokens: int | None,
    temperature: float,
    resampled: ResampledLaw | None,
) -> Finding:
    name, unit = "sampler_match", "probability"
    if evidence.is_truncated_law:
        reason = "the audited law is truncated or processed; re-execution covers softmax(logits / temperature) alone."
        return Finding(name, None, unit, detail=f"Not measured: {reason}")
    try:
        if resampled is not None:
            found = _again(resampled, evidence, seed)
        else:
            found = imitator.verify(
                *_by_question(evidence), seed=seed, max_new_tokens=max_new_tokens, temperature=temperature
            )
    except (ValueError, RuntimeError) as error:
        return Finding(name, None, unit, detail=f"Not measured: re-execution raised {type(error).__name__}.")
    if not found.num_tokens:
        return Finding(name, None, unit, detail="Not measured: the answers hold no decision to verify.")
    hidden = (
        f"At most {found.capacity_bits:.4g} bits could hide in all {len(evidence.imitator_answers)} answers together "
        "(rounding leaves a choice), besides refusals and delays."
        if found.verified
        else "Nothing bounds what the mismatched decisions may carry."
    )
    counted = (
        ""
        if resampled is None
        else f"Decisions are the tokens of all {resampled.num_candidates} candidates of each answer, and the choice. "
    )
    detail = (
        f"{found.num_mismatched} of {found.num_tokens} decisions are not those of an honest sampler with this seed, "
        f"by re-execution. {counted}{hidden} It proves something if the seed was drawn after the model was frozen and "
        "is no input of it."
    )
    return Finding(name, 1 - found.num_mismatched / found.num_tokens, unit, n=found.num_tokens, detail=detail)


def _by_question(evidence: Evidence) -> tuple[list, list[list[str]]]:
    """Each question once, and its answers in the order of their draws."""
    answers: dict[int, list[str]] = {}
    for question, answer in zip(evidence.question.tolist(), evidence.imitator_answers, strict=True):
        answers.setdefault(question, []).append(answer.text)
    questions = [evidence.prompts[row] for row in evidence.first_of_question]
    return questions, [answers[question] for question in evidence.question[evidence.first_of_question].tolist()]


def _again(resampled: ResampledLaw, evidence: Evidence, seed: int) -> Verification:
    """Row by row: the checks behind a choice may see other columns in each row of one question."""
    numbers = np.zeros(len(evidence.prompts), int) if evidence.draw_number is None else evidence.draw_number
    texts = [answer.text for answer in evidence.imitator_answers]
    columns = for_checks(evidence.columns, evidence.choices)
    return resampled.verify(evidence.prompts, texts, numbers.tolist(), columns, seed)


# --- by repetition


def _conformance(
    imitator: Imitator,
    evidence: Evidence,
    confidence: float,
    seed: int,
    draw: DrawFunction | None,
    num_questions: int,
    num_draws: int,
    temperature: float,
) -> Finding:
    name, unit = "sampler_conformance", "probability"
    if not evidence.is_exact:
        reason = "the law of a next token is not known exactly (hidden thoughts, or resampling)."
        return Finding(name, None, unit, detail=f"Not measured: {reason}")
    if evidence.is_truncated_law and draw is None:
        reason = "the audited law is truncated or processed, and no sampler of it was given."
        return Finding(name, None, unit, detail=f"Not measured: {reason}")
    rng = np.random.default_rng(seed % 2**64)
    firsts = evidence.first_of_question
    chosen = rng.choice(firsts, min(num_questions, len(firsts)), replace=False)
    questions = [evidence.prompts[row] for row in chosen]
    # A few tokens tell the law; whole answers would cost many times as much.
    most = 4 if imitator.max_new_tokens is None else min(4, imitator.max_new_tokens)
    draw = draw or _own_sampler(imitator, temperature)
    try:
        draws = draw(questions, num_draws, seed, most)
        tests = [
            _compare(imitator, question, of_question, temperature, rng)
            for question, of_question in zip(questions, draws, strict=True)
        ]
    except (ValueError, RuntimeError) as error:
        return Finding(name, None, unit, detail=f"Not measured: drawing or scoring raised {type(error).__name__}.")
    first = [test for test, _ in tests]
    ranks = np.concatenate([rank for _, rank in tests])
    if not len(ranks):
        return Finding(name, None, unit, detail="Not measured: the draws hold no token.")
    degrees = sum(test.degrees for test in first)
    p_first = float(chi2.sf(sum(test.statistic for test in first), degrees)) if degrees else 1.0
    p_rank = float(kstest(ranks, "uniform").pvalue)
    if not degrees:
        told = "the first token is nearly certain, so it tells nothing"
    else:
        told = f"chi-square of the first token p = {p_first:.3g} ({degrees} degrees of freedom)"
    verdict = "It does not conform" if 2 * min(p_first, p_rank) < 1 - confidence else "No deviation was seen"
    detail = (
        f"{verdict} at level {1 - confidence:.2g}: {len(questions)} questions, {num_draws} draws each; {told}; "
        f"Kolmogorov-Smirnov test of the randomised ranks of {len(ranks)} tokens p = {p_rank:.3g}; the smaller one "
        "doubled. A sampler whose randomness never repeats passes whatever it hides."
    )
    return Finding(name, min(1.0, 2 * min(p_first, p_rank)), unit, n=len(questions) * num_draws, detail=detail)


def _own_sampler(imitator: Imitator, temperature: float) -> DrawFunction:
    def draw(questions: list, num_draws: int, seed: int, max_new_tokens: int) -> list[list[Draw]]:
        settings: dict[str, Any] = {"purpose": "conformance", "temperature": temperature}
        return draw_answers(
            *(imitator.model, imitator.renderer, questions),
            num_answers=num_draws,
            seed=seed,
            max_new_tokens=max_new_tokens,
            **settings,
        )

    return draw


@torch.no_grad()
def _compare(
    imitator: Imitator, question: Any, draws: Sequence[Draw], temperature: float, rng: np.random.Generator
) -> tuple[ChiSquare, np.ndarray]:
    """First tokens against their law, and every token's randomised rank in the law of its place."""
    prompt = imitator.renderer.prompt_ids([question])[0]
    rows = [Rendered(prompt, item.ids, item.answer.ended) for item in draws]
    ranks = []
    chi_square = ChiSquare(0.0, 0)
    firsts = np.array([item.ids[0] for item in draws if item.ids], dtype=int)
    for batch in answer_logits(imitator.model, rows, imitator.tokenizer.pad_token_id or 0):
        step = max(1, _MAX_NUMBERS // batch.logits.shape[1])
        for position, token, logits in zip(
            *(part.split(step) for part in (batch.position, batch.token, batch.logits)), strict=True
        ):
            laws = torch.softmax(logits.cpu().double() / temperature, dim=1).numpy()
            ranks.append(randomised_ranks(laws, token.numpy(), rng))
            # One law, whatever the draw; rounding aside, every forward gives the same.
            of_first = laws[position.numpy() == 0]
            if len(of_first) and not chi_square.degrees:
                chi_square = first_token_chi_square(np.bincount(firsts, minlength=laws.shape[1]), of_first[0])
    return chi_square, np.concatenate(ranks) if ranks else np.zeros(0)


def first_token_chi_square(counts: np.ndarray, law: np.ndarray) -> ChiSquare:
    """Pearson's chi-square of counted tokens; those expected fewer than 5 times share a cell, chosen by the law alone.

    Args:
        counts: how often each token was drawn. [V].
        law: its probability. [V].

    Returns:
        [`ChiSquare`]; 0 degrees of freedom where the law leaves one cell only.

    Raises:
        ValueError: the shapes differ.
    """
    if counts.shape != law.shape or counts.ndim != 1:
        raise ValueError(f"Need one count and one probability per token, [V]; got {counts.shape} and {law.shape}.")
    num_draws = int(counts.sum())
    expected = num_draws * law / law.sum()
    order = np.argsort(-expected, kind="stable")
    num_kept = int((expected >= MIN_EXPECTED).sum())
    # The shared cell must reach 5 as well: it takes the smallest of the others with it until it does.
    while 0 < num_kept < len(order) and expected[order[num_kept:]].sum() < MIN_EXPECTED:
        num_kept -= 1
    starts = np.arange(min(num_kept + 1, len(order)))
    cells, seen = np.add.reduceat(expected[order], starts), np.add.reduceat(counts[order], starts)
    if len(cells) < 2:
        return ChiSquare(0.0, 0)
    return ChiSquare(float((np.square(seen - cells) / cells).sum()), len(cells) - 1)


def randomised_ranks(laws: np.ndarray, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each token's place in its law, likelier tokens first, made continuous by a coin: uniform if drawn from the law.

        rank = sum of the probabilities of likelier tokens + coin * own probability

    A sampler that prefers likely tokens, as one of lower temperature does, has low ranks.

    Args:
        laws: of the place of each token. [M, V].
        tokens: [M].
        rng: of the coins.

    Returns:
        [M], in [0, 1].
    """
    own = np.take_along_axis(laws, tokens[:, None], axis=1)
    is_earlier = np.arange(laws.shape[1])[None, :] < tokens[:, None]
    before = np.where((laws > own) | ((laws == own) & is_earlier), laws, 0.0).sum(axis=1)
    return np.clip(before + rng.random(len(tokens)) * own[:, 0], 0.0, 1.0)
