"""Which attention kernels vLLM must use on this machine."""

from __future__ import annotations

from typing import Any


def float32_attention(latent_attention: bool, dtype: str) -> dict[str, Any]:
    """The argument of `vllm.LLM` without which a model does not load in float32 on this CPU; empty where it needs none.

    On a CPU with AMX, vLLM 0.32 takes kernels for latent attention that support only bfloat16, whatever the model's type.

    Args:
        latent_attention: Whether the model has multi-head latent attention, as DeepSeek-V2 and V3 do.
        dtype: The type that the model computes in.
    """
    if dtype != "float32" or not latent_attention:
        return {}
    import torch

    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if torch.cuda.is_available() or not has_amx():
        return {}
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return {"attention_backend": "CPU_MLA"} if "AMX_MLA" in AttentionBackendEnum.__members__ else {}
