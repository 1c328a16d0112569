"""All statistics of one trace, computed from its counts, for `statistics.json`, the tables and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from analysis.counts.accumulator import Floats
from analysis.counts.counting import TraceCounts, count_trace
from analysis.counts.frames import PHASES
from analysis.counts.locality import DISTANCES, SEGMENT
from analysis.counts.survey import ALL, EVERYTHING, Axes, Choice
from analysis.documents.statistics import StatisticsDocument
from analysis.statistics.cache_sizes import CacheSizes, cache_sizes
from analysis.statistics.clusters import Clustering, cluster_experts
from analysis.statistics.contexts import TASKS, ContextStatistics, PreferredTokens, context_statistics, preferred_tokens
from analysis.statistics.domains import Blocks, DomainDistance, Specialization, domain_distances, flat_blocks, specialization
from analysis.statistics.flow import LayerFlow, layer_flows
from analysis.statistics.load import LoadStatistics, load_statistics
from analysis.statistics.locality import Repetition, ReuseStatistics, repetition, repetition_chance, reuse_statistics
from analysis.statistics.mixtral import Comparison, compare_with_table_5
from analysis.statistics.pairs import PairStatistics, pair_statistics
from analysis.statistics.transitions import HopStatistics, hop_statistics, transition_probabilities
from analysis.statistics.weights import QUANTILES, MarginStatistics, WeightStatistics, margin_statistics, weight_statistics
from analysis.statistics.working_set import WINDOWS, WorkingSet, working_set
from profiler.errors import TraceError
from profiler.trace.plausibility import doubts
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata

DEFINITIONS = {
    "load.share": "fraction of a layer's selections (top-K of every token) that went to an expert; mass_share: fraction of the "
    "sum of routing weights",
    "load.entropy_share": "entropy of the load divided by log2(E), 1 for even load; gini, cv (standard deviation divided by "
    "mean): 0 for even load",
    "transitions": "per hop, from each layer n to n+hop. conditional: counted and evaluated on the same tokens; held_out: "
    "counted on one half of the problems (split by hash of the prompt) and evaluated on the other, in both directions; "
    "shuffled: with the experts of the later layer permuted over the whole trace; marginal: by the layer's most frequent "
    "experts (popularity)",
    "transitions.top1": "accuracy of predicting the strongest expert at n+hop by the one most frequent after the strongest at "
    "n; chance 1/E",
    "transitions.topk": "fraction of the K experts at n+hop that are among the K most frequent after one of the experts at n; "
    "chance K/E",
    "transitions.information_bits": "mutual information of the strongest experts at n and n+hop, Miller-Madow corrected",
    "transitions.same_strongest": "share of tokens whose strongest expert has the same index at both layers; same_selected: "
    "fraction of the experts at n whose index is also selected at n+hop; independent: expected from the loads of both layers "
    "alone",
    "flow": "the strongest transitions from each layer to the next, by their share of all pairs of experts minus the share "
    "expected of independent layers; lift: one divided by the other; excess: their sum, excess_shuffled: of the strongest "
    "transitions with the experts of the later layer permuted over the whole trace",
    "repetition": "each token compared with the token a given distance before it in the same problem and layer. first: same "
    "strongest expert; first_or_second: their two strongest experts have one in common (Mixtral's Table 5); shared: experts in "
    "common divided by K; shuffled: for two tokens drawn at random from the dataset",
    "reuse.gap": "tokens since the expert was last used, within a problem and layer; cold: first use in the problem; "
    "shuffled: expected if every token drew its experts from the layer's load",
    "reuse.between": "number of other experts used by the tokens in between (the LRU stack distance; the K experts of a token "
    "are one access)",
    "reuse.working_set": f"distinct experts in {SEGMENT} tokens, divided by E. adjacent: probability that two selections, one "
    "from each of two adjacent segments, are of the same expert; shuffled: of any two selections",
    "cache_sizes": "share of the selected experts that a layer's cache of so many slots lacks. lru: empty at the beginning of "
    "each problem; the K experts of a token are used at the same time, and low and high are the bounds of any order of them; "
    "popular: the layer's most used experts of the whole trace, always kept",
    "working_set": "in the longest problem, distinct experts of a layer in the last so many tokens (windows), mean over "
    "layers; shuffled: expected if the same tokens came in random order",
    "pairs.lift": "number of tokens that use a pair of experts, divided by the number expected if no expert preferred another "
    "and every expert were in the same number of pairs (quasi-independence); 1 means no preference",
    "pairs.unique_sets": "number of distinct sets of K experts; even_sets: expected for the same number of tokens if every set "
    "were equally likely",
    "domains.distance": "Jensen-Shannon distance between the loads of two datasets per layer; shuffled: with dataset labels "
    "permuted over problems",
    "specialisation": "share of an expert in a dataset divided by its share in all others, with a 95 % bootstrap interval over "
    "problems; found: experts whose interval lies above 1; shuffled: the same with dataset labels permuted over problems",
    "tokens.lift": "how often an expert is selected for a token, divided by how often it is selected for any token",
    "clusters.silhouette": "largest mean silhouette over the numbers of clusters tried; shuffled: the largest of three tables "
    "without structure",
    "weights": "routing weights as the model applies them, by rank; margin: K-th largest router logit minus the next",
    "predictability": "how well each context predicts the experts. plug_in: evaluated on the tokens that were counted "
    "(optimistic); held_out: evaluated on the other half of the problems (pessimistic). set_bits: sum over experts of the "
    "entropy of 'the expert is selected', an upper bound of the entropy of the set",
}


@dataclass(frozen=True)
class Source:
    """What was analyzed. name: path of the trace; caveats: what a reader of any of the numbers must know."""

    name: str
    metadata: Metadata
    caveats: tuple[str, ...]

    @classmethod
    def of(cls, trace: Trace, choice: Choice = EVERYTHING) -> Source:
        """The trace's path, metadata and caveats, with a caveat on the problems that `choice` leaves out."""
        left_out = [] if choice.without is None else [f"problems with {choice.without!r} are left out"]
        return cls(str(trace.path), trace.metadata, (*trace.caveats(), *doubts(trace), *left_out))


