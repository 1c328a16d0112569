"""All statistics of one trace in one pass, as plain values for `statistics.json` and the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from analysis.domains import DomainDistance, ProblemLoad, domain_distances
from analysis.load import Counts, LoadStatistics, count_experts, load_statistics
from analysis.transitions import HopStatistics, TransitionCounts, hop_statistics, transition_probabilities
from profiler.errors import TraceError
from profiler.reader import Trace

# 3 GB of counts and probabilities; 60 layers of 256 experts reach it at 30 hops.
MAX_TRANSITION_COUNTS = 120_000_000

DEFINITIONS = {
    "load.share": "fraction of a layer's selections (top-K of every token) that went to an expert",
    "load.entropy_share": "entropy of the load over log2(E); 1 is even load",
    "transitions.probabilities": "P(j at layer n+hop | i at layer n) over all K x K pairs of a token; in transitions.npz",
    "transitions.information_bits": "mutual information of the strongest experts at n and n+hop, Miller-Madow corrected",
    "transitions.information_shuffled_bits": "the same with tokens permuted at n+hop: the control",
    "transitions.conditional_top1": "share of tokens whose strongest expert at n+hop is the most frequent one given the "
    "strongest at n; counted and judged on the same tokens. marginal_top1: without knowing n. Chance is 1/E",
    "domains.distance": "Jensen-Shannon distance of two datasets' loads per layer; shuffled: labels permuted over problems",
}


@dataclass(frozen=True)
class Statistics:
    """Results of `compute_statistics`; `transitions` has one entry per hop, `probabilities` is `[H, L, E, E]`."""

    trace: Trace
    tokens: int
    problems: int
    load: LoadStatistics
    load_by_dataset: dict[str, LoadStatistics]
    transitions: list[HopStatistics]
    probabilities: Any
    domains: list[DomainDistance]

    def to_json(self) -> dict[str, Any]:
        """Everything but the transition matrices, with definitions, as JSON values."""
        model = self.trace.metadata.model
        return {
            "trace": str(self.trace.path),
            "model": model.model_dump(),
            "problems": self.problems,
            "tokens": self.tokens,
            "chance": {"top1": 1 / model.num_experts, "recall_at_k": model.top_k / model.num_experts},
            "definitions": DEFINITIONS,
            "caveats": self.trace.caveats(),
            "load": _plain(self.load),
            "load_by_dataset": {name: _plain(load) for name, load in self.load_by_dataset.items()},
            "transitions": [_plain(hop) for hop in self.transitions],
            "domains": [_plain(domain) for domain in self.domains],
        }


def compute_statistics(trace: Trace, *, hops: int, seed: int = 0) -> Statistics:
    """Read the trace once, chunk by chunk, and compute everything.

    hops: longest hop, at most L - 1. Memory: the counts, one chunk, and the strongest experts (1 or 2 bytes per token and
    layer). Raises `TraceError` on an empty trace, and if the counts would not fit.
    """
    model = trace.metadata.model
    layers = len(model.moe_layers)
    hops = min(hops, layers - 1)
    if hops * layers * model.num_experts**2 > MAX_TRANSITION_COUNTS:
        raise TraceError(
            f"{trace.path}: {hops} hops over {layers} layers of {model.num_experts} experts need more than "
            f"{MAX_TRANSITION_COUNTS:,} counts; choose fewer --hops"
        )
    transitions = TransitionCounts(layers, model.num_experts, hops)
    by_problem = ProblemLoad(model.num_experts)
    counts_LE: Counts = np.zeros((layers, model.num_experts), dtype=np.int64)
    for chunk in trace.chunks():
        counts_LE += count_experts(chunk.expert_ids_TLK, model.num_experts)
        transitions.update(chunk)
        by_problem.update(chunk)
    if transitions.tokens == 0:
        raise TraceError(f"{trace.path} has no routing rows")
    dataset_of = datasets_by_problem(trace, by_problem.counts)
    names = sorted({dataset_of[problem_id] for problem_id in by_problem.counts})
    per_dataset = {
        name: np.sum([c for problem_id, c in by_problem.counts.items() if dataset_of[problem_id] == name], axis=0)
        for name in names
    }
    return Statistics(
        trace=trace,
        tokens=transitions.tokens,
        problems=len(by_problem.counts),
        load=load_statistics(counts_LE),
        load_by_dataset={name: load_statistics(counts) for name, counts in per_dataset.items()},
        transitions=[hop_statistics(transitions, hop, seed) for hop in range(1, transitions.pairs.shape[0] + 1)],
        probabilities=transition_probabilities(transitions.pairs),
        domains=domain_distances(by_problem, dataset_of, seed),
    )


def datasets_by_problem(trace: Trace, problem_ids: Iterable[int]) -> dict[int, str]:
    """Dataset of each of `problem_ids`. A trace that was converted without prompts counts as one dataset."""
    if not trace.has_problems:
        return dict.fromkeys(problem_ids, "all problems")
    columns = trace.problems.select(["problem_id", "dataset"]).to_pydict()
    dataset_of = dict(zip(columns["problem_id"], columns["dataset"], strict=True))
    for problem_id in problem_ids:
        if problem_id not in dataset_of:
            raise TraceError(f"{trace.path}: routing rows of problem {problem_id}, which problems.parquet does not list")
    return dataset_of


def plain_zero(value: float) -> str:
    """Three decimals; a bias-corrected zero that comes out as -0.0001 is shown as 0.000."""
    return f"{round(value, 3) + 0.0:.3f}"


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass of arrays as lists, rounded to what the counts support."""
    plain: dict[str, Any] = {}
    for field in fields(value):
        entry = getattr(value, field.name)
        plain[field.name] = np.round(entry, 6).tolist() if isinstance(entry, np.ndarray) else entry
    return plain
