"""The card says what is known, admits what is not, and no string of anybody's can change what it is."""

import ast
import dataclasses
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_imitate.audits.report import AuditReport, Finding
from hf_imitate.hub_cards.facts import TRAINED_LAW, CardFacts, CardMetric, Paper, Sample, hub_id_or_none
from hf_imitate.hub_cards.markdown import (
    MOST_SHOWN,
    fenced,
    markdown_code,
    markdown_text,
    python_literal,
    sparkline,
    visible,
)
from hf_imitate.hub_cards.model_card import MOST_SAMPLE, MOST_SAMPLES, render_card
from hf_imitate.hub_cards.model_index import findings_of

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
MEGABYTE = "`x|<b>" * 200_000


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


def report(name="ngram", check="is_short", words="held-out answers, 600 rows", reason="needs `human_entropy`"):
    """An audit with a judge, a check, an infinity and a gap."""
    half = {"unit": "probability", "confidence": 0.95, "n": 600}
    findings = (
        Finding(f"paired_accuracy/{name}", 0.5300000000000001, interval=(0.49, 0.5700000001), **half),
        Finding(f"tv_lower/{name}", 0.013, interval=(0.013, 1.0), certified=True, **half),
        Finding(f"check_pass/{check}/human", 0.99, interval=(0.97, 1.0), **half),
        Finding(f"check_pass/{check}/imitator", 0.75, interval=(0.7, 0.8), **half),
        Finding("bits_per_answer", float("inf"), "bits", (31.25, float("inf")), 0.95, 600),
        Finding("length_ratio", 1.0625, "ratio"),
        Finding("hidden_deviation", None, "probability", detail=reason),
        Finding(f"power_control/{name}", None, "probability", detail="it noticed none"),
    )
    judges = {name: {"p": 0.2, "p_holm": 0.5}}
    ledger = {"confidence": 0.9, "certified": {"tv_lower": 0.01}, "judges": judges}
    return AuditReport(findings, words, words, words, words, 0, ledger, 600, {"law": words})


def filled(text: str) -> CardFacts:
    """Facts that say `text` wherever a string is said."""
    return facts(
        model_name=text,
        objective=text,
        repo_id=text,
        base_model=text,
        base_revision=text,
        started_from=text,
        papers=(Paper(text, text, text),),
        dataset_name=text,
        answered_by=text,
        settings={text: text},
        metrics={text: CardMetric(1.0, text)},
        curves={text: [(1, 2.0), (2, 1.0)]},
        audit=report(text, text, text, text),
        samples=(Sample(text, text),),
        versions={text: text},
        tags=(text,),
        license=text,
        check_names=(text,),
        has_distinguisher=True,
        limits=(text,),
        generation={text[:1000]: text[:1000]},
    )


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
    rows = [f"| {name} | not stated |" for name in ("Whose answers", "Base model", "Training rows", "License")]
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


