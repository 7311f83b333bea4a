"""Docstrings: what the standard library's authors wrote, and the rest of their prose without any of it."""

import ast
import importlib.util
import inspect
import json
import random
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from hf_imitate.docstrings import MAX_PROMPT_CHARACTERS, load_docstrings, load_prose


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return load_docstrings()


@pytest.fixture(scope="module")
def prose(pairs) -> list[str]:
    return load_prose(pairs)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package of given files and makes it importable."""

    def write(**files: str | bytes) -> str:
        folder = tmp_path / "little_package"
        for name, text in {"__init__": "", **files}.items():
            path = folder / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        monkeypatch.syspath_prepend(str(tmp_path))
        return folder.name

    return write


def test_the_standard_library_gives_about_six_thousand_pairs(pairs):
    assert 3_500 < len(pairs) < 9_000
    assert pairs.column_names == ["prompt", "completion", "source", "module"]


def test_pairs_agree_with_what_python_itself_says_of_imported_functions(pairs):
    """Another road: `inspect` on the live functions of modules that import nothing harmful."""
    import shlex
    import textwrap as text_module

    rows = {
        source: (prompt, completion) for prompt, completion, source, _ in zip(*pairs.to_dict().values(), strict=True)
    }
    for module in (shlex, text_module, json):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and inspect.getdoc(function):
                prompt, completion = rows[f"{module.__name__}.{name}"]
                assert completion == inspect.getdoc(function).strip().splitlines()[0].strip()
                assert prompt.startswith(f"def {name}(")
                for argument in inspect.signature(function).parameters:
                    assert argument in prompt


def test_questions_are_short_definitions_that_end_their_line(pairs):
    for prompt, completion in zip(pairs["prompt"][:], pairs["completion"][:], strict=True):
        assert prompt.startswith(("def ", "async def "))
        assert prompt.endswith("):\n")
        assert prompt.count("\n") == 1
        assert len(prompt) <= MAX_PROMPT_CHARACTERS
        assert completion == completion.strip()
        assert "\n" not in completion
        assert any(character.isalpha() for character in completion)


def test_repeats_of_both_are_dropped_and_different_answers_to_one_question_stay(pairs):
    rows = Counter(zip(pairs["prompt"][:], pairs["completion"][:], strict=True))
    assert max(rows.values()) == 1
    assert Counter(pairs["prompt"][:])["def close(self):\n"] > 5


def test_a_second_load_gives_the_same_rows_in_the_same_order(pairs):
    assert load_docstrings().to_dict() == pairs.to_dict()


def test_every_kind_of_function_makes_the_expected_row(package):
    name = package(
        module='''
        """Module prose."""
        import does_not_exist
        raise RuntimeError("executed")

        def plain(a, b: int = 3, *rest, key=None, other="a rather long default", **options) -> str:
            """  First line.

            Second paragraph.
            """

        class Box:
            """Class prose."""
            def open(self, /, where, *, wide=True):
                "Open it."
            @classmethod
            async def load(cls, path):
                """Load
                from a path."""
        try:
            def guarded(): "In a try."
        except ImportError:
            def guarded(): "In a handler."
        if True:
            pass
        else:
            def chosen(): "In an else."
        def outer():
            """Outer."""
            def inner(): "Not reachable by name."
        def bare(): pass
        def session():
            """>>> session()"""
        def rule():
            """-----"""
        '''
    )
    rows = load_docstrings([name])
    assert list(zip(rows["prompt"][:], rows["completion"][:], rows["source"][:], strict=True)) == [
        ("def plain(a, b=3, *rest, key=None, other=..., **options):\n", "First line.", f"{name}.module.plain"),
        ("def open(self, /, where, *, wide=True):\n", "Open it.", f"{name}.module.Box.open"),
        ("async def load(cls, path):\n", "Load", f"{name}.module.Box.load"),
        ("def guarded():\n", "In a try.", f"{name}.module.guarded"),
        ("def guarded():\n", "In a handler.", f"{name}.module.guarded"),
        ("def chosen():\n", "In an else.", f"{name}.module.chosen"),
        ("def outer():\n", "Outer.", f"{name}.module.outer"),
    ]
    assert set(rows["module"][:]) == {f"{name}.module"}
    assert name not in sys.modules


def test_written_signatures_are_the_ones_ast_writes(pairs):
    """Where nothing was shortened, the question parses back to itself."""
    for prompt in random.Random(0).sample(pairs["prompt"][:], 300):
        if "..." not in prompt:
            assert ast.unparse(ast.parse(f"{prompt}    pass")).splitlines()[0] == prompt.strip()


def test_absurd_signatures_are_cut_between_arguments_and_counted(package):
    arguments = ", ".join(f"argument_{number}" for number in range(100))
    rows = load_docstrings([package(module=f"def f({arguments}):\n    'Words.'")])
    assert rows["prompt"][0].endswith(", ...):\n")
    assert 150 < len(rows["prompt"][0]) <= MAX_PROMPT_CHARACTERS
    assert "1 questions were shortened" in rows.info.description
    one = load_docstrings([package(module=f"def {'f' * 150}({'a' * 150}):\n    'Words.'")])
    assert one["prompt"][0] == f"def {'f' * 150}(...):\n"


def test_unreadable_files_are_skipped_and_counted(package):
    name = package(good="def f(): 'Words.'", bad="def f(:", null=b"\0", latin=b"# \xff\ndef f(): 'Words.'")
    rows = load_docstrings([name])
    assert len(rows) == 1
    assert "3 unreadable files" in rows.info.description


def test_broken_text_is_no_answer(package):
    rows = load_docstrings([package(module="def f(): 'Words \\ud800'\ndef g(): 'Nul \\0'\ndef h(): 'Words.'")])
    assert rows["completion"][:] == ["Words."]


def test_tests_are_left_out(package):
    name = package(module="def f(): 'Words.'", tests__in__test_module="def g(): 'Words of a test.'")
    assert load_docstrings([name])["completion"][:] == ["Words."]


@pytest.mark.parametrize("name", ["no_such_package_at_all", "os.path", "", "sys", "_socket"])
def test_packages_without_sources_are_named(name):
    with pytest.raises(ValueError, match=f"`packages` names {name!r}"):
        load_docstrings([name])


def test_one_string_is_not_a_list_of_packages():
    with pytest.raises(TypeError, match=r"packages=\['json'\]"):
        load_docstrings("json")


def test_a_package_without_docstrings_is_an_error(package):
    with pytest.raises(ValueError, match="No function with a docstring"):
        load_docstrings([package(module="x = 1")])


def test_a_frozen_module_is_found():
    rows = load_docstrings(["os"])
    assert "os.walk" in rows["source"][:]


def windows(text: str, width: int = 16) -> np.ndarray:
    """A hash of each run of `width` bytes; equal runs have equal hashes."""
    content = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint64)
    hashes = np.zeros(max(0, len(content) - width + 1), dtype=np.uint64)
    for offset in range(width):
        hashes = hashes * np.uint64(1_000_003) + content[offset : offset + len(hashes)]
    return hashes


def contains(seen: np.ndarray, hashes: np.ndarray) -> bool:
    places = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1)
    return bool((seen[places] == hashes).all())


def occurring(needles: list[str], texts: list[str]) -> list[str]:
    """The needles that stand in a text, whitespace folded: by brute force where a hash does not already exclude it."""
    joined = "\n".join(" ".join(text.split()) for text in texts)
    seen = np.unique(windows(joined))
    flat = [" ".join(needle.split()) for needle in dict.fromkeys(needles)]
    maybe = [needle for needle in flat if contains(seen, windows(needle))]
    return [needle for needle in maybe if needle in joined]


def long_answers(pairs: Dataset) -> list[str]:
    return [answer for answer in pairs["completion"][:] if len(answer.split()) >= 3]


def test_no_question_and_no_answer_stands_in_the_prose(pairs, prose):
    """Answers of one or two words are words and may occur."""
    assert occurring([*long_answers(pairs), *pairs["prompt"]], prose) == []


def test_the_prose_would_leak_without_the_filter(pairs):
    """The control: with nothing excluded the same search does find answers."""
    nothing = Dataset.from_dict({"prompt": ["def no_such_name():\n"], "completion": ["no such answer at all"]})
    packages = ["asyncio", "email", "logging", "tkinter", "distutils", "unittest", "turtledemo"]
    packages = [name for name in packages if importlib.util.find_spec(name)]
    found = occurring(long_answers(pairs), load_prose(nothing, packages))
    assert len(found) > 3
    assert occurring(found, load_prose(pairs, packages)) == []


def test_leaking_paragraphs_go_and_their_neighbours_stay(package):
    name = package(
        module='''
        """Kept: the first paragraph of the module.

        Dropped, since it says how to count all the
        sheep in the field, word for word.

        Kept: two short words.
        """
        # Dropped: def shear(sheep): is a question.

        # Kept: def shear(other): is none.

        x = "# not a comment"  # a comment beside code is too short to learn from
        def count():
            """First line.

            Kept: the tail.
            """
        '''
    )
    rows = Dataset.from_dict(
        {"prompt": ["def shear(sheep):\n"] * 2, "completion": ["count all the sheep in the field", "short words"]}
    )
    assert load_prose(rows, [name]) == [
        "Kept: the first paragraph of the module.\n\nKept: two short words.",
        "Kept: def shear(other): is none.",
    ]
    assert "Kept: the tail." not in load_prose(rows, [name])  # under 20 characters


def test_an_answer_that_only_joined_paragraphs_spell_is_found(package):
    name = package(module='"""Twenty characters of count all\n\nthe woolly sheep in here, at length."""')
    rows = Dataset.from_dict({"prompt": ["def f():\n"], "completion": ["count all the woolly sheep"]})
    assert load_prose(rows, [name]) == ["Twenty characters of count all", "the woolly sheep in here, at length."]


def test_an_answer_inside_longer_words_is_found(package):
    name = package(module='"""Do not recount the sheepskins before breakfast."""')
    rows = Dataset.from_dict({"prompt": ["def f():\n"], "completion": ["count the sheep"]})
    assert load_prose(rows, [name]) == []


def test_prose_is_plenty_without_repeats_and_without_code(prose):
    assert sum(map(len, prose)) > 1_000_000
    assert len(set(prose)) == len(prose)
    assert not any(text.startswith(("#", ">>>", "-*-")) for text in prose)


def test_nothing_is_imported():
    program = """if True:
        import sys
        from hf_imitate.docstrings import load_docstrings
        before = set(sys.modules)
        load_docstrings(["antigravity", "turtle", "wsgiref", "jinja2"])
        print({"antigravity", "turtle", "wsgiref", "jinja2", "torch"} & (set(sys.modules) - before))
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert result.stdout.strip() == "set()"
