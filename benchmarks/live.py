"""What counting live metrics costs, in processor time: of the engine's thread for each step, and of the counting thread.

    python -m benchmarks.live [--repeats 5]

Steps are offered to a `LiveCounter` as a worker does, with random routing of three models' shapes, on the CPU: 128 sequences
that decode, and prompts of 2048 tokens. Processor time is measured, not time on the clock: other processes hardly matter. The
engine's part is what `offer` takes in its thread: the copy of the step's rows, and the queue. Labeling the rows (`label_rows`,
0.1 ms at most) and the copies inside the graph come on top, as with a capture: `benchmarks.capture_overhead` measures them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from profiler.live.publication import Publisher
from vllm_patch.buffers import CaptureBuffers
from vllm_patch.live.counter import LiveCounter
from vllm_patch.steps import NewRequest, Step

# Layers, experts, experts per token.
SHAPES = {"demo": (8, 8, 2), "gpt-oss-20b": (24, 32, 4), "DeepSeek-V3": (58, 256, 8)}
SEQUENCES, PROMPT_TOKENS = 128, 2048
DECODE_STEPS, PREFILL_STEPS = 100, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
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


def thread_seconds(name: str) -> float:
    """The processor time of a thread of this process, by its name in Python."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    return time.clock_gettime(clock)


if __name__ == "__main__":
    main()
