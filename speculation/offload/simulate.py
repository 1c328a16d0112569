"""Play a trace against a cache: hit rates, loads and, where costs are known, tokens per second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from speculation.offload.costs import Costs
from speculation.offload.kernel import CLOCK, PREDICTION, Count, Limits, Rule, expert_records, play, uses_ahead
from speculation.offload.plans import PrefetchPlan, no_plan
from speculation.offload.requests import Requests

# A request's experts have places of their own in the order of uses.
MAX_EXPERTS = 4096
QUEUE = 64


@dataclass(frozen=True)
class Setting:
    """What is simulated. capacity: experts in the cache, of each layer, or of all layers together (is_global).

    queue: predicted copies that may wait. predict_seconds: from the routing of a layer to what is predicted with it.
    """

    policy: Rule
    capacity: int
    is_global: bool = False
    queue: int = QUEUE
    predict_seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """What came of it. counts_LC `[L, len(Count)]` of generated tokens, and of prompts; seconds in all, of both apart.

    Without costs, copies take no time, and seconds are zero.
    """

    setting: Setting
    counts_LC: npt.NDArray[np.int64]
    prefill_counts_LC: npt.NDArray[np.int64]
    decode_tokens: int
    decode_seconds: float
    decode_stall: float
    prefill_tokens: int
    prefill_seconds: float

    def total(self, what: Count) -> int:
        """Of all layers, while tokens were generated."""
        return int(self.counts_LC[:, what].sum())

    @property
    def hit_rate(self) -> float:
        """Experts that were in the cache when a generated token asked for them, over all that were asked for."""
        return self.total(Count.HIT) / max(1, self.total(Count.REQUESTED))

    @property
    def prefill_hit_rate(self) -> float | None:
        """The same of prompts; None if there are none."""
        requested = int(self.prefill_counts_LC[:, Count.REQUESTED].sum())
        return int(self.prefill_counts_LC[:, Count.HIT].sum()) / requested if requested else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; 0 if it never ends, None if nothing is known of time."""
        return _rate(self.decode_tokens, self.decode_seconds)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Of prompts."""
        return _rate(self.prefill_tokens, self.prefill_seconds)


@dataclass(frozen=True)
class Workload:
    """Requests, and what the training problems say of each expert's popularity `[L, E]`.

    Raises `SpecmoeError` if there are more experts than can be kept in order.
    """

    requests: Requests
    popularity_LE: npt.NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        if self.requests.num_experts > MAX_EXPERTS:
            raise SpecmoeError(
                f"{self.requests.num_experts:,} experts per layer: caches of up to {MAX_EXPERTS:,} are simulated"
            )

    @cached_property
    def ahead(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """When each expert is needed next."""
        requests = self.requests
        next_use, first_use = uses_ahead(requests.experts_N, requests.starts_R, requests.layers, requests.num_experts)
        return next_use, first_use

    @cached_property
    def popularity(self) -> npt.NDArray[np.int64]:
        """Ranks `[L * E]`, the most popular highest; equal ones by number."""
        flat = np.asarray(self.popularity_LE, dtype=np.float64).reshape(-1)
        ranks = np.empty(len(flat), dtype=np.int64)
        ranks[np.lexsort((-np.arange(len(flat)), flat))] = np.arange(len(flat))
        return ranks


def simulate(workload: Workload, setting: Setting, plan: PrefetchPlan | None = None, costs: Costs | None = None) -> Result:
    """Play the requests. plan: what is fetched ahead; costs: None for copies and products that take no time.

    The cache begins with the most popular experts. A layer's experts are one request: none of them is given up for another.
    What finds no room is copied for this request alone. Copies of requests go before those of predictions, but do not cut one
    off.
    """
    requests = workload.requests
    if setting.capacity < 0 or setting.queue < 1:
        raise SpecmoeError(f"capacity {setting.capacity}, queue {setting.queue}: expected at least 0 and 1")
    plan = no_plan(requests) if plan is None else plan
    tokens_S = requests.tokens_S.astype(np.float64)
    layer_seconds = expert_floor = np.zeros(requests.steps)
    if costs is not None:
        layer_seconds = np.maximum(costs.layer_seconds, tokens_S * costs.layer_token_seconds)
        expert_floor = tokens_S * costs.token_seconds
    next_use_N, first_use = workload.ahead
    counts_KLC, ends_S, stalls_S = play(
        requests.experts_N,
        requests.starts_R,
        # At most one token of a prompt's piece, the last, makes predictions.
        np.where(requests.is_decode_S, requests.tokens_S, 1),
        requests.is_decode_S,
        next_use_N,
        plan.starts_Q,
        plan.layers_N,
        plan.experts_N,
        layer_seconds,
        expert_floor,
        0.0 if costs is None else costs.expert_seconds,
        0.0 if costs is None else setting.predict_seconds,
        Limits(
            rule=int(setting.policy),
            capacity=setting.capacity,
            layers=requests.layers,
            num_experts=requests.num_experts,
            is_global=setting.is_global,
            copy_seconds=0.0 if costs is None else costs.copy_seconds,
        ),
        workload.popularity,
        expert_records(first_use),
        np.zeros(setting.queue, dtype=PREDICTION),
        np.zeros(1, dtype=CLOCK),
    )
    is_endless = not np.isfinite(ends_S[-1:]).all()
    spans_S = np.diff(ends_S, prepend=0.0) if not is_endless else np.full(requests.steps, np.inf)
    is_decode_S = requests.is_decode_S
    return Result(
        setting,
        counts_LC=counts_KLC[1],
        prefill_counts_LC=counts_KLC[0],
        decode_tokens=int(requests.tokens_S[is_decode_S].sum()),
        decode_seconds=float(spans_S[is_decode_S].sum()),
        decode_stall=float(np.inf if is_endless else stalls_S[is_decode_S].sum()),
        prefill_tokens=int(requests.tokens_S[~is_decode_S].sum()),
        prefill_seconds=float(spans_S[~is_decode_S].sum()),
    )


def capacities(
    workload: Workload, fractions: list[float], gigabytes: list[float], costs: Costs | None, is_global: bool
) -> Iterator[int]:
    """Experts that a cache holds, of each layer or of all: of these shares of all experts, and in these GB.

    Raises `SpecmoeError` for shares beyond 0 to 1, and for GB that are no size or where an expert's size is not known.
    """
    layers, experts = workload.requests.layers, workload.requests.num_experts
    pools = 1 if is_global else layers
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise SpecmoeError(f"cache fraction {fraction}: expected 0 to 1")
        yield int(fraction * layers * experts / pools + 1e-9)
    for size in gigabytes:
        if not 0 <= size < 1e9:
            raise SpecmoeError(f"cache of {size} GB: expected 0 or more")
        if costs is None:
            raise SpecmoeError("a cache in GB needs the size of an expert: name the --model, or use --cache-fraction")
        yield min(layers * experts // pools, int(size * 1e9 / costs.expert_bytes / pools))


def _rate(tokens: int, seconds: float) -> float | None:
    if not tokens or not seconds:
        return None
    return tokens / seconds if np.isfinite(seconds) else 0.0
