"""The counts and the choice as a table for each layer, for the formats `json` and `csv`."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from profiler.exporters.content import Content


class LayerTable(BaseModel):
    """One layer's experts, in the order of their ids.

    Attributes:
        layer: Index of the decoder layer.
        tokens: Training tokens that were routed to each expert.
        share: The same over all choices of the layer.
        mass: Sum of their routing weights.
        rank: Place of each expert, 0 for the first, by what experts were ranked by; in its layer, or, with the scope
            "global", among the experts of all layers.
        kept: Ids of the kept experts.
        held_out_tokens: Held-out tokens that were routed to each expert.
    """

    model_config = ConfigDict(extra="forbid")

    layer: int
    tokens: list[int]
    share: list[float]
    mass: list[float]
    rank: list[int]
    kept: list[int]
    held_out_tokens: list[int]


def tables(content: Content) -> list[LayerTable]:
    """The table of each MoE layer."""
    score_LE = content.score_LE
    share_LE = content.counts.tokens_LE / np.maximum(content.counts.tokens_LE.sum(1, keepdims=True), 1)
    rank_LE = np.empty(score_LE.shape, dtype=np.int64)
    if content.report.scope == "global":
        rank_LE.reshape(-1)[np.argsort(-score_LE.reshape(-1), kind="stable")] = np.arange(score_LE.size)
    else:
        order_LE = np.argsort(-score_LE, axis=1, kind="stable")
        np.put_along_axis(rank_LE, order_LE, np.arange(score_LE.shape[1])[None], axis=1)
    return [
        LayerTable(
            layer=layer,
            tokens=content.counts.tokens_LE[row].tolist(),
            share=share_LE[row].tolist(),
            mass=content.counts.mass_LE[row].tolist(),
            rank=rank_LE[row].tolist(),
            kept=np.flatnonzero(content.kept_LE[row]).tolist(),
            held_out_tokens=content.held_out.tokens_LE[row].tolist(),
        )
        for row, layer in enumerate(content.model.moe_layers)
    ]
