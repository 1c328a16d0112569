"""The seconds that a step takes, from the bytes of an expert, the interconnect and the device.

Every assumed figure is named in `Costs.assumptions`, with its source.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite

from profiler.models.gpus import Gpu
from profiler.models.hosts import Host, Storage
from profiler.models.registry import ModelEntry, dense_bytes_per_parameter
from profiler.models.registry import find_entry as find_entry

# The shares of the data sheet's figures that large transfers and GEMMs reach: interconnect, memory, FLOP/s. Assumed.
INTERCONNECT_SHARE, MEMORY_SHARE, COMPUTE_SHARE = 0.8, 0.7, 0.4
# The same for the host and for storage. Assumed, for a single socket: without care for memory's locality two reach less.
HOST_MEMORY_SHARE, HOST_COMPUTE_SHARE, STORAGE_SHARE = 0.7, 0.4, 0.8
# Seconds before a transfer starts, for its launch and the DMA setup. Assumed.
COPY_LATENCY = 10e-6
# Seconds for the host to get a layer's activations and to return its experts' output: two small transfers and the
# synchronization of both sides, once per layer. Assumed.
HOST_LATENCY = 50e-6
# Seconds before the first byte of a read: the latency of flash, of the driver and of the file system. Assumed.
STORAGE_LATENCY = 100e-6


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of a model on a device, in bytes and seconds. They are written with every result.

    Attributes:
        model: Name of the model.
        device: Name of the device.
        precision: Precision of the weights, such as `bf16`.
        expert_bytes: Size of one expert.
        copy_seconds: Transfer of one expert to the device; infinite if the interconnect transfers nothing.
        expert_seconds: Computation of one expert for a few tokens, limited by reading its weights from device memory.
        token_seconds: Lower bound of the expert computation, per token of a step and layer, limited by FLOP/s.
        layer_seconds: Computation of a layer's other weights, limited by reading them.
        layer_token_seconds: Lower bound of the same per token of a step, limited by FLOP/s.
        host_expert_seconds: Computation of one expert on the host for a few tokens, limited by reading its weights from host
            memory; None if the host computes nothing.
        host_token_seconds: Lower bound of the same, per token of the expert, limited by FLOP/s.
        host_latency: What a layer waits for the host besides, once: activations there and output back.
        storage_seconds: Read of one expert from storage to host memory; None if no storage is simulated.
        computes_on_arrival: Whether a layer's experts are computed one after the other, each as soon as it is on the device, as
            `speculation.runtime` does; else all together once the last one is there, as fused kernels do.
        assumptions: What was assumed, a line each.
    """

    model: str
    device: str
    precision: str
    expert_bytes: float
    copy_seconds: float
    expert_seconds: float
    token_seconds: float
    layer_seconds: float
    layer_token_seconds: float
    host_expert_seconds: float | None = None
    host_token_seconds: float = 0.0
    host_latency: float = 0.0
    storage_seconds: float | None = None
    computes_on_arrival: bool = False
    assumptions: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """The costs and what was assumed for them, a line each."""
        return [
            f"{self.model} in {self.precision} on {self.device}: {self.expert_bytes / 1e6:.1f} MB per expert; "
            f"{self.copy_seconds * 1e3:.3f} ms to transfer one, {self.expert_seconds * 1e3:.3f} ms to compute it, "
            f"{self.layer_seconds * 1e3:.3f} ms to compute the rest of a layer",
            *self._elsewhere(),
            *self.assumptions,
        ]

    def _elsewhere(self) -> list[str]:
        found = []
        if self.host_expert_seconds is not None:
            found.append(f"{self.host_expert_seconds * 1e3:.3f} ms to compute an expert on the host")
        if self.storage_seconds is not None:
            found.append(f"{self.storage_seconds * 1e3:.3f} ms to read an expert from storage")
        return found

    def to_json(self) -> dict[str, object]:
        """The fields for a JSON file. An infinite time becomes None."""
        facts = asdict(self)
        return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in facts.items()}


