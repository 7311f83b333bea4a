"""Who may import whom, where formulas live, and how large a file may grow: docs/house.md, made to fail."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hf_imitate", "trainers", "hub_cards")

MATH = {"log_probs", "estimators", "losses", "bounds"}
MATH |= {"weight_diagnostics", "retrodictive_bounds", "population_bounds", "defensive_bounds", "thought_search"}
MATH |= {"cluster_intervals", "deviation_bounds", "e_values", "steganography_theory", "residual"}
PLAIN = {"strict_json"}  # the standard library alone: for everybody
SHELL = {"cli", "train_cli", "answer_cli", "audit_cli", "card_cli", "cli_data", "demo", "demo_report", "demo_thinking"}
MAX_LINES = 400

_MATH_LIBRARIES = {"torch", "numpy", "scipy"}
# `tokenizers` and `safetensors` are how transformers stores what it saves; `tqdm` is how long work shows its end.
_CORE_LIBRARIES = _MATH_LIBRARIES | {
    "transformers",
    "peft",
    "datasets",
    "sklearn",
    "tokenizers",
    "safetensors",
    "tqdm",
}

# layer -> (layers it may import, libraries it may import)
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "plain": (set(), set()),
    "math": ({"math"}, _MATH_LIBRARIES | {"arviz_stats"}),
    "core": ({"core", "math", "plain"}, _CORE_LIBRARIES),
    "report": ({"report", "plain"}, set()),
    "audits": ({"audits", "report", "core", "math"}, _CORE_LIBRARIES | {"matplotlib"}),
    "hub_cards": ({"hub_cards", "report", "plain"}, {"huggingface_hub", "jinja2"}),
    "trainers": (
        {"trainers", "math", "core", "hub_cards"},
        {"torch", "numpy", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tqdm"},
    ),
    "shell": (
        {"shell", "root", "math", "core", "audits", "report", "hub_cards", "trainers"},
        _CORE_LIBRARIES | {"matplotlib", "trl", "accelerate", "huggingface_hub"},
    ),
    # The lazy tables name modules for type checkers only; importing them is the caller's wish.
    "root": ({"root", "math", "core", "audits", "report", "trainers", "hub_cards"}, set()),
}

FORMULAS = {
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "exp",
    "expm1",
    "kl_div",
    "log",
    "log10",
    "log1p",
    "log2",
    "log_softmax",
    "logaddexp",
    "logcumsumexp",
    "logsigmoid",
    "logsumexp",
    "nll_loss",
    "sigmoid",
    "softmax",
    "softplus",
    "tanh",
}
# These `log` write a metric or a message.
_LOGGING_OWNERS = {"self", "super", "accelerator", "logger", "trainer"}

# Of these packages it matters which name is imported.
_NAMES_MATTER = {"hf_imitate", "hf_imitate.trainers", "hf_imitate.hub_cards", "hf_imitate.audits", "huggingface_hub"}
# Core reads a repo; only hub_cards writes one.
_DOWNLOADS = {"huggingface_hub.hf_hub_download", "huggingface_hub.snapshot_download"}

VAGUE_NAMES = {"base", "common", "helper", "helpers", "misc", "shared", "tools", "util", "utils"}


def module_name(path: Path) -> str:
    """The import name of a source file: `trainers/x.py` is `hf_imitate.trainers.x`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "hf_imitate":
        parts.insert(0, "hf_imitate")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def layer_of(module: str) -> str:
    """The layer of docs/house.md that a module of ours belongs to."""
    parts = module.split(".")[1:]
    if not parts:
        return "root"
    if parts[0] in ("trainers", "hub_cards"):
        return parts[0]
    if parts[0] == "audits":
        return "report" if parts[1:] in (["report"], ["report_text"]) else "audits"
    if parts[0] in MATH:
        return "math"
    if parts[0] in PLAIN:
        return "plain"
    return "shell" if parts[0] in SHELL else "core"


