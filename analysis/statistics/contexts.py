"""How well simple contexts tell the experts: rulers for predictors, and the tokens that an expert likes.

A context is something that a predictor of a task knows, coarse enough to be counted: the strongest expert of the layer before,
the token itself. For each, entropies and hit rates are estimated twice: from the same tokens (plug-in: too good, by the more
the rarer a context's values are) and with each half of the problems judged by what the other half says (cross-validated: too
bad). What the context truly tells lies between the two. A predictor that knows more than a context can of course do better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.counts.accumulator import Counts, Floats
from analysis.counts.contexts import (
    LAYER_AND_TOKEN,
    NOTHING,
    PREVIOUS_LAYER,
    PREVIOUS_TOKEN,
    SECOND_AT_LAYER,
    TOKEN,
    TWO_LAYERS,
    TWO_OF_TOKEN,
    ContextCounts,
)
from analysis.counts.transitions import FOLDS
from analysis.statistics.load import binary_entropy, entropy

# Weight of the layer's own distribution in that of a context, in tokens.
BACK_OFF = 1.0

TASKS: dict[str, tuple[str, ...]] = {
    "next-layer": (NOTHING, PREVIOUS_LAYER, TWO_LAYERS, SECOND_AT_LAYER, PREVIOUS_TOKEN, TWO_OF_TOKEN, LAYER_AND_TOKEN, TOKEN),
    "next-token": (NOTHING, PREVIOUS_TOKEN, TWO_OF_TOKEN),
    "whole-path": (NOTHING, PREVIOUS_TOKEN, TWO_OF_TOKEN, TOKEN),
}
"""What each task (h = 1) knows of these."""


@dataclass(frozen=True)
class Ruler:
    """What one context tells of a layer's experts; means over layers, and `[L]` for recall, `nan` where a layer lacks the
    context.

    Means go over the same layers for all contexts, those that lack none: from the third on, where there are that many.

    set_bits: sum over the experts of the entropy of "is it selected", in bits: an upper bound of the entropy of the set.
    first_bits: entropy of the strongest expert. top1: the strongest is guessed. recall: fraction of the K experts among K
    guesses. *_plug_in: judged on the same tokens; *_held_out: on the other half of the problems.
    """

    context: str
    tokens: int
    coverage: float
    set_bits_plug_in: float
    set_bits_held_out: float
    first_bits_plug_in: float
    first_bits_held_out: float
    top1_plug_in: float
    top1_held_out: float
    recall_plug_in: float
    recall_held_out: float
    recall_plug_in_L: Floats
    recall_held_out_L: Floats

    @property
    def shown(self) -> str:
        """The context's name, with what it leaves out."""
        return self.context if self.coverage > 0.999 else f"{self.context}, if common ({self.coverage:.0%} are)"


def rulers(counts: ContextCounts, top_k: int) -> list[Ruler]:
    """All contexts, in the order of TASKS["next-layer"]; those without tokens are left out."""
    names = [name for name in TASKS["next-layer"] if name in counts.selected and counts.strongest[name].any()]
    columns = {name: _columns(counts, name, top_k) for name in names}
    common = np.logical_and.reduce([np.isfinite(columns[name]["recall_held_out"]) for name in names]) if names else np.empty(0)
    made = []
    for name in names:
        chosen = common if common.any() else np.isfinite(columns[name]["recall_plug_in"])
        means = {key: float(values[chosen].mean()) for key, values in columns[name].items()}
        made.append(
            Ruler(
                context=name,
                tokens=int(counts.strongest[name].sum((0, 2, 3), dtype=np.int64).max()),
                coverage=_coverage(counts) if name == TOKEN else 1.0,
                recall_plug_in_L=columns[name]["recall_plug_in"],
                recall_held_out_L=columns[name]["recall_held_out"],
                **means,
            )
        )
    return made


def _coverage(counts: ContextCounts) -> float:
    seen_V = counts.strongest[TOKEN].sum((0, 1, 3), dtype=np.int64)
    return float(seen_V[:-1].sum() / max(seen_V.sum(), 1))


def _columns(counts: ContextCounts, name: str, top_k: int) -> dict[str, Floats]:
    """Every figure of a context by layer `[L]`, `nan` where it has no tokens, or only one half of the problems has."""
    layers = counts.selected[name].shape[1]
    figures = [f"{what}_{how}" for what in ("set_bits", "first_bits", "top1", "recall") for how in ("plug_in", "held_out")]
    columns = {figure: np.full(layers, np.nan) for figure in figures}
    for layer in range(layers):
        selected, strongest = (
            table[name][:, layer, :, :-1].astype(np.float64) for table in (counts.selected, counts.strongest)
        )
        tokens_F = strongest.sum((1, 2))
        if tokens_F.sum() > 0:
            both = selected.sum(0), strongest.sum(0)
            for what, value in _judged(both, both, top_k, plug_in=True).items():
                columns[f"{what}_plug_in"][layer] = value
        if tokens_F.min() > 0:
            halves = [(selected[f], strongest[f]) for f in range(FOLDS)]
            judged = [_judged(halves[f], halves[1 - f], top_k, plug_in=False) for f in range(FOLDS)]
            for what in judged[0]:
                columns[f"{what}_held_out"][layer] = sum(judged[f][what] * tokens_F[f] for f in range(FOLDS)) / tokens_F.sum()
    return columns


