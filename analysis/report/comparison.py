"""The sections of a page that compares several traces: models, precisions, or datasets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from analysis.counts.locality import DISTANCES
from analysis.report.differences import differences_section
from analysis.report.figures import CHANCE, CONTROL, Curve, Section, drawing, lines, load_map
from analysis.statistics.agreement import Agreement
from analysis.statistics.compute import Statistics, mean, show
from analysis.statistics.differences import LoadDifference
from analysis.statistics.domains import DomainDistance, distance_of
from analysis.statistics.locality import repetition_chance
from profiler.errors import counted


def compared_facts(compared: dict[str, Statistics]) -> list[tuple[str, str]]:
    """A line for each trace, followed by its caveats."""
    facts = []
    for name, s in compared.items():
        model = s.source.metadata.model
        quantization = f", {model.quantization}" if model.quantization else ""
        facts.append(
            (
                name,
                f"{model.id}{quantization}: {counted(s.axes.layers, 'MoE layer')}, {s.axes.num_experts} experts, "
                f"top-{s.axes.top_k}; "
                f"{counted(s.problems, 'problem')}, {s.tokens:,} tokens of {', '.join(s.datasets)}",
            )
        )
        facts += [(f"{name}, note", caveat) for caveat in s.source.caveats]
    return facts


def comparison_table(compared: dict[str, Statistics]) -> dict[str, dict[str, float]]:
    """Values by figure and trace, as means over layers; both `statistics.json` and the page show them."""
    rows: dict[str, dict[str, float]] = {}

    def add(figure: str, values: dict[str, float]) -> None:
        # A figure of the strongest experts is known of no trace, if none says which they are.
        if any(np.isfinite(value) for value in values.values()):
            rows[figure] = values

    add("chance of an expert (K/E)", {name: s.axes.top_k / s.axes.num_experts for name, s in compared.items()})
    add("load entropy / maximum", {name: mean(s.load.entropy_share) for name, s in compared.items()})
    add("busiest / mean load", {name: mean(s.load.max_over_mean) for name, s in compared.items()})
    for figure, attribute in (
        ("bits shared with the next layer", "information_bits"),
        ("bits shared with the next layer, shuffled", "information_shuffled_bits"),
        ("strongest expert guessed from the layer before, held out", "held_out_top1"),
        ("strongest expert guessed by popularity", "marginal_top1"),
        ("recall@K from one expert of the layer before, held out", "held_out_topk"),
        ("recall@K by popularity", "marginal_topk"),
    ):
        add(figure, {name: mean(getattr(s.hops[0], attribute)) if s.hops else float("nan") for name, s in compared.items()})
    add("same first choice as the token before", {name: mean(s.repetitions[0].first[0]) for name, s in compared.items()})
    add("same first choice, tokens shuffled", {name: mean(s.repetitions[0].first_shuffled) for name, s in compared.items()})
    add("experts shared with the token before", {name: mean(s.repetitions[0].shared[0]) for name, s in compared.items()})
    add("experts shared, tokens shuffled", {name: mean(s.repetitions[0].shared_shuffled) for name, s in compared.items()})
    add("median tokens since last use", {name: mean(s.reuse.median_gap) for name, s in compared.items()})
    add("experts used by 32 tokens, of all", {name: mean(s.reuse.working_set) for name, s in compared.items()})
    for context in dict.fromkeys(each.context for s in compared.values() for each in s.contexts):
        found = {name: next((r for r in s.contexts if r.context == context), None) for name, s in compared.items()}
        values = {name: float("nan") if each is None else each.recall_held_out for name, each in found.items()}
        add(f"recall@K given: {context}, held out", values)
    return rows


def load_distances(compared: dict[str, Statistics], paired: set[tuple[str, str]]) -> list[DomainDistance]:
    """Distance between the loads of each pair of traces of the same shape; the control permutes problems between the two.

    paired: the pairs of traces with the same problems.
    """
    return [
        distance_of(first, second, one.blocks, other.blocks, one.load.share_LE.shape, paired=(first, second) in paired)
        for (first, one), (second, other) in combinations(compared.items(), 2)
        if one.load.share_LE.shape == other.load.share_LE.shape
    ]


def comparison_sections(
    compared: dict[str, Statistics],
    agreements: dict[str, Agreement],
    paired: set[tuple[str, str]],
    differences: Sequence[LoadDifference] = (),
) -> list[Section]:
    """The sections of what can be compared; traces of different shapes are shown over relative depth."""
    sections = [_figures(compared)]
    if agreements:
        sections.append(_agreement(agreements, compared))
    for number, each in enumerate(differences, start=1):
        sections.append(differences_section(each, compared[each.first].axes.moe_layers, number))
    sections.append(_load(compared, paired))
    if all(s.hops for s in compared.values()):
        sections.append(_hops(compared))
    return [*sections, _repetition(compared)]


def _figures(compared: dict[str, Statistics]) -> Section:
    rows = comparison_table(compared)
    names = list(compared)
    cells = [("mean over layers", *names)]
    cells += [(figure, *(show(values[name]) for name in names)) for figure, values in rows.items()]
    # The gain over a trace's own popularity baseline is comparable between shapes; recall itself is not.
    gains = {name: mean(s.hops[0].held_out_topk) - mean(s.hops[0].marginal_topk) for name, s in compared.items() if s.hops}
    known = {name: gain for name, gain in gains.items() if np.isfinite(gain)}
    if known:
        best = max(known, key=lambda name: known[name])
        others = ", ".join(f"{name} {gain:+.3f}" for name, gain in known.items() if name != best)
        headline = f"Layers predict the next layer best in {best}: recall@K {known[best]:+.3f} over popularity"
        headline += f"; {others}." if others else "."
    else:
        headline = "There are too few problems to evaluate on held-out ones."
    explanation = (
        "'Held out': counted on one half of the problems and evaluated on the other, in both directions. If the number of "
        "experts or K differs, compare values with chance and popularity in the same column, not between columns."
    )
    return Section("Side by side", headline, explanation, tables=(tuple(cells),))


def _agreement(agreements: dict[str, Agreement], compared: dict[str, Statistics]) -> Section:
    layers = next(iter(compared.values())).axes.moe_layers
    chosen = []
    for name, found in agreements.items():
        chosen += [Curve(name, found.shared), Curve(f"{name}, two random tokens", found.shared_shuffled, CONTROL)]
    same_layers = all(len(found.shared) == len(layers) for found in agreements.values())
    most = max(len(found.shared) for found in agreements.values())
    drawn = lines(chosen, layers if same_layers else range(most), "layer", "share of K experts in common")
    headline = "Share of the K experts in common for the same prompt tokens: " + ", ".join(
        f"{name} {mean(found.shared):.1%} (two random tokens: {mean(found.shared_shuffled):.1%})"
        for name, found in agreements.items()
    )
    columns = {
        "experts in common": "shared", "same set": "same_set", "same strongest": "same_first",
        "two random tokens": "shared_shuffled",
    }  # fmt: skip
    # Known of no pair of traces, if none says which experts are the strongest.
    columns = {
        name: field
        for name, field in columns.items()
        if any(np.isfinite(getattr(found, field)).any() for found in agreements.values())
    }
    rows: list[tuple[str, ...]] = [("traces", "prompts", "tokens", *columns)]
    for name, found in agreements.items():
        values = [getattr(found, field) for field in columns.values()]
        rows.append((name, f"{found.problems:,}", f"{found.tokens:,}", *(show(mean(value)) for value in values)))
    explanation = (
        "Prompts in both traces are compared token by token, which shows what another precision or engine changes. Generated "
        "text is not compared, since it diverges from the first token that differs."
    )
    figures = (
        drawing(drawn, "agreement", headline, read="1: both traces route every token alike; dotted: two random tokens."),
    )
    return Section("The same tokens", headline + ".", explanation, figures, (tuple(rows),))


def _load(compared: dict[str, Statistics], paired: set[tuple[str, str]]) -> Section:
    figures = []
    names = list(compared)
    depth = {name: np.linspace(0, 1, s.axes.layers) if s.axes.layers > 1 else np.zeros(1) for name, s in compared.items()}
    grid = np.linspace(0, 1, max(s.axes.layers for s in compared.values()))
    chosen = [Curve(name, np.interp(grid, depth[name], s.load.entropy_share)) for name, s in compared.items()]
    chosen.append(Curve("even load", np.ones(len(grid)), CHANCE))
    drawn = lines(chosen, [round(float(x), 3) for x in grid], "depth (0 first, 1 last MoE layer)", "load entropy / maximum")
    figures.append(
        drawing(drawn, "compared-load", "Load entropy over depth.", read="1 is an even load; layers below it have favorites.")
    )
    distances = load_distances(compared, paired)
    evenest = max(names, key=lambda name: mean(compared[name].load.entropy_share))
    headline = (
        f"{evenest} spreads its load most evenly ({mean(compared[evenest].load.entropy_share):.1%} of the maximum entropy)."
    )
    explanation = "Heat maps: each expert's share relative to an even share, one figure per trace on a common color scale."
    if distances:
        chosen = []
        for each in distances:
            name = f"{each.first} / {each.second}"
            chosen += [Curve(name, each.distance), Curve(f"{name}, problems permuted", each.shuffled, CONTROL)]
        most = max(len(each.distance) for each in distances)
        drawn = lines(chosen, range(most), "MoE layer (from 0)", "Jensen-Shannon distance")
        read = "lines far above their dotted control are traces that use different experts at this layer."
        figures.append(drawing(drawn, "compared-distance", "Distance between the loads by layer.", read=read))
        far = max(distances, key=lambda each: mean(each.distance) - mean(each.shuffled))
        differ = ", which differ most," if len(distances) > 1 else ""
        headline += (
            f" The Jensen-Shannon distance between the loads of {far.first} and {far.second}{differ} is "
            f"{mean(far.distance):.3f} on average, {mean(far.shuffled):.3f} with problems permuted between the traces."
        )
        explanation += (
            " Distance: 0 means equal, 1 disjoint. Dotted: with problems permuted between the traces (exchanged pair by pair "
            "if "
            "both traces have the same problems)."
        )
    highest = max(float((s.load.share_LE * s.axes.num_experts).max()) for s in compared.values())
    for number, (name, s) in enumerate(compared.items()):
        relative_LE = s.load.share_LE * s.axes.num_experts
        figure = load_map(
            relative_LE,
            s.axes.moe_layers,
            f"expert ({name})",
            "layer %{y}, expert %{x}: %{z:.2f} times an even share",
            highest,
        )
        figure.update_layout(height=max(300, min(560, 120 + 14 * s.axes.layers)))
        read = (
            "orange: experts that their layer selects more often than an even share; blue: less often; all maps have "
            "the same colors."
        )
        figures.append(drawing(figure, f"compared-map-{number}", f"Expert load of {name}.", read=read))
    return Section("Expert load", headline, explanation, tuple(figures))


def _hops(compared: dict[str, Statistics]) -> Section:
    most = max(len(s.hops) for s in compared.values())
    chosen, above = [], {}
    for name, s in compared.items():
        curve = [mean(hop.held_out_topk) for hop in s.hops]
        popular = [mean(hop.marginal_topk) for hop in s.hops]
        above[name] = curve[0] - popular[0]
        missing = [float("nan")] * (most - len(curve))
        chosen += [Curve(name, [*curve, *missing]), Curve(f"{name}, popularity", [*popular, *missing], CONTROL)]
    figure = lines(chosen, list(range(1, most + 1)), "hop (layers ahead)", "recall@K from one expert")
    figure.update_xaxes(dtick=1)
    headline = (
        "Held-out recall@K one hop ahead, relative to popularity: "
        + ", ".join(
            f"{name} {value:+.3f}" if np.isfinite(value) else f"{name} has too few problems" for name, value in above.items()
        )
        + "."
    )
    explanation = (
        "Recall of the K experts with K predictions, given one expert of the earlier layer, on held-out problems; mean over "
        "layers."
    )
    read = "the farther a line is above its dotted popularity, the more one expert says about later layers."
    figures = (drawing(figure, "compared-hops", headline, read=read),)
    return Section("Prediction across layers", headline, explanation, figures)


def _repetition(compared: dict[str, Statistics]) -> Section:
    chosen = []
    for name, s in compared.items():
        whole = s.repetitions[0]
        chosen.append(Curve(name, [mean(row) for row in whole.shared]))
        chosen.append(Curve(f"{name}, shuffled", [mean(whole.shared_shuffled)] * len(DISTANCES), CONTROL))
        chance = repetition_chance(s.axes.num_experts, s.axes.top_k)[2]
        chosen.append(Curve(f"{name}, chance", [chance] * len(DISTANCES), CHANCE))
    figure = lines(chosen, DISTANCES, "distance (tokens)", "share of K experts in common", log_x=True)
    headline = "Share of the K experts that consecutive tokens have in common: " + ", ".join(
        f"{name} {mean(s.repetitions[0].shared[0]):.1%} (two random tokens: {mean(s.repetitions[0].shared_shuffled):.1%})"
        for name, s in compared.items()
    )
    explanation = "Pairs of tokens of the same problem, in the same layer; mean over layers."
    read = "the farther a line is above its dotted control, the more a token shares with the one so many positions before it."
    figures = (drawing(figure, "compared-repetition", headline, read=read),)
    return Section("Repetition over tokens", headline + ".", explanation, figures)
