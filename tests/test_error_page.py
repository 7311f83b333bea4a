"""docs/errors.md lists every error with its cure, in the words that users see."""

import ast
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_imitate.rows import check_columns

error_page = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "docs" / "error_page.py")))


def test_the_page_is_that_of_the_sources():
    assert error_page.PAGE.read_text(encoding="utf-8") == error_page.page(), (
        "docs/errors.md is not that of the sources. Run `make docs`, or `python docs/error_page.py`."
    )


def test_every_error_says_something():
    parsed = list(error_page.sources())
    functions = {n.name: n for _, tree in parsed for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    silent = [
        f"{path.name}:{line}"
        for path, tree in parsed
        for line, _, message in error_page.raised(path, tree, functions)
        if not message
    ]
    assert silent == []


def test_an_error_of_today_stands_on_the_page_with_its_cure():
    with pytest.raises(TypeError) as raised:
        check_columns([{"prompt": "a"}])
    said = str(raised.value).replace("`train_dataset`", "`…`").replace("got list.", "got ….")
    first, _, _ = said.partition(". ")
    assert f"**{error_page._escaped(first)}.**" in error_page.PAGE.read_text(encoding="utf-8")


def test_full_stops_inside_of_code_end_no_sentence():
    entry = error_page.entry("`a. b` is 3; need 4. Set `c.d`.")
    assert entry == "- **`a. b` is 3; need 4.** Set `c.d`."
    assert error_page.entry("A <b> of *c*") == r"- **A \<b> of \*c\*.**"
