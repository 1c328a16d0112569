"""Distributions of weights against NumPy's quantiles, and margins of router logits by hand."""

from __future__ import annotations

import numpy as np
import pytest
from support.frames import counted, make_axes, make_frame, uniform

from analysis.counts.weights import MARGIN_BIN, MarginCounts, WeightCounts
from analysis.statistics.weights import QUANTILES, margin_statistics, weight_statistics


def test_quantiles_are_numpy_s_within_a_bin() -> None:
    random = np.random.default_rng(0)
    ids = uniform(random, 4000, 2, 8, 3)
    weights = -np.sort(-random.dirichlet(np.ones(3), (4000, 2)), axis=-1).astype(np.float16)
    found = weight_statistics(counted(WeightCounts(make_axes(2, 8, 3)), [make_frame([ids], 8, weights=[weights])]))
    assert found is not None
    expected = np.quantile(weights.astype(np.float64), QUANTILES, axis=0, method="inverted_cdf").transpose(1, 2, 0)
    assert found.quantiles == pytest.approx(expected, rel=1 / 64)
    assert found.mean == pytest.approx(weights.mean(0, dtype=np.float64), rel=1e-6)
    assert found.even == pytest.approx(1 / 3)


def test_weights_above_one_zero_and_none() -> None:
    ids = np.zeros((4, 1, 1), dtype=int)
    weights = np.array([0.0, -0.0, 2.5, np.nan])[:, None, None]
    counts = counted(WeightCounts(make_axes(1, 4, 1)), [make_frame([ids], 4, weights=[weights])])
    assert counts.histogram.sum() == 3
    assert counts.histogram[0, 0, 0] == 2
    assert weight_statistics(WeightCounts(make_axes(1, 4, 1))) is None


def test_ranks_that_no_token_has_are_unknown_and_ones_are_ones() -> None:
    ids = np.tile([0, 4], (5, 1, 1))
    weights = np.tile([1.0, np.nan], (5, 1, 1))
    found = weight_statistics(counted(WeightCounts(make_axes(1, 4, 2)), [make_frame([ids], 4, weights=[weights])]))
    assert found is not None
    assert found.mean[0, 0] == 1.0
    assert np.isnan(found.mean[0, 1])
    assert np.isnan(found.quantiles[0, 1]).all()


def test_margins_by_hand() -> None:
    counts = MarginCounts(make_axes(2, 4, 2))
    # Second minus third largest: 1.0; 0.25; 0.0 for three tokens of layer 1. Layer 0 has no logits, layer 9 is not the model's.
    logits = np.array([[3, 2, 1, 0], [0.5, 1, 0.25, 0], [1, 1, 1, 1], [9, 0, 0, 0], [np.nan, 1, 1, 1]], dtype=np.float16)
    counts.add(np.array([1, 1, 1, 9, 1], dtype=np.int16), logits)
    found = margin_statistics(counts)
    assert found is not None
    assert found.quantiles[1, QUANTILES.index(0.5)] == pytest.approx(0.25, abs=1.01 * MARGIN_BIN)
    assert found.quantiles[1, -1] == pytest.approx(1.0, abs=1.01 * MARGIN_BIN)
    assert found.close[1] == pytest.approx(1 / 3)
    assert np.isnan(found.quantiles[0]).all()
    assert margin_statistics(MarginCounts(make_axes(1, 4, 2))) is None
