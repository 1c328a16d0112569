"""What capturing costs: tokens/s of vLLM with it against vLLM without, on the same prompts, interleaved in one run.

    python benchmarks/capture_overhead.py [--model demo|dummy] [--rounds 7] [--compiled] [--routed-experts]

Every arm is an engine in processes of its own; only one runs at a time, the others are stopped (SIGSTOP). The first round
warms up and is discarded, and every turn begins with a few requests off the clock. The order of the arms changes from round
to round. Arms:

    off        vLLM without any plugin
    again      the same in a second engine: how far from 1 the ratio of equals is
    on         expert ids and weights of every layer and token, in Parquet files when the clock stops
    logger     a plain hook as published patches have it: per layer .tolist() and a line of JSON per token
    routed     vLLM's own enable_return_routed_experts (ids only), with --routed-experts; runs on CPU with 0.30 alone

The dummy model has random weights and Mixtral's form (8 layers, hidden size 512, 8 experts, top-2): it says what capture costs,
nothing about routing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

ARMS = ("off", "again", "on", "logger")
ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS, NEW_TOKENS = 64, 128
WARM_REQUESTS = 8
DUMMY = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


class PlainLogger:
    """A worker extension that hooks every router as a plain patch does."""

    model_runner: Any

    def plain_logger_start(self, path: str) -> None:
        file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the engine lives
        for module in self.model_runner.get_model().modules():
            router = getattr(module, "router", None)
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


def serve(arm: str, options: argparse.Namespace) -> None:
    """An arm: start the engine, then run once for every line on standard input and answer with seconds and rows."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from vllm import LLM, SamplingParams

    folder = Path(tempfile.mkdtemp(prefix="capture-overhead-"))
    settings: dict[str, Any] = {"worker_extension_cls": "benchmarks.capture_overhead.PlainLogger"} if arm == "logger" else {}
    if arm == "routed":
        settings |= {"enable_return_routed_experts": True}
    if options.model == "dummy":
        (folder / "config.json").write_text(json.dumps(DUMMY))
        settings |= {"model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True}
    else:
        settings |= {"model": str(ROOT / "profiler" / "demo" / "model")}
    if torch.cuda.is_available():
        settings |= {"gpu_memory_utilization": 0.84 / len(arm_names(options))}
    llm = LLM(
        **settings,
        enforce_eager=not options.compiled,
        enable_prefix_caching=False,
        max_model_len=512,
        disable_log_stats=True,
    )
    random = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": random.integers(3, 500, PROMPT_TOKENS).tolist()} for _ in range(options.requests)]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    if arm == "logger":
        llm.collective_rpc("plain_logger_start", args=(str(folder / "log.jsonl"),))
    print("ready", file=answers, flush=True)
    for number, _ in enumerate(sys.stdin):
        # Pages and caches are cold after the stop.
        llm.generate(prompts[:WARM_REQUESTS], sampling, use_tqdm=False)
        began = time.perf_counter()
        if arm == "on":
            llm.collective_rpc("specmoe_start", args=(str(folder / str(number)),))
        llm.generate(prompts, sampling, use_tqdm=False)
        status = llm.collective_rpc("specmoe_stop")[0] if arm == "on" else {}
        seconds = time.perf_counter() - began
        shutil.rmtree(folder / str(number), ignore_errors=True)
        print(json.dumps({"seconds": seconds, **status}), file=answers, flush=True)


class Arm:
    """A child process that serves one arm, stopped whenever it is not its turn."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        switches = {"SPECMOE_CAPTURE": "1", "VLLM_PLUGINS": "specmoe"} if name == "on" else {"VLLM_PLUGINS": ""}
        environment = {
            **os.environ,
            **switches,
            "PYTHONPATH": str(ROOT),
            "VLLM_CACHE_ROOT": str(Path(tempfile.gettempdir()) / f"capture-overhead-cache-{name}"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "benchmarks.capture_overhead", *sys.argv[1:], "--serve", name]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        if self._read() != "ready":
            raise SystemExit(f"arm {name} did not start; run with --verbose")
        self._signal(signal.SIGSTOP)

    def run(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        self._signal(signal.SIGSTOP)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"arm {self.name} ended; run with --verbose")
        return line

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["demo", "dummy"], default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--routed-experts", action="store_true")
    parser.add_argument("--without-logger", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options)
        return
    with contextlib.ExitStack() as stack:
        arms = [stack.enter_context(Arm(name, options)) for name in arm_names(options)]
        measure(arms, options)


def arm_names(options: argparse.Namespace) -> list[str]:
    """The arms of this run."""
    # .tolist() breaks the graph of a compiled model, and compilation with it.
    skipped = {"logger"} if options.compiled or options.without_logger else set()
    return [name for name in ARMS if name not in skipped] + ["routed"] * options.routed_experts


def measure(arms: list[Arm], options: argparse.Namespace) -> None:
    """Run the rounds and print them."""
    tokens = options.requests * (PROMPT_TOKENS + NEW_TOKENS)
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    last: dict[str, Any] = {}
    for number in range(options.rounds + 1):
        order = arms if number % 2 else arms[::-1]
        for arm in order:
            answer = arm.run()
            if arm.name == "on":
                last = answer
            if number:
                seconds[arm.name].append(answer["seconds"])
    mode = "compiled" if options.compiled else "eager"
    workload = f"{options.requests} requests of {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {options.rounds} rounds"
    print(f"{options.model} model, {mode}, {workload}")
    print(f"{'':8}{'tokens/s':>10}{'ratio to off':>14}   per round")
    for name, times in seconds.items():
        ratios = [off / own for off, own in zip(seconds["off"], times, strict=True)]
        rounds = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{name:8}{tokens / statistics.median(times):10,.0f}{statistics.median(ratios):14.3f}   {rounds}")
    print(f"on: {last['rows']:,} routing rows a round, the engine waited {last['waits']} times for the writer")


if __name__ == "__main__":
    main()
