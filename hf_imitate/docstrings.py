"""The embedded real data set: what programmers wrote under the functions of the Python that is running.

Sources are parsed with `ast`; nothing is imported, executed or downloaded.
"""

import ast
import gc
import logging
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetInfo, Features, Value

logger = logging.getLogger(__name__)

PROSE_VERSION = 1  # raised when `load_docstrings` or `load_prose` gives other texts: cached bases depend on them
MAX_PROMPT_CHARACTERS = 200
MAX_DEFAULT_CHARACTERS = 12
MIN_LEAK_WORDS = 3
MIN_PROSE_CHARACTERS = 20
_INSTALLED = ("site-packages", "dist-packages", "__pycache__")
_NO_PAIRS = ("test", "tests", "idle_test", "idlelib", "lib2to3")

# Strings are matched only to be skipped: a `#` inside one begins no comment.
_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*', re.DOTALL
)
_NO_PROSE = re.compile(r"^(?:!|.*coding[:=]|\s*type: |.*\bnoqa\b|.*\bpragma\b|.*\bpylint\b)")
_LETTER = re.compile(r"[^\W\d_]")
_BROKEN = re.compile("[\0\ud800-\udfff]")
_DEFINITION = re.compile(r"\bdef (\w+)\(")


class _Source(NamedTuple):
    module: str  # dotted
    is_paired: bool  # whether its functions make pairs; tests and bundled tools only lend their prose
    text: str
    tree: ast.Module


def load_docstrings(packages: Sequence[str] | None = None) -> Dataset:
    """Load pairs of a function's signature and the first line of the docstring that its author wrote.

    The question is the definition's first line, such as `def get(key, default=None):` and a newline. Annotations are
    left out, defaults over 12 characters become `...`, and argument lists are cut so that a question has at most 200
    characters. Equal questions with different answers all stay; rows that repeat both are dropped.

    Args:
        packages (`Sequence[str]`, *optional*):
            Importable top-level packages to parse instead, found without importing them. By default the standard
            library of the running Python, without its tests and the bundled tools `idlelib` and `lib2to3`.

    Returns:
        `datasets.Dataset`: `prompt`, `completion`, `source` (dotted path of the function) and `module`, ordered by
        module and line. `info.description` says how many rows were shortened, repeated or unreadable.

    Raises:
        TypeError: `packages` is a string.
        ValueError: a package is not found or has no Python sources, or no function there has a docstring.
        FileNotFoundError: the running Python came without its sources.
    """
    counts: Counter[str] = Counter()
    columns: dict[str, list[str]] = {"prompt": [], "completion": [], "source": [], "module": []}
    seen: set[tuple[str, str]] = set()
    for source in _read_sources(packages, counts, is_paired_only=True):
        for qualified_name, function in _functions(source.tree.body):
            prompt, is_shortened = _question(function)
            completion = (ast.get_docstring(function) or "").strip().partition("\n")[0].strip()
            if not _is_answer(completion):
                counts["without an answer"] += 1
            elif (prompt, completion) in seen:
                counts["repeated"] += 1
            else:
                seen.add((prompt, completion))
                counts["shortened"] += is_shortened
                row = (prompt, completion, f"{source.module}.{qualified_name}", source.module)
                for values, value in zip(columns.values(), row, strict=True):
                    values.append(value)
    if not seen:
        raise ValueError(f"No function with a docstring in {packages or 'the standard library'}; name other packages.")
    num_rows = len(seen)
    num_sharing = sum(number for number in Counter(columns["completion"]).values() if number > 1)
    description = (
        f"{num_rows} functions of {counts['files']} files: the question is the signature, the answer the docstring's "
        f"first line. {num_sharing} rows share their answer with another row; {counts['shortened']} questions were "
        f"shortened. Left out: {counts['repeated']} exact repeats, {counts['without an answer']} functions whose "
        f"docstring is missing or begins without words, {counts['unreadable']} unreadable files."
    )
    logger.info(description)
    features = Features({column: Value("string") for column in columns})
    return Dataset.from_dict(columns, features=features, info=DatasetInfo(description=description, features=features))


