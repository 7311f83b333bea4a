"""The same work on an accelerator, beside its floor: tokens per second, share of the peak, and what forbids more.

`python -m benchmarks.speed_device --device cuda --dtype bfloat16 --width 1024 --layers 28` builds a model of random
weights (that is Qwen3-0.6B's shape) and measures scoring, a likelihood step, an adversarial loss with questions read
once and anew, and drawing. Beside each row stand two floors in seconds: floating-point operations over the device's
peak, and bytes of weights that must be read over its bandwidth; both peaks are given: a driver does not say them.
vLLM's drawing is measured where it is installed.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from benchmarks.acceptance import format_table, versions
from hf_imitate.rendering import Rendered
from hf_imitate.scoring import score_answers
from hf_imitate.trainers.questions_read_once import QuestionsReadOnce


class Settings(NamedTuple):
    """What is measured, and on what; the defaults are a minute's work of one CPU core."""

    device: str = "cpu"
    dtype: str = "float32"
    width: int = 64
    layers: int = 2
    vocab_size: int = 2048
    questions: int = 2
    answers: int = 8
    question_tokens: int = 24
    answer_tokens: int = 8
    repeats: int = 2
    peak_tflops: float = 0.05
    peak_gb_per_second: float = 10.0


CELLS = [Settings()._asdict()]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """All rows for one setting."""
    return {"rows": measure(Settings(**cell))}


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The rows; nothing is claimed of a machine that is not named."""
    return [row for one in results for row in one["result"]["rows"]], True


def new_model(settings: Settings) -> Any:
    """A Qwen3 of random weights, with an adapter, on the device."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(2, settings.width // 64),
        num_key_value_heads=max(1, settings.width // 128),
        head_dim=min(128, settings.width // 2),
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen3ForCausalLM(config).to(device=settings.device, dtype=getattr(torch, settings.dtype))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Seconds, tokens per second and floors of each piece of work."""
    model = new_model(settings)
    generator = torch.Generator().manual_seed(0)

    def ids(number: int) -> list[int]:
        return torch.randint(2, settings.vocab_size, (number,), generator=generator).tolist()

    asked = [ids(settings.question_tokens) for _ in range(settings.questions)]
    rows = [Rendered(q, ids(settings.answer_tokens), False) for q in asked for _ in range(settings.answers)]
    batch = _laid(rows, settings.device)
    causal_lm = model.get_base_model()
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=settings.answer_tokens, min_new_tokens=settings.answer_tokens
    )
    prompts = batch["input_ids"][:, : settings.question_tokens]

    def loss_of(one: Any) -> Callable[[], None]:
        def step() -> None:
            one(**batch, fused_lm_head=True).log_probs.sum().backward()
            model.zero_grad()

        return step

    def draw() -> None:
        mask = torch.ones_like(prompts)
        model.generate(input_ids=prompts, attention_mask=mask, generation_config=config, pad_token_id=1)

    anew = len(rows) * (settings.question_tokens + settings.answer_tokens)
    once = settings.questions * settings.question_tokens + len(rows) * settings.answer_tokens
    weights = sum(p.numel() for p in causal_lm.parameters())
    # work, tokens it reads, operations per weight and token (2 forward, 2 more for an adapter's backward), passes
    works: list[tuple[str, Callable[[], Any], int, int, int]] = [
        ("scoring", lambda: score_answers(model, rows, 1), once, 2, 1),
        ("loss and backward, questions read anew", loss_of(model), anew, 4, 2),
        ("loss and backward, questions read once", loss_of(QuestionsReadOnce(model, causal_lm, 1)), once, 4, 2),
        ("drawing", draw, anew, 2, settings.answer_tokens),
    ]
    if importlib.util.find_spec("vllm") is not None and settings.device == "cuda":
        works.append(("drawing, vLLM", _vllm(model, prompts, settings), anew, 2, settings.answer_tokens))
    itemsize = getattr(torch, settings.dtype).itemsize
    table = []
    for name, work, tokens, operations, passes in works:
        seconds = _seconds(work, settings)
        flops = operations * weights * tokens
        table.append(
            {
                "work": name,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "share_of_peak": flops / seconds / (settings.peak_tflops * 1e12),
                "floor_flops": flops / (settings.peak_tflops * 1e12),
                "floor_bytes": passes * weights * itemsize / (settings.peak_gb_per_second * 1e9),
                "peak_mib": _peak_mib(settings.device),
            }
        )
    return table


def _laid(rows: list[Rendered], device: str) -> dict[str, Tensor]:
    ids = torch.tensor([row.prompt_ids + row.answer_ids for row in rows], device=device)
    labels = ids.clone()
    labels[:, : len(rows[0].prompt_ids)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _vllm(model: Any, prompts: Tensor, settings: Settings) -> Callable[[], None]:
    from vllm import LLM, SamplingParams

    folder = tempfile.mkdtemp(prefix="speed-vllm-")
    model.merge_and_unload().save_pretrained(folder)
    engine = LLM(folder, skip_tokenizer_init=True, dtype=settings.dtype, gpu_memory_utilization=0.4)
    how = SamplingParams(temperature=1.0, max_tokens=settings.answer_tokens, min_tokens=0, detokenize=False)
    asked = [{"prompt_token_ids": row} for row in prompts.tolist()]
    return lambda: engine.generate(asked, how, use_tqdm=False)


def _seconds(work: Callable[[], Any], settings: Settings) -> float:
    """Fastest of some repeats: CPU seconds on a CPU, else wall clock, everything finished."""
    clock = time.process_time if settings.device == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(settings.repeats + 1):  # the first warms up; it is never the fastest
        _finish(settings.device)
        begun = clock()
        work()
        _finish(settings.device)
        best = min(best, clock() - begun)
    return best


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_mib(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None


def main(arguments: list[str] | None = None) -> int:
    """Print the table; write it as JSON where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed_device", description=__doc__.splitlines()[0])
    for name, value in Settings()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    table = measure(Settings(**options))
    print(format_table(table))
    if output:
        report = {"settings": options, "versions": versions(), "rows": table}
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
