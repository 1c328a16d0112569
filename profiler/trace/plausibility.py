"""Find signs that a trace, although well formed, is not the routing of text: a warm-up, padding, or placeholder weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
# With fewer tokens, one route for most of them is not suspicious.
MIN_TOKENS = 64
# With fewer possible sets of experts per layer, a real router may well prefer one of them.
MIN_POSSIBLE_SETS = 100


def doubts(trace: Trace) -> list[str]:
    """List what is implausible about a trace, one line each; empty for nearly every recording of real text.

    Reads a sample of the routing. Raises `TraceError` if its rows break the format.
    """
    layers = trace.metadata.model.moe_layers
    found = []
    if len(layers) == 1:
        found.append(f"only one MoE layer was recorded, layer {layers[0]}")
    sample = _Sample.of(trace)
    repeated = sample.repeated_layers(trace)
    if repeated:
        where = "every layer" if 1 < len(repeated) == len(layers) else f"layer {', '.join(map(str, repeated))}"
        share = f"{min(repeated.values()):.0%} of the tokens or more"
        found.append(f"implausible: {share} have the same route at {where}: a warm-up, padding, or a faulty recorder")
    elif (same := sample.same_experts(trace)) > MAJORITY:
        found.append(
            f"implausible: {same:.0%} of the tokens have the same experts at every layer, only their weights differ: a "
            "warm-up, padding, or a faulty recorder"
        )
    equal = sample.equal_weights
    if equal > MAJORITY:
        found.append(f"implausible: {equal:.0%} of the rows have K equal weights, which no router computes: placeholders")
    return found


@dataclass(frozen=True)
class _Sample:
    """What is kept of N sampled rows, some of each part of the trace.

    routes_N: hashes of their experts and weights. experts_N: of their experts alone. equal_weights: the share of rows whose K
    weights, more than one, are all the same. weights_vary: whether there are weights that distinguish rows.
    """

    routes_N: npt.NDArray[np.uint64]
    experts_N: npt.NDArray[np.uint64]
    equal_weights: float
    weights_vary: bool

    @classmethod
    def of(cls, trace: Trace) -> _Sample:
        """Read the sample, of which one chunk at a time is in memory."""
        routes: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        experts: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        first_K: npt.NDArray[np.float16] | None = None
        equal, vary = 0, False
        for chunk in _chunks(trace):
            # In any order: with weights that are nearly equal, the stronger expert may be either.
            ids_NK = np.sort(chunk.expert_ids_TLK.reshape(-1, chunk.expert_ids_TLK.shape[-1]), axis=-1)
            experts.append(hash_rows(ids_NK))
            routes_N = experts[-1].copy()
            if chunk.weights_TLK is not None and len(routes_N):
                weights_NK = chunk.weights_TLK.reshape(len(routes_N), -1)
                # If weights never vary, this changes all hashes alike.
                routes_N ^= hash_rows(weights_NK) << np.uint64(1)
                first_K = weights_NK[0].copy() if first_K is None else first_K
                vary = vary or bool((weights_NK != first_K).any())
                equal += int((weights_NK == weights_NK[:, :1]).all(1).sum()) if len(first_K) > 1 else 0
            routes.append(routes_N)
        routes_N = np.concatenate(routes)
        return cls(routes_N, np.concatenate(experts), equal / max(1, len(routes_N)), vary)

    def repeated_layers(self, trace: Trace) -> dict[int, float]:
        """The decoder layers at which most sampled tokens have the same route, with their share."""
        model = trace.metadata.model
        routes_TL = self.routes_N.reshape(-1, len(model.moe_layers))
        # Weights that never vary say nothing about a token.
        few_routes = not self.weights_vary and comb(model.num_experts, model.top_k) < MIN_POSSIBLE_SETS
        if few_routes or len(routes_TL) < MIN_TOKENS:
            return {}
        shares = zip(model.moe_layers, _majority(routes_TL).tolist(), strict=True)
        return {layer: share for layer, share in shares if share > MAJORITY}

    def same_experts(self, trace: Trace) -> float:
        """The share of the tokens that have the most frequent experts of all layers together, if it is above `MAJORITY`."""
        model = trace.metadata.model
        experts_TL = self.experts_N.reshape(-1, len(model.moe_layers))
        possible = comb(model.num_experts, model.top_k) ** len(model.moe_layers)
        if possible < MIN_POSSIBLE_SETS or len(experts_TL) < MIN_TOKENS:
            return 0.0
        return float(_majority(hash_rows(experts_TL)[:, None])[0])


def _majority(hashes_TL: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """The share of tokens with their layer's median hash `[L]`: the hash of more than half of them, if there is one."""
    medians_L = np.partition(hashes_TL, len(hashes_TL) // 2, axis=0)[len(hashes_TL) // 2]
    return np.asarray((hashes_TL == medians_L).mean(0))


def _chunks(trace: Trace) -> Iterator[RoutingChunk]:
    spans = trace.spans(SAMPLED_GROUPS)
    chunks = SAMPLED_GROUPS // max(1, len(spans))
    for span in spans:
        yield from islice(trace.chunks(whole_problems=False, problems=span), chunks)
