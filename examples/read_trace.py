"""Read a trace with NumPy: the load of every layer's experts, and how often tokens repeat the experts of the token before.

python examples/read_trace.py traces/math
"""

from __future__ import annotations

import sys

import numpy as np

from profiler import Trace


def main() -> None:
    trace = Trace.open(sys.argv[1])
    facts = trace.metadata.model
    layers, experts = len(facts.moe_layers), facts.num_experts
    load_LE = np.zeros((layers, experts), np.int64)
    repeated_L, compared = np.zeros(layers), 0
    # Chunks hold whole problems, so memory stays bounded however large the trace is.
    for chunk in trace.chunks():
        ids_TLK = chunk.expert_ids_TLK
        for layer in range(layers):
            load_LE[layer] += np.bincount(ids_TLK[:, layer].ravel(), minlength=experts)[:experts]
        is_next_T = chunk.problem_ids_T[1:] == chunk.problem_ids_T[:-1]
        shared_TL = (ids_TLK[1:, :, :, None] == ids_TLK[:-1, :, None, :]).any(-1).mean(-1)
        repeated_L += shared_TL[is_next_T].sum(0)
        compared += int(is_next_T.sum())
    share_LE = load_LE / load_LE.sum(1, keepdims=True)
    chance = facts.top_k / experts
    print(f"{trace.path}: {facts.id}, {layers} MoE layers, top-{facts.top_k} of {experts}")
    for layer, number in enumerate(facts.moe_layers):
        busiest = int(share_LE[layer].argmax())
        print(
            f"layer {number}: expert {busiest} has {share_LE[layer, busiest]:.1%} of the load; "
            f"{repeated_L[layer] / compared:.1%} of the experts repeat (even load, independent tokens: {chance:.1%})"
        )


if __name__ == "__main__":
    main()