@dataclass(frozen=True)
class Statistics:
    """The result of `compute_statistics`. A statistic that the trace has no data for is None or empty.

    Shapes: L MoE layers, E experts, K experts per token, H hops. Layers are MoE layers, counted from 0; `axes.moe_layers` has
    the decoder's own indices.

    Attributes:
        source: The trace's path, metadata and caveats.
        axes: What the rows and columns of the arrays stand for: layers, experts, datasets, vocabulary.
        tokens: Number of tokens analyzed.
        problems: Number of problems analyzed.
        loads: Expert load by (dataset or "all", phase or "all"), for each combination that has tokens.
        hops: Prediction across layers, one entry per distance 1..H between layers.
        flows: The strongest transitions from each layer to the next; empty without hops.
        probabilities: P(expert j at layer n+k | expert i at layer n), float32 `[H, L, E, E]`, indexed `[k-1, n, i, j]`.
        repetitions: Repetition of experts from token to token, for all datasets together, then for each dataset.
        table_5: Comparison with Table 5 of the Mixtral paper; empty for other models than Mixtral 8x7B.
        reuse: Gaps between the uses of an expert within a problem, in tokens.
        cache_sizes: Misses of every size of a cache for each layer.
        working_set: Experts that the last tokens of the longest problem used, over time; None if no problem is known.
        pairs: Experts used together by a token; None for K = 1 or too many experts.
        domains: Distance between the loads of each pair of datasets.
        specializations: Experts that each dataset prefers.
        preferred: Tokens that each expert prefers; None if the trace does not identify its tokens.
        clusters: Clusters of experts by layer, feature and method.
        weights: Routing weights by rank; None if they were not recorded.
        margins: Margins between router logits; None if logits were not recorded.
        contexts: How well simple contexts predict the experts.
        blocks: Selections by problem, or by block of problems, float32 `[B, L * E]`.
        blocks_of: The same for each dataset that has problems, as views of `blocks`.

    Example:
        >>> from profiler import Trace
        >>> statistics = compute_statistics(Trace.open("traces/math"))  # doctest: +SKIP
        >>> statistics.load.entropy_share  # evenness of each layer's load, 1 is even `[L]`  # doctest: +SKIP
        >>> statistics.hops[0].held_out_topk  # recall@K of the next layer from one expert `[L - 1]`  # doctest: +SKIP
    """

    source: Source
    axes: Axes
    tokens: int
    problems: int
    loads: dict[tuple[str, str], LoadStatistics]
    hops: list[HopStatistics]
    flows: list[LayerFlow]
    probabilities: Any
    repetitions: list[Repetition]
    table_5: list[Comparison]
    reuse: ReuseStatistics
    cache_sizes: CacheSizes
    working_set: WorkingSet | None
    pairs: PairStatistics | None
    domains: list[DomainDistance]
    specializations: list[Specialization]
    preferred: PreferredTokens | None
    clusters: list[Clustering]
    weights: WeightStatistics | None
    margins: MarginStatistics | None
    contexts: list[ContextStatistics]
    blocks: Blocks
    blocks_of: dict[str, Blocks]

    @property
    def load(self) -> LoadStatistics:
        """Expert load over all tokens."""
        return self.loads[ALL, ALL]

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets that have tokens."""
        return [dataset for dataset, phase in self.loads if dataset != ALL and phase == ALL]

    def to_document(self) -> StatisticsDocument:
        """The content of `statistics.json`: everything but transition matrices, pairs, preferred tokens and `blocks`.

        Returns:
            The document, with the definition of each statistic and its value by chance. Numbers are rounded to six digits;
            `nan` and infinity are None.
        """
        model = self.source.metadata.model
        first, either, shared = repetition_chance(model.num_experts, model.top_k)
        content = {
            "trace": self.source.name,
            "model": model,
            "problems": self.problems,
            "tokens": self.tokens,
            "datasets": self.datasets,
            "caveats": self.source.caveats,
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
            "transitions": plain(self.hops),
            "flow": plain(self.flows),
            "repetition": {"distances": DISTANCES, "results": plain(self.repetitions)},
            "mixtral_table_5": plain(self.table_5),
            "reuse": plain(self.reuse),
            "cache_sizes": plain(self.cache_sizes),
            "working_set": None if self.working_set is None else {"windows": WINDOWS} | plain(self.working_set),
            "pairs": None if self.pairs is None else plain(self.pairs, skip=("counts_LEE", "lift_LEE")),
            "domains": plain(self.domains),
            "specialisation": plain(self.specializations),
            "clusters": plain(self.clusters),
            "weights": None if self.weights is None else {"at": QUANTILES} | plain(self.weights),
            "margins": None if self.margins is None else {"at": QUANTILES} | plain(self.margins),
            "predictability": {"contexts": plain(self.contexts), "tasks": TASKS},
        }
        return StatisticsDocument.model_validate(content)


def compute_statistics(
    trace: Trace,
    *,
    hops: int | None = None,
    choice: Choice = EVERYTHING,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Statistics:
    """Count a trace (`count_trace`) and compute all statistics from the counts.

    The trace is read once, on as many cores as memory allows. Memory use does not grow with the trace;
    docs/results/analysis.md lists measurements.

    Args:
        trace: The trace to analyze.
        hops: Longest distance between layers, in MoE layers; L - 1 at most. None for as many as memory allows, up to 8.
        choice: Which problems to analyze, and the column of `problems.parquet` whose values are the domains.
        seed: Seed of the shuffled controls, bootstrap intervals and clusterings.
        on_progress: Called with the number of tokens counted since the last call, from one thread at a time.

    Returns:
        The statistics of the trace.

    Raises:
        TraceError: The trace has no routing rows, its files break the format, a column that `choice` names is missing, or the
            tables for this many hops would not fit into memory.

    Example:
        >>> from profiler import Trace
        >>> statistics = compute_statistics(Trace.open("traces/math"), hops=2)  # doctest: +SKIP
        >>> statistics.tokens, statistics.load.entropy_share.mean()  # doctest: +SKIP
    """
    counts = count_trace(trace, hops=hops, choice=choice, on_progress=on_progress)
    return make_statistics(counts, Source.of(trace, choice), seed=seed)


def make_statistics(counts: TraceCounts, source: Source, *, seed: int = 0) -> Statistics:
    """Statistics from the counts of one trace, or from the merged counts of its parts.

    Raises `TraceError` if no tokens were counted.
    """
    axes, load = counts.axes, counts.load
    tokens = int(load.tokens.sum())
    if tokens == 0:
        left = "" if axes.choice.without is None else f" of problems without {axes.choice.without!r}"
        raise TraceError(f"{source.name} has no routing rows{left}")
    # The tables are small: threads of BLAS and OpenMP would wait for each other, busily, for longer than they compute.
    with threadpool_limits(1):
        return _statistics_of(counts, source, tokens, seed)


def _statistics_of(counts: TraceCounts, source: Source, tokens: int, seed: int) -> Statistics:
    axes, load = counts.axes, counts.load
    repetitions = _repetitions(counts)
    hops = [hop_statistics(counts.transitions, hop, axes.top_k, seed) for hop in range(1, axes.hops + 1)]
    if not axes.knows_strongest:
        repetitions = [each.without_strongest(axes.top_k) for each in repetitions]
        hops = [each.without_strongest() for each in hops]
    pairs_NEE = counts.transitions.pairs[:, 0, : axes.layers - 1].sum(0, dtype=np.int64) if axes.hops else None
    loads = _loads(counts)
    blocks, blocks_of = flat_blocks(load.blocks, axes.datasets)
    reuse = reuse_statistics(counts.reuse, load.counts.sum((0, 1)), tokens)
    return Statistics(
        source=source,
        axes=axes,
        tokens=tokens,
        problems=sum(counts.reuse.lengths.values()),
        loads=loads,
        hops=hops,
        flows=[] if pairs_NEE is None else layer_flows(pairs_NEE, seed),
        probabilities=_probabilities(counts),
        repetitions=repetitions,
        table_5=compare_with_table_5(repetitions, source.metadata.model) if axes.knows_strongest else [],
        reuse=reuse,
        cache_sizes=cache_sizes(reuse, loads[ALL, ALL], axes.top_k),
        working_set=working_set(counts.longest.route, axes.num_experts),
        pairs=pair_statistics(counts.pairs, axes.top_k, seed),
        domains=domain_distances(load.blocks, axes.datasets, seed),
        specializations=specialization(load.blocks, axes.datasets, seed),
        preferred=preferred_tokens(counts.contexts),
        clusters=cluster_experts(counts.pairs.together if axes.top_k > 1 else None, pairs_NEE, axes.layers, seed),
        weights=weight_statistics(counts.weights),
        margins=margin_statistics(counts.margins),
        contexts=context_statistics(counts.contexts, axes.top_k, knows_strongest=axes.knows_strongest),
        blocks=blocks,
        blocks_of=blocks_of,
    )


def _loads(counts: TraceCounts) -> dict[tuple[str, str], LoadStatistics]:
    load, axes = counts.load, counts.axes
    datasets = [*((name, [number]) for number, name in enumerate(axes.datasets))]
    phases = [*((name, [number]) for number, name in enumerate(PHASES))]
    everything = (ALL, list(range(len(axes.datasets)))), (ALL, list(range(len(PHASES))))
    loads = {}
    for dataset, rows in [everything[0], *datasets]:
        for phase, columns in [everything[1], *phases]:
            at = np.ix_(rows, columns)
            tokens = int(load.tokens[at].sum())
            if tokens:
                mass = load.mass[at].sum((0, 1)) if axes.has_weights else None
                loads[dataset, phase] = load_statistics(load.counts[at].sum((0, 1)), tokens, mass)
    return loads


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
    """Transition probabilities `[H, L, E, E]`, computed one hop at a time: in float64 those of all hops would be large."""
    pairs = counts.transitions.pairs
    probabilities: Floats = np.zeros(pairs.shape[1:], dtype=np.float32)
    for hop in range(pairs.shape[1]):
        probabilities[hop] = transition_probabilities(pairs[:, hop].sum(0, dtype=np.int64))
    return probabilities


def show(value: float, digits: int = 3) -> str:
    """A number as text; a bias-corrected zero such as -0.0001 is shown as 0.000, an unknown value as a dash."""
    return "-" if not np.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def mean(values: Floats) -> float:
    """Mean of the finite values; `nan` if no value is finite."""
    known = np.asarray(values)[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def plain(value: Any, skip: tuple[str, ...] = ()) -> Any:
    """Dataclasses, arrays and numbers as JSON values, rounded to six digits; `nan` and infinity become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.name not in skip}
    if isinstance(value, np.ndarray):
        return _plain_array(value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value


def _plain_array(values: np.ndarray[Any, Any]) -> Any:
    """`plain` of an array, without a call for each of its numbers."""
    if not np.issubdtype(values.dtype, np.floating):
        return values.tolist()
    rounded = np.empty(values.size, dtype=object)
    rounded[:] = [round(value, 6) for value in values.ravel().tolist()]
    rounded[~np.isfinite(values.ravel())] = None
    return rounded.reshape(values.shape).tolist()
