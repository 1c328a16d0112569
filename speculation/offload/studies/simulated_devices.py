"""The devices of a study: what transfers and computation cost there, and what fits."""

from __future__ import annotations

from profiler.errors import SpecmoeError, UsageError, counted
from profiler.models.registry import USED_SHARE
from speculation.data.tasks import Shape, Task
from speculation.offload.costs import Costs, costs_of, find_entry
from speculation.offload.replay import default_device, measure
from speculation.offload.simulation.records import Miss
from speculation.offload.state import Rule
from speculation.offload.studies.host_measure import measured_on_host
from speculation.offload.studies.replay_study import Replay, sizes_of
from speculation.offload.studies.simulation_options import SimulationStudy


def costs_on_devices(study: SimulationStudy, notes: list[str]) -> list[Costs | None]:
    """Estimate the costs on each device; a single None if the model's sizes are unknown. What to say about it joins `notes`."""
    name = study.model or study.trace.metadata.model.id
    entry = find_entry(name)
    if entry is None:
        if study.model is not None:
            raise UsageError(f"unknown model {study.model!r}: see 'specmoe models'")
        notes.append(
            f"The sizes of {name} are unknown, so no device was simulated and transfers take no time. Choose a model with "
            "known sizes (see 'specmoe models')."
        )
        return [None]
    facts = study.trace.metadata.model
    if (len(entry.moe_layers), entry.experts, entry.top_k) != (len(facts.moe_layers), facts.num_experts, facts.top_k):
        raise SpecmoeError(
            f"{entry.name} has {counted(len(entry.moe_layers), 'MoE layer')} of {entry.experts} experts, top-{entry.top_k}; "
            "the trace "
            f"has {len(facts.moe_layers)} of {facts.num_experts}, top-{facts.top_k}: choose another model"
        )
    found: list[Costs | None] = [
        costs_of(
            entry,
            gpu,
            study.precision,
            interconnect=study.interconnect,
            host=study.host,
            host_bandwidth=study.host_bandwidth,
            storage=study.storage,
        )
        for gpu in study.devices
    ]
    for gpu in study.devices:
        weights = entry.weights_gb(study.precision or entry.precisions[0])
        if weights <= gpu.memory * USED_SHARE:
            notes.append(f"All of {entry.name}, {weights:.0f} GB, would fit on an {gpu.name} of {gpu.memory} GB.")
    if study.measure:
        wanted = Replay(
            trace=study.trace,
            part=study.part,
            run=None,
            policy=Rule.LRU,
            fraction=0.0,
            kind=default_device(),
            model=study.model,
            precision=study.precision,
        )
        costs, sizes = sizes_of(wanted, Shape.of(facts, 1, Task.NEXT_TOKEN))
        measured = measure(wanted.kind, sizes, costs)
        if study.is_tiered or any(miss != Miss.COPY for miss in study.misses):
            measured = measured_on_host(measured, sizes.width, storage=study.is_tiered)
        found.append(measured)
    return found


def check_tiers(study: SimulationStudy) -> None:
    """Raise `SpecmoeError` if what the options say of the host and of storage does not go together."""
    needs_host = any(miss != Miss.COPY for miss in study.misses)
    if needs_host and study.devices and study.host is None:
        raise UsageError("which host computes the experts that the cache lacks? Name one (see 'specmoe models MODEL')")
    if study.is_tiered and study.devices and study.storage is None:
        raise UsageError("which storage holds the experts that host memory does not? Name one (see 'specmoe models MODEL')")
    is_unified = study.host is not None and study.host.gpu is not None
    if study.storage is not None and not study.is_tiered and not is_unified:
        raise UsageError(f"{study.storage.name}: how many experts fit in host memory? Give their size in GB, or their share")
    if study.ram_fraction is not None and not 0 <= study.ram_fraction <= 1:
        raise UsageError(f"share of {study.ram_fraction} of all experts in host memory: expected 0 to 1")
    if study.host is not None and is_unified and (study.is_tiered or needs_host):
        raise UsageError(
            f"{study.host.name} has one memory for CPU and GPU: its cache is what the memory holds, and misses are copied from "
            "storage"
        )


def experts_in_memory(study: SimulationStudy, cost: Costs | None, shape: Shape) -> int | None:
    """How many experts host memory holds; None: all."""
    everything = shape.layers * shape.experts
    if study.ram_fraction is not None:
        return int(study.ram_fraction * everything + 1e-9)
    if study.ram_gigabytes is None:
        return None
    if cost is None:
        raise SpecmoeError(
            "host memory in GB needs the size of an expert: name a model of known sizes (see 'specmoe models'), "
            "or give a share of all experts instead"
        )
    return min(everything, int(study.ram_gigabytes * 1e9 / cost.expert_bytes))


def too_large(study: SimulationStudy, costs: list[Costs | None], sizes: list[list[int]], shape: Shape) -> list[str]:
    """Name the caches that do not fit on their device together with the model's other weights."""
    entry = find_entry(study.model or study.trace.metadata.model.id)
    found = []
    for gpu, cost, each in zip(study.devices, costs, sizes, strict=False):
        if entry is None or cost is None:
            continue
        experts = shape.layers * shape.experts * cost.expert_bytes / 1e9
        rest = max(0.0, entry.weights_gb(cost.precision) - experts)
        largest = max(each, default=0) * (1 if study.is_global else shape.layers) * cost.expert_bytes / 1e9
        if largest + rest > gpu.memory * USED_SHARE:
            found.append(f"{largest:.0f} GB of experts and {rest:.0f} GB of other weights do not fit on an {gpu.name}.")
    return found