def costs_of(
    entry: ModelEntry,
    gpu: Gpu,
    precision: str | None = None,
    *,
    interconnect: float | None = None,
    host: Host | None = None,
    host_bandwidth: float | None = None,
    storage: Storage | None = None,
) -> Costs:
    """Estimate the costs of a registered model on a GPU, and on the host and storage next to it.

    Decoding is limited by reading weights: time is bytes over bandwidth. For many tokens at a time, it is floating-point
    operations over FLOP/s, where that is longer. The KV cache, activations, sampling and the framework's own overhead are
    left out. The host computes with the same bytes of weights as the GPU, all its cores on one expert at a time.

    Args:
        entry: A model of the registry.
        gpu: A GPU of the registry.
        precision: A precision of `profiler.models.registry.PRECISIONS`. Default: the model's first checkpoint.
        interconnect: GB/s that large transfers from pinned memory reach. Default: 80 % of the GPU's PCIe bandwidth.
        host: Computes experts too. Default: it computes none.
        host_bandwidth: GB/s of host memory that expert computation reaches. Default: 70 % of the host's bandwidth.
        storage: Holds the experts that host memory does not. Default: host memory holds all experts.

    Raises:
        ModelError: The precision is unknown.
    """
    precision = precision or next(iter(entry.checkpoints))
    expert_parameters, expert_bytes = entry.expert_parameters, entry.expert_bytes(precision)
    layers = len(entry.moe_layers)
    rest_parameters = entry.active * 1e9 - layers * entry.top_k * expert_parameters
    rest_bytes = rest_parameters * dense_bytes_per_parameter(precision)
    memory = gpu.bandwidth * 1e9 * MEMORY_SHARE
    flops = gpu.tflops * 1e12 * COMPUTE_SHARE
    reached = gpu.interconnect * INTERCONNECT_SHARE if interconnect is None else interconnect
    # The GPU computes from the memory into which storage is read: there is no transfer but the read.
    is_unified = not isfinite(reached)
    read = None if storage is None else storage_seconds(expert_bytes, storage)
    return Costs(
        model=entry.name,
        device=gpu.name,
        precision=precision,
        expert_bytes=expert_bytes,
        copy_seconds=(read or 0.0) if is_unified else _copy_seconds(expert_bytes, reached),
        expert_seconds=expert_bytes / memory,
        token_seconds=2 * entry.top_k * expert_parameters / flops,
        layer_seconds=rest_bytes / layers / memory,
        layer_token_seconds=2 * rest_parameters / layers / flops,
        host_expert_seconds=None if host is None else host_expert_seconds(expert_bytes, host, host_bandwidth),
        host_token_seconds=0.0 if host is None else 2 * expert_parameters / (host.tflops * 1e12 * HOST_COMPUTE_SHARE),
        host_latency=0.0 if host is None else HOST_LATENCY,
        storage_seconds=None if is_unified else read,
        assumptions=(
            _interconnect(gpu, interconnect),
            f"device: {gpu.bandwidth} GB/s x {MEMORY_SHARE:.0%}, {gpu.tflops} TFLOP/s x {COMPUTE_SHARE:.0%} (data sheet, "
            "shares assumed)",
            f"expert: 3 x {entry.hidden} x {entry.expert_width} parameters (config.json), "
            f"{expert_bytes / expert_parameters:.2f} bytes each ({precision})",
            f"all but routed experts: {rest_parameters / 1e9:.2f} billion parameters per token (active parameters "
            "minus the routed experts)",
            *_host_assumptions(host, host_bandwidth),
            *_storage_assumptions(storage),
            "left out: KV cache, activations, sampling, the framework's own overhead",
        ),
    )


def host_expert_seconds(expert_bytes: float, host: Host, bandwidth: float | None = None) -> float:
    """Seconds in which a host computes one expert for a few tokens: it reads the weights once, with all cores.

    Args:
        expert_bytes: Size of the expert.
        host: The host.
        bandwidth: GB/s that this reaches. Default: 70 % of the host's. Infinite time if it is 0.
    """
    reached = host.bandwidth * HOST_MEMORY_SHARE if bandwidth is None else bandwidth
    return expert_bytes / (reached * 1e9) if reached else float("inf")


def storage_seconds(expert_bytes: float, storage: Storage) -> float:
    """Seconds in which one expert is read from storage into host memory, in one piece."""
    return STORAGE_LATENCY + expert_bytes / (storage.bandwidth * STORAGE_SHARE * 1e9)


def _copy_seconds(expert_bytes: float, reached: float) -> float:
    return COPY_LATENCY + expert_bytes / (reached * 1e9) if reached else float("inf")


def _interconnect(gpu: Gpu, interconnect: float | None) -> str:
    latency = f"{COPY_LATENCY * 1e6:.0f} µs before each transfer starts (assumed)"
    if interconnect is not None:
        return f"interconnect: {interconnect:.1f} GB/s, as given; {latency}"
    if not isfinite(gpu.interconnect):
        return "interconnect: none; the GPU computes from the memory of the host, and a transfer is a read from storage, if any"
    share = f"{INTERCONNECT_SHARE:.0%} (assumed) of {gpu.interconnect} GB/s, PCIe {'5' if gpu.interconnect > 40 else '4'} x16"
    return f"interconnect: {gpu.interconnect * INTERCONNECT_SHARE:.1f} GB/s, {share}; {latency}"


def _host_assumptions(host: Host | None, bandwidth: float | None) -> list[str]:
    if host is None:
        return []
    reads = (
        f"{host.bandwidth * HOST_MEMORY_SHARE:.1f} GB/s, {HOST_MEMORY_SHARE:.0%} (assumed) of {host.bandwidth} GB/s"
        if bandwidth is None
        else f"{bandwidth:.1f} GB/s, as given"
    )
    return [
        f"host: {host.memory}, {host.cpu}; {reads}; {host.tflops} TFLOP/s x {HOST_COMPUTE_SHARE:.0%} (data sheet, share "
        f"assumed); {HOST_LATENCY * 1e6:.0f} µs per layer for activations and synchronization (assumed); it reads the same "
        "bytes of an expert as the GPU; transfers do not slow it down"
    ]


def _storage_assumptions(storage: Storage | None) -> list[str]:
    if storage is None:
        return []
    return [
        f"storage: {storage.bandwidth * STORAGE_SHARE:.2f} GB/s, {STORAGE_SHARE:.0%} (assumed) of {storage.bandwidth} GB/s "
        f"({storage.drive}, sequential reads); {STORAGE_LATENCY * 1e6:.0f} µs before each read (assumed)"
    ]
