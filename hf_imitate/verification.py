"""Check by re-execution that answers are what the law and the random numbers give, and bound what could still hide."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_imitate.questions import check_answer_lists
from hf_imitate.rendering import Rendered, Renderer
from hf_imitate.sampling import (
    GumbelSampler,
    check_drawing,
    check_is_law,
    generate_with,
    generation_mode,
    gumbel_noise,
    in_fp64,
    stream_key,
)
from hf_imitate.scoring import answer_logits

# Nats by which two logits may be off against each other through rounding (measured on small models).
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3}
TOLERANCE_IN_LOW_PRECISION = 0.25
# Numbers of noise at once: 128 MiB.
_MAX_NOISE = 2**24


class Verification(NamedTuple):
    """What re-execution found.

    Attributes:
        num_tokens (`int`): decisions that were checked: the answers' tokens, and where each ended by itself.
        num_mismatched (`int`): decisions that no honest sampler would have taken.
        capacity_bits (`float`): most bits that all the answers together could still carry for a sampler that passes:
            the sum over decisions of log2(number of tokens within the tolerance of the winner). Whoever chooses among
            refusing, delaying or leaving out answers has further channels, and where a decision is mismatched, this
            bounds nothing.
        verified (`bool`): whether no decision is mismatched.
    """

    num_tokens: int
    num_mismatched: int
    capacity_bits: float
    verified: bool


class _Claim(NamedTuple):
    """An answer somebody says was drawn."""

    prompt_ids: list[int]
    key: bytes
    text: str


class _Count(NamedTuple):
    """As [`Verification`], of one answer."""

    num_tokens: int
    num_mismatched: int
    capacity_bits: float


@torch.no_grad()
def verify_answers(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[Sequence[str]],
    *,
    seed: int,
    max_new_tokens: int,
    purpose: str = "answer",
    first_draw: int = 0,
    temperature: float = 1.0,
    tolerance: float | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Verification:
    """Check that answers are those which [`~hf_imitate.sampling.draw_answers`] draws under these settings.

    The random numbers belong to the seed, so an honest sampler has no choice left. One forward per answer suffices: at
    each place, the token there must be the one that logit / temperature + Gumbel noise makes the winner, given the
    answer's own beginning; so must the end be, where it ended. Rounding differs between batches and machines, so a
    token that loses by less than the tolerance counts as the winner, and `capacity_bits` says how much that leaves to
    a dishonest sampler.

    It proves something if the seed was drawn after the model and every processor of its scores were frozen and is no
    input of the model: a model that knows the seed in training can be trained to say something by it.

    An answer is text. It is read in the tokenizer's own ids; where these do not match, it is drawn once more and the
    texts are compared (among tokens within the tolerance, that draw prefers one which keeps to the text). So an answer
    whose sampled ids are not the tokenizer's own, or that was cut within a character, is no mismatch. What is counted
    as mismatched are the tokenizer's ids. Nothing is searched: where two tokens within the tolerance both keep to the
    text for a while, the wrong one may be followed and an honest answer flagged (in float32 next to never; in bfloat16
    0 of 200 answers of a small trained model, 3 of 600 where every draw can be spelled in several ways).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal LM; of a PEFT model, the active adapter counts. It runs in evaluation mode, which is restored.
        renderer ([`~hf_imitate.rendering.Renderer`]):
            Turns questions into ids, and ids into answers.
        questions (`Sequence[str | list[dict]]`):
            Questions. N of them.
        answers (`Sequence[Sequence[str]]`):
            For each question its answers, as sampled, in the order of their draws.
        seed, max_new_tokens, purpose, first_draw, temperature:
            What they were drawn with.
        tolerance (`float`, *optional*):
            Nats by which two logits may be off against each other through rounding. Defaults to 1e-3 in float32 and to
            0.25 in lower precision.
        batch_size (`int`, defaults to 64):
            Most answers in one forward.
        progress (`bool`, defaults to `False`):
            Show a progress bar.

    Returns:
        [`Verification`]: of all answers together.

    Raises:
        TypeError, ValueError: a setting is out of range, there is not one list of answers per question, a question has
            no tokens, or the model's logits are no law.

    Source:
        Karvonen et al., "DiFR: inference verification despite nondeterminism", for the margin;
        https://huggingface.co/papers/2511.20621. Rinberg et al., for the capacity;
        https://huggingface.co/papers/2511.02620
    """
    check_drawing(model, temperature, first_draw, {"max_new_tokens": max_new_tokens, "batch_size": batch_size})
    tolerance = settle_tolerance(model, tolerance)
    check_answer_lists(questions, answers)
    prompts = renderer.prompt_ids(questions) if questions else []
    claims = [
        _Claim(ids, stream_key(seed, purpose, question, first_draw + draw), text)
        for question, ids, texts in zip(questions, prompts, answers, strict=True)
        for draw, text in enumerate(texts)
    ]
    law = {"temperature": temperature, "tolerance": tolerance}
    with tqdm(total=len(claims), desc="verifying", disable=not progress) as bar:
        counts = _count_mismatches(model, renderer, claims, max_new_tokens, batch_size, bar, **law)
        doubtful = [number for number, count in enumerate(counts) if count.num_mismatched]
        with generation_mode(model):
            for start in range(0, len(doubtful), batch_size):
                chunk = doubtful[start : start + batch_size]
                redrawn = _draw_again(model, renderer, [claims[number] for number in chunk], max_new_tokens, **law)
                for number, count in zip(chunk, redrawn, strict=True):
                    counts[number] = count or counts[number]
    num_mismatched = sum(count.num_mismatched for count in counts)
    return Verification(
        num_tokens=sum(count.num_tokens for count in counts),
        num_mismatched=num_mismatched,
        capacity_bits=math.fsum(count.capacity_bits for count in counts),
        verified=num_mismatched == 0,
    )


def settle_tolerance(model: Any, tolerance: float | None) -> float:
    """The tolerance asked for, or the one that suits the model's precision; `ValueError` where it is none."""
    if tolerance is None:
        tolerance = TOLERANCES.get(next(model.parameters()).dtype, TOLERANCE_IN_LOW_PRECISION)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` is {tolerance}; it must be at least 0 and finite, such as 1e-3.")
    return tolerance


def _count_mismatches(
    model: Any,
    renderer: Renderer,
    claims: list[_Claim],
    max_new_tokens: int,
    batch_size: int,
    bar: tqdm,
    temperature: float,
    tolerance: float,
) -> list[_Count]:
    """Compare the tokenizer's ids of each answer with the winners, in one forward."""
    ends = renderer.end_token_ids
    texts = [claim.text for claim in claims]
    contents = [row.answer_ids for row in renderer.answer_ids(texts, [False] * len(texts))]
    rows = []
    for claim, ids in zip(claims, contents, strict=True):
        ended = len(ids) < max_new_tokens
        rows.append(Rendered(claim.prompt_ids, [*ids, ends[0]] if ended else ids[:max_new_tokens], ended))
    mismatched, bits = torch.zeros(2, len(rows), dtype=torch.float64)
    for batch in answer_logits(model, rows, renderer.tokenizer.pad_token_id or 0, batch_size):
        step = max(1, _MAX_NOISE // batch.logits.shape[1])
        for row, position, token, logits in zip(
            *(part.split(step) for part in (batch.row, batch.position, batch.token, batch.logits)), strict=True
        ):
            noise = gumbel_noise([claims[i].key for i in row.tolist()], position.tolist(), logits.shape[1])
            logits = in_fp64(logits)
            perturbed = logits / temperature + noise.to(logits.device)
            near, num_near = _near_winners(perturbed, tolerance / temperature)
            is_end = torch.isin(token, torch.tensor(ends))
            token = token.to(near.device)[:, None]
            is_near = torch.where(is_end, near[:, ends].any(dim=1).cpu(), near.gather(1, token).squeeze(1).cpu())
            mismatched.index_add_(0, row, (~is_near).double())
            bits.index_add_(0, row, num_near.log2())
        bar.update(len(batch.indices))
    counts = []
    for number, (claim, ids) in enumerate(zip(claims, contents, strict=True)):
        # Ids that spell another text, or more of them than could be drawn, are not how this answer came about.
        is_other = renderer.read(ids).text != claim.text or len(ids) > max_new_tokens
        num_mismatched = max(int(mismatched[number]), int(is_other))
        counts.append(_Count(len(rows[number].answer_ids), num_mismatched, bits[number].item()))
    return counts


def _near_winners(perturbed: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Which tokens are within `margin` of the winner, [N, V], and how many, [N], fp64, on the CPU."""
    winner = perturbed.max(dim=1, keepdim=True).values
    check_is_law(winner)
    near = perturbed >= winner - margin
    return near, near.sum(dim=1).cpu().double()


def _draw_again(
    model: Any, renderer: Renderer, claims: list[_Claim], max_new_tokens: int, temperature: float, tolerance: float
) -> list[_Count | None]:
    """Draw the answers; `None` where another text comes out."""
    prompts = [claim.prompt_ids for claim in claims]
    sampler = _FollowingSampler(claims, renderer, max(map(len, prompts)), temperature, tolerance)
    drawn = generate_with(sampler, model, renderer, prompts, max_new_tokens, own_loop=True)
    return [
        _Count(len(ids), 0, sampler.bits[row]) if renderer.read(ids).text == claim.text else None
        for row, (ids, claim) in enumerate(zip(drawn, claims, strict=True))
    ]


class CountingSampler(GumbelSampler):
    """Draws as [`GumbelSampler`], and counts what rounding leaves open.

    Args:
        keys, prompt_length, temperature, end_token_ids: as of [`GumbelSampler`].
        tolerance (`float`): nats by which two logits may be off against each other.

    Attributes:
        bits (`list[float]`): of each row, the sum over its steps of log2(tokens within the tolerance of the winner).
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        prompt_length: int,
        temperature: float = 1.0,
        end_token_ids: Sequence[int] = (),
        tolerance: float = 0.0,
    ):
        super().__init__(keys, prompt_length, temperature, end_token_ids)
        self.margin = tolerance / temperature
        self.bits = [0.0] * len(self.keys)

    def pick(self, perturbed: Tensor, drawn_ids: Tensor) -> Tensor:
        picked = super().pick(perturbed, drawn_ids)
        near, num_near = _near_winners(perturbed, self.margin)
        for number, row in enumerate(self.open_rows):
            self.bits[row] += math.log2(num_near[number])
            if num_near[number] > 1:
                ids = near[number].nonzero().flatten()
                best_first = ids[perturbed[number, ids].argsort(descending=True)].tolist()
                picked[number] = self.choose(row, best_first, drawn_ids[number].tolist())
        return picked

    def choose(self, row: int, best_first: list[int], drawn_ids: list[int]) -> int:
        """Of tokens within the tolerance, the one to draw after those that `row` has drawn."""
        return best_first[0]


class _FollowingSampler(CountingSampler):
    """Among tokens within the tolerance of the winner, draws the best one that keeps to a given text, if any does."""

    def __init__(
        self, claims: list[_Claim], renderer: Renderer, prompt_length: int, temperature: float, tolerance: float
    ):
        keys = [claim.key for claim in claims]
        super().__init__(keys, prompt_length, temperature, renderer.end_token_ids, tolerance)
        self.texts, self.read = [claim.text for claim in claims], renderer.read

    def choose(self, row: int, best_first: list[int], drawn_ids: list[int]) -> int:
        fitting = (token for token in best_first if self._keeps_to_text(row, [*drawn_ids, token]))
        return next(fitting, best_first[0])

    def _keeps_to_text(self, row: int, ids: list[int]) -> bool:
        text, ended = self.read(ids)
        # A character that is not whole yet reads as U+FFFD.
        return self.texts[row] == text if ended else self.texts[row].startswith(text.rstrip("\ufffd"))
