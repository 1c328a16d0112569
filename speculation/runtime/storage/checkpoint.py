"""Where a checkpoint holds each expert: which bytes of which safetensors file, and how they become the expert's weights.

The names of tensors in a checkpoint and in the model differ by family. `transformers` knows the difference (renamings and
conversions); here its rules are applied to one expert instead of to a whole layer. Only safetensors are read, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from profiler.errors import ModelError
from speculation.runtime.storage.layout import ExpertLayout, Weight

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
# The format's own limit for its header.
MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: The file.
        start: Its first byte there.
        shape: Its shape.
        dtype: Its type.
    """

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    def row(self, index: int) -> StoredTensor:
        """Entry `index` of its first dimension."""
        size = self.bytes // self.shape[0]
        return StoredTensor(self.file, self.start + index * size, self.shape[1:], self.dtype)


@dataclass(frozen=True)
class StoredWeight:
    """One weight of one expert in the checkpoint.

    Attributes:
        weight: The weight.
        tensors: What it consists of, in order.
        is_plain: Whether the tensors' bytes, one after the other, are the weight. Else `convert` computes it.
        conversion: How `transformers` computes it; None if it only changes the type.
    """

    weight: Weight
    tensors: tuple[StoredTensor, ...]
    is_plain: bool
    conversion: Conversion | None = None

    def convert(self, read: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight, from the content of its tensors.

        Raises:
            ModelError: The conversion yields another shape than the weight's.
        """
        found = read[0] if self.conversion is None else self.conversion.apply(self.weight, read)
        if tuple(found.shape) != self.weight.shape:
            raise ModelError(
                f"{self.weight.name}: its conversion yields shape {tuple(found.shape)} for one expert, expected "
                f"{self.weight.shape}"
            )
        return found.to(self.weight.dtype)


@dataclass(frozen=True)
class Conversion:
    """Operations of `transformers` that turn tensors of a checkpoint into a weight, applied to one expert.

    Attributes:
        operations: Operations that keep experts apart.
        patterns: The name pattern of each tensor, as the operations expect them.
        merges: Whether the first operation stacks a tensor of each expert, rather than getting them stacked.
    """

    operations: tuple[Any, ...]
    patterns: tuple[str, ...]
    merges: bool

    def apply(self, weight: Weight, read: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight of one expert."""
        given = read if self.merges else [tensor.unsqueeze(0) for tensor in read]
        found: dict[str, Any] = {pattern: [tensor] for pattern, tensor in zip(self.patterns, given, strict=True)}
        for operation in self.operations:
            found = operation.convert(
                found,
                source_patterns=list(self.patterns),
                target_patterns=[weight.name],
                full_layer_name=weight.name,
                model=_OneExpert(weight),
            )
        (value,) = found.values()
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor.squeeze(0)


@dataclass(frozen=True)
class _OneExpert:
    """Stands for the model where an operation asks for the shape that it must yield."""

    weight: Weight

    def get_parameter(self, _name: str) -> torch.Tensor:
        """A tensor of the shape of the experts, if there was one only."""
        return torch.empty((1, *self.weight.shape), device="meta")


# One expert: its weights in the order of the layout.
StoredExpert = tuple[StoredWeight, ...]


def checkpoint_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the safetensors checkpoint in a folder, by name.

    Raises:
        ModelError: There is no such checkpoint, a file is missing, or a header is invalid.
    """
    found: dict[str, StoredTensor] = {}
    for file in _files(folder):
        found |= _header(file)
    return found


def _files(folder: Path) -> list[Path]:
    # As transformers chooses: a single file goes before an index.
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ModelError(f"{folder} has no safetensors checkpoint ({SINGLE_FILE} or {INDEX_FILE}): other formats are not read")
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is not a checkpoint's index: expected JSON with 'weight_map'") from error
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index} names the file {name!r}: expected a file in the same folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder} lacks {name}, which its index names: download the checkpoint again")
    return [folder / name for name in names]


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, checked against its size."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{file} is not a safetensors file, or is cut off: its header says {length} bytes of {size}")
        try:
            entries = json.loads(opened.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file} is not a safetensors file: its header is not JSON") from error
    if not isinstance(entries, dict):
        raise ModelError(f"{file} is not a safetensors file: its header is not an object")
    found = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            start, end = (int(place) for place in entry["data_offsets"])
            shape = tuple(int(length) for length in entry["shape"])
            dtype = _DTYPES.get(entry["dtype"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"{file}: its header has no valid entry for {name!r}") from error
        if dtype is None:
            # Not of an expert, or refused where it is.
            continue
        tensor = StoredTensor(file, 8 + length + start, shape, dtype)
        if min((start, *shape)) < 0 or end - start != tensor.bytes or 8 + length + end > size:
            raise ModelError(f"{file}: tensor {name!r} does not fit into the file: it is cut off or damaged")
        found[name] = tensor
    return found


@dataclass(frozen=True)
class ExpertsModule:
    """The experts module of one MoE layer in a model without weights.

    Attributes:
        layer: The index of the decoder layer.
        name: The module's name in the model.
        layout: The weights of one expert in the checkpoint.
        num_experts: E, the experts of the layer.
        is_transposed: Whether their matrices are `[in, out]` instead of `[out, in]`.
    """

    layer: int
    name: str
    layout: ExpertLayout
    num_experts: int
    is_transposed: bool


def locate_experts(
    model: Any, modules: Sequence[ExpertsModule], tensors: Mapping[str, StoredTensor]
) -> list[list[StoredExpert]]:
    """Where the checkpoint holds each expert: of each module in order, its experts.

    Args:
        model: The `transformers` model, without weights (on the meta device).
        modules: Its experts modules.
        tensors: The checkpoint's tensors, by name.

    Raises:
        ModelError: A weight is missing, or is stored in a way that does not give one expert without the others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    expected = model.state_dict()
    prefix = model.base_model_prefix
    wanted = {f"{module.name}.{weight.name}" for module in modules for weight in module.layout.weights}
    sources: dict[str, dict[str | None, list[str]]] = {name: {} for name in wanted}
    for key in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if target not in expected and key in expected:
            target, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if target in wanted:
            sources[target].setdefault(pattern, []).append(key)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = []
    for module in modules:
        columns = []
        for weight in module.layout.weights:
            name = f"{module.name}.{weight.name}"
            patterns = sources[name]
            if not patterns:
                raise ModelError(f"the checkpoint has no tensor for {name}")
            converter = next((by_pattern[pattern] for pattern in patterns if pattern is not None), None)
            columns.append(_stored(name, weight, module.num_experts, converter, patterns, tensors))
        found.append([tuple(column[expert] for column in columns) for expert in range(module.num_experts)])
    return found


# Operations that keep experts apart if they leave the first dimension alone, with the names of their dimensions.
_KNOWN_OPERATIONS = {"Concatenate": ("dim",), "Interleave": ("dim",), "Transpose": ("dim0", "dim1")}


def _stored(
    name: str,
    weight: Weight,
    num_experts: int,
    converter: Any | None,
    sources: Mapping[str | None, list[str]],
    tensors: Mapping[str, StoredTensor],
) -> list[StoredWeight]:
    """One weight of all experts of a layer. sources: the keys of each name pattern; of None without a conversion."""
    patterns = (None,) if converter is None else tuple(each for each in converter.source_patterns if each in sources)
    if set(patterns) != set(sources):
        raise ModelError(f"{name}: the checkpoint holds it in two ways ({', '.join(map(str, sources))})")
    operations = () if converter is None else tuple(deepcopy(list(converter.operations)))
    kinds = [type(operation).__name__ for operation in operations]
    merges = kinds[:1] == ["MergeModulelist"] and operations[0].dim == 0
    for kind, operation in list(zip(kinds, operations, strict=True))[merges:]:
        dims = [getattr(operation, dim) for dim in _KNOWN_OPERATIONS.get(kind, ())]
        if converter is None or not dims or min(dims) < 1 or len(converter.target_patterns) != 1:
            raise ModelError(f"{name}: its conversion {kind} is not known to keep experts apart, so none is read on its own")
    rows = [_rows(name, sources[pattern], tensors, num_experts, merges) for pattern in patterns]
    by_expert = list(zip(*rows, strict=True))
    shapes = [tensor.shape for tensor in by_expert[0]]
    is_joined = all(shape[1:] == weight.shape[1:] for shape in shapes) and sum(shape[0] for shape in shapes) == weight.shape[0]
    is_plain = (
        all(tensor.dtype == weight.dtype for parts in by_expert for tensor in parts)
        and is_joined
        and (kinds[merges:] == [] or (kinds[merges:] == ["Concatenate"] and operations[-1].dim == 1))
    )
    conversion = Conversion(operations, tuple(map(str, patterns)), merges) if operations else None
    return [StoredWeight(weight, parts, is_plain, conversion) for parts in by_expert]


def _rows(
    name: str, keys: Sequence[str], tensors: Mapping[str, StoredTensor], num_experts: int, merges: bool
) -> list[StoredTensor]:
    """The tensor of each expert: one of its own, or its part of one tensor of all experts."""
    found = [tensors[key] for key in keys]
    if merges and len(found) == num_experts:
        return found
    if not merges and len(found) == 1 and found[0].shape[:1] == (num_experts,):
        return [found[0].row(expert) for expert in range(num_experts)]
    what = f"{len(found)} tensors like {keys[0]}" if len(found) > 1 else f"{keys[0]} of shape {found[0].shape}"
    raise ModelError(f"{name}: the checkpoint has {what}, expected {num_experts} experts")
