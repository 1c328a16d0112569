"""The statistics as CSV tables, one row per measured item; layers are the decoder's own indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.counts.locality import DISTANCES
from analysis.documents.csv_text import csv_text
from analysis.statistics.compute import Statistics
from analysis.statistics.weights import QUANTILES
from profiler.trace.writer import write_text

# Pairs of each layer, by number of tokens and by lift each.
TOP_PAIRS = 20


def write_tables(statistics: Statistics, labels: Sequence[str], folder: Path) -> list[Path]:
    """Write all tables that the trace has data for. labels: of the tokens in the vocabulary (`labels.token_labels`)."""
    tables = {
        "load": _load(statistics),
        "layers": _layers(statistics),
        "transitions": _transitions(statistics),
        "repetition": _repetition(statistics),
        "reuse": _reuse(statistics),
        "pairs": _pairs(statistics),
        "domains": _domains(statistics),
        "specialists": _specialists(statistics),
        "tokens": _tokens(statistics, labels),
        "clusters": _clusters(statistics),
        "weights": _weights(statistics),
        "predictability": _predictability(statistics),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in tables.items():
        header, *body = rows
        path = folder / f"{name}.csv"
        if body:
            write_text(path, csv_text([header, *body]))
            paths.append(path)
        else:
            # An earlier analysis may have written this table into the same folder.
            path.unlink(missing_ok=True)
    return paths


Rows = Iterable[Sequence[Any]]


def _load(s: Statistics) -> Rows:
    yield "dataset", "phase", "layer", "expert", "selections", "share", "weight_share"
    for (dataset, phase), load in s.loads.items():
        for n, layer in enumerate(s.axes.moe_layers):
            for expert in range(s.axes.num_experts):
                mass = "" if load.mass_share_LE is None else float(load.mass_share_LE[n, expert])
                yield dataset, phase, layer, expert, int(load.counts_LE[n, expert]), float(load.share_LE[n, expert]), mass


def _layers(s: Statistics) -> Rows:
    yield "dataset", "phase", "tokens", "layer", "entropy_bits", "entropy_share", "max_over_mean", "gini", "cv", "coverage"
    for (dataset, phase), load in s.loads.items():
        columns = (load.entropy_bits, load.entropy_share, load.max_over_mean, load.gini, load.cv, load.coverage)
        for n, layer in enumerate(s.axes.moe_layers):
            yield dataset, phase, load.tokens, layer, *(float(column[n]) for column in columns)


def _transitions(s: Statistics) -> Rows:
    names = [name for name in vars(s.hops[0]) if name != "hop"] if s.hops else []
    yield "hop", "from_layer", "to_layer", *names
    for hop in s.hops:
        for n in range(s.axes.layers - hop.hop):
            layers = s.axes.moe_layers[n], s.axes.moe_layers[n + hop.hop]
            yield hop.hop, *layers, *(float(getattr(hop, name)[n]) for name in names)


def _repetition(s: Statistics) -> Rows:
    kinds = ("first", "first_or_second", "shared")
    yield "dataset", "layer", "distance", *kinds, *(f"{kind}_shuffled" for kind in kinds)
    for each in s.repetitions:
        for n, layer in enumerate(s.axes.moe_layers):
            shuffled = [float(getattr(each, f"{kind}_shuffled")[n]) for kind in kinds]
            for number, distance in enumerate(DISTANCES):
                yield each.dataset, layer, distance, *(float(getattr(each, kind)[number, n]) for kind in kinds), *shuffled


def _reuse(s: Statistics) -> Rows:
    names = (
        "median_gap", "cold_share", "cold_shuffled", "working_set", "working_set_shuffled", "adjacent", "adjacent_shuffled"
    )  # fmt: skip
    edges = [f"gap_{first}" for first in s.reuse.gap_edges[:-1].tolist()]
    yield "layer", *names, *edges, *(f"{edge}_shuffled" for edge in edges)
    for n, layer in enumerate(s.axes.moe_layers):
        columns = [float(getattr(s.reuse, name)[n]) for name in names]
        yield layer, *columns, *s.reuse.gap_share[n].tolist(), *s.reuse.gap_shuffled[n].tolist()


def _pairs(s: Statistics) -> Rows:
    yield "layer", "unique_sets", "possible_sets", "even_sets", "expert", "other_expert", "tokens", "lift"
    if s.pairs is None:
        return
    for n, layer in enumerate(s.axes.moe_layers):
        upper = np.triu(s.pairs.counts_LEE[n], 1)
        lift = np.where(upper > 0, s.pairs.lift_LEE[n], 0)
        chosen = [np.argsort(-values, axis=None, kind="stable")[:TOP_PAIRS] for values in (upper, lift)]
        order = np.array(list(dict.fromkeys(np.concatenate(chosen).tolist())))
        for first, second in zip(*np.unravel_index(order, upper.shape), strict=True):
            if upper[first, second]:
                facts = float(s.pairs.unique_sets[n]), s.pairs.possible_sets, s.pairs.even_sets
                yield layer, *facts, first, second, upper[first, second], float(s.pairs.lift_LEE[n, first, second])


def _domains(s: Statistics) -> Rows:
    yield "first", "second", "layer", "distance", "shuffled", "shuffled_high"
    for each in s.domains:
        for n, layer in enumerate(s.axes.moe_layers):
            columns = (each.distance, each.shuffled, each.shuffled_high)
            yield each.first, each.second, layer, *(float(column[n]) for column in columns)


def _specialists(s: Statistics) -> Rows:
    yield "dataset", "layer", "expert", "ratio", "low", "high", "share_over_even"
    for each in s.specializations:
        for one in each.specialists:
            yield one.dataset, s.axes.moe_layers[one.layer], one.expert, one.ratio, one.low, one.high, one.share


def _tokens(s: Statistics, labels: Sequence[str]) -> Rows:
    yield "layer", "expert", "rank", "token", "label", "selections", "lift"
    if s.preferred is None:
        return
    for n, expert, rank in zip(*np.nonzero(s.preferred.place >= 0), strict=True):
        place = int(s.preferred.place[n, expert, rank])
        found = int(s.preferred.count[n, expert, rank]), float(s.preferred.lift[n, expert, rank])
        yield s.axes.moe_layers[n], expert, rank, s.axes.vocabulary[place], labels[place], *found


def _clusters(s: Statistics) -> Rows:
    yield "feature", "method", "layer", "clusters", "silhouette", "shuffled", "labels"
    for each in s.clusters:
        labels = " ".join(map(str, each.labels.tolist()))
        yield (
            each.feature, each.method, s.axes.moe_layers[each.layer], each.clusters, each.silhouette, each.shuffled, labels
        )  # fmt: skip


def _weights(s: Statistics) -> Rows:
    yield "kind", "layer", "rank", "mean", *(f"quantile_{quantile}" for quantile in QUANTILES)
    for n, layer in enumerate(s.axes.moe_layers):
        if s.weights is not None:
            for rank in range(s.axes.top_k):
                yield "weight", layer, rank, float(s.weights.mean[n, rank]), *s.weights.quantiles[n, rank].tolist()
        if s.margins is not None:
            yield "margin", layer, "", "", *s.margins.quantiles[n].tolist()


def _predictability(s: Statistics) -> Rows:
    names = [name for name in vars(s.contexts[0]) if not name.endswith("_L")] if s.contexts else []
    yield names
    for each in s.contexts:
        yield [getattr(each, name) for name in names]
