"""Estimate the time, cost and bytes of a collection on a GPU by a roofline; check it against the first shard.

A step takes the longer of two times: reading all weights and the keys and values of its sequences, or computing all its tokens.
The shares of a GPU's peaks are derived from published figures (docs/results/scaling.md), not from measurements of this project.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiler.collect.selection import CHARACTERS_PER_TOKEN
from profiler.datasets.problems import Problem
from profiler.models.gpus import Gpu
from profiler.models.registry import ModelEntry, Preset

# Share of peak bandwidth. Chosen so that the estimate meets Qwen1.5-MoE's published 2.01 requests/s (1000 + 1000 tokens, on an
# A100-80GB) to 15 %.
BANDWIDTH_SHARE = 0.4
# Share of peak arithmetic: a W4A16 kernel of Mixtral's shape reaches 79 of an A100's 312 TFLOP/s.
COMPUTE_SHARE = 0.25
# Before an engine runs: seconds to start the container and vLLM (with compilation and graphs), and the speed of reading weights
# from a Volume, in GB/s.
START_SECONDS, LOADING = 150.0, 0.5
# A container's resources besides its GPU; per hour, a core costs $0.0472 and a GiB of memory $0.008.
CORES, MEMORY_GIB = 4, 32
HOST_DOLLARS = CORES * 0.0472 + MEMORY_GIB * 0.008
# Measured (docs/results/trace-io.md): 4.25 bytes per row with K = 2, 7.09 with K = 4. Expert ids take one more byte above 256
# experts.
ROW_BYTES, PAIR_BYTES = 1.4, 1.42


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated demands of a collection.

    tokens_per_second, start_seconds: of one container. wall_seconds: from the start to the end of the run. gpu_hours, dollars:
    over all containers. trace_bytes: size of the sealed trace.
    """

    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    start_seconds: float
    wall_seconds: float
    gpu_hours: float
    dollars: float
    trace_bytes: int


def estimate(
    entry: ModelEntry, gpu: Gpu, preset: Preset, problems: list[Problem], shard_problems: int, containers: int
) -> Estimate:
    """Estimate a collection of `problems` on containers with one `gpu` each.

    The length of a prompt is guessed from its characters; every problem is assumed to generate all its new tokens.
    shard_problems: number of problems in the largest shard, which bounds the batch.
    """
    prompts = [
        min(len(problem.prompt) / CHARACTERS_PER_TOKEN + 1, problem.max_prompt_tokens or float("inf")) for problem in problems
    ]
    return estimate_tokens(
        entry,
        gpu,
        preset,
        prompt_tokens=round(sum(prompts)),
        new_tokens=sum(problem.max_new_tokens for problem in problems),
        num_problems=len(problems),
        batch=min(preset.batch, shard_problems),
        containers=containers,
    )


def estimate_tokens(
    entry: ModelEntry,
    gpu: Gpu,
    preset: Preset,
    *,
    prompt_tokens: int,
    new_tokens: int,
    num_problems: int,
    batch: int,
    containers: int = 1,
) -> Estimate:
    """Like `estimate`, from totals instead of problems. batch: sequences at a time."""
    batch = max(1, batch)
    # A token takes two floating-point operations per active parameter.
    compute_per_token = 2 * entry.active * 1e9 / (gpu.tflops * 1e12 * COMPUTE_SHARE)
    length = (prompt_tokens + new_tokens / 2) / max(1, num_problems)
    step_bytes = preset.weights_gb * 1e9 + batch * length * entry.kv_bytes
    step = max(step_bytes / (gpu.bandwidth * 1e9 * BANDWIDTH_SHARE), batch * compute_per_token)
    running = prompt_tokens * compute_per_token + new_tokens / batch * step
    start = START_SECONDS + preset.weights_gb / LOADING
    hours = (running + containers * start) / 3600
    tokens = prompt_tokens + new_tokens
    pair_bytes = PAIR_BYTES + (entry.experts > 256)
    return Estimate(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        tokens_per_second=tokens / running,
        start_seconds=start,
        wall_seconds=start + running / containers,
        gpu_hours=hours,
        dollars=hours * ((gpu.dollars_per_hour or 0.0) + HOST_DOLLARS),
        trace_bytes=round(tokens * len(entry.moe_layers) * (ROW_BYTES + pair_bytes * entry.top_k)),
    )
