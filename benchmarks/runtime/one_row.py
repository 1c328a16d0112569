"""Runs one row, in the process that was started for it."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.runtime.processes import GROUP
from benchmarks.runtime.rows import ACCELERATE, Case, Measured
from speculation.runtime.memory import peak_memory
from speculation.runtime.model import OffloadedModel
from speculation.runtime.options import CacheSize
from speculation.runtime.recording import PromptSource


def run_case(case: Case, model: Path, prompts: list[str]) -> Measured:
    """Run one row in this process."""
    group = os.environ.get(GROUP)
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    if case.kind == "runtime":
        return run_offloaded(case, model, prompts)
    return run_transformers(case, model, prompts)


def run_offloaded(case: Case, model: Path, prompts: list[str]) -> Measured:
    size = CacheSize(fraction=case.fraction)
    with OffloadedModel.load(
        str(model),
        size,
        store="disk" if case.device == "cpu" else "ram",
        policy=case.policy,
        predictor=case.predictor,
        threshold=case.threshold,
        prefetch=case.prefetch,
        device=case.device,
        dtype="float32",
        direct=case.direct,
    ) as offloaded:
        sources = [PromptSource(dataset="demo", source_key=str(n), prompt=prompt) for n, prompt in enumerate(prompts)]
        found = offloaded.generate(
            prompts,
            max_new_tokens=case.tokens,
            ignore_eos=True,
            trace=None if case.trace is None else Path(case.trace),
            sources=sources,
        )
        decode = offloaded.experts.decode
        layers = decode.tokens * offloaded.shape.layers
        return Measured(
            tokens=decode.tokens,
            seconds=decode.seconds,
            hit_rate=decode.hits / decode.requested,
            megabytes_per_token=decode.bytes / 1e6 / decode.tokens,
            stall=decode.stall / decode.seconds,
            memory_gb=peak_memory() / 1e9,
            copy_seconds=decode.transfer_seconds / max(1, decode.transfers),
            expert_seconds=decode.compute / decode.requested,
            layer_seconds=(decode.seconds - decode.stall - decode.compute) / layers,
            output=[each.token_ids for each in found],
            notes=offloaded.experts.notes,
        )


def run_transformers(case: Case, model: Path, prompts: list[str]) -> Measured:
    """Plain transformers, with all experts in memory or with accelerate's offload to disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    options: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=model.parent) as offload:
        device: Any = 0 if case.device == "cuda" else "cpu"
        if case.kind == ACCELERATE:
            layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
            places = dict.fromkeys(names, device)
            for layer in range(layers):
                for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
                    places[f"model.layers.{layer}.{part}"] = device
                places[f"model.layers.{layer}.mlp.experts"] = "disk" if case.device == "cpu" else "cpu"
            options = {"device_map": places, "offload_folder": offload}
        elif case.device == "cuda":
            options = {"device_map": {"": 0}}
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).eval()
        loaded.set_experts_implementation("eager")
        tokens, seconds, output = 0, 0.0, []
        for prompt in prompts:
            ids_BT = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
            times: list[float] = []

            def note(_tokens: Any, _scores: Any, found: list[float] = times, **_: Any) -> torch.Tensor:
                found.append(time.perf_counter())
                return torch.zeros(1, dtype=torch.bool, device=device)

            with torch.inference_mode():
                done_BT = loaded.generate(
                    ids_BT, max_new_tokens=case.tokens, do_sample=False, eos_token_id=None, stopping_criteria=[note]
                )
            output.append([int(token) for token in done_BT[0, ids_BT.shape[1] :]])
            # From the first token, which the prompt's forward pass gives, to the last.
            tokens, seconds = tokens + len(times) - 1, seconds + times[-1] - times[0]
    return Measured(
        tokens=tokens,
        seconds=seconds,
        hit_rate=None,
        megabytes_per_token=None,
        stall=None,
        memory_gb=peak_memory() / 1e9,
        copy_seconds=0.0,
        expert_seconds=0.0,
        layer_seconds=0.0,
        output=output,
        notes=[],
    )
