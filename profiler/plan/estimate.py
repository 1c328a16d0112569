"""What a collection may take on a GPU: time, money, bytes. By a roofline, to be checked against the first shard.

A step reads all weights and the keys and values of its sequences, or computes for all its tokens, whichever takes longer. The
shares of a GPU's peaks are what published figures come to (docs/scaling.md); this project has measured nothing on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiler.collect.selection import CHARACTERS_PER_TOKEN
from profiler.datasets.problems import Problem
from profiler.models.gpus import Gpu
from profiler.models.registry import ModelEntry, Preset

# Of bandwidth: Qwen1.5-MoE's own 2.01 requests/s of 1000 + 1000 tokens on an A100-80GB are met to 15 %; chosen so.
BANDWIDTH_SHARE = 0.4
# Of arithmetic: a W4A16 kernel of Mixtral's shape at 79 TFLOP/s where an A100 has 312.
COMPUTE_SHARE = 0.25
# Until an engine runs: the container, vLLM's start with compilation and graphs, and reading the weights from a Volume, GB/s.
START_SECONDS, LOADING = 150.0, 0.5
# What a container asks for besides its GPU, per hour: 4 cores at 0.0472 $ and 32 GiB at 0.008 $.
CORES, MEMORY_GIB = 4, 32
HOST_DOLLARS = CORES * 0.0472 + MEMORY_GIB * 0.008
# Measured (docs/traces.md): 4.25 bytes per row with K = 2, 7.09 with K = 4; one more for each expert where there are over 256.
ROW_BYTES, PAIR_BYTES = 1.4, 1.42


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Times in seconds: of one container's start, of running on all, and until the end. Bytes of the sealed trace."""

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
    """For a model on such GPUs. Prompt lengths are guessed from their characters; all new tokens are generated.

    shard_problems: of the largest shard, which bounds the batch.
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
    """As `estimate`, from numbers."""
    batch = max(1, batch)
    # FLOP: two for each active parameter and token.
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
