"""Simulate a cache of experts on a trace: hit rates, transfers and, if costs are known, tokens per second."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError, UsageError
from speculation.offload.costs import Costs
from speculation.offload.plans import PrefetchPlan, no_plan
from speculation.offload.requests import Requests
from speculation.offload.simulation.event_loop import play, uses_ahead
from speculation.offload.simulation.host_memory import ram_records
from speculation.offload.simulation.records import (
    ALL,
    CLOCK,
    LINE,
    MAX_REQUESTS,
    POOL,
    QUEUED_PREFETCH,
    Count,
    Limits,
    Miss,
    StepInputs,
    StepResults,
    Tiers,
)
from speculation.offload.state import TIME_CONSTANT, Rule, expert_records

# Each expert of a request needs its own place in the event loop's order of uses.
MAX_EXPERTS = 4096
QUEUE = 64
Numbers = TypeVar("Numbers", Limits, Tiers)


@dataclass(frozen=True)
class Setting:
    """The cache to simulate.

    Attributes:
        policy: Which expert a full cache evicts.
        capacity: Experts in the cache of each layer, or in the one cache for all layers.
        is_global: Whether one cache serves all layers.
        queue: Prefetches that may wait for the interconnect.
        predict_seconds: Time from the routing of a layer to the prediction made with it.
        slots: Experts in the cache of each layer, L numbers, if they differ; then `capacity` is their mean, rounded down.
        time_constant: Steps over which `ewma` and `lfu-aged` forget: with one sequence, tokens.
        policy_seconds: Time in which the policy chooses what to evict, per request with a miss. The transfer waits for it.
        score_seconds: Time in which the predictor of `learned` scores the experts of one layer, for one sequence. A thread of
            its own scores all layers from the start of a step; until it is done, the scores before hold.
        miss: What happens to a chosen expert that the cache lacks.
        ram: Experts that host memory holds, of all layers together; the others are on storage. None: all.
        draft_seconds: Time in which a draft model drafts the tokens of one step.
    """

    policy: Rule
    capacity: int
    is_global: bool = False
    queue: int = QUEUE
    predict_seconds: float = 0.0
    slots: tuple[int, ...] | None = None
    time_constant: float = TIME_CONSTANT
    policy_seconds: float = 0.0
    score_seconds: float = 0.0
    miss: Miss = Miss.COPY
    ram: int | None = None
    draft_seconds: float = 0.0


@dataclass(frozen=True)
class SimulationResult:
    """The result of `simulate`.

    Attributes:
        counts_LC: Events per layer while tokens were generated, `[L, len(Count)]`.
        prefill_counts_LC: The same for prompts.
        hits_S: Experts that were in the cache in each step, prompts included.
        outcomes_N: `HIT`, `LATE` or `DEMAND` for each entry of `Requests.experts_N`; empty unless requested.
        decode_seconds, prefill_seconds: Total time; zero without costs.
        decode_stall: Time in which the computation waited for transfers while tokens were generated.
    """

    setting: Setting
    counts_LC: npt.NDArray[np.int64]
    prefill_counts_LC: npt.NDArray[np.int64]
    hits_S: npt.NDArray[np.int64]
    outcomes_N: npt.NDArray[np.uint8]
    decode_tokens: int
    decode_seconds: float
    decode_stall: float
    prefill_tokens: int
    prefill_seconds: float

    def total(self, what: Count) -> int:
        """Sum a count over all layers, for generated tokens."""
        return int(self.counts_LC[:, what].sum())

    @property
    def hit_rate(self) -> float:
        """Share of the experts chosen for generated tokens that were in the cache."""
        return self.total(Count.HIT) / max(1, self.total(Count.REQUESTED))

    @property
    def prefill_hit_rate(self) -> float | None:
        """The same for prompts; None if there are none."""
        requested = int(self.prefill_counts_LC[:, Count.REQUESTED].sum())
        return int(self.prefill_counts_LC[:, Count.HIT].sum()) / requested if requested else None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding; 0 if it never ends, None without costs."""
        return _rate(self.decode_tokens, self.decode_seconds)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Speed of prefill, as above."""
        return _rate(self.prefill_tokens, self.prefill_seconds)


@dataclass(frozen=True)
class Workload:
    """Requests, with each expert's popularity in the training problems `[L, E]`.

    Raises `SpecmoeError` if there are more experts per layer, or more requests, than the simulation supports.
    """

    requests: Requests
    popularity_LE: npt.NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        if self.requests.num_experts > MAX_EXPERTS:
            raise SpecmoeError(
                f"{self.requests.num_experts:,} experts per layer: caches of up to {MAX_EXPERTS:,} are simulated"
            )
        if len(self.requests.starts_R) > MAX_REQUESTS:
            raise SpecmoeError(f"{len(self.requests.starts_R):,} requests: up to {MAX_REQUESTS:,} are simulated")

    @cached_property
    def ahead(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The request that chooses each expert next: see `uses_ahead`."""
        requests = self.requests
        next_use, first_use = uses_ahead(requests.experts_N, requests.starts_R, requests.layers, requests.num_experts)
        return next_use, first_use

    @cached_property
    def popularity(self) -> npt.NDArray[np.int64]:
        """Ranks of all experts `[L * E]`, the most popular highest; among equals the lowest number is highest."""
        flat = np.asarray(self.popularity_LE, dtype=np.float64).reshape(-1)
        ranks = np.empty(len(flat), dtype=np.int64)
        ranks[np.lexsort((-np.arange(len(flat)), flat))] = np.arange(len(flat))
        return ranks


