"""Where vLLM's routers compute something else than the model, the trace says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from vllm_patch.routers.deviations import IGNORES_CORRECTION, IGNORES_FACTOR, find_deviations
from vllm_patch.routers.hook import MoELayer


class CPURouter(SimpleNamespace):
    """vLLM's class of this name has these attributes."""


class GroupedTopKRouter(SimpleNamespace):
    """As above."""


BIAS = torch.zeros(4)
PLAIN: dict[str, Any] = {
    "use_grouped_topk": False,
    "scoring_func": "softmax",
    "custom_routing_function": None,
    "e_score_correction_bias": None,
    "routed_scaling_factor": 1.0,
}


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (CPURouter(**PLAIN), []),
        (CPURouter(**PLAIN | {"e_score_correction_bias": BIAS}), [IGNORES_CORRECTION]),
        (CPURouter(**PLAIN | {"routed_scaling_factor": 2.0}), [IGNORES_FACTOR]),
        (CPURouter(**PLAIN | {"e_score_correction_bias": BIAS, "use_grouped_topk": True}), []),
        (GroupedTopKRouter(**PLAIN | {"e_score_correction_bias": BIAS}), []),
        (None, []),
    ],
)
def test_deviations_of_a_router(router: Any, expected: list[str]) -> None:
    layers = cast("list[MoELayer]", [SimpleNamespace(module=SimpleNamespace(router=router))] * 3)
    assert find_deviations(layers) == expected
