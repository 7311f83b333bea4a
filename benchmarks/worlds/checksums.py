"""A world where thinking pays: a check digit is asked for, and few humans wrote their running sums down.

The question is six digits. A human's thought is the six running sums modulo 10, the answer is the last of them. Read
off a million possible questions at once it is a sum modulo 10 of six digits, which a network this size does not learn
from a few thousand of them; one step of the thought needs two digits. In the twin world, where thoughts cannot help,
the answer is the first digit, four times in five, else any digit: the same thoughts say nothing more.
"""

from functools import cache

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NUM_DIGITS, BASE, NOISE = 6, 10, 0.2
BASE_STEPS, BASE_BATCH, BASE_RATE = 600, 32, 3e-3


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit; the model has one more row of embeddings, which closes thoughts."""
    names = [*map(str, range(BASE)), "<end>", "<pad>"]
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def new_base(seed: int) -> Qwen3ForCausalLM:
    """A model of about 100 000 parameters that has read digits said three times, and knows no sum."""
    config = Qwen3Config(
        vocab_size=len(tokenizer()) + 1,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, BASE_STEPS)
    generator = torch.Generator().manual_seed(seed)
    end = torch.full((BASE_BATCH, 1), tokenizer().eos_token_id)
    for step in range(BASE_STEPS):
        digits, other = (torch.randint(0, BASE, (BASE_BATCH, n), generator=generator) for n in (NUM_DIGITS, 1))
        between = [other, end] if step % 2 else []
        ids = torch.cat([digits, *between, digits, digits, end], dim=1)
        start = ids.shape[1] - 2 * NUM_DIGITS - 1
        logits = model(input_ids=ids).logits[:, start - 1 : -1]
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, start:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def human_rows(num_rows: int, num_known: int, seed: int, thoughts_help: bool = True) -> Dataset:
    """Rows of different questions; the first `num_known` of them have the human's thought."""
    rng = np.random.default_rng(seed)
    numbers = rng.choice(BASE**NUM_DIGITS, num_rows, replace=False)
    digits = numbers[:, None] // BASE ** np.arange(NUM_DIGITS) % BASE
    sums = digits.cumsum(axis=1) % BASE
    answers = sums[:, -1] if thoughts_help else digits[:, 0]
    if not thoughts_help:
        answers = np.where(rng.random(num_rows) < NOISE, rng.integers(0, BASE, num_rows), answers)
    return Dataset.from_dict(
        {
            "prompt": _spelled(digits),
            "completion": [str(answer) for answer in answers],
            "thought": [text if i < num_known else None for i, text in enumerate(_spelled(sums))],
        }
    )


def entropy(thoughts_help: bool) -> float:
    """Nats of a human answer given its question: no imitator can cost less in the mean."""
    if thoughts_help:
        return 0.0
    law = np.full(BASE, NOISE / BASE)
    law[0] += 1 - NOISE
    return float(-(law * np.log(law)).sum())


def _spelled(digits: np.ndarray) -> list[str]:
    return [" ".join(map(str, row)) for row in digits]
