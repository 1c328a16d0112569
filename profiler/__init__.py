"""Collect and read traces of the expert routing of mixture-of-experts models.

`Trace.open(path)` reads a trace; it needs neither PyTorch nor an inference engine. `TraceCollector` records one. `find_gpu`,
`find_host` and `find_storage` name hardware for estimates of speed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from profiler.errors import DatasetError, EngineError, ModelError, SpecmoeError, TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import DatasetMetadata, Metadata, RoutingChunk

if TYPE_CHECKING:
    from profiler.capture.options import CaptureOptions
    from profiler.collect.collection import Collection
    from profiler.collect.collector import TraceCollector
    from profiler.datasets.problems import Problem
    from profiler.engines import Sampling
    from profiler.models.gpus import Gpu, find_gpu
    from profiler.models.hosts import Host, Storage, find_host, find_storage

__all__ = [
    "CaptureOptions",
    "Collection",
    "DatasetError",
    "DatasetMetadata",
    "EngineError",
    "Gpu",
    "Host",
    "Metadata",
    "ModelError",
    "Problem",
    "RoutingChunk",
    "Sampling",
    "SpecmoeError",
    "Storage",
    "Trace",
    "TraceCollector",
    "TraceError",
    "find_gpu",
    "find_host",
    "find_storage",
]

# Imported on first use: a program that only reads traces must not pay for the imports that collecting one needs.
_MODULES = {
    "CaptureOptions": "capture.options",
    "Collection": "collect.collection",
    "Gpu": "models.gpus",
    "Host": "models.hosts",
    "Problem": "datasets.problems",
    "Sampling": "engines",
    "Storage": "models.hosts",
    "TraceCollector": "collect.collector",
    "find_gpu": "models.gpus",
    "find_host": "models.hosts",
    "find_storage": "models.hosts",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"profiler.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'profiler' has no attribute {name!r}")
