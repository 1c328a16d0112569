"""What the simulation says of the tokens that a model with offloaded experts has just computed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from analysis.documents.generation import SimulatedPhase
from profiler.trace.reader import Trace
from speculation.data.routes import Routes, load_routes
from speculation.offload.costs import Costs
from speculation.offload.plans import PrefetchPlan, plan_of, ranked
from speculation.offload.policy_scores import scores_by_step, token_scores
from speculation.offload.requests import requests_of
from speculation.offload.simulation.simulate import Setting, SimulationResult, Workload, simulate
from speculation.offload.state import Rule
from speculation.predictors.base import Predictor
from speculation.runtime.model import OffloadedModel


def measured_costs(offloaded: OffloadedModel) -> Costs:
    """The costs of a run so far, on the device that it ran on: means over transfers, experts and layers of generated tokens.

    Only for one sequence at a time, and for a CPU: on a GPU, kernels run on after they are started, so that their time is not
    seen here.
    """
    experts, decode = offloaded.experts, offloaded.experts.decode
    layers = decode.tokens * offloaded.shape.layers
    rest = decode.seconds - decode.stall - decode.compute
    transfer = decode.transfer_seconds / max(1, decode.transfers)
    return Costs(
        model=offloaded.metadata.id,
        device=str(experts.slots.device),
        precision=offloaded.metadata.dtype or "",
        expert_bytes=offloaded.expert_bytes / (offloaded.shape.layers * offloaded.shape.experts),
        copy_seconds=transfer,
        expert_seconds=decode.compute / max(1, decode.requested),
        token_seconds=0.0,
        layer_seconds=rest / max(1, layers),
        layer_token_seconds=0.0,
        computes_on_arrival=True,
        assumptions=(
            f"measured in this run: {transfer * 1e3:.2f} ms for the transfer of an expert, "
            f"{decode.compute / max(1, decode.requested) * 1e3:.2f} ms to compute one, "
            f"{rest / max(1, layers) * 1e3:.2f} ms for the rest of a layer, predictions included",
        ),
    )


def simulate_run(
    offloaded: OffloadedModel,
    trace: Trace,
    costs: Costs | None,
    *,
    time_constant: float,
    prefetcher: Predictor | None = None,
    prefetch: int = 0,
    threshold: float = 0.0,
    reuse: Predictor | None = None,
) -> SimulationResult:
    """Simulate the cache of a model on the trace of its own run.

    Args:
        offloaded: The model, whose cache began as it does in the simulation.
        trace: The trace of everything that it has computed since it was loaded, one sequence at a time.
        costs: Default: hits only.
        time_constant: As the model was loaded with.
        prefetcher, prefetch, threshold: What was prefetched: so many of a predictor's likeliest experts, if they have at least
            this probability.
        reuse: The predictor of the policy `Rule.LEARNED`.

    Raises:
        SpecmoeError: The trace is of another model.
    """
    offloaded.shape.check(trace.metadata, trace.path, "this model")
    return simulate_routes(
        load_routes(trace, "all"),
        offloaded.popularity.reshape(offloaded.shape.layers, -1).astype(np.float64),
        Setting(offloaded.experts.cache.rule, offloaded.capacity, time_constant=time_constant),
        costs,
        prefetcher=prefetcher,
        prefetch=prefetch,
        threshold=threshold,
        reuse=reuse,
    )


def simulate_routes(
    routes: Routes,
    ranks_LE: npt.NDArray[np.float64],
    setting: Setting,
    costs: Costs | None,
    *,
    prefetcher: Predictor | None = None,
    prefetch: int = 0,
    threshold: float = 0.0,
    reuse: Predictor | None = None,
) -> SimulationResult:
    """Simulate the cache of a run from its routes.

    Args:
        routes: Of everything that was computed since the model was loaded, one sequence at a time.
        ranks_LE: The cache begins with the experts of the highest ranks.
        setting: Its policy and capacity.
        costs: Default: hits only.
        prefetcher, prefetch, threshold, reuse: As for `simulate_run`.
    """
    requests = requests_of(routes, ranks_LE.shape[1])
    plan: PrefetchPlan | None = None
    if prefetcher is not None:
        plan = plan_of(ranked(prefetcher, routes, prefetch, threshold), prefetcher.shape, requests)
    scores = None
    if setting.policy == Rule.LEARNED and reuse is not None:
        scores = scores_by_step(token_scores(reuse, routes), requests)
    return simulate(Workload(requests, ranks_LE), setting, plan, costs, scores)


def simulated_phase(result: SimulationResult, costs: Costs) -> SimulatedPhase:
    """The document's form of a simulation."""
    return SimulatedPhase(
        hit_rate=result.hit_rate,
        tokens_per_second=result.tokens_per_second or 0.0,
        assumptions=list(costs.assumptions),
    )
