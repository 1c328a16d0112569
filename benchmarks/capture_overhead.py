"""The cost of capture compared with alternatives: tokens/s relative to plain vLLM, on the same prompts, interleaved in one run.

    python -m benchmarks.capture_overhead [--model demo|dummy] [--rounds 7] [--compiled] [--routed-experts]
    python -m benchmarks.capture_overhead --only off,again,live,shadow --shadow RUN

The arms `off`, `on` and `writing` are those of `python -m vllm_patch check --overhead`; `vllm_patch/check/overhead.py` explains
how they take turns. Further arms:

    again      vLLM without a plugin in a second engine: shows how far from 1 the ratio of two equal engines is
    logger     a plain hook as in published patches: .tolist() for each layer and a line of JSON for each token
    live       live metrics are counted (SPECMOE_LIVE=1), and nothing is recorded
    shadow     as `live`, and a run is scored on 5 % of the requests (SPECMOE_SHADOW), with --shadow RUN
    routed     vLLM's own enable_return_routed_experts (ids only), with --routed-experts; on CPU it runs with 0.30 only

The dummy model has random weights and Mixtral's shape (on a CPU, 8 layers of hidden size 512): it shows the cost of capture and
says nothing about routing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiler.live.metrics import DROPPED, SAMPLED, SHARE, TOKENS, Samples
from profiler.live.options import FOLDER_VARIABLE
from profiler.live.publication import read_publications
from profiler.models.resolve import demo_model_folder
from vllm_patch.check.overhead import (
    Arm,
    OverheadPlan,
    OverheadWorkload,
    gpu_bytes,
    measure_workload,
    parse_plan,
    plan_for,
    serve,
)

ARMS = ("off", "again", "on", "writing", "logger")
LIVE_ARMS = ("live", "shadow")
PROMPT_TOKENS, NEW_TOKENS = 64, 128


class PlainLogger:
    """A worker extension that hooks every router, as a simple patch would."""

    model_runner: Any

    def plain_logger_start(self, path: str) -> None:
        file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the engine lives
        for module in self.model_runner.get_model().modules():
            router: Any = getattr(module, "router", None)
            if hasattr(router, "_compute_routing"):
                router._compute_routing = _logging(router._compute_routing, module.layer_id, file)


def _logging(compute_routing: Any, layer: int, file: Any) -> Any:
    def compute_and_log(*args: Any, **kwargs: Any) -> Any:
        weights, ids = compute_routing(*args, **kwargs)
        for row, (some_ids, some_weights) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
            file.write(json.dumps({"layer": layer, "row": row, "expert_ids": some_ids, "weights": some_weights}) + "\n")
        file.flush()
        return weights, ids

    return compute_and_log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["demo", "dummy"], default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--routed-experts", action="store_true")
    parser.add_argument("--without-logger", action="store_true")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help=f"arms, of {', '.join((*ARMS, *LIVE_ARMS))}; off first"
    )
    parser.add_argument("--shadow", default="", help="the run directory that the arm `shadow` scores")
    options = parser.parse_args()
    # .tolist() breaks the graph of a compiled model, so compilation fails.
    skipped = {"logger"} if options.compiled or options.without_logger else set()
    names = options.only or [name for name in ARMS if name not in skipped] + ["routed"] * options.routed_experts
    plan = plan_from_options(options)
    with tempfile.TemporaryDirectory(prefix="capture-overhead-") as folder, contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "benchmarks.capture_overhead", "serve"]
        published = {name: Path(folder) / f"published-{name}" for name in LIVE_ARMS}
        switches = {name: {"SPECMOE_LIVE": "1", FOLDER_VARIABLE: str(published[name])} for name in LIVE_ARMS}
        switches["shadow"]["SPECMOE_SHADOW"] = options.shadow
        arms = [stack.enter_context(Arm(name, [*command, name], plan, Path(folder), switches.get(name))) for name in names]
        for arm in arms:
            arm.wait_until_ready()
        result = measure_workload(plan, plan.workloads[0], arms, None)
        found = {name: Samples() for name in LIVE_ARMS}
        for name in LIVE_ARMS:
            for publication in read_publications(published[name]):
                found[name].values |= publication.samples.values
    print(f"{result.model}, {'compiled' if options.compiled else 'eager'}, {result.workload}, {result.rounds} rounds")
    print(f"{'':8}{'tokens/s':>10}{'ratio to off':>14}   min-max")
    for name, speed in result.tokens_per_second.items():
        ratio = result.ratios.get(name)
        shown = "" if ratio is None else f"{ratio.median:14.3f}   {ratio.least:.3f}-{ratio.most:.3f}"
        print(f"{name:8}{speed:10,.0f}{shown}")
    for name, samples in found.items():
        if TOKENS.name in samples.values:
            print(f"{name}: {samples.get(TOKENS):,.0f} tokens counted, {samples.get(DROPPED):,.0f} not")
        if SHARE.name in samples.values:
            requests = ", ".join(f"{count:,.0f} {outcome}" for (outcome,), count in samples.values[SAMPLED.name].items())
            print(f"{name}: {samples.get(SHARE):.1%} of the tokens scored; sampled requests: {requests}")
    print(f"writing: {result.rows_per_round:,} rows per round; the engine waited {result.writer_waits} times for the writer")


def plan_from_options(options: argparse.Namespace) -> OverheadPlan:
    """One workload of short prompts, on the embedded model or a dummy model."""
    workload = OverheadWorkload(
        name=f"{options.requests} requests of {PROMPT_TOKENS} + {NEW_TOKENS} tokens",
        requests=options.requests,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
    )
    plan = plan_for(gpu_bytes())
    settings = plan.settings | {"enforce_eager": not options.compiled, "max_model_len": 512}
    plan = replace(plan, settings=settings, workloads=(workload,), rounds=options.rounds)
    return replace(plan, model="demo model", folder=str(demo_model_folder())) if options.model == "demo" else plan


def serve_arm(arm: str, plan: OverheadPlan) -> None:
    """Run one arm, in the process that `Arm` started."""
    if arm == "logger":
        path = str(Path(tempfile.mkdtemp(prefix="capture-overhead-log-", dir=plan.scratch)) / "log.jsonl")
        serve(
            arm,
            plan,
            lambda llm: llm.collective_rpc("plain_logger_start", args=(path,)),
            worker_extension_cls="benchmarks.capture_overhead.PlainLogger",
        )
    elif arm == "routed":
        serve(arm, plan, enable_return_routed_experts=True)
    else:
        serve(arm, plan)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve_arm(sys.argv[2], parse_plan(sys.argv[3]))
    else:
        main()
