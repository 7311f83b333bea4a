"""Draw answers whose randomness belongs to the question and the draw, not to the batch they are computed in."""

import contextlib
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_imitate.prefill import cache_name, read_once
from hf_imitate.rendering import Answer, Renderer
from hf_imitate.rows import question_key
from hf_imitate.scoring import check_positions, check_prompt_ids, check_temperature, evaluation_mode, num_positions

# Numbers from which on starting threads costs less than they save.
_THREADS_PAY = 2**20


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


def gumbel_noise(keys: Sequence[bytes], positions: Sequence[int], vocab_size: int) -> Tensor:
    """Gumbel(0, 1) noise for every token of the vocabulary, a row for each (draw, position in its answer).

        philox key = keyed BLAKE2b-128 of the position (8 bytes, little endian), key = the draw's key
        number     = (the upper 52 bits of Philox-4x64-10's next 64 + 1/2) / 2^52        token by token, by id
        noise      = -log(-log(number)), fp64

    The numbers come from the CPU, whatever the model runs on, and are the same on every machine; the two logarithms
    are so to their last digit. One token costs about 7 ns: 1 ms per row at 150,000 tokens, on one core (measured).

    Args:
        keys: one key per row, see [`stream_key`].
        positions: number of the token in its answer, from 0; one per row.
        vocab_size: number of tokens.

    Returns:
        [len(keys), vocab_size], fp64, on the CPU; between -3.7 and 36.8.

    Source:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), for Philox.
    """
    noise = np.empty((len(keys), vocab_size))

    def fill(rows: Sequence[int]) -> None:
        philox = np.random.Philox(key=0, counter=0)
        start = philox.state  # to begin anew from another key costs a tenth of another generator
        for row in rows:
            position = operator.index(positions[row]).to_bytes(8, "little")
            digest = hashlib.blake2b(position, key=keys[row], digest_size=16).digest()
            start["state"]["key"] = np.frombuffer(digest, "<u8").astype(np.uint64)
            philox.state = start
            bits = philox.random_raw(vocab_size)
            np.right_shift(bits, np.uint64(12), out=bits)
            # Of signed numbers the conversion is several times as fast; 52 bits fit.
            numbers = np.add(bits.view(np.int64), 0.5, out=noise[row])
            numbers *= 2.0**-52
            for _ in range(2):
                np.negative(np.log(numbers, out=numbers), out=numbers)

    num_threads = torch.get_num_threads() if noise.size >= _THREADS_PAY else 1
    if num_threads == 1:
        fill(range(len(keys)))
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(fill, (range(first, len(keys), num_threads) for first in range(num_threads))))
    return torch.from_numpy(noise)


