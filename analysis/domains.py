"""Do domains (datasets) use different experts? Distances between their loads, against permuted labels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from analysis.load import Counts, Floats, count_experts, entropy
from profiler.schema import RoutingChunk

PERMUTATIONS = 20


class ProblemLoad:
    """Expert selections per problem, `[L, E]` each: what domain comparison and its control are made of."""

    def __init__(self, num_experts: int) -> None:
        self.counts: dict[int, Counts] = {}
        self._num_experts = num_experts

    def update(self, chunk: RoutingChunk) -> None:
        """Count one chunk of whole problems."""
        starts = np.flatnonzero(np.diff(chunk.problem_ids_T, prepend=chunk.problem_ids_T[0] - 1))
        for start, end in zip(starts, [*starts[1:], len(chunk)], strict=True):
            problem_id = int(chunk.problem_ids_T[start])
            self.counts[problem_id] = count_experts(chunk.expert_ids_TLK[start:end], self._num_experts)


@dataclass(frozen=True)
class DomainDistance:
    """Jensen-Shannon distance per MoE layer `[L]` between two datasets (0 equal, 1 disjoint; square root of bits).

    shuffled: mean over permutations of the datasets' labels over the problems of both; what differing problems alone cause.
    """

    first: str
    second: str
    distance: Floats
    shuffled: Floats


def domain_distances(load: ProblemLoad, dataset_of: dict[int, str], seed: int = 0) -> list[DomainDistance]:
    """Distances of every two datasets, in order of their names. `dataset_of`: problem id -> dataset."""
    problem_ids = sorted(load.counts)
    counts_PLE = np.stack([load.counts[problem_id] for problem_id in problem_ids])
    labels_P = np.array([dataset_of[problem_id] for problem_id in problem_ids])
    random = np.random.default_rng(seed)
    distances = []
    for first, second in combinations(sorted(set(labels_P.tolist())), 2):
        either_P = (labels_P == first) | (labels_P == second)
        counts, is_first = counts_PLE[either_P], labels_P[either_P] == first
        permuted = [_distance(counts, random.permutation(is_first)) for _ in range(PERMUTATIONS)]
        distances.append(DomainDistance(first, second, _distance(counts, is_first), np.mean(permuted, axis=0)))
    return distances


def jensen_shannon_distance(p: Floats, q: Floats) -> Floats:
    """Square root of the Jensen-Shannon divergence in bits (Endres and Schindelin, 2003), along the last axis."""
    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return np.asarray(np.sqrt(np.maximum(divergence, 0)))


def _distance(counts_PLE: Counts, is_first_P: npt.NDArray[np.bool_]) -> Floats:
    first_LE, second_LE = counts_PLE[is_first_P].sum(0), counts_PLE[~is_first_P].sum(0)
    return jensen_shannon_distance(first_LE / first_LE.sum(1, keepdims=True), second_LE / second_LE.sum(1, keepdims=True))
