"""MoE facts from configs: the real models' own entries, as in their config.json on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiler.errors import ModelError
from profiler.models.resolve import demo_model_folder, moe_facts, resolve_model

CONFIGS = {
    "mixtral": {"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen1.5-moe": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 24,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    },
    "deepseek-moe-16b": {
        "model_type": "deepseek",
        "num_hidden_layers": 28,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
    },
    "olmoe": {
        "model_type": "olmoe",
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}


@pytest.mark.parametrize(
    ("name", "layers", "first", "experts", "top_k", "renormalized"),
    [
        ("mixtral", 32, 0, 8, 2, True),
        ("qwen1.5-moe", 24, 0, 60, 4, False),
        ("deepseek-moe-16b", 27, 1, 64, 6, False),
        ("olmoe", 16, 0, 64, 8, False),
        ("qwen3-30b-a3b", 48, 0, 128, 8, True),
    ],
)
def test_facts_of_real_models(name: str, layers: int, first: int, experts: int, top_k: int, renormalized: bool) -> None:
    facts = moe_facts(CONFIGS[name])
    assert (len(facts["moe_layers"]), facts["moe_layers"][0]) == (layers, first)
    assert (facts["num_experts"], facts["top_k"], facts["renormalized"]) == (experts, top_k, renormalized)


def test_sparse_step_and_dense_layers() -> None:
    config = CONFIGS["qwen3-30b-a3b"] | {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert moe_facts(config)["moe_layers"] == [1, 5, 7]


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="LlamaForCausalLM has no routed experts"):
        resolve_model(str(tmp_path))


def test_unknown_names_list_what_exists(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected one of demo, mixtral-8x7b"):
        resolve_model("mixtrall")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_a_hub_model_that_cannot_be_reached_is_one_error() -> None:
    with pytest.raises(ModelError, match="cannot read the config of model 'unknown/nothing'"):
        resolve_model("unknown/nothing")


def test_the_embedded_model_is_what_its_card_says() -> None:
    model = resolve_model("demo").metadata
    assert (model.moe_layers, model.num_experts, model.top_k) == (list(range(8)), 8, 2)
    assert (model.dtype, model.architecture) == ("bfloat16", "MixtralForCausalLM")
    assert (demo_model_folder() / "model.safetensors").stat().st_size < 12_000_000
