"""Host memory and storage that experts are offloaded to: bandwidths from data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from profiler.errors import ModelUsageError
from profiler.models.gpus import Gpu


@dataclass(frozen=True, kw_only=True)
class Host:
    """A CPU and its memory, which hold the experts that the GPU does not.

    Attributes:
        name: As `find_host` takes it.
        memory: Its kind.
        bandwidth: Of all channels together, in GB/s (channels x 8 bytes x transfers per second, or as the maker states it).
        cpu: The processor whose data sheet the other figures are from.
        cores: Its cores.
        tflops: 32-bit fused multiply-adds of all cores, in TFLOP/s: cores x base clock x FLOP per cycle. Matrix units (Intel
            AMX, Apple's) are left out.
        gpu: The GPU that computes from the same memory (unified memory); None if GPUs are attached by PCIe.
    """

    name: str
    memory: str
    bandwidth: float
    cpu: str
    cores: int
    tflops: float
    gpu: Gpu | None = None


@dataclass(frozen=True, kw_only=True)
class Storage:
    """An SSD.

    Attributes:
        name: As `find_storage` takes it.
        bandwidth: Sequential read, in GB/s.
        drive: The drive whose data sheet it is from.
    """

    name: str
    bandwidth: float
    drive: str


# A GPU that computes from host memory loads nothing: its interconnect is infinitely fast. Apple publishes neither clocks nor
# FLOP/s: those of the M4 Max and the M3 Ultra are from reviews, for the performance cores (4 x 128 bits of FMA) and for 16-bit
# floats on the GPU, which are as fast as 32-bit ones. AMD's GPU: 40 units x 64 lanes x 2 issues x 2 (packed 16 bits) x 2
# (FMA) x 2.9 GHz.
HOSTS: dict[str, Host] = {
    host.name: host
    for host in (
        Host(
            name="DDR4-3200 desktop",
            memory="2 channels of DDR4-3200",
            bandwidth=51.2,
            cpu="Ryzen 9 5950X",
            cores=16,
            tflops=1.7,  # 16 x 3.4 GHz x 32 (Zen 3: 2 x 256 bits)
        ),
        Host(
            name="DDR5-5600 desktop",
            memory="2 channels of DDR5-5600",
            bandwidth=89.6,
            cpu="Ryzen 9 9950X",
            cores=16,
            tflops=4.4,  # 16 x 4.3 GHz x 64 (Zen 5: 2 x 512 bits)
        ),
        Host(
            name="8-channel DDR5 server",
            memory="8 channels of DDR5-4800",
            bandwidth=307.2,
            cpu="Xeon Platinum 8480+",
            cores=56,
            tflops=7.2,  # 56 x 2.0 GHz x 64 (Sapphire Rapids: 2 x 512 bits)
        ),
        Host(
            name="12-channel DDR5 server",
            memory="12 channels of DDR5-4800",
            bandwidth=460.8,
            cpu="EPYC 9654",
            cores=96,
            tflops=7.4,  # 96 x 2.4 GHz x 32 (Zen 4: 2 x 256 bits)
        ),
        Host(
            name="Ryzen AI Max+ 395",
            memory="256-bit LPDDR5X-8000, unified",
            bandwidth=256.0,
            cpu="Ryzen AI Max+ 395",
            cores=16,
            tflops=3.1,  # 16 x 3.0 GHz x 64 (Zen 5: 2 x 512 bits)
            gpu=Gpu(name="Ryzen AI Max+ 395", memory=128, bandwidth=256, tflops=59, interconnect=float("inf")),
        ),
        Host(
            name="M4 Max",
            memory="LPDDR5X, unified",
            bandwidth=546.0,
            cpu="Apple M4 Max",
            cores=16,
            tflops=1.7,  # 12 performance cores x 4.5 GHz x 32
            gpu=Gpu(name="M4 Max", memory=128, bandwidth=546, tflops=18, interconnect=float("inf")),
        ),
        Host(
            name="M3 Ultra",
            memory="LPDDR5, unified",
            bandwidth=819.0,
            cpu="Apple M3 Ultra",
            cores=32,
            tflops=3.1,  # 24 performance cores x 4.1 GHz x 32
            gpu=Gpu(name="M3 Ultra", memory=512, bandwidth=819, tflops=28, interconnect=float("inf")),
        ),
    )
}

STORAGE: dict[str, Storage] = {
    storage.name: storage
    for storage in (
        Storage(name="SATA SSD", bandwidth=0.56, drive="Samsung 870 EVO"),
        Storage(name="NVMe Gen3", bandwidth=3.5, drive="Samsung 970 EVO Plus"),
        Storage(name="NVMe Gen4", bandwidth=7.45, drive="Samsung 990 PRO"),
        Storage(name="NVMe Gen5", bandwidth=14.7, drive="Samsung 9100 PRO"),
    )
}


def find_host(name: str) -> Host:
    """The host called `name`.

    Raises:
        ModelError: There is no such host; the message lists the choices.

    Example:
        >>> from profiler import find_host
        >>> find_host("DDR5-5600 desktop").bandwidth
        89.6
    """
    if name not in HOSTS:
        raise ModelUsageError(f"unknown host {name!r}: expected one of {', '.join(HOSTS)}")
    return HOSTS[name]


def find_storage(name: str) -> Storage:
    """The storage called `name`.

    Raises:
        ModelError: There is no such storage; the message lists the choices.

    Example:
        >>> from profiler import find_storage
        >>> find_storage("NVMe Gen4").bandwidth
        7.45
    """
    if name not in STORAGE:
        raise ModelUsageError(f"unknown storage {name!r}: expected one of {', '.join(STORAGE)}")
    return STORAGE[name]
