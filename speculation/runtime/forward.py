"""The computation of experts, one at a time and in any order, with the same result as all at once.

It follows the eager forward pass of `transformers`: each expert gets all its tokens in one product, and a token's outputs are
added in the order of the experts' numbers. So the result does not depend on which expert arrives first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

from speculation.runtime.storage.layout import Weights


def is_supported(experts: Any) -> bool:
    """Whether a module computes experts in the way of `transformers`' experts interface, which this module follows."""
    has_interface = all(hasattr(experts, name) for name in ("is_transposed", "has_bias", "has_gate", "_apply_gate"))
    return has_interface and (bool(experts.has_gate) or hasattr(experts, "act_fn"))


def resident_forward(
    experts: Any, hidden_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The same computation for experts that are all in the module's own parameters, `[T, D]`."""
    parameters = dict(experts.named_parameters(recurse=False))
    chosen = torch.unique(expert_ids_TK).tolist()
    ready = ((expert, {name: value[expert] for name, value in parameters.items()}) for expert in chosen)
    return weighted_sum(experts, hidden_TD, expert_ids_TK, weights_TK, ready)


def weighted_sum(
    experts: Any,
    hidden_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    ready: Iterable[tuple[int, Weights]],
) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs, `[T, D]`.

    Args:
        experts: The experts module: how a layer's experts are computed.
        hidden_TD: Its inputs.
        expert_ids_TK: The experts of each token, in any order.
        weights_TK: Their routing weights.
        ready: Every chosen expert once, with its weights, in any order. The weights are used before the next one is requested.
    """
    tokens, top_k = expert_ids_TK.shape
    ids_TK, place_TK = expert_ids_TK.sort(dim=-1)
    scale_N = weights_TK.gather(-1, place_TK).reshape(-1, 1)
    outputs_ND = hidden_TD.new_empty((tokens * top_k, hidden_TD.shape[-1]))
    if tokens == 1:
        # The usual case while text is generated: no expert is needed twice.
        place_of = {expert: place for place, expert in enumerate(ids_TK[0].tolist())}
        for expert, weights in ready:
            place = place_of[expert]
            outputs_ND[place : place + 1] = one_expert(experts, weights, hidden_TD) * scale_N[place]
    else:
        ids_N, order_N = ids_TK.reshape(-1).sort(stable=True)
        found, counts = torch.unique_consecutive(ids_N, return_counts=True)
        ends = counts.cumsum(0).tolist()
        span_of = dict(zip(found.tolist(), zip([0, *ends[:-1]], ends, strict=True), strict=True))
        for expert, weights in ready:
            first, end = span_of[expert]
            entries_N = order_N[first:end]
            out_ND = one_expert(experts, weights, hidden_TD[entries_N // top_k]) * scale_N[entries_N]
            outputs_ND[entries_N] = out_ND.to(outputs_ND.dtype)
    outputs_TKD = outputs_ND.view(tokens, top_k, -1)
    sum_TD = outputs_TKD[:, 0].clone()
    for place in range(1, top_k):
        sum_TD += outputs_TKD[:, place]
    return sum_TD


def one_expert(experts: Any, weights: Weights, hidden_ND: torch.Tensor) -> torch.Tensor:
    """The output of one expert for some tokens, `[N, D]`, without routing weights. It is computed where its weights are."""
    device = next(iter(weights.values())).device
    if device != hidden_ND.device:
        return one_expert(experts, weights, hidden_ND.to(device)).to(hidden_ND.device)
    if experts.has_gate:
        inner = experts._apply_gate(_product(experts, weights, "gate_up_proj", hidden_ND))
    else:
        inner = experts.act_fn(_product(experts, weights, "up_proj", hidden_ND))
    return _product(experts, weights, "down_proj", inner)


def _product(experts: Any, weights: Weights, name: str, inputs: torch.Tensor) -> torch.Tensor:
    matrix, bias = weights[name], weights.get(f"{name}_bias")
    if experts.is_transposed:
        found = inputs @ matrix
        return found if bias is None else found + bias
    return functional.linear(inputs, matrix, bias)
