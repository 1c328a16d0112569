"""Runs vLLM with a `Recording` in a process of its own, for `test_exactness`; the scenarios are the functions.

python tests/support/drive_vllm.py SCENARIO OUT MODEL... [-- SCENARIO OUT MODEL...]...
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "1")


def start(model: str, **settings: Any) -> Any:
    from vllm import LLM

    defaults = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "max_model_len": 1024}
    if not (Path(model) / "tokenizer.json").is_file():
        defaults["skip_tokenizer_init"] = True
    # vLLM collects garbage a dozen times per engine, which takes a third of a second each with its modules.
    gc.freeze()
    return LLM(model=model, **(defaults | settings))


def random_prompts(count: int, shortest: int, longest: int, seed: int = 0, shared_prefix: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    prefix = random.integers(3, 500, shared_prefix).tolist()
    lengths = random.integers(shortest, longest + 1, count)
    return [{"prompt_token_ids": prefix + random.integers(3, 500, length).tolist()} for length in lengths]


def greedy(tokens: int, **settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **settings)


def families(out: Path, models: list[str]) -> None:
    """Each model in turn: prompts of many lengths in one batch, all router logits and the inputs of one router."""
    from profiler.capture.options import CaptureOptions
    from vllm_patch import Recording, enable

    for model in models:
        enable(CaptureOptions(logits=True, hidden_layers=(2,), hidden_tokens=300))
        llm = start(model)
        with Recording(llm, out / Path(model).name) as recording:
            recording.add(llm.generate(random_prompts(12, 1, 90), greedy(24), use_tqdm=False))
        stop(llm)
        del llm


def pressure(out: Path, models: list[str]) -> None:
    """Compiled, engine in this process, prompts in chunks of 64 tokens, and so few cache blocks that requests are preempted."""
    from vllm_patch import Recording, enable

    enable()
    llm = start(
        models[0],
        enforce_eager=False,
        max_num_batched_tokens=64,
        max_num_seqs=16,
        max_model_len=512,
        num_gpu_blocks_override=8,
        disable_log_stats=False,
    )
    with Recording(llm, out / "trace") as recording:
        recording.add(llm.generate(random_prompts(4, 100, 100), greedy(200), use_tqdm=False))
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    (out / "metrics.json").write_text(json.dumps({"preemptions": metrics["vllm:num_preemptions"]}))
    stop(llm)


def calls(out: Path, models: list[str]) -> None:
    """One engine, prefix caching on: several calls, samples, stop strings, text prompts, shared prefixes, an abort."""
    from vllm import SamplingParams

    from vllm_patch import Recording, enable

    enable()
    llm = start(models[0], enable_prefix_caching=True, seed=1)
    outputs: list[Any] = []
    with Recording(llm, out / "trace") as recording:
        for prompts, params in [
            (random_prompts(6, 5, 40, seed=1, shared_prefix=300), greedy(20)),
            (random_prompts(6, 5, 40, seed=2, shared_prefix=0), greedy(30)),
            # The same prefix again: all of it is in the cache now.
            (random_prompts(4, 5, 40, seed=1, shared_prefix=300), greedy(20)),
            (random_prompts(3, 10, 20, seed=3), SamplingParams(n=3, temperature=1.0, max_tokens=15, seed=5)),
            (["A train leaves the station", "def add("], SamplingParams(max_tokens=60, temperature=0, stop=["e", "n"])),
        ]:
            found = llm.generate(prompts, params, use_tqdm=False)
            outputs += found
            recording.add(found)
    cached = [[o.num_cached_tokens for _ in o.outputs] for o in outputs]
    stopped = [[sample.finish_reason for sample in o.outputs] for o in outputs]
    (out / "outputs.json").write_text(json.dumps({"cached": cached, "finish_reasons": stopped}))

    with Recording(llm, out / "aborted") as recording:
        engine = llm.llm_engine
        for name, prompt in zip(("kept", "dropped"), random_prompts(2, 30, 30, seed=9), strict=True):
            engine.add_request(name, {"type": "token", **prompt}, greedy(40))
        for _ in range(12):
            recording.add(output for output in engine.step() if output.finished)
        engine.abort_request(["dropped"], internal=False)
        while engine.has_unfinished_requests():
            recording.add(output for output in engine.step() if output.finished)


def half(out: Path, models: list[str]) -> None:
    """bfloat16, mixed batch, with logits, so that near ties can be told from errors.

    vLLM prefers a kernel that selects experts itself, so that capture must choose another one.
    """
    from profiler.capture.options import CaptureOptions
    from vllm_patch import Recording, enable

    enable(CaptureOptions(logits=True))
    prefer_monolithic_kernel()
    llm = start(models[0], dtype="bfloat16")
    with Recording(llm, out / "trace") as recording:
        recording.add(llm.generate(random_prompts(16, 10, 200), greedy(40), use_tqdm=False))
    stop(llm)


def prefer_monolithic_kernel() -> None:
    """Put a kernel that calls itself monolithic before all that vLLM has for this CPU. It cannot compute anything."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    kernels_of = unquantized.backend_to_kernel_cls

    def with_fused(backend: Any) -> list[Any]:
        kernels = kernels_of(backend)
        return [type("Fused", (kernels[-1],), {"is_monolithic": staticmethod(lambda: True)}), *kernels]

    unquantized.backend_to_kernel_cls = with_fused


def stop(llm: Any) -> None:
    """Free the engine of this process for the next one."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def main() -> None:
    scenario: list[str] = []
    for word in [*sys.argv[1:], "--"]:
        if word != "--":
            scenario.append(word)
            continue
        name, folder, *models = scenario
        globals()[name](Path(folder), models)
        scenario = []


if __name__ == "__main__":
    main()
