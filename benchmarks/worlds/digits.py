"""People who write down a few digits, each in a way of their own: a law that is varied, and known exactly.

The question is four or five different digits in random order. A human orders them (ascending, descending, backwards,
or the even ones first), now and then forgets one, and writes the rest in one style: a separator, brackets or none, an
exclamation mark or none. How the digits are said and how they are written are independent, so the law of an answer is
a product of two short tables, and a judge who knows both laws exists: the oracle.
"""

import math
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LENGTHS = {4: 0.25, 5: 0.75}  # how many digits are asked for, and how often
ORDERS = {"ascending": 0.40, "descending": 0.25, "backwards": 0.20, "even first": 0.15}
FORGETS = 0.3
SEPARATORS = {"": 0.5, ",": 0.3, ";": 0.2}
BRACKETED, EXCLAIMED = 0.4, 0.2
MAX_TOKENS = 5 + 4 + 2 + 1 + 1  # the longest answer of a human, its end included
SIZES = {"small": (16, 32, 2, 0.2), "large": (64, 192, 4, 0.08)}  # width, inner width, heads, initial spread
_RESERVED = 4  # one question in so many is for the judges' language models alone


def ordered(digits: str, order: str) -> str:
    """The digits in one of the four orders."""
    if order == "ascending":
        return "".join(sorted(digits))
    if order == "descending":
        return "".join(sorted(digits, reverse=True))
    if order == "backwards":
        return digits[::-1]
    return "".join(sorted(digits, key=lambda digit: int(digit) % 2))  # stable: as asked within each half


@cache
def contents(question: str) -> dict[str, float]:
    """Which digits are said, in which order, with which probability."""
    digits = question.removesuffix("?")
    law: dict[str, float] = {}
    for order, p in ORDERS.items():
        said = ordered(digits, order)
        law[said] = law.get(said, 0.0) + p * (1 - FORGETS)
        for i in range(len(said)):
            short = said[:i] + said[i + 1 :]
            law[short] = law.get(short, 0.0) + p * FORGETS / len(said)
    return law


@cache
def styles() -> dict[tuple[str, bool, bool], float]:
    """Separator, brackets, exclamation mark; with which probability."""
    return {
        (separator, bracketed, exclaimed): p
        * (BRACKETED if bracketed else 1 - BRACKETED)
        * (EXCLAIMED if exclaimed else 1 - EXCLAIMED)
        for separator, p in SEPARATORS.items()
        for bracketed in (True, False)
        for exclaimed in (True, False)
    }


def written(said: str, separator: str, bracketed: bool, exclaimed: bool) -> str:
    """One answer, as it stands."""
    text = separator.join(said)
    return (f"({text})" if bracketed else text) + "!" * exclaimed


@cache
def law(question: str) -> dict[str, float]:
    """The human's law: every answer that one can give to the question, and its probability."""
    return {
        written(said, *style): p * q for (said, p), (style, q) in product(contents(question).items(), styles().items())
    }


def human_log_prob(questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Nats, exact; -inf where no human ever answers so. [N]."""
    probs = [law(question).get(answer, 0.0) for question, answer in zip(questions, answers, strict=True)]
    return np.array([math.log(p) if p else -math.inf for p in probs])


def entropy(questions: Sequence[str]) -> float:
    """Nats of a human answer to one of these questions, in the mean: no imitator can cost less."""
    laws = [np.array(list(law(question).values())) for question in questions]
    return float(np.mean([-(p * np.log(p)).sum() for p in laws]))


def questions(num: int, seed: int, reserved: bool = False) -> list[str]:
    """Different questions. The reserved ones are never among the others, whatever the seeds."""
    rng = np.random.default_rng([seed, 5, reserved])
    found: dict[str, None] = {}
    while len(found) < num:
        length = int(rng.choice(list(LENGTHS), p=list(LENGTHS.values())))
        question = "".join(map(str, rng.permutation(10)[:length])) + "?"
        if (zlib.crc32(question.encode()) % _RESERVED == 0) == reserved:
            found[question] = None
    return list(found)


def human_rows(asked: Sequence[str], seed: int) -> Dataset:
    """One human answer to each question."""
    rng = np.random.default_rng([seed, 6])
    answers = []
    for question in asked:
        own = law(question)
        answers.append(list(own)[rng.choice(len(own), p=list(own.values()))])
    return Dataset.from_dict({"prompt": list(asked), "completion": answers})


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    names = ["<end>", "<pad>", *"0123456789?,;()!"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def new_config(size: str) -> Qwen3Config:
    """A transformer of two layers: "small" has too few weights for this law, "large" has not."""
    width, inner, heads, spread = SIZES[size]
    return Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )


def new_model(size: str) -> Qwen3ForCausalLM:
    """An untrained model; seed torch before."""
    return Qwen3ForCausalLM(new_config(size))
