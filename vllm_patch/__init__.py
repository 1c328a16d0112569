"""Records routing inside vLLM: a hook on expert selection in the fused MoE layers, streamed to Parquet.

vLLM finds the plugin through the entry point group `vllm.general_plugins`. The plugin does nothing unless the environment
variable `SPECMOE_CAPTURE` is 1, or live metrics are switched on. `releases` knows which function selects experts in which
release, `routers` wraps it, and `worker` records with `capture` what the routers of one worker choose; `live` counts it.
`recording` is for programs that create their own `LLM` (`matching` finds the request of each output), `serving` for servers,
and `source` patches a local vLLM.

Example:
    >>> import vllm_patch
    >>> vllm_patch.enable()  # before vLLM starts
    >>> from vllm import LLM
    >>> from profiler.models.resolve import demo_model_folder
    >>> llm = LLM(str(demo_model_folder()))
    >>> with vllm_patch.Recording(llm, "traces/mine") as recording:
    ...     recording.add(llm.generate(["Why is the sky blue?"]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_patch.recording import Recording, enable, live_metrics

__all__ = ["Recording", "enable", "live_metrics"]


def __getattr__(name: str) -> Any:
    # vLLM imports this package in every process to load the plugin: the import must be cheap where nothing is recorded.
    if name in __all__:
        from vllm_patch import recording

        return getattr(recording, name)
    raise AttributeError(f"module 'vllm_patch' has no attribute {name!r}")
