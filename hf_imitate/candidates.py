"""Several answers to one question, of which one will be kept: drawn by key, scored by the distinguisher."""

import operator
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_imitate.checks import Check, check_names, check_outcomes
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.latent_imitator import THOUGHT_INCLUDED, LatentImitator
from hf_imitate.questions import check_columns
from hf_imitate.rendering import Answer, Rendered, Renderer, canonical_text
from hf_imitate.sampling import Draw, GumbelSampler, check_drawing, draw_by_key
from hf_imitate.scoring import check_positions, check_prompt_ids


def check_resampling(
    resample: int, checks: Sequence[Check] | None, columns: Mapping[str, Sequence[Any]], num_questions: int
) -> None:
    """Raise `ValueError` or `TypeError` unless `resample` is a number of candidates and `columns` belong to checks."""
    try:
        number = operator.index(resample)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"`resample` is {resample}; give the number of candidates of which one answer is kept, such as 8. 1 is "
            "the plain imitator."
        )
    if columns and not checks:
        raise TypeError(
            f"Got the unknown arguments {sorted(columns)}. Columns of the data set are passed on to `checks`, and "
            "none are given; check the spelling if a setting was meant."
        )
    for name, values in columns.items():
        if isinstance(values, str) or not isinstance(values, Sized):
            raise TypeError(f"Column `{name}` is a {type(values).__name__}; give a list, one value per question.")
    check_columns(columns, num_questions, "questions")


def checks_in_order(distinguisher: Distinguisher, checks: Sequence[Check] | None, cure: str = "") -> list[Check]:
    """The checks that a distinguisher was trained with, in its order; `cure` is what else an error may offer.

    Raises:
        ValueError: `checks` are not those.
    """
    by_name = dict(zip(check_names(checks or ()), checks or (), strict=True))
    if set(by_name) != set(distinguisher.check_names):
        raise ValueError(
            f"The distinguisher was trained with the checks {sorted(distinguisher.check_names)}; got "
            f"{sorted(by_name)}. Pass those functions as `checks`{cure}."
        )
    return [by_name[name] for name in distinguisher.check_names]


def logits_of(
    distinguisher: Distinguisher,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[Answer],
    checks: Sequence[Check],
    columns: Mapping[str, Sequence[Any]],
) -> Tensor:
    """The distinguisher's logit of each answer, checks included. They see the text alone, whoever wrote it.

    Args:
        distinguisher ([`~hf_imitate.distinguisher.Distinguisher`]): who scores.
        renderer ([`~hf_imitate.rendering.Renderer`]): knows in which form checks get an answer.
        questions: N of them.
        answers: one to each.
        checks: in the distinguisher's order; none scores the text alone.
        columns: one value per answer each, passed to the checks.

    Returns:
        [N], fp32, on the CPU.
    """
    outcomes = None
    if checks and answers:
        shown = [
            renderer.as_completion(question, canonical_text(answer.text))
            for question, answer in zip(questions, answers, strict=True)
        ]
        outcomes = check_outcomes(checks, questions, shown, None, **columns)
    return distinguisher.score(questions, answers, outcomes).cpu()


