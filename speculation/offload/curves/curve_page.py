"""Write curves as JSON, CSV and a page with plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from analysis.documents.curves import CURVES_FILE, CacheCurves, HitRateCurve
from profiler.trace.writer import write_text
from speculation.offload.simulation_page import COLORS

_COLUMNS = ("policy", "cache", "is_exact", "layer", "slots", "share", "requested", "hits", "hit_rate")
_DASHES = ("solid", "dash", "dashdot", "dot")
# Colors that can be seen on the heat map, from its dark side to the bright one, and in the legend.
_ON_CIVIDIS = ("#cc79a7", "#d55e00", "#0072b2", "#000000")
_SHARED, _PER_LAYER = "one cache for all layers", "a cache for each layer"


def write_curves(curves: CacheCurves, out: Path) -> None:
    """Write `curve.json`, `curve.csv` and `curve.html`, which opens offline, to the folder `out`."""
    drawn = curve_page(curves)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(curves))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "curve.csv", text.getvalue())
    write_text(out / CURVES_FILE, curves.to_json())
    write_text(out / "curve.html", drawn)


def curve_page(curves: CacheCurves) -> str:
    """Draw the hit rate by cache size, the same for each layer with the slots that it gets, and the working sets."""
    figures = [_overall(curves), _by_layer(curves)]
    if curves.working_sets:
        figures.append(_working_sets(curves))
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.PackageLoader("speculation.offload.curves", ""), trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("curve.html.j2").render(
        curves=curves,
        figures=[
            figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"responsive": True, "displayModeBar": False})
            for number, figure in enumerate(figures)
        ],
    )


def _rows(curves: CacheCurves) -> Iterator[tuple[object, ...]]:
    """A row for each policy, layer and size. layer: the decoder's index; empty for all layers together."""
    for curve in curves.curves:
        where = _SHARED if curve.is_global else _PER_LAYER
        lines = [("", curve.hits, curve.requested)]
        lines += list(zip(map(str, curves.moe_layers), curve.hits_by_layer, curve.requested_by_layer, strict=False))
        for layer, hits, requested in lines:
            for size, hit in zip(curve.sizes, hits, strict=True):
                rate = hit / max(1, requested)
                share = round(size / curve.sizes[-1], 6)
                yield curve.policy, where, curve.is_exact, layer, size, share, requested, hit, round(rate, 6)


def _overall(curves: CacheCurves) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, curve in enumerate(curves.curves):
        color, where = COLORS[number % len(COLORS)], _SHARED if curve.is_global else _PER_LAYER
        name = f"{curve.policy}, {where}" + ("" if curve.is_exact else " (simulated sizes)")
        sizes, rates = _thinned(curve)
        figure.add_scatter(
            x=[size / curve.sizes[-1] for size in sizes],
            y=rates,
            customdata=sizes,
            name=escape(name),
            mode="lines" if curve.is_exact else "lines+markers",
            line={"color": color, "dash": _DASHES[number % len(_DASHES)]},
            hovertemplate=f"{escape(name)}, %{{customdata}} slots (%{{x:.0%}}): %{{y:.3f}}<extra></extra>",
        )
        if curve.is_exact and curve.requested:
            figure.add_scatter(
                x=[curve.knee / curve.sizes[-1]],
                y=[curve.hit_rate(curve.knee)],
                mode="markers" if curve.is_global else "markers+text",
                text=[f"knee: {curve.knee:,} of {curve.sizes[-1]:,}"],
                textposition="bottom right",
                marker={"color": color, "size": 11, "symbol": "diamond"},
                showlegend=False,
                hovertemplate=f"knee of {escape(name)}: {curve.knee:,} slots, %{{y:.3f}}<extra></extra>",
            )
    figure.update_xaxes(title="share of all experts in the cache", tickformat=".0%", range=[0, 1.01])
    figure.update_yaxes(title="hit rate", range=[0, 1.01])
    return _laid_out(figure, "Hit rate by cache size", 500)


def _thinned(curve: HitRateCurve, most: int = 1000) -> tuple[list[int], list[float]]:
    """Sizes to draw, and the hit rates there: a curve of one cache for all layers may have tens of thousands."""
    step = max(1, len(curve.sizes) // most)
    places = sorted({*range(0, len(curve.sizes), step), len(curve.sizes) - 1})
    rates = curve.hit_rates
    return [curve.sizes[place] for place in places], [round(rates[place], 5) for place in places]


def _by_layer(curves: CacheCurves) -> Any:
    import plotly.graph_objects as go

    curve = next(each for each in curves.curves if each.is_exact and not each.is_global)
    layers = [str(layer) for layer in curves.moe_layers]
    rates = [
        [round(hit / max(1, requested), 4) for hit in hits]
        for hits, requested in zip(curve.hits_by_layer, curve.requested_by_layer, strict=True)
    ]
    figure = go.Figure()
    figure.add_heatmap(
        x=curve.sizes,
        y=layers,
        z=rates,
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        colorbar={"title": "hit rate", "orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 12, "len": 0.8},
        hovertemplate="layer %{y}, %{x} slots: %{z:.3f}<extra></extra>",
    )
    for number, row in enumerate(curves.slots):
        name = f"{row.slots:,} slots ({row.share:.0%}) divided by the curves of training"
        figure.add_scatter(
            x=row.by_layer,
            y=layers,
            name=name,
            mode="lines+markers",
            line={"color": _ON_CIVIDIS[number % len(_ON_CIVIDIS)], "width": 2},
            marker={"size": 5, "line": {"color": "#000000", "width": 1}},
            hovertemplate=f"{name}: layer %{{y}} gets %{{x}}<extra></extra>",
        )
    figure.update_xaxes(title="slots of the layer's cache", range=[-0.5, curves.num_experts + 0.5])
    figure.update_yaxes(title="layer", type="category", autorange="reversed", nticks=min(30, len(layers)))
    figure.update_layout(plot_bgcolor="#ffffff")
    return _laid_out(figure, f"{curve.policy}, {_PER_LAYER}", 300 + 14 * len(layers), top=110)


def _working_sets(curves: CacheCurves) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, row in enumerate(curves.working_sets):
        name = f"a step that decodes {row.tokens}" if row.is_batch else f"{row.tokens} consecutive tokens"
        color = COLORS[row.tokens.bit_length() % len(COLORS)]
        figure.add_scatter(
            x=[str(layer) for layer in curves.moe_layers],
            y=[round(mean, 3) for mean in row.mean_by_layer],
            customdata=row.percentile_90_by_layer,
            name=name,
            mode="lines+markers",
            line={"color": color, "dash": "dash" if row.is_batch else "solid"},
            marker={"size": 5, "symbol": number},
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.1f}} (90 %: %{{customdata}})<extra></extra>",
        )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="experts, mean", range=[0, curves.num_experts * 1.02])
    return _laid_out(figure, "Working sets by layer", 440 + 12 * len(curves.working_sets))


def _laid_out(figure: Any, title: str, height: int, top: int = 50) -> Any:
    figure.update_layout(
        template="plotly_white",
        title=title,
        font={"size": 14},
        height=height,
        margin={"l": 55, "r": 15, "t": top, "b": 60},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
    )
    return figure
