"""The section on one problem's working set: how many experts its last tokens used, token by token."""

from __future__ import annotations

import numpy as np

from analysis.report.figures import CONTROL, Curve, Section, drawing, lines
from analysis.statistics.compute import mean
from analysis.statistics.working_set import WINDOWS, WorkingSet

# Points of a line; of longer problems, every second, third, ... token is drawn.
MOST_POINTS = 500
READ = "the farther a line is below its dotted control, the more neighboring tokens share experts."


def working_set_section(found: WorkingSet, num_experts: int) -> Section:
    """The working set of the longest problem over its tokens, next to that of the same tokens in random order."""
    step = -(-len(found.positions) // MOST_POINTS)
    positions = found.positions[::step].tolist()
    chosen = []
    for number, window in enumerate(WINDOWS):
        if np.isfinite(found.distinct[number]).any():
            chosen.append(Curve(f"last {window} tokens", found.distinct[number, ::step]))
            chosen.append(Curve(f"last {window}, in random order", [float(found.shuffled[number])] * len(positions), CONTROL))
    figure = lines(chosen, positions, "position in the sequence", "distinct experts per layer")
    figure.update_traces(mode="lines")
    explanation = (
        "Distinct experts of a layer in the last tokens, mean over layers: the size of a cache that would hold them all. It "
        "begins where there are as many tokens. Dotted: expected if the same tokens came in random order."
    )
    if found.decode_from is not None:
        figure.add_vline(found.decode_from, line={"color": "#888888", "width": 1})
        explanation += f" Vertical line: the first generated token, at position {found.decode_from}."
    if found.tokens > len(found.positions):
        explanation += f" Only the first {len(found.positions):,} of its {found.tokens:,} tokens are shown."
    known = [number for number in range(len(WINDOWS)) if np.isfinite(found.distinct[number]).any()]
    if known:
        number = known[min(1, len(known) - 1)]
        values = found.distinct[number]
        headline = (
            f"In the longest problem (id {found.problem}, {found.tokens:,} tokens), {WINDOWS[number]} consecutive tokens use "
            f"{mean(values):.1f} of a layer's {num_experts} experts on average ({found.shuffled[number]:.1f} in random order), "
            f"between {np.nanmin(values):.1f} and {np.nanmax(values):.1f}."
        )
    else:
        headline = f"The longest problem has fewer than {WINDOWS[0]} tokens: too few for a working set over time."
    figures = (drawing(figure, "working-set", headline, read=READ),) if known else ()
    return Section("Working set over time", headline, explanation, figures)
