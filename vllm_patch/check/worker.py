"""Run jobs, one engine after another, in a separate process, so that a crash loses one job only.

    python -m vllm_patch.check.worker FOLDER

Reads each job as a line of JSON from standard input, and prints its result as a line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from profiler.errors import first_line
from profiler.models.resolve import demo_model_folder
from vllm_patch.check.jobs import (
    CHUNK,
    LONGEST_PROMPT,
    MIXED_PROMPTS,
    NEW_TOKENS,
    SHARED_PREFIX,
    SHARED_PROMPTS,
    Job,
)

MAX_LENGTH = 1024
# Bytes of KV cache on a GPU: small, and fixed, so that concurrent engines do not measure each other's memory.
KV_CACHE_BYTES = 1 << 28


def main() -> None:
    """Serve jobs until standard input ends."""
    folder = Path(sys.argv[1])
    # vLLM and its kernels print to standard output: redirect that to standard error, and keep the original for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answer = answer_job(Job.from_json(json.loads(line)), folder)
        print(json.dumps(answer), file=answers, flush=True)


def answer_job(job: Job, folder: Path) -> dict[str, Any]:
    """Run a job. Returns its `verdict` and `detail`, with facts about the run. Never raises."""
    began = time.perf_counter()
    out = folder / f"trace-{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    try:
        facts = run_job(job, folder, out)
    except Exception as error:
        traceback.print_exc()
        refused = type(error).__name__ == "EngineError" and "capture failed: " in str(error)
        text = str(error).removeprefix("capture failed: ") if refused else f"{type(error).__name__}: {first_line(error)}"
        facts = {"verdict": "refused" if refused else "failed", "detail": text}
    return {**facts, "seconds": round(time.perf_counter() - began, 1)}


def run_job(job: Job, folder: Path, out: Path) -> dict[str, Any]:
    """Start vLLM, record, stop vLLM, and compare the trace with the reference."""
    import torch
    from vllm import LLM

    from vllm_patch.check.agreement import compare, load_oracle
    from vllm_patch.recording import Recording, enable

    enable()
    model = model_folder(job.model, folder)
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 16} if job.mode.chunked else {}
    if on_gpu:
        settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": KV_CACHE_BYTES}
        if job.mode.compiled:
            settings |= {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}}
    if not (model / "tokenizer.json").is_file():
        settings |= {"skip_tokenizer_init": True}
    # vLLM collects garbage a dozen times per engine: without this, that is half of a tiny model's start.
    gc.freeze()
    began = time.perf_counter()
    llm = LLM(
        model=str(model),
        dtype=job.dtype,
        enforce_eager=not job.mode.compiled,
        enable_prefix_caching=job.mode.prefix_caching,
        max_model_len=MAX_LENGTH,
        disable_log_stats=True,
        seed=0,
        **settings,
    )
    started = time.perf_counter() - began
    try:
        with Recording(llm, out) as recording:
            for prompts in prompt_batches(job):
                recording.add(llm.generate(prompts, _sampling(), use_tqdm=False))
        runner = _runner_of(llm) if not job.mode.workers else None
    finally:
        _stop(llm)
        del llm
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    trace = recording.trace
    assert trace is not None
    # On the CPU, wherever vLLM ran: the reference must not use the same kernels.
    agreement = compare(trace, load_oracle(model, job.dtype))
    verdict, detail = agreement.verdict(job.dtype)
    if job.mode.prefix_caching and not sum(trace.problems.column("cached_tokens").to_pylist()):
        verdict, detail = "wrong", "prefix caching is on, but no cached token was recorded; " + detail
    return {
        "verdict": verdict,
        "detail": detail,
        "oracle": "transformers",
        "hook": trace.metadata.hook,
        "runner": runner,
        "vllm": trace.metadata.versions["vllm"],
        "compared": agreement.compared,
        "differing": agreement.differing,
        "widest_gap": agreement.widest_gap,
        "weight_error": agreement.weight_error,
        "weight_ratio": agreement.weight_ratio,
        "start_seconds": round(started, 1),
    }


def model_folder(model: str, folder: Path) -> Path:
    """The folder of a model's checkpoint: a family's (created on first use), the embedded model's, or `model` itself."""
    if model == "demo":
        return demo_model_folder()
    if Path(model).is_dir():
        return Path(model)
    found = folder / model
    if not (found / "config.json").is_file():
        from vllm_patch.check.families import make

        # Several workers may create it at the same time; one rename succeeds.
        checkpoint = make(model, folder / f"making-{os.getpid()}")
        with contextlib.suppress(OSError):
            checkpoint.rename(found)
    return found


def prompt_batches(job: Job) -> list[list[dict[str, Any]]]:
    """Batches of prompts, as token ids. With prefix caching, two batches of prompts share a prefix."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, LONGEST_PROMPT + 1, MIXED_PROMPTS)
    batches = [[{"prompt_token_ids": random.integers(3, 500, length).tolist()} for length in lengths]]
    if job.mode.prefix_caching:
        prefix = random.integers(3, 500, SHARED_PREFIX).tolist()
        for _ in range(2):
            ends = [random.integers(3, 500, 10).tolist() for _ in range(SHARED_PROMPTS)]
            batches.append([{"prompt_token_ids": prefix + end} for end in ends])
    return batches


def _sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False)


def _runner_of(llm: Any) -> str | None:
    """The module of the model runner, which tells the two runners of some releases apart."""
    with contextlib.suppress(Exception):
        worker = llm.llm_engine.model_executor.driver_worker.worker
        return str(type(worker.model_runner).__module__.removeprefix("vllm."))
    return None


def _stop(llm: Any) -> None:
    with contextlib.suppress(Exception):
        llm.llm_engine.engine_core.shutdown()
    with contextlib.suppress(Exception):
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
