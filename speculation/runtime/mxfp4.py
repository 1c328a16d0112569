"""Experts in MXFP4, as gpt-oss is published: they are packed in the checkpoint's files already.

MXFP4 (OCP Microscaling Formats 1.0) has 4-bit floating-point numbers in blocks of 32 that share a power of two. A checkpoint of
gpt-oss holds a matrix as `*_blocks`, two numbers in each byte with the first one in the lower half, and `*_scales`, the powers
plus 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from speculation.runtime.layout import ExpertLayout, Weight, Weights

MXFP4 = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
_BIAS = 127
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

    def unpack(self, packed: Weights, into: Weights) -> None:
        """Unpack an expert's weights, laid out as `layout` says, into those of `plain`."""
        for name, target in into.items():
            if name in packed:
                target.copy_(packed[name])
            else:
                target.copy_(_rows(packed[name + BLOCKS], packed[name + SCALES], target.dtype).T)


def _rows(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The transposed matrix `[out, in]` of packed rows: one row for each output."""
    values = torch.tensor(FP4_VALUES, dtype=dtype, device=blocks_OGB.device)
    # Both numbers of a byte at once.
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    numbers_OGN = pairs[blocks_OGB.to(torch.int32)].flatten(-2)
    powers_OG = scales_OG.to(torch.int32) - _BIAS
    return torch.ldexp(numbers_OGN, powers_OG.unsqueeze(-1)).flatten(1)
