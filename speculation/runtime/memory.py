"""How much memory a run took."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


def peak_memory() -> int:
    """The most bytes of memory that this process has had in use so far."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # What `getrusage` says of a new process includes the memory of the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def peak_device_memory(device: torch.device) -> int | None:
    """The most bytes that this process has had in use on a GPU so far; None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
