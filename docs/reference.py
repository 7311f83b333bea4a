"""Write settings.md and api.md from docstrings: `python docs/reference.py`. Nothing is imported, so it takes a moment.

The words are those of the source; a page that no longer says them fails tests/test_guide.py.
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

CONFIGS = (
    ("AdversarialConfig", "trainers/adversarial_config.py", "adversarial.md"),
    ("RetrodictiveConfig", "trainers/retrodictive_config.py", "retrodictive.md"),
    ("LatentRetrodictiveConfig", "trainers/latent_retrodictive_config.py", "latent.md"),
)

# Heading -> (name, or class and the methods shown; import path; file). `from hf_imitate import name` unless said.
API = {
    "Trainers": (
        ("AdversarialTrainer", "hf_imitate", "trainers/adversarial_trainer.py"),
        ("RetrodictiveTrainer", "hf_imitate", "trainers/retrodictive_trainer.py"),
        ("LatentRetrodictiveTrainer", "hf_imitate", "trainers/latent_retrodictive_trainer.py"),
    ),
    "Using an imitator": (
        ("Imitator: from_pretrained answer log_prob verify human_logit residual", "hf_imitate", "imitator.py"),
        ("LogProb", "hf_imitate.log_prob_reports", "log_prob_reports.py"),
        ("Verification", "hf_imitate.verification", "verification.py"),
        (
            "ResidualImitator: choose resampling log_prob enclose_log_prob",
            "hf_imitate.residual_imitator",
            "residual_imitator.py",
        ),
        ("LatentImitator: answer log_prob verify", "hf_imitate.latent_imitator", "latent_imitator.py"),
        ("ThoughtAnswer", "hf_imitate.latent_imitator", "latent_imitator.py"),
    ),
    "Distinguisher": (
        (
            "Distinguisher: from_pretrained from_causal_lm score set_checks save_pretrained",
            "hf_imitate",
            "distinguisher.py",
        ),
        ("fit", "hf_imitate.distinguisher_fit", "distinguisher_fit.py"),
    ),
    "Audit": (
        ("audit", "hf_imitate", "audits/run.py"),
        ("AuditReport: save load to_markdown", "hf_imitate", "audits/report.py"),
        ("Finding: to_json from_json", "hf_imitate", "audits/report.py"),
        ("audit_power", "hf_imitate.audits.power", "audits/power.py"),
    ),
    "Data": (
        ("split_by_question", "hf_imitate", "rows.py"),
        ("load_docstrings", "hf_imitate", "docstrings.py"),
        ("tiny_base", "hf_imitate.tiny_base", "tiny_base.py"),
    ),
    "Cards and the Hub": (
        ("push_folder", "hf_imitate.hub_cards.push", "hub_cards/push.py"),
        ("merge", "hf_imitate.card_cli", "card_cli.py"),
        ("findings_of", "hf_imitate.hub_cards.model_index", "hub_cards/model_index.py"),
    ),
    "Log-probabilities and bounds": (
        ("mean_log_prob_lower_bound", "hf_imitate.retrodictive_bounds", "retrodictive_bounds.py"),
        ("string_log_prob", "hf_imitate.tokenizations", "tokenizations.py"),
        ("thoughts_needed", "hf_imitate.weight_diagnostics", "weight_diagnostics.py"),
        ("log_prob_of_answer", "hf_imitate.counting", "counting.py"),
    ),
}

_SECTIONS = {"Args", "Parameters", "Attributes", "Returns", "Raises", "Source", "Example"}
_ITEM = re.compile(r"([\w.*]+(?:, [\w.*]+)*)(?: \(((?:[^()]|\([^()]*\))*)\))?:(?:\s+|$)(.*)", re.DOTALL)


class Setting(NamedTuple):
    """One field of a config as its docstring has it."""

    name: str
    type: str
    text: str


def source_file(path: str) -> Path:
    """A source file by its path from the repository's root, or from `hf_imitate/`."""
    return ROOT / path if path.startswith(("trainers/", "hub_cards/")) else ROOT / "hf_imitate" / path


