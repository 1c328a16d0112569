"""Where vLLM's routers knowingly compute something else than the model defines. What is recorded is what vLLM computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_patch.routers.hook import MoELayer

IGNORES_CORRECTION = (
    "vLLM's CPU router ignores this model's correction bias: recorded are the experts that vLLM used, not those that the "
    "model's own router selects"
)
IGNORES_FACTOR = (
    "vLLM's CPU router ignores this model's scaling factor of the weights: recorded are the weights that vLLM used, not the "
    "model's own"
)


def find_deviations(layers: list[MoELayer]) -> list[str]:
    """How the routers of a loaded model differ from the model's own, one sentence each; empty where none is known.

    vLLM's CPU router (read in 0.32) applies a correction bias and a scaling factor only in its grouped form.
    """
    found = []
    for layer in layers:
        router: Any = getattr(layer.module, "router", None)
        if type(router).__name__ != "CPURouter" or router.scoring_func != "softmax":
            continue
        if router.use_grouped_topk or router.custom_routing_function is not None:
            continue
        if getattr(router, "e_score_correction_bias", None) is not None:
            found.append(IGNORES_CORRECTION)
        if getattr(router, "routed_scaling_factor", 1.0) != 1.0:
            found.append(IGNORES_FACTOR)
    return sorted(set(found))
