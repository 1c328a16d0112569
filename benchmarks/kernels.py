"""Which MoE kernel vLLM chooses, and which one capture makes it choose, without a GPU: the table of docs/results/kernels.md.

    python -m benchmarks.kernels                              the installed vLLM
    python -m benchmarks.kernels --releases 0.26.0,0.33.0     download these vllm wheels and use their Python sources
    python -m benchmarks.kernels --json FILE                  the installed vLLM, as JSON

vLLM's own selection functions run, called by vLLM's own quantization methods, for one layer without parallelism. What does not
exist on this machine is replaced: the platform is vLLM's CUDA platform with a given compute capability; FlashInfer, DeepGEMM
and Triton's kernels count as installed, since they come with vLLM's CUDA wheels; and four functions of the compiled library
that say what CUTLASS supports answer by compute capability. Compiled extensions are never loaded, so the sources of any release
can be used. Nothing is computed: this shows which kernels are chosen, not that they work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks.releases import PLATFORMS, ROOT, pip

# NVIDIA's compute capabilities, and GPUs that have them.
DEVICES = {
    (8, 0): "A100",
    (8, 9): "L4, L40S, RTX 4090",
    (9, 0): "H100, H200",
    (10, 0): "B200",
    (12, 0): "RTX 5090, RTX PRO 6000",
}
# Requests for a backend whose kernel selects experts internally: with a second kernel that does not, and without one.
REQUESTS = (("MXFP4 (gpt-oss)", "triton", (9, 0)), ("bf16", "flashinfer_trtllm", (10, 0)))
# vLLM's functions that look for packages which come with its CUDA wheels.
INSTALLED = re.compile(r"has_flashinfer\w*|is_flashinfer_mxint4_moe_available|has_triton_kernels|has_deep_gemm")
EXTENSIONS = ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch")
QUANTIZATION = "vllm.model_executor.layers.quantization"
COMPRESSED = "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", help="comma-separated; default: the installed vLLM")
    parser.add_argument("--json", type=Path, help="write JSON to this file instead of printing a table")
    options = parser.parse_args()
    if options.json:
        # Not printed: vLLM prints its log.
        options.json.write_text(json.dumps(choices(), indent=1))
        return
    found = [choices_of(release) for release in options.releases.split(",")] if options.releases else [choices()]
    # Releases with the same choices share a table.
    for row, same in itertools.groupby(found, key=lambda one: one["checkpoints"]):
        print(table([one["release"] for one in same], row), flush=True)


def table(releases: list[str], checkpoints: dict[str, dict[str, list[str]]]) -> str:
    """The choices of some releases as a Markdown table."""
    lines = [
        f"vLLM {', '.join(releases)}:\n",
        "| checkpoint | " + " | ".join(f"{major}.{minor}" for major, minor in DEVICES) + " |",
        "|---" * (len(DEVICES) + 1) + "|",
    ]
    for name, row in checkpoints.items():
        cells = (own if own == chosen else f"{own} → **{chosen}**" for own, chosen in row.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def choices_of(release: str) -> dict[str, Any]:
    """Like `choices`, with the Python sources of a `vllm` wheel from the package index."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", *PLATFORMS, f"vllm=={release}"]
        pip("download", *wheel, "-d", folder)
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith((".py", ".json"))])
        out = Path(folder) / "choices.json"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.kernels", "--json", str(out)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return dict(json.loads(out.read_text()))