def imported_modules(tree: ast.AST, public_names: dict[str, str]) -> list[tuple[str, ast.stmt]]:
    """Every module that a file imports, wherever in the file; a public name counts as the module that defines it."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            if origin in _NAMES_MATTER:
                found += [(public_names.get(alias.name, f"{origin}.{alias.name}"), node) for alias in node.names]
            else:
                found.append((origin, node))
    return [(name.removesuffix(".__version__"), node) for name, node in found]


def import_problems(module: str, source: str, public_names: dict[str, str]) -> list[str]:
    """Say which imports of a module cross a wall of docs/house.md."""
    tree = ast.parse(source)
    at_top = {id(node) for node in tree.body}
    layer = layer_of(module)
    our_layers, libraries = ALLOWED[layer]
    problems = []
    for name, node in imported_modules(tree, public_names):
        where = f"{module}:{node.lineno}: `{name}`"
        top = name.split(".")[0]
        if name.startswith("."):
            problems.append(f"{where} is relative; the folders are mapped, so write the absolute name.")
        elif top in ("trainers", "hub_cards"):
            problems.append(f"{where} is a bare folder; import `hf_imitate.{name}`.")
        elif top == "hf_imitate":
            if name != "hf_imitate" and layer_of(name) not in our_layers:
                problems.append(f"{where} is {layer_of(name)}; {layer} may import only {sorted(our_layers)}.")
        elif layer == "core" and name in _DOWNLOADS:
            continue
        elif top not in sys.stdlib_module_names and top not in libraries:
            problems.append(f"{where} is not a library that {layer} may import: {sorted(libraries)}.")
        elif top in ("matplotlib", "arviz_stats") and id(node) in at_top:
            problems.append(f"{where} is an optional library; import it inside the function that needs it.")
    return problems


def _owner(node: ast.expr) -> str:
    """The last name before the dot: `super` of `super().log`, `accelerator` of `self.accelerator.log`."""
    if isinstance(node, ast.Call):
        return _owner(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def formula_problems(module: str, source: str) -> list[str]:
    """Say where a trainer computes what belongs in a math file."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and node.attr in FORMULAS:
            if not (node.attr == "log" and _owner(node.value) in _LOGGING_OWNERS):
                names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.name in FORMULAS]
        problems += [
            f"{module}:{getattr(node, 'lineno', 0)}: `{name}` is a formula; it belongs in losses.py or estimators.py."
            for name in names
        ]
    return problems


def source_files() -> list[Path]:
    """All Python files of the package."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def read_public_names() -> dict[str, str]:
    """The `_LAZY` tables: public name -> the module that defines it."""
    names: dict[str, str] = {}
    for folder in FOLDERS:
        for node in ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY":
                names |= ast.literal_eval(node.value)
    return names


def tracked_files() -> list[Path]:
    """What git tracks or would track; outside a git checkout, nothing."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [ROOT / line for line in listed.splitlines() if (ROOT / line).is_file()]


# A path of the machine that wrote the file, or where that machine gets its packages from.
_MACHINE = re.compile(r"(?<![\w.~-])/(?:work|tmp|root|home|opt|Users|mnt)/\w|(?:extra-)?index-url|find-links")


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_imports_go_one_way(path):
    assert import_problems(module_name(path), path.read_text(encoding="utf-8"), read_public_names()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "trainers").rglob("*.py")), ids=module_name)
