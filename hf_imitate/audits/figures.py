"""Pictures of an audit. matplotlib is optional and imported by the function that draws."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette without its yellow, which vanishes on white: told apart with any colour vision; the markers
# tell them apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#666666"


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: str | Path, confidence: float = 0.95) -> Path:
    """Draw what judges make of each system beside what each system makes of human answers.

    Left: the judges' paired accuracy with its interval; best is the line at 1/2 (chance). Right: bits per human
    answer with its interval; fewer are better. Length ratios (imitator over human) stand under the systems' names.

    Args:
        rows (`Sequence[Mapping]`): one per system, drawn from top to bottom, each with `name` (`str`),
            `judge_accuracies` (`{judge: (value, low, high)}`), `bits_per_answer` (`float` or `None`),
            `bits_interval` (`(low, high)` or `None`) and `length_ratio` (`float` or `None`).
        path (`str` or `Path`): where the picture goes; its suffix names the format, as in `"frontier.png"`.
        confidence (`float`, *optional*, defaults to `0.95`): of the intervals, for the labels.

    Returns:
        `Path`: `path`.

    Raises:
        ValueError: there are no rows, or a row lacks a key.
        ImportError: matplotlib is not installed.
    """
    needed = {"name", "judge_accuracies", "bits_per_answer", "bits_interval", "length_ratio"}
    missing = {number: sorted(needed - set(row)) for number, row in enumerate(rows) if needed - set(row)}
    if not rows or missing:
        raise ValueError(
            f"`rows` needs at least one system, each with the keys {sorted(needed)}; got {len(rows)} rows, missing by "
            f"row: {missing}."
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "hf-imitate[plots]".') from error

    judges = list(dict.fromkeys(judge for row in rows for judge in row["judge_accuracies"]))
    figure = Figure(figsize=(10, 1.9 + 0.62 * len(rows)), layout="constrained")
    # An explicit canvas draws without a display and leaves the caller's backend alone.
    FigureCanvasAgg(figure)
    accuracy_axes, bits_axes = figure.subplots(1, 2, sharey=True)
    _draw_accuracies(accuracy_axes, rows, judges)
    _draw_bits(bits_axes, rows)
    accuracy_axes.set_xlabel(
        f"how often a fresh judge picks the human's answer\n(held-out pairs, {100 * confidence:g} % interval)",
        fontsize=9,
    )
    bits_axes.set_xlabel(
        f"bits per human answer: how far it surprises the imitator\n({100 * confidence:g} % interval)", fontsize=9
    )
    accuracy_axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    accuracy_axes.set_ylim(len(rows) - 0.5, -0.5)
    for axes in (accuracy_axes, bits_axes):
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        for place in range(1, len(rows)):
            axes.axhline(place - 0.5, color="#EEEEEE", linewidth=0.8, zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(
        "How human are the answers? Better is, on the left, nearer to the dashed line; on the right, fewer bits",
        fontsize=11,
    )
    handles, labels = accuracy_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_accuracies(axes: Any, rows: Sequence[Mapping[str, Any]], judges: list[str]) -> None:
    axes.axvline(0.5, color=_GREY, linestyle="--", linewidth=1.2, label="chance: human and imitator look alike")
    for place, row in enumerate(rows):
        if not row["judge_accuracies"]:
            _say_not_measured(axes, place)
    for number, judge in enumerate(judges):
        height = 0.0 if len(judges) == 1 else 0.5 * number / (len(judges) - 1) - 0.25
        places, values = [], []
        for place, row in enumerate(rows):
            if judge in row["judge_accuracies"]:
                places.append(place + height)
                values.append(row["judge_accuracies"][judge])
        _draw_points(axes, places, values, number, f"judge: {judge}")


def _draw_bits(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    places, values = [], []
    for place, row in enumerate(rows):
        value = row["bits_per_answer"]
        if value is None:
            _say_not_measured(axes, place)
            continue
        places.append(place)
        values.append((value, *(row["bits_interval"] or (value, value))))
    # Black, since no judge is asked here.
    _draw_points(axes, places, values, len(_COLOURS) - 1, None)
    for place, (value, _, _) in zip(places, values, strict=True):
        axes.annotate(f"{value:.1f}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.margins(x=0.12)


def _draw_points(axes: Any, places: list, values: list, number: int, label: str | None) -> None:
    style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
    middles = [value for value, _, _ in values]
    reach = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
    axes.errorbar(middles, places, xerr=reach, linestyle="none", markersize=6, capsize=3, label=label, **style)


def _legend_above(axes: Any) -> None:
    """Where no interval and no curve can run through it."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8)


def _say_not_measured(axes: Any, place: int) -> None:
    style = {"color": _GREY, "fontsize": 9, "style": "italic", "ha": "center", "va": "center"}
    axes.annotate("not measured", (0.5, place), xycoords=("axes fraction", "data"), **style)


