"""Run jobs, one engine after another, in a separate process, so that a crash loses one job only.

    python -m vllm_patch.check.worker FOLDER

Reads each job as a line of JSON from standard input, and prints its result as a line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from profiler.capture.options import CaptureOptions
from profiler.engines.vllm_attention import float32_attention
from profiler.errors import EngineError, first_line
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from vllm_patch.check.agreement import ROUTER, OracleAgreement
from vllm_patch.check.device import context_length, has_latent_attention
from vllm_patch.check.jobs import (
    CHUNK,
    LONGEST_PROMPT,
    MIXED_PROMPTS,
    NEW_TOKENS,
    SHARED_PREFIX,
    SHARED_PROMPTS,
    Job,
)
from vllm_patch.routers.deviations import IGNORES_CORRECTION

MAX_LENGTH = 1024
# More than all prompts and outputs of a job.
HIDDEN_TOKENS = 100_000
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
    try:
        facts = run_job(job, folder, folder / f"trace-{os.getpid()}")
    except Exception as error:
        traceback.print_exc()
        # An engine that did not start leaves its process groups behind, which may not suit the next model.
        _clean_up()
        refused = isinstance(error, EngineError) and "capture failed: " in str(error)
        text = str(error).removeprefix("capture failed: ") if refused else _what_failed(error)
        facts = {"verdict": "refused" if refused else "failed", "detail": text}
    return {**facts, "seconds": round(time.perf_counter() - began, 1)}


def run_job(job: Job, folder: Path, out: Path) -> dict[str, Any]:
    """Record, and compare the trace with the reference.

    If sets differ, record again with the routers' inputs, and compare with the reference's routers on these inputs: the engines
    may compute something before the router in different ways. A recorder that loses or misplaces something fails there, too.
    """
    model = model_folder(job.model, folder)
    recorded = record(job, model, out)
    found = _compare(recorded, model, job)
    verdict, detail = found.verdict(job.dtype)
    if verdict == "wrong" and found.differing and not found.missing:
        first, first_detail = found, detail
        layers = tuple(recorded.trace.metadata.model.moe_layers)
        try:
            again = record(job, model, out.with_name(f"{out.name}-inputs"), hidden_layers=layers)
            second = _compare(again, model, job, recorded_inputs=True)
        except Exception as error:  # of any type; the first comparison stands
            _clean_up()
            detail += f"; the routers' inputs, which could explain this, were not compared: {first_line(error)}"
        else:
            found = second
            verdict, detail = found.verdict(job.dtype)
            detail += (
                f"; alone, transformers differs in {first.differing:,} sets"
                if verdict != "wrong"
                else f"; against transformers alone: {first_detail}"
            )
    trace = recorded.trace
    if job.mode.prefix_caching and not sum(trace.problems.column("cached_tokens").to_pylist()):
        verdict, detail = "wrong", "prefix caching is on, but no cached token was recorded; " + detail
    oracle = found.oracle
    if IGNORES_CORRECTION in trace.metadata.hook:
        oracle += ", without the correction bias, which vLLM's CPU router ignores"
    return {
        "verdict": verdict,
        "detail": detail,
        "oracle": oracle,
        "hook": trace.metadata.hook,
        "runner": recorded.runner,
        "asynchronous": recorded.asynchronous,
        "vllm": trace.metadata.versions["vllm"],
        "compared": found.compared,
        "differing": found.differing,
        "widest_gap": found.widest_gap,
        "weight_error": found.weight_error,
        "weight_ratio": found.weight_ratio,
        "input_difference": found.input_difference if found.oracle == ROUTER else None,
        "start_seconds": round(recorded.start_seconds, 1),
    }


def inspect_models_here() -> None:
    """Have vLLM look at classes of models in this process.

    It starts a process for each class that it has not seen before, which takes ten seconds, lest CUDA be initialized here.
    """
    with contextlib.suppress(ImportError):
        registry = importlib.import_module("vllm.model_executor.models.registry")
        if hasattr(registry, "_run_in_subprocess"):
            registry._run_in_subprocess = lambda look: look()  # type: ignore[attr-defined]


_freeze = gc.freeze


def freeze_what_is_loaded() -> None:
    """Leave everything that is loaded so far out of all garbage collections of this process.

    vLLM collects garbage a dozen times per engine, which takes half of a tiny model's time with a million objects of imported
    modules. It freezes and unfreezes them, too: from now on without effect, so that an engine that has ended is collected.
    """
    gc.freeze = gc.unfreeze = lambda: None
    _freeze()


@dataclass(frozen=True)
class RecordedRun:
    """A trace and how it was recorded. in_transformers: vLLM runs the model with transformers' own modules."""

    trace: Trace
    runner: str | None
    asynchronous: bool
    start_seconds: float
    in_transformers: bool


