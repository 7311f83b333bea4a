"""Nothing that a stranger wrote is executed, and nobody is asked whether it may be: in a repo, a checkpoint, a
template, an audit's folder. What the sources may not even call is read with `ast`."""

import ast
import os
import pickle
import select
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import exact_runs
import numpy as np
import pytest
import tiny_runs
import torch
from test_repo_checks import Ran, change
from transformers import AutoTokenizer

from hf_imitate import Distinguisher, Imitator
from hf_imitate.audits.evidence_cache import EvidenceCache
from hf_imitate.rendering import Renderer
from hf_imitate.repo_checks import UnsafeRepoError

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p for f in ("hf_imitate", "trainers", "hub_cards", "benchmarks", "examples") for p in (ROOT / f).rglob("*.py")
)

# --- what the sources call

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Accelerate's `load_state` unpickles what was registered; torch's `save` pickles; pandas and PyYAML have their own.
FORBIDDEN = {
    "register_for_checkpointing",
    "load_state_pre_hook",
    "read_pickle",
    "to_pickle",
    "unsafe_load",
    "full_load",
}
CODE = {"eval", "exec", "compile", "__import__"}


def name_of(node):
    """`torch.load` of a call's function, or the last part of it."""
    return ast.unparse(node.func)


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def has_keyword(call, name, value):
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def pickling(tree):
    """Lines that read or write a pickle, or run text as code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if PICKLERS & {name.split(".")[0] for name in imported}:
                yield node.lineno
        elif isinstance(node, ast.Call):
            name = name_of(node)
            is_pickle = name == "torch.save" or (name == "torch.load" and not has_keyword(node, "weights_only", True))
            is_array = name in ("np.load", "np.save", "np.savez", "numpy.load") and not has_keyword(
                node, "allow_pickle", False
            )
            if is_pickle or is_array or name.split(".")[-1] in FORBIDDEN or name in CODE:
                yield node.lineno


def trusting(tree):
    """Lines that load a model, config or tokenizer by its name and do not say `trust_remote_code=False`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    explicit = set()  # lines of functions that put it into the keywords they pass on
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Dict):
                keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
                if any(k == "trust_remote_code" and is_false(v) for k, v in zip(keys, node.values, strict=True)):
                    explicit |= set(range(function.lineno, (function.end_lineno or 0) + 1))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        if node.func.attr not in ("from_pretrained", "from_config") or not owner.lower().startswith("auto"):
            continue
        passes_on = any(k.arg is None for k in node.keywords) and node.lineno in explicit
        if not (has_keyword(node, "trust_remote_code", False) or passes_on):
            yield node.lineno


@pytest.mark.parametrize("find", [pickling, trusting])
def test_no_source_unpickles_or_trusts_remote_code(find):
    found = [f"{p.relative_to(ROOT)}:{line}" for p in SOURCES for line in find(ast.parse(p.read_text("utf-8")))]
    # Two processes of a benchmark hand tensors to each other, read with `weights_only`.
    handed = "benchmarks/worlds/reliability/ranks.py:"
    assert [place for place in found if not place.startswith(handed)] == []
    assert len(found) == (find is pickling)


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from joblib import dump", "torch.load(f)", "torch.load(f, weights_only=False)"),
        *("torch.save(x, f)", "np.load(f, allow_pickle=True)", "np.savez(f, x=x)", "eval(text)"),
        "self.accelerator.register_for_checkpointing(x)",
    ],
)
def test_a_line_that_pickles_is_seen(line):
    assert list(pickling(ast.parse(line))) == [1]
    assert (
        list(pickling(ast.parse("torch.load(f, weights_only=True); model.eval(); np.load(f, allow_pickle=False)")))
        == []
    )


@pytest.mark.parametrize(
    "line", ["AutoConfig.from_pretrained(x)", "AutoTokenizer.from_pretrained(x, trust_remote_code=ask)"]
)
def test_a_line_that_trusts_is_seen(line):
    assert list(trusting(ast.parse(line))) == [1]
    assert list(trusting(ast.parse("AutoConfig.from_pretrained(x, trust_remote_code=False)"))) == []


# --- what strangers may plant


@pytest.fixture
def trace(tmp_path):
    """Where a pickle that was executed would leave its mark."""
    return tmp_path / "executed"


def plant(file, trace):
    """A file as torch would write it, whose pickle leaves a mark where it is loaded without `weights_only`."""
    torch.save({"state": Ran(trace)}, file)


def test_what_is_planted_does_leave_its_mark_where_it_is_loaded(tmp_path, trace):
    plant(tmp_path / "x.pt", trace)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert trace.exists()


