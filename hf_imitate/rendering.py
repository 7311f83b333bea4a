"""Row -> token ids. The only file that decides which tokens are scored, for humans and imitators alike.

An answer's tokens are those a *sampled* answer could have: its content, then one end token if it ended, nothing after.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    """What one side wrote.

    Attributes:
        text (`str`): the answer without any end marker.
        ended (`bool`): `True` if it ended by itself, `False` if it was cut at the length limit.
    """

    text: str
    ended: bool


class Rendered(NamedTuple):
    """Token ids of a question and of one answer to it; `answer_ids` holds the end token exactly if `ended`."""

    prompt_ids: list[int]
    answer_ids: list[int]
    ended: bool


class Batch(NamedTuple):
    """Right-padded rows. `answer_mask` is 1 on the answer's tokens, its end token included. All [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor


def canonical_text(text: str) -> str:
    """One spelling for texts no reader can tell apart: NFC, `\\n` newlines, no blanks at the end of a line or answer.

    Leading whitespace stays: in prompt-completion data it belongs to the answer's first token.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip()


class Renderer:
    """Turns questions and answers into token ids, and sampled ids back into answers.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model that reads the ids.
        end_token_ids (`Sequence[int]`):
            Every id that ends an answer, the model's first choice first (`generation_config.eos_token_id`).
        max_answer_tokens (`int`, *optional*):
            Longest answer in tokens, its end token included, at least 1. Longer answers are cut and carry no end
            token, the way a sampled answer is cut. `None` cuts nothing.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template of conversational questions.

    Raises:
        ValueError: `end_token_ids` is empty: without an end token log p of an answer is not defined; or
            `max_answer_tokens` leaves no room for a token.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_token_ids: Sequence[int],
        max_answer_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        if not end_token_ids:
            raise ValueError(
                "The tokenizer and the generation config name no end token, so an answer has no end and no proper "
                "log-probability. Set `tokenizer.eos_token` or `model.generation_config.eos_token_id`."
            )
        if max_answer_tokens is not None and max_answer_tokens < 1:
            raise ValueError(
                f"`max_answer_tokens` is {max_answer_tokens}; the end token alone needs 1. Set None for no limit."
            )
        self.tokenizer = tokenizer
        self.end_token_ids = list(end_token_ids)
        self.max_answer_tokens = max_answer_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._turn_end: int | None = None

    def prompt_ids(self, prompts: Sequence[str | list]) -> list[list[int]]:
        """Token ids of each question, up to where the answer starts; the very ids that generation continues."""
        if not prompts:
            return []
        if isinstance(prompts[0], str):
            return self.tokenizer(text=list(prompts))["input_ids"]
        return self.tokenizer.apply_chat_template(
            conversation=list(prompts),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )["input_ids"]

    def answer_ids(self, texts: Sequence[str], ended: Sequence[bool], conversational: bool = False) -> list[Rendered]:
        """Token ids of answers; text that spells a special token stays text. `prompt_ids` of the result are empty."""
        if not texts:
            return []
        contents = self.tokenizer(text=list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        end = self.turn_end_id if conversational else self.end_token_ids[0]
        rows = []
        for content, is_ended in zip(contents, ended, strict=True):
            ids = [*content, end] if is_ended else list(content)
            limit = self.max_answer_tokens or len(ids)
            rows.append(Rendered([], ids[:limit], is_ended and len(ids) <= limit))
        return rows

    def human(self, prompts: Sequence[str | list], completions: Sequence[str | list]) -> list[Rendered]:
        """Questions with the humans' answers, cut at `max_answer_tokens` exactly as a sampled answer is cut."""
        if not prompts:
            return []
        conversational = not isinstance(prompts[0], str)
        texts = [canonical_text(c if isinstance(c, str) else c[0]["content"]) for c in completions]
        answers = self.answer_ids(texts, [True] * len(texts), conversational)
        return [answer._replace(prompt_ids=ids) for ids, answer in zip(self.prompt_ids(prompts), answers, strict=True)]

    def read(self, completion_ids: Sequence[int]) -> Answer:
        """The answer that sampled ids spell, up to the first end token.

        Special tokens other than the end stay visible as text: a human never writes them.
        """
        content = list(completion_ids)
        end = next((i for i, token in enumerate(content) if token in self.end_token_ids), None)
        text = self.tokenizer.decode(content[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Answer(text, end is not None)

    @property
    def turn_end_id(self) -> int:
        """The end token that the chat template itself closes an answer with: the first one after the answer's text.

        The first of `end_token_ids` where the template closes with none of them.
        """
        if self._turn_end is None:
            answer = "The answer to look for."
            messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.chat_template_kwargs)
            _, found, closing = text.rpartition(answer)
            ids = self.tokenizer(text=closing, add_special_tokens=False)["input_ids"] if found else []
            self._turn_end = next((token for token in ids if token in self.end_token_ids), self.end_token_ids[0])
        return self._turn_end


def collate(rows: Sequence[Rendered], pad_token_id: int, device: torch.device | str = "cpu") -> Batch:
    """Right-pad rows into one batch. The pad id is never scored, so it may equal the end token.

    Raises:
        ValueError: a question has no tokens, so nothing would predict its answer's first one.
    """
    empty = [i for i, row in enumerate(rows) if not row.prompt_ids]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(rows)} questions in this batch have no tokens, the first is number {empty[0]}: a "
            "causal LM has no law for an answer's first token with nothing before it. Leave empty questions out, or "
            "use a tokenizer that puts a start token first."
        )
    length = max(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    answer_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        start, stop = len(row.prompt_ids), len(row.prompt_ids) + len(row.answer_ids)
        input_ids[i, :stop] = torch.tensor(row.prompt_ids + row.answer_ids)
        attention_mask[i, :stop] = 1
        answer_mask[i, start:stop] = 1
    return Batch(input_ids.to(device), attention_mask.to(device), answer_mask.to(device))


def end_token_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Every id that ends an answer, by TRL's rule: the model's end tokens, led by the tokenizer's where unlisted."""
    ids = generation_config.eos_token_id if generation_config is not None else None
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [tokenizer.eos_token_id, *ids]
    return ids
