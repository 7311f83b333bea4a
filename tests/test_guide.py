"""The guide builds without a warning, says what the source says, and its programs and commands run."""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import guide_worlds
import pytest
from hub_server import hub_environment, hub_server

import hf_imitate

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])
# Pages that show how code is written, not how it is called.
STYLE = {"style.md", "house.md"}
# What a name stands for on every page.
OBJECTS = {
    "imitator": "Imitator",
    "trainer": "AdversarialTrainer",
    "report": "AuditReport",
    "distinguisher": "Distinguisher",
}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "reference.py"))


def blocks(language: str) -> list[tuple[str, str, bool]]:
    """Page, text and whether it is marked to be run with tests of its own, of every code block in that language."""
    found = [block for page in PAGES for block in guide_worlds.blocks(page) if block.info[0] == language]
    return [(block.page, inspect.cleandoc(block.text), "run" in block.info[1:]) for block in found]


def test_the_guide_builds_without_a_warning(tmp_path):
    """Dead links, unknown references, pages that no table of contents holds: all are warnings of the builder."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-E",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page.stem for page in DOCS.glob("*.md")}
    side_bar = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert pages == {page.stem for page in tmp_path.glob("*.html")} - {"genindex", "search"}
    assert [page for page in pages if f'href="{page}.html"' not in side_bar and page != "index"] == []


@pytest.mark.parametrize("page", ["settings.md", "api.md"])
def test_a_page_of_docstrings_says_what_the_source_says(page, reference):
    assert (DOCS / page).read_text(encoding="utf-8") == reference["PAGES"][page](), (
        f"docs/{page} is stale: run `make docs`, or `python docs/reference.py`."
    )


def test_every_public_name_is_in_the_reference(reference):
    text = (DOCS / "api.md").read_text(encoding="utf-8") + (DOCS / "settings.md").read_text(encoding="utf-8")
    titles = set(re.findall(r"^##+ (\S+)$", text, re.M))
    assert set(hf_imitate.__all__) - {"__version__"} <= titles
    for entries in reference["API"].values():
        for spec, module, _ in entries:
            name, _, methods = spec.partition(": ")
            value = getattr(importlib.import_module(module), name)
            assert [method for method in methods.split() if not callable(getattr(value, method))] == []


@pytest.mark.parametrize("name", ["AdversarialConfig", "RetrodictiveConfig", "LatentRetrodictiveConfig"])
def test_the_docstring_of_a_config_has_every_setting_with_its_default(name, reference):
    """The fields that TRL's config does not have, in the order and with the defaults of the class."""
    config = getattr(hf_imitate, name)
    (path,) = (path for known, path, _ in reference["CONFIGS"] if known == name)
    described = {one.name: one for one in reference["settings"](name, path)}
    inherited = {field.name for parent in config.__mro__[1:] if dataclasses.is_dataclass(parent)
                 for field in dataclasses.fields(parent)}  # fmt: skip
    own = {field.name: field for field in dataclasses.fields(config) if field.name not in inherited}
    assert list(described) == list(own)
    for field_name, field in own.items():
        stated = re.search(r"defaults to `(.*)`", described[field_name].type)
        assert (ast.literal_eval(stated[1]) if stated else None) == field.default, field_name


def test_docstrings_become_markdown(reference):
    arguments = "Args:\n    a (`int`, *optional*): how\n        often.\n    b, c: as in [`~x.Y`]."
    text = f"Do it.\n\n{arguments}\n\nRaises:\n    ValueError: no."
    assert reference["as_markdown"](text) == (
        "Do it.\n\n**Args**\n\n- `a` (`int`, *optional*): how often.\n- `b`, `c`: as in `Y`.\n\n"
        "**Raises**\n\n- `ValueError`: no."
    )


def test_the_side_bar_follows_the_index_and_loses_no_page():
    toctrees = runpy.run_path(str(DOCS / "conf.py"))["toctrees"]
    made = toctrees("# T\n\n## First\n\n* [B](b.md): x\n* [A](a.md#there)\n\n## Empty\n", ["a", "b", "new"])
    assert re.findall(r":caption: (\w+)\n\n((?:\w+\n)+)", made) == [("First", "b\na\n"), ("More", "new\n")]


# --- memory


@pytest.fixture(scope="module")
def memory() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "memory.py"))


