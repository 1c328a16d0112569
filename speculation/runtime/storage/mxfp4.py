"""Experts in MXFP4, as gpt-oss is published: they are packed in the checkpoint's files already.

MXFP4 (OCP Microscaling Formats 1.0) has 4-bit floating-point numbers in blocks of 32 that share a power of two. A checkpoint of
gpt-oss holds a matrix as `*_blocks`, two numbers in each byte with the first one in the lower half, and `*_scales`, the powers
plus 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from speculation.runtime.storage.layout import ExpertLayout, Weight, Weights

MXFP4 = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
_BIAS = 127
# Numbers that are unpacked at a time: it bounds the memory of what is computed in between.
PIECE = 1 << 20
# That memory, for each number: its byte's index in four bytes or the address computed from it in eight, and the number itself,
# as it is looked up and as it is multiplied. Two numbers share a byte.
SCRATCH = 10
# The 16 numbers of four bits (E2M1): sign, two bits of exponent, one of mantissa.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))


@dataclass(frozen=True)
class Mxfp4:
    """The form of an expert in such a checkpoint; a `Packing`.

    Attributes:
        plain: The expert as it is computed, with matrices `[in, out]`. Every number in MXFP4 is one in bfloat16, unless its
            power of two is too small or large.
    """

    plain: ExpertLayout

    @cached_property
    def layout(self) -> ExpertLayout:
        """What the checkpoint holds instead of the matrices; other weights stay.

        Raises:
            ValueError: A matrix has a number of inputs that no blocks of 32 add up to.
        """
        found = []
        for weight in self.plain.weights:
            if not weight.is_matrix:
                found.append(weight)
                continue
            inputs, outputs = weight.shape
            if inputs % BLOCK:
                raise ValueError(f"{weight.name} has {inputs} inputs, expected a multiple of {BLOCK}")
            groups = inputs // BLOCK
            found.append(Weight(weight.name + BLOCKS, (outputs, groups, BLOCK // 2), torch.uint8))
            found.append(Weight(weight.name + SCALES, (outputs, groups), torch.uint8))
        return ExpertLayout(tuple(found), packing=self)

    @property
    def scratch_bytes(self) -> int:
        """The most memory that `unpack` takes in between: for some outputs of a matrix, not for the whole."""
        matrices = [weight for weight in self.plain.weights if weight.is_matrix]
        return max((SCRATCH * _outputs_of_a_piece(*weight.shape) * weight.shape[0] for weight in matrices), default=0)

    def unpack(self, packed: Weights, into: Weights) -> None:
        """Unpack an expert's weights, laid out as `layout` says, into those of `plain`."""
        for name, target_IO in into.items():
            if name in packed:
                target_IO.copy_(packed[name])
                continue
            blocks_OGB, scales_OG = packed[name + BLOCKS], packed[name + SCALES]
            count = _outputs_of_a_piece(*target_IO.shape)
            for piece in (slice(first, first + count) for first in range(0, len(blocks_OGB), count)):
                target_IO[:, piece].copy_(_rows(blocks_OGB[piece], scales_OG[piece], target_IO.dtype).T)


def _outputs_of_a_piece(inputs: int, outputs: int) -> int:
    """How many outputs have `PIECE` weights, at least one and at most all."""
    return min(outputs, max(1, PIECE // inputs))


def _rows(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The transposed matrix `[out, in]` of packed rows: one row for each output."""
    values = torch.tensor(FP4_VALUES, dtype=dtype, device=blocks_OGB.device)
    # Both numbers of a byte at once.
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    numbers_OGN = pairs[blocks_OGB.to(torch.int32)].flatten(-2)
    powers_OG = scales_OG.to(torch.int32) - _BIAS
    return torch.ldexp(numbers_OGN, powers_OG.unsqueeze(-1)).flatten(1)
