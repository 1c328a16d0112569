"""Routes with known experts."""

from __future__ import annotations

import numpy as np

from profiler.trace.schema import RoutingChunk
from speculation.data.routes import Routes, make_routes


def routes_of(lengths: list[tuple[int, int]], experts: int = 8, layers: int = 2, top_k: int = 2, seed: int = 0) -> Routes:
    """Problems of (prompt, generated) tokens with random routes."""
    random = np.random.default_rng(seed)
    total = sum(prompt + generated for prompt, generated in lengths)
    chunk = RoutingChunk(
        problem_ids_T=np.repeat(np.arange(len(lengths)), [sum(each) for each in lengths]).astype(np.int32),
        token_ids_T=np.concatenate([np.arange(sum(each)) for each in lengths]).astype(np.int32),
        expert_ids_TLK=np.argsort(random.random((total, layers, experts)), -1)[..., :top_k].astype(np.uint8),
        weights_TLK=np.full((total, layers, top_k), 1 / top_k, dtype=np.float16),
    )
    is_decode = np.concatenate([np.arange(prompt + generated) >= prompt for prompt, generated in lengths])
    return Routes(**{**vars(make_routes(chunk)), "is_decode_T": is_decode})
