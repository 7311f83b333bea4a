"""An audit's report: saved and loaded whole, safe to load from strangers, readable by newcomers."""

import json
import math
import re

import pytest

from hf_imitate.audits.report import MAX_FILE_BYTES, VIEWS, AuditReport, Finding


def make_report(**changes) -> AuditReport:
    findings = (
        Finding("paired_accuracy/ngram", 0.61, "probability", (0.56, 0.66), 0.95, 500, detail="Sign test."),
        Finding("e_value/ngram", 812.5, "e-value", n=500),
        Finding("tv_lower/ngram", 0.05, "probability", (0.05, 1.0), 0.99, 500, True),
        Finding("null_control/ngram", 0.5, "probability", (0.45, 0.55), 0.95, 500),
        Finding("power_control/ngram", None, "probability", detail="Not even the largest share was noticed."),
        Finding("check_pass/solved/human", 1.0, "probability", (0.99, 1.0), 0.95, 500),
        Finding("check_pass/solved/imitator", 0.9, "probability", (0.87, 0.93), 0.95, 500),
        Finding("bits_per_answer", math.inf, "bits", (40.0, math.inf), 0.95, 500),
        Finding("outside_support", 0.02, "probability", (0.01, 0.04), 0.95, 500),
        Finding("hidden_deviation", None, "probability", detail="no entropy bound"),
        Finding("sampler_match", 1.0, "probability", n=4000),
        Finding("answer_distribution_tv", None, "probability", detail="no repeats"),
        Finding("copying", 0.0, "probability", (0.0, 0.01), 0.95, 500),
        Finding("copying/human", 0.06, "probability", (0.04, 0.08), 0.95, 500),
        Finding("consistency", 0, "count", n=3),
    )
    fields = {
        "findings": findings,
        "model": "me/me-imitator",
        "revision": None,
        "dataset": "mine, 500 rows",
        "plan_hash": "ab" * 32,
        "seed": 0,
        "ledger": {
            "confidence": 0.95,
            "certified": {"tv_lower": 0.01},
            "judges": {"ngram": {"p": 1e-6, "p_holm": 2e-6}},
        },
        "num_questions": 500,
        "decoding": {"law": "temperature 1, untruncated", "max_new_tokens": 32},
        "notes": ("3 human answers are longer than the limit.",),
        "cost": {"paired_accuracy/ngram": 1.5},
    }
    return AuditReport(**{**fields, **changes})


