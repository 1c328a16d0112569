"""Experts in 8 and 4 bits: the numbers, how far they are off, and what memory they take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.offloaded import allocated, empty_expert

from profiler.errors import EngineError
from profiler.models.resolve import demo_model_folder
from speculation.runtime import CacheSize, OffloadedModel
from speculation.runtime.slots import bytes_besides_slots
from speculation.runtime.storage.integer_groups import GROUPS, IntegerGroups
from speculation.runtime.storage.layout import ExpertLayout, Weight, Weights


def expert(
    bits: int, shape: tuple[int, int], *, is_transposed: bool = False, dtype: torch.dtype = torch.float32
) -> IntegerGroups:
    """The form of an expert with one matrix and a bias."""
    weights = (Weight("down_proj", shape, dtype), Weight("down_proj_bias", (3,), dtype))
    return IntegerGroups(bits, ExpertLayout(weights), is_transposed)


def packed(form: IntegerGroups, matrix: torch.Tensor) -> Weights:
    found = empty_expert(form.layout)
    bias = torch.tensor([0.1, -2.0, 3.0], dtype=matrix.dtype)
    form.pack({"down_proj": matrix, "down_proj_bias": bias}, found)
    return found


def unpacked(form: IntegerGroups, found: Weights) -> torch.Tensor:
    into = empty_expert(form.plain)
    form.unpack(found, into)
    assert torch.equal(into["down_proj_bias"], torch.tensor([0.1, -2.0, 3.0], dtype=into["down_proj"].dtype))
    return into["down_proj"]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_four_bits_by_hand(is_transposed: bool) -> None:
    """Two outputs with 33 inputs: a group of 32 and one of a single input each. A scale is the largest magnitude / 7."""
    matrix = torch.zeros(2, 33)
    matrix[0, :5] = torch.tensor([3.5, -3.5, 0.7, -0.8, 1.25])
    matrix[0, 32] = -14.0
    matrix[1, 31] = 7.0
    form = expert(4, (33, 2) if is_transposed else (2, 33), is_transposed=is_transposed)
    found = packed(form, matrix.T if is_transposed else matrix)
    scales = found["down_proj_scales"].flatten().tolist()
    smallest = torch.finfo(torch.bfloat16).tiny
    assert scales == ([0.5, 1.0, 2.0, smallest] if is_transposed else [0.5, 2.0, 1.0, smallest])
    # Two outputs of two groups of 32 numbers, two in a byte.
    assert found["down_proj_numbers"].shape == (64,)
    if not is_transposed:
        # The first half of all numbers (output 0) is in the lower halves: 7, -7, 1, -2, 2 (2.5 is rounded to the even number).
        numbers = found["down_proj_numbers"].tolist()
        assert [value & 15 for value in numbers[:6]] == [7, 16 - 7, 1, 16 - 2, 2, 0]
        assert numbers[31] == 7 << 4
        assert numbers[32] & 15 == 16 - 7
    expected = torch.zeros(2, 33)
    expected[0, :5] = torch.tensor([3.5, -3.5, 0.5, -1.0, 1.0])
    expected[0, 32], expected[1, 31] = -14.0, 7.0
    assert torch.equal(unpacked(form, found), expected.T if is_transposed else expected)


def test_eight_bits_by_hand() -> None:
    """One group of 64, of which three inputs are there: the scale is 254 / 127."""
    form = expert(8, (1, 3))
    found = packed(form, torch.tensor([[254.0, -3.1, 0.9]]))
    assert found["down_proj_numbers"].tolist() == [127, -2, 0] + [0] * 61
    assert found["down_proj_scales"].flatten().tolist() == [2.0]
    assert unpacked(form, found).tolist() == [[254.0, -4.0, 0.0]]


@given(
    bits=st.sampled_from([8, 4]),
    is_transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    inputs=st.integers(1, 130),
    outputs=st.integers(1, 5),
    power=st.integers(-130, 120),
    seed=st.integers(0, 99),
)
def test_no_weight_is_off_by_more_than_half_of_its_scale(
    bits: int, is_transposed: bool, dtype: torch.dtype, inputs: int, outputs: int, power: int, seed: int
) -> None:
    """Of weights of any magnitude, in groups of different magnitudes and of zeros. Half a rounding of the type is added."""
    random = torch.Generator().manual_seed(seed)
    limit = 0.9 * torch.finfo(dtype).max
    values_OI = torch.randn((outputs, inputs), generator=random) * 10 ** torch.randint(-3, 4, (outputs, 1), generator=random)
    values_OI *= torch.rand((outputs, inputs), generator=random) < 0.8
    values_OI[:, : inputs // 3] *= torch.rand((outputs, 1), generator=random) < 0.5
    matrix_OI = (values_OI.double() * 2.0**power).clamp(-limit, limit).to(dtype)
    form = expert(bits, (inputs, outputs) if is_transposed else (outputs, inputs), is_transposed=is_transposed, dtype=dtype)
    found = packed(form, matrix_OI.T.contiguous() if is_transposed else matrix_OI)
    after_OI = unpacked(form, found).T if is_transposed else unpacked(form, found)
    scales = found["down_proj_scales"].double()
    scales_OG = (scales.squeeze(1).T if is_transposed else scales.squeeze(2)).repeat_interleave(GROUPS[bits], 1)[:, :inputs]
    after, before = after_OI.double(), matrix_OI.double()
    rounding = 0 if dtype == torch.float32 else torch.maximum(after.abs() * torch.finfo(dtype).eps / 2, _smallest(dtype))
    assert ((after - before).abs() <= scales_OG / 2 * (1 + 1e-6) + rounding).all()
    assert (after[before == 0] == 0).all()
    assert after.isfinite().all()


def _smallest(dtype: torch.dtype) -> torch.Tensor:
    """Half of the smallest magnitude that a type has."""
    return torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2, dtype=torch.float64)


def test_a_packed_matrix_is_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_transposed in (False, True):
        matrix = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
        form = expert(4, (200, 96), is_transposed=is_transposed)
        monkeypatch.undo()
        whole = packed(form, matrix)
        monkeypatch.setattr("speculation.runtime.storage.integer_groups.PIECE", 1000)
        parts = packed(form, matrix)
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


FORMS = [
    (bits, shape, is_transposed, dtype)
    for bits in (8, 4)
    for shape, is_transposed in (((200, 96), False), ((201, 97), False), ((192, 50), True), ((200, 50), True), ((3, 33), False))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("bits", "shape", "is_transposed", "dtype"), FORMS)
def test_a_matrix_is_unpacked_in_pieces_to_the_same_bits(
    bits: int, shape: tuple[int, int], is_transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    form = expert(bits, shape, is_transposed=is_transposed, dtype=dtype)
    found = packed(form, matrix)
    whole = unpacked(form, found)
    for piece in (1, 1000, 4096):
        monkeypatch.setattr("speculation.runtime.storage.integer_groups.PIECE", piece)
        assert torch.equal(unpacked(form, found), whole)


@pytest.mark.parametrize(("bits", "shape", "is_transposed", "dtype"), FORMS)
def test_what_unpacking_takes_in_between_is_bounded_and_counted(
    bits: int, shape: tuple[int, int], is_transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = expert(bits, shape, is_transposed=is_transposed, dtype=dtype)
    found = packed(form, torch.ones(shape, dtype=dtype))
    into = empty_expert(form.plain)
    for piece in (1 << 20, 1000):
        monkeypatch.setattr("speculation.runtime.storage.integer_groups.PIECE", piece)
        # Scalars come on top.
        assert allocated(lambda: form.unpack(found, into)) <= form.scratch_bytes + 64
    # A piece is at least a row or a group of rows.
    numbers = max(1000, 128 if not is_transposed else 64 * shape[1])
    assert form.scratch_bytes <= 14 * numbers
    assert bytes_besides_slots([form.layout]) == 2 * form.layout.bytes + form.plain.bytes + form.scratch_bytes


def test_what_an_expert_takes() -> None:
    """8.25 and 4.5 bits per weight: 1 / 1.94 and 1 / 3.6 of 16 bits. A matrix that no groups add up to is filled up."""
    for bits, size in ((8, 8.25 / 8), (4, 4.5 / 8)):
        form = expert(bits, (1024, 512))
        assert form.layout.bytes == 1024 * 512 * size + 64
        assert expert(bits, (1024, 511)).layout.bytes == form.layout.bytes
        assert expert(bits, (512, 1024), is_transposed=True).layout.bytes == form.layout.bytes


def test_a_cache_of_a_size_holds_more_packed_experts() -> None:
    """0.1 GB for 4 layers of experts of 1 MB in bfloat16: buffers and what unpacking takes are in it."""
    plain = expert(8, (1024, 512), dtype=torch.bfloat16).plain
    size = CacheSize(gigabytes=0.1)
    found = [size.capacity([plain] * 4, 1000, 2)]
    for bits in (8, 4):
        layout = expert(bits, (1024, 512), dtype=torch.bfloat16).layout
        found.append(size.capacity([layout] * 4, 1000, 2))
        scratch = 0 if bits == 8 else 1024 * 512 // 2
        assert found[-1] == int((0.1e9 - 2 * layout.bytes - plain.bytes - scratch) / (4 * layout.bytes))
    assert found == [23, 45, 83]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.4e38])
@pytest.mark.parametrize("store", ["ram", "disk"])
def test_weights_that_cannot_be_rounded_are_refused_by_name(value: float, store: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_model_folder(), tmp_path / "model"))
    file = folder / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    tensors["model.layers.2.block_sparse_moe.experts.1.w2.weight"][5, 7] = value
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))
    match = rf"expert 1 of MoE layer 2 cannot be rounded to 4 bits: down_proj has a weight of magnitude {abs(value):.4g}"
    with pytest.raises(EngineError, match=match.replace("+", r"\+")):
        OffloadedModel.load(str(folder), CacheSize(fraction=0.5), store=store, expert_bits=4, device="cpu")
