"""How many experts the last tokens of one problem used, from its first token to its last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.counts.accumulator import Counts, Floats
from analysis.counts.frames import PHASES
from analysis.counts.longest import ProblemRoute
from profiler.trace.schema import DECODE

WINDOWS = (8, 32, 128)


@dataclass(frozen=True)
class WorkingSet:
    """Distinct experts of a layer in the last tokens of the trace's longest problem, as means over layers.

    Attributes:
        problem: The problem's id.
        tokens: All its recorded tokens; the first T of them are in the arrays.
        positions: Position of each token in the sequence `[T]`.
        decode_from: Position of the first generated token; None if there is none, or the phases are unknown.
        distinct: For each of WINDOWS, the number of distinct experts in the last so many tokens `[N, T]`; `nan` until there are
            so many.
        shuffled: Its expected value `[N]` if the same tokens came in random order: what the problem's loads alone explain;
            `nan` for a window with more tokens than there are.
    """

    problem: int
    tokens: int
    positions: Counts
    decode_from: int | None
    distinct: Floats
    shuffled: Floats


def working_set(route: ProblemRoute, num_experts: int) -> WorkingSet | None:
    """The working set of a route over time; None if there is no problem."""
    tokens, layers, _ = route.expert_ids_TLK.shape
    if not tokens:
        return None
    distinct: Floats = np.zeros((len(WINDOWS), tokens))
    shuffled: Floats = np.zeros(len(WINDOWS))
    for layer in range(layers):
        # With a column for empty slots, which is dropped.
        uses_TE = np.zeros((tokens, num_experts + 1), dtype=np.int32)
        np.put_along_axis(uses_TE, route.expert_ids_TLK[:, layer].astype(np.int64), 1, axis=1)
        until_TE = uses_TE[:, :-1].cumsum(0)
        for number, window in enumerate(WINDOWS):
            before_TE = np.zeros_like(until_TE)
            before_TE[window:] = until_TE[:-window]
            distinct[number] += (until_TE > before_TE).sum(1) / layers
            shuffled[number] += (1 - _unused(until_TE[-1], tokens, window)).sum() / layers
    for number, window in enumerate(WINDOWS):
        distinct[number, : window - 1] = np.nan
        shuffled[number] = shuffled[number] if window <= tokens else np.nan
    decoded_T = route.phase_T == PHASES.index(DECODE)
    decode_from = int(route.positions_T[decoded_T.argmax()]) if decoded_T.any() and not decoded_T[0] else None
    return WorkingSet(route.number, route.tokens, route.positions_T.astype(np.int64), decode_from, distinct, shuffled)


def _unused(uses_E: Counts, tokens: int, window: int) -> Floats:
    """Probability that none of `window` tokens uses an expert `[E]`, drawn without replacement (hypergeometric)."""
    drawn = np.arange(min(window, tokens))[:, None]
    return np.asarray((np.maximum(tokens - uses_E - drawn, 0) / (tokens - drawn)).prod(0))
