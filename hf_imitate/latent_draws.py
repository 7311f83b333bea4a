"""Thoughts, and answers after them, drawn and scored under one law, see [`~hf_imitate.thoughts.ThoughtLaw`]."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_imitate.sampling import GumbelSampler, generation_mode
from hf_imitate.side_by_side import side_by_side, split_before_last
from hf_imitate.sparing_head import SparingHead
from hf_imitate.thoughts import FREE, ThoughtLaw


class Continuation(NamedTuple):
    """One row to be drawn after or scored: ids before the thought, and ids from the thought on."""

    prompt_ids: list[int]
    ids: list[int]


class Drawn(NamedTuple):
    """One thought, with or without the answer after it.

    Attributes:
        thought_ids: its tokens, without the delimiter.
        answer_ids: the answer's tokens, the end token included if it ended; empty where only a thought was asked for.
        log_prob_thought: log-probability of thought and delimiter under the very scores that drew them, nats.
    """

    thought_ids: list[int]
    answer_ids: list[int]
    log_prob_thought: float


@torch.no_grad()
def draw_thoughts(
    model: PreTrainedModel | PeftModel,
    law: ThoughtLaw,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[bytes],
    end_token_ids: Sequence[int],
    pad_token_id: int,
    max_answer_tokens: int = 0,
    temperature: float = 1.0,
    max_rows: int = 64,
    make_sampler: Callable[..., GumbelSampler] = GumbelSampler,
) -> list[Drawn]:
    """Draw a thought after each prompt, and the answer after it if `max_answer_tokens` is positive.

    Args:
        model: whose law it is; of a PEFT model, the active adapter counts. It runs in evaluation mode.
        law: of the thoughts.
        prompts: ids that the thought follows, opening included. N.
        keys: of the random numbers of each draw, see [`~hf_imitate.sampling.stream_key`]. N.
        end_token_ids: end an answer.
        pad_token_id: fills, and is never read.
        max_answer_tokens: an answer that reaches it without ending is cut.
        temperature: 1.0 is the law that was trained.
        max_rows: most rows at once.
        make_sampler: builds the sampler of each batch of rows.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    drawn: dict[int, Drawn] = {}
    with generation_mode(model):
        for first in range(0, len(order), max_rows):
            chunk = order[first : first + max_rows]
            rows = _draw_chunk(
                *(model, law, [prompts[i] for i in chunk], [keys[i] for i in chunk], end_token_ids, pad_token_id),
                *(max_answer_tokens, temperature, make_sampler),
            )
            drawn |= zip(chunk, rows, strict=True)
    return [drawn[i] for i in range(len(prompts))]


def _draw_chunk(model, law, prompts, keys, ends, pad, max_answer_tokens, temperature, make_sampler) -> list[Drawn]:
    length = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    close = len(law.delimiter_ids)
    # A row that is done needs no more noise.
    last = ends if max_answer_tokens else law.delimiter_ids if close == 1 else ()
    sampler = make_sampler(keys, length, temperature, end_token_ids=last)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=law.max_length + close + max_answer_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
        use_cache=True,
    )
    # Transformers' own loop, whatever the model's class brings: what is re-executed must not vouch for itself.
    output = GenerationMixin.generate(
        model.get_base_model() if isinstance(model, PeftModel) else model,
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([_Mold(law, length), sampler]),
        stopping_criteria=StoppingCriteriaList([_Enough(law, length, max_answer_tokens)]),
    )
    rows = []
    for ids, log_probs in zip(output[:, length:].tolist(), sampler.token_log_probs, strict=True):
        thought, answer = law.split(ids)
        end = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        total = log_probs[: len(thought) + close].sum().item()
        rows.append(Drawn(thought, answer[: min(end, max_answer_tokens)], total))
    return rows


