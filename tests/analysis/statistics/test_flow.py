"""Strong transitions are found, whatever the loads; independent layers have none beyond their control."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.report.sections.flow import expert_order
from analysis.statistics.flow import layer_flows


def test_strength_is_the_share_beyond_independence() -> None:
    pairs = np.array([[60, 0, 0], [0, 10, 10], [0, 10, 10]])
    (flow,) = layer_flows(pairs[None])
    # Expert 0 follows expert 0: 0.6 of the pairs, and 0.6 * 0.6 if the layers were independent. The others: 0.1, and 0.04.
    assert flow.layer == 0
    assert list(zip(flow.earlier.tolist(), flow.later.tolist(), strict=True)) == [(0, 0), (1, 1), (1, 2)]
    assert flow.share == pytest.approx([0.6, 0.1, 0.1])
    assert flow.lift == pytest.approx([0.6 / 0.36, 2.5, 2.5])
    assert flow.excess == pytest.approx(0.24 + 2 * 0.06)
    assert flow.excess > 2 * flow.excess_shuffled


def test_independent_layers_do_not_beat_their_control() -> None:
    random = np.random.default_rng(0)
    loads = random.uniform(1, 30, 16)
    flows = layer_flows(random.poisson(np.outer(loads, loads), size=(20, 16, 16)))
    excess, shuffled = (np.array([getattr(flow, name) for flow in flows]) for name in ("excess", "excess_shuffled"))
    assert excess.mean() == pytest.approx(shuffled.mean(), rel=0.1)


def test_nothing_flows_without_tokens_or_with_one_expert() -> None:
    for pairs in (np.zeros((2, 4, 4), dtype=int), np.full((2, 1, 1), 7)):
        for flow in layer_flows(pairs):
            assert (len(flow.share), flow.excess, flow.excess_shuffled) == (0, 0, 0)


def test_order_untangles_a_permutation() -> None:
    """Layers in which each expert leads to one other can be drawn without a single crossing."""
    random = np.random.default_rng(0)
    pairs = np.stack([100 * np.eye(8, dtype=int)[random.permutation(8)] for _ in range(5)])
    places = expert_order(layer_flows(pairs), 6, 8)
    assert np.array_equal(np.sort(places, axis=1), np.tile(np.arange(8), (6, 1)))
    for layer, table in enumerate(pairs):
        later = table.argmax(1)
        assert np.array_equal(places[layer], places[layer + 1][later])
