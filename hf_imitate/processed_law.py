"""The law that is left after temperature, top-k, top-p and their like: sampled from and scored, the very same.

For models the law is softmax(logits); whoever decodes otherwise publishes another law, and this is that one.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_imitate.rendering import Rendered, Renderer
from hf_imitate.sampling import Draw, GumbelSampler, check_drawing, draw_by_key, stream_key
from hf_imitate.scoring import answer_logits, check_prompt_ids

# Numbers at once: beside the logits, a law needs several copies of them.
_MAX_NUMBERS = 2**24
# In transformers' own order. Each needs the scores of one position alone, so all positions are processed at once.
_WARPERS = {
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0.0),
    "typical_p": (TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (EtaLogitsWarper, 0.0),
}
# Settings that change how long or how fast it answers, and not which law it answers by.
_HARMLESS = frozenset(
    {
        *("do_sample", "max_length", "max_new_tokens", "use_cache", "num_return_sequences", "_from_model_config"),
        *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version"),
        *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        *("cache_implementation", "cache_config", "compile_config", "disable_compile", "early_stopping"),
        *("length_penalty", "assistant_early_exit", "is_assistant"),
    }
)
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_NEUTRAL |= {"min_length": 0, "min_new_tokens": 0, "diversity_penalty": 0.0, "guidance_scale": 1.0}
_NEUTRAL |= {"num_beam_groups": 1, "encoder_no_repeat_ngram_size": 0}


class AnswerStatistics(NamedTuple):
    """What a law says of N answers: sums over each answer's positions, end token included. fp64, on the CPU, [N].

    Attributes:
        nats: log-probability of the answer; -inf outside a truncated law's support.
        num_tokens: its tokens, int64.
        entropy: of the next-token laws, nats.
        variance: of the next token's log-probability under its own law, nats squared.
        log_rank: log(1 + rank of the token among all, from 0).
    """

    nats: Tensor
    num_tokens: Tensor
    entropy: Tensor
    variance: Tensor
    log_rank: Tensor


class ProcessedLaw:
    """A law over next tokens: what transformers' own logits processors leave of softmax(logits).

    Args:
        generation_config ([`~transformers.GenerationConfig`] or `dict`, *optional*):
            `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`; a dict samples
            unless it says `do_sample=False`. Without sampling the law is the likeliest token alone (greedy). What is
            not set is off, also where `generate` would fill it in (top_k 50). `None`: softmax of the
            logits at temperature 1, untruncated.

    Attributes:
        settings (`dict[str, float]`): what differs from that, in the order in which it is applied.
        temperature (`float`, *optional*): where the law is softmax(logits / temperature) alone; else `None`.
        is_truncated (`bool`): whether tokens have probability 0.

    Raises:
        ValueError: a setting depends on what was said before (a repetition penalty, ...) or contradicts another.
    """

    def __init__(self, generation_config: GenerationConfig | dict[str, Any] | None = None):
        given = _settings_of(generation_config)
        self.settings = {
            name: given[name]
            for name, (_, neutral) in _WARPERS.items()
            if given.get(name) is not None and given[name] != neutral
        }
        if generation_config is not None and not given.get("do_sample", True):
            if set(self.settings) - {"top_k", "top_p"}:
                raise ValueError(
                    f"`do_sample=False` takes the likeliest token, so {sorted(self.settings)} would have no effect. "
                    "Set `do_sample=True` to audit that law, or leave them out to audit greedy decoding."
                )
            self.settings = {"top_k": 1}
        self.processors = LogitsProcessorList(
            _WARPERS[name][0](value, **_device_of(_WARPERS[name][0])) for name, value in self.settings.items()
        )
        self.is_truncated = bool(set(self.settings) - {"temperature"})
        self.temperature = None if self.is_truncated else float(self.settings.get("temperature", 1.0))

    def log_law(self, logits: Tensor) -> Tensor:
        """Log-probability of every token, -inf where it has none, from the model's logits. [M, V] to [M, V], fp32."""
        nothing_before = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
        return torch.log_softmax(self.processors(nothing_before, logits.float()), dim=1)

    def describe(self) -> str:
        """In words, for people."""
        if not self.settings:
            return "temperature 1, untruncated"
        if self.settings == {"top_k": 1}:
            return "the likeliest token (greedy)"
        return ", ".join(f"{name} {value:g}" for name, value in self.settings.items())


class ProcessedSampler(GumbelSampler):
    """[`~hf_imitate.sampling.GumbelSampler`] behind a law's processors: it draws from what they leave."""

    def __init__(self, law: ProcessedLaw, keys: Sequence[bytes], prompt_length: int, end_token_ids: Sequence[int]):
        super().__init__(keys, prompt_length, law.temperature or 1.0, end_token_ids)
        # At a temperature alone, the very draws of `draw_answers`, which `verify_answers` can repeat.
        self.processors = law.processors if law.is_truncated else LogitsProcessorList()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, self.processors(input_ids, scores.float()))