def sequence_log_probs(
    model: Callable[..., Any],
    law: ThoughtLaw,
    rows: Sequence[Continuation],
    pad_token_id: int,
    device: torch.device | str,
    temperature: float = 1.0,
    head: SparingHead | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given thoughts (with their delimiters) and of the answers after them, nats. [N], [N].

    Gradients flow. Rows that begin alike share a forward of that beginning where the head says that they can; else
    they lie as they lie while drawing: questions padded on the left, the rest on the right.

    Args:
        model: called like a causal LM; it may be wrapped.
        law: of the thoughts.
        rows: N of them; a row's ids are thought, delimiter, and the answer's, if any.
        pad_token_id: fills, and is never scored.
        device: of the model.
        temperature: 1.0 is the law that was trained.
        head: of the same model, from [`SparingHead.of`]. Without one, the scores of all tokens after the questions are
            held at once: [N, T, V].
    """
    targets, is_token = _padded([row.ids for row in rows], pad_token_id, device)
    steps = law.steps(targets)[:, :-1]
    if head is None:
        inputs, after = _side_padded(rows, pad_token_id, device)
        scores = model(**inputs, logits_to_keep=after + 1).logits[:, -after - 1 : -1]
        log_probs = law.log_probs(scores / temperature, steps, targets)
    else:
        states = _states(model, head, rows, pad_token_id, device)[is_token]
        own_steps, own_targets = steps[is_token], targets[is_token]

        def of_piece(scores: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
            return law.log_probs(scores / temperature, steps, ids)

        own = head.map_scores(of_piece, states, own_steps, own_targets)
        log_probs = own.new_zeros(targets.shape).masked_scatter(is_token, own)
    is_thought = steps != FREE
    # `where`, not a product: what stands on padding may be -inf.
    thought = torch.where(is_token & is_thought, log_probs, 0.0).sum(dim=1)
    return thought, torch.where(is_token & ~is_thought, log_probs, 0.0).sum(dim=1)


def _states(model: Any, head: SparingHead, rows: Sequence[Continuation], pad: int, device: Any) -> Tensor:
    """Last hidden states before each token after the questions; past a row's end they mean nothing. [N, T, H]."""
    parts = [split_before_last(*row) for row in rows]
    before, after = [part[0] for part in parts], [part[1] for part in parts]
    shared = side_by_side(head.causal_lm, before, after, pad) if head.can_share else None
    if shared is not None:
        laid, order = shared
        states = laid.of_continuations(head.last_states(model, laid.inputs(head.causal_lm) | {"use_cache": False}))
        return states[torch.tensor(order, device=states.device).argsort()]
    inputs, longest = _side_padded(rows, pad, device)
    return head.last_states(model, inputs)[:, -longest - 1 : -1]


def _side_padded(rows: Sequence[Continuation], pad: int, device: Any) -> tuple[dict[str, Any], int]:
    """Inputs with the questions padded on the left and the rest on the right, and the length of the rest."""
    before, after = (max(len(row[part]) for row in rows) for part in (0, 1))
    ids = torch.full((len(rows), before + after), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start, stop = before - len(row.prompt_ids), before + len(row.ids)
        ids[i, start:stop] = torch.tensor([*row.prompt_ids, *row.ids])
        mask[i, start:stop] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.to(device) for name, value in inputs.items()} | {"use_cache": False}, after


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids padded on the right, and where they are not padding. [N, T] each."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(longest) < lengths[:, None]).to(device)


class _Mold(LogitsProcessor):
    """Gives a model's scores the shape of the law while tokens are drawn."""

    def __init__(self, law: ThoughtLaw, prompt_length: int):
        self.law, self.prompt_length = law, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.law.process(scores, self.law.steps(input_ids[:, self.prompt_length :])[:, -1])


class _Enough(StoppingCriteria):
    """A row is done once its delimiter stands and as many answer tokens as were asked for."""

    def __init__(self, law: ThoughtLaw, prompt_length: int, max_answer_tokens: int):
        self.law, self.prompt_length, self.max_answer_tokens = law, prompt_length, max_answer_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        num_free = (self.law.steps(input_ids[:, self.prompt_length :]) == FREE).sum(dim=1)
        return num_free > self.max_answer_tokens
