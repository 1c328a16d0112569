"""Experts in MXFP4: they stay packed in files, in host memory and in the cache, and are unpacked for each computation.

MXFP4 (OCP Microscaling Formats 1.0) has 4-bit floating-point numbers in blocks of 32 that share a power of two. A checkpoint of
gpt-oss holds a matrix as `*_blocks`, two numbers in each byte with the first one in the lower half, and `*_scales`, the powers
plus 127.
"""

from __future__ import annotations

import torch

from speculation.runtime.layout import Weight

MXFP4 = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
_BIAS = 127
# The 16 numbers of four bits (E2M1): sign, two bits of exponent, one of mantissa.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))


def packed_weights(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """What a checkpoint in MXFP4 holds instead of an expert's matrices `[in, out]`; other weights stay.

    Raises:
        ValueError: A matrix has a number of inputs that no blocks of 32 add up to.
    """
    found = []
    for weight in weights:
        if len(weight.shape) != 2:
            found.append(weight)
            continue
        inputs, outputs = weight.shape
        if inputs % BLOCK:
            raise ValueError(f"{weight.name} has {inputs} inputs, expected a multiple of {BLOCK}")
        groups = inputs // BLOCK
        found.append(Weight(weight.name + BLOCKS, (outputs, groups, BLOCK // 2), torch.uint8))
        found.append(Weight(weight.name + SCALES, (outputs, groups), torch.uint8))
    return tuple(found)


def unpack(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An expert's weights with its matrices `[in, out]` in a type that is computed with.

    Args:
        weights: Its weights as `packed_weights` describes them, by name.
        dtype: Type of the matrices. Every number in MXFP4 is one in bfloat16, unless its power of two is too small or large.
    """
    found = {name: value for name, value in weights.items() if not name.endswith((BLOCKS, SCALES))}
    for name, blocks in weights.items():
        if name.endswith(BLOCKS):
            matrix = name.removesuffix(BLOCKS)
            found[matrix] = _matrix(blocks, weights[matrix + SCALES], dtype)
    return found


def _matrix(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix `[in, out]` of packed rows: one row for each output."""
    values = torch.tensor(FP4_VALUES, dtype=dtype, device=blocks_OGB.device)
    # Both numbers of a byte at once.
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    numbers_OGN = pairs[blocks_OGB.to(torch.int32)].flatten(-2)
    powers_OG = scales_OG.to(torch.int32) - _BIAS
    return torch.ldexp(numbers_OGN, powers_OG.unsqueeze(-1)).flatten(1).to(dtype).T.contiguous()
