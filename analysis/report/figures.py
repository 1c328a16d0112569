"""Building blocks of the page: sections, charts with labels next to their lines, heat maps, embedded data."""

from __future__ import annotations

import base64
import gzip
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

# Okabe and Ito's palette is distinguishable with every common type of color blindness; Cividis was designed for the same. The
# palette's black, which a dark page would hide, is replaced by a brown.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#A6761D")
SCALE = "Cividis"
# Of loads relative to an even share, which is gray: less is blue; twice as much is orange, whatever the largest one is. The
# page's script has other colors for gray and for the largest load on a dark page.
LESS, EVEN, TWICE, MOST = "#0072B2", "#F1F1EF", "#E69F00", "#7A2800"
# Lines differ by dash as well: a page may be printed in gray.
DASHES = ("solid", "dash", "dashdot", "longdash")
# A control is dotted and thin in every chart, and chance a thin gray line.
CONTROL = {"dash": "dot", "width": 1.5}
CHANCE = {"color": "#8a8a8a", "dash": "dash", "width": 1}
# A line on which others may lie: both are seen.
BAND = {"color": "#CC79A7", "dash": "solid", "width": 7}
# More lines than these begin hidden, and the reader turns them on in the legend.
MAX_SHOWN = 4
PLOT_HEIGHT = 300
TOP, BOTTOM = 16, 56
# Room for the labels at the right ends of lines: their longest line in characters, and pixels.
LABEL_CHARACTERS, LABEL_WIDTH, LABEL_LINE = 22, 172, 15


@dataclass(frozen=True)
class Drawing:
    """A figure of a page.

    Attributes:
        name: Id of its element on the page, and name of its files.
        description: Text for screen readers.
        figure: The figure, from which `analysis.report.paper_figures` writes files for papers.
        content: Its HTML.
        rows: Its data as a table, the header first, where the lines of the figure are not the data themselves.
    """

    name: str
    description: str
    figure: go.Figure
    content: str
    rows: Sequence[Sequence[Any]] = ()

    def __html__(self) -> str:
        """The HTML; templates call it."""
        return self.content


@dataclass(frozen=True)
class Section:
    """One part of a page: a headline computed from the data, figures, tables, and how the numbers are computed.

    figures: from `drawing`. tables: rows of cells, the header first; the page shows them when they are opened. kind: the
    script that makes the section interactive, if any; data: JSON values for that script. controls: HTML before the first
    figure, for the script; whoever writes it escapes what comes from a trace.
    """

    title: str
    headline: str
    explanation: str
    figures: tuple[Drawing, ...] = ()
    tables: tuple[tuple[tuple[str, ...], ...], ...] = ()
    kind: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    controls: str = ""


@dataclass(frozen=True)
class Curve:
    """A line of a figure.

    style: `CONTROL` (dotted, color of the previous line), `CHANCE`, `BAND`, or None for the next color.
    """

    name: str
    y: Sequence[float] | npt.NDArray[Any]
    style: dict[str, Any] | None = None


def lines(
    chosen: Sequence[Curve], x: Sequence[Any], x_title: str, y_title: str, *, log_x: bool = False, as_category: bool = False
) -> go.Figure:
    """Lines over common x values, the first `MAX_SHOWN` of them shown at first, each with its name at its right end."""
    figure = go.Figure()
    number = 0
    ends: list[tuple[float, str, dict[str, Any]]] = []
    values: list[float] = []
    for place, line in enumerate(chosen):
        if line.style is None:
            style = {"color": COLORS[number % len(COLORS)], "dash": DASHES[number % len(DASHES)]}
            number += 1
        else:
            style = {"color": COLORS[(number - 1) % len(COLORS)]} | line.style
        y = [None if not np.isfinite(value) else round(float(value), 5) for value in line.y]
        figure.add_scatter(
            x=list(x),
            y=y,
            name=escape(line.name, quote=False),
            mode="lines" if line.style or len(y) > 40 else "lines+markers",
            line=style,
            marker={"size": 5},
            visible=True if place < MAX_SHOWN else "legendonly",
            showlegend=place >= MAX_SHOWN,
            hovertemplate="%{y}",
        )
        known = [value for value in y if value is not None]
        values += known
        if known and place < MAX_SHOWN:
            ends.append((known[-1], line.name, style))
    figure.update_xaxes(title=x_title)
    if log_x:
        figure.update_xaxes(type="log", tickvals=list(x), ticktext=[str(value) for value in x])
    elif as_category:
        figure.update_xaxes(type="category")
    top, bottom = max([*values, 0.0]) * 1.06, min([*values, 0.0]) * 1.06
    if top == bottom:
        top = 1.0
    figure.update_yaxes(title=y_title, range=[bottom, top])
    hidden = max(0, len(chosen) - MAX_SHOWN)
    figure.update_layout(
        height=PLOT_HEIGHT + TOP + BOTTOM + (30 + 20 * hidden if hidden else 0),
        legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0, "title": {"text": "Click to add: "}},
        showlegend=hidden > 0,
        hovermode="x unified",
        annotations=_end_labels(ends, bottom, top),
        # For the page's script, which puts the names below a narrow figure.
        meta={"names": len(chosen)},
    )
    return figure


