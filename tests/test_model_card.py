"""The card says what is known, admits what is not, and no string of anybody's can change what it is."""

import ast
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_imitate.hub_cards.facts import TRAINED_LAW, CardFacts, CardMetric, Paper, hub_id_or_none
from hf_imitate.hub_cards.model_card import (
    fenced,
    markdown_code,
    markdown_text,
    python_literal,
    render_card,
    visible,
)

GAIL = Paper(
    "Generative Adversarial Imitation Learning", "1606.03476", "@inproceedings{ho2016,\n    title = {GAIL},\n}"
)

HOSTILE = [
    "a`b``c```d",
    "a|b\\|c\\\\|d",
    "two\nlines\r\n\r\n# no heading\n---\nlicense: mit",
    "<script>alert(1)</script><img src=x onerror=alert(1)>&lt;b&gt;&#60;",
    "**bold** _it_ ~~gone~~ [link](https://evil.example) ![i](x) www.evil.example $x$ a@b.example",
    "{{ 7 * 7 }} {% include '/x' %} {# gone #}",
    "right\u202eleft\u2066\u200b\u200d\ufeff\u2028end",
    "nul\x00bell\x07esc\x1b[31m",
    "lone\ud800surrogate",
    "- item",
    "1. item",
    "# heading",
    "--- : &anchor *alias !!python/object",
    " spaces ",
    "plain_name-0.6B (ü, 模型)",
]


