"""The picture of a power audit: payload against what each finding makes of it."""

from pathlib import Path
from typing import Any

from hf_imitate.audits.power_report import Detection, PlantedRow, PowerReport

_TITLES = {"price": "price (law stated openly)", "calibration_gap": "calibration gap", "re_execution": "re-execution"}
_SEEN, _MISSED, _GREY = "#D55E00", "#0072B2", "#666666"
_LOWEST = 1e-12


def plot_power(report: PowerReport, path: str | Path) -> Path:
    """Draw a panel per finding: the payload of each scheme against its p-value, above the dashed line and filled where
    it is seen.

    Schemes are numbered; the legend names them. P-values are after Holm's correction, those below 1e-12 are drawn
    there; of re-execution, the share of answers that differ is drawn.

    Args:
        report (`PowerReport`): what was found.
        path (`str` or `Path`): where the picture goes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "hf-imitate[plots]".') from error
    names = report.findings
    columns = min(3, len(names))
    num_rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 1.6 + 2.7 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, columns, squeeze=False, sharex=True)
    for place, name in enumerate(names):
        _draw_panel(grid[place // columns][place % columns], report, name)
    for place in range(len(names), num_rows * columns):
        grid[place // columns][place % columns].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("payload: bits per answer that the key reads", fontsize=8)
    figure.suptitle(
        f"What sees what, {report.num_questions:,} questions: filled and orange is seen, hollow and blue is not",
        fontsize=10,
    )
    handles = [_handle(number, row) for number, row in enumerate(report.rows, 1)]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        handlelength=0,
        handletextpad=0,
    )
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_panel(axes: Any, report: PowerReport, name: str) -> None:
    axes.set_title(_TITLES.get(name, f"judge: {name.split('/', 1)[-1]}"), fontsize=9)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlim(-0.12, 1.12 * max(1.0, *(row.payload.value or 0.0 for row in report.rows)))
    is_share = name == "re_execution"
    if is_share:
        axes.set_ylim(-0.12, 1.18)
        axes.set_ylabel("share of answers that differ", fontsize=8)
    else:
        axes.set_yscale("log")
        axes.set_ylim(9.0, _LOWEST / 30)
        axes.axhline(report.level, color=_GREY, linestyle="--", linewidth=1)
        axes.set_ylabel("p-value after Holm", fontsize=8)
    shown = [
        (number, row.payload.value or 0.0, found, _height(found, is_share))
        for number, row in enumerate(report.rows, 1)
        for found in row.detections
        if found.name == name and found.is_seen is not None
    ]
    for _, payload, found, height in shown:
        fill = _SEEN if found.is_seen else "white"
        colour = _SEEN if found.is_seen else _MISSED
        axes.plot([payload], [height], "o", markersize=6, color=colour, markerfacecolor=fill)
    for (x, y), numbers in _clusters(axes, [(n, payload, height) for n, payload, _, height in shown]):
        is_high = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1] > 0.5
        lines = [", ".join(map(str, numbers[start : start + 3])) for start in range(0, len(numbers), 3)]
        style = {"fontsize": 8, "ha": "center", "va": "top" if is_high else "bottom"}
        away = (0, -6 if is_high else 6)
        axes.annotate("\n".join(lines), (x, y), away, textcoords="offset points", **style)


def _height(found: Detection, is_share: bool) -> float:
    return (found.finding.value or 0.0) if is_share else max(found.p_holm or 0.0, _LOWEST)


def _clusters(axes: Any, points: list[tuple[int, float, float]]) -> list[tuple[tuple[float, float], list[int]]]:
    """Numbers of points that stand together, in one label, so that labels stay apart."""
    found: list[tuple[tuple[float, float], list[tuple[float, float]], list[int]]] = []
    for number, x, y in points:
        place = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        for centre, members, numbers in found:
            if abs(place[0] - centre[0]) < 0.09 and abs(place[1] - centre[1]) < 0.05:
                members.append((x, y))
                numbers.append(number)
                break
        else:
            found.append(((place[0], place[1]), [(x, y)], [number]))
    return [((sum(x for x, _ in members) / len(members), members[0][1]), numbers) for _, members, numbers in found]


def _handle(number: int, row: PlantedRow) -> Any:
    from matplotlib.lines import Line2D

    kind = "" if row.kind == "message" else f" ({row.kind})" if row.kind not in row.scheme else ""
    return Line2D([], [], linestyle="none", label=f"{number}  {row.scheme}{kind}")
