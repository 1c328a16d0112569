"""The document of `specmoe simulate`: written to `simulation.json`, printed as a table, shown in the report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, model_validator

from analysis.documents.evaluation import CONTROL
from analysis.documents.reading import read_document
from analysis.documents.token_results import SimulatedSample

SIMULATION_FILE = "simulation.json"
# Rows that need no policy: without a cache, with every expert copied or computed on the host; and with room for every expert.
ON_DEMAND, ON_HOST, ALL_RESIDENT = "on demand", "on host", "all resident"
BOUNDS = (ON_DEMAND, ON_HOST, ALL_RESIDENT)
# What happens on a miss, in files of earlier versions always.
COPY = "copy"
# The policy and the prefetcher that use future knowledge.
BELADY, ORACLE = "belady", "oracle"
DEFINITIONS = {
    "hit_rate": "experts in the cache when their layer's router chose them, over all that were chosen",
    "gap_captured": "without prefetching: (hits - those of lru) / (those of belady - those of lru), with the same cache; 0 is "
    "lru, 1 is belady; gap_low and gap_high: 95 % interval from resampling the problems, 1,000 times",
    "late": "chosen experts whose prefetch was still in transfer, so that their layer waits for it, over all that were chosen",
    "miss": "chosen experts that were neither cached nor in transfer: demand-loaded or computed on the host, over all that "
    "were chosen",
    "on_host": "chosen experts that the host computed, over all that were chosen",
    "loads_per_token": "transfers of experts to the device, demand loads, prefetches and fills, per token",
    "filled_per_token": "fills: background copies of experts that the host computed, per token",
    "ram_hit_rate": "misses that were in host memory and not on storage only, over all misses",
    "reads_per_token": "reads of experts from storage, per token",
    "wasted": "prefetched experts that were evicted before a use, or never used, over all prefetched ones",
    "collisions_per_token": "misses of experts that had been evicted earlier in the same step, per token",
    "streamed_per_token": "experts loaded for one request and not kept, because the cache had no room for them, per token",
    "stalled": "share of the time in which the device's computation of experts waits for transfers, reads, and the host",
    "times_on_demand": "tokens per second over those without a cache",
    "counts_by_layer": "for each MoE layer, by the name of the event: experts requested, hit, late and missed; transfers "
    "(loads), and prefetches among them (prefetched), useful and wasted; collisions; experts streamed; predictions dropped "
    "(the queue or the cache was full, or their layer came first)",
}


class SimulatedRow(BaseModel):
    """One simulation: a device, a cache, a policy and a prefetcher. Rates are of generated tokens; see `DEFINITIONS`.

    Attributes:
        device: Name of the device; None for transfers that take no time, where everything in seconds is None too.
        capacity: Number of experts that fit, in each layer's cache or in the one for all layers.
        share: The same as a share of all experts.
        policy: The policy, or one of `BOUNDS`.
        on_miss: What happens to experts that the cache lacks: `copy`, `host` or `cheapest`.
        ram: Number of experts that host memory holds, the others being on storage; None: all.
        prefetch: The prefetcher.
        predict_microseconds: Measured time of one prediction.
        policy_microseconds, score_microseconds: Measured time of the policy per request, and of its predictor per layer.
        gap_captured, gap_low, gap_high: See `DEFINITIONS`; None with prefetching, or where lru and belady hit equally often.
        slots_by_layer: Number of experts that fit in each layer's cache, if they differ; `capacity` is then their mean.
        gain: In `Simulation.best`, tokens/s over the best row without prefetching.

    Older files lack the fields that have a default.
    """

    device: str | None
    capacity: int = Field(ge=0)
    share: float = Field(ge=0, le=1)
    gigabytes: float | None
    policy: str
    on_miss: str = COPY
    ram: int | None = None
    prefetch: str
    predict_microseconds: float = 0.0
    policy_microseconds: float = 0.0
    score_microseconds: float = 0.0
    gap_captured: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    hit_rate: float = Field(ge=0, le=1)
    late: float | None = None
    miss: float | None = None
    on_host: float | None = None
    loads_per_token: float | None = None
    gigabytes_per_token: float | None = None
    filled_per_token: float | None = None
    ram_hit_rate: float | None = None
    reads_per_token: float | None = None
    prefetched_per_token: float | None = None
    wasted: float | None = None
    collisions_per_token: float | None = None
    streamed_per_token: float | None = None
    dropped_per_token: float | None = None
    prefill_hit_rate: float | None = None
    tokens_per_second: float | None
    prefill_tokens_per_second: float | None = None
    stalled: float | None = None
    times_on_demand: float | None
    slots_by_layer: list[int] = []
    counts_by_layer: dict[str, list[int]] = {}
    gain: float | None = None

    @property
    def label(self) -> str:
        """The policy, and what happens on a miss unless it is a copy."""
        return self.policy if self.on_miss == COPY or self.policy in BOUNDS else f"{self.policy}, {self.on_miss}"

    @property
    def is_possible(self) -> bool:
        """Whether a policy and a prefetcher were simulated that use no future knowledge, and no control."""
        is_control = self.prefetch.endswith(CONTROL) or self.policy.endswith(CONTROL)
        return self.policy not in {*BOUNDS, BELADY} and self.prefetch != ORACLE and not is_control


class SimulatedCosts(BaseModel):
    """Bytes and seconds of `speculation.offload.costs.Costs`.

    copy_seconds: None if nothing can be transferred. host_expert_seconds, storage_seconds: None without a host that computes,
    and without storage.
    """

    model: str
    device: str
    precision: str
    expert_bytes: float
    copy_seconds: float | None
    expert_seconds: float
    token_seconds: float
    layer_seconds: float
    layer_token_seconds: float
    host_expert_seconds: float | None = None
    host_token_seconds: float = 0.0
    host_latency: float = 0.0
    storage_seconds: float | None = None
    computes_on_arrival: bool = False
    assumptions: list[str] = []


class SimulatedDevice(BaseModel):
    """A device, its costs, and what was assumed for them; None for transfers that take no time."""

    name: str | None
    costs: SimulatedCosts | None = None
    assumptions: list[str]


class Simulation(BaseModel):
    """All simulations of one trace.

    Attributes:
        layers, num_experts, top_k: Shape of the model; None in older files.
        part: Simulated part of the split, with `problems` problems and `tokens` tokens.
        batch: Sequences decoded at the same time.
        draft_tokens, acceptance: Draft tokens that a step verifies for each sequence, and the probability to accept one.
        is_global: Whether one cache serves all layers.
        notes: What a reader of any of the numbers must know.
        best: For each device and size, the fastest row that uses no future knowledge.
        rows: Every simulation.
        sample: What the cache of one of them did for some problems, token by token; None in older files.
    """

    version: int = 1
    trace: str
    model: str
    layers: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    part: str = ""
    problems: int | None = None
    tokens: int | None = None
    batch: int = 1
    draft_tokens: int = 0
    acceptance: float = 0.0
    is_global: bool = False
    definitions: dict[str, str] = {}
    devices: list[SimulatedDevice]
    notes: list[str]
    best: list[SimulatedRow]
    rows: list[SimulatedRow] = Field(max_length=100_000)
    sample: SimulatedSample | None = None

    @model_validator(mode="after")
    def _can_be_shown(self) -> Simulation:
        named = {device.name for device in self.devices}
        if not self.rows or any(row.device not in named for row in [*self.rows, *self.best]):
            raise ValueError("it has no rows, or rows of a device that it does not describe")
        return self

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"


def read_simulation(path: Path) -> Simulation:
    """Read a simulation from its file, or from the folder that holds it.

    Args:
        path: `simulation.json`, or the folder that `specmoe simulate --out` wrote.

    Raises:
        TraceError: There is no such file, or it is not a simulation.

    Example:
        >>> simulation = read_simulation(Path("simulations/math"))  # doctest: +SKIP
        >>> simulation.best[0].policy, simulation.best[0].tokens_per_second  # doctest: +SKIP
    """
    return read_document(path, Simulation, SIMULATION_FILE, "specmoe simulate TRACE --out DIR")