def test_trainers_hold_no_formula(path):
    assert formula_problems(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks"])
def test_nobody_imports_the_bare_folders(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = [name for name, _ in imported_modules(ast.parse(path.read_text(encoding="utf-8")), {})]
        bare = [name for name in names if name.split(".")[0] in ("trainers", "hub_cards") or name.startswith(".")]
        assert bare == [], (
            f"{path.relative_to(ROOT)} imports {bare}; write `hf_imitate.trainers`, `hf_imitate.hub_cards`."
        )


def test_files_fit_in_a_head():
    lengths = {module_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_file_names_say_what_is_inside():
    assert [module_name(path) for path in source_files() if path.stem.lower() in VAGUE_NAMES] == []


def test_tracked_text_names_no_machine():
    found = {}
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path != Path(__file__).resolve() and (match := _MACHINE.search(text)):
            found[str(path.relative_to(ROOT))] = match.group()
    assert found == {}


def test_the_report_of_an_audit_loads_without_torch():
    report = ROOT / "hf_imitate" / "audits" / "report.py"
    if not report.exists():
        pytest.skip("there is no audit report yet")
    program = "import sys, hf_imitate.audits.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hf_imitate.losses", "import transformers"),
        ("hf_imitate.losses", "from hf_imitate.rendering import render"),
        ("hf_imitate.rows", "import trl"),
        ("hf_imitate.rows", "def f():\n    from hf_imitate.trainers.adversarial_config import AdversarialConfig"),
        ("hf_imitate.imitator", "from hf_imitate import AdversarialTrainer"),
        ("hf_imitate.imitator", "from hf_imitate import trainers"),
        ("hf_imitate.imitator", "from huggingface_hub import HfApi"),
        ("hf_imitate.imitator", "import huggingface_hub"),
        ("hf_imitate.imitator", "from hf_imitate.audits.report import Finding"),
        ("hf_imitate.audits.report", "import torch"),
        ("hf_imitate.audits.figures", "import matplotlib.pyplot as plt"),
        ("hf_imitate.weight_diagnostics", "import arviz_stats"),
        ("hf_imitate.hub_cards.facts", "import torch"),
        ("hf_imitate.hub_cards.facts", "from hf_imitate.audits.checks import audit_checks"),
        ("hf_imitate.hub_cards.push", "from hf_imitate.trainers.adversarial_config import AdversarialConfig"),
        ("hf_imitate.trainers.adversarial_trainer", "from hf_imitate.audits.report import Finding"),
        ("hf_imitate.trainers.adversarial_trainer", "from . import adversarial_config"),
        ("hf_imitate.trainers.adversarial_trainer", "import trainers"),
        ("hf_imitate.cli", "from hub_cards.facts import CardFacts"),
    ],
)
def test_a_wrong_import_is_seen(module, source):
    assert len(import_problems(module, source, read_public_names())) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hf_imitate.losses", "import math\nimport torch\nfrom hf_imitate.log_probs import sum_answer_log_probs"),
        ("hf_imitate.rows", "from hf_imitate import __version__"),
        ("hf_imitate.imitator", "from huggingface_hub import snapshot_download"),
        ("hf_imitate.audits.figures", "def draw():\n    import matplotlib.pyplot as plt"),
        ("hf_imitate.hub_cards.facts", "from hf_imitate.audits.report import Finding\nimport huggingface_hub"),
        (
            "hf_imitate.trainers.adversarial_trainer",
            "from hf_imitate import Distinguisher\nfrom trl import GRPOTrainer",
        ),
    ],
)
def test_a_right_import_passes(module, source):
    assert import_problems(module, source, read_public_names()) == []


@pytest.mark.parametrize(
    "line",
    [
        "weights = torch.logsumexp(x, 1)",
        "loss = -F.logsigmoid(margin).mean()",
        "p = logits.softmax(-1)",
        "nats = math.log(2)",
        "from torch.nn.functional import log_softmax",
        "apply(values, torch.exp)",
        "nats = probability.log()",
    ],
)
def test_a_formula_in_a_trainer_is_seen(line):
    assert len(formula_problems("hf_imitate.trainers.x", line)) == 1


@pytest.mark.parametrize("line", ["self.log(metrics)", "super().log(logs, start)", "self.accelerator.log(metrics)"])
def test_logging_is_no_formula(line):
    assert formula_problems("hf_imitate.trainers.x", line) == []


def test_a_machine_path_is_seen():
    # Put together here, so that this file can be searched by others.
    assert _MACHINE.search("saved in " + "/" + "home/me/model")
    assert _MACHINE.search("pip --" + "index-url https://example.org")
    assert not _MACHINE.search("https://example.org/home/x and docs/work/y")