@pytest.mark.parametrize("text", [*HOSTILE, MEGABYTE], ids=range(len(HOSTILE) + 1))
def test_a_card_full_of_hostile_strings_is_still_that_card(text, tmp_path):
    card = render_card(filled(text))
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert str(loaded) == str(card)

    assert card.data.tags[-1] == visible(text) or len(text) > 1000 > len(card.data.tags[-1])
    assert card.data.license == "other"
    assert re.fullmatch(r"[a-z0-9.+-]{1,100}", card.data.license_name)
    ours = {"base_model", "datasets", "library_name", "license", "model-index", "pipeline_tag", "tags"}
    assert set(card.data.to_dict()) <= {*ours, "license_name"}
    assert [finding.value for finding in findings_of(loaded)] == [f.value for f in report().findings[:6]]
    shown, expected = (page(one.text) for one in (card, render_card(filled("harmless text"))))
    assert [tag for tag in shown.tags if tag != "code"] == [tag for tag in expected.tags if tag != "code"]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\u2028\x00-\x08\x1b]", str(card))
    assert "49" not in card.text.replace("0.49", "")  # nothing in a string is a template
    for block in code_blocks(card):
        literals = [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
        assert text[:300] in literals
    assert len(card.text) < 400_000


def test_what_is_too_long_to_read_is_cut_and_counted():
    for show in (markdown_text, markdown_code):
        shown = page(show("y" * 10_000)).text
        assert "y" * MOST_SHOWN in shown
        assert shown.rstrip("\n").endswith(f"[and {10_000 - MOST_SHOWN:,} characters more]")
    assert "[and 30,000 characters more]" in fenced("y" * 50_000, "text")


# --- audit, curves, samples


def test_without_an_audit_the_card_says_that_nothing_was_measured_and_has_no_model_index():
    card = render_card(facts())
    assert "could a freshly trained judge tell these answers from people's?): not measured." in card.text
    assert "There is no audit, so nothing is known of what it would have missed." in card.text
    assert card.data.eval_results is None


def test_the_model_index_parses_back_to_the_audits_numbers_and_intervals(tmp_path):
    given = report()
    render_card(facts(audit=given)).save(tmp_path / "README.md")
    read = findings_of(ModelCard.load(tmp_path / "README.md"))
    measured = [finding for finding in given.findings if finding.value is not None]
    assert len(read) == len(measured) == 6
    for one, other in zip(read, measured, strict=True):
        assert one == dataclasses.replace(other, detail="")
    (result, *_) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert result.dataset_args["plan_hash"] == given.plan_hash
    assert result.dataset_name == given.dataset
    assert findings_of(render_card(facts())) == ()


@pytest.mark.parametrize(
    ("audited", "trained", "is_same"),
    [
        ("answers", "me/answers", True),
        ("my_answers", "me/MyAnswers", True),
        ("a data set", "me/answers", False),
        ("others", "me/answers", False),
        ("a data set", None, False),
    ],
)
def test_rows_of_another_data_set_are_not_said_to_be_of_the_training_one(audited, trained, is_same):
    """The metadata called every audit one of the data set of the training, whatever rows were asked."""
    given = dataclasses.replace(report(), dataset=f"{audited}, 600 rows, hash 0123456789abcdef")
    (result, *_) = render_card(facts(audit=given, dataset_name=trained)).data.eval_results
    assert result.dataset_type == (trained if is_same else "rows that are not known to be on the Hub")


def test_a_model_index_of_anybodys_is_refused_where_it_is_no_audit(tmp_path):
    text = str(render_card(facts(audit=report())))
    for old, new in [("unit: bits", "unit: apples"), ("n: 600", "n: [6]"), ("certified: false", "extra: 1")]:
        assert old in text
        with pytest.raises(ValueError, match=r"finding|unit"):
            findings_of(ModelCard(text.replace(old, new)))


def test_the_card_says_what_the_audit_found_and_what_it_could_not_see():
    card = render_card(facts(audit=report(), figures=("audit/losses.png",))).text
    shown = page(card).text
    for sentence in (
        "None of 1 freshly trained judges (ngram) saw a difference",
        "The silence of ngram proves nothing",
        "The check is_short: people pass it in 99.0%, the imitator in 75.0%",
        "In at least 1.3% of cases (total variation) it answers otherwise than people do.",
        "hidden_deviation was not measured: needs `human_entropy`",
        "power_control/ngram was not measured: it noticed none",
        "it says who could not tell, on how many questions, and never that nobody could",
        "hold without approximation, and all of them together with confidence 0.9; the others",
    ):
        assert sentence in " ".join(shown.split())
    assert "| `bits_per_answer` | infinite | bits | 31.25 to infinite | 0.95 | 600 | no |" in card
    assert "| `tv_lower/ngram` | 0.013 | probability | 0.013 to 1 | 0.95 | 600 | yes |" in card
    assert "| `length_ratio` | 1.062 | ratio | not stated | not stated | not stated | no |" in card
    assert "(audit/losses.png)" in card
    assert "img" in page(card).tags


def test_what_was_not_measured_for_one_reason_is_said_once():
    few = "too few rows to train a judge"
    gaps = [
        Finding(f"{kind}/ngram", None, "probability", detail=f"Not measured: {few}") for kind in ("tv", "accuracy")
    ]
    gaps.append(Finding("copying", None, "ratio", detail="no training answers"))
    card = render_card(facts(audit=dataclasses.replace(report(), findings=tuple(gaps)))).text
    assert f"- `tv/ngram`, `accuracy/ngram` were not measured: {few}\n" in card
    assert "- `copying` was not measured: no training answers\n" in card
    assert card.count("ot measured: too few") == 1


def test_settings_are_shown_as_they_took_effect():
    rates = {"distinguisher_learning_rate": None, "learning_rate": 1e-5}
    text = render_card(facts(settings={**rates, "max_steps": 7, "num_train_epochs": 3.0})).text
    assert "| `distinguisher_learning_rate` | `3e-05` |" in text
    assert "num_train_epochs" not in text
    text = render_card(
        facts(settings={"distinguisher_learning_rate": None, "max_steps": -1, "num_train_epochs": 3})
    ).text
    assert "| `distinguisher_learning_rate` | `3 x learning_rate` |" in text
    assert "| `num_train_epochs` | `3` |" in text
    assert (
        "| `distinguisher_learning_rate` | `0.5` |"
        in render_card(facts(settings={**rates, "distinguisher_learning_rate": 0.5})).text
    )


def test_a_coefficient_that_was_not_set_is_shown_as_it_took_effect():
    for budget, shown in ((None, "1.0"), (0.5, "what keeps the budget")):
        text = render_card(facts(settings={"retrodictive_coef": None, "retrodictive_budget": budget})).text
        assert f"| `retrodictive_coef` | `{shown}` |" in text


def test_a_run_that_measured_nothing_held_out_says_so_and_warns_of_no_number():
    limit = "Numbers measured while training come from the distinguisher the imitator was trained against."
    silent = render_card(facts(metrics={}, limits=(limit, "mine"))).text
    assert "## Measurements\n\nNo held-out measurement was made while training." in silent
    assert limit not in silent
    assert "- mine" in silent
    own = {"eval_retrodiction/bits_per_answer": CardMetric(1.0, "bits")}
    assert limit not in render_card(facts(metrics=own, limits=(limit,))).text
    own["distinguisher/accuracy_heldout"] = CardMetric(0.5, "probability")
    assert limit in render_card(facts(metrics=own, limits=(limit,))).text


@pytest.mark.parametrize(
    "path", ["/etc/x.png", "../x.png", "audit/../../x.png", "a b.png", "x.svg", "javascript:x.png"]
)
def test_a_figure_is_a_picture_inside_the_repository(path):
    with pytest.raises(ValueError, match="`figures`"):
        facts(figures=(path,))


def test_training_curves_are_drawn_from_their_least_value_to_their_greatest():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan"), 1.0, float("inf")]) == "▁"
    assert sparkline([]) == ""
    long = sparkline([float(i) for i in range(1000)])
    assert (len(long), long[0], long[-1]) == (24, "▁", "█")
    points = {"loss": [(1, 3.0), (5, 2.0), (10, 1.0)], "empty": []}
    text = render_card(facts(curves=points)).text
    assert "| `loss` | 1 to 10 | 3 | 1 | █▅▁ |" in text
    assert "empty" not in text
    assert "### Training curves\n\nNot measured." in render_card(facts()).text


def test_samples_are_none_unless_asked_for_and_then_few_and_cut():
    assert "None: samples are shown only where somebody asks for them." in render_card(facts()).text
    many = tuple(Sample(f"question {i}", "z" * 5000) for i in range(20))
    text = render_card(facts(samples=many)).text
    assert f"question {MOST_SAMPLES - 1}" in text
    assert f"question {MOST_SAMPLES}" not in text
    assert text.count("z" * MOST_SAMPLE) == MOST_SAMPLES
    assert "z" * (MOST_SAMPLE + 1) not in text


def test_the_card_says_whose_answers_it_imitates_and_what_it_is_not_for():
    text = " ".join(render_card(facts(answered_by="members of a chess club")).text.split())
    assert "**Whose answers:** members of a chess club **What it is not for:** it is no source of facts" in text
    assert "who these people are is not stated" in render_card(facts()).text


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
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("ran to the end\n")
