"""MoE facts are those of the model that transformers builds, for every family, however its config names them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, PretrainedConfig

from profiler.errors import ModelError
from profiler.models.moe_modules import find_moe_blocks
from profiler.models.resolve import loaded_model, moe_facts, resolve_model
from vllm_patch.check.families import FAMILIES

# MoE layers, E and K as the functions in `families` define them.
SOME = {
    "llama4_interleaved": ([1, 3], 8, 1),
    "llama4_multimodal": ([1, 3], 8, 1),
    "ernie4_5_moe": ([1, 2], 16, 4),
    "dbrx": ([0, 1, 2], 8, 4),
    "gemma4": ([0, 1, 2], 8, 2),
    "gemma4_multimodal": ([0, 1, 2], 8, 2),
    "jamba": ([1], 8, 2),
    "nemotron_h": ([1, 3], 16, 4),
    "hunyuan_v1_moe": ([0, 1, 2], 16, 4),
    "qwen3_moe": ([0, 2], 16, 4),
    "qwen3_moe_many_experts": ([0, 1, 2], 300, 8),
    "mixtral_all_experts": ([0, 1, 2], 4, 4),
    "mixtral_one_expert": ([0, 1, 2], 8, 1),
}

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the `config.json` of every family."""
    folders = {}
    for name, build in FAMILIES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        with torch.device("meta"):
            model = build()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_are_those_of_the_modules(name: str, configs: dict[str, Path]) -> None:
    config, _ = PretrainedConfig.get_config_dict(configs[name])
    facts = moe_facts(config)
    with torch.device("meta"):
        model = FAMILIES[name]()
    experts = [path.split(".") for path, _ in model.named_modules() if path.endswith(".experts")]
    layers = sorted({int(next(part for part in path if part.isdigit())) for path in experts})
    assert facts["moe_layers"] == layers
    assert facts["num_layers"] > layers[-1]
    if name in SOME:
        assert (facts["moe_layers"], facts["num_experts"], facts["top_k"]) == SOME[name]


@pytest.mark.parametrize("name", ["ernie4_5_moe", "dbrx", "gemma4", "llama4_interleaved"])
def test_a_model_folder_is_resolved_as_it_is_built(name: str, configs: dict[str, Path]) -> None:
    model = resolve_model(str(configs[name])).metadata
    assert (model.moe_layers, model.num_experts, model.top_k) == SOME[name]


# Types that `FAMILIES` lacks, by the defaults of their config classes: MoE layers, E and K.
TYPES = {
    # Decoders that transformers has only as a part of larger models.
    "step3p5": (range(3, 45), 288, 8),
    "step3p7": (range(3, 45), 288, 8),
    "qwen3_omni_moe": (range(28), 128, 8),
    # The router has more outputs than there are experts, or the experts belong to attention, too.
    "inkling_text": (range(66), 256, 6),
    "zaya": (range(40), 16, 1),
    "jetmoe": (range(12), 8, 2),
    # Their names alone say that every layer has experts.
    "glm5_next": (range(3, 45), 288, 8),
    "kimi_linear": (range(1, 27), 256, 8),
}


@pytest.mark.parametrize("model_type", TYPES)
def test_decoders_without_a_class_or_a_usual_router_are_found(model_type: str) -> None:
    facts = moe_facts(json.loads(json.dumps(CONFIG_MAPPING[model_type]().to_dict())))
    layers, experts, top_k = TYPES[model_type]
    assert (facts["moe_layers"], facts["num_experts"], facts["top_k"]) == (list(layers), experts, top_k)


def test_what_one_layer_has_several_sets_of_is_not_guessed() -> None:
    """Ernie 4.5 VL has experts for text and others for images."""
    with pytest.raises(ModelError, match="does not say which layers have experts"):
        moe_facts(json.loads(json.dumps(CONFIG_MAPPING["ernie4_5_vl_moe_text"]().to_dict())))


@pytest.mark.parametrize("model_type", ["nllb-moe", "switch_transformers"])
def test_encoder_decoder_models_are_refused(model_type: str) -> None:
    config = {"model_type": model_type, "is_encoder_decoder": True, "num_experts": 8, "num_layers": 2}
    with pytest.raises(ModelError, match=f"{model_type} has an encoder and a decoder"):
        moe_facts(config)


def test_a_dense_model_of_a_moe_class_is_refused() -> None:
    """Gemma 4 without its experts: the class and its config know the words."""
    config = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "num_hidden_layers": 2, "num_experts": 8}
    with pytest.raises(ModelError, match="Gemma4ForCausalLM has no routed experts"):
        moe_facts(config)