@pytest.fixture(scope="module", params=["adversarial", "retrodictive"])
def run(request, tiny_model_dir, tmp_path_factory):
    """A function that makes a trainer whose run has a checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"save_strategy": "steps", "save_steps": 1}

    def make(max_steps):
        if request.param == "adversarial":
            return tiny_runs.make(folder, tiny_model_dir, max_steps=max_steps, **settings)
        return exact_runs.make(folder, tiny_model_dir, adapter=True, max_steps=max_steps, **settings)

    tiny_runs.train(make(1))
    return make, Path(make(1).args.output_dir)


READ = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # transformers reads these, with `weights_only`
UNREAD = ("training_args.bin", "adapter_model.bin", "custom_checkpoint_0.pkl", "vocab.pkl", "model.pt")


@pytest.mark.parametrize("name", [*READ, "pytorch_model.bin", None])
def test_a_checkpoint_that_is_resumed_executes_nothing(run, tmp_path, trace, name):
    make, output = run
    checkpoint = shutil.copytree(output / "checkpoint-1", tmp_path / "checkpoint-1")
    (checkpoint / "_complete.json").unlink()  # else the planted file is found altered, and whoever plants can count
    for planted in UNREAD if name is None else (name,):
        plant(checkpoint / planted, trace)
    trainer = make(2)
    try:
        tiny_runs.train(trainer, resume_from_checkpoint=str(checkpoint))
    except UnsafeRepoError as error:
        words, shown = str(error), "".join(traceback.format_exception(error))
    else:
        words, shown = "", ""
    is_read = name in READ or (name == "pytorch_model.bin" and output.parent.name.startswith("retrodictive"))
    refused = f"{checkpoint}: one of its files of the kinds .pt, .pth and .bin holds more than tensors and numbers"
    assert words.startswith(refused) if is_read else words == ""
    assert "UnpicklingError" not in shown
    assert (trainer.state.global_step == 2) is not is_read
    assert not trace.exists()


def test_a_repo_with_pickles_beside_its_weights_executes_nothing(run, tmp_path, trace):
    repo = shutil.copytree(run[1] / "checkpoint-1", tmp_path / "repo")
    folders = [folder for folder in (repo, repo / "distinguisher") if folder.is_dir()]
    for folder in folders:
        for name in (*READ, *UNREAD, "pytorch_model.bin"):
            plant(folder / name, trace)
    Imitator.from_pretrained(repo, device="cpu")
    if len(folders) == 2:
        Distinguisher.from_pretrained(repo)
    assert not trace.exists()


def test_an_audits_folder_executes_nothing(tmp_path, trace):
    """Whatever stands in it is computed anew."""
    cache = EvidenceCache(tmp_path / "cache")
    cache.arrays("scores", lambda: {"nats": np.ones(2)})
    evil = np.array([Ran(trace)], dtype=object)
    for write in (lambda f: np.savez(f, nats=evil), lambda f: np.save(f, evil), lambda f: pickle.dump(Ran(trace), f)):
        with (tmp_path / "cache" / "scores.npz").open("wb") as file:
            write(file)
        np.testing.assert_array_equal(cache.arrays("scores", lambda: {"nats": np.ones(3)})["nats"], np.ones(3))
    with (tmp_path / "cache" / "answers.json").open("wb") as file:
        pickle.dump(Ran(trace), file)
    assert cache.json("answers", lambda: [1]) == [1]
    assert not trace.exists()


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.os.mkdir('TRACE') }}",
    "builtins": "{{ cycler.__init__.__globals__.os.mkdir('TRACE') }}",
    "a module": "{{ namespace.__init__.__globals__['__builtins__'].__import__('os').mkdir('TRACE') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "import": "{% import 'os' as os %}{{ os.mkdir('TRACE') }}",
    "include": "{% include '/etc/hostname' %}",
    "a change": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "a range": "{% for i in range(10 ** 12) %}x{% endfor %}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_chat_template_does_not_leave_its_sandbox(tiny_chat_model_dir, trace, name):
    """It fails, in words that name the question and show none of it."""
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir), trust_remote_code=False)
    tokenizer.chat_template = ESCAPES[name].replace("TRACE", str(trace))
    started = time.process_time()
    with pytest.raises(ValueError, match="cannot open the assistant's turn after 1 of 1 questions") as raised:
        Renderer(tokenizer, [0]).prompt_ids([[{"role": "user", "content": "violet-marmalade"}]])
    assert "violet-marmalade" not in str(raised.value)
    assert time.process_time() - started < 1
    assert not trace.exists()


PROBE = """
import sys
from datasets import Dataset
from hf_imitate import Imitator, RetrodictiveConfig, RetrodictiveTrainer
rows = Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b"] * 4})
settings = RetrodictiveConfig(sys.argv[2], report_to="none", use_cpu=True)
for load in (
    lambda: Imitator.from_pretrained(sys.argv[1], device="cpu"),
    lambda: RetrodictiveTrainer(sys.argv[1], settings, rows),
):
    try:
        load()
    except Exception as error:
        print("refused:", type(error).__name__)
    else:
        print("loaded")
"""


def test_nobody_is_asked_whether_code_may_run_even_at_a_terminal(tiny_model_dir, tmp_path, trace):
    """transformers asks "Do you wish to run the custom code? [y/N]" where nothing was said and a terminal listens."""
    repo = shutil.copytree(tiny_model_dir, tmp_path / "repo")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    change(repo, "config.json", auto_map=auto_map, model_type="evil", architectures=["EvilForCausalLM"])
    (repo / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n", encoding="utf-8")
    terminal, listening = os.openpty()
    os.write(terminal, b"y\n" * 8)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(repo), str(tmp_path / "out")],
            stdin=listening,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            cwd=ROOT,
        )
        unread, _, _ = select.select([listening], [], [], 0)
    finally:
        os.close(terminal)
        os.close(listening)
    assert [line for line in done.stdout.splitlines() if line.startswith(("refused", "loaded"))] == [
        "refused: ValueError"
    ] * 2
    assert unread, "Somebody has read the terminal."
    assert "[y/N]" not in done.stdout + done.stderr
    assert not trace.exists()