def test_the_tables_of_the_memory_page_are_computed(memory):
    page = (DOCS / "memory.md").read_text(encoding="utf-8")
    assert memory["fixed_table"]() in page
    assert memory["token_table"]() in page


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_are_counted_as_the_libraries_count_them(memory, is_tied):
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = memory["Shape"]("tiny", 32, 2, 48, 4, 2, 16, 100, is_tied)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, tie_word_embeddings=is_tied,
        )
    )  # fmt: skip
    assert memory["num_parameters"](shape) == sum(weight.numel() for weight in model.parameters())
    with_adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert memory["num_adapter_parameters"](shape, 4) == with_adapter.get_nb_trainable_parameters()[0]


# --- programs


def known_names() -> dict[str, Any]:
    """What a block may use without importing it."""
    return {name: getattr(hf_imitate, name) for name in hf_imitate._LAZY}


def problems(program: str) -> list[str]:
    """Imports, attributes and keyword arguments of ours, TRL's and PEFT's that do not exist."""
    tree, names, found = ast.parse(program), known_names(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("hf_imitate", "trl", "peft"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    found.append(f"{node.module} has no {alias.name}")
                else:
                    names[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += call_problems(node, names)
    return found


def called(function: ast.expr, names: dict[str, Any]) -> tuple[Any, str]:
    """The object that is called, or None where a page does not say what it is."""
    if isinstance(function, ast.Name):
        return names.get(function.id), function.id
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = function.value.id
        known = names.get(owner) or (getattr(hf_imitate, OBJECTS[owner]) if owner in OBJECTS else None)
        if known is not None:
            return getattr(known, function.attr, "missing"), f"{owner}.{function.attr}"
    return None, ""


def call_problems(node: ast.Call, names: dict[str, Any]) -> list[str]:
    function, name = called(node.func, names)
    if function == "missing":
        return [f"there is no {name}"]
    if not callable(function):
        return []
    parameters = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return []
    return [f"{name} takes no {word.arg}" for word in node.keywords if word.arg and word.arg not in parameters]


def calls_in_text(page: Path) -> list[str]:
    """What stands between backticks and calls something, such as `audit(repo, dataset)`."""
    spans = re.findall(r"(?<!`)`(\w[^`]*\([^`]*)`", page.read_text(encoding="utf-8"))
    return [span for span in spans if is_expression(span)]


def is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return True


def test_programs_call_what_there_is():
    found, programs = {}, [(page, program) for page, program, _ in blocks("python")]
    programs += [(page.name, call) for page in PAGES for call in calls_in_text(page)]
    for page, program in programs:
        if page not in STYLE and (wrong := problems(program)):
            found.setdefault(page, []).extend(wrong)
    assert found == {}
    assert len(programs) > 100


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("from hf_imitate import Imitater", "hf_imitate has no Imitater"),
        ("imitator.answers(['a'])", "there is no imitator.answers"),
        ("audit('me', rows, judge=['ngram'])", "audit takes no judge"),
        ("Imitator.from_pretrained('me', revison='main')", "Imitator.from_pretrained takes no revison"),
        ("AdversarialConfig(retrodictive_weight=1)", "AdversarialConfig takes no retrodictive_weight"),
        ("from trl import GRPOTrainer\nGRPOTrainer('m', reward=1)", "GRPOTrainer takes no reward"),
    ],
)
def test_a_wrong_call_in_a_page_is_seen(program, problem):
    assert problems(program) == [problem]


@pytest.fixture(scope="module")
def failed(tmp_path_factory, tiny_model_dir) -> dict[str, dict[str, str]]:
    """What went wrong where the blocks that have no tests of their own ran, one process for all, by page and line."""
    folder = tmp_path_factory.mktemp("guide")
    program = f"import guide_worlds; guide_worlds.run_pages({str(tiny_model_dir)!r}, {str(folder / 'failed.json')!r})"
    with hub_server() as url:
        environment = hub_environment(url, folder / "home") | {"ACCELERATE_USE_CPU": "true"}
        environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "failed.json").read_text())


@pytest.mark.parametrize("page", guide_worlds.PAGES)
def test_what_a_page_prints_runs(page, failed):
    """Programs as printed, in order; commands of ours, too. On tiny models, a few rows, one step."""
    assert not failed[page], "\n".join(
        f"{page}, block after line {line}:\n{why}" for line, why in failed[page].items()
    )


def test_every_program_is_run_by_a_test():
    """Those without a mark above, marked ones below, and the settings of the paper index in test_packaging.py."""
    is_run = {(page, marked) for page, _, marked in blocks("python") if page not in STYLE}
    assert {page for page, marked in is_run if not marked} - {"paper_index.md"} <= set(guide_worlds.PAGES)
    assert {page for page, marked in is_run if marked} == {
        "start.md",
        "residual.md",
        *(f"{page}.md" for page in QUICK_STARTS),
    }


