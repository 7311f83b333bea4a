"""Draw answers that say something to whoever holds the key: one function, whatever the scheme."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_imitate.keyed_laws import KeyedLaw, KeyedProcessor, check_messages
from hf_imitate.rendering import Renderer
from hf_imitate.sampling import (
    Draw,
    GumbelSampler,
    check_drawing,
    generate_with,
    generation_mode,
    stream_key,
)
from hf_imitate.scoring import check_prompt_ids
from hf_imitate.steganographic_samplers import ArithmeticCoding, CodingSampler, RejectionHash

Scheme = KeyedLaw | RejectionHash | ArithmeticCoding


class _Drawing(NamedTuple):
    """What is drawn, with what."""

    model: Any
    renderer: Renderer
    questions: list
    messages: list[int]
    seed: int
    max_new_tokens: int
    purpose: str
    draws: list[int]
    batch_size: int

    def keys(self, rows: Sequence[int]) -> list[bytes]:
        """The streams of honest noise of some rows."""
        return [stream_key(self.seed, self.purpose, self.questions[i], self.draws[i]) for i in rows]


def draw_keyed_answers(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    scheme: Scheme,
    messages: Sequence[int],
    *,
    seed: int,
    max_new_tokens: int,
    purpose: str = "answer",
    draws: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[Draw]:
    """Draw one answer to each question that says its message; temperature 1, untruncated.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal LM.
        renderer ([`~hf_imitate.rendering.Renderer`]): turns questions into ids, and ids into answers.
        questions (`Sequence[str | list[dict]]`): N of them, best all different: a keyed law repeats itself where a
            prefix does.
        scheme: what hides the message.
        messages (`Sequence[int]`): one per question, below `scheme.num_messages`.
        draws (`Sequence[int]`, *optional*): number of each answer among those to its question, 0 by default: equal
            questions need different numbers, or they get equal answers. It is the nonce of a fresh-nonce code.
        seed, max_new_tokens, purpose, batch_size: as in [`~hf_imitate.sampling.draw_answers`].

    Returns:
        `list[Draw]`: N draws.

    Raises:
        ValueError: a setting is out of range, or messages and questions do not belong together.
    """
    check_messages(messages, len(questions), scheme.num_messages)
    numbers = draw_numbers(draws, len(questions))
    check_drawing(model, 1.0, min(numbers, default=0), {"max_new_tokens": max_new_tokens, "batch_size": batch_size})
    if not questions:
        return []
    asked = list(questions), list(messages), seed, max_new_tokens, purpose, numbers, batch_size
    return _draw(scheme, _Drawing(model, renderer, *asked))


def draw_numbers(draws: Sequence[int] | None, num_rows: int) -> list[int]:
    """One draw number per answer; raises `ValueError` if there are not as many."""
    numbers = [0] * num_rows if draws is None else list(draws)
    if len(numbers) != num_rows:
        raise ValueError(f"There are {len(numbers)} draw numbers for {num_rows} answers; give one each, or none.")
    return numbers


@functools.singledispatch
def _draw(scheme: Any, drawing: _Drawing) -> list[Draw]:
    def sampler(rows: list[int], prompts: list[list[int]]) -> GumbelSampler:
        processor = KeyedProcessor(scheme, prompts, [drawing.messages[i] for i in rows])
        return _KeyedSampler(processor, drawing.keys(rows), drawing.renderer.end_token_ids)

    return _generated(drawing, range(len(drawing.questions)), sampler)


@_draw.register
def _(scheme: ArithmeticCoding, drawing: _Drawing) -> list[Draw]:
    def sampler(rows: list[int], prompts: list[list[int]]) -> GumbelSampler:
        coins = []
        for i in rows:
            number = drawing.seed, drawing.purpose, drawing.questions[i], drawing.draws[i]
            coins.append(scheme.coins(scheme.pad(*number, drawing.max_new_tokens), drawing.messages[i]))
        return CodingSampler(coins, max(map(len, prompts)), drawing.renderer.end_token_ids)

    return _generated(drawing, range(len(drawing.questions)), sampler)


@_draw.register
def _(scheme: RejectionHash, drawing: _Drawing) -> list[Draw]:
    seed, purpose, questions = drawing.seed, drawing.purpose, drawing.questions
    kept: dict[int, Draw] = {}
    waiting = list(range(len(questions)))
    for attempt in range(scheme.max_draws):
        again = drawing._replace(purpose=purpose if attempt == 0 else f"{purpose}, redraw {attempt}")

        def sampler(rows: list[int], prompts: list[list[int]], again: _Drawing = again) -> GumbelSampler:
            return GumbelSampler(again.keys(rows), max(map(len, prompts)), 1.0, again.renderer.end_token_ids)

        kept |= zip(waiting, _generated(again, waiting, sampler), strict=True)
        waiting = [
            i
            for i in waiting
            if scheme.read(questions[i], kept[i].answer) != drawing.messages[i]
            and not scheme.is_honest(seed, purpose, questions[i], drawing.draws[i])
        ]
        if not waiting:
            break
    return [kept[i] for i in range(len(questions))]


class _KeyedSampler(GumbelSampler):
    """Draws from the law that a processor leaves."""

    def __init__(self, processor: KeyedProcessor, keys: Sequence[bytes], end_token_ids: Sequence[int]):
        super().__init__(keys, processor.prompt_length, 1.0, end_token_ids)
        self.processor = processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, self.processor(input_ids, scores))


def _generated(drawing: _Drawing, rows: Sequence[int], sampler: Any) -> list[Draw]:
    """Draws of some rows, by the sampler that `sampler(rows of a batch, their prompts)` builds."""
    prompts = dict(zip(rows, drawing.renderer.prompt_ids([drawing.questions[i] for i in rows]), strict=True))
    check_prompt_ids(list(prompts.values()))
    order = sorted(prompts, key=lambda i: len(prompts[i]), reverse=True)
    drawn: dict[int, Draw] = {}
    with generation_mode(drawing.model), torch.no_grad():
        for start in range(0, len(order), drawing.batch_size):
            chunk = order[start : start + drawing.batch_size]
            batch = [prompts[i] for i in chunk]
            made = sampler(chunk, batch)
            ids = generate_with(made, drawing.model, drawing.renderer, batch, drawing.max_new_tokens)
            drawn |= {i: Draw(tokens, drawing.renderer.read(tokens)) for i, tokens in zip(chunk, ids, strict=True)}
    return [drawn[i] for i in rows]
