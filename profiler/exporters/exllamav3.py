"""Routing statistics for ExLlamaV3's split of experts between GPU and CPU.

Format: `exllamav3/modules/block_sparse_mlp_cpu.py` of turboderp-org/exllamav3 1.6.5 (PyPI). `EXL3_MOE_CPU_SPLIT_STATS` names a
JSON file with the key of each MoE module and one count per expert; experts are ordered by descending count, and the last
`--moe_cpu_split` of each layer go to the CPU. The open pull request 315 (`--moe_cpu_profile`) reads the same file, and refuses
any further key, so that the hit rate is in the report next to it.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from profiler.errors import UsageError
from profiler.exporters.content import Content
from profiler.trace.writer import write_text

NAME = "exllamav3"
ABOUT = "JSON for EXL3_MOE_CPU_SPLIT_STATS, and for --moe_cpu_profile of pull request 315: counts by layer"
SCOPE = "layer"
SUFFIX = ".json"
UNVERIFIED = "ExLlamaV3 was not run (it needs a GPU); a test reads the file as its loader does"
# Names of MoE modules in exllamav3/architecture/*.py, by the model's architecture; all others are `mlp`.
_MODULES = {
    "MixtralForCausalLM": "block_sparse_moe",
    "MiniMaxM2ForCausalLM": "block_sparse_moe",
    "KimiLinearForCausalLM": "block_sparse_moe",
    "DeepseekV4ForCausalLM": "ffn",
    "NemotronHForCausalLM": "mixer",
    "Lfm2MoeForCausalLM": "feed_forward",
    "Step3p5ForCausalLM": "moe",
}


def write(content: Content, out: Path) -> list[str]:
    """Write the statistics. Returns how to use them. Raises `SpecmoeError` if the key of layers has no `{layer}`."""
    key = content.layer_key or f"model.layers.{{layer}}.{_module(content)}"
    if "{layer}" not in key:
        raise UsageError(f"layer key {key!r}: expected {{layer}} in it, such as model.layers.{{layer}}.mlp")
    counts = {
        key.replace("{layer}", str(layer)): row.tolist()
        for layer, row in zip(content.model.moe_layers, content.score_LE, strict=True)
    }
    write_text(out, json.dumps(counts) + "\n")
    on_cpu = content.model.num_experts - content.kept_per_layer
    statistics = f"EXL3_MOE_CPU_SPLIT_STATS={shlex.quote(str(out))}"
    return [
        f"ExLlamaV3: {statistics} with --moe_cpu_split {on_cpu}; EXL3_MOE_CPU_SWAP=0 keeps this placement",
        f"its modules are named {key}: if it prints 'no routing stats for layer', give the names with a layer key",
    ]


def _module(content: Content) -> str:
    # A converted trace may name only the model.
    architecture = content.model.architecture or ("MixtralForCausalLM" if "mixtral" in content.model.id.lower() else "")
    return _MODULES.get(architecture, "mlp")
