"""How routing leaves vLLM: a hook on expert selection in the fused MoE layers, streamed to Parquet.

vLLM finds the plugin through the entry point group `vllm.general_plugins`; it does nothing unless the environment variable
`SPECMOE_CAPTURE` is 1. `releases` knows which function chooses experts in which release, `hook` wraps it, `buffers` hold what
the hooks copy, `steps` labels rows with their requests, `recorder` queues and `capture_files` write them. `recording` is for
programs with an `LLM` of their own, `serving` for servers, `source` for the patch of a local vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_patch.recording import Recording, enable

__all__ = ["Recording", "enable"]


def __getattr__(name: str) -> Any:
    # vLLM imports this package for its plugin, in every process: that must cost nothing where nothing is recorded.
    if name in __all__:
        from vllm_patch import recording

        return getattr(recording, name)
    raise AttributeError(f"module 'vllm_patch' has no attribute {name!r}")
