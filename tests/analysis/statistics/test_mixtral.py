"""Table 5 of the Mixtral paper is compared with traces of that model, and with no other."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.counts.locality import DISTANCES
from analysis.statistics.locality import Repetition
from analysis.statistics.mixtral import LAYERS, TABLE_5, compare_with_table_5, is_mixtral_8x7b
from profiler.trace.schema import ModelMetadata

MIXTRAL = ModelMetadata(id="mistralai/Mixtral-8x7B-v0.1", moe_layers=list(range(32)), num_experts=8, top_k=2)


def repetition(first: tuple[float, ...], either: tuple[float, ...]) -> Repetition:
    shares = np.full((2, len(DISTANCES), 32), 0.2)
    for layer, a, b in zip(LAYERS, first, either, strict=True):
        shares[:, 0, layer] = a / 100, b / 100
    flat = np.full(32, 0.125)
    return Repetition("arxiv", 1000, shares[0], shares[1], shares[1], flat, flat, flat)


def test_the_paper_s_own_rows_are_within() -> None:
    for first, either in TABLE_5.values():
        compared = compare_with_table_5([repetition(first, either)], MIXTRAL)
        assert [row.layer for row in compared] == [0, 15, 31]
        assert all(row.within for row in compared)
        assert [row.first for row in compared] == pytest.approx(first)


def test_routing_at_random_is_not_within() -> None:
    compared = compare_with_table_5([repetition((12.5, 12.5, 12.5), (46.4, 46.4, 46.4))], MIXTRAL)
    assert [row.within for row in compared] == [False, False, False]


def test_only_mixtral_8x7b_is_compared() -> None:
    other = MIXTRAL.model_copy(update={"id": "demo"})
    large = MIXTRAL.model_copy(update={"moe_layers": list(range(56))})
    assert is_mixtral_8x7b(MIXTRAL)
    assert not is_mixtral_8x7b(other)
    assert not is_mixtral_8x7b(large)
    assert compare_with_table_5([repetition((14, 28, 22), (47, 62, 52))], other) == []
