"""The sections on groups: pairs of experts, domains, and clusters of experts."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from analysis.report.figures import (
    CHANCE,
    COLORS,
    CONTROL,
    LABELS,
    Curve,
    Section,
    drawing,
    heat_map,
    lines,
    wrapped,
)
from analysis.statistics.clusters import CONTROLS
from analysis.statistics.compute import Statistics, mean, show

MAX_SPECIALISTS = 15
MAX_PAIR_LINES = 2


def pairs_section(s: Statistics) -> Section:
    """Lifts of the layer with the highest one, and the pair with the highest lift of every layer. Only for K > 1."""
    assert s.pairs is not None
    pairs, layers = s.pairs, list(s.axes.moe_layers)
    n = int(pairs.top_lift.argmax())
    first, second = (int(expert) for expert in sorted(pairs.top_pair[n]))
    if pairs.top_lift[n] > 0:
        headline = (
            f"Experts {first} and {second} of layer {layers[n]} are used together {pairs.top_lift[n]:.1f} times as often as "
            f"without preferences (the highest lift by chance: {pairs.shuffled_top_lift.max():.1f}); "
        )
    else:
        headline = "There are too few tokens to identify preferred pairs; "
    headline += (
        f"on average a layer uses {mean(pairs.unique_sets):,.0f} of {pairs.possible_sets:,} possible sets of {s.axes.top_k} "
        f"experts ({pairs.even_sets:,.0f} if all sets were equally likely)."
    )
    figure = heat_map(
        pairs.lift_LEE[n],
        range(s.axes.num_experts),
        range(s.axes.num_experts),
        "expert",
        "expert",
        "lift",
        "experts %{y} and %{x}: %{z:.2f} times as often as without preferences",
    )
    upper = np.triu(pairs.lift_LEE[n], 1)
    figure.update_traces(zmax=max(2.0, float(np.quantile(upper[upper > 0], 0.99)) if (upper > 0).any() else 2.0))
    figure.update_layout(height=520)
    explanation = (
        "Lift: how often two experts are selected for the same token, divided by how often they would be if no expert "
        "preferred "
        f"another; 1 means no preference. The figure shows layer {layers[n]}. The table lists each layer's pair with the "
        "highest lift; tables/pairs.csv has the 20 most frequent pairs and the 20 with the highest lift of each layer. Pairs "
        "expected fewer than 25 times are left out of the table and the headline, as their lift is noisy."
    )
    rows = [("layer", "experts", "lift", "highest by chance", "tokens", "distinct sets")]
    for number, layer in enumerate(layers):
        a, b = (int(expert) for expert in sorted(pairs.top_pair[number]))
        enough = bool(pairs.top_lift[number] > 0)
        rows.append(
            (
                str(layer),
                f"{a} and {b}" if enough else "-",
                show(float(pairs.top_lift[number]), 2) if enough else "-",
                show(float(pairs.shuffled_top_lift[number]), 2) if enough else "-",
                f"{int(pairs.counts_LEE[number, a, b]):,}" if enough else "-",
                f"{pairs.unique_sets[number]:,.0f}",
            )
        )
    read = "bright cells are pairs of experts that are selected for the same tokens more often than without preferences (1)."
    figures = (drawing(figure, "pair-lift", headline, read=read),)
    return Section("Pairs within a token", headline, explanation, figures, (tuple(rows),))


def domains_section(s: Statistics) -> Section:
    """Distances between datasets, and the experts that each prefers. Only for traces with several datasets."""
    layers, names = list(s.axes.moe_layers), s.datasets
    ranked = sorted(s.domains, key=lambda pair: -(mean(pair.distance) - mean(pair.shuffled)))
    far = ranked[0]
    found = (
        f"distance {mean(far.distance):.2f} averaged over layers, {mean(far.shuffled):.2f} with labels shuffled over problems."
    )
    if mean(far.distance) > mean(far.shuffled_high):
        headline = f"{far.first} and {far.second} differ most: {found}"
    else:
        headline = (
            "No two domains differ more than their problems alone explain; the largest difference is between "
            f"{far.first} and {far.second}: {found}"
        )
    figures = []
    if len(names) > 2:
        numbers = list(range(1, len(names) + 1))
        numbered = [wrapped(f"{number} {name}") for number, name in zip(numbers, names, strict=True)]
        above = np.full((len(names), len(names)), np.nan)
        for pair in s.domains:
            a, b = names.index(pair.first), names.index(pair.second)
            above[a, b] = above[b, a] = mean(pair.distance) - mean(pair.shuffled)
        square = heat_map(above, numbers, numbered, "", "", "JSD", "%{y} and %{x}: %{z:.3f} above the control")
        square.update_xaxes(nticks=len(names))
        square.update_yaxes(nticks=len(names))
        square.update_layout(height=120 + 40 * len(names))
        figures.append(
            drawing(
                square,
                "domain-map",
                "Distance between each pair of datasets, above the shuffled control.",
                LABELS,
                read="bright cells are datasets that use different experts; 0 is no more than their problems alone explain.",
            )
        )
    chosen = []
    for pair in ranked[:MAX_PAIR_LINES]:
        chosen.append(Curve(f"{pair.first} / {pair.second}", pair.distance))
        chosen.append(Curve(f"{pair.first} / {pair.second}, shuffled", pair.shuffled, CONTROL))
    figures.append(
        drawing(
            lines(chosen, layers, "layer", "Jensen-Shannon distance"),
            "domain-layers",
            headline,
            read="where a line is far above its dotted control, the layer's experts distinguish the two datasets.",
        )
    )
    explanation = (
        "Jensen-Shannon distance between the expert loads of two datasets: 0 means equal, 1 disjoint. Dotted: with labels "
        "permuted over problems, the distance that few or long problems alone cause."
    )
    tables = []
    if s.specializations:
        best = max(s.specializations, key=lambda each: each.found - each.shuffled)
        explanation += (
            " Specialized experts: share in one dataset divided by share in all others, with a 95 % interval by bootstrap over "
            f"problems. {best.dataset} has the most: {best.found} of {len(layers) * s.axes.num_experts} experts have an "
            "interval "
            f"above 1, compared with {best.shuffled} when dataset labels are shuffled (2.5 % of all would be "
            f"{len(layers) * s.axes.num_experts / 40:.0f})."
        )
        figures.append(
            drawing(
                _specialists(s),
                "specialists",
                "The most specialized experts with their intervals.",
                LABELS,
                read="how many times as often a dataset uses the expert as others do, with a 95 % interval; 1: no preference.",
            )
        )
        counts = [("dataset", "problems", "specialized experts", "shuffled control")]
        counts += [(each.dataset, f"{each.problems:,}", str(each.found), str(each.shuffled)) for each in s.specializations]
        tables.append(tuple(counts))
    return Section("Domains", headline, explanation, tuple(figures), tuple(tables))


def _specialists(s: Statistics) -> go.Figure:
    """Ratios, with intervals, of the experts with the highest lower limit, dataset by dataset."""
    per_dataset = max(1, MAX_SPECIALISTS // max(1, len(s.specializations)))
    figure = go.Figure()
    for number, each in enumerate(s.specializations):
        chosen = each.specialists[:per_dataset]
        if not chosen:
            continue
        figure.add_scatter(
            x=[one.ratio for one in chosen],
            y=[wrapped(f"{each.dataset}: layer {s.axes.moe_layers[one.layer]}, expert {one.expert}") for one in chosen],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [one.high - one.ratio for one in chosen],
                "arrayminus": [one.ratio - one.low for one in chosen],
            },
            mode="markers",
            marker={"color": COLORS[number % len(COLORS)], "size": 9},
            showlegend=False,
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    figure.add_vline(x=1, line=CHANCE)
    figure.update_xaxes(title="share in the dataset / share in others", type="log", dtick="D2")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(height=160 + 40 * per_dataset * len(s.specializations))
    return figure


def clusters_section(s: Statistics) -> Section:
    """Silhouettes by layer, compared with their controls."""
    layers = list(s.axes.moe_layers)
    groups = sorted({(each.feature, each.method) for each in s.clusters})
    figures, sentences = [], []
    for feature in sorted({feature for feature, _ in groups}):
        chosen = []
        for method in [method for name, method in groups if name == feature]:
            found = [each for each in s.clusters if (each.feature, each.method) == (feature, method)]
            chosen.append(Curve(method, [each.silhouette for each in found]))
            chosen.append(Curve(f"{method}, shuffled", [each.shuffled for each in found], CONTROL))
        of = [each for each in s.clusters if each.feature == feature]
        beat = sum(each.silhouette > each.shuffled for each in of)
        sentences.append(
            f"by {feature} in {beat} of {len(of)} cases (mean silhouette {np.mean([each.silhouette for each in of]):.2f}, "
            f"shuffled control {np.mean([each.shuffled for each in of]):.2f})"
        )
        drawn = lines(chosen, layers, "layer", f"silhouette, by {feature}")
        figures.append(
            drawing(
                drawn,
                f"clusters-{feature}",
                f"Silhouette of clusters by {feature}.",
                read="where a line is above its dotted control, the layer's experts form groups beyond what chance would find.",
            )
        )
    headline = f"Clusters of experts have a larger silhouette than each of {CONTROLS} shuffled tables {'; '.join(sentences)}."
    explanation = (
        "The experts of each layer are clustered by the experts that they are used together with, and by the experts of the "
        "previous and next layer that they are used with, both beyond what their loads explain. Silhouette: 1 for "
        "well-separated "
        "clusters, 0 for none. The number of clusters is the one with the largest silhouette, also for the controls. Without "
        f"structure, clusters would exceed all controls in {1 / (CONTROLS + 1):.0%} of cases. Cluster members are in "
        "tables/clusters.csv."
    )
    return Section("Clusters of experts", headline, explanation, tuple(figures))