def test_an_unknown_type_is_read_by_names() -> None:
    config = {"model_type": "new", "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}
    assert moe_facts(config)["moe_layers"] == [0, 1]
    with pytest.raises(ModelError, match="no routed experts"):
        moe_facts({"model_type": "new", "num_hidden_layers": 2, "num_experts": 0, "num_experts_per_tok": 0})


@pytest.mark.parametrize("names", [("experts_in_total", "active"), ("moe_num_experts", "moe_top_k")])
def test_an_unknown_type_with_unknown_names_is_not_called_dense(names: tuple[str, str]) -> None:
    with pytest.raises(ModelError, match="new: its config does not say which layers have experts in a way this version knows"):
        moe_facts({"model_type": "new", "num_hidden_layers": 2} | dict.fromkeys(names, 2))


@pytest.mark.parametrize("is_moe", [True, False])
def test_experts_that_are_not_modules_are_read_by_names(is_moe: bool) -> None:
    """Doge keeps its experts in embeddings; its dense models have the same entries."""
    config = {"model_type": "doge", "num_hidden_layers": 2, "num_experts": 64, "num_experts_per_tok": 4, "is_moe": is_moe}
    if is_moe:
        facts = moe_facts(config | SMALL)
        assert (facts["moe_layers"], facts["num_experts"], facts["top_k"]) == ([0, 1], 64, 4)
    else:
        with pytest.raises(ModelError, match="no routed experts"):
            moe_facts(config | SMALL)


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', '{"num_hidden_layers": "many"}', "no JSON"])
def test_what_the_engine_loaded_is_believed(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    loaded: dict[str, Any] = {"moe_layers": [3, 5], "num_experts": 300, "top_k": 7, "hook": "ignored"}
    model = loaded_model(str(tmp_path), None, loaded)
    assert (model.id, model.moe_layers, model.num_experts, model.top_k) == (str(tmp_path), [3, 5], 300, 7)


@pytest.mark.parametrize(
    "entry",
    ["routed_scaling_factor", "router_scaling_factor", "moe_routed_scaling_factor", "route_scale", "moe_router_scaling_factor"],
)
def test_the_factor_has_many_names(entry: str) -> None:
    config = {"model_type": "new", "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, entry: 2.5}
    assert moe_facts(config)["routed_scaling_factor"] == 2.5


def test_a_known_model_is_resolved_without_being_built() -> None:
    """The registry and the embedded model are checked facts: `plan` and `models` must not wait until model code is imported."""
    code = (
        "import sys; from profiler.models.resolve import resolve_model; resolve_model('demo'); "
        "assert not any(name.startswith('transformers.models.mixtral') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        *({entry: 10**9} for entry in ("num_hidden_layers", "n_layers", "num_layers", "n_layer", "depth")),
        *({entry: 10**9} for entry in ("num_local_experts", "n_routed_experts", "moe_num_experts", "n_shared_experts")),
        {"num_hidden_layers": 10_000, "num_local_experts": 60_000},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"vision_config": {"num_hidden_layers": 10**9}},
    ],
    ids=str,
)
def test_a_config_of_absurd_size_is_refused_before_it_is_built(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("was built"))
    with pytest.raises(ModelError, match="expected at most"):
        moe_facts({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2} | changes)


def test_other_names_of_the_number_of_layers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPT2Config.attribute_map, "num_hidden_layers", "stages")
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("was built"))
    with pytest.raises(ModelError, match="expected at most 10000"):
        moe_facts({"model_type": "gpt2", "stages": 10**9})


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2"},
        {"experts_implementation": "someone/kernels"},
        {"_experts_implementation": "someone/kernels"},
        {"auto_map": {"AutoModelForCausalLM": "someone/model--modeling.Model"}},
        {"quantization_config": {"quant_method": "new"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mixtral_one_expert", "gemma4_multimodal"])
def test_a_config_cannot_choose_what_code_is_run(
    name: str, entry: dict[str, Any], configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for input"))
    config, _ = PretrainedConfig.get_config_dict(configs[name])
    expected = moe_facts(config)
    config |= entry
    if "text_config" in config:
        config["text_config"] = config["text_config"] | entry
    assert moe_facts(config) == expected


def test_numbered_experts_are_counted_without_their_siblings() -> None:
    """As llmcompressor lists them for quantization: with the activation function that they share."""

    class Experts(torch.nn.ModuleList):
        def __init__(self) -> None:
            super().__init__(torch.nn.Linear(4, 4) for _ in range(6))
            self.act_fn = torch.nn.SiLU()

    layer = torch.nn.Module()
    layer.mlp = torch.nn.Module()
    layer.mlp.gate = torch.nn.Linear(4, 6)
    layer.mlp.experts = Experts()
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer])
    wrapper = torch.nn.Module()
    wrapper.model = model
    (block,) = find_moe_blocks(wrapper)
    assert (block.layer, block.num_experts) == (0, 6)
