"""People who write short notes: a law that is varied, known exactly, and too long for a short memory.

The question is a number of four digits, to base 12. A human opens a note in one of three ways, says the digits as they
were asked for, now and then without one, adds kind words, and closes the note as it was opened. Opening, digits and
words are independent, so the law of an answer is a product, and a judge who knows both laws exists: the oracle.

Who remembers only the last few characters knows everything but how the note was opened. What that costs at least is
computed by enumeration ([`entropy_with_memory`]), whatever the weights, the seed and the training.
"""

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

DIGITS, NUM_ASKED = "0123456789AB", 4  # enough questions for every kind of row
FORGETS = 0.3
FRAMES = {"()": 0.5, "[]": 0.3, "{}": 0.2}  # how a note is opened and closed
WORDS = {"thankyou": 0.4, "goodluck": 0.3, "takecare": 0.2, "farewell": 0.1}
MAX_TOKENS = 1 + NUM_ASKED + 8 + 1 + 1  # the longest answer of a human, its end included
WINDOW, NUM_LAYERS = 6, 2  # of the imitator: each layer sees so many tokens, the one that it stands on included
MEMORY = NUM_LAYERS * (WINDOW - 1) + 1
_RESERVED = 4  # one question in so many is for the judges' language models alone


@cache
def contents(question: str) -> dict[str, float]:
    """Which digits are said, with which probability."""
    digits = question.removesuffix("?")
    law = {digits: 1 - FORGETS}
    for i in range(len(digits)):
        short = digits[:i] + digits[i + 1 :]
        law[short] = law.get(short, 0.0) + FORGETS / len(digits)
    return law


@cache
def law(question: str) -> dict[str, float]:
    """The human's law: every answer that one can give to the question, and its probability."""
    return {
        frame[0] + said + words + frame[1]: p * q * r
        for (frame, p), (said, q), (words, r) in product(FRAMES.items(), contents(question).items(), WORDS.items())
    }


def human_log_prob(questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Nats, exact; -inf where no human ever answers so. [N]."""
    probs = [law(question).get(answer, 0.0) for question, answer in zip(questions, answers, strict=True)]
    return np.array([math.log(p) if p else -math.inf for p in probs])


def entropy(questions: Sequence[str]) -> float:
    """Nats of a human answer to one of these questions, in the mean: no imitator can cost less."""
    laws = [np.array(list(law(question).values())) for question in questions]
    return float(np.mean([-(p * np.log(p)).sum() for p in laws]))


def entropy_with_memory(memory: int = MEMORY) -> float:
    """Nats that nobody undercuts who predicts each token from the last `memory` ones, over all questions:

    sum over tokens t of  H(y_t | the last `memory` tokens, those of the question included)
    """
    seen: Counter[tuple[str, str]] = Counter()
    for digits in product(DIGITS, repeat=NUM_ASKED):
        question = "".join(digits) + "?"
        for answer, p in law(question).items():
            text = f"{question}{answer}\n"
            for end in range(len(question), len(text)):
                seen[text[max(0, end - memory) : end], text[end]] += p
    contexts: Counter[str] = Counter()
    for (context, _), p in seen.items():
        contexts[context] += p
    nats = -sum(p * math.log(p / contexts[context]) for (context, _), p in seen.items())
    return nats / len(DIGITS) ** NUM_ASKED


def questions(num: int, seed: int, reserved: bool = False) -> list[str]:
    """Different questions in random order. The reserved ones are never among the others, whatever the seeds.

    Raises:
        ValueError: there are fewer than `num`.
    """
    asked = ["".join(digits) + "?" for digits in product(DIGITS, repeat=NUM_ASKED)]
    own = [question for question in asked if (zlib.crc32(question.encode()) % _RESERVED == 0) == reserved]
    if num > len(own):
        raise ValueError(f"There are {len(own)} such questions and {num} were asked for. Ask for fewer.")
    order = np.random.default_rng([seed, 5, reserved]).permutation(len(own))[:num]
    return [own[i] for i in order]


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
    letters = sorted(set("".join(WORDS)))
    names = ["<end>", "<pad>", *DIGITS, "?", *"".join(FRAMES), *letters]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def new_model(size: str) -> Qwen3ForCausalLM:
    """An untrained transformer; seed torch before. "small" has a short memory, "large" and "few" see everything."""
    width, window = {"small": (32, WINDOW), "few": (32, None), "large": (64, None)}[size]
    config = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.64 / math.sqrt(width),
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=0,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    return Qwen3ForCausalLM(config)
