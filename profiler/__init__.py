"""Traces of expert routing: format, collection, reading. `Trace.open(path)` needs neither torch nor an engine."""

from profiler.errors import DatasetError, EngineError, ModelError, SpecmoeError, TraceError
from profiler.reader import Trace
from profiler.schema import Metadata, RoutingChunk

__all__ = ["DatasetError", "EngineError", "Metadata", "ModelError", "RoutingChunk", "SpecmoeError", "Trace", "TraceError"]
