"""The sections on temporal locality within a problem: repetition and reuse."""

from __future__ import annotations

import itertools

import numpy as np
import plotly.graph_objects as go

from analysis.counts.locality import DISTANCES, SEGMENT
from analysis.report.figures import (
    CHANCE,
    COLORS,
    CONTROL,
    TOP_LEGEND,
    Curve,
    Section,
    drawing,
    lines,
)
from analysis.statistics.compute import Statistics, mean, show
from analysis.statistics.locality import repetition_chance


def repetition_section(s: Statistics) -> Section:
    """Repetition by distance and by layer, and a table in the form of Mixtral's Table 5."""
    whole, layers, top_k = s.repetitions[0], list(s.axes.moe_layers), s.axes.top_k
    chances = repetition_chance(s.axes.num_experts, top_k)
    chosen = []
    kinds = (
        ("same first choice", whole.first, whole.first_shuffled, chances[0]),
        ("first or second choice in common", whole.first_or_second, whole.first_or_second_shuffled, chances[1]),
        (f"share of the {top_k} experts in common", whole.shared, whole.shared_shuffled, chances[2]),
    )
    first_kind, last_kind = (0, 1 if top_k == 1 else 3 if top_k > 2 else 2) if s.axes.knows_strongest else (2, 3)
    for name, values, control, chance in kinds[first_kind:last_kind]:
        chosen.append(Curve(name, [mean(row) for row in values]))
        chosen.append(Curve(f"{name}, tokens shuffled", [mean(control)] * len(DISTANCES), CONTROL))
        chosen.append(Curve(f"{name}, chance", [chance] * len(DISTANCES), CHANCE))
    by_distance = lines(chosen, DISTANCES, "distance (tokens)", "share of tokens", log_x=True)
    name, values, control, chance = kinds[first_kind]
    by_layer = lines(
        [
            Curve(f"{name}, with the previous token", values[0]),
            Curve("shuffled", control, CONTROL),
            Curve("chance", [chance] * len(layers), CHANCE),
        ],
        layers,
        "layer",
        "share of tokens",
    )
    if np.isfinite(values[0]).any():
        n = int(np.nanargmax(values[0]))
        what = (
            f"Consecutive tokens have the same first choice {mean(values[0]):.1%} of the time"
            if s.axes.knows_strongest
            else f"Consecutive tokens have {mean(values[0]):.1%} of their {top_k} experts in common"
        )
        headline = (
            f"{what} (two random tokens: {mean(control):.1%}, chance: {chance:.1%}), most at layer {layers[n]} "
            f"({values[0, n]:.0%})."
        )
    else:
        headline = "No problem has two consecutive recorded tokens, so repetition cannot be measured."
    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    names = [f"layer {layers[n]}" for n in shown]
    columns = {"first": ("first", chances[0]), "first or second": ("first_or_second", chances[1])}
    if not s.axes.knows_strongest:
        columns = {"in common": ("shared", chances[2])}
    rows = [("dataset", *(f"{column}, {name}" for column in columns for name in names))]
    for each in s.repetitions:
        cells = [getattr(each, field)[0, n] for field, _ in columns.values() for n in shown]
        rows.append((each.dataset, *(show(100 * float(value), 1) for value in cells)))
    cells = [getattr(whole, f"{field}_shuffled")[n] for field, _ in columns.values() for n in shown]
    rows.append(("shuffled", *(show(100 * float(value), 1) for value in cells)))
    rows.append(("chance", *(show(100 * value, 1) for _, value in columns.values() for _ in shown)))
    tables = [tuple(rows)]
    explanation = (
        "Pairs of tokens of the same problem, in the same layer. Shuffled: two tokens drawn at random from the whole trace. "
    )
    explanation += (
        "The table follows Table 5 of the Mixtral paper, in percent of consecutive tokens."
        if s.axes.knows_strongest
        else "The table is in percent, of consecutive tokens."
    )
    if s.table_5:
        agree = sum(row.within for row in s.table_5)
        explanation += (
            f" In {agree} of {len(s.table_5)} rows both values lie within the paper's range over its domains, widened by a "
            "tenth "
            "of its width on either side."
        )
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
    figures = (
        drawing(
            by_distance,
            "repetition-distance",
            headline,
            read="how often a token and one so many positions before it choose alike; the dotted line is two random tokens.",
        ),
        drawing(
            by_layer,
            "repetition-layer",
            "Repetition by layer.",
            read="layers far above the dotted control keep their experts from one token to the next.",
        ),
    )
    return Section("Repetition over tokens", headline, explanation, figures, tuple(tables))


def reuse_section(s: Statistics) -> Section:
    """The number of tokens, and of other experts, between two uses of an expert."""
    reuse, experts = s.reuse, s.axes.num_experts
    edges = reuse.gap_edges
    names = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]
    gaps = go.Figure()
    for name, values, color, pattern in (
        ("observed", reuse.gap_share, COLORS[0], ""),
        ("tokens shuffled", reuse.gap_shuffled, "#999999", "/"),
    ):
        known = [round(mean(column), 5) for column in values.T]
        gaps.add_bar(x=names, y=known, name=name, marker={"color": color, "pattern": {"shape": pattern}})
    gaps.update_xaxes(title="tokens since the expert was last used", type="category")
    gaps.update_yaxes(title="share of reuses")
    gaps.update_layout(legend=TOP_LEGEND, height=380, barmode="group")
    between = np.concatenate([[0.0], reuse.between_share.mean(0).cumsum()[:-1]])
    stack = lines(
        [
            Curve("reuses with fewer other experts in between", between),
            Curve("chance: one expert per token, all equally likely", np.arange(experts) / experts, CHANCE),
        ],
        list(range(experts)),
        "number of other experts",
        "share of reuses",
    )
    if np.isfinite(reuse.median_gap).any():
        headline = f"A reused expert was last used {mean(reuse.median_gap):.1f} tokens earlier (median, averaged over layers)"
    else:
        headline = "No expert is used twice in a problem"
    if reuse.segments:
        headline += (
            f"; {SEGMENT} consecutive tokens use {mean(reuse.working_set):.0%} of a layer's experts ({SEGMENT} random tokens: "
            f"{mean(reuse.working_set_shuffled):.0%})."
        )
    else:
        headline += "."
    explanation = (
        f"Reuse is counted within a problem and layer. {mean(reuse.cold_share):.1%} of uses are an expert's first in its "
        "problem "
        f"(shuffled: {mean(reuse.cold_shuffled):.1%}). Second figure: the share of reuses with fewer than the given number of "
        "other experts used in between. This is the hit rate, among reuses, of an LRU cache per layer with room for that many "
        "experts."
    )
    if reuse.segments:
        explanation += (
            f" Two selections from adjacent segments of {SEGMENT} tokens are of the same expert {mean(reuse.adjacent):.1%} of "
            "the "
            f"time, two selections from anywhere in the trace {mean(reuse.adjacent_shuffled):.1%}: this measures how much of a "
            "segment's load carries over to the next."
        )
    figures = (
        drawing(
            gaps,
            "reuse-gap",
            headline,
            read="bars on the left are experts that are used again soon; where blue exceeds gray, tokens reuse experts sooner "
            "than shuffled tokens would.",
        ),
        drawing(
            stack,
            "reuse-between",
            "Other experts used between two uses.",
            read="the hit rate, among reuses, of an LRU cache for each layer with room for so many experts.",
        ),
    )
    return Section("Reuse of experts", headline, explanation, figures)
