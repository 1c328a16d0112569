"""Find signs that a trace, although well formed, is not the routing of text: a warm-up, padding, or placeholder weights."""

from __future__ import annotations

from itertools import islice
from math import comb

import numpy as np
import numpy.typing as npt

from profiler.trace.hashing import hash_rows
from profiler.trace.reader import Trace
from profiler.trace.schema import RoutingChunk

# At most this many row groups are read, spread evenly over the problems: about 4 million rows.
SAMPLED_GROUPS = 32
# Share of the tokens beyond which a route or equal weights are reported.
MAJORITY = 0.5
# With fewer possible sets of experts per layer, a real router may well prefer one of them.
MIN_POSSIBLE_SETS = 100


def doubts(trace: Trace) -> list[str]:
    """List what is implausible about a trace, one line each; empty for nearly every recording of real text.

    Reads a sample of the routing. Raises `TraceError` if its rows break the format.
    """
    layers = trace.metadata.model.moe_layers
    found = []
    if len(layers) == 1:
        found.append(f"implausible: only one MoE layer was recorded, layer {layers[0]}")
    sample = list(_sample(trace))
    if not sample:
        return found
    repeated = _repeated_layers(sample, trace)
    if repeated:
        where = "every layer" if 1 < len(repeated) == len(layers) else f"layer {', '.join(map(str, repeated))}"
        share = f"{min(repeated.values()):.0%} of the tokens or more"
        found.append(f"implausible: {share} have the same route at {where}: a warm-up, padding, or a faulty recorder")
    equal = _equal_weights(sample)
    if equal > MAJORITY:
        found.append(f"implausible: {equal:.0%} of the rows have K equal weights, which no router computes: placeholders")
    return found


def _sample(trace: Trace) -> list[RoutingChunk]:
    spans = trace.spans(SAMPLED_GROUPS)
    chunks = SAMPLED_GROUPS // max(1, len(spans))
    return [chunk for span in spans for chunk in islice(trace.chunks(whole_problems=False, problems=span), chunks)]


def _repeated_layers(sample: list[RoutingChunk], trace: Trace) -> dict[int, float]:
    """The decoder layers at which most sampled tokens have the same route, with their share."""
    model = trace.metadata.model
    ids_NK = np.concatenate([chunk.expert_ids_TLK.reshape(-1, model.top_k) for chunk in sample])
    routes_N = hash_rows(ids_NK)
    weights_NK = _weights(sample)
    # Weights that never vary say nothing about a token.
    if weights_NK is not None and (weights_NK != weights_NK[0]).any():
        routes_N ^= hash_rows(weights_NK) << np.uint64(1)
    elif comb(model.num_experts, model.top_k) < MIN_POSSIBLE_SETS:
        return {}
    routes_TL = routes_N.reshape(-1, len(model.moe_layers))
    # A route of more than half of the tokens is also the median.
    medians_L = np.partition(routes_TL, len(routes_TL) // 2, axis=0)[len(routes_TL) // 2]
    shares = zip(model.moe_layers, (routes_TL == medians_L).mean(0).tolist(), strict=True)
    return {layer: share for layer, share in shares if share > MAJORITY and len(routes_TL) > 1}


def _equal_weights(sample: list[RoutingChunk]) -> float:
    """The share of sampled rows whose K weights, more than one, are all the same."""
    weights_NK = _weights(sample)
    if weights_NK is None or weights_NK.shape[1] == 1:
        return 0.0
    return float((weights_NK == weights_NK[:, :1]).all(1).mean())


def _weights(sample: list[RoutingChunk]) -> npt.NDArray[np.float16] | None:
    weights = [chunk.weights_TLK.reshape(-1, chunk.weights_TLK.shape[-1]) for chunk in sample if chunk.weights_TLK is not None]
    return np.concatenate(weights) if weights else None
