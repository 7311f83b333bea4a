"""Runs a program in two real processes over gloo."""

import os
import subprocess
import sys
from pathlib import Path

from hf_imitate.train_cli import _resolve_accelerate_config

TESTS = Path(__file__).parent
# About one run in thirty aborts while the interpreter shuts down, after everything is done: a thread of torch's is
# still there (plain GRPO does it, too, with the process group destroyed or not). So the process leaves without it.
LEAVE = """
import os, sys, torch
if torch.distributed.is_initialized():
    torch.distributed.barrier()
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
"""


def in_two_processes(program: str, folder: Path, timeout: float = 240) -> str:
    """Run `program` in the two processes that `--accelerate_config cpu` starts and return what both printed.

    Args:
        program: its source; an error in it fails the test with the end of the error output.
        folder: where the source is put.
        timeout: seconds, of a deadlock; on a busy machine the run itself takes a minute.
    """
    file = folder / "program.py"
    file.write_text(program + LEAVE, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, *_resolve_accelerate_config(["--accelerate_config", "cpu"]), str(file)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
