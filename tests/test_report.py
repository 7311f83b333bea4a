import json
import math
import subprocess
import sys

import numpy as np
import pytest

from hf_imitate.audits.report import UNITS, Finding

ACCURACY = {
    "name": "paired_accuracy/ngram",
    "value": 0.625,
    "unit": "probability",
    "interval": (0.5, 0.75),
    "confidence": 0.95,
    "n": 64,
    "certified": True,
    "detail": "one trial per question",
}


@pytest.mark.parametrize(
    "finding",
    [
        Finding(**ACCURACY),
        Finding("bits_per_answer", math.inf, "bits", (12.5, math.inf), 0.95, 10),
        Finding("calibration_gap", -0.25, "nats"),
        Finding("e_value/ngram", 1e300, "e-value", n=5, detail="é, “quoted”\n"),
        Finding("hidden_deviation", None, "probability", detail="no bound on the human's entropy"),
    ],
)
def test_a_finding_comes_back_from_json_as_it_went(finding):
    assert Finding.from_json(finding.to_json()) == finding
    assert Finding.from_dict(finding.to_dict()) == finding
    # The strict reader stands for every other program's.
    json.loads(finding.to_json(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_its_fields_are_the_contracts_in_order():
    assert list(Finding(**ACCURACY).to_dict()) == list(ACCURACY)
    assert set(UNITS) == {"probability", "bits", "nats", "e-value", "count", "ratio"}


def test_numbers_of_other_libraries_become_plain():
    numbers = {"value": np.float32(0.5), "interval": np.array([0.25, 0.75]), "n": np.int64(7), "certified": np.True_}
    finding = Finding(**(ACCURACY | numbers))
    assert [type(value) for value in (finding.value, finding.interval[0], finding.n, finding.certified)] == [
        float,
        float,
        int,
        bool,
    ]
    assert json.loads(finding.to_json())["interval"] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"unit": "percent"}, "'percent'; use one of probability, bits"),
        ({"value": math.nan}, "NaN"),
        ({"interval": (math.nan, 1.0)}, "NaN"),
        ({"value": 0.9}, "outside its interval"),
        ({"interval": (0.7, 0.6)}, "outside its interval"),
        ({"interval": (0.5, 0.6, 0.7)}, "3 ends"),
        ({"interval": (0.5, 1.25)}, "lies in"),
        ({"confidence": 95}, "strictly between 0 and 1"),
        ({"confidence": None}, "needs the `confidence`"),
        ({"n": -1}, "counts observations"),
        ({"unit": "ratio", "value": -0.5, "interval": (-1.0, 0.0)}, "cannot be negative"),
        ({"value": None}, "nothing to give an interval"),
        ({"value": None, "interval": None, "certified": False, "detail": ""}, "say in `detail` why"),
    ],
)
def test_a_finding_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Finding(**(ACCURACY | change))


def test_a_word_is_no_value():
    with pytest.raises(TypeError, match="`value` must be a number; got str"):
        Finding("bits_per_answer", "many", "bits")
    with pytest.raises(TypeError, match="`interval` must be a number; got NoneType"):
        Finding("bits_per_answer", 1.0, "bits", (0.0, None), 0.95)


def test_a_file_of_another_version_is_refused_by_field():
    values = Finding(**ACCURACY).to_dict()
    del values["n"]
    with pytest.raises(ValueError, match=r"missing: \['n'\], unknown: \['num'\]"):
        Finding.from_dict(values | {"num": 64})


def test_a_finding_cannot_be_changed():
    with pytest.raises(AttributeError):
        Finding(**ACCURACY).value = 0.5


def test_reading_a_report_needs_no_heavy_library():
    program = (
        "import sys, hf_imitate.audits.report\n"
        "print([name for name in ('torch', 'numpy', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
