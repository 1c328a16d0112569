"""One self-contained HTML page from the statistics of a trace: figures by Plotly, whose JavaScript is inlined."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from analysis.statistics import Statistics, plain_zero
from profiler.writer import write_text

# Okabe and Ito's palette, distinguishable with every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Numbers of transition matrices in the page: about 3 MB. Longer hops are left out beyond that.
MAX_MATRIX_NUMBERS = 500_000


@dataclass(frozen=True)
class Section:
    """One part of the page: a headline computed from the data, how to read it, and a figure or a table."""

    title: str
    headline: str
    explanation: str
    figure: str = ""
    table: tuple[tuple[str, ...], ...] = ()


def write_report(statistics: Statistics, path: Path, predictions: list[dict[str, Any]] | None = None) -> None:
    """Write the page. predictions: rows of an evaluation (name -> text), shown as a table if given."""
    model = statistics.trace.metadata.model
    sections = [_load(statistics), _transitions(statistics), _hops(statistics)]
    if statistics.domains:
        sections.append(_domains(statistics))
    if predictions:
        sections.append(_predictions(predictions))
    facts = [
        ("Model", model.id),
        ("Routing", f"{len(model.moe_layers)} MoE layers, {model.num_experts} experts, top-{model.top_k}"),
        ("Data", ", ".join(statistics.load_by_dataset)),
        ("Problems", f"{statistics.problems:,}"),
        ("Tokens", f"{statistics.tokens:,}"),
        ("Recorded with", _origin(statistics)),
        ("Chance", f"a given expert is selected with probability {model.top_k / model.num_experts:.3f}"),
    ]
    facts += [("Gap", gap) for gap in statistics.trace.metadata.gaps]
    facts += [("Note", caveat) for caveat in statistics.trace.caveats()]
    template = jinja2.Environment(autoescape=True, loader=jinja2.PackageLoader("analysis", "")).get_template("report.html.j2")
    page = template.render(title=f"Expert routing of {model.id}", facts=facts, sections=sections, plotly=get_plotlyjs())
    write_text(path, page)


def _origin(statistics: Statistics) -> str:
    """Engine, version and precision; for a converted trace, the format that it came in."""
    metadata = statistics.trace.metadata
    if metadata.engine == "unknown":
        return ", ".join(filter(None, [metadata.hook, metadata.model.dtype]))
    engine = " ".join(filter(None, [metadata.engine, metadata.versions.get(metadata.engine)]))
    return ", ".join(filter(None, [engine, metadata.model.dtype]))


def _load(statistics: Statistics) -> Section:
    load, model = statistics.load, statistics.trace.metadata.model
    relative_LE = load.share_LE * model.num_experts
    figure = go.Figure(
        go.Heatmap(
            z=np.round(relative_LE, 4),
            x=[f"{e}" for e in range(model.num_experts)],
            y=[f"{layer}" for layer in model.moe_layers],
            colorscale="Cividis",
            zmin=0,
            zmax=float(relative_LE.max()),
            colorbar={"title": "of even share"},
            hovertemplate="layer %{y}, expert %{x}: %{z:.2f} of an even share<extra></extra>",
        )
    )
    figure.update_xaxes(title="expert", type="category")
    figure.update_yaxes(title="layer", type="category", autorange="reversed")
    layer, expert = np.unravel_index(relative_LE.argmax(), relative_LE.shape)
    headline = (
        f"Load entropy is {load.entropy_share.mean():.1%} of its maximum on average; the busiest expert "
        f"(layer {model.moe_layers[layer]}, expert {expert}) gets {relative_LE.max():.1f} times an even share."
    )
    return Section("Expert load", headline, "1 is an even share of the layer's selections.", _html(figure))


def _transitions(statistics: Statistics) -> Section:
    model, first = statistics.trace.metadata.model, statistics.transitions[0]
    matrices: list[tuple[str, Any]] = []
    numbers = 0
    for hop in statistics.transitions:
        starts = range(len(model.moe_layers) - hop.hop)
        numbers += len(starts) * model.num_experts**2
        if hop.hop > 1 and numbers > MAX_MATRIX_NUMBERS:
            break
        for n in starts:
            title = f"{model.moe_layers[n]} → {model.moe_layers[n + hop.hop]}"
            matrices.append((title, np.round(statistics.probabilities[hop.hop - 1, n], 3)))
    highest = max(float(matrix.max()) for _, matrix in matrices)
    figure = go.Figure(
        go.Heatmap(
            z=matrices[0][1],
            colorscale="Cividis",
            zmin=0,
            zmax=highest,
            colorbar={"title": "P"},
            hovertemplate="from expert %{y} to expert %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="expert at the later layer", dtick=max(1, model.num_experts // 16))
    figure.update_yaxes(title="expert at the earlier layer", autorange="reversed", dtick=max(1, model.num_experts // 16))
    steps = [{"label": title, "method": "restyle", "args": [{"z": [matrix.tolist()]}]} for title, matrix in matrices]
    figure.update_layout(sliders=[{"steps": steps, "currentvalue": {"prefix": "layers "}, "pad": {"t": 50}}], height=560)
    information, control = first.information_bits, first.information_shuffled_bits
    strongest = int(information.argmax())
    headline = (
        f"Adjacent layers share {information.mean():.2f} bits on average (shuffled control {plain_zero(control.mean())}); "
        f"most between layers {model.moe_layers[strongest]} and {model.moe_layers[strongest + 1]}: "
        f"{information.max():.2f} bits."
    )
    explanation = (
        "P(expert at the later layer | expert at the earlier layer), over all pairs of selected experts of a token; every row "
        "sums to 1. Bits: mutual information of the strongest experts, bias-corrected. Move the slider to change the layers."
    )
    return Section("Cross-layer transitions", headline, explanation, _html(figure))


def _hops(statistics: Statistics) -> Section:
    hops, experts = statistics.transitions, statistics.trace.metadata.model.num_experts
    numbers = [hop.hop for hop in hops]
    lines = {
        "given the earlier layer's strongest": [float(hop.conditional_top1.mean()) for hop in hops],
        "popularity (most frequent of the layer)": [float(hop.marginal_top1.mean()) for hop in hops],
        "same expert index": [float(hop.same_expert.mean()) for hop in hops],
        "chance": [1 / experts for _ in hops],
    }
    figure = _lines(lines, numbers, "hop (layers ahead)", "share of tokens")
    figure.update_xaxes(dtick=1)
    conditional, marginal = next(iter(lines.values())), lines["popularity (most frequent of the layer)"]
    headline = (
        f"Knowing the strongest expert, the next layer's strongest is guessed right for {conditional[0]:.0%} of tokens, "
        f"without it for {marginal[0]:.0%}, by chance for {1 / experts:.0%}; "
        f"{hops[-1].hop} layers ahead it is {conditional[-1]:.0%}."
    )
    explanation = (
        "Mean over layers; the most frequent follower is counted and judged on the same tokens, so these describe the trace. "
        "Held-out prediction is what 'specmoe evaluate' reports."
    )
    return Section("How far ahead a layer tells", headline, explanation, _html(figure))


def _domains(statistics: Statistics) -> Section:
    layers = list(statistics.trace.metadata.model.moe_layers)
    figure = go.Figure()
    for number, domain in enumerate(statistics.domains):
        colour = COLOURS[number % len(COLOURS)]
        name = f"{domain.first} / {domain.second}"
        figure.add_scatter(x=layers, y=domain.distance, name=name, mode="lines+markers", line={"color": colour})
        figure.add_scatter(
            x=layers, y=domain.shuffled, name=f"{name}, shuffled", mode="lines", line={"color": colour, "dash": "dot"}
        )
    figure.update_xaxes(title="layer", dtick=max(1, len(layers) // 16))
    figure.update_yaxes(title="Jensen-Shannon distance", rangemode="tozero")
    _style(figure)
    far = max(statistics.domains, key=lambda domain: domain.distance.mean())
    headline = (
        f"{far.first} and {far.second} differ most: distance {far.distance.mean():.2f} on average over the layers, "
        f"{far.shuffled.mean():.2f} with labels shuffled over problems."
    )
    explanation = "Distance of the expert loads of two datasets: 0 equal, 1 disjoint. Dotted: the shuffled control."
    return Section("Domains", headline, explanation, _html(figure))


def _predictions(rows: list[dict[str, Any]]) -> Section:
    header = tuple(rows[0])
    table = (header, *(tuple(str(row[name]) for name in header) for row in rows))
    explanation = "Next-layer prediction on held-out problems. Definitions are in the evaluation's JSON file."
    best = max(rows, key=lambda row: float(str(row[header[1]]).split()[0]))
    headline = f"{best[header[0]]} predicts best: {header[1]} {best[header[1]]}."
    return Section("Predictors", headline, explanation, table=table)


def _lines(lines: dict[str, list[float]], x: list[int], x_title: str, y_title: str) -> go.Figure:
    figure = go.Figure()
    dashes = ("solid", "dash", "dashdot", "dot")
    for number, (name, values) in enumerate(lines.items()):
        line = {"color": COLOURS[number], "dash": dashes[number % len(dashes)]}
        figure.add_scatter(x=x, y=values, name=name, mode="lines+markers", line=line)
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title, rangemode="tozero")
    _style(figure)
    return figure


def _style(figure: go.Figure) -> None:
    figure.update_layout(legend={"orientation": "h", "y": -0.25})


def _html(figure: go.Figure) -> str:
    figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 20, "b": 60}, font={"size": 14})
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False}))
