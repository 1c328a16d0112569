"""Speculative decoding: which forms can be recorded, and what the metadata says of them.

vLLM's target model verifies draft tokens by computing them at the positions where they would stand, so they are routed. Where a
draft is rejected, the same positions are computed again in the next step, and sealing keeps the last row of each position; rows
behind the end of a sequence are dropped. What remains are the tokens of the output. The draft model's own MoE layers are not
part of the target model, and have no hooks.
"""

from __future__ import annotations

from typing import Any

from vllm_patch.releases import Hook

# The forms that were compared with transformers. Others may choose the drafts to verify on the device, after the scheduler.
METHODS = ("ngram", "draft_model", "eagle", "mtp")


def refuse_unsupported_speculation(config: Any, hook: Hook) -> None:
    """Raise `UnsupportedModelError` for forms of speculative decoding that would mislabel rows.

    config: vLLM's `VllmConfig`.
    """
    from vllm_patch.routers.hook import UnsupportedModelError

    speculative = config.speculative_config
    if speculative is None:
        return
    if speculative.method not in METHODS:
        raise UnsupportedModelError(
            f"speculative decoding with method {speculative.method!r}: only {', '.join(METHODS)} can be recorded"
        )
    if hook.owner == "module":
        raise UnsupportedModelError(
            "on CPU, this release routes target and draft models with the same function: run without speculative_config"
        )
    if getattr(config.scheduler_config, "async_scheduling", False):
        raise UnsupportedModelError(
            "with speculative decoding and asynchronous scheduling, only the device knows how many drafts were accepted: "
            "use async_scheduling=False"
        )


def describe_speculation(config: Any) -> dict[str, Any]:
    """What the metadata's `capture` says of speculative decoding: its method and number of draft tokens; empty if it is off."""
    speculative = config.speculative_config
    if speculative is None:
        return {}
    return {"speculative_decoding": {"method": speculative.method, "draft_tokens": speculative.num_speculative_tokens}}
