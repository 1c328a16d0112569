"""What a collection takes, of this process and of those that it starts."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from profiler.collect.usage import Usage, UsageMonitor

MEMORY = 300 << 20


def test_memory_of_children_counts_and_its_peak_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiler.collect.usage.EVERY_SECONDS", 0.05)
    with UsageMonitor() as monitor:
        time.sleep(0.2)
        before = monitor.usage.host_bytes
        code = f"import time; held = bytearray(b'x' * {MEMORY}); print('ready', flush=True); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.3)
        finally:
            child.kill()
            child.wait()
        time.sleep(0.2)
    assert before > 10_000_000
    assert monitor.usage.host_bytes > before + 0.9 * MEMORY


def test_gpus_are_asked_where_nvml_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    # What NVML gives: two GPUs, whose use of memory and whose utilization differ from sample to sample.
    import pynvml

    used, busy = iter([10, 20, 30, 5, 1, 1] * 50), iter([100, 50, 0, 50, 80, 20] * 50)
    monkeypatch.setattr("profiler.collect.usage.EVERY_SECONDS", 0.01)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda device: SimpleNamespace(used=next(used) * 10**9))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda device: SimpleNamespace(gpu=next(busy)))
    with UsageMonitor() as monitor:
        while len(monitor._busy) < 3:
            time.sleep(0.01)
    assert monitor.usage.device_bytes == 35 * 10**9
    assert 25 <= (monitor.usage.gpu_utilization or 0) <= 75
    assert "35.0 GB on the GPU" in str(monitor.usage)


def test_a_gpu_that_does_not_tell_how_busy_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # As parts of GPUs (MIG) do.
    import pynvml

    def refuse(device: int) -> None:
        raise pynvml.NVMLError_NotSupported

    monkeypatch.setattr("profiler.collect.usage.EVERY_SECONDS", 0.01)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda device: SimpleNamespace(used=5 * 10**9))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", refuse)
    with UsageMonitor() as monitor:
        time.sleep(0.1)
    assert (monitor.usage.device_bytes, monitor.usage.gpu_utilization) == (5 * 10**9, None)


def test_without_a_gpu_nothing_is_said_of_one() -> None:
    assert str(Usage(host_bytes=3_200_000_000)) == "peak memory 3.2 GB"
