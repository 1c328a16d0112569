"""Build the metadata of a captured trace, in one place for collections, user programs and servers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from profiler.trace.schema import Metadata, ModelMetadata


def describe_kernels(kernels: dict[str, str | None], *, replaced_only: bool = False) -> list[str]:
    """One line per kernel that computed experts: what it is and why vLLM used it.

    kernels: kernel -> the one that vLLM would use without capture; None if it is the same. replaced_only: only lines about
    kernels that vLLM chose because of capture.
    """
    return [
        f"experts computed by {kernel}, vLLM's own choice"
        if own is None
        else f"experts computed by {kernel}: vLLM's own choice, {own}, selects experts internally, where capture does not see "
        "it (the difference in speed was not measured)"
        for kernel, own in kernels.items()
        if own is not None or not replaced_only
    ]


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
