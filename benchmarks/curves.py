"""Speed of the curves: hits of every cache size from one pass, compared with a simulation of every size.

    python -m benchmarks.curves [--trace DIR] [--requests N]

Runs on one core, with compiled code warm, on the requests of `benchmarks.simulate`: gpt-oss-20b's shape, one token a step; and
on requests of 8 tokens each. Where one cache serves all layers, 8 of its sizes are simulated and scaled up. CPU seconds,
medians of three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.simulate import LAYERS, read_requests, synthetic_requests
from speculation.offload.curves.hit_curves import lru_curves
from speculation.offload.curves.slots import best_slots
from speculation.offload.requests import Requests
from speculation.offload.simulation.records import Count
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule

ROUNDS = 3
SIZES = 8
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="default: synthetic requests")
    parser.add_argument("--requests", type=int, default=400_000)
    arguments = parser.parse_args()
    requests = read_requests(arguments.trace) if arguments.trace else synthetic_requests(arguments.requests // LAYERS)
    for each in (requests, in_batches(requests, BATCH)):
        workload = Workload(each, np.tile(np.arange(each.num_experts, 0, -1.0), (each.layers, 1)))
        _ = workload.ahead
        count = len(each.starts_R) - 1
        print(f"{count:,} requests of {len(each.experts_N) / count:.1f} of {each.num_experts} experts, {each.layers} layers")
        for is_global in (False, True):
            every = each.num_experts * (each.layers if is_global else 1)
            sizes = np.unique(np.linspace(1, every, SIZES).astype(int)).tolist() if is_global else list(range(1, every + 1))
            curves = lru_curves(workload, is_global=is_global)
            found = {size: simulate(workload, Setting(Rule.LRU, size, is_global)).counts_LC[:, Count.HIT] for size in sizes}
            wrong = [size for size, hits in found.items() if (curves.hits_LC[:, size] != hits).any()]
            one_pass = seconds(partial(lru_curves, workload, is_global=is_global))
            simulated = [seconds(partial(simulate, workload, Setting(Rule.LRU, size, is_global))) for size in sizes]
            ratio = sum(simulated) / len(sizes) * every / one_pass
            where = "one cache for all layers" if is_global else "a cache per layer"
            print(
                f"{where}: {count / one_pass / 1e6:.2f} M requests/s; simulating every one of {every} sizes takes "
                f"{ratio:,.0f} x as long; other hits at {len(wrong)} of {len(sizes)} sizes"
            )
            if not is_global:
                hits_LC, total = curves.hits_LC, each.layers * each.num_experts // 4
                took = seconds(partial(best_slots, hits_LC, total))
                print(f"dividing {total} slots: {took * 1e3:.1f} ms")


def seconds(run: Callable[[], object]) -> float:
    """The median CPU time of `ROUNDS` rounds, after a warm-up round that compiles code and allocates arrays."""
    run()
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return median(found)


def in_batches(requests: Requests, batch: int) -> Requests:
    """Requests for the experts of `batch` consecutive steps at once."""
    steps, layers = requests.steps // batch, requests.layers
    step_N = np.repeat(np.arange(requests.steps * layers), np.diff(requests.starts_R)) // layers // batch
    layer_N = np.repeat(np.arange(requests.steps * layers) % layers, np.diff(requests.starts_R))
    request_N = (step_N * layers + layer_N)[step_N < steps]
    # Of several uses in a request, the first one counts.
    _, first_N = np.unique(request_N * requests.num_experts + requests.experts_N[: len(request_N)], return_index=True)
    first_N = first_N[np.lexsort((first_N, request_N[first_N]))]
    return replace(
        requests,
        experts_N=requests.experts_N[first_N],
        starts_R=np.searchsorted(request_N[first_N], np.arange(steps * layers + 1)),
        tokens_N=requests.tokens_N[: steps * batch],
        first_S=np.arange(steps + 1) * batch,
        is_decode_S=np.ones(steps, dtype=np.bool_),
        samples_next_N=requests.samples_next_N[: steps * batch],
        problem_S=np.full(steps, -1),
    )


if __name__ == "__main__":
    main()
