"""Collect and read traces of the expert routing of mixture-of-experts models.

`Trace.open(path)` reads a trace; it needs neither PyTorch nor an inference engine. `TraceCollector` records one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from profiler.errors import DatasetError, EngineError, ModelError, SpecmoeError, TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata, RoutingChunk

if TYPE_CHECKING:
    from profiler.collect.collector import TraceCollector

__all__ = [
    "DatasetError",
    "EngineError",
    "Metadata",
    "ModelError",
    "RoutingChunk",
    "SpecmoeError",
    "Trace",
    "TraceCollector",
    "TraceError",
]


def __getattr__(name: str) -> Any:
    # Imported lazily: a program that only reads traces must not pay for the imports that collecting one needs.
    if name == "TraceCollector":
        from profiler.collect.collector import TraceCollector

        return TraceCollector
    raise AttributeError(f"module 'profiler' has no attribute {name!r}")
