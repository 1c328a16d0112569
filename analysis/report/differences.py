"""The section on the differences between two traces, with intervals and what two halves of one trace show."""

from __future__ import annotations

from html import escape

import numpy as np
import plotly.graph_objects as go

from analysis.report.figures import COLORS, CONTROL, EVEN, Curve, Drawing, Section, drawing, heat_map, lines
from analysis.statistics.compute import mean, show
from analysis.statistics.differences import SPLITS, DatasetDifference, LoadDifference

# Blue for the second trace, orange for the first, white for none: distinguishable with every common type of color vision.
DIVERGING = ((0.0, COLORS[0]), (0.5, EVEN), (1.0, COLORS[1]))
LARGEST = 20
READ = "a line above its dotted control is a layer where the traces differ more than halves of one trace do."


def differences_section(found: LoadDifference, layers: tuple[int, ...], number: int) -> Section:
    """One pair of traces. layers: the decoder's indices; number: of the pair, for the ids of figures."""
    first, second = found.first, found.second
    experts = found.share.size
    control = " and ".join(f"{name} {show(count, 0)}" for name, count in zip((first, second), found.found_halves, strict=True))
    headline = (
        f"{found.found} of {experts:,} experts have another share of the load in {first} than in {second}, with 95 % intervals "
        f"(two halves of one trace: {control}; by chance {0.05 * experts:.0f}). {mean(found.moved):.1%} of a layer's "
        f"selections would have to go to other experts (two halves: {mean(found.moved_halves):.1%})."
    )
    drawn = "which both traces share: they are drawn in pairs" if found.is_paired else "drawn for each trace on its own"
    explanation = (
        f"Differences are {first} minus {second}, in units of an even share (1/E of a layer's selections). Intervals: "
        f"bootstrap over problems, {drawn}. The map leaves out experts whose interval contains 0. Two halves: mean of {SPLITS} "
        "random splits of a trace. A half has fewer problems than a trace, so halves differ more than two such traces would "
        "by chance. Moved: half the sum of all differences of shares (total variation distance), never below 0, hence its "
        "control."
    )
    figures = [_map(found, layers, number), _moved(found, layers, number)]
    if found.found:
        figures.insert(1, _largest(found, layers, number))
    rows = [("dataset", "problems", "moved", "two halves", "entropy / max", "95 % interval")]
    rows += [_cells(each) for each in found.datasets]
    return Section(f"Differences: {first} and {second}", headline, explanation, tuple(figures), (tuple(rows),))


def _cells(each: DatasetDifference) -> tuple[str, str, str, str, str, str]:
    return (
        each.dataset,
        f"{each.problems[0]:,} / {each.problems[1]:,}",
        f"{each.moved:.1%}",
        "-" if not np.isfinite(each.moved_halves) else f"{each.moved_halves:.1%}",
        f"{each.entropy:+.4f}",
        f"{each.entropy_low:+.4f} to {each.entropy_high:+.4f}",
    )


def _map(found: LoadDifference, layers: tuple[int, ...], number: int) -> Drawing:
    """All experts; those whose interval contains 0 have no color."""
    experts = found.share.shape[1]
    shown = np.where(found.is_found, found.share, 0.0)
    most = float(np.abs(shown).max()) or 1.0
    unit = "x even"
    hover = "layer %{y}, expert %{x}: %{z:+.2f} x an even share"
    figure = heat_map(np.abs(shown), range(experts), layers, "expert", "layer", unit, hover)
    figure.update_traces(z=np.round(shown, 4).astype(np.float32), zmin=-most, zmax=most, colorscale=DIVERGING)
    figure.update_layout(height=max(320, min(760, 120 + 16 * len(layers))))
    rows: list[tuple[object, ...]] = [("layer", "expert", "difference", "low", "high", "found")]
    columns = found.share, found.low, found.high, found.is_found
    for n, layer in enumerate(layers):
        rows += [(layer, expert, *values) for expert, values in enumerate(np.stack(columns, axis=-1)[n].tolist())]
    description = f"Expert load of {found.first} minus that of {found.second}, by layer and expert."
    read = f"orange: used more in {found.first}; blue: more in {found.second}; no color: the difference may be chance."
    return drawing(figure, f"differences-map-{number}", description, read=read, rows=rows)


def _largest(found: LoadDifference, layers: tuple[int, ...], number: int) -> Drawing:
    """The largest differences whose interval does not contain 0, with their intervals."""
    ranked = np.argsort(-np.where(found.is_found, np.abs(found.share), -1), axis=None, kind="stable")
    chosen = np.stack(np.unravel_index(ranked[: min(LARGEST, found.found)], found.share.shape), axis=1)
    chosen = chosen[np.argsort(found.share[chosen[:, 0], chosen[:, 1]], kind="stable")]
    at = chosen[:, 0], chosen[:, 1]
    names = [f"layer {layers[n]}, expert {expert}" for n, expert in chosen.tolist()]
    value, low, high = found.share[at], found.low[at], found.high[at]
    figure = go.Figure()
    figure.add_scatter(
        x=np.round(value, 4).tolist(),
        y=names,
        mode="markers",
        marker={"color": COLORS[0], "size": 8},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": np.round(np.maximum(high - value, 0), 4).tolist(),
            "arrayminus": np.round(np.maximum(value - low, 0), 4).tolist(),
        },
        hovertemplate="%{y}: %{x:+.2f} x an even share<extra></extra>",
        showlegend=False,
    )
    title = f"{found.first} minus {found.second} (x even)"
    figure.update_xaxes(title=escape(title, quote=False), zeroline=True)
    figure.update_yaxes(type="category")
    figure.update_layout(height=140 + 20 * len(names))
    description = "The largest differences, with 95 % intervals."
    rows: list[tuple[object, ...]] = [("layer", "expert", "difference", "low", "high")]
    rows += [
        (layers[n], expert, float(found.share[n, expert]), float(found.low[n, expert]), float(found.high[n, expert]))
        for n, expert in chosen.tolist()
    ]
    return drawing(
        figure,
        f"differences-largest-{number}",
        description,
        left=140,
        read="a point is an expert; its bar, the 95 % interval, does not reach 0.",
        rows=rows,
    )


def _moved(found: LoadDifference, layers: tuple[int, ...], number: int) -> Drawing:
    """The share of selections that would have to move, by layer, next to two halves of one trace."""
    name = f"{found.first} / {found.second}"
    chosen = [Curve(name, found.moved), Curve("two halves of one trace", found.moved_halves, CONTROL)]
    figure = lines(chosen, layers, "layer", "share of selections that moved")
    return drawing(figure, f"differences-moved-{number}", "Share of a layer's selections that moved, by layer.", read=READ)
