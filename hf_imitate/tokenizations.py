"""log p of a *string*, summed over all ways to tokenise it; elsewhere scores are of the canonical token ids alone.

The canonical tokenisation is one of the ways to write a string, so its log-probability is a lower bound of the
string's. What is missing is estimated here, for short answers, by drawing other tokenisations.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_imitate.estimators import effective_sample_size, log_mean_weight
from hf_imitate.rendering import Answer, Rendered, Renderer, canonical_text
from hf_imitate.retrodictive_bounds import log_prob_lower_bound
from hf_imitate.rows import question_key
from hf_imitate.sampling import check_is_law, gumbel_noise, in_fp64, stream_key
from hf_imitate.scoring import answer_logits, check_prompt_ids, num_positions

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"  # what decoders show where bytes are no character
# GPT-2's table: printable Latin-1 stands for itself, the other bytes in turn for U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_SYMBOL = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}


class LongAnswerError(ValueError):
    """Answers too long for tokenisations to be drawn; `indices` says which."""

    def __init__(self, message: str, indices: Sequence[int]):
        super().__init__(message)
        self.indices = list(indices)


class StringLogProb(NamedTuple):
    """Log-probability of each answer as a string. Nats, [N], fp64, on the CPU.

    Attributes:
        nats: log of the mean weight; its exponential is unbiased. -inf where every weight is 0.
        lower_bound: what the string's log p is at least, for each answer on its own, at the asked confidence (Markov).
        effective_sample_size: draws that the estimate rests on, from 1 to the number drawn; 0 if all weights are 0.
    """

    nats: Tensor
    lower_bound: Tensor
    effective_sample_size: Tensor


class Tokenization(NamedTuple):
    """One way to write an answer, as it was drawn.

    Attributes:
        ids: its tokens, without an end token.
        log_weight: log of what the draw counts, nats, at most 0; -inf where `ids` do not read as the answer.
    """

    ids: list[int]
    log_weight: float


class Spellings:
    """The UTF-8 bytes that each token adds to an answer, as its first token and as a later one.

    Byte-level tokenizers and pieces like `<0xE2>` are read byte by byte, so a character may be split among tokens. Of
    other tokenizers, tokens that show no whole character are left out; so are, of all, special tokens and tokens that
    add nothing. What is then summed over is a part of all tokenisations, and still bounds the string from below.

    Args:
        tokenizer: of the model.
        end_token_ids (`Sequence[int]`): they spell nothing.
    """

    def __init__(self, tokenizer: Any, end_token_ids: Sequence[int]):
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        silent = {*special, *tokenizer.all_special_ids, *end_token_ids}
        ids = [token for token in range(len(tokenizer)) if token not in silent]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        kinds = _decoder_kinds(tokenizer)
        if "ByteLevel" in kinds:
            first = later = [_bytes_of_piece(piece or "") for piece in pieces]
        else:
            first, later = _bytes_by_decoding(tokenizer, ids, pieces, "ByteFallback" in kinds)
        self.first, self.later = _ids_by_bytes(ids, first), _ids_by_bytes(ids, later)

    def moves(self, content: bytes) -> list[list[tuple[int, int]]]:
        """For each byte of a text, the tokens that may come there, (token, where it ends), and `[]` for its end.

        Only tokens from which the end can be reached are among them: a draw never runs into a dead end.
        """
        moves: list[list[tuple[int, int]]] = [[] for _ in range(len(content) + 1)]
        for start in reversed(range(len(content))):
            known = self.later if start else self.first
            ends = (end for end in range(start + 1, len(content) + 1) if moves[end] or end == len(content))
            moves[start] = [(token, end) for end in ends for token in known.get(content[start:end], ())]
        return moves


def string_log_prob(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[str | list[dict]],
    *,
    num_estimates: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
    max_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = False,
) -> StringLogProb:
    """Estimate the log-probability that the model writes a string and ends there, however it tokenises it.

        p(string | question)  =  sum over tokenisations of the string of p(tokens, an end token | question)
        nats                  =  log( mean_k weight_k ),    E[weight_k] = p(string | question)

    It is at least the log-probability of the canonical ids, in the mean; see [`draw_tokenizations`] for the weights
    and for what is left out of the sum. The string is the answer as [`~hf_imitate.rendering.canonical_text`] gives it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal LM; of a PEFT model, the active adapter counts. The law is that of temperature 1, untruncated.
        renderer ([`~hf_imitate.rendering.Renderer`]):
            Turns questions and answers into ids, and says how ids read.
        questions (`Sequence[str | list[dict]]`):
            N of them, all plain or all conversational.
        answers (`Sequence[str | list[dict]]`):
            One to each.
        num_estimates (`int`, defaults to 64):
            Tokenisations drawn for each answer, K.
        seed (`int`, defaults to 0):
            Of the draws. Rows have independent draws, also where question and answer are the same.
        confidence (`float`, defaults to 0.95):
            Of `lower_bound`, for each answer on its own.
        max_tokens (`int`, defaults to 64):
            Longest answer that is taken, in canonical tokens.
        batch_size (`int`, defaults to 64):
            Most sequences in one forward.
        progress (`bool`, defaults to `False`):
            Show a progress bar.

    Returns:
        [`StringLogProb`].

    Raises:
        LongAnswerError: an answer is longer than `max_tokens`, the renderer's limit or the model's positions.
        ValueError: a setting is out of range, a question has no tokens, or the model's logits are NaN.

    Source:
        Cao and Rimell, "You should evaluate your language model on marginal likelihood over tokenisations" (2021).
        https://huggingface.co/papers/2109.02550
    """
    settings: dict[str, Any] = {"seed": seed, "max_tokens": max_tokens, "batch_size": batch_size, "progress": progress}
    drawn = draw_tokenizations(model, renderer, questions, answers, num_estimates=num_estimates, **settings)
    weights = [[one.log_weight for one in own] for own in drawn]
    log_weights = torch.tensor(weights, dtype=torch.float64).reshape(len(drawn), num_estimates)
    lower = torch.as_tensor(log_prob_lower_bound(log_weights.numpy(), confidence), dtype=torch.float64)
    return StringLogProb(log_mean_weight(log_weights), lower, effective_sample_size(log_weights))


def draw_tokenizations(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    questions: Sequence[str | list[dict]],
    answers: Sequence[str | list[dict]],
    *,
    num_estimates: int = 64,
    seed: int = 0,
    max_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[Tokenization]]:
    """Draw ways to tokenise each answer, weighted so that the mean weight is the string's probability.

    Token by token the model's law is restricted to the tokens that keep to the string and can still reach its end:

        mass_t  =  sum of p(token | question, tokens so far) over those tokens; at the string's end, over end tokens
        draw    ~  p(token | ...) / mass_t                weight  =  product of the mass_t, one more than tokens

    An answer that no tokens spell has weight 0, and a drawn one that does not read back as the string counts as 0.
    Laws that draws share are read once, and a forward reads them along a whole tokenisation.

    Args:
        model, renderer, questions, answers, num_estimates, seed, max_tokens, batch_size, progress: as in
            [`string_log_prob`].

    Returns:
        `list[list[Tokenization]]`: N lists of K draws.

    Raises:
        LongAnswerError, ValueError: as in [`string_log_prob`].
    """
    sizes = {"num_estimates": num_estimates, "max_tokens": max_tokens, "batch_size": batch_size}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    rows = renderer.human(questions, answers) if questions else []
    check_prompt_ids([row.prompt_ids for row in rows])
    texts = [canonical_text(answer if isinstance(answer, str) else answer[0]["content"]) for answer in answers]
    _check_lengths(model, rows, texts, max_tokens)
    spellings = Spellings(renderer.tokenizer, renderer.end_token_ids)
    drawn: list[list[Tokenization]] = []
    seen: Counter[str] = Counter()
    with tqdm(total=len(rows), desc="tokenising", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            trees: dict[tuple, _Tree] = {}
            walks = []
            for i in range(start, min(start + batch_size, len(rows))):
                purpose = f"tokenization {question_key(answers[i])}"
                pair = f"{purpose} {question_key(questions[i])}"
                place = (tuple(rows[i].prompt_ids), texts[i])
                if place not in trees:
                    trees[place] = _Tree(rows[i].prompt_ids, texts[i], spellings, renderer)
                keys = (stream_key(seed, purpose, questions[i], k, seen[pair]) for k in range(num_estimates))
                walks.append([_Walk(trees[place], key) for key in keys])
                seen[pair] += 1
            _finish(model, renderer, [walk for own in walks for walk in own], batch_size)
            drawn += [[Tokenization(walk.ids, walk.counted()) for walk in own] for own in walks]
            bar.update(len(walks))
    return drawn


def _check_lengths(model: Any, rows: Sequence[Rendered], texts: Sequence[str], max_tokens: int) -> None:
    positions = num_positions(model)
    # A tokenisation may have as many tokens as the text has bytes.
    longest = [len(row.prompt_ids) + len(text.encode()) + 1 for row, text in zip(rows, texts, strict=True)]
    limits = {
        f"are longer than `max_tokens`={max_tokens}. Raise it, at the price of weights that differ more, or": [
            i for i, row in enumerate(rows) if len(row.answer_ids) - row.ended > max_tokens
        ],
        "are cut at the renderer's `max_answer_tokens`, so they have no end. Raise it, or": [
            i for i, row in enumerate(rows) if not row.ended
        ],
        f"could need more positions, byte by byte, than the model's {positions}. Shorten the questions, or": [
            i for i, length in enumerate(longest) if positions is not None and length > positions
        ],
    }
    for what, bad in limits.items():
        if bad:
            raise LongAnswerError(
                f"{len(bad)} of {len(rows)} answers (number {str(bad[:5])[1:-1]}) {what} leave them to the "
                "log-probability of the canonical token ids, which is a lower bound.",
                bad,
            )


class _Law(NamedTuple):
    """What may come after some tokens: (token, where it ends), their law, [M], and its mass in the model's law."""

    moves: list[tuple[int, int]]
    log_law: Tensor
    log_mass: float


