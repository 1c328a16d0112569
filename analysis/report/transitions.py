"""The sections on what one layer tells of later ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.report.figures import (
    CHANCE,
    CONTROL,
    Line,
    Section,
    heat_map,
    html,
    lines,
    packed,
)
from analysis.statistics.compute import Statistics, mean, show

# Of the page's 8 MB Plotly takes 4.8; what the packed matrices may take is left out beyond that, longest hops first.
MAX_MATRIX_TEXT = 2_000_000
# The first hop may take more; beyond this (48 layers of some 200 experts) there are no sliders.
MAX_FIRST_HOP_TEXT = 2_500_000


def transitions_section(s: Statistics) -> Section:
    """The matrices behind two sliders, and what adjacent layers share. Only for traces with hops."""
    layers, experts, first = list(s.axes.moe_layers), s.axes.num_experts, s.hops[0]
    matrices: list[np.ndarray[Any, Any]] = []
    text, hops = "", 0
    for hop in s.hops:
        more = [*matrices, np.rint(255 * np.sqrt(s.probabilities[hop.hop - 1, : len(layers) - hop.hop])).astype(np.uint8)]
        longer = packed(np.concatenate(more))
        if len(longer) > (MAX_MATRIX_TEXT if hops else MAX_FIRST_HOP_TEXT):
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
        "strongest experts, bias-corrected. Move the sliders to change the layers; colors keep their meaning, and end at the "
        "99.9th percentile of one-hop probabilities."
    )
    if hops == 0:
        explanation = explanation.replace("Move the sliders to change the layers; c", "C")
        explanation += f" The figure is of layers {layers[0]} and {layers[1]}; all others are in transitions.npz."
    elif hops < len(s.hops):
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
    return Section(
        "Cross-layer transitions", headline, explanation, figures, (tuple(rows),), "transitions" if hops else "", data
    )


def hops_section(s: Statistics) -> Section:
    """How guesses fade with the distance of layers, beside popularity, chance and the controls."""
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
    if np.isfinite(held_out[0]):
        headline = (
            f"Knowing the strongest expert, the next layer's strongest is guessed right for {held_out[0]:.0%} of tokens, "
            f"without it for {popular[0]:.0%}, by chance for {1 / experts:.0%}"
            + (f"; {numbers[-1]} layers ahead it is {held_out[-1]:.0%}." if len(hops) > 1 else ".")
        )
    else:
        headline = "There are too few problems to judge one half by the other: what follows is judged on its own tokens."
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
