"""Resource usage of a collection, sampled in a thread: memory of this process and its children, and of the GPUs."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Any, Self

import psutil
from pydantic import BaseModel, ConfigDict

EVERY_SECONDS = 1.0


class Usage(BaseModel):
    """Peak memory in bytes and mean GPU utilization in percent. GPU values are None where NVML does not report them.

    host_bytes: resident memory of the process and all its descendants; a page that several of them share counts for each.
    device_bytes: memory in use on all GPUs, by any process. gpu_utilization: mean over samples and GPUs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host_bytes: int = 0
    device_bytes: int | None = None
    gpu_utilization: float | None = None

    def __str__(self) -> str:
        parts = [f"peak memory {self.host_bytes / 1e9:.1f} GB"]
        if self.device_bytes is not None:
            parts.append(f"{self.device_bytes / 1e9:.1f} GB on the GPU")
        if self.gpu_utilization is not None:
            parts.append(f"GPU {self.gpu_utilization:.0f} % busy")
        return ", ".join(parts)


class UsageMonitor:
    """Context manager that samples the usage once a second."""

    def __init__(self) -> None:
        self._host = 0
        self._device: int | None = None
        self._busy: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="specmoe-usage", daemon=True)

    @property
    def usage(self) -> Usage:
        """The usage over the samples so far."""
        busy = self._busy
        return Usage(
            host_bytes=self._host,
            device_bytes=self._device,
            gpu_utilization=sum(busy) / len(busy) if busy else None,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        devices = _open_devices()
        while True:
            self._sample(devices)
            if self._done.wait(EVERY_SECONDS):
                return

    def _sample(self, devices: list[Any]) -> None:
        self._host = max(self._host, _resident_bytes())
        if not devices:
            return
        import pynvml

        # MIG slices and some virtual GPUs answer only one of the two queries.
        with contextlib.suppress(pynvml.NVMLError):
            used = sum(int(pynvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices)
            self._device = max(self._device or 0, used)
        with contextlib.suppress(pynvml.NVMLError):
            self._busy.append(sum(pynvml.nvmlDeviceGetUtilizationRates(device).gpu for device in devices) / len(devices))


def _resident_bytes() -> int:
    total = 0
    process = psutil.Process()
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.Error:
            # The process ended after it was listed.
            continue
    return total


def _open_devices() -> list[Any]:
    """NVML handles of all GPUs; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
