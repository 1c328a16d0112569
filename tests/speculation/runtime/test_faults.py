"""A checkpoint that is damaged, cut off, changed or of the wrong kind ends with one line, never with a wrong token."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from profiler.errors import EngineError, ModelError, SpecmoeError
from profiler.models.resolve import demo_model_folder
from speculation.runtime import CacheSize, OffloadedModel
from speculation.runtime.model_loading import experts_modules, model_config, skeleton
from speculation.runtime.storage.checkpoint import checkpoint_tensors, locate_experts

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


# Also of experts that are packed when they are read.
@pytest.mark.parametrize(("direct", "bits"), [(False, None), (True, 4)])
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
    demo: Path, damage: Callable[[Path], None], message: str, direct: bool, bits: int | None
) -> None:
    size = CacheSize(fraction=0.25)
    with OffloadedModel.load(str(demo), size, store="disk", expert_bits=bits, device="cpu", direct=direct) as offloaded:
        offloaded.generate([PROMPT], max_new_tokens=16, ignore_eos=True)
        damage(demo / "model.safetensors")
        with pytest.raises(EngineError, match=message) as caught:
            offloaded.generate([PROMPT], max_new_tokens=16, ignore_eos=True)
        assert "\n" not in str(caught.value)
        # It stays an error.
        with pytest.raises(EngineError, match=message):
            offloaded.generate([PROMPT], max_new_tokens=16, ignore_eos=True)


@pytest.mark.parametrize("interruption", [EngineError("the drive is gone"), KeyboardInterrupt()])
def test_after_a_fault_nothing_is_computed_with_what_is_in_the_slots(
    demo: Path, interruption: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the next call would find everything that it needs in the cache."""
    with OffloadedModel.load(str(demo), CacheSize(fraction=0.75), store="disk", device="cpu") as offloaded:
        store = offloaded.experts.transfers._store

        def read(_x: int, memory_B: torch.Tensor) -> None:
            memory_B.fill_(7)
            raise interruption

        with monkeypatch.context() as patch:
            patch.setattr(store, "read", read)
            with pytest.raises(type(interruption)):
                offloaded.generate([[100, 200, 300, 400, 500]], max_new_tokens=8, ignore_eos=True)
        for prompt in ([5], [35], PROMPT):
            with pytest.raises(type(interruption)):
                offloaded.generate([prompt], max_new_tokens=2, ignore_eos=True)


def test_a_call_that_is_interrupted_while_it_waits_leaves_nothing_unfinished_behind(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = CacheSize(fraction=0.75)
    with OffloadedModel.load(str(demo), size, store="disk", device="cpu") as offloaded:
        (expected,) = offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)
    with OffloadedModel.load(str(demo), size, store="disk", device="cpu") as offloaded:
        transfers, read = offloaded.experts.transfers, offloaded.experts.transfers._store.read

        def slow(x: int, memory_B: torch.Tensor) -> None:
            time.sleep(0.05)
            read(x, memory_B)

        def interrupt(_transfer: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(transfers._store, "read", slow)
        with monkeypatch.context() as patch:
            patch.setattr(transfers, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)
        (found,) = offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)
    assert found == expected


def test_an_interruption_while_the_cache_changes_makes_it_unusable(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OffloadedModel.load(str(demo), CacheSize(fraction=0.5), store="disk", device="cpu") as offloaded:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(offloaded.experts.transfers, "demand", interrupt)
            with pytest.raises(KeyboardInterrupt):
                offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)
        with pytest.raises(EngineError, match=r"interrupted while the cache was changed \(KeyboardInterrupt\): load the model"):
            offloaded.generate([PROMPT], max_new_tokens=12, ignore_eos=True)


def test_a_single_file_goes_before_an_index_as_in_transformers(demo: Path) -> None:
    """Else the experts would be those of another checkpoint than the rest of the model."""
    with OffloadedModel.load(str(demo), CacheSize(fraction=0.5), store="disk", device="cpu") as offloaded:
        (expected,) = offloaded.generate([PROMPT], max_new_tokens=4)
    (demo / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    with OffloadedModel.load(str(demo), CacheSize(fraction=0.5), store="disk", device="cpu") as offloaded:
        assert offloaded.generate([PROMPT], max_new_tokens=4) == [expected]


def test_experts_that_do_not_fit_into_memory_are_refused(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 1_000_000

    monkeypatch.setattr("psutil.virtual_memory", Little)
    with pytest.raises(EngineError, match=r"0\.0 GB of memory are available: keep them on disk"):
        OffloadedModel.load(str(demo), CacheSize(fraction=0.5), store="ram", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "ssd"}, "store 'ssd': expected ram or disk"),
        ({"device": "gpu"}, "device 'gpu': expected cuda, cuda:N or cpu"),
        ({"device": "meta"}, "device 'meta': expected cuda, cuda:N or cpu"),
        ({"device": "cuda:63"}, "finds no GPU cuda:63"),
        ({"dtype": "float99"}, "dtype 'float99': expected auto"),
        ({"prefetch": 0}, "0 experts to prefetch"),
        ({"expert_bits": 5}, "experts in 5 bits: expected 8 or 4"),
        ({"cache": CacheSize()}, "expected either a share or a size in GB"),
        ({"cache": CacheSize(fraction=0.5, gigabytes=1.0)}, "expected either a share or a size in GB"),
        ({"cache": CacheSize(gigabytes=float("nan"))}, "cache of nan GB"),
        ({"cache": CacheSize(fraction=1.5)}, r"cache fraction 1\.5: expected 0 to 1"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    size = options.pop("cache", CacheSize(fraction=0.5))
    with pytest.raises(SpecmoeError, match=message):
        OffloadedModel.load("demo", size, **{"device": "cpu"} | options)


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


def _index(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)


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
            lambda f: _index(f, '{"weight_map": {"a": "../../etc/passwd"}}'),
            "names the file '../../etc/passwd': expected a file in the same folder",
        ),
        (lambda f: _index(f, "[]"), "is not a checkpoint's index"),
        (lambda f: _index(f, "[" * 100_000), "is not a checkpoint's index"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer of .* cannot be read"),
        (lambda f: _edit_config(f, rope_parameters=5), "transformers cannot (read the config|build this model)"),
        (lambda f: _edit_config(f, quantization_config=5), "quantization_config is 5, expected an object"),
        (lambda f: _edit_config(f, transformers_weights="other.safetensors"), "names its weights in config.json"),
        (lambda f: _index(f, '{"weight_map": {"a": "other.safetensors"}}'), "lacks other.safetensors"),
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
        {"dtype": "BF16", "shape": [160, 128], "data_offsets": [0, float("inf")]},
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
