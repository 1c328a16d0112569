"""Build the metadata of a captured trace, in one place for collections, user programs and servers."""

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
    """Metadata of a trace of `model`, whose config values are replaced by those of the loaded model.

    loaded: fields of `ModelMetadata` as the engine reports them (MoE layers, E, K, dtype). versions: the engine's; this
    package's version is added. capture: how the trace was recorded. rest: further fields of `Metadata`.
    """
    return Metadata(
        model=model.model_copy(update=loaded),
        engine=engine,
        versions=versions | {"speculative-moe": version("speculative-moe")},
        hook=hook,
        capture=capture,
        **rest,
    )