@torch.no_grad()
def draw_processed(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    law: ProcessedLaw,
    questions: Sequence[str | list[dict]],
    draw_numbers: Sequence[int],
    *,
    seed: int,
    max_new_tokens: int,
    purpose: str = "answer",
    batch_size: int = 64,
) -> list[Draw]:
    """Draw one answer per question from a processed law, keyed as [`~hf_imitate.sampling.draw_answers`] does.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal LM.
        renderer ([`~hf_imitate.rendering.Renderer`]): turns questions into ids, and ids into answers.
        law (`ProcessedLaw`): what is drawn from.
        questions (`Sequence[str | list[dict]]`): N of them; they may repeat.
        draw_numbers (`Sequence[int]`): number of each one's draw, from 0; equal questions with equal numbers get equal
            answers. N.
        seed, max_new_tokens, purpose, batch_size: as there.

    Returns:
        `list[Draw]`: N draws, in the order of the questions.

    Raises:
        ValueError: a setting is out of range, a question has no tokens, or the model's logits are NaN.
    """
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    check_drawing(model, 1.0, min(draw_numbers, default=0), counts)
    prompts = renderer.prompt_ids(questions) if questions else []
    check_prompt_ids(prompts)
    keys = [[stream_key(seed, purpose, q, number)] for q, number in zip(questions, draw_numbers, strict=True)]

    def make_sampler(own_keys: Sequence[bytes], length: int, _: float, ends: Sequence[int]) -> ProcessedSampler:
        return ProcessedSampler(law, own_keys, length, ends)  # the law has its own temperature

    drawn = draw_by_key(
        *(model, renderer, prompts, keys),
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        batch_size=batch_size,
        make_sampler=make_sampler,
    )
    return [own[0] for own in drawn]


@torch.no_grad()
def answer_statistics(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Rendered],
    pad_token_id: int,
    law: ProcessedLaw | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> AnswerStatistics:
    """Log-probability of each answer under a law, and what the law expected at its positions.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a causal LM; it runs in evaluation mode.
        rows (`Sequence[Rendered]`): questions and answers. N of them.
        pad_token_id (`int`): fills shorter rows; never scored.
        law (`ProcessedLaw`, *optional*): defaults to temperature 1, untruncated.
        batch_size (`int`, defaults to 64): most answers in one forward.
        progress (`bool`, defaults to `False`): show a bar.

    Returns:
        [`AnswerStatistics`]. An answer without tokens has probability 1.
    """
    law = law or ProcessedLaw()
    sums = torch.zeros(4, len(rows), dtype=torch.float64)
    with tqdm(total=len(rows), desc="scoring", disable=not progress) as bar:
        for batch in answer_logits(model, rows, pad_token_id, batch_size):
            step = max(1, _MAX_NUMBERS // batch.logits.shape[1])
            for start in range(0, len(batch.token), step):
                part = slice(start, start + step)
                values = token_statistics(law.log_law(batch.logits[part]), batch.token[part])
                sums.index_add_(1, batch.row[part], values.double().cpu())
            bar.update(len(batch.indices))
    num_tokens = torch.tensor([len(row.answer_ids) for row in rows], dtype=torch.long)
    return AnswerStatistics(sums[0], num_tokens, *sums[1:])


def token_statistics(log_law: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability, entropy, variance of the log-probability and log(1 + rank) of M tokens. [4, M], nats.

    Args:
        log_law: log-probability of every token at each position, -inf where it has none. [M, V].
        tokens: the token there. [M].

    The rank is the number of tokens that are more probable, so a tie counts for the token.
    """
    log_p = log_law.gather(1, tokens.to(log_law.device)[:, None])
    p = log_law.exp()
    finite = torch.where(p > 0, log_law, 0.0)  # 0 log 0 = 0
    mean = (p * finite).sum(dim=1)
    variance = (p * (finite - mean[:, None]).square()).sum(dim=1)
    rank = (log_law > log_p).sum(dim=1)
    return torch.stack([log_p[:, 0], -mean, variance, torch.log1p(rank.float())])


def _settings_of(config: GenerationConfig | dict[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    given = dict(config) if isinstance(config, dict) else config.to_diff_dict()
    if isinstance(config, GenerationConfig):
        given["do_sample"] = bool(config.do_sample)
    odd = sorted(
        name
        for name, value in given.items()
        if name not in _WARPERS and name not in _HARMLESS and value not in (None, False, _NEUTRAL.get(name))
    )
    if odd:
        raise ValueError(
            f"`generation_config` sets {odd}; an audit can sample and score {sorted(_WARPERS)} only. A law that "
            "depends on what was said before has no probability here: leave these out, or audit the plain law."
        )
    return given


def _device_of(warper: type) -> dict[str, Any]:
    """Some warpers put their constant on a device when they are made; the CPU's is a number that works on all."""
    return {"device": "cpu"} if "device" in inspect.signature(warper).parameters else {}
