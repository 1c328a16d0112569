"""The sections of one trace's page: each says its finding in one sentence made from the numbers, then shows them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.contexts import TASKS
from analysis.locality import DISTANCES, SEGMENT, repetition_chance
from analysis.predictions import Evaluation, table
from analysis.report.figures import (
    CHANCE,
    COLOURS,
    CONTROL,
    LABELS,
    TOP_LEGEND,
    Line,
    Section,
    heat_map,
    html,
    lines,
    packed,
    wrapped,
)
from analysis.statistics import ALL, Statistics, mean, show
from analysis.weights import QUANTILES

# Of the page's 8 MB Plotly takes 4.8; what the packed matrices may take is left out beyond that, longest hops first.
MAX_MATRIX_TEXT = 2_000_000
MAX_TOKENS = 10
MAX_SPECIALISTS = 15
MAX_PAIR_LINES = 3


def all_sections(statistics: Statistics, labels: Sequence[str], evaluations: Sequence[Evaluation]) -> list[Section]:
    """Those that the trace has something for."""
    sections = [_load(statistics, labels)]
    if statistics.hops:
        sections += [_transitions(statistics), _hops(statistics)]
    sections += [_repetition(statistics), _reuse(statistics)]
    if statistics.pairs is not None:
        sections.append(_pairs(statistics))
    if statistics.domains:
        sections.append(_domains(statistics))
    if statistics.clusters:
        sections.append(_clusters(statistics))
    if statistics.weights is not None:
        sections.append(_weights(statistics))
    if statistics.rulers:
        sections.append(_predictability(statistics))
    return sections + [_predictions(evaluation, number) for number, evaluation in enumerate(evaluations, start=1)]


def _load(s: Statistics, labels: Sequence[str]) -> Section:
    load, layers, experts = s.load, list(s.axes.moe_layers), s.axes.num_experts
    relative_LE = load.share_LE * experts
    figure = heat_map(
        relative_LE, range(experts), layers, "expert", "layer", "of even", "layer %{y}, expert %{x}: %{z:.2f} of an even share"
    )
    figure.update_layout(height=max(320, min(760, 120 + 16 * len(layers))))
    n, expert = (int(index) for index in np.unravel_index(relative_LE.argmax(), relative_LE.shape))
    headline = (
        f"Load entropy is {mean(load.entropy_share):.1%} of its maximum on average; the busiest expert "
        f"(layer {layers[n]}, expert {expert}) gets {relative_LE.max():.1f} times an even share."
    )
    explanation = "Share of a layer's selections that goes to each expert; 1 is an even share."
    evenness = lines(
        [
            Line("entropy / maximum", load.entropy_share),
            Line("Gini coefficient", load.gini),
            Line("experts used at all", load.coverage),
            Line("even load: entropy", np.ones(len(layers)), CHANCE),
        ],
        layers,
        "layer",
        "",
    )
    figures = [html(figure, "load-map", headline), html(evenness, "load-evenness", "Evenness of the load by layer.")]
    rows: list[tuple[str, ...]] = [("dataset", "phase", "tokens", "entropy / max", "busiest / mean", "Gini", "used")]
    for (dataset, phase), part in s.loads.items():
        numbers = (part.entropy_share, part.max_over_mean, part.gini, part.coverage)
        # A part with one phase is one row.
        if phase == ALL or sum(name == dataset for name, _ in s.loads) > 2:
            rows.append((dataset, phase, f"{part.tokens:,}", *(show(mean(values)) for values in numbers)))
    data: dict[str, Any] = {}
    if s.liked is not None:
        explanation += (
            " Point at an expert, or tap it, to see the tokens it likes: selected for them far more often than for any."
        )
        data = _token_cloud(s, labels, (n, expert))
    return Section("Expert load", headline, explanation, tuple(figures), (tuple(rows),), kind="load" if data else "", data=data)


def _token_cloud(s: Statistics, labels: Sequence[str], start: tuple[int, int]) -> dict[str, Any]:
    assert s.liked is not None
    used = sorted({int(place) for place in s.liked.place[..., :MAX_TOKENS].ravel() if place >= 0})
    place_of = {place: number for number, place in enumerate(used)}
    tokens = [
        [
            [
                [place_of[int(place)], float(f"{lift:.3g}")]
                for place, lift in zip(places[:MAX_TOKENS], lifts[:MAX_TOKENS], strict=True)
                if place >= 0
            ]
            for places, lifts in zip(places_EM, lifts_EM, strict=True)
        ]
        for places_EM, lifts_EM in zip(s.liked.place, s.liked.lift, strict=True)
    ]
    return {
        "layers": list(s.axes.moe_layers),
        "labels": [labels[place] for place in used],
        "tokens": tokens,
        "start": list(start),
    }


def _transitions(s: Statistics) -> Section:
    layers, experts, first = list(s.axes.moe_layers), s.axes.num_experts, s.hops[0]
    matrices: list[np.ndarray[Any, Any]] = []
    text, hops = "", 0
    for hop in s.hops:
        more = [*matrices, np.rint(255 * np.sqrt(s.probabilities[hop.hop - 1, : len(layers) - hop.hop])).astype(np.uint8)]
        longer = packed(np.concatenate(more))
        if hops and len(longer) > MAX_MATRIX_TEXT:
            break
        matrices, text, hops = more, longer, hop.hop
    figure = heat_map(
        s.probabilities[0, 0],
        range(experts),
        range(experts),
        "expert at the later layer",
        "expert at the earlier layer",
        "P",
        "from expert %{y} to expert %{x}: %{z:.3f}",
    )
    highest = float(np.quantile(s.probabilities[0, : len(layers) - 1], 0.999)) or 1.0
    figure.update_traces(zmax=highest)
    figure.update_layout(height=560)
    information, control = first.information_bits, first.information_shuffled_bits
    strongest = int(np.argmax(information))
    headline = (
        f"Adjacent layers share {information.mean():.2f} bits on average (shuffled control {show(control.mean())}); "
        f"most between layers {layers[strongest]} and {layers[strongest + 1]}: {information.max():.2f} bits."
    )
    explanation = (
        "P(expert at the later layer | expert at the earlier layer), over all pairs of selected experts of a token; every row "
        f"sums to 1, chance is {1 / experts:.3f} everywhere, equal rows would mean no link. Bits: mutual information of the "
        "strongest experts, bias-corrected. Move the sliders to change the layers; colours keep their meaning, and end at the "
        "99.9th percentile of one-hop probabilities."
    )
    if hops < len(s.hops):
        explanation += f" Hops beyond {hops} would make this page too large; they are in transitions.npz."
    rows: list[tuple[str, ...]] = [
        ("layers", "bits", "shuffled", "guess strongest", "held out", "popularity", "same expert index", "if independent")
    ]
    rows += [
        (
            f"{layers[n]} → {layers[n + 1]}",
            *(
                show(float(values[n]))
                for values in (
                    information,
                    control,
                    first.conditional_top1,
                    first.held_out_top1,
                    first.marginal_top1,
                    first.same_strongest,
                    first.independent_strongest,
                )
            ),
        )
        for n in range(len(layers) - 1)
    ]
    data = {
        "label": f"layer {layers[0]} → layer {layers[1]} (hop 1)",
        "layers": layers,
        "experts": experts,
        "hops": hops,
        "matrices": text,
    }
    figures = (html(figure, "transition-matrix", headline),)
    return Section("Cross-layer transitions", headline, explanation, figures, (tuple(rows),), "transitions", data)


def _hops(s: Statistics) -> Section:
    hops, experts, top_k = s.hops, s.axes.num_experts, s.axes.top_k
    numbers = [hop.hop for hop in hops]

    def curve(name: str) -> list[float]:
        return [mean(getattr(hop, name)) for hop in hops]

    def figure(kind: str, same: str, independent: str, chance: float, y_title: str) -> go.Figure:
        chosen = [
            Line("given an expert, judged on other problems", curve(f"held_out_{kind}")),
            Line("given an expert, judged on the same tokens", curve(f"conditional_{kind}")),
            Line("the same, layers shuffled", curve(f"shuffled_{kind}"), CONTROL),
            Line("popularity (the layer's most used)", curve(f"marginal_{kind}")),
            Line("same expert index", curve(same)),
            Line("the same, layers independent", curve(independent), CONTROL),
            Line("chance", [chance] * len(hops), CHANCE),
        ]
        drawn = lines(chosen, numbers, "hop (layers ahead)", y_title)
        drawn.update_xaxes(dtick=1)
        return drawn

    held_out, popular = curve("held_out_top1"), curve("marginal_top1")
    known = held_out if np.isfinite(held_out[0]) else curve("conditional_top1")
    headline = (
        f"Knowing the strongest expert, the next layer's strongest is guessed right for {known[0]:.0%} of tokens, "
        f"without it for {popular[0]:.0%}, by chance for {1 / experts:.0%}"
        + (f"; {numbers[-1]} layers ahead it is {known[-1]:.0%}." if len(hops) > 1 else ".")
    )
    explanation = (
        "Mean over layers. A guess is the most frequent follower; 'other problems' means that each half of the "
        "problems is judged "
        "by what the other half says. First figure: the strongest expert at both layers. Second: how many of the "
        f"{top_k} experts are among {top_k} guesses, from one of the {top_k} at the earlier layer. What a predictor with all "
        "earlier layers at hand makes of it, 'specmoe evaluate' says."
    )
    figures = [
        html(
            figure("top1", "same_strongest", "independent_strongest", 1 / experts, "strongest expert guessed"),
            "hops-strongest",
            headline,
        )
    ]
    if top_k > 1:
        drawn = figure("topk", "same_selected", "independent_selected", top_k / experts, f"recall@{top_k}")
        figures.append(html(drawn, "hops-selected", "The same for all selected experts."))
    return Section("How far ahead a layer tells", headline, explanation, tuple(figures))


def _repetition(s: Statistics) -> Section:
    whole, layers, top_k = s.repetitions[0], list(s.axes.moe_layers), s.axes.top_k
    chances = repetition_chance(s.axes.num_experts, top_k)
    chosen = []
    for name, values, control, chance in (
        ("same first choice", whole.first, whole.first_shuffled, chances[0]),
        ("first or second choice in common", whole.first_or_second, whole.first_or_second_shuffled, chances[1]),
        (f"share of the {top_k} in common", whole.shared, whole.shared_shuffled, chances[2]),
    )[: 1 if top_k == 1 else 3 if top_k > 2 else 2]:
        chosen.append(Line(name, [mean(row) for row in values]))
        chosen.append(Line(f"{name}, tokens shuffled", [mean(control)] * len(DISTANCES), CONTROL))
        chosen.append(Line(f"{name}, chance", [chance] * len(DISTANCES), CHANCE))
    by_distance = lines(chosen, DISTANCES, "distance (tokens)", "share of tokens", log_x=True)
    by_layer = lines(
        [
            Line("same first choice as the token before", whole.first[0]),
            Line("shuffled", whole.first_shuffled, CONTROL),
            Line("chance", [chances[0]] * len(layers), CHANCE),
        ],
        layers,
        "layer",
        "share of tokens",
    )
    n = int(np.nanargmax(whole.first[0])) if np.isfinite(whole.first[0]).any() else 0
    headline = (
        f"Consecutive tokens have the same first choice {mean(whole.first[0]):.1%} of the time, two tokens taken at random "
        f"{mean(whole.first_shuffled):.1%}, by chance {chances[0]:.1%}; most at layer {layers[n]} "
        f"({show(whole.first[0, n], 2)})."
    )
    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    names = [f"layer {layers[n]}" for n in shown]
    rows = [("dataset", *(f"first, {name}" for name in names), *(f"first or second, {name}" for name in names))]
    for each in s.repetitions:
        both = [values[0, n] for values in (each.first, each.first_or_second) for n in shown]
        rows.append((each.dataset, *(show(100 * float(value), 1) for value in both)))
    rows.append(
        ("shuffled", *(show(100 * v, 1) for v in [*whole.first_shuffled[shown], *whole.first_or_second_shuffled[shown]]))
    )
    rows.append(("chance", *[show(100 * chances[0], 1)] * len(shown), *[show(100 * chances[1], 1)] * len(shown)))
    tables = [tuple(rows)]
    explanation = (
        "Tokens of one problem, in one layer. Shuffled: two tokens drawn from the whole trace. The table has the form "
        "of Table 5 "
        "of the Mixtral paper, in percent."
    )
    if s.table_5:
        agree = sum(row.within for row in s.table_5)
        explanation += f" Beside the paper's own range over its domains, {agree} of {len(s.table_5)} rows lie within."
        golden = [("dataset, layer", "first", "paper", "first or second", "paper", "within")]
        golden += [
            (
                f"{row.dataset}, {row.layer}",
                show(row.first, 1),
                f"{row.first_range[0]}-{row.first_range[1]}",
                show(row.first_or_second, 1),
                f"{row.first_or_second_range[0]}-{row.first_or_second_range[1]}",
                "yes" if row.within else "no",
            )
            for row in s.table_5
        ]
        tables.append(tuple(golden))
    figures = (html(by_distance, "repetition-distance", headline), html(by_layer, "repetition-layer", "Repetition by layer."))
    return Section("Repetition over tokens", headline, explanation, figures, tuple(tables))


def _reuse(s: Statistics) -> Section:
    reuse, experts = s.reuse, s.axes.num_experts
    edges = reuse.gap_edges
    names = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]
    gaps = go.Figure()
    for name, values, colour, pattern in (
        ("observed", reuse.gap_share, COLOURS[0], ""),
        ("tokens shuffled", reuse.gap_shuffled, "#999999", "/"),
    ):
        known = [round(mean(column), 5) for column in values.T]
        gaps.add_bar(x=names, y=known, name=name, marker={"color": colour, "pattern": {"shape": pattern}})
    gaps.update_xaxes(title="tokens since the expert was last used", type="category")
    gaps.update_yaxes(title="share of reuses")
    gaps.update_layout(legend=TOP_LEGEND, height=380, barmode="group")
    between = np.concatenate([[0.0], reuse.between_share.mean(0).cumsum()[:-1]])
    stack = lines(
        [
            Line("reuses with fewer other experts in between", between),
            Line("chance: one expert per token, all equally likely", np.arange(experts) / experts, CHANCE),
        ],
        list(range(experts)),
        "other experts used since",
        "share of reuses",
    )
    headline = (
        f"An expert that is used again was last used {show(mean(reuse.median_gap), 1)} tokens before (median, mean over layers)"
    )
    if reuse.segments:
        headline += (
            f"; {SEGMENT} tokens use {mean(reuse.working_set):.0%} of a layer's experts, {SEGMENT} tokens taken at random "
            f"{mean(reuse.working_set_shuffled):.0%}."
        )
    else:
        headline += "."
    explanation = (
        f"Within a problem and layer. {mean(reuse.cold_share):.1%} of uses are an expert's first in its problem (shuffled: "
        f"{mean(reuse.cold_shuffled):.1%}). Second figure: between two uses of an expert, how many others were used; "
        f"a cache that "
        "keeps the most recently used experts of a layer has what was used again with fewer others in between than it "
        "has room for."
    )
    if reuse.segments:
        explanation += (
            f" Two selections from adjacent segments of {SEGMENT} tokens are of the same expert "
            f"{mean(reuse.adjacent):.1%} of the "
            f"time, from anywhere in the trace {mean(reuse.adjacent_shuffled):.1%}: that is how far a segment's load lasts."
        )
    figures = (html(gaps, "reuse-gap", headline), html(stack, "reuse-between", "Other experts used between two uses."))
    return Section("Reuse of experts", headline, explanation, figures)


def _pairs(s: Statistics) -> Section:
    assert s.pairs is not None
    pairs, layers = s.pairs, list(s.axes.moe_layers)
    n = int(pairs.top_lift.argmax())
    first, second = (int(expert) for expert in sorted(pairs.top_pair[n]))
    headline = (
        f"Experts {first} and {second} of layer {layers[n]} are used together {pairs.top_lift[n]:.1f} times as often "
        f"as without "
        f"preferences; a layer's tokens use {mean(pairs.unique_sets):,.0f} different sets of {s.axes.top_k} on average, "
        f"of {pairs.possible_sets:,} possible; with equally likely sets it would be {pairs.even_sets:,.0f}."
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
        "Lift: how often two experts are selected for the same token, over how often if none preferred another; 1 is no "
        f"preference. The figure is of layer {layers[n]}; every layer's most lifted pair is in the table, all pairs are in "
        "tables/pairs.csv. Pairs that are expected fewer than 25 times are not called the most lifted."
    )
    rows = [("layer", "experts", "lift", "tokens", "different sets")]
    for number, layer in enumerate(layers):
        a, b = (int(expert) for expert in sorted(pairs.top_pair[number]))
        counted = f"{int(pairs.counts_LEE[number, a, b]):,}"
        rows.append(
            (str(layer), f"{a} and {b}", show(float(pairs.top_lift[number]), 2), counted, f"{pairs.unique_sets[number]:,.0f}")
        )
    return Section("Pairs within a token", headline, explanation, (html(figure, "pair-lift", headline),), (tuple(rows),))


def _domains(s: Statistics) -> Section:
    layers, names = list(s.axes.moe_layers), s.datasets
    ranked = sorted(s.domains, key=lambda pair: -(mean(pair.distance) - mean(pair.shuffled)))
    far = ranked[0]
    headline = (
        f"{far.first} and {far.second} differ most: distance {mean(far.distance):.2f} on average over the layers, "
        f"{mean(far.shuffled):.2f} with labels shuffled over problems."
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
        figures.append(html(square, "domain-map", "Distance of every two datasets above the shuffled control.", LABELS))
    chosen = []
    for pair in ranked[:MAX_PAIR_LINES]:
        chosen.append(Line(f"{pair.first} / {pair.second}", pair.distance))
        chosen.append(Line(f"{pair.first} / {pair.second}, shuffled", pair.shuffled, CONTROL))
    figures.append(html(lines(chosen, layers, "layer", "Jensen-Shannon distance"), "domain-layers", headline))
    explanation = (
        "Jensen-Shannon distance of the expert loads of two datasets: 0 equal, 1 disjoint; dotted: labels permuted "
        "over problems, "
        "which is what few and long problems alone cause."
    )
    tables = []
    if s.specialisations:
        best = max(s.specialisations, key=lambda each: each.found - each.shuffled)
        explanation += (
            f" Specialised experts: share in one dataset over share in all others, 95 % interval by bootstrap over problems. "
            f"{best.dataset} has most: {best.found} of {len(layers) * s.axes.num_experts} with an interval above 1, "
            f"{best.shuffled} with datasets shuffled (2.5 % would be {len(layers) * s.axes.num_experts / 40:.0f})."
        )
        figures.append(html(_specialists(s), "specialists", "Most specialised experts with intervals.", LABELS))
        counts = [("dataset", "problems", "specialised experts", "shuffled control")]
        counts += [(each.dataset, f"{each.problems:,}", str(each.found), str(each.shuffled)) for each in s.specialisations]
        tables.append(tuple(counts))
    return Section("Domains", headline, explanation, tuple(figures), tuple(tables))


def _specialists(s: Statistics) -> go.Figure:
    """Ratios with intervals of the surest experts of each dataset, datasets in turn."""
    per_dataset = max(1, MAX_SPECIALISTS // max(1, len(s.specialisations)))
    figure = go.Figure()
    for number, each in enumerate(s.specialisations):
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
            marker={"color": COLOURS[number % len(COLOURS)], "size": 9},
            showlegend=False,
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    figure.add_vline(x=1, line=CHANCE)
    figure.update_xaxes(title="share here over share elsewhere", type="log", dtick="D2")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(height=160 + 40 * per_dataset * len(s.specialisations))
    return figure


def _clusters(s: Statistics) -> Section:
    layers = list(s.axes.moe_layers)
    groups = sorted({(each.feature, each.method) for each in s.clusters})
    figures, sentences = [], []
    for feature in sorted({feature for feature, _ in groups}):
        chosen = []
        for method in [method for name, method in groups if name == feature]:
            found = [each for each in s.clusters if (each.feature, each.method) == (feature, method)]
            chosen.append(Line(method, [each.silhouette for each in found]))
            chosen.append(Line(f"{method}, shuffled", [each.shuffled for each in found], CONTROL))
        of = [each for each in s.clusters if each.feature == feature]
        beat = sum(each.silhouette > each.shuffled for each in of)
        sentences.append(
            f"by {feature} in {beat} of {len(of)} cases (mean silhouette {np.mean([each.silhouette for each in of]):.2f}, "
            f"shuffled {np.mean([each.shuffled for each in of]):.2f})"
        )
        drawn = lines(chosen, layers, "layer", f"silhouette, by {feature}")
        figures.append(html(drawn, f"clusters-{feature}", f"Silhouette of clusters by {feature}."))
    headline = f"Clusters of experts stand out from shuffled tables {'; '.join(sentences)}."
    explanation = (
        "Every layer's experts are clustered by which others they are used with, and by which experts of the layers before and "
        "after go with them, each beyond what loads give. Silhouette: 1 for far apart, 0 for no clusters; the number "
        "of clusters "
        "is the one with most, for the control too. Members are in tables/clusters.csv."
    )
    return Section("Clusters of experts", headline, explanation, tuple(figures))


def _weights(s: Statistics) -> Section:
    assert s.weights is not None
    layers, weights = list(s.axes.moe_layers), s.weights
    chosen = [Line(f"rank {rank + 1}", weights.mean[:, rank]) for rank in range(s.axes.top_k)]
    chosen.append(Line("even: 1/K", [weights.even] * len(layers), CHANCE))
    figures = [html(lines(chosen, layers, "layer", "mean routing weight"), "weights", "Mean weight by rank and layer.")]
    headline = (
        f"The strongest expert gets a weight of {weights.mean[:, 0].mean():.2f} on average, the last of {s.axes.top_k} "
        f"{weights.mean[:, -1].mean():.2f}."
    )
    explanation = "Weights as the model applies them. "
    middle = len(layers) // 2
    rows = [(f"layer {layers[middle]}", "mean", *(f"{quantile:.0%}" for quantile in QUANTILES))]
    rows += [
        (
            f"rank {rank + 1}",
            show(float(weights.mean[middle, rank])),
            *(show(float(v)) for v in weights.quantiles[middle, rank]),
        )
        for rank in range(s.axes.top_k)
    ]
    if s.margins is not None:
        close = mean(s.margins.close)
        headline += f" For {close:.0%} of tokens the next expert's logit is within 0.1 of the last chosen one's."
        median = QUANTILES.index(0.5)
        drawn = lines(
            [
                Line(f"{QUANTILES[q]:.0%} of tokens are below", s.margins.quantiles[:, q])
                for q in (0, median, len(QUANTILES) - 1)
            ],
            layers,
            "layer",
            "margin (logits)",
        )
        figures.append(html(drawn, "margins", "Margin between rank K and K+1."))
        explanation += "Margin: the K-th largest router logit minus the next."
    else:
        explanation += "No router logits were recorded, so the margin to the next expert is unknown (--capture-logits)."
    return Section("Routing weights", headline, explanation, tuple(figures), (tuple(rows),))


def _predictability(s: Statistics) -> Section:
    top_k = s.axes.top_k
    by_name = {each.context: each for each in s.rulers}
    names = list(by_name)
    low = [by_name[name].recall_held_out for name in names]
    high = [by_name[name].recall_plug_in for name in names]
    figure = go.Figure()
    for values, name, symbol, colour in (
        (low, "on other problems (too bad)", "circle", COLOURS[0]),
        (high, "on the same tokens (too good)", "line-ns-open", COLOURS[1]),
    ):
        figure.add_scatter(
            x=[round(value, 4) if np.isfinite(value) else None for value in values],
            y=[wrapped(name) for name in names],
            name=name,
            mode="markers",
            marker={"symbol": symbol, "size": 13, "color": colour, "line": {"width": 3, "color": colour}},
        )
    figure.add_vline(x=top_k / s.axes.num_experts, line=CHANCE)
    figure.update_xaxes(title=f"recall@{top_k}", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(legend=TOP_LEGEND, height=220 + 44 * len(names))
    rows = [("known", f"recall@{top_k}", "strongest", "bits of the strongest", "bits of the set, at most", "tasks")]
    rows += [
        (
            each.context,
            _between(each.recall_held_out, each.recall_plug_in),
            _between(each.top1_held_out, each.top1_plug_in),
            _between(each.first_bits_plug_in, each.first_bits_held_out, 2),
            _between(each.set_bits_plug_in, each.set_bits_held_out, 2),
            ", ".join(task for task, known in TASKS.items() if each.context in known),
        )
        for each in s.rulers
    ]
    sentences = []
    for task, known in TASKS.items():
        usable = [by_name[name] for name in known if name in by_name and np.isfinite(by_name[name].recall_held_out)]
        if usable:
            best = max(usable, key=lambda each: each.recall_held_out)
            sentences.append(f"{task} {best.recall_held_out:.2f} ({best.context})")
    headline = (
        f"The best single context, judged on problems it was not counted on, gives recall@{top_k}: {'; '.join(sentences)}; "
        f"chance is {top_k / s.axes.num_experts:.2f}."
        if sentences
        else "There are too few problems to judge one half by the other."
    )
    explanation = (
        "A ruler for predictors: what counting alone makes of one thing that a task knows. Judged on the same tokens it is too "
        "good, on the other half of the problems too bad; the truth about that context lies between. A predictor that combines "
        "more than one context can exceed all of them; one that falls short of its task's best is not worth its "
        "parameters. Bits: "
        "entropy given the context. Means over the layers that have every context."
    )
    return Section("Predictability", headline, explanation, (html(figure, "predictability", headline, LABELS),), (tuple(rows),))


def _between(low: float, high: float, digits: int = 3) -> str:
    return f"{show(low, digits)} to {show(high, digits)}"


def _predictions(evaluation: Evaluation, number: int) -> Section:
    rows = table(evaluation)
    header = tuple(rows[0])
    cells = (header, *(tuple(row[name] for name in header) for row in rows))
    metric = header[1]
    honest = {name: result for name, result in evaluation.results.items() if not name.endswith("shuffled control")}
    best = max(honest, key=lambda name: honest[name].metrics["h=1"][metric])
    headline = (
        f"{best} predicts best: {metric} {honest[best].metrics['h=1'][metric]:.3f}, chance {evaluation.chance[metric]:.3f}."
    )
    chosen = []
    for name, result in evaluation.results.items():
        by_layer = [
            float("nan") if metrics is None else metrics.get(metric, float("nan"))
            for metrics in result.by_target_layer.get("h=1", [])
        ]
        chosen.append(Line(name, by_layer, CONTROL if name not in honest else None))
    figures: tuple[str, ...] = ()
    if chosen and len(chosen[0].y) > 1:
        chosen.append(Line("chance", [evaluation.chance[metric]] * len(chosen[0].y), CHANCE))
        drawn = lines(chosen, list(range(len(chosen[0].y))), "predicted MoE layer (from 0)", metric)
        figures = (html(drawn, f"predictors-{number}", headline),)
    explanation = (
        f"Run {evaluation.run}, task {evaluation.task}, judged on {evaluation.problems} problems "
        f"({evaluation.tokens:,} tokens), "
        f"{evaluation.part} part of a split {evaluation.split}, of {evaluation.trace}. In brackets: 95 % interval "
        f"over problems."
    )
    return Section("Predictors", headline, explanation, figures, (cells,))