def test_a_saved_report_loads_the_same(tmp_path):
    report = make_report()
    assert report.save(tmp_path) == tmp_path / "audit.json"
    assert AuditReport.load(tmp_path) == report
    assert AuditReport.load(tmp_path / "audit.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["audit.json"]


def test_every_finding_of_the_contract_is_in_one_view():
    report = make_report()
    seen = [finding for view in VIEWS for finding in getattr(report, view)]
    assert sorted(f.name for f in seen) == sorted(f.name for f in report.findings)
    assert [f.name for f in report.copying] == ["copying", "copying/human"]
    assert all(isinstance(getattr(report, view), tuple) for view in VIEWS)
    assert report["copying"].value == 0
    with pytest.raises(KeyError, match="paired_accuracy/ngram"):
        report["nothing"]


def change(report, path, value):
    values = json.loads((path / "audit.json").read_text())
    target = values
    *keys, last = report
    for key in keys:
        target = target[key]
    target[last] = value
    (path / "audit.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("findings",), {}),
        (("findings", 0), "text"),
        (("findings", 0, "name"), ["a"]),
        (("findings", 0, "value"), True),
        (("findings", 0, "value"), "0.5"),
        (("findings", 0, "value"), [1]),
        (("findings", 0, "value"), {"a": 1}),
        (("findings", 0, "value"), 7.0),
        (("findings", 0, "interval"), [0.1]),
        (("findings", 0, "interval"), "01"),
        (("findings", 0, "interval"), [None, 1]),
        (("findings", 0, "confidence"), 2),
        (("findings", 0, "n"), 1.5),
        (("findings", 0, "n"), 10**40),
        (("findings", 0, "certified"), 1),
        (("findings", 0, "detail"), "x" * 30_000),
        (("findings", 0, "detail"), "a\u0007b"),
        (("findings", 0, "extra"), 1),
        (("model",), 3),
        (("seed",), True),
        (("version",), 2),
        (("version",), True),
        (("notes",), [1]),
        (("cost",), {"a": "b"}),
        (("cost",), {"copying": 10**400}),
        (("ledger",), []),
        (("ledger", "judges"), 5),
        (("ledger", "judges", "ngram", "p_holm"), "0"),
        (("ledger", "confidence"), None),
        (("decoding", "law"), {}),
        (("unknown",), 1),
    ],
)
def test_a_forged_report_is_refused_with_a_named_error(where, value, tmp_path):
    make_report().save(tmp_path)
    change(where, tmp_path, value)
    with pytest.raises(ValueError, match=r"report|finding|Finding"):
        AuditReport.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", '{"findings": NaN}', '{"model": 1, "model": 2}', "[" * 100_000, "\x80", '"' + "a" * 100],
)
def test_what_is_no_report_is_refused_without_its_words(text, tmp_path):
    (tmp_path / "audit.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="report") as caught:
        AuditReport.load(tmp_path)
    assert "aaa" not in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "audit.json", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="far smaller"):
        AuditReport.load(tmp_path)


def test_the_summary_comes_first_and_says_what_the_numbers_say():
    text = make_report().to_markdown()
    head = text.split("## ")[0]
    assert "picked the human's answer in 61.0% of 500 pairs" in head
    assert "people pass it in 100.0%, the imitator in 90.0%" in head
    assert "infinitely many bits" in head
    assert "can never give 2.0%" in head
    assert "is not bounded by these data" in head
    assert "silence" not in head  # the judge saw a difference
    assert "mine, 500 rows" in head
    for finding in make_report().findings:
        assert f"`{finding.name}`" in text
    assert "| not measured |" in text
    assert "1.5" in text  # what it cost
    assert "2e-06" in text


def test_seeing_nothing_is_never_called_more_than_that():
    quiet = {"confidence": 0.95, "certified": {}, "judges": {"ngram": {"p": 0.3, "p_holm": 0.3}}}
    text = make_report(ledger=quiet).to_markdown()
    assert "silence of ngram proves nothing: shown planted fakes, that judge did not notice them" in text
    assert "None of 1 freshly trained judges" in text
    assert "not about every reader" in text
    assert "up to 66.0%" in text
    for words in (text, make_report().to_markdown()):
        assert "indistinguishable" not in words.lower()


def test_a_hostile_text_stays_text():
    evil = Finding("copying", 0.0, "probability", detail="a | b\n\n<script>x</script> [me](http://x) `code` ![i](j)")
    text = make_report(findings=(evil,), model="# <img src=x>\n\n# Fake").to_markdown()
    assert "<script>" not in text
    assert "<img" not in text
    assert "\n# Fake" not in text
    row = next(line for line in text.splitlines() if line.startswith("| `copying`"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 8


def test_a_bare_address_is_no_link_and_what_has_no_shape_is_seen():
    """A data set's name may be anybody's; the Hub makes links of addresses without brackets, too."""
    report = make_report(dataset="see https://evil.example or www.evil.example", model="me\u202e\u200b/it")
    text = report.to_markdown()
    assert "://" not in text
    assert "www.evil" not in text
    assert "me\\\\u202e\\\\u200b/it" in text


def test_an_unmeasured_family_says_that_nothing_is_known():
    nothing = Finding("paired_accuracy/ngram", None, "probability", detail="the judge raised")
    assert "nothing is known" in make_report(findings=(nothing,)).to_markdown()
