"""The section on cache sizes: which share of the selected experts a cache of each size lacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from analysis.documents.curves import CacheCurves
from analysis.report.figures import CHANCE, CONTROL, Curve, Section, drawing, lines
from analysis.statistics.compute import Statistics, mean, show

READ = (
    "where the first two lines are below the third, the order of tokens helps a cache more than knowing the most used experts "
    "does."
)
SHOWN_SHARES = (0.125, 0.25, 0.5, 0.75)


def cache_sizes_section(s: Statistics, curves: Sequence[CacheCurves] = ()) -> Section:
    """Miss ratios of every size of a layer's cache. curves: exact ones, from `specmoe curve`, to be drawn with them."""
    found, experts = s.cache_sizes, s.axes.num_experts
    low, high, popular = (_over_layers(each) for each in (found.lru_low, found.lru_high, found.popular))
    sizes = found.sizes.tolist()
    chosen = [
        Curve("LRU, at most", high),
        Curve("LRU, at least", low, CONTROL),
        Curve("most used experts of the trace, always kept", popular),
        Curve("chance: experts at random", 1 - found.sizes / experts, CHANCE),
    ]
    for document in curves:
        layers = max(1, len(document.moe_layers))
        for each in document.curves:
            slots = np.array(each.sizes) / (layers if each.is_global else 1)
            misses = np.interp(sizes, slots, 1 - np.array(each.hit_rates))
            where = "one cache for all layers" if each.is_global else "each layer"
            chosen.append(Curve(f"{each.policy}, {where} (specmoe curve, {document.part} part)", misses))
    figure = lines(chosen, sizes, "slots of each layer's cache", "miss ratio")
    half = int(np.searchsorted(found.sizes, max(s.axes.top_k, experts // 2)))
    n_low, n_high = (
        int(np.nanargmin(each[:, half])) if np.isfinite(each[:, half]).any() else 0
        for each in (found.lru_high, -found.lru_high)
    )
    headline = (
        f"With room for {sizes[half]} of a layer's {experts} experts, an LRU cache lacks {show(100 * low[half], 1)} to "
        f"{show(100 * high[half], 1)} % of the selected experts; the {sizes[half]} most used ones, always kept, lack "
        f"{show(100 * popular[half], 1)} % (chance: {100 * (1 - sizes[half] / experts):.0f} %)."
    )
    explanation = (
        "One cache for each layer, mean over layers. The LRU cache is empty at the beginning of each problem, so the first use "
        "of an expert in a problem is a miss at any size. The K experts of a token are used at the same time: the two bounds "
        "hold for any order of them. The most used experts are those of the whole trace, which this baseline knows in advance."
    )
    if curves:
        explanation += (
            " Curves from 'specmoe curve' count generated tokens only, and their caches keep their content from one problem to "
            "the next; where a curve was simulated at some sizes only, the values in between are interpolated."
        )
    else:
        explanation += " 'specmoe curve' has exact curves of LRU and of other policies, for '--curves'."
    of_layers = (f"at most, layer {s.axes.moe_layers[n]}" for n in (n_low, n_high))
    rows: list[tuple[str, ...]] = [("slots", "LRU, at least", "at most", *of_layers, "most used", "chance")]
    for share in SHOWN_SHARES:
        place = int(np.searchsorted(found.sizes, max(s.axes.top_k, round(share * experts))))
        values = (low[place], high[place], found.lru_high[n_low, place], found.lru_high[n_high, place], popular[place])
        row = (str(sizes[place]), *(show(float(value)) for value in values), show(1 - sizes[place] / experts))
        if row not in rows:
            rows.append(row)
    figures = (drawing(figure, "cache-sizes", headline, read=READ),)
    return Section("Cache size and misses", headline, explanation, figures, (tuple(rows),))


def _over_layers(values_LC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.array([mean(column) for column in values_LC.T])