class _Tree:
    """The restricted laws of one question's answer, by the tokens before; read from the model when first asked for."""

    def __init__(self, prompt_ids: list[int], text: str, spellings: Spellings, renderer: Renderer):
        self.prompt_ids, self.renderer, self.wanted = prompt_ids, renderer, Answer(text, True)
        content = text.encode()
        self.moves, self.length = spellings.moves(content), len(content)
        self.can_be_spelled = bool(self.moves[0]) or not content
        self.laws: dict[tuple[int, ...], _Law] = {}
        self._reads: dict[tuple[int, ...], bool] = {}
        # The longest token first: few tokens, and near the canonical ones.
        self._longest = [max(moves, key=lambda move: move[1], default=None) for moves in self.moves]

    def row(self, ids: Sequence[int], offset: int) -> Rendered:
        """Tokens up to `offset`, and one way on to the end."""
        answer_ids = list(ids)
        while (move := self._longest[offset]) is not None:
            answer_ids.append(move[0])
            offset = move[1]
        return Rendered(self.prompt_ids, [*answer_ids, self.renderer.end_token_ids[0]], True)

    def keep(self, answer_ids: list[int], ends: list[int], position: int, logits: Tensor) -> None:
        """Keep the law after `position` tokens of a row, from the model's logits there, [V]; `ends` is where each of
        its tokens ends."""
        before = tuple(answer_ids[:position])
        if before in self.laws:
            return
        offset = ends[position]
        allowed = self.moves[offset] or [(token, offset) for token in self.renderer.end_token_ids]
        log_law = torch.log_softmax(in_fp64(logits), dim=0)
        check_is_law(log_law.max()[None])  # not the allowed ones: a mask may leave them no mass
        log_p = log_law[[token for token, _ in allowed]].cpu()
        log_mass = torch.logsumexp(log_p, dim=0)
        self.laws[before] = _Law(allowed, log_p - log_mass, log_mass.item())

    def reads_back(self, ids: list[int]) -> bool:
        """Whether these tokens and an end read as the answer."""
        place = tuple(ids)
        if place not in self._reads:
            self._reads[place] = self.renderer.read([*ids, self.renderer.end_token_ids[0]]) == self.wanted
        return self._reads[place]


