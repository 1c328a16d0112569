"""4-bit checkpoints by llmcompressor, of tiny random models, in llmcompressor's own environment; and on Modal."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import warm
from support.offline_modal import OfflineModal, last_line, needs_modal

from modal_jobs.awq import check_checkpoint
from profiler.engines.transformers import route
from profiler.errors import ModelError
from profiler.models.deepseek_v1 import as_qwen2_moe
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from vllm_patch.check.families import make
from vllm_patch.check.families.shape import SHAPE

PYTHON = Path(os.environ.get("QUANTIZE_PYTHON", f"{sys.prefix}-quantize/bin/python"))
needs_llmcompressor = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no {PYTHON}: make install-quantize")
pytestmark = pytest.mark.awq
# Imported once: they take seven seconds.
LLMCOMPRESSOR = (
    *("datasets", "transformers.models.auto.modeling_auto", "llmcompressor.modifiers.quantization"),
    *("llmcompressor.modifiers.transform.awq", "pydantic", "typer"),
)


@functools.cache
def quantizing() -> warm.Starter:
    return warm.Starter(PYTHON, LLMCOMPRESSOR, os.environ)


def tiny(family: str, folder: Path) -> Path:
    """A random checkpoint with the demo model's tokenizer, norms of unequal channels, and routers that distinguish tokens."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_folder())
    shape = {**SHAPE, "vocab_size": len(tokenizer), "num_key_value_heads": 4}
    if family == "qwen2_moe":
        config = transformers.Qwen2MoeConfig(
            **shape,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=128,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            mlp_only_layers=[0],
        )
        model = transformers.Qwen2MoeForCausalLM(config)
    else:
        config = transformers.OlmoeConfig(**{**shape, "intermediate_size": 64}, num_experts=8, num_experts_per_tok=2)
        model = transformers.OlmoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("layernorm.weight"):
            parameter.data.mul_(torch.exp(torch.randn_like(parameter) / 2))
        elif parameter.ndim > 1:
            parameter.data.mul_(4)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantize(source: Path, target: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(source), str(target), "--dataset", "demo-math,demo-code", "--num-texts", "12", "--group-size", "32"]
    return warm.run("modal_jobs.awq", *arguments, *more, starter=quantizing())


@needs_llmcompressor
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_experts_are_in_4_bits_and_routers_are_not(family: str, tmp_path: Path) -> None:
    source, target = tiny(family, tmp_path / "source"), tmp_path / "target"
    done = quantize(source, target)
    assert done.returncode == 0, done.stderr
    sparse = 2 if family == "qwen2_moe" else 3
    packed, routers = check_checkpoint(target)
    # Attention, experts, and in Qwen's the shared experts and the dense layer.
    assert packed == 3 * 4 + sparse * 8 * 3 + (sparse * 3 + 3 if family == "qwen2_moe" else 0)
    # With Qwen's gates of shared experts.
    assert routers == sparse
    said = re.search(r"([\d.]+)% of the experts selected on ([\d,]+) held-out tokens", done.stdout)
    assert said is not None
    # Random weights of no use: four bits change the hidden states, but far from all routes.
    assert 50 < float(said.group(1)) < 100
    original, quantized = (transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, target))
    tokens = np.random.default_rng(0).integers(3, 1000, 200).tolist()
    ids_TLK, other_TLK = route(original, tokens)[0], route(quantized, tokens)[0]
    agreement = (ids_TLK[..., :, None] == other_TLK[..., None, :]).sum() / ids_TLK.size
    # Other tokens than the report's, from a model that computes with 16 bits again: near it, and far from chance (.25).
    assert abs(100 * agreement - float(said.group(1))) < 15
    if family == "olmoe":
        assert quantize(source, target).stderr.splitlines()[-1] == f"quantize: {target} exists: delete it first"


@needs_llmcompressor
def test_deepseek_v1_is_quantized_in_the_form_of_qwen2_moe(tmp_path: Path) -> None:
    make("deepseek_v1", tmp_path)
    as_qwen2_moe(tmp_path / "deepseek_v1", tmp_path / "rewritten")
    # Its vocabulary is the tiny models', so the texts' tokens must be few.
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_folder())
    tokenizer.save_pretrained(tmp_path / "rewritten")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rewritten")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "rewritten")
    done = quantize(tmp_path / "rewritten", tmp_path / "target")
    assert done.returncode == 0, done.stderr
    assert check_checkpoint(tmp_path / "target")[1] == 2


