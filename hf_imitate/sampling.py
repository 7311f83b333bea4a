"""Draw answers whose randomness belongs to the question and the draw, not to the batch they are computed in."""

import contextlib
import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_imitate.rendering import Answer, Renderer
from hf_imitate.rows import question_key
from hf_imitate.scoring import check_prompt_ids, check_temperature, evaluation_mode


class Draw(NamedTuple):
    """One sampled answer.

    Attributes:
        ids (`list[int]`): the sampled token ids, the end token included if the answer ended by itself.
        answer ([`~hf_imitate.rendering.Answer`]): what they spell.
    """

    ids: list[int]
    answer: Answer


def stream_key(seed: int, purpose: str, question: str | list[dict], draw: int, candidate: int = 0) -> bytes:
    """Key of the random numbers of one draw: 32 bytes.

        BLAKE2b-256( canonical JSON of [seed, purpose, question, draw, candidate], person = "hf-imitate draw" )

    The question enters by its text ([`~hf_imitate.rows.question_key`]), so equal questions have equal draws.

    Args:
        seed: any integer.
        purpose: what the draw is for; draws for different purposes are independent.
        question: plain text or messages.
        draw: number of the draw, from 0.
        candidate: number among the answers of which a draw keeps one, from 0.
    """
    numbers = [operator.index(number) for number in (seed, draw, candidate)]
    parts = [numbers[0], purpose, question_key(question), *numbers[1:]]
    text = json.dumps(parts, separators=(",", ":")).encode("ascii")
    return hashlib.blake2b(text, digest_size=32, person=b"hf-imitate draw").digest()