def simulate(
    workload: Workload,
    setting: Setting,
    plan: PrefetchPlan | None = None,
    costs: Costs | None = None,
    scores_SX: npt.NDArray[np.float32] | None = None,
    *,
    with_outcomes: bool = False,
) -> SimulationResult:
    """Play the requests against a cache that is filled at first with the most popular experts.

    A layer's experts are one request: none of them is evicted for another. An expert for which the cache has no room is loaded
    for this request and not kept. Demand loads go before queued prefetches, but do not interrupt one that has begun.

    Args:
        workload: The requests.
        setting: The cache.
        plan: What to prefetch, and when; default: nothing.
        costs: Default: transfers and computation take no time.
        scores_SX: For `Rule.LEARNED`: the worth of every expert in each step, 0 to 1, float32 `[S, L * E]`.
        with_outcomes: Also record what happened to each requested expert.

    Raises:
        SpecmoeError: A capacity is negative, the queue has no room, a time constant is not positive, scores are missing, or the
            costs lack those of a host or of storage.
    """
    requests = workload.requests
    capacities = _capacities(setting, requests)
    if setting.queue < 1 or not 0 < setting.time_constant < inf:
        raise UsageError(f"queue {setting.queue}, time constant {setting.time_constant}: expected at least 1, and above 0")
    size = (requests.steps, requests.layers * requests.num_experts)
    if setting.policy == Rule.LEARNED and (scores_SX is None or scores_SX.shape != size):
        raise SpecmoeError(f"the policy learned needs the scores of {size[1]} experts in {size[0]} steps")
    _check_costs(setting, costs)
    tiers = _tiers(setting, costs)
    if tiers is not None and plan is None:
        plan = no_plan(requests)
    elif tiers is None and plan is not None and not len(plan.experts_N):
        plan = None
    next_use_N, first_use = workload.ahead
    pools = _pools(capacities, requests)
    slots = int(pools["capacity"].sum())
    counts_KLC = np.zeros((2, requests.layers, len(Count)), dtype=np.int64)
    found = StepResults(
        hits=np.zeros(requests.steps, dtype=np.int64),
        ends=np.zeros(requests.steps),
        stalls=np.zeros(requests.steps),
        outcomes=np.zeros(len(requests.experts_N) if with_outcomes else 0, dtype=np.uint8),
    )
    play(
        requests.experts_N,
        requests.starts_R,
        next_use_N,
        _steps(requests, setting, costs),
        plan,
        np.zeros((0, 0), dtype=np.float32) if scores_SX is None else scores_SX,
        _limits(requests, setting, costs),
        tiers,
        workload.popularity,
        _most_popular(workload, len(pools)),
        expert_records(first_use),
        np.zeros(slots, dtype=np.int64),
        np.zeros(slots, dtype=np.int64),
        pools,
        _memory(workload, setting, capacities),
        np.zeros(requests.num_experts, dtype=np.bool_),
        np.zeros(3 * setting.queue, dtype=QUEUED_PREFETCH),
        _lines(setting.queue),
        np.zeros(1, dtype=CLOCK),
        counts_KLC,
        found,
    )
    ends_S = found.ends
    is_endless = not np.isfinite(ends_S[-1:]).all()
    spans_S = np.diff(ends_S, prepend=0.0) if not is_endless else np.full(requests.steps, np.inf)
    is_decode_S = requests.is_decode_S
    return SimulationResult(
        setting,
        counts_LC=counts_KLC[1],
        prefill_counts_LC=counts_KLC[0],
        hits_S=found.hits,
        outcomes_N=found.outcomes,
        decode_tokens=int(requests.kept_S[is_decode_S].sum()),
        decode_seconds=float(spans_S[is_decode_S].sum()),
        decode_stall=float(np.inf if is_endless else found.stalls[is_decode_S].sum()),
        prefill_tokens=int(requests.tokens_S[~is_decode_S].sum()),
        prefill_seconds=float(spans_S[~is_decode_S].sum()),
    )