class _Walk:
    """One draw on its way through a tree."""

    def __init__(self, tree: _Tree, key: bytes):
        self.tree, self.key = tree, key
        self.ids: list[int] = []
        self.offset = 0
        self.log_weight = 0.0 if tree.can_be_spelled else -torch.inf
        self.is_over = not tree.can_be_spelled

    def go_on(self) -> None:
        """Draw tokens as far as laws are known."""
        while not self.is_over and (law := self.tree.laws.get(tuple(self.ids))) is not None:
            self.log_weight += law.log_mass
            self.is_over = self.offset == self.tree.length or law.log_mass == -torch.inf
            if not self.is_over:
                noise = gumbel_noise([self.key], [len(self.ids)], len(law.moves))[0]
                token, self.offset = law.moves[int((law.log_law + noise).argmax())]
                self.ids.append(token)

    def counted(self) -> float:
        """Log weight, -inf where the tokens are not the answer."""
        is_answer = self.log_weight > -torch.inf and self.tree.reads_back(self.ids)
        return self.log_weight if is_answer else -torch.inf


def _finish(model: Any, renderer: Renderer, walks: list[_Walk], batch_size: int) -> None:
    """Let all walks go on to their ends, reading the laws that they miss."""
    pad = renderer.tokenizer.pad_token_id
    while True:
        for walk in walks:
            walk.go_on()
        walks = [walk for walk in walks if not walk.is_over]
        if not walks:
            return
        missing = {(id(walk.tree), tuple(walk.ids)): walk for walk in walks}.values()
        rows = [walk.tree.row(walk.ids, walk.offset) for walk in missing]
        places = [_ends(walk, row.answer_ids) for walk, row in zip(missing, rows, strict=True)]
        trees = [(walk.tree, len(walk.ids)) for walk in missing]
        for batch in answer_logits(model, rows, renderer.end_token_ids[0] if pad is None else pad, batch_size):
            for number, (i, position) in enumerate(zip(batch.row.tolist(), batch.position.tolist(), strict=True)):
                tree, known = trees[i]
                if position >= known:
                    tree.keep(rows[i].answer_ids, places[i], position, batch.logits[number])


