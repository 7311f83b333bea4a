"""What the guide's programs and commands are run with: printed for large models, a reader's data and the Hub, they run
as printed on a tiny model, a few rows and the loopback Hub.

A test runs `python -c "import guide_worlds; guide_worlds.run_pages(...)"` in a process of its own, since the client
reads the Hub's address when it is imported; here are, too, the blocks themselves.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Whose blocks without a mark are run here, one page after the other.
PAGES = {
    path.name: path
    for path in (
        DOCS.parent / "README.md",
        *(DOCS / f"{name}.md" for name in ("adversarial", "api", "audit", "contract", "hub", "migrate", "serving")),
        DOCS / "start.md",
    )
}
MODELS = ("Qwen/Qwen3-0.6B", "a/larger-model")
IMITATORS = ("me/me-imitator", "me/my-imitator", "me/first-stage")
# What settings give way to.
ONE_STEP = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
QUICK: dict[str, dict[str, Any]] = {
    "RetrodictiveConfig": ONE_STEP,
    "AdversarialConfig": {**ONE_STEP, "distinguisher_warmup_steps": 1, "max_completion_length": 6},
    "LatentRetrodictiveConfig": {
        **ONE_STEP,
        "max_thought_length": 2,
        "num_thoughts": 2,
        "per_device_train_batch_size": 2,
        "retrodictor_warmup_steps": 1,
    },
}
WARMED_UP = {"imitator_warmup_steps": 0, "distinguisher_lm_warmup_steps": 0}


class Block(NamedTuple):
    """A code block: its page, the line above its text, the words after the fence, its text without indentation."""

    page: str
    line: int
    info: list[str]
    text: str


def blocks(path: Path) -> list[Block]:
    """Those of a page, in order."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^ *```(\w[^\n]*)\n(.*?)^ *```", text, re.M | re.S)
    return [Block(path.name, text[: one.start(2)].count("\n"), one[1].split(), one[2]) for one in found]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def solves_the_sudoku(prompts: list, completions: list, completion_ids: Any = None, **columns: Any) -> list[bool]:
    """A check, for pages that speak of one."""
    return [len(completion) > 3 for completion in completions]


def my_reward(completions: list, **columns: Any) -> list[float]:
    """A reward of the reader's."""
    return [float(len(completion)) for completion in completions]


def run_pages(base: str, into: str) -> None:
    """Run the blocks of every page; what went wrong goes to a JSON file, by page and line.

    Each page has a folder and names of its own, so it stands on what it says and on what `reader` has.
    """
    import torch

    torch.set_num_threads(1)
    start = Path.cwd()
    failed: dict[str, dict[str, str]] = {}
    prepare(base)
    for name, path in PAGES.items():
        folder = start / name.removesuffix(".md")
        folder.mkdir()
        os.chdir(folder)
        names, failed[name] = reader(name), {}
        for block in blocks(path):
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    if block.info == ["python"]:
                        exec(compile("\n" * block.line + block.text, name, "exec"), names)
                    elif block.info == ["bash"]:
                        for words in commands(block.text):
                            run_command(words)
                except (Exception, SystemExit):
                    failed[name][str(block.line)] = traceback.format_exc()
    Path(into).write_text(json.dumps(failed))


def prepare(base: str) -> None:
    """Make settings and data small, and put what the pages name on the Hub."""
    from huggingface_hub import HfApi

    import hf_imitate

    for name, few in QUICK.items():
        setattr(hf_imitate, name, partial(quick, getattr(hf_imitate, name), few))
    hf_imitate.load_docstrings = partial(hf_imitate.load_docstrings, ["http", "email", "json", "logging"])
    for name in MODELS:
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=base)
    names = reader("")
    trainer = hf_imitate.AdversarialTrainer(
        "Qwen/Qwen3-0.6B",
        hf_imitate.AdversarialConfig(output_dir="imitator"),
        names["dataset"]["train"],
        peft_config=lora(),
    )
    trainer.train()
    trainer.save_model()
    for name in IMITATORS:
        HfApi().create_repo(name, private=True)
        HfApi().upload_folder(repo_id=name, folder_path="imitator")


def quick(kind: type, few: dict[str, Any], **given: Any) -> Any:
    """The settings that a program asks for, as far as a test has time for them."""
    is_game = kind.__name__ == "AdversarialConfig" and not given.get("freeze_imitator")
    return kind(**{**given, **few, **(WARMED_UP if is_game else {})})


def lora() -> Any:
    """A small adapter."""
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear")


def reader(page: str) -> dict[str, Any]:
    """What the reader of a page has, by the names that it uses."""
    from datasets import Dataset

    import hf_imitate

    rows = Dataset.from_dict(
        {
            "prompt": [f"Item {i}:" for i in range(160)],
            "completion": [("abc", "de", "fghi")[i % 3] for i in range(160)],
        }
    )
    dataset = hf_imitate.split_by_question(rows, test_size=0.2)
    names: dict[str, Any] = {name: getattr(hf_imitate, name) for name in hf_imitate.__all__}
    names |= {
        "dataset": dataset,
        "rows": rows,
        "questions": dataset["test"]["prompt"][:4],
        "humans": dataset["test"]["completion"][:4],
        "lora": lora(),
        "model": "Qwen/Qwen3-0.6B",
        "solves_the_sudoku": solves_the_sudoku,
        "my_reward": my_reward,
    }
    if page == "hub.md":
        names["args"] = hf_imitate.AdversarialConfig(output_dir="second-stage")
        args = hf_imitate.RetrodictiveConfig(output_dir="me-imitator")
        names["trainer"] = hf_imitate.RetrodictiveTrainer(names["model"], args, dataset["train"], peft_config=lora())
    if page == "serving.md":
        shutil.copytree("../imitator", "my-imitator")
    if page == "start.md":
        rows.to_csv("answers.csv")
    return names


def run_command(words: list[str]) -> None:
    """A command of ours; of others, as much as can be said without them."""
    from hf_imitate import cli

    if words[0] == "hf-imitate":
        few = ["--max_steps", "1", "--report_to", "none"] if words[1] == "retrodictive" else []
        assert cli.main([*words[1:], *few]) == 0
    elif words[0] == "vllm":
        assert words[1:2] + words[3:4] == ["serve", "--generation-config"]
        assert Path(words[2], "config.json").is_file()
        assert Path(words[4], "generation_config.json").is_file()
