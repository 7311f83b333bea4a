import subprocess
import sys

import pytest

from hf_imitate.audits.figures import plot_frontier

ROWS = [
    {
        "name": "plain fine-tuning at temperature 0.85, a long name",
        "judge_accuracies": {"ngram": (0.62, 0.58, 0.66), "lora": (0.7, 0.66, 0.74)},
        "bits_per_answer": 66.2,
        "bits_interval": (64.0, 68.4),
        "length_ratio": 0.95,
    },
    {
        "name": "imitator",
        "judge_accuracies": {"lora": (0.53, 0.49, 0.57)},
        "bits_per_answer": 64.5,
        "bits_interval": None,
        "length_ratio": None,
    },
    {"name": "other", "judge_accuracies": {}, "bits_per_answer": None, "bits_interval": None, "length_ratio": None},
]


def texts_of(path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_picture_is_written(tmp_path):
    path = plot_frontier(ROWS, tmp_path / "frontier.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_system_judge_and_axis_is_named(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn = texts_of(plot_frontier(ROWS, tmp_path / "frontier.svg", confidence=0.9))
    for words in ("imitator", "length ratio 0.95", "judge: ngram", "judge: lora", "chance", "bits per human answer"):
        assert words in drawn
    assert drawn.count("not measured") == 2
    assert "90 % interval" in drawn
    assert "66.2" in drawn


def test_incomplete_rows_are_refused_by_key():
    with pytest.raises(ValueError, match=r"got 1 rows, missing by row: \{0: \['bits_interval'"):
        plot_frontier([{"name": "x", "judge_accuracies": {}, "length_ratio": None}], "unused.png")
    with pytest.raises(ValueError, match="at least one system"):
        plot_frontier([], "unused.png")


def test_importing_figures_does_not_import_matplotlib():
    program = "import sys, hf_imitate.audits.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
