"""The section on the flow between layers: the strongest transitions, drawn over a span of layers that the reader chooses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from analysis.report.figures import Section, drawing
from analysis.statistics.compute import Statistics, show
from analysis.statistics.flow import LayerFlow

# Times as often as in independent layers: lower ends of the classes, with their colors and widths. Blue and orange differ for
# every common type of color vision.
CLASSES = ((1.0, "#8FA8BF", 1.0), (2.0, "#3B8BC6", 1.6), (3.0, "#E69F00", 2.4), (5.0, "#D55E00", 3.4))
# A transition is drawn as a curve through so many points.
POINTS = 7
SWEEPS = 4
# Numbers of layers to show at a time; the first fits a narrow page, the second is chosen at first.
SPANS = (4, 7, 13)
# With more experts in a layer, only those with transitions are drawn.
MOST_EXPERTS = 40
# Of the controls, on a light and on a dark page.
FAINT, GRAY = "rgba(128, 128, 128, 0.25)", "#808080"
MOST_IN_TABLE = 15
READ = (
    "follow a wide line from an expert to the next layer: a token that uses the first expert uses the second so many times as "
    "often as the loads of both explain."
)


def flow_section(s: Statistics) -> Section:
    """The strongest transitions between adjacent layers. Only for traces with hops."""
    flows, layers, experts = s.flows, s.axes.moe_layers, s.axes.num_experts
    number = max(len(flow.share) for flow in flows)
    excess, control = (float(np.mean([getattr(flow, name) for flow in flows])) for name in ("excess", "excess_shuffled"))
    strongest = max(
        ((flow, n) for flow in flows for n in range(len(flow.share))),
        key=lambda link: float(link[0].share[link[1]] * (1 - 1 / link[0].lift[link[1]])),
        default=None,
    )
    headline = (
        f"The {number} main transitions of {experts * experts:,} from a layer to the next hold {excess:.1%} of all pairs "
        f"of experts more than the loads explain (shuffled control: {control:.1%}), on average over layers"
    )
    if strongest is not None:
        flow, n = strongest
        headline += (
            f"; the largest leads from expert {flow.earlier[n]} of layer {layers[flow.layer]} to expert {flow.later[n]} of "
            f"layer {layers[flow.layer + 1]}: {flow.share[n]:.1%} of pairs, {flow.lift[n]:.1f} times as many as in independent "
            "layers"
        )
    explanation = (
        "A dot is an expert, larger the more it is used, and a line a transition between adjacent layers: the wider, the more "
        "often a token uses both experts, relative to independent layers. For each pair of layers, the lines are the "
        "transitions whose share of all pairs most exceeds the share expected from both loads. Experts are ordered so that few "
        "lines cross; their order means nothing else. Choose how many layers to show, and move the slider to choose which."
    )
    rows = [("from layer", "to layer", "expert", "next expert", "share of pairs", "x independent")]
    links = [(flow, n) for flow in flows for n in range(len(flow.share))]
    links.sort(key=lambda link: -float(link[0].share[link[1]] * (1 - 1 / link[0].lift[link[1]])))
    rows += [
        (
            f"{layers[flow.layer]}",
            f"{layers[flow.layer + 1]}",
            f"{flow.earlier[n]}",
            f"{flow.later[n]}",
            f"{flow.share[n]:.2%}",
            show(float(flow.lift[n]), 1),
        )
        for flow, n in links[:MOST_IN_TABLE]
    ]
    figures = (drawing(_figure(s), "flow", headline, left=20, read=READ, rows=_rows(s)),)
    return Section("Flow between layers", headline + ".", explanation, figures, (tuple(rows),))


def _rows(s: Statistics) -> list[tuple[Any, ...]]:
    """All transitions as a table."""
    layers = s.axes.moe_layers
    rows: list[tuple[Any, ...]] = [("from_layer", "to_layer", "expert", "next_expert", "share", "lift")]
    for flow in s.flows:
        ends = layers[flow.layer], layers[flow.layer + 1]
        columns = flow.earlier, flow.later, flow.share, flow.lift
        rows += [(*ends, *link) for link in zip(*(each.tolist() for each in columns), strict=True)]
    return rows


def _figure(s: Statistics) -> go.Figure:
    layers, experts = len(s.axes.moe_layers), s.axes.num_experts
    places_LE = expert_order(s.flows, layers, experts)
    is_shown_LE = np.ones((layers, experts), dtype=np.bool_) if experts <= MOST_EXPERTS else _has_transitions(s)
    # Those that are shown move together, in the middle.
    count_L = is_shown_LE.sum(1)
    places_LE = np.argsort(np.argsort(np.where(is_shown_LE, places_LE, experts), axis=1, kind="stable"), axis=1)
    places_LE = places_LE + (count_L.max() - count_L[:, None]) / 2
    figure = go.Figure()
    # Half a wave of a cosine from each expert to the next.
    along = np.linspace(0, 1, POINTS)
    rise = (1 - np.cos(np.pi * along)) / 2
    edges = [*(low for low, _, _ in CLASSES), np.inf]
    for (low, high), (_, color, width) in zip(pairwise(edges), CLASSES, strict=True):
        x: list[float | None] = []
        y: list[float | None] = []
        for flow in s.flows:
            is_here = (flow.lift >= low) & (flow.lift < high)
            for i, j in zip(flow.earlier[is_here], flow.later[is_here], strict=True):
                begin, end = places_LE[flow.layer, i], places_LE[flow.layer + 1, j]
                x += [*np.round(flow.layer + along, 3).tolist(), None]
                y += [*np.round(begin + (end - begin) * rise, 2).tolist(), None]
        name = f"{low:g} to {high:g} x independent" if np.isfinite(high) else f"{low:g} x and more"
        figure.add_scatter(x=x, y=y, mode="lines", name=name, line={"color": color, "width": width}, hoverinfo="skip")
    layers_N, experts_N = np.nonzero(is_shown_LE)
    relative_N = s.load.share_LE[is_shown_LE] * experts
    figure.add_scatter(
        x=layers_N.tolist(),
        y=places_LE[is_shown_LE].tolist(),
        mode="markers+text",
        text=[str(expert) for expert in experts_N.tolist()],
        textposition="middle center",
        textfont={"size": 9, "color": "#1a1a1a"},
        name="expert",
        showlegend=False,
        marker={
            "size": np.round(np.clip(14 * np.sqrt(relative_N), 11, 22), 1).tolist(),
            "color": "#CFD8DC",
            "line": {"color": "#607D8B", "width": 1},
        },
        customdata=[text for text, is_shown in zip(_hover(s), is_shown_LE.ravel().tolist(), strict=True) if is_shown],
        hovertemplate="expert %{text}: %{customdata}<extra></extra>",
    )
    names = [str(layer) for layer in s.axes.moe_layers]
    spans = [*(span for span in SPANS if span < layers), layers]
    shown = min(1, len(spans) - 1)
    figure.update_xaxes(
        title="layer",
        tickvals=list(range(layers)),
        ticktext=names,
        range=_range(0, spans[shown]),
        showgrid=False,
        zeroline=False,
        fixedrange=True,
    )
    figure.update_yaxes(visible=False, range=[int(count_L.max()) - 0.2, -0.8], fixedrange=True)
    figure.update_layout(
        height=max(460, min(1200, 240 + 19 * int(count_L.max()))),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    if len(spans) > 1:
        choices = [
            {
                "label": "all layers" if span == layers else f"{span} layers",
                "method": "relayout",
                "args": [{"sliders": _slider(names, span), "xaxis.range": _range(0, span)}],
            }
            for span in spans
        ]
        menu = {"buttons": choices, "active": shown, "direction": "up", "x": 0, "xanchor": "left", "y": -0.13, "yanchor": "top"}
        colors = {"bgcolor": "#ECEFF1", "bordercolor": GRAY, "font": {"color": "#1a1a1a", "size": 13}}
        figure.update_layout(updatemenus=[menu | colors], sliders=_slider(names, spans[shown]))
    return figure


def _range(first: int, span: int) -> list[float]:
    """The part of the x axis with `span` layers from `first` on."""
    return [first - 0.3, first + span - 0.7]


def _slider(names: list[str], span: int) -> list[dict[str, Any]]:
    """The slider that moves a span of layers over the model; none if the span is the whole model."""
    steps = [
        {
            "label": f"{names[first]} to {names[first + span - 1]}",
            "method": "relayout",
            "args": [{"xaxis.range": _range(first, span)}],
        }
        for first in range(len(names) - span + 1)
    ]
    if len(steps) < 2:
        return []
    look = {"bgcolor": FAINT, "bordercolor": FAINT, "activebgcolor": GRAY, "tickcolor": FAINT, "ticklen": 4}
    # Labels of steps would overlap; the value above the slider names the layers.
    hidden = {"color": "rgba(0, 0, 0, 0)", "size": 1}
    place = {"x": 0.34, "len": 0.66, "y": -0.1, "yanchor": "top", "pad": {"t": 0, "b": 0}, "font": hidden}
    current = {"prefix": "layers ", "font": {"size": 13, "color": GRAY}, "xanchor": "right"}
    return [{"steps": steps, "currentvalue": current, "active": 0} | look | place]


def _has_transitions(s: Statistics) -> npt.NDArray[np.bool_]:
    """Whether an expert is an end of one of the transitions `[L, E]`."""
    linked_LE = np.zeros((len(s.axes.moe_layers), s.axes.num_experts), dtype=np.bool_)
    for flow in s.flows:
        linked_LE[flow.layer, flow.earlier] = True
        linked_LE[flow.layer + 1, flow.later] = True
    return linked_LE


def _hover(s: Statistics) -> list[str]:
    """What the figure says of each expert of each layer: its load, and its strongest transitions."""
    said = [[f"{load:.2f} x even" for load in loads] for loads in (s.load.share_LE * s.axes.num_experts).tolist()]
    for flow in s.flows:
        for i, j, share, lift in zip(flow.earlier, flow.later, flow.share, flow.lift, strict=True):
            if said[flow.layer][i].count("<br>") < 3:
                said[flow.layer][i] += f"<br>to {j}: {share:.1%} of pairs, {lift:.1f} x independent"
    return [text for row in said for text in row]


def expert_order(flows: list[LayerFlow], layers: int, experts: int) -> npt.NDArray[np.int64]:
    """A place for each expert of each layer `[L, E]`, 0 to E - 1, such that few transitions cross.

    Each layer is sorted by the mean place of the experts that its transitions lead from, then to, in turn (the barycenter
    method of Sugiyama, Tagawa and Toda, 1981). An expert without transitions keeps its place in between.
    """
    places = np.tile(np.arange(experts), (layers, 1))
    tables = np.zeros((layers - 1, experts, experts))
    for flow in flows:
        tables[flow.layer, flow.earlier, flow.later] = flow.share
    for _ in range(SWEEPS):
        for layer in range(1, layers):
            places[layer] = _sorted_by(tables[layer - 1].T, places[layer - 1], places[layer])
        for layer in range(layers - 2, -1, -1):
            places[layer] = _sorted_by(tables[layer], places[layer + 1], places[layer])
    return places


def _sorted_by(
    weights_EE: npt.NDArray[np.float64], other_E: npt.NDArray[np.int64], own_E: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Places by the weighted mean place of the neighbors in the other layer."""
    total_E = weights_EE.sum(1)
    wanted_E = np.divide(weights_EE @ other_E, total_E, out=own_E.astype(np.float64), where=total_E > 0)
    return np.argsort(np.argsort(wanted_E, kind="stable"), kind="stable")