def _judged(judged: tuple[Floats, Floats], said: tuple[Floats, Floats], top_k: int, *, plug_in: bool) -> dict[str, float]:
    """Bits and hits of `judged` (selected, strongest `[C, E]`) under the distributions that `said` gives.

    Held out, a context's counts are smoothed with the layer's own; plug-in they are taken as they are, Miller-Madow corrected.
    """
    (selected, strongest), (said_selected, said_strongest) = judged, said
    tokens_C, said_C = strongest.sum(1), said_strongest.sum(1)
    total = tokens_C.sum()
    marginal_selected = (said_selected.sum(0) + 0.5) / (said_C.sum() + 1)
    marginal_strongest = (said_strongest.sum(0) + 0.5) / (said_C.sum() + 0.5 * strongest.shape[1])
    if plug_in:
        p_selected = selected / np.maximum(tokens_C, 1)[:, None]
        p_strongest = strongest / np.maximum(tokens_C, 1)[:, None]
        # Miller-Madow, for each distribution: (non-empty cells - 1) / (2 N ln 2), weighted by N.
        first_bits = (entropy(p_strongest) * tokens_C).sum() + ((strongest > 0).sum(1) - 1).clip(0).sum() / (2 * np.log(2))
        binary = binary_entropy(p_selected)
        uncertain = ((p_selected > 0) & (p_selected < 1)).sum()
        set_bits = (binary * tokens_C[:, None]).sum() + uncertain / (2 * np.log(2))
    else:
        p_selected = (said_selected + BACK_OFF * marginal_selected) / (said_C + BACK_OFF)[:, None]
        p_strongest = (said_strongest + BACK_OFF * marginal_strongest) / (said_C + BACK_OFF)[:, None]
        first_bits = -(strongest * np.log2(p_strongest)).sum()
        # An expert that every token of a context used, there, may still not be used here.
        p_selected = p_selected.clip(1e-6, 1 - 1e-6)
        missed = tokens_C[:, None] - selected
        set_bits = -(selected * np.log2(p_selected) + missed * np.log2(1 - p_selected)).sum()
    by_count = (said_selected + BACK_OFF * marginal_selected) / (said_C + BACK_OFF)[:, None]
    guessed = np.argpartition(-by_count, top_k - 1, axis=1)[:, :top_k]
    by_first = (said_strongest + BACK_OFF * marginal_strongest) / (said_C + BACK_OFF)[:, None]
    best = by_first.argmax(1)
    return {
        "set_bits": float(set_bits / total),
        "first_bits": float(first_bits / total),
        "top1": float(strongest[np.arange(len(strongest)), best].sum() / total),
        "recall": float(np.take_along_axis(selected, guessed, 1).sum() / max(selected.sum(), 1)),
    }


@dataclass(frozen=True)
class LikedTokens:
    """The tokens that an expert likes: `[L, E, M]`, best first; -1 where there are fewer.

    place: in `Axes.vocabulary`. lift: how often the expert is selected for the token, over how often for any token. Only tokens
    that were seen at least MIN_SEEN times count, and they are in order of lift times the square root of uses: common and
    specific. count: selections.
    """

    place: Counts
    lift: Floats
    count: Counts


MIN_SEEN = 10


def liked_tokens(counts: ContextCounts, most: int = 12) -> LikedTokens | None:
    """The most liked tokens of every expert; None if the trace does not say which tokens there are."""
    if TOKEN not in counts.selected:
        return None
    selected = counts.selected[TOKEN].sum(0, dtype=np.int64)[:, :-1, :-1]
    seen_LV = counts.strongest[TOKEN].sum(0, dtype=np.int64).sum(-1)
    layers, kinds, experts = selected.shape
    most = min(most, kinds)
    places = np.full((layers, experts, most), -1)
    lifts, uses = np.zeros((layers, experts, most)), np.zeros((layers, experts, most), dtype=np.int64)
    for layer in range(layers):
        all_E = counts.selected[TOKEN][:, layer, :, :-1].sum((0, 1), dtype=np.int64) / max(seen_LV[layer].sum(), 1)
        seen_V = seen_LV[layer, :-1]
        rate_VE = selected[layer] / np.maximum(seen_V, 1)[:, None]
        lift_VE = np.divide(rate_VE, all_E, out=np.zeros_like(rate_VE), where=all_E > 0)
        score_VE = np.where((seen_V >= MIN_SEEN)[:, None] & (lift_VE > 1), lift_VE * np.sqrt(selected[layer]), 0)
        best_ME = np.argsort(-score_VE, axis=0, kind="stable")[:most]
        good_ME = np.take_along_axis(score_VE, best_ME, 0) > 0
        places[layer] = np.where(good_ME, best_ME, -1).T
        lifts[layer] = np.where(good_ME, np.take_along_axis(lift_VE, best_ME, 0), 0).T
        uses[layer] = np.where(good_ME, np.take_along_axis(selected[layer], best_ME, 0), 0).T
    return LikedTokens(places, lifts, uses)
