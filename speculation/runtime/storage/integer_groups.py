"""Experts in 8 or 4 bits: matrices of any checkpoint, rounded to integers in groups that share a scale.

The quantization is symmetric: a weight is an integer from -127 to 127 (8 bits) or from -7 to 7 (4 bits) times the scale of its
group, which is the group's largest magnitude divided by 127 or 7. A group is some consecutive inputs of one output. No weight
changes by more than half of its group's scale. In bfloat16 and float16, the rounding of the product to that type is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch.nn import functional

from speculation.runtime.storage.layout import ExpertLayout, Weight, Weights

# Inputs in a group, for each number of bits: 8.25 and 4.5 bits per weight with the scales. The root mean square of the error,
# relative to that of normally distributed weights: .60 % with 8 bits in groups of 64 (.54 % in groups of 32, .83 % in rows of
# 2048); 9.7 % with 4 bits in groups of 32 (8.5 % in groups of 16, 10.8 % of 64, 15 % in rows of 2048).
GROUPS = {8: 64, 4: 32}
NUMBERS, SCALES = "_numbers", "_scales"
# It has the range of float32, so that no group of small weights loses its scale. Its product with an integer of 8 bits is exact
# in float32.
SCALE = torch.bfloat16
# Numbers that are packed or unpacked at a time: it bounds the memory of what is computed in between.
PIECE = 1 << 20


@dataclass(frozen=True)
class IntegerGroups:
    """An expert in 8 or 4 bits; a `Packing`.

    Attributes:
        bits: 8 or 4.
        plain: The expert as it is computed.
        is_transposed: Whether its matrices are `[in, out]` instead of `[out, in]`.
    """

    bits: int
    plain: ExpertLayout
    is_transposed: bool

    @cached_property
    def layout(self) -> ExpertLayout:
        """Integers and scales instead of the matrices; other weights, which are biases, stay.

        With 4 bits, the first half of a matrix's integers is in the lower halves of the bytes, and the second half in the upper
        halves.
        """
        found = []
        for weight in self.plain.weights:
            if not weight.is_matrix:
                found.append(weight)
                continue
            shape = self._grouped(weight)
            scales = [1 if axis == self._axis + 1 else length for axis, length in enumerate(shape)]
            found.append(Weight(weight.name + NUMBERS, (prod(shape) * self.bits // 8,), torch.int8))
            found.append(Weight(weight.name + SCALES, tuple(scales), SCALE))
        return ExpertLayout(tuple(found), packing=self)

    def pack(self, plain: Weights, into: Weights) -> None:
        """Pack an expert's weights into memory that is laid out as `layout` says.

        Raises:
            ValueError: A number is infinite, not a number, or so large that it might be rounded to infinity.
        """
        for weight in self.plain.weights:
            if weight.is_matrix:
                self._pack_matrix(weight, plain[weight.name], into[weight.name + NUMBERS], into[weight.name + SCALES])
            else:
                into[weight.name].copy_(plain[weight.name])

    @property
    def scratch_bytes(self) -> int:
        """The most memory that `unpack` takes in between: for a piece of a matrix, not for the whole."""
        found = []
        for weight in self.plain.weights:
            if not weight.is_matrix:
                continue
            shape = self._grouped(weight)
            numbers = _rows_of_a_piece(shape) * prod(shape[1:])
            # Of 4 bits, one half of the bytes after the other.
            scratch = min(numbers, prod(shape) // 2) if self.bits == 4 else 0
            if weight.dtype != SCALE:
                # Scales in float32, and where that is not the type of the product, both sides of it.
                scratch += 4 * numbers // GROUPS[self.bits] + (0 if weight.dtype == torch.float32 else 8 * numbers)
            if prod(shape) != prod(weight.shape):
                scratch += numbers * weight.dtype.itemsize
            found.append(scratch)
        return max(found, default=0)

    def unpack(self, packed: Weights, into: Weights) -> None:
        """Unpack an expert's weights, laid out as `layout` says, into those of `plain`."""
        for weight in self.plain.weights:
            if weight.is_matrix:
                self._unpack_matrix(weight, packed[weight.name + NUMBERS], packed[weight.name + SCALES], into[weight.name])
            else:
                into[weight.name].copy_(packed[weight.name])

    @property
    def _axis(self) -> int:
        """The dimension of a matrix that has its inputs; of a matrix in groups, the one that has the groups."""
        return 0 if self.is_transposed else 1

    def _grouped(self, weight: Weight) -> tuple[int, ...]:
        """The shape of a matrix whose inputs are in groups, `[out, groups, inputs]` or `[groups, inputs, out]`.

        The last group is filled up with zeros.
        """
        size, axis = GROUPS[self.bits], self._axis
        return (*weight.shape[:axis], -(-weight.shape[axis] // size), size, *weight.shape[axis + 1 :])

    def _unpack_matrix(self, weight: Weight, packed: torch.Tensor, scales: torch.Tensor, target: torch.Tensor) -> None:
        shape, axis = self._grouped(weight), self._axis
        is_padded = prod(shape) != target.numel()
        rows, row = _rows_of_a_piece(shape), prod(shape[1:])
        space = target.new_empty((rows, *shape[1:])) if is_padded else target.view(shape)
        for first in range(0, shape[0], rows):
            last = min(first + rows, shape[0])
            piece = space[: last - first] if is_padded else space[first:last]
            self._numbers(packed, first * row, piece.view(-1))
            # Rounded once, after the product: float16 has no room for all scales.
            piece.mul_(scales[first:last] if piece.dtype == SCALE else scales[first:last].float())
            if is_padded:
                # Without the zeros that fill up the last group.
                step = shape[1] if self.is_transposed else 1
                part = target[first * step : last * step]
                part.copy_(piece.flatten(axis, axis + 1).narrow(axis, 0, part.shape[axis]))

    def _numbers(self, packed: torch.Tensor, first: int, into: torch.Tensor) -> None:
        """Write the integers of a matrix from number `first` on, as many as there is room for."""
        last = first + len(into)
        if self.bits == 8:
            into.copy_(packed[first:last])
            return
        # The lower halves of all bytes, then the upper halves.
        count = len(packed)
        if first < count:
            lower = packed[first : min(last, count)]
            into[: len(lower)].copy_((lower << 4).bitwise_right_shift_(4))
        if last > count:
            upper = packed[max(first, count) - count : last - count]
            into[len(into) - len(upper) :].copy_(upper >> 4)

    def _pack_matrix(self, weight: Weight, matrix: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> None:
        shape, axis, highest = self._grouped(weight), self._axis, 2 ** (self.bits - 1) - 1
        missing = shape[axis] * shape[axis + 1] - matrix.shape[axis]
        if missing:
            matrix = functional.pad(matrix, (0, 0, 0, missing) if self.is_transposed else (0, missing))
        grouped = matrix.reshape(shape)
        numbers = packed.view(shape) if self.bits == 8 else packed.new_empty(shape)
        # A scale is rounded up by less than 1 %.
        limit = 0.99 * torch.finfo(weight.dtype).max
        rows = _rows_of_a_piece(shape)
        for piece in (slice(first, first + rows) for first in range(0, shape[0], rows)):
            values = grouped[piece].float()
            largest = values.abs().amax(axis + 1, keepdim=True)
            if not (found := float(largest.amax())) <= limit:
                raise ValueError(f"{weight.name} has a weight of magnitude {found:.4g}, expected at most {limit:.4g}")
            # The smallest scale is that of groups of zeros, too.
            scales[piece] = (largest / highest).to(SCALE).clamp_min_(torch.finfo(SCALE).tiny)
            numbers[piece] = (values / scales[piece].float()).round_().clamp_(-highest, highest)
        if self.bits == 4:
            first, second = numbers.view(-1).chunk(2)
            packed.copy_((first & 15) | (second << 4))


def _rows_of_a_piece(shape: tuple[int, ...]) -> int:
    """How many indices of the first dimension have `PIECE` numbers, at least one and at most all."""
    return min(shape[0], max(1, PIECE // prod(shape[1:])))