def record(job: Job, model: Path, out: Path, hidden_layers: tuple[int, ...] = ()) -> RecordedRun:
    """Start vLLM, record the job's prompts, and stop vLLM.

    hidden_layers: the MoE layers whose router inputs are recorded, too.
    """
    import torch
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from vllm_patch.recording import Recording, enable

    shutil.rmtree(out, ignore_errors=True)
    # vLLM reads it each time that it starts.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(job.mode.workers))
    enable(CaptureOptions(hidden_layers=hidden_layers, hidden_tokens=HIDDEN_TOKENS))
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 16} if job.mode.chunked else {}
    if on_gpu:
        # A model that the user names runs alone and may need the whole GPU; small ones must not measure each other's memory.
        named = Path(job.model).is_dir()
        settings |= {} if named else {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": KV_CACHE_BYTES}
        if job.mode.compiled:
            settings |= {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}}
    else:
        inspect_models_here()
    if not (model / "tokenizer.json").is_file():
        settings |= {"skip_tokenizer_init": True}
        # Without a tokenizer, vLLM starts a multimodal model only if it takes nothing but text.
        settings |= {"language_model_only": True} if hasattr(EngineArgs, "language_model_only") else {}
    freeze_what_is_loaded()
    began = time.perf_counter()
    llm = LLM(
        model=str(model),
        dtype=job.dtype,
        enforce_eager=not job.mode.compiled,
        enable_prefix_caching=job.mode.prefix_caching,
        max_model_len=context_length(model, MAX_LENGTH),
        disable_log_stats=True,
        seed=0,
        **float32_attention(has_latent_attention(model), job.dtype),
        **settings,
    )
    started = time.perf_counter() - began
    try:
        with Recording(llm, out) as recording:
            for prompts in prompt_batches(job):
                recording.add(llm.generate(prompts, _sampling(), use_tqdm=False))
        runner = _runner_of(llm) if not job.mode.workers else None
        config = llm.llm_engine.vllm_config
        asynchronous = bool(getattr(config.scheduler_config, "async_scheduling", False))
        uses_transformers = getattr(config.model_config, "using_transformers_backend", None)
        in_transformers = uses_transformers is not None and bool(uses_transformers())
    finally:
        _stop(llm)
        del llm
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    assert recording.trace is not None
    return RecordedRun(recording.trace, runner, asynchronous, started, in_transformers)


def _compare(recorded: RecordedRun, model: Path, job: Job, *, recorded_inputs: bool = False) -> OracleAgreement:
    """Compare with the reference, on the CPU wherever vLLM ran: it must not use the same kernels.

    vLLM changes the classes of models that it runs with transformers' modules, so these are compared in another process.
    """
    from vllm_patch.check.agreement import compare_in_new_process, compare_with_checkpoint

    compare = compare_in_new_process if recorded.in_transformers else compare_with_checkpoint
    return compare(
        recorded.trace.path,
        model,
        job.dtype,
        recorded_inputs=recorded_inputs,
        corrections=IGNORES_CORRECTION not in recorded.trace.metadata.hook,
    )


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


def _what_failed(error: Exception) -> str:
    """The error's type and first line, or the source line that raised an error without a text."""
    text = first_line(error) if str(error) else ""
    if not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.line} ({Path(frame.filename).name}, line {frame.lineno})"
    return f"{type(error).__name__}: {text}"


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
    """The module of the model runner, which distinguishes the two runners of some releases."""
    with contextlib.suppress(Exception):
        worker = llm.llm_engine.model_executor.driver_worker.worker
        return str(type(worker.model_runner).__module__.removeprefix("vllm."))
    return None


def _stop(llm: Any) -> None:
    with contextlib.suppress(Exception):
        llm.llm_engine.engine_core.shutdown()
    _clean_up()


def _clean_up() -> None:
    with contextlib.suppress(Exception):
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
