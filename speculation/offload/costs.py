"""The seconds that a step takes, from the bytes of an expert, the interconnect and the device.

Every assumed figure is named in `Costs.assumptions`, with its source.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite

from profiler.errors import SpecmoeError
from profiler.models.gpus import Gpu
from profiler.models.registry import MODELS, PRECISIONS, ModelEntry

# The shares of the data sheet's figures that large transfers and GEMMs reach: interconnect, memory, FLOP/s. Assumed.
LINK_SHARE, MEMORY_SHARE, COMPUTE_SHARE = 0.8, 0.7, 0.4
# Seconds before a transfer starts, for its launch and the DMA setup. Assumed.
COPY_LATENCY = 10e-6
# Bytes per expert parameter: 4 bits, and one scale byte per 32 parameters. All other weights stay in 16 bits.
MXFP4_BYTES = 4.25 / 8


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
    assumptions: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """The costs and what was assumed for them, a line each."""
        return [
            f"{self.model} in {self.precision} on {self.device}: {self.expert_bytes / 1e6:.1f} MB per expert; "
            f"{self.copy_seconds * 1e3:.3f} ms to transfer one, {self.expert_seconds * 1e3:.3f} ms to compute it, "
            f"{self.layer_seconds * 1e3:.3f} ms to compute the rest of a layer",
            *self.assumptions,
        ]

    def to_json(self) -> dict[str, object]:
        """The fields for a JSON file. An infinite `copy_seconds` becomes None."""
        facts = asdict(self)
        return facts | {"copy_seconds": self.copy_seconds if isfinite(self.copy_seconds) else None}


def find_entry(model_id: str) -> ModelEntry | None:
    """The registry's entry for a model, by short name or by the id of any of its checkpoints; None if it is unknown."""
    for entry in MODELS.values():
        if model_id == entry.name or model_id in entry.checkpoints.values():
            return entry
    return None


def costs_of(entry: ModelEntry, gpu: Gpu, precision: str | None = None, *, link: float | None = None) -> Costs:
    """Estimate the costs of a registered model on a GPU.

    Decoding is limited by reading weights: time is bytes over bandwidth. For many tokens at a time, it is floating-point
    operations over FLOP/s, where that is longer. The KV cache, activations, sampling and the framework's own overhead are
    left out.

    Args:
        entry: A model of the registry.
        gpu: A GPU of the registry.
        precision: A precision of `profiler.models.registry.PRECISIONS`. Default: the model's first checkpoint.
        link: GB/s that large transfers from pinned memory reach. Default: 80 % of the GPU's PCIe bandwidth.

    Raises:
        SpecmoeError: The precision is unknown.
    """
    precision = precision or next(iter(entry.checkpoints))
    if precision not in PRECISIONS:
        raise SpecmoeError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    expert_parameters = 3 * entry.hidden * entry.expert_width
    layers = len(entry.moe_layers)
    rest_parameters = entry.active * 1e9 - layers * entry.top_k * expert_parameters
    is_mixed = precision == "mxfp4"
    expert_bytes = expert_parameters * (MXFP4_BYTES if is_mixed else PRECISIONS[precision])
    rest_bytes = rest_parameters * (2.0 if is_mixed else PRECISIONS[precision])
    memory = gpu.bandwidth * 1e9 * MEMORY_SHARE
    flops = gpu.tflops * 1e12 * COMPUTE_SHARE
    reached = gpu.link * LINK_SHARE if link is None else link
    how = (
        f"{LINK_SHARE:.0%} (assumed) of {gpu.link} GB/s, PCIe {'5' if gpu.link > 40 else '4'} x16"
        if link is None
        else "as given"
    )
    return Costs(
        model=entry.name,
        device=gpu.name,
        precision=precision,
        expert_bytes=expert_bytes,
        copy_seconds=COPY_LATENCY + expert_bytes / (reached * 1e9) if reached else float("inf"),
        expert_seconds=expert_bytes / memory,
        token_seconds=2 * entry.top_k * expert_parameters / flops,
        layer_seconds=rest_bytes / layers / memory,
        layer_token_seconds=2 * rest_parameters / layers / flops,
        assumptions=(
            f"interconnect: {reached:.1f} GB/s, {how}; {COPY_LATENCY * 1e6:.0f} µs before each transfer starts (assumed)",
            f"device: {gpu.bandwidth} GB/s x {MEMORY_SHARE:.0%}, {gpu.tflops} TFLOP/s x {COMPUTE_SHARE:.0%} (data sheet, "
            "shares assumed)",
            f"expert: 3 x {entry.hidden} x {entry.expert_width} parameters (config.json), "
            f"{expert_bytes / expert_parameters:.2f} bytes each ({precision})",
            f"all but routed experts: {rest_parameters / 1e9:.2f} billion parameters per token (published active parameters "
            "minus the routed experts)",
            "left out: KV cache, activations, sampling, the framework's own overhead",
        ),
    )
