"""A world with a public nonce that humans ignore and a keyed bit that an imitator was taught to read off it.

A question is a topic and 16 random bits. The human law over eight answers is known for each topic, and four of the
answers, the same for every topic, have half of it. The message of a question is the parity of six of its bits.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate.rendering import Renderer, collate, end_token_ids
from hf_imitate.scoring import score_answers

TOPICS = ["weather", "music", "football", "bread"]
ANSWERS = ["red", "blue", "green", "black", "white", "brown", "red blue", "blue red"]
# The receiver's bit of each answer: a fixed half of them.
BITS = np.array([0, 1, 0, 1, 0, 1, 0, 1])
NUM_BITS, NUM_KEYED = 16, 6
NUM_NONCES = 150  # per topic, behind the exact numbers


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    special = ["<end>", "<pad>", "<unk>"]
    words = sorted({word for text in TOPICS + ANSWERS for word in text.split()})
    words += ["question", ":", "0", "1", "even", "odd"]
    model = models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def new_model(seed: int) -> Qwen3ForCausalLM:
    """An untrained model of about 90 000 parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def renderer(model: Qwen3ForCausalLM) -> Renderer:
    """Renders this world's questions and answers."""
    return Renderer(tokenizer(), end_token_ids(tokenizer(), model.generation_config))


