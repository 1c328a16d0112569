"""The device that vLLM uses here, and the precision in which a model can be checked on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiler.errors import EngineError
from profiler.models.resolve import demo_model_folder

# On GPUs, the kernels for multi-head latent attention support only half precision; on CPU, those for gated delta networks.
# Quantized weights are multiplied in half precision everywhere.
HALF_PRECISION_ON_GPU = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1", "longcat_flash", "mixtral_awq")
HALF_PRECISION_ON_CPU = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_multimodal", "mixtral_awq")
# The share of the memory that the weights of a checked model may take. The rest is for vLLM's cache and steps, and on a CPU for
# the reference.
WEIGHTS_SHARE = {"gpu": 0.6, "cpu": 0.3}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """name: for people. memory: of the GPU or the host, in bytes. runners: model runners that vLLM can choose between."""

    name: str
    on_gpu: bool
    memory: int
    runners: tuple[int, ...] = ()


def find_device() -> DeviceFacts:
    """Ask vLLM in a separate process, so that this one does not occupy the GPU. Raises `EngineError` without a vLLM."""
    code = (
        "import json, os, torch, vllm.envs as e; gpu = torch.cuda.is_available(); "
        "name = torch.cuda.get_device_name(0) if gpu else 'CPU'; "
        "host = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'); "
        "memory = torch.cuda.get_device_properties(0).total_memory if gpu else host; "
        "print(json.dumps([name, gpu, memory, hasattr(e, 'VLLM_USE_V2_MODEL_RUNNER')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "VLLM_PLUGINS": ""})
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else "no message"
        raise EngineError(f"vLLM cannot be imported ({reason}): install vLLM in this environment, or repair it")
    name, on_gpu, memory, has_runners = json.loads(done.stdout.strip().splitlines()[-1])
    return DeviceFacts(
        name=str(name), on_gpu=bool(on_gpu), memory=int(memory), runners=(1, 2) if on_gpu and has_runners else ()
    )


def choose_dtype(model: str, device: DeviceFacts) -> str:
    """The precision to check a model in: float32, in which routing can be compared exactly, where the device allows it.

    model: a family's name, `demo` or a folder. A model whose weights are quantized, do not fit in float32, or need kernels that
    support only half precision, is checked in the half precision of its config.
    """
    folder = demo_model_folder() if model == "demo" else Path(model)
    if not (folder / "config.json").is_file():
        half_only = HALF_PRECISION_ON_GPU if device.on_gpu else HALF_PRECISION_ON_CPU
        return "bfloat16" if model in half_only else "float32"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    own = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype") or "float32")
    half = own if own in {"bfloat16", "float16"} else "bfloat16"
    return half if _needs_half(config, text, device) or not _fits_in_float32(folder, own, device) else "float32"


def context_length(folder: Path, wanted: int) -> int:
    """The context to start vLLM with, in tokens: `wanted`, or the most that the model supports."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    most = text.get("max_position_embeddings") or text.get("max_seq_len")
    return min(wanted, most) if isinstance(most, int) else wanted


def has_latent_attention(folder: Path) -> bool:
    """Whether a model has multi-head latent attention, by its config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool((config.get("text_config") or config).get("kv_lora_rank"))


def _needs_half(config: dict[str, Any], text: dict[str, Any], device: DeviceFacts) -> bool:
    if config.get("quantization_config") or text.get("quantization_config"):
        return True
    if device.on_gpu:
        return bool(text.get("kv_lora_rank"))
    return "linear_attention" in (text.get("layer_types") or [])


def _fits_in_float32(folder: Path, own: str, device: DeviceFacts) -> bool:
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    share = WEIGHTS_SHARE["gpu" if device.on_gpu else "cpu"]
    return stored / BYTES.get(own, 4) * BYTES["float32"] <= share * device.memory
