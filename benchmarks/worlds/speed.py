"""A small model that has read docstrings, and how costs are compared: in turns, in CPU seconds, by paired ratios.

Cores are shared, so wall clocks say little: a cost here is the CPU time of this process under one torch thread.
Trainers run unchanged, each in a thread of its own, and take turns after every step, so that what changes on the
machine in the meantime meets all of them; at each turn's start the random state is that of the step's number, so that
imitators that are alike draw alike.
"""

import contextlib
import gc
import hashlib
import inspect
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
)

from hf_imitate import RetrodictiveConfig, RetrodictiveTrainer, load_docstrings

PARTS = Path(__file__).parent.parent / "results" / "partial" / "speed-bases"
END, PAD = "<|end|>", "<|pad|>"
CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


class Shape(NamedTuple):
    """Of a model, and for how many steps of 32 rows it reads docstrings, so that its answers end as theirs do."""

    vocab_size: int = 4096
    hidden_size: int = 192
    num_layers: int = 6
    steps: int = 240


FULL, TINY = Shape(), Shape(vocab_size=512, hidden_size=32, num_layers=2, steps=4)


@cache
def docstrings() -> Dataset:
    """Questions and answers, by the running Python's authors, in an order of their own."""
    return load_docstrings().select_columns(["prompt", "completion"]).shuffle(seed=0)


def new_model(shape: Shape, end_id: int, pad_id: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights. 3.1 million of them in the default shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                intermediate_size=3 * shape.hidden_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=max(2, shape.hidden_size // 32),
                num_key_value_heads=max(1, shape.hidden_size // 64),
                head_dim=32,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                initializer_range=0.05,
                bos_token_id=None,
                eos_token_id=end_id,
                pad_token_id=pad_id,
            )
        )


def base(shape: Shape = FULL, folder: Path = PARTS) -> Path:
    """The folder of a model of this shape that has read docstrings; trained once."""
    made_by = (shape, *(inspect.getsource(part) for part in (new_model, _tokenizer, _train)))
    path = folder / f"base-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:10]}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
            _train(shape, Path(unfinished) / "made")
            (Path(unfinished) / "made").rename(path)
    return path


def load(path: Path) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer, in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False
    ), AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in docstrings()), how)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=2048)


def _train(shape: Shape, path: Path) -> None:
    tokenizer = _tokenizer(shape.vocab_size)
    model = new_model(shape, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    args = RetrodictiveConfig(
        str(path),
        max_steps=shape.steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        seed=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RetrodictiveTrainer(model, args, docstrings(), processing_class=tokenizer)
    trainer.train()
    trainer.model.save_pretrained(path)
    tokenizer.save_pretrained(path)


# --- taking turns


class Turns:
    """Lets some threads work one at a time, in a fixed order."""

    def __init__(self, names: Sequence[str]):
        self.waiting, self.changed = list(names), threading.Condition()

    def await_own(self, name: str) -> None:
        """Return once it is this one's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[:1] == [name])

    def pass_on(self, name: str, is_last: bool = False) -> None:
        """End one's turn; after the last one, others do not wait for it any more."""
        with self.changed:
            self.waiting.remove(name)
            if not is_last:
                self.waiting.append(name)
            self.changed.notify_all()


class Clock(TrainerCallback):
    """CPU seconds from the end of each step to the end of the next, what is spent in other trainers left out.

    So what lies between two steps is charged, too: fetching rows, logging.
    """

    def __init__(self, name: str, turns: Turns, seed: int):
        self.name, self.turns, self.seed = name, turns, seed
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the first step."""
        self._start(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the others take a step."""
        self.seconds.append(time.process_time() - self._begun)
        self.turns.pass_on(self.name)
        self.turns.await_own(self.name)
        self._start(state.global_step)

    def _start(self, step: int) -> None:
        torch.manual_seed(1000 * self.seed + step)
        self._begun = time.process_time()


def seconds_per_step(makers: dict[str, Callable[[], Trainer]], num_skipped: int, seed: int = 0) -> dict[str, list]:
    """CPU seconds of every step of some trainers that take turns, by name.

    Args:
        makers: each builds a trainer; all train for equally many steps.
        num_skipped: first steps that are left out: memory and caches are not warm yet.
        seed: of the random state that each step starts from.
    """
    turns = Turns(list(makers))
    built = {name: make() for name, make in makers.items()}
    clocks = {name: Clock(name, turns, seed) for name in makers}
    failures: list[BaseException] = []

    def work(name: str) -> None:
        torch.set_num_threads(1)
        turns.await_own(name)
        try:
            built[name].add_callback(clocks[name])
            built[name].train()
        except BaseException as failure:  # the other threads wait for this one's turn to end, whatever ended it
            failures.append(failure)
        finally:
            turns.pass_on(name, is_last=True)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in makers]
    with one_thread():
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # an alarm is heard in between
    if failures:
        raise failures[0]
    return {name: clock.seconds[num_skipped:] for name, clock in clocks.items()}


def seconds_of(works: dict[str, Callable[[], Any]], num_repeats: int, num_skipped: int = 1) -> dict[str, list[float]]:
    """CPU seconds of some pieces of work that take turns, by name; all begin each round from one random state."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with one_thread():
        for number in range(num_skipped + num_repeats):
            for name, work in works.items():
                gc.collect()
                torch.manual_seed(number)
                begun = time.process_time()
                work()
                seconds[name].append(time.process_time() - begun)
    return {name: values[num_skipped:] for name, values in seconds.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- ratios


class Ratio(NamedTuple):
    """Cost over cost, with its interval at 95 %."""

    value: float
    low: float
    high: float


def ratio(ours: Sequence[float], theirs: Sequence[float], scale: float = 1.0) -> Ratio:
    """Total over total of paired costs; percentile bootstrap over the pairs, 10 000 resamples of a fixed seed.

    Totals, so that what happens in few steps (a look at held-out rows) counts with all it costs.
    """
    both = np.array([ours, theirs], dtype=float)
    number = both.shape[1]
    drawn = np.random.default_rng(0).integers(number, size=(NUM_RESAMPLES, number))
    sums = both[:, drawn].sum(axis=2)
    low, high = np.quantile(sums[0] / sums[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    total = both.sum(axis=1)
    return Ratio(*(float(scale * value) for value in (total[0] / total[1], low, high)))


def write_json(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")
