"""All statistics of one trace, from its counts, as plain values for `statistics.json`, the tables and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from analysis.counts.accumulator import Floats
from analysis.counts.counting import TraceCounts, count_trace
from analysis.counts.frames import PHASES
from analysis.counts.locality import DISTANCES, SEGMENT
from analysis.counts.survey import ALL, EVERYTHING, Axes, Choice
from analysis.statistics.clusters import Clustering, cluster_experts
from analysis.statistics.contexts import TASKS, LikedTokens, Ruler, liked_tokens, rulers
from analysis.statistics.domains import Blocks, DomainDistance, Specialization, domain_distances, flat_blocks, specialization
from analysis.statistics.load import LoadStatistics, load_statistics
from analysis.statistics.locality import Repetition, ReuseStatistics, repetition, repetition_chance, reuse_statistics
from analysis.statistics.mixtral import Comparison, compare_with_table_5
from analysis.statistics.pairs import PairStatistics, pair_statistics
from analysis.statistics.transitions import HopStatistics, hop_statistics, transition_probabilities
from analysis.statistics.weights import QUANTILES, MarginStatistics, WeightStatistics, margin_statistics, weight_statistics
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata

DEFINITIONS = {
    "load.share": "fraction of a layer's selections (top-K of every token) that went to an expert; mass_share: of the sum of "
    "routing weights",
    "load.entropy_share": "entropy of the load over log2(E); 1 is even load. gini, cv (standard deviation over mean): "
    "0 is even",
    "transitions": "per hop, from each layer n to n+hop; 'shuffled': the later layer permuted over the whole trace; "
    "'marginal': "
    "the layer's most frequent (popularity); 'held_out': each half of the problems (by hash of the prompt) judged by what the "
    "other half says; plain 'conditional' is counted and judged on the same tokens",
    "transitions.top1": "the strongest expert at n+hop is the one most frequent after the strongest at n; chance 1/E",
    "transitions.topk": "fraction of the K experts at n+hop among the K most frequent after one of the experts at n; "
    "chance K/E",
    "transitions.information_bits": "mutual information of the strongest experts at n and n+hop, Miller-Madow corrected",
    "transitions.same_strongest": "the strongest expert has the same index at both layers; same_selected: fraction of experts "
    "at n whose index is selected at n+hop; 'independent': what both layers' loads alone give",
    "repetition": "token against the token DISTANCE before it in the same problem and layer; first: same strongest; "
    "first_or_second: their two strongest meet (Mixtral's Table 5); shared: experts in common over K; 'shuffled': two "
    "tokens drawn "
    "from the whole dataset",
    "reuse.gap": "tokens since the expert was last used, within a problem and layer; cold: not used before in the problem; "
    "'shuffled': every token draws its experts from the layer's load",
    "reuse.between": "other experts that the tokens in between used (the LRU stack distance; all K experts are one access)",
    "reuse.working_set": f"distinct experts in {SEGMENT} tokens, over E. adjacent: selections of adjacent segments that are of "
    "the same expert; 'shuffled': of any two selections",
    "pairs.lift": "pairs of experts of one token, over those expected if no expert preferred another, with every expert in as "
    "many pairs (quasi-independence); 1 is no preference",
    "pairs.unique_sets": "different sets of K experts; even_sets: as many tokens, every set equally likely",
    "domains.distance": "Jensen-Shannon distance of two datasets' loads per layer; shuffled: labels permuted over problems",
    "specialisation": "share of an expert in a dataset over its share in all others, 95 % bootstrap interval over problems; "
    "found: experts whose interval is above 1; shuffled: the same with datasets permuted over problems",
    "tokens.lift": "how often an expert is selected for a token, over how often for any token",
    "clusters.silhouette": "of the number of clusters that gives most; shuffled: the most of three tables without structure",
    "weights": "routing weights as the model applies them, by rank; margin: K-th router logit minus the next",
    "predictability": "see 'context'; plug_in: judged on the tokens that were counted (too good); held_out: on the "
    "other half of "
    "the problems (too bad). set_bits: sum of the entropies of 'expert e is selected', an upper bound of that of the set",
}


@dataclass(frozen=True)
class Source:
    """What was analyzed. name: of the trace; caveats: what a reader of any number must know."""

    name: str
    metadata: Metadata
    caveats: tuple[str, ...]

    @classmethod
    def of(cls, trace: Trace, choice: Choice = EVERYTHING) -> Source:
        """The trace's own name, metadata and caveats, and what was left out of it."""
        left_out = [] if choice.without is None else [f"problems with {choice.without!r} are left out"]
        return cls(str(trace.path), trace.metadata, (*trace.caveats(), *left_out))


