"""Layers of networks for a single token, without PyTorch's overhead: compiled loops over float32 arrays.

A token needs every weight once, so that reading them takes most of the time. Matrices may therefore be half-precision numbers,
in which weights are stored anyway: `half_bits` gives their bits, which numba has no type for, as 16-bit integers.
"""

from __future__ import annotations

import functools
import math
import platform
from typing import Any

import llvmlite.binding
import llvmlite.ir
import numba
import numpy as np
import numpy.typing as npt
from numba.extending import intrinsic

Array = npt.NDArray[np.float32]
# Numbers, or the bits of half-precision numbers.
Matrix = npt.NDArray[np.float32 | np.uint16]
# The weights of blocks: see `stacked`.
BlockWeights = tuple[Array, Array, Matrix, Array, Matrix, Array]
EPSILON = 1e-5
# Coefficients of erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, highest power first: a rational approximation, off by less than
# 5e-7. Unlike `math.erf`, it is computed for several numbers at a time.
_ERF_P = tuple(
    map(np.float32, (-2.726142e-10, 2.770681e-08, -2.101024e-06, -5.692506e-05, -7.349906e-04, -2.954600e-03, -1.609603e-02))
)
_ERF_Q = tuple(map(np.float32, (-1.456607e-05, -2.133741e-04, -1.682827e-03, -7.373329e-03, -1.426474e-02)))


@functools.cache
def _converts_halves() -> bool:
    """Whether this processor converts half-precision numbers itself; otherwise LLVM calls a function that may be missing."""
    return platform.machine() in {"aarch64", "arm64"} or llvmlite.binding.get_host_cpu_features().get("f16c", False)


def half_bits(*matrices: Array) -> tuple[Matrix, ...]:
    """The bits of the same matrices in half precision, if every number stays what it is; else the matrices."""
    if not _converts_halves():
        return matrices
    with np.errstate(over="ignore"):
        halves = [matrix.astype(np.float16) for matrix in matrices]
    if not all(np.array_equal(half, matrix) for half, matrix in zip(halves, matrices, strict=True)):
        return matrices
    return tuple(half.view(np.uint16) for half in halves)


@intrinsic
def _number(_: Any, value: Any) -> Any:
    """A float32, or the half-precision number with these bits as float32."""

    def convert(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        if value == numba.types.float32:
            return values[0]
        half = builder.bitcast(values[0], llvmlite.ir.HalfType())
        return builder.fpext(half, llvmlite.ir.FloatType())

    return (numba.types.float32(value), convert) if value in {numba.types.float32, numba.types.uint16} else None


def stacked(arrays: dict[str, Array], name: str, count: int) -> tuple[Array, Array, Array, Array, Array, Array]:
    """The weights of `count` blocks called `name.0`, `name.1`, ..., stacked: what `add_block` takes."""
    parts = ("norm.weight", "norm.bias", "rise.weight", "rise.bias", "fall.weight", "fall.bias")
    scale, shift, rise, rise_b, fall, fall_b = (
        np.stack([arrays[f"{name}.{number}.{part}"] for number in range(count)]) for part in parts
    )
    return scale, shift, rise, rise_b, fall, fall_b


@numba.njit(cache=True, nogil=True, fastmath=True)
def add_product(out: Array, matrix: Matrix, values: Array) -> None:
    """Add the product of `matrix` `[O, I]` and `values` `[I]` to `out` `[O]`."""
    for o in range(len(out)):
        total = np.float32(0)
        for i in range(len(values)):
            total += _number(matrix[o, i]) * values[i]
        out[o] += total


@numba.njit(cache=True, nogil=True, fastmath=True)
def add_rows(out: Array, matrix: Matrix, values: Array) -> None:
    """Add the product of `values` `[I]` and `matrix` `[I, O]` to `out` `[O]`; rows of values that are 0 are not read."""
    for i in range(len(values)):
        if values[i] != 0:
            for o in range(len(out)):
                out[o] += values[i] * _number(matrix[i, o])


@numba.njit(cache=True, nogil=True, fastmath=True)
def add_row(out: Array, row: Matrix, scale: np.float32) -> None:
    """Add `scale` times a row `[O]` of a matrix to `out` `[O]`."""
    for o in range(len(out)):
        out[o] += scale * _number(row[o])


@numba.njit(cache=True, nogil=True, fastmath=True)
def layer_norm(values: Array) -> Array:
    """A state `[D]` with mean 0 and variance 1: a LayerNorm without its scale and shift."""
    centered = values - np.float32(values.mean())
    deviation = math.sqrt((centered * centered).mean() + EPSILON)
    scaled: Array = centered * np.float32(1 / deviation)
    return scaled


@numba.njit(cache=True, nogil=True, fastmath=True)
def apply_gelu(values: Array) -> None:
    """Replace each value `[D]` by its GELU."""
    for i in range(len(values)):
        x = min(max(values[i] * np.float32(math.sqrt(0.5)), np.float32(-4)), np.float32(4))
        square = x * x
        top = _ERF_P[0]
        for c in _ERF_P[1:]:
            top = top * square + c
        bottom = _ERF_Q[0]
        for c in _ERF_Q[1:]:
            bottom = bottom * square + c
        values[i] *= np.float32(0.5) * (np.float32(1) + x * top / bottom)


@numba.njit(cache=True, nogil=True, fastmath=True)
def add_block(
    state: Array, seen: Array, n: int, scale: Array, shift: Array, rise: Matrix, rise_b: Array, fall: Matrix, fall_b: Array
) -> None:
    """Add what block n computes from `seen` `[D]` to `state` `[D]`."""
    hidden = rise_b[n].copy()
    add_product(hidden, rise[n], layer_norm(seen) * scale[n] + shift[n])
    apply_gelu(hidden)
    state += fall_b[n]
    add_product(state, fall[n], hidden)