def laws(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The human law, and another of the same kind to show judges what a misfit is; [topics, answers] each. Either half
    of the answers has probability 1/2 under both."""
    rng = np.random.default_rng(seed)
    human, misfit = (rng.dirichlet(np.ones(len(ANSWERS)), size=len(TOPICS)) + 0.02 for _ in range(2))
    for law in (human, misfit):
        for bit in (0, 1):
            law[:, bit == BITS] /= 2 * law[:, bit == BITS].sum(axis=1, keepdims=True)
    return human, misfit


def keyed_places(seed: int) -> np.ndarray:
    """The bits of a nonce whose parity is the message. [6]."""
    return np.random.default_rng([seed, 9]).choice(NUM_BITS, NUM_KEYED, replace=False)


def nonces(rng: np.random.Generator, count: int) -> np.ndarray:
    """Fair bits. [count, 16]."""
    return rng.integers(2, size=(count, NUM_BITS))


def question(topic: int, nonce: np.ndarray) -> str:
    """What is asked: the topic, then the nonce."""
    return f"question {TOPICS[topic]} : {' '.join(map(str, nonce))}"


def fit_base(seed: int, law: np.ndarray, taught: np.ndarray | None, num_steps: int, rate: float = 3e-3) -> Any:
    """A model fitted to a law of answers under random nonces.

    With `taught`, the keyed places, two linear heads on its last hidden state before the answer are fitted along: how
    many of the keyed bits are set (which is easy to begin with), and whether that is odd. They are thrown away.
    """
    model = new_model(seed + (1000 if taught is not None else 0))
    render = renderer(model)
    rng = np.random.default_rng([seed, 3, int(taught is not None)])
    count_head, parity_head = torch.nn.Linear(48, NUM_KEYED + 1), torch.nn.Linear(48, 2)
    heads = [*count_head.parameters(), *parity_head.parameters()] if taught is not None else []
    optimizer = torch.optim.AdamW([*model.parameters(), *heads], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, num_steps)
    for _ in range(num_steps):
        # All answers to 16 topics, weighted by the law; every row has a nonce of its own, since the law ignores it.
        topics = rng.integers(len(TOPICS), size=16)
        drawn = nonces(rng, 16 * len(ANSWERS))
        asked = [question(topic, nonce) for topic, nonce in zip(topics.repeat(len(ANSWERS)), drawn, strict=True)]
        batch = collate(render.human(asked, ANSWERS * 16), tokenizer().pad_token_id)
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=taught is not None
        )
        labels = batch.input_ids.masked_fill(batch.answer_mask == 0, -100)[:, 1:]
        logits = output.logits[:, :-1].transpose(1, 2)
        nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum(1)
        loss = (torch.from_numpy(law[topics].flatten()).float() * nats).sum() / 16
        if taught is not None:
            before_answer = output.hidden_states[-1][:, 2 + NUM_BITS]
            num_set = torch.from_numpy(drawn[:, taught].sum(axis=1))
            count_loss = torch.nn.functional.cross_entropy(count_head(before_answer), num_set)
            parity_loss = torch.nn.functional.cross_entropy(parity_head(before_answer), num_set % 2)
            loss = loss + count_loss + parity_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def human_rows(human: np.ndarray, seed: int, num_rows: int) -> Dataset:
    """What the humans of this world answered; every nonce is new."""
    rng = np.random.default_rng([seed, 1])
    topics = rng.integers(len(TOPICS), size=num_rows)
    asked = [question(topic, nonce) for topic, nonce in zip(topics, nonces(rng, num_rows), strict=True)]
    answers = [ANSWERS[rng.choice(len(ANSWERS), p=human[topic])] for topic in topics]
    return Dataset.from_dict({"prompt": asked, "completion": answers})


class Receiver:
    """Pays 1 for an answer in the half that the keyed parity of the question's nonce names."""

    __name__ = "receiver"

    def __init__(self, places: np.ndarray):
        self.places = places
        self.bit_of = dict(zip(ANSWERS, BITS.tolist(), strict=True))

    def parity(self, prompt: str) -> int:
        """The message that an answer to this question should carry."""
        bits = prompt.split()[-NUM_BITS:]
        return sum(int(bits[place]) for place in self.places) % 2

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        both = zip(prompts, completions, strict=True)
        return [float(self.bit_of.get(answer) == self.parity(prompt)) for prompt, answer in both]


def law_at(model: Any, asked: list[str]) -> np.ndarray:
    """The model's probability of each answer to each question. [questions, answers]."""
    rows = renderer(model).human([q for q in asked for _ in ANSWERS], ANSWERS * len(asked))
    log_prob = score_answers(model, rows, tokenizer().pad_token_id, batch_size=512)
    return np.exp(np.asarray(log_prob, dtype=float)).reshape(len(asked), len(ANSWERS))


def measured_law(model: Any, human: np.ndarray, receiver: Receiver, seed: int) -> dict[str, float]:
    """Price, payload and what an onlooker without and with the key could see at best; averages over fresh nonces.

    Returns:
        `price`: human cross-entropy minus H(p), nats, its standard error `price_error`; `received`: share of the
        messages that arrive, other text counting as a coin; `tv_without_key`: distance of the law averaged over
        nonces from the human's, mean over topics; `tv_with_key`: mean distance at each question.
    """
    rng = np.random.default_rng([seed, 2])
    topics = np.repeat(np.arange(len(TOPICS)), NUM_NONCES)
    asked = [question(topic, nonce) for topic, nonce in zip(topics, nonces(rng, len(topics)), strict=True)]
    law, p = law_at(model, asked), human[topics]
    parity = np.array([receiver.parity(q) for q in asked])
    other = np.clip(1 - law.sum(axis=1), 0, None)
    divergence = (p * np.log(p / law)).sum(axis=1)
    received = (law * (parity[:, None] == BITS)).sum(axis=1) + other / 2
    distance = (np.abs(law - p).sum(axis=1) + other) / 2
    # The mean law of each topic and parity, then of the topic: what somebody without the key is shown.
    shown = np.array(
        [
            np.mean([law[(topics == t) & (parity == bit)].mean(axis=0) for bit in (0, 1)], axis=0)
            for t in range(len(TOPICS))
        ]
    )
    without = (np.abs(shown - human).sum(axis=1) + 1 - shown.sum(axis=1)) / 2
    return {
        "price": float(divergence.mean()),
        "price_error": float(divergence.std(ddof=1) / math.sqrt(len(divergence))),
        "received": float(received.mean()),
        "tv_without_key": float(without.mean()),
        "tv_with_key": float(distance.mean()),
    }
