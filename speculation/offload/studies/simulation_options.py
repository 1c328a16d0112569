"""What a study of simulated caches is to simulate."""

from __future__ import annotations

from dataclasses import dataclass

from profiler.models.gpus import Gpu
from profiler.models.hosts import Host, Storage
from profiler.trace.reader import Trace
from speculation.offload.curves.division import EVEN
from speculation.offload.requests import NO_DRAFTS, Drafting
from speculation.offload.simulation.records import Miss
from speculation.offload.state import TIME_CONSTANT


@dataclass(frozen=True, kw_only=True)
class SimulationStudy:
    """What to simulate: every device with every cache size, policy and way of prefetching. The options of `specmoe simulate`.

    Attributes:
        trace: The trace whose requests are played.
        part: Part of the split by problem: `test`, `validation`, `train` or `all`.
        predictors: What prefetches: `none`, `popularity`, `oracle` (knows the future), the name of a counting predictor, or the
            directory of a run.
        policies: Which expert is evicted: labels of rules such as `lru` and `belady` (`Rule.label`), or directories of runs of
            the task `reuse`.
        fractions: Cache sizes as shares of all experts, 0 to 1.
        gigabytes: Cache sizes in GB (10^9 bytes); they need the size of an expert, from `model` or the trace.
        is_global: One cache for all layers instead of one for each layer.
        devices: GPUs to estimate tokens per second for: at least one, or `measure`, if the model's sizes are known. Without
            known sizes, transfers take no time.
        measure: Also estimate for this machine, from measured transfers and expert computation.
        model: The model whose sizes are taken, by name. None: the trace's model.
        precision: Of the weights, such as `bf16` or `mxfp4`. None: as the model was published.
        interconnect: Bandwidth that large transfers to the GPU reach, in GB/s. None: 80 % of PCIe's peak.
        horizon: H, layers ahead that `popularity`, `oracle` and counting predictors prefetch; runs have their own.
        experts: Experts to prefetch per prediction and layer. None: K.
        threshold: Only those with at least this predicted probability, 0 to 1.
        queue: Prefetches that may wait for the interconnect.
        batch: Sequences that are decoded together.
        time_constant: Tokens over which `ewma` and `lfu-aged` forget.
        host: The CPU that computes experts, and its memory. None: no expert is computed there.
        host_bandwidth: Bandwidth of host memory that expert computation reaches, in GB/s. None: 70 % of the host's.
        misses: What happens to a chosen expert that the cache lacks.
        storage: Where the experts are that host memory does not hold.
        ram_gigabytes, ram_fraction: Experts that host memory holds, in GB or as a share. None: all.
        drafting: Speculative decoding.
        draft_milliseconds: Time in which the draft model drafts one token, in milliseconds.
        slots: How many slots each layer gets: `even`; `curve`: as many as have most hits on the training part; or the
            directory that `specmoe curve` wrote.
    """

    trace: Trace
    part: str
    predictors: tuple[str, ...]
    policies: tuple[str, ...]
    fractions: tuple[float, ...] = ()
    gigabytes: tuple[float, ...] = ()
    is_global: bool = False
    devices: tuple[Gpu, ...] = ()
    measure: bool = False
    model: str | None = None
    precision: str | None = None
    interconnect: float | None = None
    horizon: int = 1
    experts: int | None = None
    threshold: float = 0.0
    queue: int = 64
    batch: int = 1
    time_constant: float = TIME_CONSTANT
    host: Host | None = None
    host_bandwidth: float | None = None
    misses: tuple[Miss, ...] = (Miss.COPY,)
    storage: Storage | None = None
    ram_gigabytes: float | None = None
    ram_fraction: float | None = None
    drafting: Drafting = NO_DRAFTS
    draft_milliseconds: float = 0.0
    slots: str = EVEN

    @property
    def is_tiered(self) -> bool:
        """Whether some experts are on storage only."""
        return self.ram_gigabytes is not None or self.ram_fraction is not None
