"""The metadata of a trace that an engine recorded, made in one place for collections, programs and servers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from profiler.trace.schema import Metadata, ModelMetadata


def captured_metadata(
    model: ModelMetadata,
    loaded: dict[str, Any],
    *,
    engine: str,
    versions: dict[str, str],
    hook: str,
    capture: dict[str, Any],
    **rest: Any,
) -> Metadata:
    """`model` as its config says, with what is `loaded` (MoE layers, E, K, dtype) in place of it.

    versions: of the engine; this package's is added. capture: how it was recorded. rest: further fields of `Metadata`.
    """
    return Metadata(
        model=model.model_copy(update=loaded),
        engine=engine,
        versions=versions | {"speculative-moe": version("speculative-moe")},
        hook=hook,
        capture=capture,
        **rest,
    )
