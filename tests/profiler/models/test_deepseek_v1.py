"""DeepSeek-MoE v1 without the code of its repository. (That vLLM runs it is in tests/vllm_patch/test_exactness.py.)"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from profiler.engines.transformers import route
from profiler.errors import ModelError
from profiler.models.deepseek_v1 import as_qwen2_moe, register_config
from vllm_patch.check import families
from vllm_patch.check.families.deepseek_v1 import deepseek_v1_oracle
from vllm_patch.check.families.shape import VOCABULARY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    families.make("deepseek_v1", folder)
    return folder / "deepseek_v1"


def test_the_rewriting_routes_and_computes_as_the_original(checkpoint: Path, tmp_path: Path) -> None:
    import torch

    as_qwen2_moe(checkpoint, tmp_path / "rewritten")
    rewritten = AutoModelForCausalLM.from_pretrained(tmp_path / "rewritten", dtype="float32").eval()
    oracle = deepseek_v1_oracle(checkpoint)
    token_ids = np.random.default_rng(0).integers(3, VOCABULARY, 64).tolist()
    (ids_TLK, weights_TLK), (expected_ids_TLK, expected_weights_TLK) = route(rewritten, token_ids), route(oracle, token_ids)
    assert ids_TLK.shape == (64, 2, 4)
    assert (np.sort(ids_TLK) == np.sort(expected_ids_TLK)).all()
    assert np.abs(np.sort(weights_TLK) - np.sort(expected_weights_TLK)).max() < 1e-6
    with torch.no_grad():
        logits, expected = (model(torch.tensor([token_ids])).logits for model in (rewritten, oracle))
    assert (logits - expected).abs().max() < 1e-5
    index = json.loads((tmp_path / "rewritten" / "model.safetensors.index.json").read_text())
    assert "model.layers.1.mlp.shared_expert_gate.weight" in index["weight_map"]


def test_the_configuration_is_read_without_its_code(checkpoint: Path) -> None:
    (checkpoint / "configuration_deepseek.py").write_text("raise SystemExit('untrusted code')")
    register_config()
    register_config()
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    assert (config.model_type, config.n_routed_experts, config.first_k_dense_replace) == ("deepseek", 16, 1)


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ModelError, match="not a DeepSeek-MoE v1 checkpoint: model type 'mixtral'"):
        as_qwen2_moe(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