@dataclass(frozen=True)
class Statistics:
    """Results of `compute_statistics`.

    loads: by (dataset or "all", phase or "all"), those that have tokens. hops: one entry per distance of layers; probabilities:
    P(j at n+k | i at n), float32 `[H, L, E, E]`. repetitions: all, then by dataset. blocks: selections by problem, or block of
    problems, `[B, L * E]`. What a trace cannot have is None or empty.
    """

    source: Source
    axes: Axes
    tokens: int
    problems: int
    loads: dict[tuple[str, str], LoadStatistics]
    hops: list[HopStatistics]
    probabilities: Any
    repetitions: list[Repetition]
    table_5: list[Comparison]
    reuse: ReuseStatistics
    pairs: PairStatistics | None
    domains: list[DomainDistance]
    specializations: list[Specialization]
    liked: LikedTokens | None
    clusters: list[Clustering]
    weights: WeightStatistics | None
    margins: MarginStatistics | None
    rulers: list[Ruler]
    blocks: Blocks

    @property
    def load(self) -> LoadStatistics:
        """Of all tokens."""
        return self.loads[ALL, ALL]

    @property
    def datasets(self) -> list[str]:
        """Those that have tokens."""
        return [dataset for dataset, phase in self.loads if dataset != ALL and phase == ALL]

    def to_json(self) -> dict[str, Any]:
        """Everything but the matrices and pairs, with definitions and chance, as JSON values."""
        model = self.source.metadata.model
        first, either, shared = repetition_chance(model.num_experts, model.top_k)
        return {
            "trace": self.source.name,
            "model": model.model_dump(),
            "problems": self.problems,
            "tokens": self.tokens,
            "datasets": self.datasets,
            "caveats": list(self.source.caveats),
            "definitions": DEFINITIONS,
            "chance": {
                "top1": 1 / model.num_experts,
                "topk": model.top_k / model.num_experts,
                "repetition": {"first": first, "first_or_second": either, "shared": shared},
            },
            "load": [
                {"dataset": dataset, "phase": phase} | plain(load, skip=("counts_LE",))
                for (dataset, phase), load in self.loads.items()
            ],
            "transitions": [plain(hop) for hop in self.hops],
            "repetition": {"distances": DISTANCES, "results": [plain(each) for each in self.repetitions]},
            "mixtral_table_5": [plain(each) for each in self.table_5],
            "reuse": plain(self.reuse),
            "pairs": None if self.pairs is None else plain(self.pairs, skip=("counts_LEE", "lift_LEE")),
            "domains": [plain(each) for each in self.domains],
            "specialisation": [plain(each) for each in self.specializations],
            "clusters": [plain(each) for each in self.clusters],
            "weights": None if self.weights is None else {"at": QUANTILES} | plain(self.weights),
            "margins": None if self.margins is None else {"at": QUANTILES} | plain(self.margins),
            "predictability": {"contexts": [plain(each) for each in self.rulers], "tasks": TASKS},
        }


