"""Write docs/errors.md from the sources: every error with its cure, in the words that users see.

`python docs/error_page.py`, which `make docs` calls, writes it; tests/test_error_page.py fails where page and sources
differ.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"

INTRODUCTION = """\
# Every error and its cure

What the library refuses, in the words it uses, by what you were doing. "…" stands for what was given: a name, a
number, a path. The bold part says what was found and what was needed; what follows says what to do. Rows of data are
named by data set, column and number, and never shown. Bad settings fail in the config, before a model loads; bad rows
in the trainer's constructor or the first line of `audit`, within a second. What is only counted (answers cut at a
limit, rows of weight 0, questions that leave no room) is a warning with its number, not an error.

This page is written from the sources by `python docs/error_page.py`.
"""

ROWS = "Giving rows, questions and answers"
SETTINGS = "Setting up a training"
CHECKS = "Checks and rewards of your own"
FINITE = "While it trains: numbers that are not finite"
RESUME = "Saving and resuming"
LOAD = "Loading an imitator, a distinguisher or a base"
USE = "Answering, scoring, verifying"
AUDIT = "Auditing"
CARDS = "Cards and pushes"
SHELL = "On the command line"
FORMULAS = "Calling the parts and the mathematics directly"

ABOUT = {
    ROWS: "A `datasets.Dataset` with `prompt` and `completion`; lists passed in by hand.",
    SETTINGS: "Configs, models, adapters, tokenizers and distinguishers that do not go together.",
    CHECKS: "They are tried on four human answers before a model loads, and again at every batch.",
    FINITE: "The run stops before anything is updated, on all processes, and every message goes on with the newest "
    "complete checkpoint from before the step. Under fp16 alone the gradient scaler skips such steps; "
    "`gradients/skipped` is their share.",
    RESUME: "A checkpoint that a crash left half written is passed over; the log says which and why.",
    LOAD: "Files of strangers are read before anything is loaded, and none is run: [security](security.md).",
    USE: "`Imitator` and `Distinguisher`, once loaded.",
    AUDIT: "A finding that cannot be measured is no error: its `value` is None and `detail` has the reason.",
    CARDS: "Nothing was pushed where one of these was raised.",
    SHELL: "`hf-imitate ...`; errors of settings and rows are those above.",
    FORMULAS: "Estimators, bounds, circuits, planted schemes: for those who build on them.",
}

# By module; what is not here goes by its folder, so that a new file has a place.
SECTIONS = {
    ROWS: "rows grouping human_rows rendering questions cli_data docstrings surface retrodictive_rows "
    "latent_rows roles",
    CHECKS: "checks contest adversarial_rewards",
    FINITE: "finite",
    RESUME: "checkpoints imitator_saving adversarial_saving latent_saving",
    LOAD: "causal_lm repo_checks strict_json distinguisher_files distinguisher_loading classifier "
    "latent_imitator thoughts",
    USE: "imitator sampling scoring candidates residual_imitator residual_verification verification processed_law "
    "tokenizations log_prob_reports replay distinguisher distinguisher_ensemble ngram_distinguisher",
    SETTINGS: "retrodictor distinguisher_body distinguisher_fit pairs",
    CARDS: "card_cli",
    SHELL: "cli demo demo_report demo_thinking tiny_base train_cli audit_cli",
}
FOLDERS = {"trainers": SETTINGS, "hub_cards": CARDS, "audits": AUDIT, "hf_imitate": FORMULAS}
# They say that a method is a subclass's to write, end a process, or answer Python's own protocols.
NO_MESSAGES = {"NotImplementedError", "SystemExit", "AttributeError", "KeyboardInterrupt", "StopIteration"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Every source file of the package, parsed."""
    for folder in ("hf_imitate", "trainers", "hub_cards"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def section_of(path: Path, error: str) -> str:
    """Where on the page an error of this file stands."""
    if error == "FloatingPointError":
        return FINITE
    named = next((section for section, modules in SECTIONS.items() if path.stem in modules.split()), None)
    return named or FOLDERS[path.parent.name]


def words(node: ast.expr) -> str | None:
    """The text of a string or an f-string, with "…" for what is filled in; `None` for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def raised(
    path: Path, tree: ast.Module, functions: dict[str, ast.FunctionDef]
) -> Iterator[tuple[int, str, str | None]]:
    """Line, kind and message of every error that a file raises."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        kind = ast.unparse(node.exc.func)
        if kind in NO_MESSAGES:
            continue
        given = node.exc.args[0] if node.exc.args else None
        if isinstance(given, ast.Call) and isinstance(given.func, ast.Name) and given.func.id in functions:
            # A function puts the message together.
            returned = [n.value for n in ast.walk(functions[given.func.id]) if isinstance(n, ast.Return) and n.value]
            yield node.lineno, kind, next((said for said in map(words, returned) if said), "…")
        else:
            yield node.lineno, kind, given and (words(given) or "…")  # a variable passes on another's words


def errors() -> dict[str, dict[str, list[str]]]:
    """Messages by section and file, in the order of the sources; each once."""
    parsed = list(sources())
    functions = {node.name: node for _, tree in parsed for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found: dict[str, dict[str, list[str]]] = {section: {} for section in ABOUT}
    for path, tree in parsed:
        for _, kind, message in sorted(raised(path, tree, functions), key=lambda one: one[0]):
            own = found[section_of(path, kind)].setdefault(path.relative_to(ROOT).as_posix(), [])
            if message and message.strip("… ") and message not in own:  # not what only passes on another's words
                own.append(message)
    return found


def entry(message: str) -> str:
    """One line of the page: what was found in bold, then the cure."""
    message = " ".join(message.split())
    first, end, rest = message.partition(". ")
    while first.count("`") % 2 and end:  # a full stop inside of code
        more, end, rest = rest.partition(". ")
        first = f"{first}. {more}"
    first = first.rstrip(".:")
    return f"- **{_escaped(first)}.** {_escaped(rest)}".rstrip()


def _escaped(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts)


def page() -> str:
    """The whole page."""
    blocks = [INTRODUCTION]
    for section, files in errors().items():
        blocks.append(f"## {section}\n\n{ABOUT[section]}\n")
        blocks += [f"`{file}`\n\n" + "\n".join(map(entry, own)) + "\n" for file, own in files.items() if own]
    return "\n".join(blocks)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
