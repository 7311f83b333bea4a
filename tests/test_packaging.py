import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hf_imitate

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hf_imitate", "trainers", "hub_cards")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DATA_SUFFIXES = {".md", ".typed", ".yaml"}


def run_python(program, *flags, cwd, **environment):
    """Run a program in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", program],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def package_files():
    """Every file that a user must get, by its path inside `hf_imitate/`, as the tree has it."""
    files = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in DATA_SUFFIXES | {".py"} and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT / folder).as_posix()
                files[inside if folder == "hf_imitate" else f"{folder}/{inside}"] = path
    return files


def python_blocks(page):
    """The Python programs of a Markdown page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as a user gets it: the wheel built from the sdist built from the tree, unpacked."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    run_python(f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sdist)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_tree_and_nothing_else(installed):
    shipped = {
        path.relative_to(installed / "hf_imitate").as_posix(): path.read_bytes()
        for path in (installed / "hf_imitate").rglob("*")
        if path.is_file()
    }
    assert sorted(shipped) == sorted(package_files())
    assert [inside for inside, path in package_files().items() if shipped[inside] != path.read_bytes()] == []


def test_the_wheel_installs_one_import_package(installed):
    assert sorted(path.name.split("-")[0] for path in installed.iterdir()) == ["hf_imitate", "hf_imitate"]
    (info,) = installed.glob("*.dist-info")
    assert (info / "top_level.txt").read_text().split() == ["hf_imitate"]
    assert "hf-imitate = hf_imitate.cli:main" in (info / "entry_points.txt").read_text()
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text(encoding="utf-8")
    assert (info / "licenses" / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")


def test_the_installed_package_finds_its_folders_inside_itself(installed, tmp_path):
    program = (
        "import hf_imitate, hf_imitate.trainers, hf_imitate.hub_cards;"
        "print(*hf_imitate.__path__, hf_imitate.trainers.__file__, hf_imitate.hub_cards.__file__, sep='\\n')"
    )
    package = installed / "hf_imitate"
    found = run_python(program, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    expected = [package, package / "trainers" / "__init__.py", package / "hub_cards" / "__init__.py"]
    assert [Path(path) for path in found] == expected


def test_a_plain_checkout_works_uninstalled():
    # `-S` leaves site-packages out, and with it the editable install.
    program = (
        "import hf_imitate.trainers, hf_imitate.hub_cards, hf_imitate.audits; print(hf_imitate.trainers.__file__)"
    )
    assert Path(run_python(program, "-S", cwd=ROOT)) == ROOT / "trainers" / "__init__.py"


def test_import_takes_under_a_second_and_loads_no_torch():
    program = (
        "import sys, time; start = time.perf_counter(); import hf_imitate; dir(hf_imitate);"
        "seconds = time.perf_counter() - start;"
        "heavy = {'torch', 'numpy', 'transformers', 'trl', 'datasets'} & set(sys.modules); print(seconds, *heavy)"
    )
    seconds, *heavy = run_python(program, cwd=ROOT).split()
    assert float(seconds) < 1
    assert heavy == []


def test_cards_need_no_torch():
    modules = [f"hf_imitate.hub_cards.{path.stem}" for path in sorted((ROOT / "hub_cards").glob("[!_]*.py"))]
    program = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print('torch' in sys.modules)"
    assert run_python(program, cwd=ROOT) == "False"


@pytest.mark.parametrize("name", sorted(hf_imitate._LAZY))
def test_a_public_name_is_what_its_module_defines(name):
    value = getattr(hf_imitate, name)
    assert value is getattr(importlib.import_module(hf_imitate._LAZY[name]), name)
    assert value.__module__ == hf_imitate._LAZY[name]


@pytest.mark.parametrize("folder", ["hf_imitate", "trainers"])
def test_the_lazy_table_the_types_and_all_agree(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    tables = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("_LAZY", "__all__")
    }
    for_types = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        for alias in node.names
    }
    assert for_types == tables["_LAZY"]
    assert set(tables["__all__"]) - {"__version__"} == set(tables["_LAZY"])


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'Trainer'.*AdversarialTrainer"):
        hf_imitate.Trainer  # noqa: B018


def undocumented(source):
    """The module, its public functions and classes, and the public methods of classes that inherit no words."""
    tree = ast.parse(source)
    nodes = [("the module", tree)]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        nodes.append((node.name, node))
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} <= {"NamedTuple", "Protocol"}:
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            nodes += [(f"{node.name}.{part.name}", part) for part in methods if not part.name.startswith("_")]
    return [name for name, node in nodes if not ast.get_docstring(node)]


