"""The environment of rented machines: container images, Volumes, and where they are mounted."""

from __future__ import annotations

import re
from pathlib import Path

import modal

from profiler.plan.job import VLLM

ROOT = Path(__file__).resolve().parent.parent
# vLLM's version of PyTorch, 2.13, is built for CUDA 13.0.
CUDA_IMAGE = "nvidia/cuda:13.0.1-devel-ubuntu22.04"
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
PYTHON = "3.12"

CACHE, TRACES = "/cache", "/traces"
CACHE_VOLUME, TRACE_VOLUME = "specmoe-cache", "specmoe-traces"
HF_SECRET = "huggingface-secret"
PROJECT = {
    *("LICENSE", "README.md", "pyproject.toml", "specmoe.py"),
    *("analysis", "modal_jobs", "profiler", "speculation", "vllm_patch"),
}
SOURCE = "/opt/speculative-moe"

ENVIRONMENT = {
    "HF_HOME": f"{CACHE}/huggingface",
    "HF_XET_HIGH_PERFORMANCE": "1",
    "VLLM_CACHE_ROOT": f"{CACHE}/vllm",
    "VLLM_NO_USAGE_STATS": "1",
    "SPECMOE_CHECKPOINTS": f"{CACHE}/checkpoints",
}


def with_project(image: modal.Image, extras: str) -> modal.Image:
    """The image with this project installed, so that vLLM finds the plugin by its entry point."""
    return (
        image.add_local_dir(ROOT, SOURCE, copy=True, ignore=files_to_ignore(ROOT))
        .run_commands(f"python -m pip install '{SOURCE}{extras}'")
        .env(ENVIRONMENT)
    )


def files_to_ignore(root: Path) -> modal.FilePatternMatcher:
    """The files of the project's folder that are not uploaded.

    They are given as patterns, so that Modal does not walk through environments and traces.
    """
    names = (path.name for path in root.iterdir() if path.name not in PROJECT)
    return modal.FilePatternMatcher(*(re.sub(r"([\\*?\[\]! ])", r"\\\1", name) for name in names), "**/__pycache__")


def gpu_image() -> modal.Image:
    """vLLM with the CUDA compiler, which some kernels need on their first run."""
    base = modal.Image.from_registry(CUDA_IMAGE, add_python=PYTHON).entrypoint([])
    return with_project(base.uv_pip_install(VLLM), "[collect]")


def quantize_image() -> modal.Image:
    """llmcompressor, which requires other versions of its dependencies than vLLM."""
    return with_project(modal.Image.debian_slim(python_version=PYTHON), "[quantize]")


def train_image() -> modal.Image:
    """PyTorch for GPUs, from the default package index."""
    return with_project(modal.Image.debian_slim(python_version=PYTHON), "[collect,train]")


def cpu_image() -> modal.Image:
    """No vLLM: for functions that download, orchestrate and analyze."""
    base = modal.Image.debian_slim(python_version=PYTHON).uv_pip_install("torch", index_url=TORCH_CPU)
    return with_project(base, "[analysis,collect]")


cache_volume = modal.Volume.from_name(CACHE_VOLUME, create_if_missing=True)
trace_volume = modal.Volume.from_name(TRACE_VOLUME, create_if_missing=True)