def _ends(walk: _Walk, answer_ids: list[int]) -> list[int]:
    """Where in the text each prefix of a row ends, from no tokens to all of them but the end token."""
    ends = [0]
    for token in answer_ids[:-1]:
        ends.append(next(end for other, end in walk.tree.moves[ends[-1]] if other == token))
    return ends


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """Names of the steps in which a fast tokenizer turns pieces into text; none are known of others."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return set() if decoder is None else set(re.findall(r'"type": ?"(\w+)"', decoder.__getstate__().decode()))


def _bytes_of_piece(piece: str) -> bytes:
    # A piece with any other symbol is an added token, which stands for itself.
    if all(symbol in _BYTE_OF_SYMBOL for symbol in piece):
        return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in piece)
    return piece.encode()


def _bytes_by_decoding(
    tokenizer: Any, ids: list[int], pieces: list[str], has_byte_pieces: bool
) -> tuple[list[bytes], list[bytes]]:
    """What each token shows at an answer's start, and after another token; nothing where it shows no character."""
    decode = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    alone = tokenizer.batch_decode([[token] for token in ids], **decode)
    anchor = next((i for i, shown in enumerate(alone) if shown.strip() and _REPLACEMENT not in shown), 0)
    after = tokenizer.batch_decode([[ids[anchor], token] for token in ids], **decode) if ids else []
    first: list[bytes] = []
    later: list[bytes] = []
    for piece, shown, together in zip(pieces, alone, after, strict=True):
        byte = _BYTE_PIECE.fullmatch(piece or "") if has_byte_pieces else None
        added = together.removeprefix(alone[anchor]) if together.startswith(alone[anchor]) else _REPLACEMENT
        for shows, spelled in ((shown, first), (added, later)):
            known = b"" if _REPLACEMENT in shows else shows.encode()
            spelled.append(bytes([int(byte[1], 16)]) if byte else known)
    return first, later


def _ids_by_bytes(ids: Sequence[int], spelled: Sequence[bytes]) -> dict[bytes, list[int]]:
    known: dict[bytes, list[int]] = {}
    for token, content in zip(ids, spelled, strict=True):
        if content:
            known.setdefault(content, []).append(token)
    return known