def test_every_public_symbol_has_a_docstring():
    silent = {
        inside: undocumented(path.read_text()) for inside, path in package_files().items() if path.suffix == ".py"
    }
    assert {inside: names for inside, names in silent.items() if names} == {}


def test_a_missing_docstring_is_seen():
    documented = "class A:\n    'It counts.'\n    def f(self): ...\n    def _g(self): ...\n"
    source = documented + "def h(): ...\nclass B(A):\n    def f(self): ...\nclass _C:\n    def f(self): ..."
    assert undocumented(source) == ["the module", "A.f", "h", "B"]


def test_the_program_of_the_readme_compiles_and_imports_public_names():
    (program,) = python_blocks("README.md")
    tree = ast.parse(program)
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "hf_imitate"
        for alias in node.names
    }
    assert imported
    assert imported <= set(hf_imitate.__all__)
    assert len(program.splitlines()) <= 18


def test_the_readme_has_one_line_for_every_file():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").rpartition("## Files")[2]
    listed, folder = [], ""
    for line in tree.splitlines():
        if match := re.match(r"([\w./]+/)(\s{2,}|$)", line):
            folder = match[1]
        elif match := re.match(r"  ([\w./-]+)\s{2,}\S", line):
            listed.append(folder + match[1])
    files = [path for path in package_files().values() if path.name not in ("__init__.py", "py.typed")]
    configurations = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in files if path.suffix == ".yaml"}
    files = [path for path in files if path.suffix != ".yaml"]
    files += [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs").glob("*.py"),
        *(ROOT / "benchmarks").rglob("[!_]*.py"),
        *(ROOT / "examples").glob("*.py"),
        *(ROOT / "examples").glob("*.sh"),
    ]
    expected = {path.relative_to(ROOT).as_posix() for path in files} | configurations
    assert sorted(listed) == sorted(expected)


def test_the_settings_of_the_paper_index_are_valid():
    blocks = python_blocks("docs/paper_index.md")
    assert len(blocks) >= 12
    for block in blocks:
        names = {name: getattr(hf_imitate, name) for name in hf_imitate.__all__ if name.endswith("Config")}
        exec(compile(block, "docs/paper_index.md", "exec"), names)


def test_entries_of_the_changelog_have_at_most_25_words():
    entries = re.findall(
        r"^- (.*(?:\n  .*)*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert entries
    assert [entry for entry in entries if len(entry.split()) > 25] == []


def test_the_version_is_said_once():
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert PROJECT["project"]["version"] == hf_imitate.__version__ == citation[1]


def dependencies():
    extras = PROJECT["project"]["optional-dependencies"]
    return PROJECT["project"]["dependencies"], [line for lines in extras.values() for line in lines]


def test_every_dependency_is_bounded_below_and_above_and_says_why():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed, optional = dependencies()
    for line in needed:
        operators = {specifier.operator for specifier in Requirement(line).specifier}
        assert ">=" in operators, line
        assert operators & {"<", "<="}, line
        assert re.search(re.escape(f'"{line}",') + r"  # \w+", text), f"{line} needs a reason in a comment"
    for line in optional:
        assert Requirement(line).specifier, line


def test_the_pinned_versions_lie_inside_the_ranges():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    needed, optional = dependencies()
    ranges = {Requirement(line).name: Requirement(line).specifier for line in [*optional, *needed]}
    assert {Requirement(line).name for line in needed} <= set(pins)
    outside = {name: pin for name, pin in pins.items() if name in ranges and not ranges[name].contains(pin)}
    assert outside == {}
