"""The section on expert load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.counts.survey import ALL
from analysis.report.figures import (
    BAND,
    CHANCE,
    Curve,
    Section,
    drawing,
    lines,
    load_map,
)
from analysis.statistics.compute import Statistics, mean, show

MAX_TOKENS = 10
# Tokens over all experts, about a megabyte of the page.
MAX_ENTRIES = 80_000


def load_section(s: Statistics, labels: Sequence[str]) -> Section:
    """Heat map of the load with each expert's preferred tokens, evenness by layer, and a table by dataset and phase."""
    load, layers, experts = s.load, list(s.axes.moe_layers), s.axes.num_experts
    relative_LE = load.share_LE * experts
    figure = load_map(relative_LE, layers, "expert", "layer %{y}, expert %{x}: %{z:.2f} x an even share")
    figure.update_layout(height=max(260, min(640, 110 + 13 * len(layers))))
    n, expert = (int(index) for index in np.unravel_index(relative_LE.argmax(), relative_LE.shape))
    headline = (
        f"Load entropy is {mean(load.entropy_share):.1%} of its maximum on average; the busiest expert "
        f"(layer {layers[n]}, expert {expert}) receives {relative_LE.max():.1f} times an even share."
    )
    explanation = (
        "Load: each expert's share of its layer's selections. Entropy is divided by that of an even load. Gini coefficient: 0 "
        "if all experts have equal loads, near 1 if few experts have all."
    )
    evenness = lines(
        [
            # Often 1, as the entropy nearly is.
            Curve("share of experts used at all", load.coverage, BAND),
            Curve("entropy / maximum", load.entropy_share),
            Curve("Gini coefficient", load.gini),
            Curve("entropy of an even load", np.ones(len(layers)), CHANCE),
        ],
        layers,
        "layer",
        "share, from 0 to 1",
    )
    read = (
        "orange: experts that their layer selects more often than an even share, which is 1; blue: less often; 0 is an expert "
        "that is never selected."
    )
    if s.preferred is not None:
        read += (
            " Point at an expert, or tap it, to see its preferred tokens: those that select it more often than tokens do on "
            "average."
        )
    figures = [
        drawing(figure, "load-map", headline, read=read),
        drawing(
            evenness,
            "load-evenness",
            "Evenness of the load by layer.",
            read="with an even load, entropy is 1 and the Gini coefficient 0; a layer where entropy falls has favorites.",
        ),
    ]
    rows: list[tuple[str, ...]] = [("dataset", "phase", "tokens", "entropy / max", "busiest / mean", "Gini", "experts used")]
    for (dataset, phase), part in s.loads.items():
        numbers = (part.entropy_share, part.max_over_mean, part.gini, part.coverage)
        # A dataset with a single phase would have two equal rows.
        if phase == ALL or sum(name == dataset for name, _ in s.loads) > 2:
            rows.append((dataset, phase, f"{part.tokens:,}", *(show(mean(values)) for values in numbers)))
    data: dict[str, Any] = {}
    if s.preferred is not None:
        data = _token_cloud(s, labels, (n, expert))
    return Section("Expert load", headline, explanation, tuple(figures), (tuple(rows),), kind="load" if data else "", data=data)


def _token_cloud(s: Statistics, labels: Sequence[str], start: tuple[int, int]) -> dict[str, Any]:
    assert s.preferred is not None
    most = min(MAX_TOKENS, MAX_ENTRIES // (s.axes.layers * s.axes.num_experts))
    used = sorted({int(place) for place in s.preferred.place[..., :most].ravel() if place >= 0})
    place_of = {place: number for number, place in enumerate(used)}
    tokens = [
        [
            [
                [place_of[int(place)], float(f"{lift:.3g}")]
                for place, lift in zip(places[:most], lifts[:most], strict=True)
                if place >= 0
            ]
            for places, lifts in zip(places_EM, lifts_EM, strict=True)
        ]
        for places_EM, lifts_EM in zip(s.preferred.place, s.preferred.lift, strict=True)
    ]
    return {
        "layers": list(s.axes.moe_layers),
        "labels": [labels[place] for place in used],
        "tokens": tokens,
        "start": list(start),
    }
