"""The data of a figure as a table, and what else of it is needed to draw it elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import unescape
from typing import Any

import numpy as np
import plotly.graph_objects as go

Rows = list[tuple[Any, ...]]


def figure_rows(figure: go.Figure) -> Rows:
    """The data of a figure, the header first, with the rounding of the figure: five decimals, of heat maps four.

    Lines and bars over the same x have a column each; other figures have a row for each point, or for each cell.
    """
    x_title, y_title = (plain_text(axis.title.text or name) for axis, name in named_axes(figure))
    traces = list(figure.data)
    if traces and traces[0].type == "heatmap":
        trace = traces[0]
        rows: Rows = [(y_title, x_title, plain_text(trace.colorbar.title.text or "value"))]
        values = np.asarray(trace.z, dtype=float)
        for y, of_row in zip(trace.y, values.tolist(), strict=True):
            rows += [(number(y), number(x), value) for x, value in zip(trace.x, of_row, strict=True)]
        return rows
    names = [plain_text(trace.name or y_title) for trace in traces]
    has_intervals = any(trace.type == "scatter" and trace.error_x.array is not None for trace in traces)
    if traces and not has_intervals and all(list(trace.x) == list(traces[0].x) for trace in traces):
        columns = [[number(x) for x in traces[0].x], *(list(trace.y) for trace in traces)]
        return [(x_title, *names), *zip(*columns, strict=True)]
    is_named = any(trace.name for trace in traces)
    rows = [(*(("series",) if is_named else ()), y_title, x_title, *(("low", "high") if has_intervals else ()))]
    for name, trace in zip(names, traces, strict=True):
        for place, (x, y) in enumerate(zip(trace.x, trace.y, strict=True)):
            ends: tuple[Any, ...] = ()
            if has_intervals:
                ends = (x - trace.error_x.arrayminus[place], x + trace.error_x.array[place])
            if x is not None:
                rows.append((*((name,) if is_named else ()), number(y), number(x), *ends))
    return rows


def named_axes(figure: go.Figure) -> Sequence[tuple[Any, str]]:
    """The axes of a figure with their names."""
    return (figure.layout.xaxis, "x"), (figure.layout.yaxis, "y")


def plain_text(text: str) -> str:
    """Text of a figure without markup."""
    return unescape(re.sub(r"<br>", " ", str(text)))


def number(value: Any) -> Any:
    """A category as a number, if it is one."""
    if not isinstance(value, str):
        return value
    text = plain_text(value)
    return int(text) if re.fullmatch(r"\d{1,18}", text) else text
