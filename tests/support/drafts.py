"""What proposes drafts in speculative decoding, built from the small checkpoints of `check` so that some drafts are accepted.

Nothing is trained: the draft model is the target with noise in its output layer, and the EAGLE and MTP layers pass on the
target's own hidden states.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from vllm_patch.check.families.shape import SHAPE

WEIGHTS = "model.safetensors"
HIDDEN = int(SHAPE["hidden_size"])


def make_drafts(checkpoints: Path) -> list[Path]:
    """A draft model and an EAGLE head for `mixtral`, and a `glm4_moe` with an MTP layer; returns their folders."""
    folders = [checkpoints / name for name in ("mixtral_draft", "mixtral_eagle", "glm4_moe_mtp")]
    torch.manual_seed(1)
    _make_draft_model(checkpoints / "mixtral", folders[0])
    _make_eagle_head(folders[1])
    _make_mtp(checkpoints / "glm4_moe", folders[2])
    return folders


def _make_draft_model(target: Path, draft: Path) -> None:
    shutil.copytree(target, draft)
    weights = load_file(target / WEIGHTS)
    head = weights["lm_head.weight"]
    _save(weights | {"lm_head.weight": head + 0.3 * head.std() * torch.randn_like(head)}, draft)


def _make_eagle_head(folder: Path) -> None:
    """One dense Llama layer, and a layer that combines the token's embedding and the target's hidden state."""
    config = transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}, num_key_value_heads=2, head_dim=32)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    weights = {name.removeprefix("model."): weight for name, weight in load_file(folder / WEIGHTS).items()}
    layer = {name: weight for name, weight in weights.items() if name.startswith("layers.") and "input_layernorm" not in name}
    _save(layer | {"fc.weight": torch.cat([torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)], dim=1)}, folder)


def _make_mtp(target: Path, folder: Path) -> None:
    """The target and one more MoE layer, a copy of its last."""
    shutil.copytree(target, folder)
    weights = load_file(target / WEIGHTS)
    last, new = (f"model.layers.{int(SHAPE['num_hidden_layers']) - back}." for back in (1, 0))
    layer = {name.replace(last, new): weight.clone() for name, weight in weights.items() if name.startswith(last)}
    layer |= {
        f"{new}enorm.weight": torch.ones(HIDDEN),
        f"{new}hnorm.weight": torch.ones(HIDDEN),
        f"{new}eh_proj.weight": torch.cat([torch.eye(HIDDEN), torch.eye(HIDDEN)], dim=1) * 0.02,
        f"{new}shared_head.norm.weight": weights["model.norm.weight"].clone(),
        f"{new}shared_head.head.weight": weights["lm_head.weight"].clone(),
        f"{new}embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    _save(weights | layer, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))


def _save(weights: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