def keyed_uniform(key: bytes, position: int) -> float:
    """The random number in [0, 1) of one token.

    It is the upper 53 bits of keyed BLAKE2b-64 of the token's position in the answer; numbers are little endian.
    """
    digest = hashlib.blake2b(position.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def inverse_cdf(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """The token that a uniform number picks: the first, by id, at which the cumulative probability exceeds it.

    Args:
        logits: scores of the next token. [B, V].
        uniform: numbers in [0, 1), fp64. [B].
        temperature: the law is softmax(logits / temperature), in fp64.

    Returns:
        Token ids, [B]. A token of probability 0 is never picked.
    """
    cumulative = torch.softmax(logits.double() / temperature, dim=1).cumsum(dim=1)
    total = cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    # Rounding may lift the number to the total; the last token that has any probability is then meant.
    last = torch.searchsorted(cumulative, total.contiguous())
    return picked.minimum(last).clamp(max=logits.shape[1] - 1).squeeze(1)


class KeyedSampler(LogitsProcessor):
    """Leaves of each row's scores only the token that its keyed random number picks, so that greedy search draws it.

    Generation itself (cache, padding, stopping) stays with transformers. A token's draw depends on the row's key, the
    position in the answer and the logits alone.

    Args:
        keys (`Sequence[bytes]`): one key per row, see [`stream_key`].
        prompt_length (`int`): columns of the left-padded prompts; the answer starts there.
        temperature (`float`, defaults to 1.0): the law drawn from is softmax(logits / temperature).
    """

    def __init__(self, keys: Sequence[bytes], prompt_length: int, temperature: float = 1.0):
        check_temperature(temperature)
        self.keys, self.prompt_length, self.temperature = list(keys), prompt_length, temperature
        self._is_finite = torch.tensor(True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        # Apple's GPUs have no fp64.
        device = torch.device("cpu") if scores.device.type == "mps" else scores.device
        uniform = torch.tensor([keyed_uniform(key, position) for key in self.keys], dtype=torch.float64, device=device)
        picked = inverse_cdf(scores.to(device), uniform, self.temperature).to(scores.device)
        # Read once at the end: a look at each token would make the GPU wait.
        self._is_finite = self._is_finite.to(scores.device) & ~scores.isnan().any()
        return torch.full_like(scores, -torch.inf).scatter_(1, picked[:, None], 0.0)

    def check(self) -> None:
        """Raise `ValueError` if any of the model's logits so far were not numbers."""
        if not self._is_finite.item():
            raise ValueError(
                "The model gave NaN logits, which are no law to draw from. Load it in float32 (or bfloat16 instead of "
                "float16), and check that training did not diverge."
            )


@torch.no_grad()
def draw_answers(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    *,
    num_answers: int,
    seed: int,
    max_new_tokens: int,
    purpose: str = "answer",
    first_draw: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[Draw]]:
    """Draw answers from softmax(logits / temperature), untruncated, whatever the model's generation config says.

    Draws are keyed by (seed, purpose, question text, draw number, position): they do not depend on which other
    questions are asked, in what order or in what batches. Batches of other shapes round logits differently, and a draw
    whose random number falls within that rounding changes: in float32 next to none, in bfloat16 about 2 tokens in 100
    (a small model, measured). The law of each draw is the model's own in either case.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal LM; of a PEFT model, the active adapter counts. It runs in evaluation mode, which is restored.
        renderer ([`~hf_imitate.rendering.Renderer`]):
            Turns questions into ids, and ids into answers.
        questions (`Sequence[str | list[dict]]`):
            Questions, all plain or all conversational. N of them; equal questions get equal draws.
        num_answers (`int`):
            Draws per question.
        seed (`int`):
            Any integer.
        max_new_tokens (`int`):
            Longest answer, its end token included; an answer that reaches it without ending is cut.
        purpose (`str`, defaults to `"answer"`):
            Draws for another purpose are independent of these.
        first_draw (`int`, defaults to 0):
            Number of the first draw: `first_draw=4` continues the series that `num_answers=4` began.
        temperature (`float`, defaults to 1.0):
            1.0 is the law that was trained.
        batch_size (`int`, defaults to 64):
            Most answers at once.
        progress (`bool`, defaults to `False`):
            Show a progress bar.

    Returns:
        `list[list[Draw]]`: N lists of `num_answers` draws.

    Raises:
        ValueError: a setting is out of range, a question has no tokens, the model's logits are NaN, or the active
            adapter is one of prompt tuning.
    """
    check_temperature(temperature)
    for name, value, least in (
        ("num_answers", num_answers, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
        ("first_draw", first_draw, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"With the active adapter, {model.active_peft_config.peft_type.value}, PEFT drops the positions of padded "
            "prompts, so draws would depend on the batch. Use LoRA or another adapter of the weights."
        )
    prompts = renderer.prompt_ids(questions) if questions else []
    check_prompt_ids(prompts)
    jobs = [(question, draw) for question in range(len(prompts)) for draw in range(num_answers)]
    # The longest first, so that too little memory shows at once.
    jobs.sort(key=lambda job: len(prompts[job[0]]), reverse=True)
    drawn: dict[tuple[int, int], Draw] = {}
    with (
        evaluation_mode(model),
        _without_generation_defaults(model),
        tqdm(total=len(jobs), desc="answering", disable=not progress) as bar,
    ):
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            keys = [stream_key(seed, purpose, questions[question], first_draw + draw) for question, draw in batch]
            batch_prompts = [prompts[question] for question, _ in batch]
            ids = _generate(model, renderer, batch_prompts, keys, max_new_tokens, temperature)
            drawn |= {job: Draw(tokens, renderer.read(tokens)) for job, tokens in zip(batch, ids, strict=True)}
            bar.update(len(batch))
    return [[drawn[question, draw] for draw in range(num_answers)] for question in range(len(prompts))]


def _generate(
    model: Any,
    renderer: Renderer,
    prompts: list[list[int]],
    keys: list[bytes],
    max_new_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """Sampled ids of each row, up to its first end token."""
    ends = renderer.end_token_ids
    pad = renderer.tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    length = max(len(ids) for ids in prompts)
    input_ids = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts])
    attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    sampler = KeyedSampler(keys, length, temperature)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True
    )
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
    )
    sampler.check()
    return [_until_end(row, ends) for row in output[:, length:].tolist()]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]


@contextlib.contextmanager
def _without_generation_defaults(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Hide the model's own generation config: transformers fills what a caller leaves open from it (a repetition
    penalty, suppressed tokens), and the law would no longer be softmax(logits / temperature)."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    owners = [module for module in (model, causal_lm) if "generation_config" in vars(module)]
    hidden = [(owner, owner.generation_config) for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in hidden:
            owner.generation_config = config