def _check_costs(setting: Setting, costs: Costs | None) -> None:
    if costs is None and (setting.miss != Miss.COPY or setting.ram is not None):
        raise SpecmoeError(
            "the time that a host or storage takes depends on the size of an expert, which is not known: name a model of "
            "known sizes (see 'specmoe models')"
        )
    if setting.miss != Miss.COPY and (costs is None or costs.host_expert_seconds is None):
        raise SpecmoeError("experts cannot be computed on the host: the costs do not say how long that takes; choose a host")
    if costs is not None and costs.computes_on_arrival and (setting.miss != Miss.COPY or setting.ram is not None):
        raise SpecmoeError("experts that are computed as each arrives are simulated without a host and storage only")
    if setting.ram is None:
        return
    if setting.ram < 0:
        raise SpecmoeError(f"room for {setting.ram} experts in host memory: expected at least 0")
    if costs is None or costs.storage_seconds is None:
        raise SpecmoeError("experts cannot be on storage: the costs do not say how long a read takes; choose a storage")


def _steps(requests: Requests, setting: Setting, costs: Costs | None) -> StepInputs:
    tokens_S = requests.tokens_S.astype(np.float64)
    layer_seconds = expert_floor = host_floor = np.zeros(requests.steps)
    if costs is not None:
        layer_seconds = np.maximum(costs.layer_seconds, tokens_S * costs.layer_token_seconds)
        expert_floor = tokens_S * costs.token_seconds
        host_floor = tokens_S * requests.top_k * costs.host_token_seconds
    return StepInputs(
        is_decode=requests.is_decode_S,
        # At most one token of a prompt's piece, the last, makes predictions.
        asking=np.where(requests.is_decode_S, requests.sequences_S, 1),
        draft_seconds=np.where(requests.is_decode_S, 0.0 if costs is None else setting.draft_seconds, 0.0),
        layer_seconds=layer_seconds,
        expert_floor=expert_floor,
        host_floor=host_floor,
    )


def _limits(requests: Requests, setting: Setting, costs: Costs | None) -> Limits:
    return _with_floats(
        Limits(
            rule=int(setting.policy),
            layers=requests.layers,
            num_experts=requests.num_experts,
            is_global=setting.is_global,
            copy_seconds=0.0 if costs is None else costs.copy_seconds,
            expert_seconds=0.0 if costs is None else costs.expert_seconds,
            predict_seconds=0.0 if costs is None else setting.predict_seconds,
            policy_seconds=0.0 if costs is None else setting.policy_seconds,
            score_seconds=0.0 if costs is None else setting.score_seconds,
            time_constant=setting.time_constant,
            computes_on_arrival=costs is not None and costs.computes_on_arrival,
        )
    )


