"""The registry's facts, and that a config which contradicts them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from profiler.errors import ModelError
from profiler.models.gpus import GPUS
from profiler.models.registry import MODELS, fits, preset, quantized_checkpoint
from profiler.models.resolve import resolve_model

# model -> MoE layers, first of them, experts, top-k, renormalized: from each model's config.json on the hub.
FACTS = {
    "mixtral-8x7b": (32, 0, 8, 2, True),
    "qwen1.5-moe": (24, 0, 60, 4, False),
    "deepseek-moe-16b": (27, 1, 64, 6, False),
    "deepseek-v2-lite": (26, 1, 64, 6, False),
    "olmoe": (16, 0, 64, 8, False),
    "qwen3-30b-a3b": (48, 0, 128, 8, True),
    "phi-3.5-moe": (32, 0, 16, 2, None),
    "gpt-oss-20b": (24, 0, 32, 4, True),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_the_registry(name: str) -> None:
    entry = MODELS[name]
    found = (len(entry.moe_layers), entry.moe_layers[0], entry.experts, entry.top_k, entry.renormalized)
    assert found == FACTS[name]


def qwen(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "max_position_embeddings": 8192,
    }
    return config | changes


def in_hub_cache(folder: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A config as a download of Qwen1.5-MoE leaves it."""
    repository = folder / "models--Qwen--Qwen1.5-MoE-A2.7B"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(folder))


def test_a_config_that_agrees_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_hub_cache(tmp_path, qwen(), monkeypatch)
    model = resolve_model("qwen1.5-moe")
    assert (model.metadata.id, model.metadata.num_experts) == ("Qwen/Qwen1.5-MoE-A2.7B", 60)
    assert model.metadata.revision == "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_experts_per_tok": 2}, "experts per token 2, the registry has 4"),
        ({"num_experts": 8}, "experts 8, the registry has 60"),
        ({"norm_topk_prob": True}, "renormalized True, the registry has False"),
        ({"mlp_only_layers": [0]}, "MoE layers"),
        ({"num_hidden_layers": 48}, "layers 48, the registry has 24"),
        ({"hidden_size": 1024}, "hidden size 1024, the registry has 2048"),
    ],
)
def test_a_config_that_contradicts_the_registry_is_an_error(
    changes: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub_cache(tmp_path, qwen(**changes), monkeypatch)
    with pytest.raises(ModelError, match=text):
        resolve_model("qwen1.5-moe")


def test_a_checkpoint_made_here_is_found_and_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMOE_CHECKPOINTS", str(tmp_path))
    with pytest.raises(ModelError, match=r"no awq checkpoint of qwen1.5-moe is public, .* modal run modal_jobs/quantize.py"):
        resolve_model("qwen1.5-moe", precision="awq")
    folder = quantized_checkpoint("qwen1.5-moe", "awq")
    folder.mkdir()
    quantized = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(qwen(quantization_config=quantized)))
    model = resolve_model("qwen1.5-moe", precision="awq")
    assert (model.location, model.metadata.id) == (str(folder), "qwen1.5-moe-awq")
    assert model.metadata.quantization == "compressed-tensors"
    (folder / "config.json").write_text(json.dumps(qwen(num_experts=64)))
    with pytest.raises(ModelError, match="experts 64, the registry has 60"):
        resolve_model("qwen1.5-moe", precision="awq")


def test_deepseek_written_as_qwen2_moe_keeps_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMOE_CHECKPOINTS", str(tmp_path))
    folder = quantized_checkpoint("deepseek-moe-16b", "awq")
    folder.mkdir()
    config = qwen(num_hidden_layers=28, num_experts=64, num_experts_per_tok=6, mlp_only_layers=[0])
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_model("deepseek-moe-16b", precision="awq").metadata.moe_layers == list(range(1, 28))


def test_what_fits_where() -> None:
    mixtral, gpus = MODELS["mixtral-8x7b"], GPUS
    # 93 GB in 16 bits, 25 GB in 4.
    assert [name for name, gpu in gpus.items() if fits(mixtral, gpu, "bf16")] == ["H200", "B200"]
    assert preset(mixtral, gpus["A100-80GB"]).precision == "awq"
    assert preset(mixtral, gpus["A100-80GB"]).weights_gb == pytest.approx(24.65, rel=0.01)
    assert preset(mixtral, gpus["A100-40GB"]).batch < preset(mixtral, gpus["A100-80GB"]).batch
    with pytest.raises(ModelError, match=r"does not fit on RTX 4090 with 24 GB: .* choose one of L40S \(awq\), A100-40GB"):
        preset(mixtral, gpus["RTX 4090"])
    for entry in MODELS.values():
        assert any(fits(entry, gpu, precision) for gpu in gpus.values() for precision in entry.checkpoints)


def test_no_model_has_more_active_than_all_parameters() -> None:
    for entry in MODELS.values():
        assert entry.active < entry.parameters
        assert entry.top_k < entry.experts
        assert entry.dense_layers < entry.layers