def load_prose(exclude: Dataset, packages: Sequence[str] | None = None) -> list[str]:
    """Load the rest of the running Python's prose, with no question or answer of `exclude` in it.

    Module and class docstrings, what follows the first line of a function's docstring, and comments on lines of their
    own; tests and bundled tools too, where they are installed. A paragraph that holds a question's signature or an
    answer of at least three words is left out, compared with all whitespace runs as one blank.

    Args:
        exclude (`datasets.Dataset`):
            Rows with `prompt` and `completion`, as [`load_docstrings`] gives them.
        packages (`Sequence[str]`, *optional*):
            As in [`load_docstrings`].

    Returns:
        `list[str]`: texts without repeats, ordered by module and line.

    Raises:
        TypeError: `packages` is a string.
        ValueError: a package is not found or has no Python sources.
        FileNotFoundError: the running Python came without its sources.
    """
    counts: Counter[str] = Counter()
    sources = _read_sources(packages, counts, is_paired_only=False)
    candidates = list(dict.fromkeys(text for source in sources for text in _prose_of(source)))
    leaks = _LeakFilter(exclude["prompt"][:], exclude["completion"][:], candidates)
    texts = list(dict.fromkeys(clean for text in candidates for clean in leaks.clean(text)))
    logger.info(
        "Prose of %d files: %d texts, %d characters; %d paragraphs that hold a question or an answer were left out.",
        *(counts["files"], len(texts), sum(map(len, texts)), leaks.num_dropped),
    )
    return texts


def prose_files() -> list[Path]:
    """Return the files that [`load_docstrings`] and [`load_prose`] read by default, in their order."""
    return [path for _, path, _ in _stdlib_files()]


def _read_sources(packages: Sequence[str] | None, counts: Counter[str], *, is_paired_only: bool) -> Iterator[_Source]:
    for module, path, is_paired in _stdlib_files() if packages is None else _package_files(packages):
        if is_paired_only and not is_paired:
            continue
        try:
            content = path.read_bytes()
            with warnings.catch_warnings(), _paused_garbage_collection():
                # Old escape sequences in other people's sources are not this program's news.
                warnings.simplefilter("ignore")
                tree = ast.parse(content)
            text = content.decode("utf-8")
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            counts["unreadable"] += 1
            continue
        counts["files"] += 1
        yield _Source(module, is_paired, text, tree)


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """A tree is millions of live objects; collections that look for garbage among them double the time to parse."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _stdlib_files() -> list[tuple[str, Path, bool]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _files_below(root, "", skipped=_INSTALLED)
    if not files:
        raise FileNotFoundError(
            f"No Python sources in {root}: this Python came without its library's sources. Name packages that have "
            "theirs, such as `load_docstrings(packages=['transformers'])`, or use a full Python installation."
        )
    return files


def _package_files(packages: Sequence[str]) -> list[tuple[str, Path, bool]]:
    if isinstance(packages, str):
        raise TypeError(f"`packages` must be a list of names; got one string. Write `packages=[{packages!r}]`.")
    files: list[tuple[str, Path, bool]] = []
    for package in packages:
        found = _files_of(package)
        if not found:
            raise ValueError(
                f"`packages` names {package!r}, which was not found or has no Python sources. "
                "Give the names of installed top-level packages, as they are imported."
            )
        files += found
    return files


def _files_of(package: str) -> list[tuple[str, Path, bool]]:
    if not package.isidentifier():
        return []
    # The path finder first: it finds the files of modules that are frozen into the interpreter, such as `os`.
    spec = PathFinder.find_spec(package) or find_spec(package)
    if spec is None:
        return []
    folders = spec.submodule_search_locations
    if folders is None:
        is_source = spec.origin is not None and spec.origin.endswith(".py")
        return [(package, Path(str(spec.origin)), True)] if is_source else []
    files = [file for folder in folders for file in _files_below(Path(folder), package, skipped=_INSTALLED)]
    return files


def _files_below(root: Path, package: str, skipped: Iterable[str]) -> list[tuple[str, Path, bool]]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = [package] * bool(package) + list(path.relative_to(root).with_suffix("").parts)
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                files.append((module, path, not set(parts) & set(_NO_PAIRS)))
    return sorted(files)


def _functions(
    body: Iterable[ast.stmt], prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions one can name from outside: of modules and classes, also under `if` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from _functions([*node.body, *handlers, *node.orelse], prefix)


def _question(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, bool]:
    """The definition's first line with a newline, and whether arguments were cut from it."""
    start = f"{'async ' if isinstance(function, ast.AsyncFunctionDef) else ''}def {function.name}("
    arguments = _arguments(function.args)
    full = f"{start}{', '.join(arguments)}):\n"
    if len(full) <= MAX_PROMPT_CHARACTERS:
        return full, False
    room = MAX_PROMPT_CHARACTERS - len(f"{start}...):\n")
    kept = ""
    for argument in arguments:
        if len(kept) + len(f"{argument}, ") > room:
            break
        kept += f"{argument}, "
    return f"{start}{kept}...):\n", True


