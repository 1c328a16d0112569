"""Check the rows of the first step: a hook that does not work must not go unnoticed."""

from __future__ import annotations

from profiler.errors import TraceError
from profiler.trace.rows import check_ids, check_weights, refuse_repeats
from vllm_patch.capture.buffers import Arrays


class BypassedHookError(RuntimeError):
    """The rows of a step are not routing: this vLLM, or its kernel, does not call the hook."""


def check_first_step(arrays: Arrays, moe_layers: list[int], num_experts: int) -> None:
    """Raise `BypassedHookError` if the rows of a step are not the routing of every layer.

    arrays: `expert_ids` and `weights` of the step, `[T, L, K]`. moe_layers: decoder layer index of each of the L MoE layers.
    """
    try:
        check_ids(arrays["expert_ids"], num_experts, "first step")
        check_weights(arrays["weights"], "first step")
        refuse_repeats(arrays["expert_ids"], "first step")
    except TraceError as error:
        unwritten = (arrays["expert_ids"] == -1).all(axis=(0, 2))
        layers = [layer for layer, missed in zip(moe_layers, unwritten, strict=True) if missed]
        reason = f"no routing arrived from layers {layers}" if layers else str(error)
        raise BypassedHookError(f"{reason}: this vLLM or its MoE kernel bypasses the hook") from error
