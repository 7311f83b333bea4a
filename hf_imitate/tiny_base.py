"""A small base model, trained here where none can be downloaded: for the demo, the examples and the tests.

It has read the running Python's prose and none of the questions and answers of [`load_docstrings`].
"""

import hashlib
import json
import logging
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate.docstrings import PROSE_VERSION, load_docstrings, load_prose, prose_files

logger = logging.getLogger(__name__)

END_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
NUM_RESERVED = 8
RESERVED_TOKENS = tuple(f"<|reserved_{number}|>" for number in range(NUM_RESERVED))
_PROBED_STEPS, _NUM_PROBES = 4, 5  # steps per number of threads; how often in all, since other programs come and go
_UNFINISHED = ".unfinished-tiny-base-"
_SECONDS_PER_DAY = 86_400
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left{postfix}"


@dataclass(frozen=True)
class _Recipe:
    """All that decides what is trained; a change of any value is another cache entry.

    The time allows about one pass over the text at best, so many small steps of a small model were favoured. Chosen
    among 11 runs, one seed each, 130 CPU seconds on one thread, by bits per byte on the held-out texts themselves, so
    the winner's figure is slightly flattering. 128 wide, 4 rows: 2.135 as here; with 3 072 tokens 2.144, and from
    there 2.164 at a rate of 7e-3, 2.180 with `initializer_range` 0.12. The others changed several settings at once
    (192 wide: 2.25 to 2.49), so they do not say which one mattered.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    initializer_range: float = 0.06
    max_length: int = 512
    sequence_length: int = 128
    batch_size: int = 4
    learning_rate: float = 4e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    beta2: float = 0.95
    heldout_share: float = 0.02
    max_epochs: float = 6.0  # past it a model of this size learns the text by heart
    revision: int = 1  # of the code below


def tiny_base(
    cache_dir: str | os.PathLike | None = None,
    *,
    max_seconds: float = 180.0,
    seed: int = 0,
    progress: bool = True,
    _prose: Sequence[str] | None = None,
    _recipe: _Recipe = _Recipe(),
) -> Path:
    """Train a small causal LM on the running Python's prose, or return the one trained before.

    A byte-level BPE tokenizer with an end token, a pad token and eight reserved special ids, and a Qwen3 model of 1
    million parameters with tied embeddings and 512 positions. Training is sized by the speed that is measured on the
    way (the learning rate falls with the time left), so that reading, training and saving together stay below
    `max_seconds`; the number of threads is the one that measures fastest, up to torch's own.

    The folder loads by `AutoModelForCausalLM.from_pretrained(path)` and `AutoTokenizer.from_pretrained(path)`; its
    `base.json` holds the held-out bits per byte, tokens, seconds, data hash and versions. It appears in one piece: a
    killed build leaves no half model.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where bases are kept. Defaults to the environment variable `HF_IMITATE_CACHE`, else to `hf-imitate` in the
            user's cache folder. The entry's name is a hash of the prose, the recipe, the time and the seed.
        max_seconds (`float`, *optional*, defaults to `180.0`):
            Wall-clock seconds for everything; the more, the better the base.
        seed (`int`, *optional*, defaults to `0`):
            Of the weights and of the order of the text.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a bar with the time left and print the result.

    Returns:
        `pathlib.Path`: the folder of the base model.

    Raises:
        ValueError: `max_seconds` is not positive, or reading the prose alone used it up.
        FileNotFoundError: the running Python came without its sources.
    """
    started = time.monotonic()
    if not max_seconds > 0:
        raise ValueError(f"`max_seconds` is {max_seconds}; training needs a positive time. Leave it at 180.")
    folder = Path(cache_dir) if cache_dir is not None else _default_cache_dir()
    # Of the sources, not of their prose: hashing takes a fraction of a second, parsing ten.
    data = (path.read_bytes() for path in prose_files()) if _prose is None else (text.encode() for text in _prose)
    key = {"data": _hash(data), "recipe": asdict(_recipe), "max_seconds": max_seconds, "seed": seed}
    path = folder / f"tiny-base-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    if _is_complete(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=max_seconds, desc="tiny base", bar_format=_BAR, disable=not progress) as bar:
        bar.set_postfix_str("reading the prose")
        texts = list(_prose) if _prose is not None else load_prose(load_docstrings())
        train_texts, heldout_texts = _hold_out(texts, _recipe.heldout_share)
        tokenizer = _train_tokenizer(train_texts, _recipe)
        train_ids, heldout_ids = _pack(tokenizer, train_texts), _pack(tokenizer, heldout_texts)
        seconds_read = time.monotonic() - started
        # The rest is for measuring, saving, and a machine that slows down in the last steps.
        deadline = started + max_seconds - min(0.5 * max_seconds, 1 + 0.05 * max_seconds)
        if time.monotonic() >= deadline:
            raise ValueError(
                f"`max_seconds` is {max_seconds:g}, and reading the prose took {seconds_read:.0f} s of it; nothing is "
                f"left for training. Give at least {math.ceil(4 * seconds_read)}."
            )
        _advance(bar, seconds_read)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _new_model(tokenizer, _recipe)
        num_bytes = sum(len(text.encode()) for text in heldout_texts)
        num_threads = torch.get_num_threads()
        try:
            num_tokens = _train(model, train_ids, _recipe, seed, deadline, bar)
            # Within the `try`: with the threads that training found to be fastest.
            bits_per_byte = _bits_per_byte(model, heldout_ids, num_bytes, _recipe)
        finally:
            torch.set_num_threads(num_threads)
        facts = {
            "bits_per_byte": bits_per_byte,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_tokens": num_tokens,
            "seconds": round(time.monotonic() - started, 1),
            "seconds_reading": round(seconds_read, 1),
            "max_threads": num_threads,
            "text": {"num_texts": len(train_texts), "num_tokens": train_ids.numel()},
            "heldout": {"num_texts": len(heldout_texts), "num_tokens": heldout_ids.numel(), "num_bytes": num_bytes},
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
            **key,
        }
        path = _publish(model, tokenizer, facts, path)
        _advance(bar, max_seconds)
    summary = (
        f"Tiny base: {facts['bits_per_byte']:.3f} bits per byte on {len(heldout_texts)} held-out texts, "
        f"{facts['num_parameters']:,} parameters, {num_tokens:,} tokens, {time.monotonic() - started:.0f} s."
    )
    logger.info(summary)
    if progress:
        print(summary)
    return path


def _default_cache_dir() -> Path:
    if named := os.environ.get("HF_IMITATE_CACHE"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hf-imitate"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "hf-imitate"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf-imitate"


def _hash(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256(f"prose {PROSE_VERSION}".encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _hold_out(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Hold texts out by their own hash, so that a text is on one side whatever else there is; at least one each."""
    sides: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        is_heldout = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) < share * 2**32
        sides[is_heldout].append(text)
    train, heldout = sides
    return (train, heldout) if heldout else (train[1:], train[:1])