def _label(row: Mapping[str, Any]) -> str:
    name = textwrap.fill(str(row["name"]), 26)
    return name if row["length_ratio"] is None else f"{name}\nlength ratio {row['length_ratio']:.2f}"


def plot_paired_accuracies(findings: Sequence[Any], path: str | Path) -> Path:
    """Draw each judge's paired accuracy with its interval, and its null control in grey below it.

    Args:
        findings (`Sequence[Finding]`): a report's; those named `paired_accuracy/...` and `null_control/...` are drawn.
        path (`str` or `Path`): where the picture goes.

    Raises:
        ValueError: no judge was measured.
        ImportError: matplotlib is not installed.
    """
    by_name = {f.name: f for f in findings if f.value is not None and f.interval is not None}
    judges = [name.split("/", 1)[1] for name in by_name if name.startswith("paired_accuracy/")]
    if not judges:
        raise ValueError("No judge was measured, so there is no accuracy to draw.")
    figure, axes = _new_figure(7, 1.6 + 0.6 * len(judges))
    axes.axvline(0.5, color=_GREY, linestyle="--", linewidth=1.2, label="chance")
    kinds = (("paired_accuracy", 0.0, 0, "imitator against human"), ("null_control", 0.22, 6, "null control"))
    for kind, height, number, label in kinds:
        known = [
            (place, by_name[f"{kind}/{judge}"]) for place, judge in enumerate(judges) if f"{kind}/{judge}" in by_name
        ]
        values = [(f.value, *f.interval) for _, f in known]
        _draw_points(axes, [place + height for place, _ in known], values, number, label)
    axes.set_yticks(range(len(judges)), [textwrap.fill(judge, 26) for judge in judges])
    axes.set_ylim(len(judges) - 0.5, -0.5)
    confidence = by_name[f"paired_accuracy/{judges[0]}"].confidence
    axes.set_xlabel(f"how often a fresh judge picks the human's answer ({100 * confidence:g} % interval)", fontsize=9)
    _legend_above(axes)
    return _save(figure, path)


def plot_e_values(log_e: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the evidence of each judge as it grows from question to question; above log2(20), 1 in 20 by chance.

    Args:
        log_e (`Mapping[str, np.ndarray]`): log e-value after each test question, nats, by judge.
        path (`str` or `Path`): where the picture goes.

    Raises:
        ValueError: no judge was measured.
        ImportError: matplotlib is not installed.
    """
    if not log_e:
        raise ValueError("No judge was measured, so there is no e-value to draw.")
    figure, axes = _new_figure(7, 3.6)
    for number, (judge, values) in enumerate(log_e.items()):
        bits = [0.0, *(float(value) / math.log(2) for value in values)]
        axes.plot(range(len(bits)), bits, color=_COLOURS[number % len(_COLOURS)], label=judge)
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot([len(bits) - 1], [bits[-1]], markersize=6, **style)
    axes.axhline(math.log2(20), color=_GREY, linestyle="--", linewidth=1.2, label="e-value 20")
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.set_xlabel("test questions seen", fontsize=9)
    axes.set_ylabel("log2 e-value", fontsize=9)
    _legend_above(axes)
    return _save(figure, path)


def plot_losses(human_nats: Any, imitator_nats: Any, path: str | Path) -> Path:
    """Draw how much human answers and the imitator's own answers surprise it, sorted: equal laws, equal curves.

    Args:
        human_nats, imitator_nats (`np.ndarray`): minus log-probability of each answer, nats; infinite ones are counted
            in the label.
        path (`str` or `Path`): where the picture goes.

    Raises:
        ValueError: a side has no finite loss.
        ImportError: matplotlib is not installed.
    """
    figure, axes = _new_figure(7, 3.6)
    for number, (side, nats) in enumerate((("human answers", human_nats), ("the imitator's own", imitator_nats))):
        bits = sorted(float(value) / math.log(2) for value in nats if math.isfinite(value))
        if not bits:
            raise ValueError(f"No loss of {side} is finite, so there is nothing to draw.")
        infinite = len(nats) - len(bits)
        label = f"{side}, mean {sum(bits) / len(bits):.1f}" + (f", {infinite} more are infinite" if infinite else "")
        shares = [(place + 0.5) / len(nats) for place in range(len(bits))]
        axes.plot(bits, shares, color=_COLOURS[number], linestyle="-" if number == 0 else "--", label=label)
    axes.set_xlabel("bits that an answer takes under the imitator's law", fontsize=9)
    axes.set_ylabel("share of answers with fewer", fontsize=9)
    axes.set_ylim(0, 1)
    _legend_above(axes)
    return _save(figure, path)


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "hf-imitate[plots]".') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | Path) -> Path:
    figure.savefig(path, dpi=150)
    return Path(path)
