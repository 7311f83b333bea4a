"""Row -> token ids. The only file that decides which tokens are scored, for humans and imitators alike.

An answer's tokens are those a *sampled* answer could have: its content, then one end token if it ended, nothing after.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPLETION_ROLES = ("assistant", "user", "alternating")
# Stands in for the words that are not there yet; a template cannot tell it from any other text.
_PLACEHOLDER = "hf-imitate-opens-a-turn-here"


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


def next_speaker(messages: Sequence[dict[str, Any]]) -> str:
    """Who speaks next where two take turns, `"user"` or `"assistant"`: the user opens a conversation and follows the
    assistant; everyone else is followed by the assistant."""
    last = messages[-1]["role"] if messages else "system"
    return "user" if last in ("assistant", "system", "developer") else "assistant"


class TurnError(ValueError):
    """A chat template cannot open the asked turn after some questions; `indices` says after which."""

    def __init__(self, message: str, indices: Sequence[int]):
        super().__init__(message)
        self.indices = list(indices)


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
        completion_role (`str`, *optional*, defaults to `"assistant"`):
            Whose turn a conversation's answer is: `"assistant"`; `"user"`, for user simulation; or `"alternating"`,
            the turn of whoever [`next_speaker`] says.

    Raises:
        ValueError: `end_token_ids` is empty: without an end token log p of an answer is not defined; or
            `max_answer_tokens` leaves no room for a token; or there is no such role.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_token_ids: Sequence[int],
        max_answer_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        completion_role: str = "assistant",
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
        if completion_role not in COMPLETION_ROLES:
            raise ValueError(f"`completion_role` is {completion_role!r}; need one of {list(COMPLETION_ROLES)}.")
        self.tokenizer = tokenizer
        self.end_token_ids = list(end_token_ids)
        self.max_answer_tokens = max_answer_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.completion_role = completion_role
        self._turn_ends: dict[str, int] = {}

    def role_after(self, prompt: Sequence[dict[str, Any]]) -> str:
        """Who answers this conversation, `"assistant"` or `"user"`."""
        return next_speaker(prompt) if self.completion_role == "alternating" else self.completion_role

    def as_completion(self, prompt: str | list, text: str) -> str | list[dict[str, str]]:
        """An answer's text in the form that the data set has answers in."""
        return text if isinstance(prompt, str) else [{"role": self.role_after(prompt), "content": text}]

    def tidy(self, completions: Sequence[str | list[dict[str, Any]]]) -> list[str | list[dict[str, Any]]]:
        """Answers in the data set's form with their texts in canonical spelling: what a check is shown."""
        return [
            canonical_text(one)
            if isinstance(one, str)
            else [*one[:-1], {**one[-1], "content": canonical_text(one[-1]["content"])}]
            for one in completions
        ]

    def in_their_roles(self, prompts: Sequence[str | list], completions: Sequence[str | list]) -> list[str | list]:
        """Sampled answers, each message in the role whose turn was opened for it; plain text as it is."""
        return [
            answer
            if isinstance(prompt, str) or isinstance(answer, str)
            else [{**message, "role": self.role_after(prompt)} for message in answer]
            for prompt, answer in zip(prompts, completions, strict=True)
        ]

    def prompt_ids(self, prompts: Sequence[str | list]) -> list[list[int]]:
        """Token ids of each question, up to where the answer starts; the very ids that generation continues.

        A conversation ends with the header of the answer's turn: the assistant's is the template's own generation
        prompt; the user's is what the template puts before the content of a user's message that follows.

        Raises:
            TurnError: the template cannot open that turn.
            ValueError: the questions are conversations, and the tokenizer has no chat template.
        """
        if not prompts:
            return []
        if isinstance(prompts[0], str):
            different = list(dict.fromkeys(prompts))
            ids_of = dict(zip(different, self.tokenizer(text=different)["input_ids"], strict=True))
            return [list(ids_of[prompt]) for prompt in prompts]
        ids: dict[int, list[int]] = {}
        conversations = [prompt for prompt in prompts if not isinstance(prompt, str)]
        roles = [self.role_after(prompt) for prompt in conversations]
        for role in sorted(set(roles)):
            asked = [i for i, other in enumerate(roles) if other == role]
            ids |= zip(asked, self._opened_turns([conversations[i] for i in asked], role, asked), strict=True)
        return [ids[i] for i in range(len(prompts))]

    def _opened_turns(self, prompts: list[list], role: str, numbers: Sequence[int]) -> list[list[int]]:
        try:
            return self._templated(prompts, role)
        except Exception:
            refused = {number: self._refusal(prompt, role) for number, prompt in zip(numbers, prompts, strict=True)}
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "The questions are conversations, and the tokenizer has no chat template. Pass a tokenizer that has "
                "one (`processing_class`), set `tokenizer.chat_template`, or give plain text."
            ) from None
        bad = [number for number, kind in refused.items() if kind] or list(numbers)
        kinds = sorted({kind for kind in refused.values() if kind}) or ["only together"]
        # The template's own words may quote a message, so they are not passed on.
        raise TurnError(
            f"The chat template cannot open the {role}'s turn after {len(bad)} of {len(prompts)} questions (number "
            f"{str(bad[:5])[1:-1]}; {', '.join(kinds)}). See what it says with `tokenizer.apply_chat_template`, and "
            "change these questions, the template or the role of the answers.",
            bad,
        ) from None

    def _refusal(self, prompt: list, role: str) -> str | None:
        try:
            self._templated([prompt], role)
        except Exception as error:
            return type(error).__name__
        return None

    def _templated(self, prompts: list[list], role: str) -> list[list[int]]:
        if role == "assistant":
            opened = {"conversation": prompts, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
            return self.tokenizer.apply_chat_template(**opened, **self.chat_template_kwargs)["input_ids"]
        following = [[*prompt, {"role": role, "content": _PLACEHOLDER}] for prompt in prompts]
        texts = self.tokenizer.apply_chat_template(following, tokenize=False, **self.chat_template_kwargs)
        parts = [text.split(_PLACEHOLDER) for text in texts]
        if any(len(part) != 2 for part in parts):
            raise ValueError("The template does not show a message's content exactly once.")
        # The template has put in every special token already.
        return self.tokenizer(text=[before for before, _ in parts], add_special_tokens=False)["input_ids"]

    def answer_ids(
        self,
        texts: Sequence[str],
        ended: Sequence[bool],
        conversational: bool = False,
        roles: Sequence[str] | None = None,
    ) -> list[Rendered]:
        """Token ids of answers; text that spells a special token stays text. `prompt_ids` of the result are empty.

        `roles` says who gave each answer of a conversation, where not all are of one role.
        """
        if not texts:
            return []
        contents = self.tokenizer(text=list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not conversational:
            ends = [self.end_token_ids[0]] * len(texts)
        else:
            ends = [self.turn_end_id] * len(texts) if roles is None else [self._turn_end(role) for role in roles]
        rows = []
        for content, is_ended, end in zip(contents, ended, ends, strict=True):
            ids = [*content, end] if is_ended else list(content)
            limit = self.max_answer_tokens or len(ids)
            rows.append(Rendered([], ids[:limit], is_ended and len(ids) <= limit))
        return rows

    def given(self, prompts: Sequence[str | list], answers: Sequence[Answer]) -> list[Rendered]:
        """Questions with answers that somebody gave, each ended as its role's turn is, if it ended."""
        roles = [self.role_after(prompt) for prompt in prompts if not isinstance(prompt, str)]
        texts, ended = [answer.text for answer in answers], [answer.ended for answer in answers]
        rows = self.answer_ids(texts, ended, bool(roles), roles or None)
        return [row._replace(prompt_ids=ids) for ids, row in zip(self.prompt_ids(prompts), rows, strict=True)]

    def human(self, prompts: Sequence[str | list], completions: Sequence[str | list]) -> list[Rendered]:
        """Questions with the humans' answers, cut at `max_answer_tokens` exactly as a sampled answer is cut.

        Raises:
            ValueError: a message answers in another role than the one whose turn is opened for it.
        """
        if not prompts:
            return []
        roles = [self.role_after(prompt) for prompt in prompts if not isinstance(prompt, str)]
        for i, (role, completion) in enumerate(zip(roles, completions, strict=False)):
            if not isinstance(completion, str) and completion[0]["role"] != role:
                raise ValueError(
                    f"Answer {i} is of another role than '{role}', whose turn is opened after its question "
                    f"(`completion_role`={self.completion_role!r}). Give the answer that role, or set "
                    "`completion_role`."
                )
        texts = [canonical_text(c if isinstance(c, str) else c[0]["content"]) for c in completions]
        questions = self.prompt_ids(prompts)
        answers = self.answer_ids(texts, [True] * len(texts), bool(roles), roles)
        return [answer._replace(prompt_ids=ids) for ids, answer in zip(questions, answers, strict=True)]

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
        return self._turn_end("assistant" if self.completion_role == "alternating" else self.completion_role)

    def _turn_end(self, role: str) -> int:
        if role not in self._turn_ends:
            ids = closing_ids(self.tokenizer, role, self.chat_template_kwargs)
            self._turn_ends[role] = next((i for i in ids if i in self.end_token_ids), self.end_token_ids[0])
        return self._turn_ends[role]


def closing_ids(
    tokenizer: Any, role: str = "assistant", chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Token ids that the chat template puts after the content of a message of `role`; none if it shows no content."""
    answer = "The answer to look for."
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    if role == "user":
        messages = [{"role": "user", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **(chat_template_kwargs or {}))
    except Exception:  # a template may refuse a conversation that is not of its kind
        return []
    _, found, closing = text.rpartition(answer)
    return tokenizer(text=closing, add_special_tokens=False)["input_ids"] if found else []


def closing_id(
    tokenizer: Any, role: str = "assistant", chat_template_kwargs: dict[str, Any] | None = None
) -> int | None:
    """The special token that the chat template closes a message of `role` with; `None` where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in closing_ids(tokenizer, role, chat_template_kwargs) if token in special), None)


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
    texts = [[*row.prompt_ids, *row.answer_ids] for row in rows]
    length = max(map(len, texts))
    input_ids = torch.tensor([text + [pad_token_id] * (length - len(text)) for text in texts])
    start, stop = (torch.tensor([[len(ids)] for ids in own]) for own in ([row.prompt_ids for row in rows], texts))
    is_read = torch.arange(length) < stop
    is_answer = is_read & (torch.arange(length) >= start)
    return Batch(input_ids.to(device), is_read.long().to(device), is_answer.long().to(device))


def end_token_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Every id that ends an answer, by TRL's rule: the model's end tokens, led by the tokenizer's where unlisted."""
    ids = generation_config.eos_token_id if generation_config is not None else None
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [tokenizer.eos_token_id, *ids]
    return ids