def compute_statistics(
    trace: Trace,
    *,
    hops: int | None = None,
    choice: Choice = EVERYTHING,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Statistics:
    """Read the trace once, on as many cores as there is memory for, and compute everything.

    hops: longest distance between layers; None for what memory allows, at most 8. seed: of the controls. Memory: the tables,
    which do not grow with the trace; see docs/analysis.md for what was measured. Raises `TraceError` on an empty trace,
    and if the tables would not fit.
    """
    counts = count_trace(trace, hops=hops, choice=choice, on_progress=on_progress)
    return make_statistics(counts, Source.of(trace, choice), seed=seed)


def make_statistics(counts: TraceCounts, source: Source, *, seed: int = 0) -> Statistics:
    """The statistics of what was counted, from one trace or merged from its parts. Raises `TraceError` if nothing was."""
    axes, load = counts.axes, counts.load
    tokens = int(load.tokens.sum())
    if tokens == 0:
        left = "" if axes.choice.without is None else f" of problems without {axes.choice.without!r}"
        raise TraceError(f"{source.name} has no routing rows{left}")
    repetitions = _repetitions(counts)
    pairs_NEE = counts.transitions.pairs[:, 0, : axes.layers - 1].sum(0, dtype=np.int64) if axes.hops else None
    return Statistics(
        source=source,
        axes=axes,
        tokens=tokens,
        problems=sum(counts.reuse.lengths.values()),
        loads=_loads(counts),
        hops=[hop_statistics(counts.transitions, hop, axes.top_k, seed) for hop in range(1, axes.hops + 1)],
        probabilities=_probabilities(counts),
        repetitions=repetitions,
        table_5=compare_with_table_5(repetitions, source.metadata.model),
        reuse=reuse_statistics(counts.reuse, load.counts.sum((0, 1)), tokens),
        pairs=pair_statistics(counts.pairs, axes.top_k, seed),
        domains=domain_distances(load.blocks, axes.datasets, seed),
        specializations=specialization(load.blocks, axes.datasets, seed),
        liked=liked_tokens(counts.contexts),
        clusters=cluster_experts(counts.pairs.together if axes.top_k > 1 else None, pairs_NEE, axes.layers, seed),
        weights=weight_statistics(counts.weights),
        margins=margin_statistics(counts.margins),
        rulers=rulers(counts.contexts, axes.top_k),
        blocks=flat_blocks(load.blocks, axes.datasets)[0],
    )


def _loads(counts: TraceCounts) -> dict[tuple[str, str], LoadStatistics]:
    load, axes = counts.load, counts.axes
    datasets = [*((name, [number]) for number, name in enumerate(axes.datasets))]
    phases = [*((name, [number]) for number, name in enumerate(PHASES))]
    everything = (ALL, list(range(len(axes.datasets)))), (ALL, list(range(len(PHASES))))
    made = {}
    for dataset, rows in [everything[0], *datasets]:
        for phase, columns in [everything[1], *phases]:
            at = np.ix_(rows, columns)
            tokens = int(load.tokens[at].sum())
            if tokens:
                mass = load.mass[at].sum((0, 1)) if axes.has_weights else None
                made[dataset, phase] = load_statistics(load.counts[at].sum((0, 1)), tokens, mass)
    return made


def _repetitions(counts: TraceCounts) -> list[Repetition]:
    axes, found = counts.axes, counts.repetition
    load, first = counts.load.counts.sum(1), found.first[:, :, : axes.num_experts]
    whole = [(ALL, list(range(len(axes.datasets))))]
    if np.count_nonzero(counts.load.tokens.sum(1)) > 1:
        whole += [(name, [number]) for number, name in enumerate(axes.datasets) if counts.load.tokens[number].any()]
    return [
        repetition(
            found.same[rows].sum(0),
            found.seen[rows].sum(0),
            first[rows].sum(0),
            load[rows].sum(0),
            counts.pairs.leading(rows),
            axes.top_k,
            name,
        )
        for name, rows in whole
    ]


def _probabilities(counts: TraceCounts) -> Any:
    """A hop at a time: in float64 all of them would be large."""
    pairs = counts.transitions.pairs
    made: Floats = np.zeros(pairs.shape[1:], dtype=np.float32)
    for hop in range(pairs.shape[1]):
        made[hop] = transition_probabilities(pairs[:, hop].sum(0, dtype=np.int64))
    return made


def show(value: float, digits: int = 3) -> str:
    """A number as text; a bias-corrected zero that comes out as -0.0001 is shown as 0.000, what is unknown as a dash."""
    return "-" if not np.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def mean(values: Floats) -> float:
    """Mean of what is known, `nan` if nothing is."""
    known = np.asarray(values)[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def plain(value: Any, skip: tuple[str, ...] = ()) -> Any:
    """Dataclasses, arrays and numbers as JSON values, rounded to what the counts support; `nan` becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.name not in skip}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value
