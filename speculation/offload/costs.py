"""What a step costs in seconds: bytes of experts, a link, a device. Every figure that is assumed says where it is from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite

from profiler.errors import SpecmoeError
from profiler.models.gpus import Gpu
from profiler.models.registry import MODELS, PRECISIONS, ModelEntry

# Of a link's and a memory's data sheet figure, what large copies and matrix products reach; assumed.
LINK_SHARE, MEMORY_SHARE, COMPUTE_SHARE = 0.8, 0.7, 0.4
# Until a copy runs: launch and DMA set-up, seconds; assumed.
COPY_LATENCY = 10e-6
# Bytes of a parameter of an expert, where what is not experts stays in 16 bits: 4 bits and a byte for each 32.
MXFP4_BYTES = 4.25 / 8


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds and bytes of a model on a device. Written with every result.

    expert_bytes: of one expert. copy_seconds: of its copy to the device. expert_seconds: to read it there and use it, for few
    tokens. token_seconds: least per token of a step and layer for its experts, for many. layer_seconds: of what is not experts,
    per layer, and layer_token_seconds per token of it.
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
        """What was assumed, a line each."""
        return [
            f"{self.model} in {self.precision} on {self.device}: an expert has {self.expert_bytes / 1e6:.1f} MB, its copy "
            f"takes {self.copy_seconds * 1e3:.3f} ms, its use {self.expert_seconds * 1e3:.3f} ms; the rest of a layer "
            f"{self.layer_seconds * 1e3:.3f} ms",
            *self.assumptions,
        ]

    def to_json(self) -> dict[str, object]:
        """For files; None for a copy that never ends."""
        facts = asdict(self)
        return facts | {"copy_seconds": self.copy_seconds if isfinite(self.copy_seconds) else None}


def find_entry(model_id: str) -> ModelEntry | None:
    """The registry's entry of a trace's model, by short name or by any of its checkpoints; None if there is none."""
    for entry in MODELS.values():
        if model_id == entry.name or model_id in entry.checkpoints.values():
            return entry
    return None


def costs_of(entry: ModelEntry, gpu: Gpu, precision: str | None = None, *, link: float | None = None) -> Costs:
    """The costs of a model of the registry on a GPU. link: GB/s that large pinned copies reach, if it is known.

    Decoding reads weights: time is bytes over bandwidth; for many tokens at a time it is products over FLOP/s, if that is more.
    Keys and values, activations, sampling, and what a framework adds are left out. Raises `SpecmoeError` for another precision.
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
            f"link: {reached:.1f} GB/s, {how}; {COPY_LATENCY * 1e6:.0f} µs for each copy to begin (assumed)",
            f"memory: {gpu.bandwidth} GB/s x {MEMORY_SHARE:.0%}, {gpu.tflops} TFLOP/s x {COMPUTE_SHARE:.0%} (data sheet, "
            "share assumed)",
            f"expert: 3 x {entry.hidden} x {entry.expert_width} parameters (config.json), "
            f"{expert_bytes / expert_parameters:.2f} bytes each ({precision})",
            f"not routed experts: {rest_parameters / 1e9:.2f} billion parameters of a token (published active parameters less "
            "the experts)",
            "left out: keys and values, activations, sampling, the framework's own time",
        ),
    )
