"""The strongest transitions between adjacent layers: the pairs of experts that independent layers would not explain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.counts.accumulator import Counts, Floats
from analysis.statistics.load import normalized
from analysis.statistics.transitions import shuffled_table

# Transitions of each pair of layers: as many as experts, but no more than can be distinguished in a figure.
MOST_LINKS = 32


@dataclass(frozen=True)
class LayerFlow:
    """The strongest transitions from one MoE layer to the next, strongest first.

    All K x K pairs of a token's experts are counted. The strength of a transition is its share of these pairs minus the share
    expected if the layers were independent: it is large only for pairs that are both common and more common than the loads
    explain.

    Attributes:
        layer: The earlier layer, as an index among the MoE layers.
        earlier, later: Experts at both ends of each transition `[N]`.
        share: Share of all pairs `[N]`.
        lift: Share divided by that of independent layers `[N]`.
        excess: Sum of the strengths: the share of all pairs that these transitions have beyond independence.
        excess_shuffled: The same sum for the strongest transitions of a table with the experts of the later layer permuted over
            all tokens.
    """

    layer: int
    earlier: Counts
    later: Counts
    share: Floats
    lift: Floats
    excess: float
    excess_shuffled: float


def layer_flows(pairs_NEE: Counts, seed: int = 0) -> list[LayerFlow]:
    """The strongest transitions of each pair of adjacent layers, from their pair counts `[L - 1, E, E]`.

    seed: of the shuffled control.
    """
    random = np.random.default_rng((seed, 1))
    flows = []
    for layer, pairs_EE in enumerate(pairs_NEE):
        share_EE, expected_EE = _shares(pairs_EE)
        links = _strongest(share_EE - expected_EE)
        shuffled_EE = np.subtract(*_shares(shuffled_table(pairs_EE, random)))
        flows.append(
            LayerFlow(
                layer=layer,
                earlier=links // len(pairs_EE),
                later=links % len(pairs_EE),
                share=share_EE.ravel()[links],
                lift=(share_EE.ravel()[links] / expected_EE.ravel()[links]),
                excess=float((share_EE - expected_EE).ravel()[links].sum()),
                excess_shuffled=float(shuffled_EE.ravel()[_strongest(shuffled_EE)].sum()),
            )
        )
    return flows


def _shares(pairs_EE: Counts) -> tuple[Floats, Floats]:
    """Share of each pair, and its share if the layers were independent `[E, E]`."""
    share_EE = np.asarray(pairs_EE / max(pairs_EE.sum(), 1), dtype=np.float64)
    return share_EE, normalized(pairs_EE.sum(1))[:, None] * normalized(pairs_EE.sum(0))


def _strongest(strength_EE: Floats) -> Counts:
    """Indices of the strongest transitions in `[E * E]`, those with a strength above zero only, strongest first."""
    ranked = np.argsort(-strength_EE, axis=None, kind="stable")[: min(len(strength_EE), MOST_LINKS)]
    return np.asarray(ranked[strength_EE.ravel()[ranked] > 0])
