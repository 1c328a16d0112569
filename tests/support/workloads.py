"""Small workloads of a cache of experts, written down or drawn at random, and their simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from speculation.offload.costs import Costs
from speculation.offload.plans import PrefetchPlan
from speculation.offload.requests import Requests
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, SimulationResult, Workload, simulate
from speculation.offload.state import Rule

Steps = list[list[list[int]]]


def requests_from(steps: Steps, experts: int) -> Requests:
    """Of one token each, decoded: the experts of each layer of each step."""
    flat = [layer for step in steps for layer in step]
    return Requests.decoded(
        np.array([expert for layer in flat for expert in layer], dtype=np.int32),
        np.cumsum([0, *map(len, flat)]),
        layers=len(steps[0]),
        num_experts=experts,
        top_k=len(flat[0]),
    )


def workload_from(steps: Steps, experts: int) -> Workload:
    """Caches begin with experts 0, 1, 2, ..."""
    return Workload(requests_from(steps, experts), np.tile(np.arange(experts, 0, -1.0), (len(steps[0]), 1)))


def plan_from(requests: Requests, entries: dict[tuple[int, int], list[tuple[int, int]]]) -> PrefetchPlan:
    """entries: (step, layer after which it is known) -> (layer, expert) pairs."""
    points = requests.layers + 1
    lists = [entries.get((number // points, number % points - 1), []) for number in range(requests.steps * points)]
    flat = np.array([pair for pairs in lists for pair in pairs], dtype=np.int32).reshape(-1, 2)
    scores = np.ones(len(flat), dtype=np.float32)
    return PrefetchPlan(np.cumsum([0, *map(len, lists)]), flat[:, 0].copy(), flat[:, 1].copy(), scores)


def scores_for(workload: Workload) -> npt.NDArray[np.float32]:
    """Synthetic scores of all experts in each step, all different."""
    requests = workload.requests
    size = (requests.steps, requests.layers * requests.num_experts)
    return np.random.default_rng(5).random(size, dtype=np.float32)


def play(
    workload: Workload, setting: Setting, plan: PrefetchPlan | None = None, costs: Costs | None = None
) -> SimulationResult:
    """Simulate any policy, also the one that needs scores."""
    return simulate(workload, setting, plan, costs, scores_for(workload) if setting.policy == Rule.LEARNED else None)


def hits(workload: Workload, policy: Rule, capacity: int, **more: Any) -> int:
    return play(workload, Setting(policy, capacity, **more)).total(Count.HIT)


@st.composite
def traces(draw: st.DrawFn) -> tuple[Steps, int]:
    """A few steps of up to 3 layers, of one to three experts of up to 6, some more popular than others."""
    experts, layers, top_k = draw(st.integers(3, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed, count = draw(st.integers(0, 10**6)), draw(st.integers(1, 60))
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(experts, 0.7)) + 0.02
    steps = [
        [random.choice(experts, top_k, replace=False, p=share / share.sum()).tolist() for _ in range(layers)]
        for _ in range(count)
    ]
    return steps, experts
