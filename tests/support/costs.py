"""Synthetic costs whose sums are easy to follow by hand."""

from __future__ import annotations

from speculation.offload.costs import Costs

# A copy takes 10 s, an expert 1 s, the rest of a layer 2 s.
COSTS = Costs(
    model="synthetic",
    device="none",
    precision="none",
    expert_bytes=1e9,
    copy_seconds=10.0,
    expert_seconds=1.0,
    token_seconds=0.0,
    layer_seconds=2.0,
    layer_token_seconds=0.0,
)