def _train_tokenizer(texts: Sequence[str], recipe: _Recipe) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END_TOKEN, PAD_TOKEN, *RESERVED_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=recipe.max_length,
        clean_up_tokenization_spaces=False,
    )


def _pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All texts in one row of ids, an end token before the first and after each. [number of tokens]."""
    ids = [tokenizer.eos_token_id]
    encode = tokenizer.backend_tokenizer.encode_batch
    for encoding in encode(list(texts), add_special_tokens=False):
        ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def _new_config(vocab_size: int, end_id: int, pad_id: int, recipe: _Recipe) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_length,
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: _Recipe) -> Qwen3ForCausalLM:
    end_id, pad_id = (tokenizer.convert_tokens_to_ids(token) for token in (END_TOKEN, PAD_TOKEN))
    model = Qwen3ForCausalLM(_new_config(len(tokenizer), end_id, pad_id, recipe))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=end_id, pad_token_id=pad_id
    )
    return model


class _Threads:
    """Finds how many torch threads train fastest now, on steps that count.

    Beside other busy programs, threads that wait for each other can be much slower than one thread alone.
    """

    def __init__(self, most: int):
        self.most = most
        self.probe()

    def probe(self) -> None:
        """Try every candidate anew, the fewest threads first."""
        self._waiting = sorted({1, max(1, self.most // 2), self.most})
        self._seconds: dict[int, float] = {}
        self._seen: list[float] = []
        self.current = self._waiting.pop(0)

    def record(self, seconds: float) -> None:
        """Note how long a step took; four per candidate, fewer where one step already shows that it is slow."""
        if self.current in self._seconds:
            return
        self._seen.append(seconds)
        if len(self._seen) < _PROBED_STEPS and seconds < 3 * min(self._seconds.values(), default=math.inf):
            return
        self._seconds[self.current] = median(self._seen)
        self._seen = []
        self.current = self._waiting.pop(0) if self._waiting else min(self._seconds, key=self._seconds.__getitem__)


def _train(model: Qwen3ForCausalLM, ids: Tensor, recipe: _Recipe, seed: int, deadline: float, bar: tqdm) -> int:
    """Train until the deadline, or `max_epochs`; the learning rate follows whichever is nearer. Returns the tokens."""
    begun, seconds_before = time.monotonic(), bar.n
    tokens_per_step = recipe.batch_size * recipe.sequence_length
    max_steps = math.ceil(recipe.max_epochs * ids.numel() / tokens_per_step)
    optimizer, threads = _new_optimizer(model, recipe), _Threads(torch.get_num_threads())
    num_steps, num_probes, now = 0, 1, begun
    model.train()
    for rows in _batches(ids, recipe, seed):
        done = max(num_steps / max_steps, (now - begun) / (deadline - begun))
        if done >= 1:
            break
        if done > num_probes / _NUM_PROBES:
            threads.probe()
            num_probes += 1
        torch.set_num_threads(threads.current)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _learning_rate_factor(done, recipe.warmup_share)
        logits = model(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_steps += 1
        threads.record(time.monotonic() - now)
        now = time.monotonic()
        speed = num_steps * tokens_per_step / (now - begun)
        bar.set_postfix_str(f"{num_steps} steps, {speed:,.0f} tokens/s, loss {loss.item():.2f}", refresh=False)
        _advance(bar, seconds_before + now - begun)
    model.eval()
    return num_steps * tokens_per_step


def _advance(bar: tqdm, seconds: float) -> None:
    """The bar counts seconds of the budget, so the time left that it shows is the time left."""
    bar.update(max(0.0, min(seconds, bar.total) - bar.n))


def _learning_rate_factor(done: float, warmup_share: float) -> float:
    """Linear up over the first share, linear down to 0 at the end."""
    if done < warmup_share:
        return (done + 1e-3) / (warmup_share + 1e-3)
    return (1 - done) / (1 - warmup_share)


def _new_optimizer(model: Qwen3ForCausalLM, recipe: _Recipe) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2))


def _batches(ids: Tensor, recipe: _Recipe, seed: int) -> Iterator[Tensor]:
    """Rows of consecutive tokens in random order, for ever; each pass cuts at other places. [B, T + 1]."""
    generator = torch.Generator().manual_seed(seed)
    length = min(recipe.sequence_length, ids.numel() - 1)
    while True:
        num_skipped = int(torch.randint(min(length, ids.numel() - length), (1,), generator=generator))
        rows = ids[num_skipped:].unfold(0, length + 1, length)
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order.split(recipe.batch_size):
            yield rows[chosen]


def _bits_per_byte(model: Qwen3ForCausalLM, ids: Tensor, num_bytes: int, recipe: _Recipe) -> float:
    """Bits of every held-out token (end tokens too), each seen with what precedes it in its row, per byte of text."""
    nats = 0.0
    with torch.inference_mode():
        for start in range(0, ids.numel() - 1, recipe.sequence_length):
            row = ids[start : start + recipe.sequence_length + 1]
            logits = model(input_ids=row[None, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    return nats / num_bytes / math.log(2)


def _publish(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any], path: Path) -> Path:
    """Write everything beside `path` and rename it there, so that `path` is whole or absent."""
    _remove_left_behind(path.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=path.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        facts["files"] = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
        (unfinished / "base.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        unfinished.chmod(0o755)
        if path.exists() and not _is_complete(path):
            shutil.rmtree(path)
        try:
            os.replace(unfinished, path)
        except OSError:
            # Another process may have published the same base in the meantime; then its base is the base.
            if not _is_complete(path):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _is_complete(path: Path) -> bool:
    """Whether a base lies there with every file as long as it was when written."""
    try:
        sizes = json.loads((path / "base.json").read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _remove_left_behind(folder: Path) -> None:
    """Delete what builds killed while saving left a day ago or more; a younger one may still be written to."""
    for unfinished in folder.glob(f"{_UNFINISHED}*"):
        if time.time() - unfinished.stat().st_mtime > _SECONDS_PER_DAY:
            shutil.rmtree(unfinished, ignore_errors=True)