def test_a_quantized_router_is_refused(tmp_path: Path) -> None:
    matrices = {
        "model.layers.0.mlp.gate.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
        "model.layers.0.mlp.experts.0.up_proj.weight_packed": torch.zeros(4, 1, dtype=torch.int32),
    }
    save_file(matrices, tmp_path / "model.safetensors")
    assert check_checkpoint(tmp_path) == (1, 1)
    save_file(matrices | {"model.layers.1.mlp.gate.weight_packed": torch.zeros(4, 1).int()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"the router model.layers.1.mlp.gate.weight_packed is quantized"):
        check_checkpoint(tmp_path)
    save_file({name: t for name, t in matrices.items() if "gate" in name}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no expert is in 4 bits"):
        check_checkpoint(tmp_path)


@needs_modal
@needs_llmcompressor
def test_the_job_leaves_a_checkpoint_where_collect_finds_it(tmp_path: Path) -> None:
    account = OfflineModal(tmp_path / "account")
    # A hub's cache as a download leaves it: the tests have no hub.
    cache = tmp_path / "cache" / "models--tiny--moe"
    tiny("qwen2_moe", cache / "snapshots" / "c0ffee")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c0ffee")
    assert account.run("volume", "create", "specmoe-cache").returncode == 0
    put = account.run("volume", "put", "specmoe-cache", str(cache), "/huggingface/hub/models--tiny--moe")
    assert put.returncode == 0, put.stderr
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"question": "What is {n} and {n * n}, said Ann?"}}\n' for n in range(12)))
    job = ["run", "modal_jobs/quantize.py", "--model", "tiny/moe", "--dataset", "gsm8k", "--data-files", str(prompts)]
    done = account.run(*job, "--group-size", "32", python=PYTHON, modules=())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 unquantized routers" in done.stdout
    checkpoint = account.volume("specmoe-cache") / "checkpoints" / "tiny--moe-awq"
    assert check_checkpoint(checkpoint)[1] == 2
    assert load_file(checkpoint / "model.safetensors")["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16

    collect = ["run", "modal_jobs/collect.py", "--model", "tiny/moe", "--precision", "awq", "--engine", "transformers"]
    data = ["--dataset", "demo-math", "--num-problems", "2", "--max-new-tokens", "2", "--out", str(tmp_path / "trace")]
    found = account.run(*collect, *data)
    assert found.returncode == 0, found.stdout + found.stderr
    model = Trace.open(tmp_path / "trace").metadata.model
    assert (model.id, model.moe_layers, model.quantization) == ("tiny/moe-awq", [1, 2], "compressed-tensors")


@needs_modal
def test_a_hub_models_commit_is_pinned_for_the_whole_run(tmp_path: Path) -> None:
    # Two commits of a repository, as a hub's cache holds them; the client has one of its own.
    first, second = "1" * 40, "2" * 40
    cache = tmp_path / "hub" / "models--tiny--moe"
    tiny("qwen2_moe", cache / "snapshots" / first)
    shutil.copytree(cache / "snapshots" / first, cache / "snapshots" / second)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(first)
    secret = {"huggingface-secret": {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "1"}}
    account = OfflineModal(tmp_path / "account", secrets=secret)
    assert account.run("volume", "create", "specmoe-cache").returncode == 0
    put = account.run("volume", "put", "specmoe-cache", str(cache), "/huggingface/hub/models--tiny--moe")
    assert put.returncode == 0, put.stderr
    collect = ["run", "modal_jobs/collect.py", "--model", "tiny/moe", "--engine", "transformers", "--dataset", "demo-math"]
    collect += ["--num-problems", "4", "--max-new-tokens", "2", "--shard-size", "2", "--hf-secret", "huggingface-secret"]
    account.environment["HF_HUB_CACHE"] = str(tmp_path / "hub")
    done = account.run(*collect, "--out", str(tmp_path / "trace"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert Trace.open(tmp_path / "trace").metadata.model.revision == first

    # The repository moves on, and a shard must be collected again.
    (account.volume("specmoe-cache") / "huggingface" / "hub" / "models--tiny--moe" / "refs" / "main").write_text(second)
    run = next(path for path in account.volume("specmoe-traces").iterdir() if path.name.startswith("tiny"))
    assert (run / "commit.txt").read_text() == first
    for manifest in (run / "shard-00001").glob("*/manifest.json"):
        manifest.unlink()
    again = account.run(*collect, "--out", str(tmp_path / "again"))
    assert again.returncode == 0, again.stdout + again.stderr
    trace = Trace.open(tmp_path / "again")
    assert (trace.metadata.model.revision, trace.problems.num_rows) == (first, 4)


@needs_modal
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "mixtral-8x7b"], "quantize: mixtral-8x7b has the precisions bf16, awq: there is nothing to quantize"),
        (["--model", "mixtrall"], "quantize: unknown model 'mixtrall': expected one of mixtral-8x7b"),
        (["--model", "qwen1.5-moe", "--gpu", "TPU"], "quantize: unknown GPU 'TPU': expected one of L4"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments: list[str], text: str, tmp_path: Path) -> None:
    done = OfflineModal(tmp_path / "account").run("run", "modal_jobs/quantize.py", *arguments)
    assert done.returncode == 1
    assert text in last_line(done)
