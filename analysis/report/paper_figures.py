"""Figures for papers: each as SVG and PNG, as wide as one column, with its data as CSV next to it.

Matplotlib draws them from the data of the report's figures. Plotly's own export needs a browser, which a machine that reads
traces often lacks, and keeps the look of a page. In the SVG, text is text: it can be searched, edited, and set in the paper's
font.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import plotly.graph_objects as go
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from analysis.documents.csv_text import csv_text
from analysis.report.figure_data import figure_rows, named_axes, plain_text
from analysis.report.figures import Section
from profiler.trace.writer import write_text

# One column of a two-column page, in inches; points; dots per inch of the PNG.
WIDTH, HEIGHT, MAX_HEIGHT = 3.4, 2.3, 7.0
FONT_SIZE, DPI = 7.0, 300
# Points of a Plotly pixel, which is made for a page twice as wide.
PIXEL = 0.4
STYLE = {
    "axes.linewidth": 0.5,
    "axes.prop_cycle": cycler(color=["#0072B2"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": FONT_SIZE,
    "hatch.linewidth": 0.4,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Without the time and random ids, the same data give the same file.
    "svg.hashsalt": "specmoe",
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
}
# Characters of a legend's entry that fit into half of the width, and of a label of an axis.
HALF_LINE, LABEL = 32, 36
DASHES = {"dot": (0, (1, 2)), "dash": (0, (4, 2)), "dashdot": (0, (4, 1.5, 1, 1.5)), "longdash": (0, (7, 2))}


def write_figures(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write every figure of the sections to NAME.svg, NAME.png and NAME.csv, where NAME is the id of the figure on the page.

    Returns the files. Raises `ModuleNotFoundError` on import if matplotlib is not installed (extra `figures`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for section in sections:
        for drawing in section.figures:
            data = folder / f"{drawing.name}.csv"
            write_text(data, csv_text(drawing.rows or figure_rows(drawing.figure)))
            paths.append(data)
            with matplotlib.rc_context(STYLE):
                drawn = draw(drawing.figure)
                for kind, metadata in (("svg", {"Date": None, "Title": drawing.description}), ("png", {"Software": None})):
                    path = folder / f"{drawing.name}.{kind}"
                    temporary = path.with_suffix(f".tmp.{kind}")
                    drawn.savefig(temporary, dpi=DPI, metadata=metadata)
                    # Both files have the layout of the first.
                    drawn.set_layout_engine("none")
                    temporary.replace(path)
                    paths.append(path)
    return paths


def draw(figure: go.Figure) -> Figure:
    """Draw the data of a Plotly figure of lines, points, bars or one heat map; lines that the page hides are left out."""
    traces = [trace for trace in figure.data if trace.visible in (None, True)]
    # On the page, the names of lines are at their ends; here, all are in the legend.
    if figure.layout.annotations:
        figure = go.Figure(figure)
        figure.for_each_trace(lambda trace: trace.update(showlegend=True))
        traces = [trace for trace in figure.data if trace.visible in (None, True)]
    height = min(MAX_HEIGHT, max(HEIGHT, HEIGHT * (figure.layout.height or 400) / 450))
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = drawn.add_subplot()
    if traces and traces[0].type == "heatmap":
        _heat_map(drawn, axes, traces[0])
    else:
        bars = [trace for trace in traces if trace.type == "bar"]
        for number, trace in enumerate(bars):
            _bars(axes, trace, number, len(bars))
        for trace in traces:
            if trace.type == "scatter":
                _points(axes, trace)
        _axes(axes, figure)
        names = [name for trace in traces if (name := _label(trace)) is not None]
        if len(names) > 1:
            columns = 2 if max(map(len, names)) <= HALF_LINE else 1
            drawn.legend(loc="outside lower center", ncols=columns, fontsize=FONT_SIZE - 1)
    for shape in figure.layout.shapes:
        if shape.type == "line" and shape.x0 == shape.x1:
            axes.axvline(shape.x0, color="#888888", linewidth=0.6)
    x_label, y_label = (textwrap.fill(_text(axis.title.text or ""), LABEL) for axis, _ in named_axes(figure))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return drawn


def _heat_map(drawn: Figure, axes: Axes, trace: Any) -> None:
    colors = LinearSegmentedColormap.from_list("", [(place, color) for place, color in trace.colorscale])
    image = axes.imshow(
        np.asarray(trace.z, dtype=float), cmap=colors, vmin=trace.zmin, vmax=trace.zmax, aspect="auto", interpolation="nearest"
    )
    drawn.colorbar(image, ax=axes, label=_text(trace.colorbar.title.text or ""), pad=0.02)
    for set_ticks, names in ((axes.set_xticks, trace.x), (axes.set_yticks, trace.y)):
        step = -(-len(names) // 16)
        set_ticks(range(0, len(names), step), [_text(name) for name in names[::step]])


def _bars(axes: Axes, trace: Any, number: int, count: int) -> None:
    """Bars of one series, next to those of the others."""
    places = np.arange(len(trace.x)) + (number - (count - 1) / 2) * 0.8 / count
    axes.bar(
        places,
        [np.nan if y is None else y for y in trace.y],
        0.8 / count,
        label=_label(trace),
        color=trace.marker.color,
        hatch="////" if trace.marker.pattern.shape else None,
        edgecolor="white",
        linewidth=0,
    )
    axes.set_xticks(range(len(trace.x)), [_text(x) for x in trace.x], rotation=90 if len(trace.x) > 6 else 0)


def _points(axes: Axes, trace: Any) -> None:
    """A line, points, or points with intervals."""
    mode = trace.mode or "lines+markers"
    x = [np.nan if value is None else _value(value) for value in trace.x]
    y = [np.nan if value is None else _value(value) for value in trace.y]
    color = trace.line.color or (trace.marker.color if isinstance(trace.marker.color, str) else None)
    if trace.error_x.array is not None:
        spans = [list(trace.error_x.arrayminus), list(trace.error_x.array)]
        axes.errorbar(x, y, xerr=spans, fmt="o", markersize=2.5, linewidth=0.7, capsize=1.5, color=color)
        return
    if "lines" in mode:
        style: Any = DASHES.get(trace.line.dash or "", "solid")
        width = max(0.5, (trace.line.width or 2) * PIXEL)
        axes.plot(x, y, color=color, linestyle=style, linewidth=width, label=_label(trace))
    if "markers" in mode:
        sizes = np.broadcast_to(np.asarray(6 if trace.marker.size is None else trace.marker.size, dtype=float), len(x))
        areas = (sizes * PIXEL) ** 2
        label = None if "lines" in mode else _label(trace)
        edge = trace.marker.line.color if isinstance(trace.marker.line.color, str) else color
        axes.scatter(x, y, s=areas, color=color, edgecolors=edge, linewidths=0.4, zorder=3, label=label)
    if "text" in mode and trace.text is not None:
        for place, text in enumerate(trace.text):
            axes.text(x[place], y[place], _text(text), fontsize=3.5, ha="center", va="center", zorder=4, clip_on=True)


def _axes(axes: Axes, figure: go.Figure) -> None:
    """Scales, ranges and ticks of both axes."""
    for name, (axis, _) in zip("xy", named_axes(figure), strict=True):
        set_scale, set_limits, set_ticks = (getattr(axes, f"set_{name}{what}") for what in ("scale", "lim", "ticks"))
        if axis.type == "log":
            set_scale("log")
            matplotlib_axis = axes.xaxis if name == "x" else axes.yaxis
            matplotlib_axis.minorticks_off()
        elif axis.range is not None:
            set_limits(*axis.range)
        elif axis.rangemode == "tozero":
            set_limits(min(0, axes.get_ylim()[0]) if name == "y" else 0)
        if axis.tickvals is not None:
            inside = [place for place, value in enumerate(axis.tickvals) if _is_inside(value, axis)]
            labels = axis.ticktext if axis.ticktext is not None else axis.tickvals
            set_ticks([axis.tickvals[place] for place in inside], [_text(labels[place]) for place in inside])
        if axis.autorange == "reversed":
            set_limits(*reversed(axes.get_xlim() if name == "x" else axes.get_ylim()))
        if axis.visible is False:
            set_ticks([])
            axes.spines["left" if name == "y" else "bottom"].set_visible(False)


def _is_inside(value: float, axis: Any) -> bool:
    return axis.range is None or axis.type == "log" or min(axis.range) <= value <= max(axis.range)


def _label(trace: Any) -> str | None:
    return textwrap.fill(_text(trace.name), 2 * HALF_LINE) if trace.name and trace.showlegend is not False else None


def _value(value: Any) -> Any:
    """A number as it is, a category as text."""
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    """Text of a figure as matplotlib shows it literally: it reads dollar signs as formulas."""
    return "\n".join(plain_text(line) for line in str(text).split("<br>")).replace("$", r"\$")
