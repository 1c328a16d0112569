"""How well simple contexts predict experts, as a reference for trained predictors; and the tokens that an expert prefers.

A context is a part of what a predictor sees in a task, coarse enough to be counted: the strongest expert at the previous layer,
or the token itself. For each context, entropy and accuracy are estimated twice: on the tokens that were counted (plug-in, too
optimistic, more so the rarer the context's values are), and by two-fold cross-validation over problems (held out, too
pessimistic). The true value lies between the two bounds. A predictor that sees more than one context can do better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.counts.accumulator import Counts, Floats
from analysis.counts.contexts import (
    LAYER_AND_TOKEN,
    NO_CONTEXT,
    PREVIOUS_LAYER,
    PREVIOUS_TOKEN,
    TOKEN,
    TWO_LAYERS,
    TWO_OF_LAYER,
    TWO_OF_TOKEN,
    ContextCounts,
)
from analysis.counts.transitions import FOLDS
from analysis.statistics.load import binary_entropy, entropy

# Pseudo-count, in tokens, with which the layer's overall distribution smooths that of a context.
BACK_OFF = 1.0

TASKS: dict[str, tuple[str, ...]] = {
    "next-layer": (NO_CONTEXT, PREVIOUS_LAYER, TWO_LAYERS, TWO_OF_LAYER, PREVIOUS_TOKEN, TWO_OF_TOKEN, LAYER_AND_TOKEN, TOKEN),
    "next-token": (NO_CONTEXT, PREVIOUS_TOKEN, TWO_OF_TOKEN),
    "whole-path": (NO_CONTEXT, PREVIOUS_TOKEN, TWO_OF_TOKEN, TOKEN),
}
"""The contexts that are known in each task (at horizon h = 1)."""
# The contexts that do not depend on which experts are the strongest.
OF_NO_EXPERT = (NO_CONTEXT, TOKEN)


@dataclass(frozen=True)
class ContextStatistics:
    """How well one context predicts a layer's experts: a lower and an upper bound of each figure.

    Figures are means over layers; recall is also given per layer `[L]`, `nan` where a layer lacks the context. To be
    comparable, the means of all contexts are over the same layers, those that have every context: from the third MoE layer on,
    if there are that many.

    context: its name. tokens: number of tokens counted. coverage: share of tokens whose context has a row of its own.
    set_bits: sum over experts of the entropy of "the expert is selected", in bits: an upper bound of the entropy of the set.
    first_bits: entropy of the strongest expert. top1: accuracy of predicting the strongest expert. recall: fraction of the K
    experts among K predictions. *_plug_in: evaluated on the tokens that were counted; *_held_out: on the other half of the
    problems.
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
        """The context's name, with its coverage if that is not complete."""
        return self.context if self.coverage > 0.999 else f"{self.context} (only common tokens: {self.coverage:.0%} of all)"


def context_statistics(counts: ContextCounts, top_k: int, *, knows_strongest: bool = True) -> list[ContextStatistics]:
    """Statistics of all contexts that have tokens, in the order of TASKS["next-layer"].

    knows_strongest: whether the trace says which experts are the strongest. Without, contexts of them are left out, and
    first_bits and top1 are `nan`.
    """
    contexts = TASKS["next-layer"] if knows_strongest else OF_NO_EXPERT
    names = [name for name in contexts if name in counts.selected and counts.strongest[name].any()]
    columns = {name: _columns(counts, name, top_k) for name in names}
    if not knows_strongest:
        unknown = {f"{what}_{how}" for what in ("first_bits", "top1") for how in ("plug_in", "held_out")}
        columns = {
            name: {figure: np.full_like(values, np.nan) if figure in unknown else values for figure, values in each.items()}
            for name, each in columns.items()
        }
    common = np.logical_and.reduce([np.isfinite(columns[name]["recall_held_out"]) for name in names]) if names else np.empty(0)
    found = []
    for name in names:
        chosen = common if common.any() else np.isfinite(columns[name]["recall_plug_in"])
        means = {key: float(values[chosen].mean()) for key, values in columns[name].items()}
        found.append(
            ContextStatistics(
                context=name,
                tokens=int(counts.strongest[name].sum((0, 2, 3), dtype=np.int64).max()),
                coverage=_coverage(counts) if name == TOKEN else 1.0,
                recall_plug_in_L=columns[name]["recall_plug_in"],
                recall_held_out_L=columns[name]["recall_held_out"],
                **means,
            )
        )
    return found


def _coverage(counts: ContextCounts) -> float:
    seen_V = counts.strongest[TOKEN].sum((0, 1, 3), dtype=np.int64)
    return float(seen_V[:-1].sum() / max(seen_V.sum(), 1))


def _columns(counts: ContextCounts, name: str, top_k: int) -> dict[str, Floats]:
    """Every figure of a context by layer `[L]`; `nan` without tokens, held out also if one half of the problems has none."""
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
            for what, value in _evaluated(both, both, top_k, plug_in=True).items():
                columns[f"{what}_plug_in"][layer] = value
        if tokens_F.min() > 0:
            halves = [(selected[f], strongest[f]) for f in range(FOLDS)]
            by_fold = [_evaluated(halves[f], halves[1 - f], top_k, plug_in=False) for f in range(FOLDS)]
            for what in by_fold[0]:
                columns[f"{what}_held_out"][layer] = sum(by_fold[f][what] * tokens_F[f] for f in range(FOLDS)) / tokens_F.sum()
    return columns


