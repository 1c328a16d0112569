"""Play eviction policies on the last scored requests, one after the other, as `specmoe simulate` does with one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.offload.policy_scores import scores_by_step
from speculation.offload.requests import requests_of
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule
from speculation.shadow.scoring import ScoredRequest, joined


@dataclass(frozen=True)
class Played:
    """One policy with one cache size.

    hit_rate: share of the experts chosen for generated tokens that were cached. gap: share of the gap between `lru` and
    `belady` that the policy captures; None where both hit equally often.
    """

    policy: str
    slots: int
    hit_rate: float
    gap: float | None


def rules_of(names: Sequence[str], learned: str | None) -> dict[str, Rule]:
    """The policies by name: `lru` and `belady` always, those of `names`, and the run's own if it is one of reuse.

    Raises:
        SpecmoeError: A name is unknown.
    """
    known = {rule.label: rule for rule in Rule if rule != Rule.LEARNED}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SpecmoeError(f"unknown eviction policy {unknown[0]!r}: expected one of {', '.join(known)}")
    rules: dict[str, Rule] = {name: known[name] for name in dict.fromkeys([Rule.LRU.label, *names, Rule.BELADY.label])}
    return rules if learned is None else {**rules, learned: Rule.LEARNED}


def usual_slots(num_experts: int, top_k: int) -> tuple[int, ...]:
    """A quarter and a half of the experts of a layer, but room for those of a token."""
    return tuple(sorted({max(top_k, num_experts // 4), max(top_k, num_experts // 2)}))


def play_policies(
    window: Sequence[ScoredRequest],
    popularity_LE: npt.NDArray[np.floating[Any]],
    rules: dict[str, Rule],
    slots: Sequence[int],
) -> list[Played]:
    """Play every policy with every cache size. Each layer has its own cache, which starts with its most popular experts.

    Args:
        window: The requests, each of which follows the one before it.
        popularity_LE: How often each expert is used in the run's training problems.
        rules: Policies by name, with `lru` and `belady`.
        slots: Cache sizes, in experts per layer.

    Returns:
        Nothing if no token of the window was generated.
    """
    routes = joined([each.routes for each in window])
    if not routes.is_decode_T.any():
        return []
    requests = requests_of(routes, popularity_LE.shape[1])
    workload = Workload(requests, popularity_LE)
    scores = [each.scores_TX for each in window if each.scores_TX is not None]
    scores_SX = scores_by_step(np.concatenate(scores), requests) if scores else None
    found = []
    for size in slots:
        results = {
            name: simulate(workload, Setting(rule, size), scores_SX=scores_SX if rule == Rule.LEARNED else None)
            for name, rule in rules.items()
        }
        hits = {name: result.total(Count.HIT) for name, result in results.items()}
        lru, best = hits[Rule.LRU.label], hits[Rule.BELADY.label]
        found += [
            Played(name, size, result.hit_rate, (hits[name] - lru) / (best - lru) if best > lru else None)
            for name, result in results.items()
        ]
    return found
