"""How Sphinx builds the guide: the Markdown pages of this folder, each readable without it.

    make docs        # or: python -m sphinx -W docs docs/_build

The order of the side bar is that of the links in index.md, under its headings; a page that is not linked there comes
last, so that a new one is never lost.
"""

import re
from pathlib import Path

project = "hf-imitate"
copyright = "the hf-imitate developers"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hf-imitate"
html_copy_source = False
html_show_sphinx = False
myst_enable_extensions = ["alert"]
myst_heading_anchors = 4
nitpicky = True


def toctrees(index: str, pages: list[str]) -> str:
    """One hidden table of contents for each heading of the index, and one for the pages that it does not link."""
    trees, seen = [], set()
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        caption, _, text = section.partition("\n")
        linked = [name for name in re.findall(r"\]\((\w+)\.md[#)]", text) if name in pages and name not in seen]
        seen |= set(linked)
        trees.append((caption, dict.fromkeys(linked)))
    trees.append(("More", dict.fromkeys(name for name in pages if name not in seen)))
    return "".join(
        "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(names) + "\n```\n"
        for caption, names in trees
        if names
    )


def setup(app):
    """Change what GitHub needs in another form as pages are read; on disk they stay plain Markdown."""
    pages = sorted(page.stem for page in Path(app.srcdir).glob("*.md") if page.stem != "index")

    def read(app, name, source):
        # Markdown outside this folder is no page of the guide but a file, like a program.
        source[0] = re.sub(r"\]\((\.\./[\w./-]+\.md)(#[\w-]+)?\)", r"](path:\1)", source[0])
        if name == "index":
            source[0] += toctrees(source[0], pages)

    app.connect("source-read", read)
    return {"parallel_read_safe": True}
