"""Products of single tokens with matrices in single and in half precision."""

from __future__ import annotations

import numpy as np
import pytest

from speculation.predictors.neural.streams import single_token
from speculation.predictors.neural.streams.single_token import Array, add_product, add_row, add_rows, half_bits


def some_matrix() -> Array:
    """Numbers of half precision, among them subnormal ones and the largest."""
    matrix = np.random.default_rng(0).normal(size=(37, 53)).astype(np.float16).astype(np.float32)
    matrix[0, :4] = [65504, -65504, 2.0**-24, 0]
    return matrix


def test_halves_give_the_same_products() -> None:
    matrix = some_matrix()
    (bits,) = half_bits(matrix)
    assert np.array_equal(bits.view(np.float16) if bits.dtype == np.uint16 else bits, matrix)
    values, others = np.random.default_rng(1).normal(size=(2, 53)).astype(np.float32)
    values[3] = 0
    for form in (matrix, bits):
        product, rows, row = np.ones(37, np.float32), np.ones(37, np.float32), others.copy()
        add_product(product, form, values)
        add_rows(rows, np.ascontiguousarray(form.T), values)
        add_row(row, form[5], np.float32(0.5))
        np.testing.assert_allclose(product, 1 + matrix.astype(np.float64) @ values, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(rows, 1 + matrix.astype(np.float64) @ values, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(row, others + matrix[5] / 2, rtol=1e-6)


def test_numbers_that_would_change_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, finer, larger = some_matrix(), np.full((2, 2), 1 + 2.0**-12, np.float32), np.full((2, 2), 7e4, np.float32)
    for other in (finer, larger):
        # All have one type: the loops are compiled once.
        assert [matrix.dtype for matrix in half_bits(exact, other)] == [np.float32, np.float32]
    monkeypatch.setattr(single_token, "_converts_halves", lambda: False)
    assert half_bits(exact)[0] is exact
