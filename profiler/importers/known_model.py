"""Facts of a model that the user or the source names, from the registry of known models."""

from __future__ import annotations

from dataclasses import dataclass

from profiler.errors import TraceError, counted
from profiler.models.registry import MODELS, ModelEntry


def known_model(name: str) -> ModelEntry | None:
    """The entry of a model by its short name or the hub id of one of its checkpoints; None if it is not in the registry."""
    if name in MODELS:
        return MODELS[name]
    return next((entry for entry in MODELS.values() if name in entry.checkpoints.values()), None)


@dataclass(frozen=True)
class Recorded:
    """What a source shows about its model. stated_experts: the number of experts that it states, None if it does not."""

    layers: list[int]
    highest_id: int
    most_experts: int
    stated_experts: int | None = None

    def contradiction(self, entry: ModelEntry) -> str | None:
        """Why these rows cannot be of this model, or None."""
        layers = sorted(set(self.layers) - set(entry.moe_layers))
        if layers:
            few = ",".join(map(str, layers[:5])) + (",..." if len(layers) > 5 else "")
            return f"layer {few}, but the MoE layers of {entry.name} are {entry.moe_layers[0]}-{entry.moe_layers[-1]}"
        if self.highest_id >= entry.experts:
            return f"expert id {self.highest_id}, but {entry.name} has {entry.experts} experts"
        if self.stated_experts not in {None, entry.experts}:
            return f"the source says {self.stated_experts} experts, but {entry.name} has {entry.experts}"
        if self.most_experts > entry.top_k:
            return f"{self.most_experts} experts per token, but {entry.name} uses {entry.top_k}"
        return None

    def missing(self, entry: ModelEntry) -> list[str]:
        """Which parts of the model the source lacks, one line each."""
        absent = sorted(set(entry.moe_layers) - set(self.layers))
        gaps = (
            [f"{len(absent)} of the {counted(len(entry.moe_layers), 'MoE layer')} of {entry.name} are not in the source"]
            if absent
            else []
        )
        if self.most_experts < entry.top_k:
            gaps.append(f"{self.most_experts} of the {entry.top_k} experts that {entry.name} uses per token were recorded")
        return gaps


def facts_for(named: str, by_source: str, recorded: Recorded, source: object) -> ModelEntry | None:
    """The registry's entry for a source whose model is called `named` by the user or `by_source` by the source.

    None if the registry has no such model, or if only the source names it and its rows contradict the registry (a model that
    was pruned, say). Raises `TraceError` if they contradict the model that the user named.
    """
    entry = known_model(named)
    if entry is not None:
        reason = recorded.contradiction(entry)
        if reason is not None:
            raise TraceError(f"{source}: {reason}: name another model")
        return entry
    entry = known_model(by_source)
    return entry if entry is not None and recorded.contradiction(entry) is None else None
