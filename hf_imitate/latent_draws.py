"""Thoughts, and answers after them, drawn and scored under one law, see [`~hf_imitate.thoughts.ThoughtLaw`]."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
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
from hf_imitate.thoughts import FREE, ThoughtLaw

MAX_SCORES = 2**25  # of one piece of a head: 128 MiB in fp32


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
    head: "SparingHead | None" = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given thoughts (with their delimiters) and of the answers after them, nats. [N], [N].

    Gradients flow. The rows lie as they lie while drawing: questions padded on the left, the rest on the right.

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
    before, after = (max(len(row[part]) for row in rows) for part in (0, 1))
    ids = torch.full((len(rows), before + after), pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start, stop = before - len(row.prompt_ids), before + len(row.ids)
        ids[i, start:stop] = torch.tensor([*row.prompt_ids, *row.ids])
        mask[i, start:stop] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    targets, is_token = ids[:, before:], mask[:, before:].bool()
    steps = law.steps(targets)[:, :-1]
    if head is None:
        scores = model(**inputs, logits_to_keep=after + 1).logits[:, -after - 1 : -1]
        log_probs = law.log_probs(scores / temperature, steps, targets)
    else:
        states = head.last_states(model, inputs)[:, -after - 1 : -1][is_token]
        own = head.log_probs(law, states, steps[is_token], targets[is_token], temperature)
        log_probs = own.new_zeros(targets.shape).masked_scatter(is_token, own)
    is_thought = steps != FREE
    # `where`, not a product: what stands on padding may be -inf.
    thought = torch.where(is_token & is_thought, log_probs, 0.0).sum(dim=1)
    return thought, torch.where(is_token & ~is_thought, log_probs, 0.0).sum(dim=1)


class SparingHead:
    """A model's head, put on the scored tokens alone, a piece of them at a time: no scores [N, T, V] are ever held.

    With a vocabulary of 150 000, those of 64 sequences of 300 tokens would take 12 GB, and several times that with
    their gradients.

    Args:
        body ([`~torch.nn.Module`]): gives the last hidden states.
        head ([`~torch.nn.Module`]): makes scores of them.
    """

    def __init__(self, body: nn.Module, head: nn.Module):
        self.body, self.head = body, head

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel | PeftModel) -> "SparingHead | None":
        """The head of a causal LM; `None` where its scores are more than the head's output (Gemma's are capped)."""
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        made = cls(causal_lm.base_model, causal_lm.get_output_embeddings())
        if made.head is None or made.body is causal_lm:
            return None
        one = torch.zeros(1, 1, dtype=torch.long, device=causal_lm.device)
        with generation_mode(model), made._watched() as seen:
            scores = model(input_ids=one, use_cache=False).logits
            is_all = bool(seen) and torch.equal(made.head(seen[0]), scores)
        return made if is_all else None

    def last_states(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
        """Last hidden states of one forward through `model`, which may wrap the head's own. [N, T, H]."""
        with self._watched() as seen:
            model(**inputs, logits_to_keep=1)
        return seen[0]

    def log_probs(self, law: ThoughtLaw, states: Tensor, steps: Tensor, ids: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of M tokens, nats. [M].

        Args:
            law: of the thoughts.
            states: last hidden states before each token. [M, H].
            steps: what may come there, from [`ThoughtLaw.steps`]. [M].
            ids: the tokens. [M].
            temperature: 1.0 is the law that was trained.
        """

        def of_piece(states: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
            return law.log_probs(self.head(states) / temperature, steps, ids)

        size = max(1, MAX_SCORES // len(law.is_ordinary))
        pieces = list(zip(states.split(size), steps.split(size), ids.split(size), strict=True))
        if len(pieces) == 1 or not torch.is_grad_enabled():
            return torch.cat([of_piece(*piece) for piece in pieces])
        # The backward makes each piece's scores again.
        kept = [checkpoint(of_piece, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        return torch.cat(kept)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        seen: list[Tensor] = []

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if getattr(output, "last_hidden_state", None) is not None:
                seen.append(output.last_hidden_state)

        handle = self.body.register_forward_hook(note)
        try:
            yield seen
        finally:
            handle.remove()


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