class _Page(HTMLParser):
    """Tags and text of rendered Markdown."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def page(markdown: str) -> _Page:
    """Render as GitHub and the Hub do: tables, strikethrough, raw HTML."""
    renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    return _Page(renderer.enable(["table", "strikethrough"]).render(markdown))


def facts(**changes) -> CardFacts:
    known = {
        "model_name": "me-imitator",
        "objective": "Adversarial imitation",
        "repo_id": "me/me-imitator",
        "base_model": "Qwen/Qwen3-0.6B",
        "base_revision": "abc123",
        "papers": (GAIL,),
        "dataset_name": "me/answers",
        "num_rows": 5800,
        "num_labelled": 5000,
        "settings": {"learning_rate": 1e-5, "retrodictive_budget": None},
        "metrics": {"bits_per_answer": CardMetric(31.25, "bits", (30.5, 32.0)), "consistency": CardMetric(None)},
        "versions": {"trl": "1.16.0"},
        "tags": ("adversarial",),
        "is_adapter": True,
        "generation": {**TRAINED_LAW, "max_new_tokens": 4},
    }
    return CardFacts(**{**known, **changes})


def code_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)


def test_every_fact_given_stands_in_the_card():
    text = page(render_card(facts()).text).text
    names = ["me-imitator", "Adversarial imitation", "Qwen/Qwen3-0.6B", "abc123", "me/answers", "trl 1.16.0", "1e-05"]
    numbers = ["5,800", "5,000", "31.25", "30.5 to 32"]
    for given in [*names, *numbers, GAIL.title, GAIL.id, "@inproceedings{ho2016,"]:
        assert given in text


def test_what_is_unknown_is_said_and_never_vanishes():
    empty = render_card(CardFacts(model_name="x", objective="y")).text
    rows = ["| Base model | not stated |", "| Training rows | not stated |", "| License | not stated |"]
    lines = ["| Checks | none |", "Settings: not stated.", "Not measured.", "This repository holds no distinguisher."]
    for line in [*rows, *lines]:
        assert line in empty
    assert "| `consistency` | not measured | not stated | not stated |" in render_card(facts()).text

    def headings(text: str) -> list[str]:
        return re.findall(r"^## .*", text, re.MULTILINE)

    assert headings(empty) == headings(render_card(facts(has_distinguisher=True)).text)


def test_metadata_names_peft_for_an_adapter_and_transformers_for_full_weights():
    data = render_card(facts()).data.to_dict()
    assert data == {
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": ["me/answers"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["hf-imitate", "trl", "imitation-learning", "adversarial"],
    }
    assert render_card(facts(is_adapter=False, license="mit")).data.to_dict() | {"tags": []} == {
        **data, "library_name": "transformers", "license": "mit", "tags": []}  # fmt: skip


@pytest.mark.parametrize("path", ["/models/private/base", "./base", "../base", "C:\\models\\base", "a/b/base"])
def test_a_local_base_is_neither_linked_nor_placed(path):
    card = render_card(facts(base_model=path, dataset_name=path))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert path not in str(card)
    assert "| `base`, a local model |" in card.text
    assert "only who has that model can load it" in card.text


def test_a_relative_path_that_looks_like_an_id_is_local_where_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id_or_none("runs/model") == "runs/model"
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert hub_id_or_none("runs/model") is None


def test_the_embedded_data_is_named_but_not_linked_as_a_data_set_of_the_hub():
    card = render_card(facts(dataset_name="docstrings"))
    assert card.data.datasets is None
    assert "| Data set | `docstrings` |" in card.text


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("show", [markdown_text, markdown_code])
@pytest.mark.parametrize("place", ["{}", "- {}", "# {}", "|a|b|\n|---|---|\n|x|{}|"])
def test_a_hostile_string_is_shown_letter_for_letter(text, show, place):
    """Read back by a Markdown renderer and an HTML parser: the same letters, and not one tag more."""
    shown, harmless = page(place.format(show(text))), page(place.format("harmless"))
    expected = visible(text) if show is markdown_code else visible(text).strip()
    assert shown.text.strip("\n") == harmless.text.strip("\n").replace("harmless", expected)
    assert [tag for tag in shown.tags if tag != "code"] == harmless.tags


def test_escapes_can_fail():
    assert "script" in page("- " + HOSTILE[3]).tags
    assert page("|a|b|\n|---|---|\n|x|" + HOSTILE[1] + "|").text != visible(HOSTILE[1])


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_full_of_hostile_strings_is_still_that_card(text, tmp_path):
    hostile = facts(
        model_name=text,
        objective=text,
        repo_id=text,
        base_model=text,
        base_revision=text,
        papers=(Paper(text, text, text),),
        dataset_name=text,
        settings={text: text},
        metrics={text: CardMetric(1.0, text)},
        versions={text: text},
        tags=(text,),
        license=text,
        check_names=(text,),
        has_distinguisher=True,
        limits=(text,),
        generation={text: text},
    )
    card = render_card(hostile)
    card.save(tmp_path / "README.md")
    assert str(ModelCard.load(tmp_path / "README.md")) == str(card)

    assert card.data.tags[-1] == card.data.license == visible(text)
    assert set(card.data.to_dict()) <= {"base_model", "datasets", "library_name", "license", "pipeline_tag", "tags"}
    plain = page(render_card(facts(has_distinguisher=True, check_names=("c",), limits=("x",))).text)
    shown = page(card.text)
    assert set(shown.tags) <= set(plain.tags) | {"code"}
    assert [tag for tag in shown.tags if tag.startswith("h")] == [tag for tag in plain.tags if tag.startswith("h")]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\u2028\x00-\x08\x1b]", str(card))
    assert "49" not in card.text  # nothing in a string is a template
    for block in code_blocks(card):
        literals = [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
        assert text in literals


@pytest.mark.parametrize("value", [*HOSTILE, "both ' and \"", True, None, 1.0, [{"role": "user", "content": "x"}]])
def test_a_literal_reads_back(value):
    literal = python_literal(value)
    assert literal.isascii()
    assert "\n" not in literal
    assert ast.literal_eval(literal) == value


def test_a_citation_cannot_close_its_block():
    block = fenced("a\n```\n# out\n````\nb", "bibtex")
    shown = page(block)
    assert shown.tags == ["pre", "code"]
    assert shown.text.strip() == "a\n```\n# out\n````\nb"


def test_facts_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="`num_labelled` is 3 but `num_rows` is only 2"):
        CardFacts(model_name="x", objective="y", num_rows=2, num_labelled=3)
    with pytest.raises(ValueError, match=r"`metrics\['m'\]` is 0.5"):
        CardFacts(model_name="x", objective="y", metrics={"m": 0.5})


def test_cards_need_no_torch():
    program = "import sys, hf_imitate.hub_cards.model_card, hf_imitate.hub_cards.push; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert run.stdout.strip() == "False"


def test_an_imitator_that_thinks_first_is_loaded_as_one_before_plain_loading_is_shown():
    plain, thinker = (render_card(facts(thinks_first=thinks)) for thinks in (False, True))
    assert "from hf_imitate import Imitator" in code_blocks(thinker)[0]
    assert [block.split()[1] for block in code_blocks(plain)] == ["transformers", "peft", "hf_imitate"]
    assert [block.split()[1] for block in code_blocks(thinker)] == ["hf_imitate", "peft"]
    assert set(code_blocks(thinker)) < set(code_blocks(plain))
    before, _, after = thinker.text.partition("```python\nfrom peft")
    assert "Plain loading gives the weights but not the law" in before
    assert "Plain loading" not in plain.text
    assert after.partition("## How")[2] == plain.text.partition("## How")[2]


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir, tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft reads transformers' old name
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def test_the_quick_starts_run_as_printed(tiny_model_dir, tiny_chat_model_dir, adapter_dir):
    """Copied out of the card and run, as a reader would; the blocks that need `hf_imitate` are run with its tests."""
    blocks = []
    for folder in (tiny_model_dir, tiny_chat_model_dir, adapter_dir):
        is_chat, is_adapter = folder == tiny_chat_model_dir, folder == adapter_dir
        card = render_card(facts(repo_id=str(folder), is_adapter=is_adapter, is_conversational=is_chat))
        blocks += [block for block in code_blocks(card) if "hf_imitate" not in block]
    assert len(blocks) == 6
    program = "\n".join([*blocks, "print('\\nran to the end')"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("ran to the end\n")