def _arguments(arguments: ast.arguments) -> list[str]:
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    num_plain = len(positional) - len(arguments.defaults)
    shown = positional[:num_plain]
    shown += [f"{name}={_default(d)}" for name, d in zip(positional[num_plain:], arguments.defaults, strict=True)]
    if arguments.posonlyargs:
        shown.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        shown.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        shown.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        shown.append(argument.arg if default is None else f"{argument.arg}={_default(default)}")
    if arguments.kwarg:
        shown.append(f"**{arguments.kwarg.arg}")
    return shown


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    return text if len(text) <= MAX_DEFAULT_CHARACTERS and "\n" not in text else "..."


def _is_answer(text: str) -> bool:
    """Words of prose; an interpreter session (`>>> `) or a rule of signs is no answer, broken text no text."""
    return bool(_LETTER.search(text)) and not text.startswith(">>>") and _is_text(text)


def _is_text(text: str) -> bool:
    return not _BROKEN.search(text)


def _prose_of(source: _Source) -> Iterator[str]:
    texts = []
    for node in _documented(source.tree):
        docstring = (ast.get_docstring(node) or "").strip()
        is_pair = source.is_paired and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        texts.append(docstring.partition("\n")[2] if is_pair else docstring)
    for text in (*texts, *_comment_blocks(source.text)):
        paragraphs = (_clean_paragraph(paragraph) for paragraph in re.split(r"\n\s*\n", text))
        joined = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        if len(joined) >= MIN_PROSE_CHARACTERS and _is_text(joined):
            yield joined


def _documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every module, class and function below `node`. Only statements are walked: expressions document nothing."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody"):
        below = getattr(node, field, None)
        for child in below if isinstance(below, list) else []:
            yield from _documented(child)


def _comment_blocks(text: str) -> Iterator[str]:
    """Comments that own their lines, neighbours joined to one text."""
    block: list[str] = []
    end = -1
    for match in _STRING_OR_COMMENT.finditer(text):
        start = match.start()
        if text[start] != "#" or text[text.rfind("\n", 0, start) + 1 : start].strip():
            continue
        if block and text[end:start].strip(" \t") != "\n":
            yield "\n".join(block)
            block = []
        line = match.group().lstrip("#").removeprefix(" ").rstrip()
        if not _NO_PROSE.match(line):
            block.append(line)
        end = match.end()
    if block:
        yield "\n".join(block)


def _clean_paragraph(paragraph: str) -> str:
    """The lines that have letters; nothing of an interpreter session."""
    if paragraph.lstrip().startswith(">>>"):
        return ""
    lines = (line.rstrip() for line in paragraph.split("\n"))
    return "\n".join(line for line in lines if _LETTER.search(line)).lstrip("#*-=+ \n")


class _LeakFilter:
    """Finds questions and answers inside prose.

    A text that holds an answer holds each of its inner words as a whole word, so only the answers filed under a word
    of the text (each under its rarest inner word) need a search: seconds instead of minutes.
    """

    def __init__(self, questions: Iterable[str], answers: Iterable[str], texts: Iterable[str]):
        self.num_dropped = 0
        frequency = Counter(word for text in texts for word in text.split())
        self._answers: dict[str, list[str]] = {}
        for answer in dict.fromkeys(" ".join(answer.split()) for answer in answers):
            words = answer.split()
            if len(words) >= MIN_LEAK_WORDS:
                rarest = min(words[1:-1], key=lambda word: frequency[word])
                self._answers.setdefault(rarest, []).append(answer)
        self._signatures: dict[str, list[str]] = {}
        for question in dict.fromkeys(" ".join(question.split()) for question in questions):
            for name in _DEFINITION.findall(question):
                self._signatures.setdefault(name, []).append(question)

    def clean(self, text: str) -> list[str]:
        """The text without its leaking paragraphs; paragraphs that leak only together come one by one."""
        paragraphs = text.split("\n\n")
        kept = [paragraph for paragraph in paragraphs if not self._leaks(paragraph)]
        self.num_dropped += len(paragraphs) - len(kept)
        joined = "\n\n".join(kept)
        texts = kept if len(kept) > 1 and self._leaks(joined) else [joined]
        return [text for text in texts if len(text) >= MIN_PROSE_CHARACTERS]

    def _leaks(self, text: str) -> bool:
        flat = " ".join(text.split())
        if any(answer in flat for word in set(flat.split()) for answer in self._answers.get(word, ())):
            return True
        return any(line in flat for name in _DEFINITION.findall(flat) for line in self._signatures.get(name, ()))
