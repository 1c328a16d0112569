"""The precision and context that a model is checked in follow from the model and the device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from profiler.engines.vllm_attention import float32_attention
from vllm_patch.check.coverage import coverage, coverage_line
from vllm_patch.check.device import DeviceFacts, choose_dtype, context_length, has_latent_attention
from vllm_patch.check.results import CheckDocument, JobResult, Verdict
from vllm_patch.check.table import csv_table, markdown_table

GPU = DeviceFacts(name="a GPU", on_gpu=True, memory=1 << 20)
CPU = DeviceFacts(name="CPU", on_gpu=False, memory=1 << 20)
HALF = {"model_type": "mixtral", "dtype": "bfloat16"}


def checkpoint(folder: Path, config: dict[str, Any], stored: int) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(bytes(stored))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "stored", "device", "expected"),
    [
        (HALF, 1000, GPU, "float32"),
        (HALF, 1000, CPU, "float32"),
        # Twice as large in float32: 0.8 of the memory.
        (HALF, 400 << 10, GPU, "bfloat16"),
        (HALF | {"dtype": "float16"}, 400 << 10, GPU, "float16"),
        (HALF | {"dtype": "float32"}, 400 << 10, GPU, "float32"),
        # On a CPU, the reference needs as much again.
        (HALF | {"dtype": "float32"}, 400 << 10, CPU, "bfloat16"),
        (HALF | {"quantization_config": {"quant_method": "awq"}, "dtype": "float16"}, 1000, GPU, "float16"),
        (HALF | {"kv_lora_rank": 512}, 1000, GPU, "bfloat16"),
        (HALF | {"kv_lora_rank": 512}, 1000, CPU, "float32"),
        (HALF | {"layer_types": ["linear_attention", "full_attention"]}, 1000, CPU, "bfloat16"),
        ({"text_config": HALF | {"kv_lora_rank": 512}}, 1000, GPU, "bfloat16"),
    ],
)
def test_float32_where_the_device_allows_it(
    config: dict[str, Any], stored: int, device: DeviceFacts, expected: str, tmp_path: Path
) -> None:
    assert choose_dtype(checkpoint(tmp_path, config, stored), device) == expected


def test_families_that_need_half_precision_get_it() -> None:
    assert [choose_dtype(name, CPU) for name in ("mixtral", "deepseek_v3", "qwen3_next")] == ["float32", "float32", "bfloat16"]
    assert [choose_dtype(name, GPU) for name in ("mixtral", "deepseek_v3", "qwen3_next")] == ["float32", "bfloat16", "float32"]


@pytest.mark.parametrize(
    ("config", "dtype", "amx", "expected"),
    [
        ({"kv_lora_rank": 512}, "float32", True, {"attention_backend": "CPU_MLA"}),
        ({"text_config": {"kv_lora_rank": 512}}, "float32", True, {"attention_backend": "CPU_MLA"}),
        ({"kv_lora_rank": 512}, "bfloat16", True, {}),
        ({"kv_lora_rank": 512}, "float32", False, {}),
        ({}, "float32", True, {}),
    ],
)
def test_on_a_cpu_with_amx_latent_attention_runs_in_float32(
    config: dict[str, Any],
    dtype: str,
    amx: bool,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = ModuleType("vllm.v1.attention.backends.registry")
    registry.AttentionBackendEnum = SimpleNamespace(__members__={"AMX_MLA": 1})  # type: ignore[attr-defined] # a stand-in
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    checkpoint(tmp_path, config, 0)
    assert float32_attention(has_latent_attention(tmp_path), dtype) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 4096}, 1024),
        ({"max_seq_len": 256}, 256),
        ({}, 1024),
    ],
)
def test_the_context_is_at_most_the_models(config: dict[str, int], expected: int, tmp_path: Path) -> None:
    for content in (config, {"text_config": config}):
        assert context_length(Path(checkpoint(tmp_path, content, 0)), 1024) == expected


def job(model: str, verdict: str, **fields: Any) -> JobResult:
    return JobResult(model=model, mode="eager", dtype="float32", verdict=Verdict(verdict), detail=f"why {model}", **fields)


def document(*jobs: JobResult) -> CheckDocument:
    covered, not_covered = coverage(list(jobs), CPU)
    return CheckDocument(
        device="CPU",
        versions={"vllm": "1.0"},
        command=["check"],
        began="2026-01-02T03:04:05",
        jobs=list(jobs),
        covered=covered,
        not_covered=not_covered,
    )


def test_the_last_line_says_what_was_and_was_not_covered() -> None:
    found = document(
        job("mixtral", "exact", oracle="transformers", compared=7, differing=0),
        job("lfm2_moe", "ties", oracle="router on recorded inputs", compared=7, differing=1, input_difference=0.25),
        job("jamba", "failed"),
        job("longcat_flash", "refused"),
    )
    covered, missing = coverage_line(found).split(". Not covered: ")
    assert covered == "Covered: eager: 2 models; of these, by another oracle than transformers alone: lfm2_moe"
    assert missing.startswith("refused: longcat_flash; do not run here: jamba; 41 further families (--all); GPUs; asynchronous")
    later = coverage_line(document(job("mixtral", "exact", oracle="transformers", asynchronous=True)))
    assert later.startswith("Covered: eager: mixtral; asynchronous scheduling. Not covered: ")
    assert later.count("asynchronous") == 1


def test_in_the_table_a_later_document_counts() -> None:
    first = document(job("mixtral", "wrong"), job("jamba", "failed"))
    later = document(job("mixtral", "exact", oracle="transformers", compared=7, differing=0))
    lines = markdown_table([first, later]).splitlines()
    assert "| mixtral | eager | float32 | exact | transformers | 7 | 0 |  |" in lines
    assert "| jamba | eager | float32 | does not run here |  |  |  | why jamba |" in lines
    assert sum(line.startswith("| mixtral") for line in lines) == 1
    assert lines[:2] == ["Run on 2026-01-02 on CPU: vllm 1.0.", ""]


def test_the_table_as_csv_is_that_of_the_documentation() -> None:
    first = document(job("mixtral", "wrong", compared=1512, differing=3), job("jamba", "failed"))
    header, *rows = csv_table([first]).splitlines()
    assert rows == ["mixtral,eager,float32,wrong,,1512,3,why mixtral", "jamba,eager,float32,does not run here,,,,why jamba"]
    page = (Path(__file__).parents[3] / "docs" / "results" / "families.csv").read_text()
    assert page.splitlines()[0] == header