def test_the_programs_of_start_here_run_in_order(tmp_path, monkeypatch, tiny_model_dir, capsys):
    """From somebody's CSV to an audit, with a tiny base and two steps in place of Qwen and three epochs."""
    lines = [
        "question,answer,rating",
        *(f'"What is {i} plus {i % 7}?","It is {i + i % 7}, I think.",' for i in range(200)),
    ]
    lines += ["How is it?,,2", ",It is fine.,", "What is left?,None,4", '"What did it\nsay?","""042"", I think. 🙂",5']
    (tmp_path / "answers.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    replaced = {"Qwen/Qwen3-0.6B": str(tiny_model_dir), "num_train_epochs=3": "max_steps=2, report_to='none'"}
    programs = [text for page, text, is_run in blocks("python") if page == "start.md" and is_run]
    assert len(programs) == 4
    program = "\n".join(programs)
    for old, new in replaced.items():
        assert program.count(old) == 1
        program = program.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(program, "start.md", "exec"), names)

    assert [len(drawn) for drawn in names["answers"]] == [3, 3]
    assert names["found"].is_exact.all()
    assert len(names["rows"]) == 202
    assert {"None", '"042", I think. 🙂'} < set(names["rows"]["completion"])
    assert names["report"].num_questions == 40
    assert (tmp_path / "my-imitator" / "audit" / "audit.json").is_file()
    assert "bits_per_answer" in capsys.readouterr().out


QUICK_STARTS = {
    "retrodictive": {"max_length=512": "max_length=256, max_steps=1, report_to='none'"},
    "adversarial": {
        "max_completion_length=64": "max_completion_length=6, max_steps=1, imitator_warmup_steps=1, "
        "distinguisher_warmup_steps=1, report_to='none'"
    },
    "latent": {
        "max_thought_length=64, max_length=512": "max_thought_length=2, max_length=120, max_steps=1, num_thoughts=2, "
        "retrodictor_warmup_steps=1, per_device_train_batch_size=2, report_to='none'",
        "num_estimates=64": "num_estimates=4",
    },
}


@pytest.mark.parametrize("page", QUICK_STARTS)
def test_the_quick_start_of_a_trainer_runs(page, tmp_path, monkeypatch, tiny_model_dir):
    """With a tiny base, a few rows and one step; after the game, the page on keeping one of K, too."""
    monkeypatch.chdir(tmp_path)
    program = "\n".join(text for name, text, is_run in blocks("python") if name == f"{page}.md" and is_run)
    replaced = {"Qwen/Qwen3-0.6B": str(tiny_model_dir), "load_docstrings()": 'load_docstrings(["json", "email"])'}
    for old, new in (replaced | QUICK_STARTS[page]).items():
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(program, f"{page}.md", "exec"), names)
    assert names["trainer"].state.global_step >= 1
    if page == "latent":
        assert (names["found"].lower_bound < names["found"].nats).all()
    if page == "adversarial":
        keep_one_of_k(names)


def keep_one_of_k(names: dict[str, Any]) -> None:
    """All but the two lines that draw thousands of answers, and have tests of their own."""
    (program,) = (text for name, text, is_run in blocks("python") if name == "residual.md" and is_run)
    lines = program.replace("me/my-imitator", "docstring-imitator").splitlines()
    cheap = [line for line in lines if not re.search("^audit|enclose", line)]
    assert len(lines) - len(cheap) == 2
    rows = names["dataset"]["train"].select(range(2))
    names |= {"questions": rows["prompt"][:], "human_answers": rows["completion"][:]}
    exec(compile("\n".join(["from hf_imitate import Imitator", *cheap]), "residual.md", "exec"), names)


# --- coming from TRL


@pytest.mark.parametrize(("title", "theirs"), [("SFTTrainer", "SFTTrainer"), ("GRPOTrainer", "GRPOTrainer")])
def test_every_argument_of_trls_trainer_has_its_row(title, theirs):
    """And where the row says "the same", ours has it."""
    import trl

    page = (DOCS / "migrate.md").read_text(encoding="utf-8")
    table = page.partition(f"| `{title}` | here |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:] if "new:" not in line]
    named = {name: says for names, says in rows for name in re.findall(r"`(\w+)`", names)}
    arguments = set(inspect.signature(getattr(trl, theirs).__init__).parameters) - {"self"}
    assert set(named) == arguments
    ours = hf_imitate.RetrodictiveTrainer if theirs == "SFTTrainer" else hf_imitate.AdversarialTrainer
    mine = set(inspect.signature(ours.__init__).parameters)
    gone = {name for name, says in named.items() if says.startswith(("gone", "use "))}
    assert arguments - mine == gone


def test_local_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
