"""The sections on predicting the experts of later layers from one layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.report.figures import (
    CHANCE,
    CONTROL,
    Curve,
    Section,
    drawing,
    heat_map,
    lines,
    packed,
)
from analysis.statistics.compute import Statistics, mean, show

# Plotly takes 4.8 of the 10 MB that a page may have. Beyond this size of the packed matrices, the longest hops are left out.
MAX_MATRIX_TEXT = 2_000_000
# The first hop alone may take more; beyond this (48 layers of some 200 experts) the page has no sliders.
MAX_FIRST_HOP_TEXT = 2_500_000
READ_HOPS = (
    "the farther the first line is above popularity, the more an expert says about a layer so many MoE layers later; the "
    "dotted control knows the loads only."
)


def transitions_section(s: Statistics) -> Section:
    """The transition matrices with two sliders, and the mutual information of adjacent layers. Only for traces with hops."""
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
    if s.axes.knows_strongest:
        information, control = first.information_bits, first.information_shuffled_bits
        strongest = int(np.argmax(information))
        headline = (
            f"The strongest experts of adjacent layers share {information.mean():.2f} bits on average (shuffled "
            f"control: {show(control.mean())}), most between layers {layers[strongest]} and {layers[strongest + 1]}: "
            f"{information.max():.2f} bits."
        )
        columns = {
            "bits": first.information_bits,
            "shuffled": first.information_shuffled_bits,
            "top-1, same tokens": first.conditional_top1,
            "top-1, held out": first.held_out_top1,
            "popularity": first.marginal_top1,
            "same index": first.same_strongest,
            "if independent": first.independent_strongest,
        }
        measures = (
            "Bits: mutual information of the strongest experts, corrected for bias. Top-1: accuracy of predicting the next "
            "layer's strongest expert, on the same tokens and on held-out problems."
        )
    else:
        recall = f"recall@{s.axes.top_k}"
        headline = (
            f"From one expert of a layer, {mean(first.conditional_topk):.1%} of those of the next layer are predicted with "
            f"{s.axes.top_k} guesses on the same tokens (shuffled control: {mean(first.shuffled_topk):.1%}, popularity: "
            f"{mean(first.marginal_topk):.1%})."
        )
        columns = {
            f"{recall}, same tokens": first.conditional_topk,
            f"{recall}, held out": first.held_out_topk,
            "shuffled": first.shuffled_topk,
            "popularity": first.marginal_topk,
            "same index": first.same_selected,
            "if independent": first.independent_selected,
        }
        measures = f"{recall}: share of the next layer's experts predicted with {s.axes.top_k} guesses from one expert."
    sliders = "" if hops == 0 else "Move the sliders to change the layers; the color scale stays the same. "
    explanation = (
        "P(expert at the later layer | expert at the earlier layer), over all pairs of selected experts of a token. Every row "
        f"sums to 1; by chance every entry would be {1 / experts:.3f}. If all rows were equal, the layers would be "
        "independent. "
        f"{sliders}Colors end at the 99.9th percentile of one-hop probabilities. {measures}"
    )
    if hops == 0:
        explanation += f" The figure shows layers {layers[0]} and {layers[1]}; all other matrices are in transitions.npz."
    elif hops < len(s.hops):
        explanation += f" Hops beyond {hops} would make this page too large; they are in transitions.npz."
    rows: list[tuple[str, ...]] = [("layers", *columns)]
    rows += [
        (f"{layers[n]} → {layers[n + 1]}", *(show(float(values[n])) for values in columns.values()))
        for n in range(len(layers) - 1)
    ]
    data = {
        "layers": layers,
        "experts": experts,
        "hops": hops,
        "matrices": text,
    }
    read = (
        "a row is an expert of the earlier layer, and its bright cells are the experts that its tokens choose in the later "
        "layer; equal rows would mean that the layers are independent."
    )
    return Section(
        "Cross-layer transitions",
        headline,
        explanation,
        figures=(drawing(figure, "transition-matrix", headline, read=read),),
        tables=(tuple(rows),),
        kind="transitions" if hops else "",
        data=data,
        controls=_sliders(len(layers), hops) if hops else "",
    )


def _sliders(layers: int, hops: int) -> str:
    """The sliders that choose the layers of the shown matrix, and the label that names them."""
    sliders = "".join(
        f'<label for="{name}">{label}</label><input type="range" id="{name}" min="{low}" max="{high}" value="{low}">'
        for name, label, low, high in (("layer", "earlier layer", 0, layers - 2), ("hop", "hop (layers ahead)", 1, hops))
    )
    return f'<p><strong id="transition-label" aria-live="polite"></strong></p><div class="sliders">{sliders}</div>'


def hops_section(s: Statistics) -> Section:
    """How prediction degrades with the distance between layers, compared with popularity, chance and the controls."""
    hops, experts, top_k = s.hops, s.axes.num_experts, s.axes.top_k
    numbers = [hop.hop for hop in hops]

    def curve(name: str) -> list[float]:
        return [mean(getattr(hop, name)) for hop in hops]

    def figure(kind: str, same: str, independent: str, chance: float, y_title: str) -> go.Figure:
        chosen = [
            Curve("given an expert, held-out problems", curve(f"held_out_{kind}")),
            Curve("given an expert, layers shuffled", curve(f"shuffled_{kind}"), CONTROL),
            Curve("popularity (the layer's most used)", curve(f"marginal_{kind}")),
            Curve("chance", [chance] * len(hops), CHANCE),
            Curve("given an expert, same tokens", curve(f"conditional_{kind}")),
            Curve("same expert index", curve(same)),
            Curve("same expert index, layers independent", curve(independent), CONTROL),
        ]
        drawn = lines(chosen, numbers, "hop (layers ahead)", y_title)
        drawn.update_xaxes(dtick=1)
        return drawn

    kind = "top1" if s.axes.knows_strongest else "topk"
    held_out, popular = curve(f"held_out_{kind}"), curve(f"marginal_{kind}")
    if np.isfinite(held_out[0]):
        what = (
            f"Given a layer's strongest expert, the next layer's strongest is predicted correctly for {held_out[0]:.0%} of "
            f"tokens (popularity alone: {popular[0]:.0%}, chance: {1 / experts:.0%})"
            if s.axes.knows_strongest
            else f"Given one expert of a layer, {held_out[0]:.0%} of the next layer's are predicted with {top_k} guesses "
            f"(popularity alone: {popular[0]:.0%}, chance: {top_k / experts:.0%})"
        )
        headline = what + (f"; {numbers[-1]} layers ahead, {held_out[-1]:.0%}." if len(hops) > 1 else ".")
    else:
        headline = "There are too few problems to hold any out: predictions are evaluated on the tokens that were counted."
    explanation = (
        "Means over layers. The prediction is the expert that most often follows the given one; 'held-out problems' means "
        "that the experts are counted on one half of the problems and predicted on the other, in both directions."
    )
    figures = []
    if s.axes.knows_strongest:
        explanation += " Top-1 accuracy: for the strongest expert, given the strongest at the earlier layer."
        drawn = figure("top1", "same_strongest", "independent_strongest", 1 / experts, "top-1 accuracy")
        figures.append(drawing(drawn, "hops-strongest", headline, read=READ_HOPS))
    if top_k > 1:
        explanation += f" Recall@{top_k}: of the {top_k} experts with {top_k} predictions, given one at the earlier layer."
    explanation += " Predictors that use all earlier layers are evaluated by 'specmoe evaluate'."
    if top_k > 1:
        drawn = figure("topk", "same_selected", "independent_selected", top_k / experts, f"recall@{top_k}")
        figures.append(drawing(drawn, "hops-selected", "Recall of all selected experts by hop.", read=READ_HOPS))
    return Section("Prediction across layers", headline, explanation, tuple(figures))