def _tiers(setting: Setting, costs: Costs | None) -> Tiers | None:
    if setting.miss == Miss.COPY and setting.ram is None:
        return None
    return _with_floats(
        Tiers(
            miss=int(setting.miss),
            host_seconds=0.0 if costs is None else costs.host_expert_seconds or 0.0,
            host_latency=0.0 if costs is None else costs.host_latency,
            ram=ALL if setting.ram is None else setting.ram,
            storage_seconds=0.0 if costs is None else costs.storage_seconds or 0.0,
        )
    )


def _with_floats(numbers: Numbers) -> Numbers:
    """The same, with floats where whole numbers stand for them: numba would compile the whole loop again for each mixture."""
    kinds = typing.get_type_hints(type(numbers))
    floats: dict[str, Any] = {name: float(getattr(numbers, name)) for name, kind in kinds.items() if kind is float}
    return numbers._replace(**floats)


def _pools(capacities: npt.NDArray[np.int64], requests: Requests) -> npt.NDArray[np.void]:
    """Records of caches, none of which has more slots than there are experts for it."""
    pools = np.zeros(len(capacities), dtype=POOL)
    pools["capacity"] = np.minimum(capacities, requests.layers * requests.num_experts // len(capacities))
    pools["first"] = np.cumsum(pools["capacity"]) - pools["capacity"]
    return pools


def _lines(queue: int) -> npt.NDArray[np.void]:
    """Records of the rings, all empty."""
    lines = np.zeros(3, dtype=LINE)
    lines["start"], lines["size"] = queue * np.arange(3), queue
    return lines


def _most_popular(workload: Workload, pools: int) -> npt.NDArray[np.int64]:
    """The experts of each cache, the most popular first, `[pools, size]`."""
    ranks = workload.popularity.reshape(pools, -1)
    return np.argsort(-ranks, axis=1, kind="stable") + ranks.shape[1] * np.arange(pools)[:, None]


def _memory(workload: Workload, setting: Setting, capacities: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    """Host memory with the most popular experts that are not on the device at first, and after these with those that are."""
    if setting.ram is None:
        return ram_records(np.arange(0), 0)
    ranks = workload.popularity
    place_in_pool = np.argsort(np.argsort(-ranks.reshape(len(capacities), -1), axis=1), axis=1)
    order = np.lexsort((-ranks, (place_in_pool < capacities[:, None]).reshape(-1)))
    return ram_records(order[: setting.ram], len(ranks))


def _capacities(setting: Setting, requests: Requests) -> npt.NDArray[np.int64]:
    """The number of experts that each cache holds."""
    if setting.slots is None:
        found = np.full(1 if setting.is_global else requests.layers, setting.capacity, dtype=np.int64)
    else:
        found = np.array(setting.slots, dtype=np.int64)
        if setting.is_global or len(found) != requests.layers:
            raise SpecmoeError(f"slots of {len(found)} layers: expected a cache for each of {requests.layers} layers")
    if found.min() < 0:
        raise SpecmoeError(f"capacity {found.min()}: expected at least 0")
    return found


def capacities(
    workload: Workload, fractions: list[float], gigabytes: list[float], costs: Costs | None, is_global: bool
) -> Iterator[int]:
    """Compute capacities, per layer or for all layers (is_global), from shares of all experts and from sizes in GB.

    Raises `SpecmoeError` if a share is not from 0 to 1, a size is negative, or a size is given without costs.
    """
    layers, experts = workload.requests.layers, workload.requests.num_experts
    pools = 1 if is_global else layers
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise UsageError(f"cache fraction {fraction}: expected 0 to 1")
        yield int(fraction * layers * experts / pools + 1e-9)
    for size in gigabytes:
        if not 0 <= size < 1e9:
            raise UsageError(f"cache of {size} GB: expected 0 or more")
        if costs is None:
            raise SpecmoeError(
                "a cache size in GB needs the size of an expert: name a model of known sizes (see 'specmoe models'), "
                "or give a share of all experts instead"
            )
        yield min(layers * experts // pools, int(size * 1e9 / costs.expert_bytes / pools))


def _rate(tokens: int, seconds: float) -> float | None:
    if not tokens or not seconds:
        return None
    return tokens / seconds if np.isfinite(seconds) else 0.0
