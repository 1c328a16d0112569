"""How much of the gap between `lru` and Belady's optimum a policy captures, with an interval over problems."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from speculation.offload.simulation.simulate import Setting, SimulationResult, Workload, simulate
from speculation.offload.state import Rule

RESAMPLES = 1000


class Gap:
    """The hits of `lru` and of Belady's policy with one cache, without prefetching.

    Args:
        workload: The requests.
        capacity: Experts in each layer's cache, or in the one cache.
        is_global: Whether one cache serves all layers.
        slots: Experts in the cache of each layer, if they differ.
    """

    def __init__(self, workload: Workload, capacity: int, is_global: bool, slots: tuple[int, ...] | None = None) -> None:
        self._requests = workload.requests
        lru, best = (simulate(workload, Setting(rule, capacity, is_global, slots=slots)) for rule in (Rule.LRU, Rule.BELADY))
        self._lru_P, self._best_P = self._by_problem(lru), self._by_problem(best)

    def captured(self, result: SimulationResult) -> tuple[float | None, float | None, float | None]:
        """The share of the gap that a policy captures, and its 95 % interval.

        The hits of generated tokens count. Belady's policy is the best for these and for prompts together, so that with prompts
        a policy can capture a little more than all. None if Belady's does not hit more often than `lru`. The interval is None
        if a step has tokens of several problems, with one problem, or if Belady's gains nothing in some of the resamples.
        """
        lru_P, best_P, own_P = self._lru_P, self._best_P, self._by_problem(result)
        if best_P.sum() <= lru_P.sum():
            return None, None, None
        captured = float((own_P.sum() - lru_P.sum()) / (best_P.sum() - lru_P.sum()))
        if len(own_P) < 2:
            return captured, None, None
        chosen = np.random.default_rng(0).integers(len(own_P), size=(RESAMPLES, len(own_P)))
        gap_N, own_N = ((of_P - lru_P)[chosen].sum(1) for of_P in (best_P, own_P))
        if (gap_N <= 0).any():
            return captured, None, None
        low, high = np.quantile(own_N / gap_N, [0.025, 0.975])
        return captured, float(low), float(high)

    def _by_problem(self, result: SimulationResult) -> npt.NDArray[np.int64]:
        """Hits of generated tokens by problem `[P]`; all in one if steps have tokens of several problems."""
        requests = self._requests
        hits_S, problem_S = result.hits_S[requests.is_decode_S], requests.problem_S[requests.is_decode_S]
        if (problem_S < 0).any():
            return np.array([hits_S.sum()])
        found_P, index_S = np.unique(problem_S, return_inverse=True)
        return np.bincount(index_S, hits_S, len(found_P)).astype(np.int64)