class GumbelSampler(LogitsProcessor):
    """Leaves of each row's scores only the token that its noise makes the winner, so that greedy search draws it.

        drawn = argmax over tokens of ( score / temperature + Gumbel noise of (key, position, token) )

    is a draw from softmax(scores / temperature). Generation itself (cache, padding, stopping) stays with transformers.
    A token's draw depends on the row's key, the position in the answer and the row's scores alone; so whoever knows
    the key can repeat it ([`~hf_imitate.verification.verify_answers`]).

    The scores are those that *earlier* processors leave. Put it last; what they have masked (-inf) is never drawn and
    has no share in the law.

    Args:
        keys (`Sequence[bytes]`): one key per row, see [`stream_key`].
        prompt_length (`int`): columns of the left-padded prompts; the answer starts there.
        temperature (`float`, defaults to 1.0): the law drawn from is softmax(scores / temperature).
        end_token_ids (`Sequence[int]`, defaults to `()`): a row ends with the first of these that it draws; later
            steps of it are not drawn and count nothing. Without any, every step of every row counts.

    Attributes:
        token_log_probs (`torch.Tensor`): log-probability of each drawn token under the very law that drew it, 0 after
            a row's end, nats. [B, T] for T steps so far, fp64, on the CPU.
        log_prob (`torch.Tensor`): its sum over each row, up to and with its end token, nats. [B].
        open_rows (`list[int]`): the rows that have not ended.

    Raises:
        ValueError: when called: the law of a row is none, since its scores are NaN or infinite, or all are masked.

    Source:
        Maddison et al., "A* sampling", section 2. https://huggingface.co/papers/1411.0030
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        prompt_length: int,
        temperature: float = 1.0,
        end_token_ids: Sequence[int] = (),
    ):
        check_temperature(temperature)
        self.keys, self.prompt_length, self.temperature = list(keys), prompt_length, temperature
        self.end_token_ids = list(end_token_ids)
        self._token_log_probs: list[Tensor] = []
        self.open_rows = list(range(len(self.keys)))

    @property
    def token_log_probs(self) -> Tensor:
        steps = self._token_log_probs
        return torch.stack(steps, dim=1) if steps else torch.zeros(len(self.keys), 0, dtype=torch.float64)

    @property
    def log_prob(self) -> Tensor:
        return self.token_log_probs.sum(dim=1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(scores) != len(self.keys):
            raise ValueError(
                f"There are {len(self.keys)} keys and {len(scores)} rows; a draw needs a key of its own. Repeat the "
                "prompts instead of setting `num_return_sequences` or beams."
            )
        position = input_ids.shape[1] - self.prompt_length
        rows = self.open_rows
        are_all_open = len(rows) == len(scores)
        scores_now = in_fp64(scores if are_all_open else scores[rows])
        if self.temperature != 1.0:
            scores_now = scores_now / self.temperature
        noise = gumbel_noise([self.keys[row] for row in rows], [position] * len(rows), scores.shape[1])
        # The winner is the same whatever constant a row's scores are shifted by.
        perturbed = noise.to(scores_now.device).add_(scores_now)
        picked = self.pick(perturbed, input_ids[rows, self.prompt_length :]).to(scores_now.device)
        log_p = (scores_now.gather(1, picked[:, None]).squeeze(1) - torch.logsumexp(scores_now, dim=1)).cpu()
        check_is_law(log_p)
        index = torch.tensor(rows, dtype=torch.long)
        self._token_log_probs.append(torch.zeros(len(self.keys), dtype=torch.float64).index_copy_(0, index, log_p))
        drawn = torch.zeros(len(self.keys), dtype=torch.long).index_copy_(0, index, picked.cpu())
        self.open_rows = [row for row in rows if drawn[row].item() not in self.end_token_ids]
        # What a row that has ended keeps does not matter: generation fills it with padding.
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None].to(scores.device), 0.0)

    def pick(self, perturbed: Tensor, drawn_ids: Tensor) -> Tensor:
        """The winners among perturbed scores [N, V] of the rows that have not ended, and what those rows have drawn so
        far, [N, t]. Token ids, [N]; of equals, the first by id."""
        return perturbed.max(dim=1).indices  # on a CPU a third of what `argmax` costs


def check_is_law(log_p: Tensor) -> None:
    """Raise `ValueError` unless all these numbers, one from each law, are finite."""
    if not log_p.isfinite().all():
        raise ValueError(
            "The model gave scores that are no law to draw from: NaN, infinite, or -inf for every token. Load it in "
            "float32 (or bfloat16 instead of float16), check that training did not diverge, and that no other logits "
            "processor masks all tokens."
        )


def in_fp64(scores: Tensor) -> Tensor:
    """The same numbers in fp64; on the CPU where the device has none (Apple's GPUs)."""
    return (scores.cpu() if scores.device.type == "mps" else scores).double()


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
    whose two best tokens are closer than that changes: in float32 next to none, in bfloat16 about 1 token in 200 (a
    small trained model, measured). The law of each draw is the model's own in either case.

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
    counts = {"num_answers": num_answers, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    check_drawing(model, temperature, first_draw, counts)
    prompts = renderer.prompt_ids(questions) if questions else []
    check_prompt_ids(prompts)
    keys = [
        [stream_key(seed, purpose, question, first_draw + draw) for draw in range(num_answers)]
        for question in questions
    ]
    return draw_by_key(
        *(model, renderer, prompts, keys),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        progress="answering" if progress else None,
    )


def draw_by_key(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    keys: Sequence[Sequence[bytes]],
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    make_sampler: Callable[..., GumbelSampler] = GumbelSampler,
    own_loop: bool = False,
    progress: str | None = None,
) -> list[list[Draw]]:
    """One draw after each prompt for each of its keys; the settings are taken as they are.

    Args:
        model, renderer, max_new_tokens, temperature, batch_size: as of [`draw_answers`].
        prompts: ids of the questions. N.
        keys: of the random numbers of each draw; N lists, of any lengths.
        make_sampler: builds the sampler of each batch.
        own_loop: as of [`generate_with`].
        progress: what a progress bar calls it; `None` shows none.
    """
    needed = [len(prompt) + max_new_tokens for prompt in prompts]
    check_positions(needed, num_positions(model), "questions", ", lower `max_new_tokens`")
    jobs = [(question, number) for question, own in enumerate(keys) for number in range(len(own))]
    # The longest first, so that too little memory shows at once.
    jobs.sort(key=lambda job: len(prompts[job[0]]), reverse=True)
    drawn: dict[tuple[int, int], Draw] = {}
    with generation_mode(model), tqdm(total=len(jobs), desc=progress, disable=progress is None) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            asked = [prompts[question] for question, _ in batch]
            own_keys = [keys[question][number] for question, number in batch]
            sampler = make_sampler(own_keys, max(map(len, asked)), temperature, renderer.end_token_ids)
            ids = generate_with(sampler, model, renderer, asked, max_new_tokens, own_loop)
            drawn |= {job: Draw(tokens, renderer.read(tokens)) for job, tokens in zip(batch, ids, strict=True)}
            bar.update(len(batch))
    return [[drawn[question, number] for number in range(len(own))] for question, own in enumerate(keys)]


def check_drawing(
    model: PreTrainedModel | PeftModel, temperature: float, first_draw: int, counts: dict[str, int]
) -> None:
    """Raise `ValueError` if draws are asked for that cannot be had; `counts` are settings that are at least 1."""
    check_temperature(temperature)
    for name, value, least in [*((name, value, 1) for name, value in counts.items()), ("first_draw", first_draw, 0)]:
        if value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"With the active adapter, {model.active_peft_config.peft_type.value}, PEFT drops the positions of padded "
            "prompts, so draws would depend on the batch. Use LoRA or another adapter of the weights."
        )


def generate_with(
    sampler: GumbelSampler,
    model: Any,
    renderer: Renderer,
    prompts: list[list[int]],
    max_new_tokens: int,
    own_loop: bool = False,
) -> list[list[int]]:
    """Token ids that a sampler draws after each question, up to the first end token.

    The model runs as it is; [`generation_mode`] makes its law softmax(logits / temperature).

    Args:
        sampler ([`GumbelSampler`]): its `prompt_length` is that of the longest question.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal LM.
        renderer: knows the end tokens and the padding.
        prompts: ids of the questions, one list per row.
        max_new_tokens: longest answer, its end token included.
        own_loop: generate by transformers' own loop, also where the model's class has another: whoever checks a model
            asks it for scores alone. Equal questions are then read once, see [`~hf_imitate.prefill.read_once`].
    """
    ends = renderer.end_token_ids
    pad = renderer.tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    length = sampler.prompt_length
    input_ids = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts]).to(model.device)
    attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]).to(model.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True
    )
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    generate = partial(GenerationMixin.generate, causal_lm) if own_loop else model.generate
    cache = read_once(causal_lm, prompts, input_ids, attention_mask) if own_loop else None
    output = generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
        **({} if cache is None else {cache_name(causal_lm): cache}),
    )
    return [_until_end(row, ends) for row in output[:, length:].tolist()]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]


@contextlib.contextmanager
def generation_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, dropout is off and the model's own generation config hidden: transformers fills what a caller leaves
    open from it (a repetition penalty, suppressed tokens), and the law would not be softmax(logits / temperature)."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    owners = [module for module in (model, causal_lm) if "generation_config" in vars(module)]
    hidden = [(owner, owner.generation_config) for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        with evaluation_mode(model):
            yield
    finally:
        for owner, config in hidden:
            owner.generation_config = config
