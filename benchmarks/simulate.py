"""Speed of the simulation: requests per second of every policy, with and without prefetching and a host, compared with a plain
Python LRU.

    python -m benchmarks.simulate [--trace DIR] [--requests N]

A request is one token at one layer: K experts at once. Runs on one core, with compiled code warm, on synthetic requests of
gpt-oss-20b's shape (24 layers of 32 experts, top-4), in which a token's experts resemble those of the previous token. Times are
CPU times, medians of three.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from profiler.models.gpus import find_gpu
from profiler.models.hosts import find_host
from profiler.models.registry import MODELS
from profiler.trace.reader import Trace
from speculation.data.routes import load_routes
from speculation.offload.costs import costs_of
from speculation.offload.plans import oracle_plan, popularity_plan
from speculation.offload.requests import Requests, requests_of
from speculation.offload.simulation.records import Count, Miss
from speculation.offload.simulation.simulate import Setting, Workload, simulate
from speculation.offload.state import Rule

LAYERS, EXPERTS, TOP_K = 24, 32, 4
ROUNDS = 3
# The plain version is timed on this fraction of the requests: one in 20.
PLAIN_SHARE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="default: synthetic requests")
    parser.add_argument("--requests", type=int, default=4_000_000)
    arguments = parser.parse_args()
    requests = read_requests(arguments.trace) if arguments.trace else synthetic_requests(arguments.requests // LAYERS)
    workload = Workload(requests, np.tile(np.arange(requests.num_experts, 0, -1.0), (requests.layers, 1)))
    count = requests.steps * requests.layers
    capacity = requests.num_experts // 4
    print(
        f"{count:,} requests of {requests.top_k} of {requests.num_experts} experts, {requests.layers} layers; {capacity} cached"
    )

    began = time.process_time()
    _ = workload.ahead
    print(f"next uses, for Belady: {count / (time.process_time() - began) / 1e6:.2f} M requests/s")
    few = requests.first_steps(requests.steps // PLAIN_SHARE)
    found = []
    plain = seconds(lambda: found.append(plain_lru(few, capacity))) * requests.steps / few.steps
    ours = simulate(Workload(few, workload.popularity_LE), Setting(Rule.LRU, capacity)).total(Count.HIT)
    print(
        f"plain Python LRU, on 1/{PLAIN_SHARE}: {count / plain / 1e6:.3f} M requests/s; hits {found[0]:,}, simulated {ours:,}"
    )
    scores = np.random.default_rng(0).random((requests.steps, requests.layers * requests.num_experts), dtype=np.float32)
    for is_global in (False, True):
        size = capacity * requests.layers if is_global else capacity
        for rule in Rule:
            took = seconds(partial(simulate, workload, Setting(rule, size, is_global), scores_SX=scores))
            where = "one cache for all layers" if is_global else "a cache per layer"
            print(f"{rule.label}, {where}: {count / took / 1e6:.2f} M requests/s, {plain / took:.1f} x plain LRU")
    costs = costs_of(MODELS["gpt-oss-20b"], find_gpu("RTX 4090"), host=find_host("DDR5-5600 desktop"))
    for name, plan in (
        ("nothing", None),
        ("popularity", popularity_plan(workload.popularity_LE, requests.top_k, 1, requests)),
        ("oracle", oracle_plan(requests, 1)),
        ("oracle, 4 layers ahead", oracle_plan(requests, 4)),
    ):
        for rule, miss, is_global in (
            (Rule.LRU, Miss.COPY, False),
            (Rule.LRU, Miss.COPY, True),
            (Rule.LRU, Miss.HOST, False),
            (Rule.BELADY, Miss.COPY, False),
        ):
            size = capacity * requests.layers if is_global else capacity
            took = seconds(partial(simulate, workload, Setting(rule, size, is_global, miss=miss), plan, costs))
            where = "one cache for all layers" if is_global else "a cache per layer"
            print(
                f"{rule.label}, {where}, misses: {miss.name.lower()}, {name} prefetched, with times: "
                f"{count / took / 1e6:.2f} M requests/s, {plain / took:.1f} x plain LRU"
            )
    if not arguments.trace:
        for part in (10, 3, 1):
            some = synthetic_requests(arguments.requests // LAYERS // part)
            work = Workload(some, workload.popularity_LE)
            took = seconds(partial(simulate, work, Setting(Rule.LRU, capacity)))
            print(f"lru, {some.steps * LAYERS:,} requests: {took / (some.steps * LAYERS) * 1e9:.0f} ns per request")


def seconds(run: Callable[[], object]) -> float:
    """The median CPU time of `ROUNDS` rounds, after a warm-up round that compiles code and allocates arrays."""
    run()
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return median(found)


def plain_lru(requests: Requests, capacity: int) -> int:
    """Hits of one least-recently-used cache per layer, implemented with ordered dictionaries."""
    caches: list[OrderedDict[int, None]] = [OrderedDict.fromkeys(range(capacity - 1, -1, -1)) for _ in range(requests.layers)]
    experts, starts = requests.experts_N.tolist(), requests.starts_R.tolist()
    hits = 0
    for request in range(len(starts) - 1):
        cache = caches[request % requests.layers]
        chosen = experts[starts[request] : starts[request + 1]]
        for expert in chosen:
            if expert in cache:
                hits += 1
                cache.move_to_end(expert)
        for expert in chosen:
            if expert not in cache:
                cache.popitem(last=False)
                cache[expert] = None
        for expert in reversed(chosen):
            cache.move_to_end(expert)
    return hits


def synthetic_requests(steps: int) -> Requests:
    """Requests in which each token keeps half of the previous token's experts at each layer; the others are random."""
    random = np.random.default_rng(0)
    score_SLE = random.random((steps, LAYERS, EXPERTS), dtype=np.float32)
    ids_SLK = np.argpartition(score_SLE, TOP_K, axis=2)[:, :, :TOP_K].astype(np.int32)
    half = TOP_K // 2
    for step in range(1, steps):
        before, now = ids_SLK[step - 1, :, :half], ids_SLK[step]
        is_new = ~(now[:, :, None] == before[:, None, :]).any(2)
        order = np.argsort(~is_new, axis=1, kind="stable")
        ids_SLK[step] = np.concatenate([before, np.take_along_axis(now, order, 1)[:, : TOP_K - half]], axis=1)
    return Requests.decoded(
        ids_SLK.reshape(-1),
        np.arange(steps * LAYERS + 1, dtype=np.int64) * TOP_K,
        layers=LAYERS,
        num_experts=EXPERTS,
        top_k=TOP_K,
    )


def read_requests(path: Path) -> Requests:
    """The requests of a trace, with one sequence running at a time."""
    trace = Trace.open(path)
    return requests_of(load_routes(trace, "all"), trace.metadata.model.num_experts)


if __name__ == "__main__":
    main()
