"""The law of a thought: which tokens may stand in it, and how it ends.

One function, [`ThoughtLaw.process`], shapes the scores that tokens are drawn from and those that given tokens are
scored by, for imitator and retrodictor alike. A sequence is: question, thought, delimiter, answer, end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FALLBACK_DELIMITER = "####"  # closes a thought where the vocabulary has no unused id
RULE = "ordinary tokens"  # which tokens a thought is made of, as `imitation.json` names it
CONTENT, FREE = -1, -2  # kinds of steps; every other number is the only token that may come
_UNUSED = re.compile(r"reserved|unused|extra_id", re.IGNORECASE)
_TAG = re.compile(r"</(\w+)>")


@dataclass(frozen=True)
class ThoughtLaw:
    """Thoughts are at most `max_length` ordinary tokens, then the delimiter.

    Before `max_length` tokens the next one is an ordinary token or the delimiter's first; everything else (end tokens,
    padding, chat markers, other special ids, ids that spell nothing) is masked and the rest renormalised. After
    `max_length` tokens the delimiter comes with probability 1, and so do its further tokens. After the delimiter
    nothing is masked. So the probabilities of all thoughts sum to 1, and (thought, answer) can be read off the ids:
    the delimiter's first token never stands in a thought.

    Args:
        delimiter_ids (`tuple[int]`): closes a thought.
        max_length (`int`): most tokens of a thought, the delimiter not counted.
        is_ordinary (`torch.Tensor`): which ids may stand in a thought. [V], bool.
        opening_ids (`tuple[int]`): put after the question, before the thought, by nobody's choice (`<think>`).
    """

    delimiter_ids: tuple[int, ...]
    max_length: int
    is_ordinary: Tensor = field(repr=False)
    opening_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.delimiter_ids or self.max_length < 1 or not self.is_ordinary.any():
            raise ValueError(
                f"A thought needs a delimiter, room for a token and a token to stand there; got "
                f"{len(self.delimiter_ids)} delimiter tokens, `max_length`={self.max_length} and "
                f"{int(self.is_ordinary.sum())} ordinary tokens."
            )
        if self.is_ordinary[self.delimiter_ids[0]]:
            raise ValueError("The delimiter's first token may stand in a thought, so nobody could tell where it ends.")

    def steps(self, ids: Tensor) -> Tensor:
        """What each step may draw, given the tokens before it: `CONTENT`, `FREE`, or the one token that is forced.

        Args:
            ids: tokens from the thought's first on. [B, T].

        Returns:
            For the T tokens and the one that would follow. [B, T + 1].
        """
        position = torch.arange(ids.shape[1] + 1, device=ids.device)
        # One column of "not yet" at the end, so that there is a first start in every row.
        never = ids.new_full((len(ids), 1), ids.shape[1] + 1)
        starts = torch.where(ids == self.delimiter_ids[0], position[:-1], never)
        start = torch.cat([starts, never], dim=1).amin(dim=1, keepdim=True)
        kinds = torch.full((len(ids), ids.shape[1] + 1), CONTENT, device=ids.device)
        kinds[(position >= self.max_length) & (position <= start)] = self.delimiter_ids[0]
        for number, token in enumerate(self.delimiter_ids[1:], 1):
            kinds[position == start + number] = token
        kinds[position >= start + len(self.delimiter_ids)] = FREE
        return kinds

    def process(self, scores: Tensor, steps: Tensor) -> Tensor:
        """Scores of a model with every token masked that may not come, in fp32 or finer. Their softmax is the law.

        Args:
            scores: of the next token. [..., V].
            steps: what may come, from [`steps`]. [...].
        """
        may_come = self.is_ordinary.to(scores.device, copy=True)
        may_come[self.delimiter_ids[0]] = True
        kinds = steps[..., None]
        may_come = (may_come & (kinds == CONTENT)) | (kinds == FREE)
        may_come |= torch.arange(scores.shape[-1], device=scores.device) == kinds
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return scores.masked_fill(~may_come, -torch.inf)

    def log_probs(self, scores: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """Log-probability of tokens, nats. [...].

        Args:
            scores: a model's, for each token. [..., V].
            steps: what may come there, from [`steps`]. [...].
            ids: the tokens. [...].
        """
        processed = self.process(scores, steps)
        return torch.log_softmax(processed, dim=-1).gather(-1, ids[..., None]).squeeze(-1)

    def token_log_probs(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Log-probability of each token given those before it, nats. [B, T].

        Args:
            scores: a model's, for each token from the thought's first on. [B, T, V].
            ids: those tokens. [B, T].
        """
        return self.log_probs(scores, self.steps(ids)[:, :-1], ids)

    def split(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """A thought's tokens, and the tokens after its delimiter."""
        ids = list(ids)
        end = ids.index(self.delimiter_ids[0]) if self.delimiter_ids[0] in ids else len(ids)
        return ids[:end], ids[end + len(self.delimiter_ids) :]

    def join(self, thought_ids: Sequence[int], answer_ids: Sequence[int] = ()) -> list[int]:
        """Thought, delimiter and answer."""
        return [*thought_ids, *self.delimiter_ids, *answer_ids]

    def opened(self, prompt_ids: Sequence[int]) -> list[int]:
        """A question's ids with the thought opened, unless the question's template has opened it already.

        Raises:
            ValueError: the template opens a thought and closes it again, so the one to come would be the second.
        """
        # A line break or two may follow a tag; a marker after it is of a turn that is over.
        markers = [token for token in prompt_ids[-4:] if not self.is_ordinary[token]]
        if self.opening_ids and markers and markers[-1] == self.delimiter_ids[0]:
            raise ValueError(
                "The chat template ends the question with a thought that is opened and closed again, as templates do "
                "where thinking is switched off. Switch it on in `chat_template_kwargs` (`enable_thinking`, for "
                "instance), or take another `thought_delimiter`."
            )
        is_open = bool(self.opening_ids) and markers[-1:] == list(self.opening_ids)
        return list(prompt_ids) if is_open else [*prompt_ids, *self.opening_ids]

    def problem(self, thought_ids: Sequence[int]) -> str | None:
        """Why these tokens are no thought under this law; `None` if they are one. No tokens at all are one."""
        if len(thought_ids) > self.max_length:
            return f"longer than `max_thought_length`={self.max_length} tokens"
        if self.delimiter_ids[0] in thought_ids:
            return "holding the delimiter or its first token"
        return None if all(self.is_ordinary[list(thought_ids)]) else "holding tokens that no thought may hold"

    def to_json(self) -> dict[str, Any]:
        """How to rebuild the law, JSON-ready."""
        return {
            "delimiter_ids": list(self.delimiter_ids),
            "opening_ids": list(self.opening_ids),
            "max_thought_length": self.max_length,
            "rule": RULE,
            "vocabulary": len(self.is_ordinary),
            "masked_ids": _ranges((~self.is_ordinary).nonzero().flatten().tolist()),
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "ThoughtLaw":
        """Take up what `to_json` wrote.

        Raises:
            ValueError: it was written under a rule that is not known here.
        """
        if stored.get("rule") != RULE:
            raise ValueError(f"The rule for thoughts is {stored.get('rule')!r}; this version knows {RULE!r} alone.")
        is_ordinary = torch.ones(stored["vocabulary"], dtype=torch.bool)
        for first, last in stored["masked_ids"]:
            is_ordinary[first : last + 1] = False
        delimiter, opening = tuple(stored["delimiter_ids"]), tuple(stored["opening_ids"])
        return cls(delimiter, stored["max_thought_length"], is_ordinary, opening)


def settle_thought_law(
    tokenizer: Any, vocab_size: int, end_token_ids: Sequence[int], max_length: int, delimiter: str | None = None
) -> ThoughtLaw:
    """The law of thoughts in a vocabulary that is left as it is.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the model.
        vocab_size (`int`): columns of the model's logits.
        end_token_ids (`Sequence[int]`): every id that ends an answer.
        max_length (`int`): most tokens of a thought.
        delimiter (`str`, *optional*):
            Closes a thought; its first token is masked inside thoughts. A closing tag that the tokenizer knows
            (`"</think>"`) has its opening tag put after the question. `None` takes an id that nothing spells: a row of
            the embeddings beyond the tokenizer's ids, else an unused special token, else the text "####".

    Raises:
        ValueError: the delimiter has no tokens or holds an end token, or masking leaves no token for thoughts.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {
        *tokenizer.all_special_ids
    }
    known = set(tokenizer.get_vocab().values())
    is_ordinary = torch.zeros(vocab_size, dtype=torch.bool)
    is_ordinary[[i for i in known if i < vocab_size and i not in special]] = True
    is_ordinary[[i for i in end_token_ids if i < vocab_size]] = False
    opening: list[int] = []
    ids = _unused_id(tokenizer, vocab_size, known, end_token_ids) if delimiter is None else None
    if ids is None:
        ids = tokenizer(text=delimiter or FALLBACK_DELIMITER, add_special_tokens=False)["input_ids"]
        if not ids or set(ids) & set(end_token_ids):
            raise ValueError(
                f"`thought_delimiter` is {delimiter!r}, which "
                f"{'holds an end token' if ids else 'has no tokens'}. Give a text that neither ends an answer nor is "
                "common in thoughts, or None for an id that nothing spells."
            )
        opening = _opening_ids(tokenizer, delimiter or "")
    is_ordinary[ids[0]] = False
    if len(opening) == 1:
        is_ordinary[opening[0]] = False
    return ThoughtLaw(tuple(ids), max_length, is_ordinary, tuple(opening))


def thought_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a thought that somebody wrote; text that spells a special token stays text."""
    return tokenizer(text=text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def hindsight_ids(prompt_ids: Sequence[int], answer_ids: Sequence[int], bos_token_id: int | None = None) -> list[int]:
    """What the retrodictor reads: the question, the human's answer, and the question again, where it starts to think.

    It then stands where the imitator stands, with the answer in view, so even untrained it thinks to some purpose.
    """
    again = prompt_ids[1:] if len(prompt_ids) > 1 and prompt_ids[0] == bos_token_id else prompt_ids
    return [*prompt_ids, *answer_ids, *again]


def _unused_id(tokenizer: Any, vocab_size: int, known: set[int], end_token_ids: Sequence[int]) -> list[int] | None:
    taken = {*known, *end_token_ids, *tokenizer.all_special_ids}
    spare = next((i for i in range(vocab_size - 1, -1, -1) if i not in taken), None)
    if spare is not None:
        return [spare]
    named = {str(token) for token in tokenizer.special_tokens_map.values()}
    template = str(tokenizer.chat_template)
    for i, token in sorted(tokenizer.added_tokens_decoder.items()):
        is_taken = i in end_token_ids or token.content in named or token.content in template
        if token.special and not is_taken and _UNUSED.search(token.content):
            return [i]
    return None


def _opening_ids(tokenizer: Any, delimiter: str) -> list[int]:
    """The opening tag of a closing one, where the tokenizer knows both as tokens of their own."""
    tag = _TAG.fullmatch(delimiter.strip())
    known = tokenizer.get_vocab()
    if tag is None or delimiter.strip() not in known or f"<{tag[1]}>" not in known:
        return []
    return [known[f"<{tag[1]}>"]]


def _ranges(ids: Sequence[int]) -> list[list[int]]:
    """First and last of each run of consecutive numbers."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return runs