def find(name: str, path: str) -> ast.ClassDef | ast.FunctionDef:
    """The class or function of a file, or `LookupError`."""
    for node in ast.parse(source_file(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"{path} defines no {name!r}; name it as it is called now in docs/reference.py.")


def sections(docstring: str) -> list[tuple[str, str]]:
    """A docstring in parts: ("", words), ("Args", words without their indent), ..."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in docstring.splitlines():
        title = line.removesuffix(":")
        if line.endswith(":") and title in _SECTIONS:
            parts.append((title, []))
        elif parts[-1][0] and line and not line.startswith(" "):
            parts.append(("", [line]))
        else:
            parts[-1][1].append(line)
    return [(title, textwrap.dedent("\n".join(lines)).strip("\n")) for title, lines in parts]


def items(text: str) -> list[Setting]:
    """The entries of a section: a name, a type in brackets, what it means."""
    entries: list[list[str]] = []
    for line in text.splitlines():
        if line and not line.startswith(" ") and (_ITEM.match(line) or not entries):
            entries.append([line])
        else:
            entries[-1].append(line)
    found = []
    for entry in entries:
        whole = " ".join(line.strip() for line in entry).strip()
        match = _ITEM.fullmatch(whole)
        found.append(Setting(match[1], match[2] or "", match[3]) if match else Setting("", "", whole))
    return found


def plain(text: str) -> str:
    """References to objects as code: [`~trl.SFTConfig`] is `SFTConfig`."""
    return re.sub(r"\[`~?([^`]+)`\](?!\()", lambda match: f"`{match[1].rpartition('.')[2]}`", text)


def as_markdown(docstring: str) -> str:
    """A docstring as Markdown: arguments as a list, the rest as it is."""
    parts = []
    for title, text in sections(docstring):
        if not text:
            continue
        if title in ("", "Example"):
            parts.append(plain(text))
        elif title in ("Returns", "Source"):
            words = " ".join(line.strip() for line in text.splitlines())
            parts.append(f"**{title}:** {plain(words)}")
        else:
            lines = [f"- {_item(one)}" for one in items(text)]
            parts.append("\n".join([f"**{title}**", "", *lines]))
    return "\n\n".join(parts)


def _item(one: Setting) -> str:
    head = ", ".join(f"`{name}`" for name in one.name.split(", ")) if one.name else ""
    kind = f" ({one.type})" if one.type else ""
    return plain(f"{head}{kind}: {one.text}" if head else one.text)


def signature(node: ast.FunctionDef, name: str) -> str:
    """A call as the source declares it, without `self`."""
    arguments = ast.parse(ast.unparse(node.args).join(("def f(", "): ..."))).body[0].args
    for part in (arguments.posonlyargs, arguments.args):
        if part and part[0].arg in ("self", "cls"):
            part.pop(0)
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    shown = [_argument(one, default) for one, default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        shown.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [
        _argument(one, default)
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if not one.arg.startswith("_")
    ]
    if arguments.kwarg:
        shown.append(f"**{arguments.kwarg.arg}")
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= 100 else name + "(\n" + "".join(f"    {one},\n" for one in shown) + ")"


def _argument(one: ast.arg, default: ast.expr | None) -> str:
    return one.arg if default is None else f"{one.arg}={ast.unparse(default)}"


def _entry(spec: str, module: str, path: str) -> str:
    name, _, shown = spec.partition(": ")
    node = find(name, path)
    parts = [f"### {name}", f"`from {module} import {name}`"]
    methods = {}
    if isinstance(node, ast.ClassDef):
        methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        call = signature(methods["__init__"], name) if "__init__" in methods else ""
    else:
        call = signature(node, name)
    if call:
        parts.append(f"```py\n{call}\n```")
    parts.append(as_markdown(_docstring(node, name)))
    for method in shown.split():
        parts.append(f"#### {name}.{method}")
        parts.append(f"```py\n{signature(methods[method], method)}\n```")
        parts.append(as_markdown(_docstring(methods[method], f"{name}.{method}")))
    return "\n\n".join(parts)


def _docstring(node: ast.ClassDef | ast.FunctionDef, name: str) -> str:
    words = ast.get_docstring(node)
    if not words:
        raise LookupError(f"{name} has no docstring; write one.")
    return words


def settings(name: str, path: str) -> list[Setting]:
    """The fields that a config's docstring describes."""
    (text,) = (text for title, text in sections(_docstring(find(name, path), name)) if title == "Parameters")
    return items(text)


def settings_page() -> str:
    """docs/settings.md."""
    parts = [
        "# Settings",
        "Every setting that is ours, in the words of the config's docstring (this page is written by "
        "`docs/reference.py`). All others are TRL's: `GRPOConfig`'s and `SFTConfig`'s. Each can be given in Python, "
        "in the YAML file of `hf-imitate <command> --config`, or as a flag.",
    ]
    for name, path, page in CONFIGS:
        described = as_markdown(_docstring(find(name, path), name))
        parts.append(f"## {name}\n\nOf [{page.removesuffix('.md')}.md]({page}).\n\n{described}")
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """docs/api.md."""
    parts = [
        "# API",
        "What may be called, in the words of the docstrings (this page is written by `docs/reference.py`). The "
        "configs are in [settings.md](settings.md); what each name promises is in [contract.md](contract.md). "
        "Log-probabilities are nats.",
    ]
    for heading, entries in API.items():
        parts.append(f"## {heading}")
        parts += [_entry(*entry) for entry in entries]
    return "\n\n".join(parts) + "\n"


PAGES = {"settings.md": settings_page, "api.md": api_page}

if __name__ == "__main__":
    for file, write in PAGES.items():
        (DOCS / file).write_text(write(), encoding="utf-8")
