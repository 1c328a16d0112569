"""Models by short name: facts, the checkpoint of each precision, and what fits on which GPU.

The facts are taken from each model's `config.json`; `resolve_model` checks them against the loaded config.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from profiler.errors import ModelError, ModelUsageError
from profiler.models.gpus import GPUS, Gpu

# Bytes in memory per parameter, including scales, zero points and the parameters that stay in 16 bits. AWQ and GPTQ with groups
# of 128 use 4.2 bits for most parameters: Mixtral's AWQ files are 24.7 GB for 46.7 billion parameters.
PRECISIONS = {"bf16": 2.0, "mxfp4": 0.66, "int8": 1.06, "int4": 0.56, "gptq": 0.54, "awq": 0.53}
# The share of a GPU's memory that vLLM may use, and what a step needs besides weights and KV cache, in GB.
USED_SHARE = 0.90
WORKSPACE = 2.0
# The sequence length in tokens that the batch size is planned for, and the largest batch size planned.
PLANNED_LENGTH = 1024
MAX_BATCH = 256
# Bytes per expert parameter: 4 bits, and one scale byte per 32 parameters. All other weights stay in 16 bits.
MXFP4_BYTES = 4.25 / 8
# The precision that `modal_jobs/quantize.py` creates.
QUANTIZE_PRECISION = "awq"
CHECKPOINTS_VARIABLE = "SPECMOE_CHECKPOINTS"


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One entry of the registry.

    checkpoints: precision -> hub id; the precision in which the model was published comes first.
    quantizable: precisions that `modal_jobs/quantize.py` can create.
    parameters, active: total parameters and parameters used per token, in billions. context: maximum tokens of a sequence.
    hidden: hidden size D. kv_bytes: KV cache of one token in 16 bits. window: tokens that layers with sliding-window attention
    see. window_kv_bytes: the part of kv_bytes that is of such layers.
    expert_width: intermediate size of a routed expert. shared: experts that every token uses; they are not routed.
    renormalized: whether top-k weights are renormalized to sum 1; None if the config does not say.
    gated: precisions whose repository requires an account that accepted the model's terms (Mixtral's did in 2024).
    remote_code: the config is Python code in the repository.
    small_gpus: GPU -> (bitsandbytes precision, batch size), for the transformers engine.
    """

    name: str
    checkpoints: dict[str, str]
    layers: int
    dense_layers: int = 0
    experts: int
    top_k: int
    shared: int = 0
    renormalized: bool | None
    context: int
    hidden: int
    expert_width: int
    parameters: float
    active: float
    kv_bytes: int
    window: int | None = None
    window_kv_bytes: int = 0
    gated: tuple[str, ...] = ()
    remote_code: bool = False
    quantizable: tuple[str, ...] = ()
    small_gpus: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers with experts: all but the first `dense_layers`."""
        return list(range(self.dense_layers, self.layers))

    @property
    def precisions(self) -> list[str]:
        """The precisions that vLLM can load, the published one first."""
        return [*self.checkpoints, *(precision for precision in self.quantizable if precision not in self.checkpoints)]

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert: three matrices, gate, up and down, without biases."""
        return 3 * self.hidden * self.expert_width

    def expert_bytes(self, precision: str) -> float:
        """Size of one routed expert, in bytes. Raises `ModelError` if the precision is unknown."""
        return self.expert_parameters * (MXFP4_BYTES if precision == "mxfp4" else bytes_per_parameter(precision))

    def dense_bytes(self, precision: str) -> float:
        """Size of all weights but the routed experts, in bytes. Raises `ModelError` if the precision is unknown."""
        experts = len(self.moe_layers) * self.experts * self.expert_parameters
        return max(0.0, self.parameters * 1e9 - experts) * dense_bytes_per_parameter(precision)

    def kv_cache_bytes(self, context: int, *, bits: int = 16) -> float:
        """Keys and values of one sequence of `context` tokens, in bytes. Layers with a sliding window keep only the window."""
        seen = context if self.window is None else min(context, self.window)
        return ((self.kv_bytes - self.window_kv_bytes) * context + self.window_kv_bytes * seen) * bits / 16

    def weights_gb(self, precision: str) -> float:
        """Memory of the weights, in GB."""
        return self.parameters * PRECISIONS[precision]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a model runs on a GPU.

    weights_gb: memory of the weights, in GB. batch: concurrent sequences of `PLANNED_LENGTH` tokens.
    kv_tokens: tokens that fit into the KV cache, which also bounds the length of a sequence.
    """

    precision: str
    weights_gb: float
    batch: int
    kv_tokens: int


_MIXTRAL = ModelEntry(
    name="mixtral-8x7b",
    checkpoints={"bf16": "mistralai/Mixtral-8x7B-v0.1", "awq": "TheBloke/Mixtral-8x7B-v0.1-AWQ"},
    layers=32,
    experts=8,
    top_k=2,
    renormalized=True,
    context=32768,
    hidden=4096,
    expert_width=14336,
    parameters=46.7,
    active=12.9,
    kv_bytes=2 * 32 * 8 * 128 * 2,
    gated=("bf16",),
)
_QWEN = ModelEntry(
    name="qwen1.5-moe",
    checkpoints={"bf16": "Qwen/Qwen1.5-MoE-A2.7B"},
    quantizable=("awq",),
    layers=24,
    experts=60,
    top_k=4,
    shared=1,
    renormalized=False,
    context=8192,
    hidden=2048,
    expert_width=1408,
    parameters=14.3,
    active=2.7,
    kv_bytes=2 * 24 * 16 * 128 * 2,
    small_gpus={
        "RTX 3090": ("int8", 16),
        "RTX 4090": ("int8", 16),
        "A6000": ("int8", 20),
        "A100-40GB": ("int8", 24),
        "A100-80GB": ("int8", 24),
    },
)

MODELS: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        _MIXTRAL,
        replace(
            _MIXTRAL,
            name="mixtral-8x7b-instruct",
            # Not TheBloke's AWQ files of the instruct model: users reported empty text and NaN log probabilities.
            checkpoints={"bf16": "mistralai/Mixtral-8x7B-Instruct-v0.1", "awq": "casperhansen/mixtral-instruct-awq"},
        ),
        _QWEN,
        replace(
            _QWEN,
            name="qwen1.5-moe-chat",
            checkpoints={"bf16": "Qwen/Qwen1.5-MoE-A2.7B-Chat", "gptq": "Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4"},
        ),
        ModelEntry(
            name="deepseek-moe-16b",
            checkpoints={"bf16": "deepseek-ai/deepseek-moe-16b-base"},
            quantizable=("awq",),
            layers=28,
            dense_layers=1,
            experts=64,
            top_k=6,
            shared=2,
            renormalized=False,
            context=4096,
            hidden=2048,
            expert_width=1408,
            parameters=16.4,
            active=2.8,
            kv_bytes=2 * 28 * 16 * 128 * 2,
            remote_code=True,
            small_gpus={
                "RTX 3090": ("int4", 8),
                "RTX 4090": ("int4", 8),
                "A6000": ("int4", 12),
                "A100-40GB": ("int4", 16),
                "A100-80GB": ("int4", 20),
            },
        ),
        ModelEntry(
            name="deepseek-v2-lite",
            checkpoints={"bf16": "deepseek-ai/DeepSeek-V2-Lite", "awq": "TechxGenus/DeepSeek-V2-Lite-AWQ"},
            layers=27,
            dense_layers=1,
            experts=64,
            top_k=6,
            shared=2,
            renormalized=False,
            context=32768,
            hidden=2048,
            expert_width=1408,
            parameters=15.7,
            active=2.4,
            # Multi-head latent attention: a latent vector of 512 and a rotary key of 64 per layer.
            kv_bytes=27 * (512 + 64) * 2,
        ),
        ModelEntry(
            name="olmoe",
            checkpoints={"bf16": "allenai/OLMoE-1B-7B-0125"},
            quantizable=("awq",),
            layers=16,
            experts=64,
            top_k=8,
            renormalized=False,
            context=4096,
            hidden=2048,
            expert_width=1024,
            parameters=6.9,
            active=1.3,
            kv_bytes=2 * 16 * 16 * 128 * 2,
        ),
        ModelEntry(
            name="qwen3-30b-a3b",
            checkpoints={
                "bf16": "Qwen/Qwen3-30B-A3B",
                "awq": "cognitivecomputations/Qwen3-30B-A3B-AWQ",
                "gptq": "Qwen/Qwen3-30B-A3B-GPTQ-Int4",
            },
            layers=48,
            experts=128,
            top_k=8,
            renormalized=True,
            context=40960,
            hidden=2048,
            expert_width=768,
            parameters=30.5,
            active=3.3,
            kv_bytes=2 * 48 * 4 * 128 * 2,
        ),
        ModelEntry(
            name="phi-3.5-moe",
            checkpoints={
                "bf16": "microsoft/Phi-3.5-MoE-instruct",
                "awq": "danieldk/Phi-3.5-MoE-instruct-AWQ-INT4",
            },
            layers=32,
            experts=16,
            top_k=2,
            renormalized=None,
            context=131072,
            hidden=4096,
            expert_width=6400,
            parameters=41.9,
            active=6.6,
            kv_bytes=2 * 32 * 8 * 128 * 2,
        ),
        ModelEntry(
            name="gpt-oss-20b",
            checkpoints={"mxfp4": "openai/gpt-oss-20b"},
            layers=24,
            experts=32,
            top_k=4,
            renormalized=True,
            context=131072,
            hidden=2880,
            expert_width=2880,
            parameters=20.9,
            active=3.6,
            kv_bytes=2 * 24 * 8 * 64 * 2,
            # Every other layer sees the last 128 tokens.
            window=128,
            window_kv_bytes=2 * 12 * 8 * 64 * 2,
        ),
    )
}


def bytes_per_parameter(precision: str) -> float:
    """The precision's entry of `PRECISIONS`. Raises `ModelError` if it is unknown."""
    if precision not in PRECISIONS:
        raise ModelUsageError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def dense_bytes_per_parameter(precision: str) -> float:
    """Bytes of each parameter outside the routed experts: 2 in `mxfp4`, which quantizes only the experts."""
    return 2.0 if precision == "mxfp4" else bytes_per_parameter(precision)