def score_candidates(
    distinguisher: Distinguisher,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[Sequence[Answer]],
    checks: Sequence[Check],
    columns: Mapping[str, Sequence[Any]],
    batch_size: int = 64,
    progress: bool = False,
) -> list[Tensor]:
    """Logits of all candidates of each question.

    Equal answers to one question are scored once, so they have equal logits and cost nothing. The candidates of one
    question are in one batch, unless they are more than `batch_size`; which questions share it with them moves a logit
    by rounding only (below 1e-5 in float32, measured).

    Args:
        distinguisher, renderer, checks: as in [`logits_of`].
        questions: N of them.
        answers: the candidates of each question; not necessarily equally many.
        columns: one value per question each.
        batch_size: most texts in one forward.
        progress: show a progress bar and say what it took.

    Returns:
        N tensors, fp64, on the CPU.
    """
    different = [list(dict.fromkeys(own)) for own in answers]
    groups: list[list[int]] = []
    room = 0
    # Alike in length: padding is computed, too.
    for question in sorted(range(len(questions)), key=lambda i: len(str(questions[i]))):
        if len(different[question]) > room or not groups:
            groups.append([])
            room = batch_size
        groups[-1].append(question)
        room -= len(different[question])
    logits: dict[tuple[int, Answer], Tensor] = {}
    start, total = time.perf_counter(), sum(map(len, different))
    with tqdm(total=total, desc="scoring candidates", disable=not progress) as bar:
        for group in groups:
            pairs = [(question, answer) for question in group for answer in different[question]]
            for first in range(0, len(pairs), batch_size):
                part = pairs[first : first + batch_size]
                rows = [question for question, _ in part]
                own = {name: [values[row] for row in rows] for name, values in columns.items()}
                asked, given = [questions[row] for row in rows], [answer for _, answer in part]
                found = logits_of(distinguisher, renderer, asked, given, checks, own).double()
                logits |= zip(part, found, strict=True)
                bar.update(len(part))
    if progress:
        seconds = time.perf_counter() - start
        num_drawn = sum(map(len, answers))
        tqdm.write(f"Scored {total} different candidates of {num_drawn} in {seconds:.1f} s.", file=sys.stderr)
    empty = torch.zeros(0, dtype=torch.float64)
    return [
        torch.stack([logits[question, answer] for answer in own]) if own else empty
        for question, own in enumerate(answers)
    ]


@torch.no_grad()
def draw_candidates(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    latent: LatentImitator | None,
    questions: Sequence[str | list[dict]],
    keys: Sequence[Sequence[bytes]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    make_sampler: Callable[..., GumbelSampler] = GumbelSampler,
    progress: bool = False,
) -> list[list[Draw]]:
    """Draw an answer for each key, from softmax(logits / temperature) as in [`~hf_imitate.sampling.draw_answers`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal LM, of PEFT the active adapter.
        renderer ([`~hf_imitate.rendering.Renderer`]): turns questions into ids, and ids into answers.
        latent ([`~hf_imitate.latent_imitator.LatentImitator`], *optional*): the law, where thoughts come first.
        questions: N of them.
        keys: of the random numbers of each draw, see [`~hf_imitate.sampling.stream_key`]; N lists, of any lengths.
        max_new_tokens: longest answer, its end token included, the thought not counted.
        temperature: of the law drawn from.
        batch_size: most answers at once.
        make_sampler: builds the sampler of each batch.
        progress: show a progress bar and say what it took.

    Returns:
        One [`~hf_imitate.sampling.Draw`] per key; its `ids` are the answer's alone.

    Raises:
        ValueError: a setting is out of range, or a question has no tokens or too many.
    """
    check_drawing(model, temperature, 0, {"max_new_tokens": max_new_tokens, "batch_size": batch_size})
    prompts = renderer.prompt_ids(questions) if questions else []
    check_prompt_ids(prompts)
    start, total = time.perf_counter(), sum(map(len, keys))
    if latent is not None:
        drawn = _draw_thinking(latent, prompts, keys, max_new_tokens, temperature, batch_size, make_sampler)
    else:
        drawn = draw_by_key(
            *(model, renderer, prompts, keys),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            make_sampler=make_sampler,
            own_loop=True,
            progress="drawing candidates" if progress else None,
        )
    if progress:
        seconds, num_tokens = time.perf_counter() - start, sum(len(one.ids) for own in drawn for one in own)
        tqdm.write(f"Drew {total} candidates ({num_tokens} tokens) in {seconds:.1f} s.", file=sys.stderr)
    return drawn


def _draw_thinking(
    latent: LatentImitator,
    prompts: list[list[int]],
    keys: Sequence[Sequence[bytes]],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    make_sampler: Callable[..., GumbelSampler],
) -> list[list[Draw]]:
    thinkers = latent.thinkers
    asked = [Rendered(ids, [], False) for ids in prompts]
    needed = [thinkers.longest_forward(row) + max_new_tokens for row in asked]
    check_positions(needed, thinkers.positions, "questions", f"{THOUGHT_INCLUDED}, lower `max_new_tokens`")
    thinkers.max_rows = batch_size
    drawn = thinkers.dream(asked, keys, max_new_tokens, temperature, make_sampler)
    return [[Draw(one.answer_ids, latent.renderer.read(one.answer_ids)) for one in own] for own in drawn]
