"""Traces of expert routing: format, collection, reading. `Trace.open(path)` needs neither torch nor an engine."""

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
    # Reading a trace must not pay for what collecting one imports.
    if name == "TraceCollector":
        from profiler.collect.collector import TraceCollector

        return TraceCollector
    raise AttributeError(f"module 'profiler' has no attribute {name!r}")
