"""GPUs: memory, bandwidth, speed, and price per hour on Modal."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from profiler.errors import ModelUsageError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, with figures of the manufacturer's data sheet.

    Attributes:
        name: As `find_gpu` takes it.
        memory: In GB.
        bandwidth: Of that memory, in GB/s.
        tflops: Dense BF16, in TFLOP/s.
        interconnect: Bandwidth to the host in GB/s, one way: PCIe 4 x16 (16 GT/s, 128b/130b) or PCIe 5 x16.
        dollars_per_hour: Price on Modal in November 2026 (modal.com/pricing); None if Modal does not offer it.
    """

    name: str
    memory: int
    bandwidth: int
    tflops: int
    interconnect: float = 31.5
    dollars_per_hour: float | None = None


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="RTX 3090", memory=24, bandwidth=936, tflops=71),
        Gpu(name="RTX 4090", memory=24, bandwidth=1008, tflops=165),
        Gpu(name="A6000", memory=48, bandwidth=768, tflops=155),
        Gpu(name="L4", memory=24, bandwidth=300, tflops=121, dollars_per_hour=0.80),
        Gpu(name="A10", memory=24, bandwidth=600, tflops=125, dollars_per_hour=1.10),
        Gpu(name="L40S", memory=48, bandwidth=864, tflops=362, dollars_per_hour=1.95),
        Gpu(name="A100-40GB", memory=40, bandwidth=1555, tflops=312, dollars_per_hour=2.10),
        Gpu(name="A100-80GB", memory=80, bandwidth=2039, tflops=312, dollars_per_hour=2.50),
        Gpu(name="H100", memory=80, bandwidth=3350, tflops=989, interconnect=63.0, dollars_per_hour=3.95),
        Gpu(name="H200", memory=141, bandwidth=4800, tflops=989, interconnect=63.0, dollars_per_hour=4.54),
        Gpu(name="B200", memory=180, bandwidth=8000, tflops=2250, interconnect=63.0, dollars_per_hour=6.25),
    )
}


def find_gpu(name: str, *, rented: bool = False) -> Gpu:
    """The GPU called `name`; with `rented`, only if Modal offers it.

    Raises:
        ModelError: There is no such GPU; the message lists the choices.

    Example:
        >>> from profiler import find_gpu
        >>> find_gpu("RTX 4090").memory
        24
    """
    known = {key: gpu for key, gpu in GPUS.items() if not rented or gpu.dollars_per_hour is not None}
    if name not in known:
        raise ModelUsageError(f"unknown GPU {name!r}: expected one of {', '.join(known)}")
    return known[name]


def named_gpu(cuda_name: str) -> Gpu | None:
    """The GPU with this CUDA device name ("NVIDIA A100-SXM4-80GB"); None if it is not in `GPUS`."""
    for gpu in GPUS.values():
        if all(re.search(rf"\b{part}\b", cuda_name) for part in re.split("[ -]", gpu.name)):
            return gpu
    return None


def local_gpu() -> Gpu | None:
    """This machine's first GPU with its actual memory, None without one; its speeds are 0 if it is not in `GPUS`."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known = named_gpu(properties.name) or Gpu(name=properties.name, memory=0, bandwidth=0, tflops=0)
    return replace(known, memory=round(properties.total_memory / 1e9))


def device_name() -> str:
    """The CUDA device name of this machine's first GPU, or `CPU`."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
