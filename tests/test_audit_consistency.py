import pytest

from hf_imitate.audits.consistency import audit_consistency
from hf_imitate.audits.report import Finding


def bound(name, value, certified=True):
    interval = (0.0, value) if name.startswith("hidden") else (value, 1.0)
    return Finding(name, value, "probability", interval, 0.95, 100, certified=certified)


def one(findings):
    (found,) = audit_consistency(findings)
    assert (found.name, found.unit) == ("consistency", "count")
    return found


def test_bounds_that_fit_are_no_contradiction():
    found = one([bound("tv_lower/ngram", 0.2), bound("check_tv_lower/solved", 0.3), bound("hidden_deviation", 0.3)])
    assert found.value == 0
    assert found.n == 2


def test_every_contradiction_is_counted_named_and_explained():
    found = one(
        [
            bound("tv_lower/ngram", 0.4),
            bound("check_tv_lower/solved", 0.31),
            bound("tv_lower/lora", 0.1),
            bound("hidden_deviation", 0.3),
        ]
    )
    assert found.value == 2
    for words in ("`tv_lower/ngram` >= 0.4", "`check_tv_lower/solved` >= 0.31", "`hidden_deviation` <= 0.3"):
        assert words in found.detail
    assert "tv_lower/lora" not in found.detail
    for cause in ("sampler_match", "different questions", "independent", "chance"):
        assert cause in found.detail


@pytest.mark.parametrize(
    ("findings", "missing"),
    [
        ([], "lower"),
        ([bound("hidden_deviation", 0.1)], "lower"),
        ([bound("tv_lower/ngram", 0.9)], "upper"),
        ([bound("tv_lower/ngram", 0.9), bound("hidden_deviation", 0.1, certified=False)], "upper"),
        ([bound("tv_lower/ngram", 0.9, certified=False), bound("hidden_deviation", 0.1)], "lower"),
        ([bound("tv_lower/ngram", 0.9), Finding("hidden_deviation", None, "probability", detail="none")], "upper"),
        ([bound("paired_accuracy/ngram", 0.9), bound("hidden_deviation", 0.1)], "lower"),
    ],
)
def test_without_both_kinds_of_bound_nothing_is_compared(findings, missing):
    found = one(findings)
    assert found.value is None
    assert f"no certified {missing} bound" in found.detail