def find_entry(model_id: str) -> ModelEntry | None:
    """The registry's entry for a model, by short name or by the id of any of its checkpoints; None if it is unknown."""
    for entry in MODELS.values():
        if model_id == entry.name or model_id in entry.checkpoints.values():
            return entry
    return None


def fits(entry: ModelEntry, gpu: Gpu, precision: str) -> Preset | None:
    """How the model runs with vLLM on one such GPU in this precision; None if it does not fit."""
    weights = entry.weights_gb(precision)
    room = USED_SHARE * gpu.memory - weights - WORKSPACE
    tokens = int(room * 1e9 / entry.kv_bytes)
    batch = min(tokens // PLANNED_LENGTH, MAX_BATCH)
    return Preset(precision=precision, weights_gb=weights, batch=batch, kv_tokens=tokens) if batch >= 1 else None


def preset(entry: ModelEntry, gpu: Gpu, precision: str = "auto") -> Preset:
    """How to run the model on one such GPU. With `auto`, in the first precision of `entry.checkpoints` that fits.

    Raises `ModelError` if the checkpoint is unknown, or if it does not fit, naming the GPUs and precisions that do.
    """
    if precision != "auto" and precision not in entry.precisions:
        raise ModelUsageError(f"{entry.name} has no {precision} checkpoint: expected one of {', '.join(entry.precisions)}")
    # A precision that must first be quantized is used only when it is named.
    for candidate in entry.checkpoints if precision == "auto" else [precision]:
        found = fits(entry, gpu, candidate)
        if found is not None:
            return found
    sizes = ", ".join(
        f"{entry.weights_gb(p):.0f} GB in {p}" for p in (entry.precisions if precision == "auto" else [precision])
    )
    others = [
        f"{other.name} ({p})"
        for other in GPUS.values()
        if other.dollars_per_hour is not None
        for p in entry.precisions
        if precision in {"auto", p} and fits(entry, other, p)
    ]
    raise ModelError(
        f"{entry.name} does not fit on {gpu.name} with {gpu.memory} GB: its weights take {sizes}; "
        f"choose one of {', '.join(others) or 'no single GPU'}"
    )


def checkpoint(entry: ModelEntry, precision: str) -> str:
    """The hub id of a checkpoint or, if it is not public, the folder in which `modal_jobs/quantize.py` saves it."""
    return entry.checkpoints.get(precision) or str(quantized_checkpoint(entry.name, precision))


def quantized_checkpoint(name: str, precision: str) -> Path:
    """The folder of a checkpoint quantized by `modal_jobs/quantize.py`. name: a short name or a hub id."""
    return checkpoints_folder() / f"{name.replace('/', '--')}-{precision}"


def checkpoints_folder() -> Path:
    """Where checkpoints that were built here are saved: $SPECMOE_CHECKPOINTS, or else a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CHECKPOINTS_VARIABLE) or cache / "specmoe" / "checkpoints")