def choices() -> dict[str, Any]:
    """vLLM's own choice and that of capture, for each checkpoint and compute capability; and the answer to two fixed requests.

    Changes the imported vLLM for good: call it in a process of its own.
    """
    from vllm_patch.routers.kernels import recordable_kernels

    checkpoints: dict[str, dict[str, tuple[str, str]]] = {}
    requests = {}
    with pretended_cuda() as set_capability:
        for name, make in CHECKPOINTS.items():
            row = checkpoints[name] = {}
            for major, minor in DEVICES:
                set_capability(major, minor)
                own = kernel_of(make, "auto")
                with recordable_kernels():
                    row[f"{major}.{minor}"] = own, kernel_of(make, "auto")
        for name, backend, capability in REQUESTS:
            set_capability(*capability)
            with recordable_kernels() as found:
                kernel = kernel_of(CHECKPOINTS[name], backend)
            requests[f"{name}, {backend}"] = kernel, found.replaced(kernel), found.advice(kernel)
    release = importlib.import_module("vllm").__version__
    return {"release": release, "checkpoints": checkpoints, "requests": requests}


def kernel_of(make: Callable[[str], Any], backend: str) -> str:
    """The kernel of a layer's quantization method, or the error with which vLLM fails to choose one."""
    try:
        return str(make(backend).experts_cls.__name__)
    except (ValueError, NotImplementedError, ImportError, LookupError) as error:
        # A cell of the table: what vLLM raises where it supports nothing, or fails.
        return f"fails ({type(error).__name__})"


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Callable[[int, int], None]]:
    """Make vLLM believe that it runs on a CUDA device; yields a function that sets the device's compute capability."""
    for name in EXTENSIONS:
        module = ModuleType(f"vllm.{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    capability = [(8, 0)]
    platforms: Any = importlib.import_module("vllm.platforms")
    # Modules that need compiled kernels are imported as on a CPU. What they import later sees the CUDA platform.
    platforms._current_platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform()
    for name in ("fp8", "modelopt", "mxfp4", "auto_awq", "auto_gptq", COMPRESSED, "utils.flashinfer_mxint4_moe"):
        importlib.import_module(f"{QUANTIZATION}.{name}")
    config = importlib.import_module("vllm.config")
    settings = config.VllmConfig()
    bfloat16 = importlib.import_module("torch").bfloat16
    settings.model_config = SimpleNamespace(quantization_config=None, hf_text_config=None, dtype=bfloat16)
    cuda = importlib.import_module("vllm.platforms.cuda")
    version = importlib.import_module("vllm.platforms.interface").DeviceCapability

    # mypy: the base class is imported by name, since vLLM need not be installed.
    class Device(cuda.CudaPlatformBase):  # type: ignore[misc, name-defined] # mypy does not follow vLLM
        device_name = "pretended"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return version(*capability[0])

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    platforms._current_platform = Device()
    loaded = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("vllm")]
    for names in loaded:
        if "current_platform" in names:
            names["current_platform"] = platforms._current_platform
        for name in names:
            if INSTALLED.fullmatch(name):
                names[name] = lambda *_: True
    operations = importlib.import_module("vllm._custom_ops")
    for name, oldest in (
        ("cutlass_scaled_mm_supports_fp8", 89),
        ("cutlass_scaled_mm_supports_block_fp8", 90),
        ("cutlass_group_gemm_supported", 90),
        ("cutlass_scaled_mm_supports_fp4", 100),
    ):
        setattr(operations, name, lambda found, oldest=oldest: found >= oldest)

    def set_capability(major: int, minor: int) -> None:
        capability[0] = major, minor
        for name, module in list(sys.modules.items()):
            for value in list(vars(module).values()) if name.startswith("vllm") else ():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()

    with config.set_current_vllm_config(settings):
        yield set_capability