def _end_labels(ends: list[tuple[float, str, dict[str, Any]]], bottom: float, top: float) -> list[dict[str, Any]]:
    """Annotations to the right of the plot, at the height of each line's end, moved apart where they would overlap.

    ends: the last value, the name and the style of each line.
    """
    texts = [textwrap.wrap(name, LABEL_CHARACTERS) or [""] for _, name, _ in ends]
    heights = [LABEL_LINE * len(text) + 5 for text in texts]
    wanted = [PLOT_HEIGHT * (top - value) / (top - bottom) for value, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda place: wanted[place])
    middles = dict.fromkeys(order, 0.0)
    below = 0.0
    for place in order:
        middles[place] = max(wanted[place], below + heights[place] / 2)
        below = middles[place] + heights[place] / 2
    above = PLOT_HEIGHT + BOTTOM / 2
    for place in reversed(order):
        middles[place] = min(middles[place], above - heights[place] / 2)
        above = middles[place] - heights[place] / 2
    return [
        {
            "x": 1,
            "xref": "paper",
            "xanchor": "left",
            "xshift": 6,
            "y": 1 - middles[place] / PLOT_HEIGHT,
            "yref": "paper",
            "yanchor": "middle",
            "align": "left",
            "showarrow": False,
            "font": {"size": 12},
            "text": f'<span style="color:{style["color"]}">{"┄" if style["dash"] == "dot" else "━"}</span> '
            + "<br>".join(escape(line, quote=False) for line in texts[place]),
        }
        for place, (_, _, style) in enumerate(ends)
    ]


def heat_map(
    values: npt.NDArray[Any], x: Sequence[Any], y: Sequence[Any], x_title: str, y_title: str, unit: str, hover: str
) -> go.Figure:
    """A heat map with the first row on top. hover: a Plotly template.

    Plotly interprets markup in x and y, so the caller must escape untrusted text.
    """
    figure = go.Figure(
        go.Heatmap(
            z=np.round(values, 4).astype(np.float32),
            x=[str(value) for value in x],
            y=[str(value) for value in y],
            colorscale=SCALE,
            zmin=0,
            zmax=float(np.nanmax(values)) or 1.0,
            colorbar={"title": unit, "thickness": 14, "outlinewidth": 0},
            hovertemplate=hover + "<extra></extra>",
        )
    )
    figure.update_xaxes(title=x_title, type="category", nticks=18, tickangle=0, showgrid=False)
    figure.update_yaxes(title=y_title, type="category", autorange="reversed", nticks=26, showgrid=False)
    return figure


def load_map(
    relative_LE: npt.NDArray[Any], layers: Sequence[int], x_title: str, hover: str, highest: float | None = None
) -> go.Figure:
    """A heat map of loads in units of an even share, in which experts above and below it differ in hue.

    highest: the end of the scale, for several maps with the same colors. Default: the largest load.
    """
    figure = heat_map(relative_LE, range(relative_LE.shape[1]), layers, x_title, "layer", "x even", hover)
    end = max(3.0, float(relative_LE.max()) if highest is None else highest)
    scale = [(0.0, LESS), (1 / end, EVEN), (2 / end, TWICE), (1.0, MOST)]
    figure.update_traces(zmax=end, colorscale=scale)
    return figure


TOP_LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def wrapped(label: str) -> str:
    """A long label, escaped and broken into lines so that it leaves room for the figure on a phone."""
    return "<br>".join(escape(line, quote=False) for line in textwrap.wrap(label, 22))


# Pixels that labels from `wrapped` need.
LABELS = 175
# Of grid lines and axes, on a light and on a dark page.
FAINT = "rgba(128, 128, 128, 0.25)"


def drawing(
    figure: go.Figure,
    name: str,
    description: str,
    left: int = 68,
    *,
    read: str = "",
    rows: Sequence[Sequence[Any]] = (),
) -> Drawing:
    """The figure with its HTML, which the page's script draws.

    name: id of its element; description: text for screen readers; rows: `Drawing.rows`.

    left: pixels for the labels of the y axis, as Plotly's automatic margins can cause a warning on narrow pages. read: one
    sentence on how to read the figure, shown below it.
    """
    right = LABEL_WIDTH if figure.layout.annotations else 16
    figure.update_layout(
        template="none",
        margin={"l": left, "r": right, "t": TOP, "b": BOTTOM, "autoexpand": True},
        font={"size": 13, "family": "system-ui, sans-serif"},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
    )
    figure.update_xaxes(gridcolor=FAINT, zerolinecolor=FAINT, linecolor=FAINT, title_standoff=8)
    figure.update_yaxes(gridcolor=FAINT, zerolinecolor=FAINT, linecolor=FAINT, title_standoff=12, automargin=False)
    # A browser ends a script at "</script", wherever it stands.
    content = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    caption = f"<figcaption><b>How to read this:</b> {escape(read)}</figcaption>" if read else ""
    drawn = (
        f'<figure><div class="figure" role="img" aria-label="{escape(description)}">'
        f'<div class="plot" id="{name}" style="height:{figure.layout.height or 450}px"></div></div>{caption}'
        f'<script type="application/json" class="plot-data" data-for="{name}">{content}</script></figure>'
    )
    return Drawing(name, description, figure, drawn, rows)


def packed(values: npt.NDArray[np.uint8]) -> str:
    """Bytes for a page's script: compressed with gzip, then encoded in base64."""
    return base64.b64encode(gzip.compress(values.tobytes(), 6, mtime=0)).decode()