def _evaluated(test: tuple[Floats, Floats], train: tuple[Floats, Floats], top_k: int, *, plug_in: bool) -> dict[str, float]:
    """Bits, accuracy and recall of the counts `test` (selected, strongest `[C, E]`) under distributions estimated from `train`.

    Held out, a context's counts are smoothed with the layer's own; plug-in counts are used as they are, and the entropies are
    Miller-Madow corrected.
    """
    (selected, strongest), (train_selected, train_strongest) = test, train
    tokens_C, train_C = strongest.sum(1), train_strongest.sum(1)
    total = tokens_C.sum()
    marginal_selected = (train_selected.sum(0) + 0.5) / (train_C.sum() + 1)
    marginal_strongest = (train_strongest.sum(0) + 0.5) / (train_C.sum() + 0.5 * strongest.shape[1])
    by_count = (train_selected + BACK_OFF * marginal_selected) / (train_C + BACK_OFF)[:, None]
    by_first = (train_strongest + BACK_OFF * marginal_strongest) / (train_C + BACK_OFF)[:, None]
    if plug_in:
        p_selected = selected / np.maximum(tokens_C, 1)[:, None]
        p_strongest = strongest / np.maximum(tokens_C, 1)[:, None]
        # Miller-Madow, for each distribution: (non-empty cells - 1) / (2 N ln 2), weighted by N.
        first_bits = (entropy(p_strongest) * tokens_C).sum() + ((strongest > 0).sum(1) - 1).clip(0).sum() / (2 * np.log(2))
        binary = binary_entropy(p_selected)
        uncertain = ((p_selected > 0) & (p_selected < 1)).sum()
        set_bits = (binary * tokens_C[:, None]).sum() + uncertain / (2 * np.log(2))
    else:
        first_bits = -(strongest * np.log2(by_first)).sum()
        # An expert that every training token of a context used may still be missing from a test token.
        p_selected = by_count.clip(1e-6, 1 - 1e-6)
        missed = tokens_C[:, None] - selected
        set_bits = -(selected * np.log2(p_selected) + missed * np.log2(1 - p_selected)).sum()
    guessed = np.argpartition(-by_count, top_k - 1, axis=1)[:, :top_k]
    best = by_first.argmax(1)
    return {
        "set_bits": float(set_bits / total),
        "first_bits": float(first_bits / total),
        "top1": float(strongest[np.arange(len(strongest)), best].sum() / total),
        "recall": float(np.take_along_axis(selected, guessed, 1).sum() / max(selected.sum(), 1)),
    }


@dataclass(frozen=True)
class PreferredTokens:
    """The tokens that each expert prefers: `[L, E, M]`, best first; place is -1 where there are fewer.

    place: index into `Axes.vocabulary`. lift: how often the expert is selected for the token, divided by how often for any
    token. count: selections. Only tokens that occur at least MIN_SEEN times are included. They are ranked by lift times the
    square root of the selections, which favors tokens that are both specific to the expert and common.
    """

    place: Counts
    lift: Floats
    count: Counts


MIN_SEEN = 10


def preferred_tokens(counts: ContextCounts, limit: int = 12) -> PreferredTokens | None:
    """Up to `limit` preferred tokens of every expert; None if the trace does not identify its tokens."""
    if TOKEN not in counts.selected:
        return None
    selected = counts.selected[TOKEN].sum(0, dtype=np.int64)[:, :-1, :-1]
    seen_LV = counts.strongest[TOKEN].sum(0, dtype=np.int64).sum(-1)
    layers, vocabulary, experts = selected.shape
    limit = min(limit, vocabulary)
    places = np.full((layers, experts, limit), -1)
    lifts, uses = np.zeros((layers, experts, limit)), np.zeros((layers, experts, limit), dtype=np.int64)
    for layer in range(layers):
        all_E = counts.selected[TOKEN][:, layer, :, :-1].sum((0, 1), dtype=np.int64) / max(seen_LV[layer].sum(), 1)
        seen_V = seen_LV[layer, :-1]
        rate_VE = selected[layer] / np.maximum(seen_V, 1)[:, None]
        lift_VE = np.divide(rate_VE, all_E, out=np.zeros_like(rate_VE), where=all_E > 0)
        score_VE = np.where((seen_V >= MIN_SEEN)[:, None] & (lift_VE > 1), lift_VE * np.sqrt(selected[layer]), 0)
        best_ME = np.argsort(-score_VE, axis=0, kind="stable")[:limit]
        good_ME = np.take_along_axis(score_VE, best_ME, 0) > 0
        places[layer] = np.where(good_ME, best_ME, -1).T
        lifts[layer] = np.where(good_ME, np.take_along_axis(lift_VE, best_ME, 0), 0).T
        uses[layer] = np.where(good_ME, np.take_along_axis(selected[layer], best_ME, 0), 0).T
    return PreferredTokens(places, lifts, uses)
