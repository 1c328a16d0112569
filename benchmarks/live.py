"""What counting live metrics costs, in processor time: of the engine's thread for each step, and of the counting thread.

    python -m benchmarks.live [--repeats 5]
    python -m benchmarks.live --engine [--shadow RUN] [--repeats 12]

Steps are offered to a `LiveCounter` as a worker does, with random routing of three models' shapes, on the CPU: 128 sequences
that decode, and prompts of 2048 tokens. Processor time is measured, not time on the clock: other processes hardly matter. The
engine's part is what `offer` takes in its thread: the copy of the step's rows, and the queue. Labeling the rows (`label_rows`,
0.1 ms at most) and the copies inside the graph come on top, as with a capture.

With `--engine`, one vLLM in this process runs the same requests on the demo model in turn: plain (without hooks), counting, and
counting with a sample of the requests passed to a scoring process. The ratio of the process's processor time to that of plain
vLLM has everything: hooks, labels, copies, and the counting thread, which on a machine with a free core would run besides. The
scoring process is not in it: it computes only when no other process wants the core, and its time is printed.
`benchmarks.capture_overhead` has ratios of tokens/s, for which the machine must be quiet.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from profiler.live.metrics import DROPPED, SAMPLED, SCORED_REQUESTS, SHADOW_CPU, SHARE, TOKENS
from profiler.live.options import FOLDER_VARIABLE, LiveOptions, ShadowOptions
from profiler.live.publication import Publisher, read_publications
from profiler.models.resolve import demo_model_folder
from vllm_patch.capture.buffers import CaptureBuffers
from vllm_patch.capture.steps import NewRequest, Step
from vllm_patch.live.counter import LiveCounter
from vllm_patch.live.start import start_counter
from vllm_patch.worker import WorkerCapture

# Layers, experts, experts per token.
SHAPES = {"demo": (8, 8, 2), "gpt-oss-20b": (24, 32, 4), "DeepSeek-V3": (58, 256, 8)}
SEQUENCES, PROMPT_TOKENS = 128, 2048
DECODE_STEPS, PREFILL_STEPS = 100, 6
REQUESTS, NEW_TOKENS = 64, 32
SHOWN = {metric.name for metric in (TOKENS, DROPPED, SAMPLED, SCORED_REQUESTS, SHARE, SHADOW_CPU)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--shadow", help="a run of the demo model to score on 5 % of the requests")
    options = parser.parse_args()
    if options.engine:
        measure_engine(options.repeats, options.shadow)
        return
    torch.set_num_threads(1)
    print(f"{'':36}{'engine thread, µs a step':>30}{'counting thread, ns a selection':>36}")
    for name, shape in SHAPES.items():
        for kind, tokens, steps in (("decode", SEQUENCES, DECODE_STEPS), ("prefill", PROMPT_TOKENS, PREFILL_STEPS)):
            found = [measure(*shape, tokens=tokens, steps=steps, is_decode=kind == "decode") for _ in range(options.repeats)]
            shown = [
                f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})" for values in zip(*found, strict=True)
            ]
            print(f"{name + ', ' + kind + f' of {tokens} tokens':36}{shown[0]:>30}{shown[1]:>36}")


def measure(layers: int, experts: int, top_k: int, *, tokens: int, steps: int, is_decode: bool) -> tuple[float, float]:
    """Microseconds of the engine's thread for a step, and nanoseconds of the counting thread for a selection."""
    buffers = CaptureBuffers(max_tokens=tokens, layers=layers, num_experts=experts, top_k=top_k, device="cpu")
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.random((tokens, layers, experts)).argsort(-1)[..., :top_k].astype(np.int16))
    with tempfile.TemporaryDirectory() as folder:
        counter = LiveCounter(
            buffers,
            Publisher.of_engine(Path(folder), "model"),
            moe_layers=list(range(layers)),
            num_experts=experts,
            top_k=top_k,
            window_seconds=60.0,
        )
        names = [f"r{number}" for number in range(tokens if is_decode else 1)]
        engine_seconds = 0.0
        for number in range(steps + 1):
            buffers.tensors["expert_ids"].copy_(ids)
            step = Step(
                request_ids=names,
                starts_B=np.full(len(names), number * (1 if is_decode else tokens), dtype=np.int32),
                scheduled=dict.fromkeys(names, 1 if is_decode else tokens),
                rows=tokens,
                new=[NewRequest(name, None, [1], 0) for name in names] if number == 0 else [],
                finished=set(),
            )
            began = time.thread_time()
            counter.offer(step)
            # The first step is copied with weights, and checked.
            engine_seconds += (time.thread_time() - began) * bool(number)
            if number == 0:
                counter.publication()
                counting_began = thread_seconds("specmoe-live")
            elif number % 10 == 0:
                # So that no step is dropped.
                counter.publication()
        counter.publication()
        counting_seconds = thread_seconds("specmoe-live") - counting_began
        counter.close()
    return 1e6 * engine_seconds / steps, 1e9 * counting_seconds / (steps * tokens * layers * top_k)


def measure_engine(repeats: int, run: str | None) -> None:
    """Print the ratio of processor time to that of plain vLLM, for each way of counting."""
    os.environ |= {"SPECMOE_LIVE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "specmoe"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(demo_model_folder()), enforce_eager=True, max_model_len=512, enable_prefix_caching=False, skip_tokenizer_init=True
    )
    worker: Any = llm.llm_engine.model_executor.driver_worker.worker
    capture: WorkerCapture = worker.execute_model.__self__
    assert capture._recorder is not None
    routers = [layer.module.router for layer in capture._layers]
    hooked = [router._compute_routing for router in routers]
    counters = {"plain": None, "counting": capture._counter}
    if run is not None:
        options = LiveOptions(shadow=ShadowOptions(run=run))
        counters["with a scoring process"] = start_counter(capture._recorder, worker.vllm_config, options)
    random = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": tokens} for tokens in random.integers(3, 500, (REQUESTS, 64)).tolist()]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    seconds: dict[str, list[float]] = {name: [] for name in counters}
    for number in range(repeats + 1):
        for name in list(counters)[:: 1 if number % 2 else -1]:
            capture._counter = counters[name]
            for router, hook in zip(routers, hooked, strict=True):
                if name == "plain":
                    del router._compute_routing
                else:
                    router._compute_routing = hook
            began = time.process_time()
            llm.generate(prompts, sampling, use_tqdm=False)
            if capture._counter is not None:
                capture._counter.publication()
            # The first round warms up.
            seconds[name] += [time.process_time() - began] * bool(number)
            for router, hook in zip(routers, hooked, strict=True):
                router._compute_routing = hook
    plain = seconds["plain"]
    print(
        f"{REQUESTS} requests of 64 + {NEW_TOKENS} tokens, {repeats} rounds; plain: {statistics.median(plain):.2f} s (median)"
    )
    for name, own in seconds.items():
        ratios = [one / base for one, base in zip(own, plain, strict=True)]
        spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
        print(f"{name:24} {statistics.median(ratios):.3f} ({spread}), of all rounds together {sum(own) / sum(plain):.3f}")
    time.sleep(2)
    for publication in read_publications(Path(os.environ[FOLDER_VARIABLE])):
        shown = {name: found for name, found in publication.samples.values.items() if name in SHOWN}
        print(f"published: {shown}")
    for counter in counters.values():
        if counter is not None:
            counter.close()


def thread_seconds(name: str) -> float:
    """The processor time of a thread of this process, by its name in Python."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    return time.clock_gettime(clock)


if __name__ == "__main__":
    main()
