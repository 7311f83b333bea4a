"""What training runs on, and how far each was tried: said once, for the guide's table and for every card."""

from typing import NamedTuple


class EngineStatus(NamedTuple):
    """How far one way to run a training was tried by this library's own tests.

    Attributes:
        title (`str`): what it is.
        status (`str`): "tested" (trained with, in tests), "parsed only" (its configuration is read by Accelerate's own
            classes, and what depends on it is tested against a stand-in) or "untested".
        shown_by (`str`): where.
    """

    title: str
    status: str
    shown_by: str


ENGINES: dict[str, EngineStatus] = {
    "single_cpu": EngineStatus("one process on a CPU", "tested", "every test"),
    "multi_cpu": EngineStatus(
        "DDP over gloo, two processes on CPUs",
        "tested",
        "`tests/test_two_processes.py`, `tests/test_latent_two_processes.py`, `make acceptance ONLY=reliability`",
    ),
    "single_gpu": EngineStatus("one GPU", "parsed only", "`tests/test_gpu.py`, skipped without CUDA"),
    "multi_gpu": EngineStatus("DDP over NCCL", "parsed only", "`tests/test_gpu.py`, skipped with fewer than two GPUs"),
    "fsdp2": EngineStatus(
        "FSDP2",
        "parsed only",
        "`tests/test_gpu.py` as above; log-probs, gradients, weights under torch's `fully_shard` over gloo: "
        "`tests/test_two_processes.py`",
    ),
    "zero2": EngineStatus("DeepSpeed ZeRO-2", "parsed only", "`tests/test_gpu.py` as above"),
    "zero3": EngineStatus("DeepSpeed ZeRO-3", "parsed only", "`tests/test_gpu.py` as above"),
    "fsdp1": EngineStatus("FSDP1", "untested", "TRL's configuration, found by its name"),
    "zero1": EngineStatus("DeepSpeed ZeRO-1", "untested", "TRL's configuration, found by its name"),
}


def describe_engine(name: str) -> str:
    """A line for a card; of an engine that is not in the table, its name and that nothing was tried."""
    known = ENGINES.get(name)
    return f"{name}, untested" if known is None else f"{known.title}, {known.status} by hf-imitate's own tests"


def engine_table() -> str:
    """All of them, as a Markdown table."""
    rows = [f"| {engine.title} | {engine.status} | {engine.shown_by} |" for engine in ENGINES.values()]
    return "\n".join(["| Engine | | Shown by |", "|---|---|---|", *rows])
