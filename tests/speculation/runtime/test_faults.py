"""A checkpoint that is damaged, cut off, changed or of the wrong kind ends with one line, never with a wrong token."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from profiler.errors import EngineError, ModelError, SpecmoeError
from profiler.models.resolve import demo_model_folder
from speculation.runtime import CacheSize, OffloadedModel
from speculation.runtime.checkpoint import checkpoint_tensors, locate_experts
from speculation.runtime.loading import experts_modules, model_config, skeleton

PROMPT = [17, 301, 44, 45, 46, 301, 44, 9, 120]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(demo_model_folder(), tmp_path / "model"))


def _cut_off(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def _overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\x55" * 4096)


def _damage_silently(file: Path) -> None:
    """As a failing drive does: the content changes, the times do not."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content), 512):
        content[place] ^= 0x10
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_off, "ends after|was changed"),
        (_overwrite, "was changed while its experts were in use"),
        (_damage_silently, "is not what was read before: the file or the drive is damaged"),
        (Path.unlink, "was removed while its experts were in use"),
    ],
)
def test_a_file_that_changes_under_a_running_model(
    demo: Path, damage: Callable[[Path], None], message: str, direct: bool
) -> None:
    with OffloadedModel.load(str(demo), CacheSize(fraction=0.25), store="disk", device="cpu", direct=direct) as offloaded:
        offloaded.generate([PROMPT], max_new_tokens=16, ignore_eos=True)
        damage(demo / "model.safetensors")
        with pytest.raises(EngineError, match=message) as caught:
            offloaded.generate([PROMPT], max_new_tokens=16, ignore_eos=True)
        assert "\n" not in str(caught.value)
        # It stays an error.
        with pytest.raises(EngineError, match=message):
            offloaded.generate([PROMPT], max_new_tokens=16, ignore_eos=True)


def test_experts_in_memory_do_not_need_the_file_any_more(demo: Path) -> None:
    with OffloadedModel.load(str(demo), CacheSize(fraction=0.25), store="ram", device="cpu") as offloaded:
        (before,) = offloaded.generate([PROMPT], max_new_tokens=16)
        (demo / "model.safetensors").unlink()
        assert offloaded.generate([PROMPT], max_new_tokens=16) == [before]


def _without_an_expert(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "experts.3" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def _edit_config(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: _cut_off(f / "model.safetensors"), "does not fit into the file: it is cut off or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100), "is not a safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "has no safetensors checkpoint"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}'),
            "names the file '../../etc/passwd': expected a file in the same folder",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is not a checkpoint's index"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}'),
            "lacks other.safetensors",
        ),
        (_without_an_expert, "the checkpoint has 7 tensors|expected 8 experts|holds it in two ways"),
        (lambda f: _edit_config(f, quantization_config={"quant_method": "awq", "bits": 4}), r"is quantized \(awq\)"),
    ],
)
def test_a_checkpoint_that_cannot_be_offloaded(demo: Path, change: Callable[[Path], None], message: str) -> None:
    change(demo)
    with pytest.raises(SpecmoeError, match=message) as caught:
        OffloadedModel.load(str(demo), CacheSize(fraction=0.5), store="disk", device="cpu")
    assert "\n" not in str(caught.value)


def test_a_header_that_lies_about_its_tensors(demo: Path) -> None:
    """Entries of an untrusted file: nothing outside the file is read, and no size is believed."""
    file = demo / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if "experts" in name)
    for entry in (
        {"dtype": "BF16", "shape": [160, 128], "data_offsets": [0, 1 << 50]},
        {"dtype": "BF16", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 40960]},
        {"dtype": "BF16", "shape": [-160, -128], "data_offsets": [0, 40960]},
        {"dtype": "BF16", "shape": [160, 128], "data_offsets": [-40960, 0]},
        {"dtype": "BF16", "shape": "160", "data_offsets": [0]},
        "text",
    ):
        text = json.dumps(header | {name: entry}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        with pytest.raises(ModelError, match=r"does not fit into the file|no valid entry"):
            checkpoint_tensors(demo)
    for length in (0, 1, 1 << 40, 2**64 - 1):
        file.write_bytes(length.to_bytes(8, "little") + b"{}" * 10)
        with pytest.raises(ModelError, match="is not a safetensors file"):
            checkpoint_tensors(demo)


def test_a_conversion_that_mixes_experts_is_refused(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    config, _ = model_config(demo)
    empty = skeleton(config, config.dtype)
    modules, tensors = experts_modules(empty), checkpoint_tensors(demo)
    for operations in ([MergeModulelist(dim=0), Transpose(0, 1)], [MergeModulelist(dim=1)], [Concatenate(dim=0)]):
        rules = [
            WeightConverter([r".experts.*.w1.weight", r".experts.*.w3.weight"], ".experts.gate_up_proj", operations),
            WeightConverter([r".experts.*.w2.weight"], ".experts.down_proj", [MergeModulelist(dim=0)]),
        ]
        monkeypatch.setattr(
            conversion_mapping, "get_model_conversion_mapping", lambda _model, rules=rules: [*rules, *_renamings()]
        )
        with pytest.raises(ModelError, match="is not known to keep experts apart"):
            locate_experts(empty, modules, tensors)


def _renamings() -> list[Any]:
    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(".block_sparse_moe.", ".mlp.")]
