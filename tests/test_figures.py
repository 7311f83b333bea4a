import subprocess
import sys

import numpy as np
import pytest

from hf_imitate.audits import figures
from hf_imitate.audits.figures import plot_e_values, plot_frontier, plot_losses, plot_paired_accuracies
from hf_imitate.audits.report import Finding

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


def ink(path):
    """How many pixels are not white."""
    from matplotlib.image import imread

    return int((imread(path)[..., :3] < 0.9).any(axis=-1).sum())


def test_an_audits_figures_show_what_they_are_given(tmp_path):
    one = Finding("paired_accuracy/ngram", 0.6, "probability", (0.55, 0.65), 0.95, 100)
    null = Finding("null_control/ngram", 0.5, "probability", (0.45, 0.55), 0.95, 100)
    silent = Finding("paired_accuracy/lora", None, "probability", detail="failed")
    with_null = plot_paired_accuracies([one, null, silent], tmp_path / "a.png")
    assert ink(with_null) > ink(plot_paired_accuracies([one, silent], tmp_path / "b.png"))
    rising = plot_e_values({"ngram": np.linspace(0, 9, 50)}, tmp_path / "c.png")
    two = plot_e_values({"ngram": np.linspace(0, 9, 50), "surface": np.linspace(0, -3, 50)}, tmp_path / "d.png")
    assert ink(two) > ink(rising) > 1000
    nats = np.array([3.0, 4.0, np.inf])
    assert ink(plot_losses(nats, nats[:2] * 2, tmp_path / "e.png")) > 1000


def test_no_interval_runs_through_a_legend(tmp_path, monkeypatch):
    """Short of pairs, the intervals are wide, and one crossed out the words "null control"."""
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    wide = {"value": 0.5, "unit": "probability", "interval": (0.1, 0.9), "confidence": 0.95, "n": 4}
    plot_paired_accuracies([Finding(f"{kind}/ngram", **wide) for kind in ("paired_accuracy", "null_control")], "")
    plot_losses(np.arange(9.0), np.arange(9.0), "")
    plot_e_values({"ngram": np.arange(4.0)}, "")
    for figure in drawn:
        figure.savefig(tmp_path / "a.png")
        (axes,) = figure.axes
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1
        assert legend.y1 <= figure.bbox.y1
    assert len(drawn) == 3


def test_figures_without_anything_to_show_say_so(tmp_path):
    with pytest.raises(ValueError, match="No judge was measured"):
        plot_paired_accuracies([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="No judge was measured"):
        plot_e_values({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="the imitator's own is finite"):
        plot_losses(np.ones(3), np.full(3, np.inf), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
