"""Building blocks of the page's figures: a palette for every kind of color vision, lines, heat maps, embedded data."""

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

# Okabe and Ito's palette is distinguishable with every common type of color blindness; Cividis was designed for the same.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SCALE = "Cividis"
# Lines differ by dash as well: a page may be printed in gray.
DASHES = ("solid", "dash", "dashdot", "longdash")
CONTROL = {"dash": "dot"}
CHANCE = {"color": "#999999", "dash": "dot", "width": 1}


@dataclass(frozen=True)
class Drawing:
    """A figure of a page.

    Attributes:
        name: Id of its element on the page, and name of its files.
        description: Text for screen readers.
        figure: The figure, from which `analysis.report.export` writes files for papers.
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
    """One part of a page: a headline computed from the data, an explanation of how to read it, figures and tables.

    tables: rows of cells, the header first. kind: the script that makes the section interactive, if any; data:
    JSON values for that script.
    """

    title: str
    headline: str
    explanation: str
    figures: tuple[Drawing, ...] = ()
    tables: tuple[tuple[tuple[str, ...], ...], ...] = ()
    kind: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """A line of a figure. style: `CONTROL` (dotted, color of the previous line), `CHANCE`, or None for the next color."""

    name: str
    y: Sequence[float] | npt.NDArray[Any]
    style: dict[str, Any] | None = None


def lines(
    chosen: Sequence[Curve], x: Sequence[Any], x_title: str, y_title: str, *, log_x: bool = False, as_category: bool = False
) -> go.Figure:
    """Lines over common x values."""
    figure = go.Figure()
    number = 0
    for line in chosen:
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
            mode="lines" if line.style else "lines+markers",
            line=style,
            marker={"size": 5},
        )
    figure.update_xaxes(title=x_title)
    if log_x:
        figure.update_xaxes(type="log", tickvals=list(x), ticktext=[str(value) for value in x])
    elif as_category:
        figure.update_xaxes(type="category")
    figure.update_yaxes(title=y_title, rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": -0.22, "yanchor": "top"}, height=400 + 16 * len(chosen))
    return figure


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
            colorbar={"title": unit, "thickness": 14},
            hovertemplate=hover + "<extra></extra>",
        )
    )
    figure.update_xaxes(title=x_title, type="category", nticks=18, tickangle=0)
    figure.update_yaxes(title=y_title, type="category", autorange="reversed", nticks=26)
    return figure


TOP_LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def wrapped(label: str) -> str:
    """A long label, escaped and broken into lines so that it leaves room for the figure on a phone."""
    return "<br>".join(escape(line, quote=False) for line in textwrap.wrap(label, 22))


# Pixels that labels from `wrapped` need.
LABELS = 175


def html(figure: go.Figure, name: str, description: str, left: int = 60, *, rows: Sequence[Sequence[Any]] = ()) -> Drawing:
    """The figure with its HTML. name: id of its element; description: text for screen readers; rows: `Drawing.rows`.

    left: pixels for the labels of the y axis, as Plotly's automatic margins can cause a warning on narrow pages.
    """
    figure.update_layout(
        template="plotly_white", margin={"l": left, "r": 16, "t": 16, "b": 60, "autoexpand": True}, font={"size": 14}
    )
    figure.update_yaxes(automargin=False)
    config = {"responsive": True, "displayModeBar": False}
    body = figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=name)
    content = f'<div class="figure" role="img" aria-label="{escape(description)}">{body}</div>'
    return Drawing(name, description, figure, content, rows)


def packed(values: npt.NDArray[np.uint8]) -> str:
    """Bytes for a page's script: compressed with gzip, then encoded in base64."""
    return base64.b64encode(gzip.compress(values.tobytes(), 6, mtime=0)).decode()