def layer(backend: str, **shape: Any) -> Any:
    """vLLM's config of one MoE layer, by default with Mixtral 8x7B's shape."""
    config = importlib.import_module(f"{FUSED_MOE}.config")
    activation = importlib.import_module(f"{FUSED_MOE}.activation").MoEActivation
    bfloat16 = importlib.import_module("torch").bfloat16
    values = {
        "num_experts": 8,
        "experts_per_token": 2,
        "hidden_dim": 4096,
        "intermediate_size": 14336,
        "has_bias": False,
        "activation": "SILU",
        **shape,
    }
    experts, width = values["num_experts"], values["intermediate_size"]
    values |= {
        "activation": getattr(activation, values["activation"]),
        "num_local_experts": experts,
        "num_logical_experts": experts,
        # Of releases in which this is not computed.
        "intermediate_size_per_partition": width,
        "device": "cpu",
        "routing_method": config.RoutingMethodType.Renormalize,
        "moe_parallel_config": config.FusedMoEParallelConfig.make_no_parallel(),
        "in_dtype": bfloat16,
        "moe_backend": backend,
        "max_num_tokens": 8192,
    }
    known = {field.name for field in dataclasses.fields(config.FusedMoEConfig) if field.init}
    return config.FusedMoEConfig(**{name: value for name, value in values.items() if name in known})


def unquantized(backend: str) -> Any:
    module = importlib.import_module(f"{FUSED_MOE}.unquantized_fused_moe_method")
    return module.UnquantizedFusedMoEMethod(layer(backend))


def fp8(backend: str, **settings: Any) -> Any:
    module = importlib.import_module(f"{QUANTIZATION}.fp8")
    config = module.Fp8Config(is_checkpoint_fp8_serialized=True, **settings)
    return module.Fp8MoEMethod(config, SimpleNamespace(moe_config=layer(backend)))


def nvfp4(backend: str) -> Any:
    module = importlib.import_module(f"{QUANTIZATION}.modelopt")
    # Of ModelOpt's config, only these entries are read here; its constructor changed from release to release.
    config = SimpleNamespace(quant_method="NVFP4", moe_activation_override=None, group_size=16, use_a16=False)
    return module.ModelOptNvFp4FusedMoE(config, layer(backend))


def mxfp4(backend: str) -> Any:
    module = importlib.import_module(f"{QUANTIZATION}.mxfp4")
    method = getattr(module, "GptOssMxfp4MoEMethod", None) or module.Mxfp4MoEMethod
    shape = {"num_experts": 32, "experts_per_token": 4, "hidden_dim": 2880, "intermediate_size": 2880}
    return method(layer(backend, **shape, activation="SWIGLUOAI", has_bias=True))


def awq(backend: str) -> Any:
    module = importlib.import_module(f"{QUANTIZATION}.auto_awq")
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    return module.AutoAWQMoEMethod(module.AutoAWQConfig.from_config(config), layer(backend))


def gptq(backend: str) -> Any:
    module = importlib.import_module(f"{QUANTIZATION}.auto_gptq")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    return module.AutoGPTQMoEMethod(module.AutoGPTQConfig.from_config(config), layer(backend))


def compressed(backend: str, group_size: int) -> Any:
    try:
        # Up to 0.28, Marlin has a class of its own, which also asks the selection function.
        module = importlib.import_module(f"{QUANTIZATION}.{COMPRESSED}_marlin")
        method = module.CompressedTensorsWNA16MarlinMoEMethod
    except ModuleNotFoundError:
        method = importlib.import_module(f"{QUANTIZATION}.{COMPRESSED}").CompressedTensorsWNA16MoEMethod
    arguments = importlib.import_module("compressed_tensors.quantization").QuantizationArgs
    weights = arguments(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    return method(weights, None, layer(backend), layer_name="")


CHECKPOINTS: dict[str, Callable[[str], Any]] = {
    "bf16": unquantized,
    "FP8, one scale": functools.partial(fp8, activation_scheme="static"),
    "FP8, 128 x 128 blocks": functools.partial(fp8, activation_scheme="dynamic", weight_block_size=[128, 128]),
    "NVFP4": nvfp4,
    "MXFP4 (gpt-oss)": mxfp4,
    "AWQ": awq,
    "GPTQ": gptq,
    "compressed-tensors W4A16, groups of 128": functools.partial(compressed, group_size=128),
    "compressed-tensors W4A16, groups of 32": functools.partial(compressed, group_size=32),
}


if __name__ == "__main__":
    main()
