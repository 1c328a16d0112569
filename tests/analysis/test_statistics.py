"""Hand-computed statistics, chance on independent routing, a known Markov router, and the shuffled control."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.cli import analyze_trace
from analysis.domains import jensen_shannon_distance
from analysis.load import count_experts, entropy, load_statistics
from analysis.statistics import compute_statistics
from analysis.transitions import TransitionCounts, hop_statistics, mutual_information, transition_probabilities
from profiler.reader import Trace
from profiler.schema import RoutingChunk

Make = Callable[..., Trace]


def chunk(ids_TLK: np.ndarray) -> RoutingChunk:
    tokens = len(ids_TLK)
    weights = np.tile(np.linspace(1, 0.5, ids_TLK.shape[2]), (*ids_TLK.shape[:2], 1)).astype(np.float16)
    return RoutingChunk(np.zeros(tokens, np.int32), np.arange(tokens, dtype=np.int32), ids_TLK.astype(np.uint8), weights)


def test_load_by_hand() -> None:
    # Layer 0 uses experts 0,1 | 0,1 | 0,2; layer 1 always 3,2.
    ids = np.array([[[0, 1], [3, 2]], [[1, 0], [3, 2]], [[0, 2], [2, 3]]])
    counts = count_experts(ids, 4)
    assert counts.tolist() == [[3, 2, 1, 0], [0, 0, 3, 3]]
    load = load_statistics(counts)
    assert load.entropy_bits == pytest.approx([0.5 * 1 + (1 / 3) * np.log2(3) + (1 / 6) * np.log2(6), 1.0])
    assert load.entropy_share == pytest.approx(load.entropy_bits / 2)
    assert load.max_over_mean == pytest.approx([2.0, 2.0])
    assert load.coverage.tolist() == [0.75, 0.5]


def test_entropy_of_certainty_is_plain_zero() -> None:
    assert str(float(entropy(np.array([1.0, 0.0])))) == "0.0"


def test_transitions_by_hand_count_all_pairs() -> None:
    counts = TransitionCounts(layers=3, num_experts=3, hops=2)
    counts.update(chunk(np.array([[[0, 1], [1, 2], [2, 0]], [[0, 2], [1, 0], [0, 1]]])))
    # Layer 0 -> 1: token 0 pairs {0,1} x {1,2}, token 1 pairs {0,2} x {1,0}.
    assert counts.pairs[0, 0].tolist() == [[1, 2, 1], [0, 1, 1], [1, 1, 0]]
    # Two hops, 0 -> 2: {0,1} x {2,0} and {0,2} x {0,1}.
    assert counts.pairs[1, 0].tolist() == [[2, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert counts.strongest[0, 0].tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert counts.pairs[1, 1].sum() == 0
    assert transition_probabilities(counts.pairs)[0, 0].tolist() == [[0.25, 0.5, 0.25], [0, 0.5, 0.5], [0.5, 0.5, 0]]


def test_merged_counts_equal_a_single_pass() -> None:
    ids = np.random.default_rng(0).integers(0, 5, (40, 4, 1))
    whole, parts = TransitionCounts(4, 5, 3), TransitionCounts(4, 5, 3)
    whole.update(chunk(ids))
    for part in (ids[:13], ids[13:]):
        counts = TransitionCounts(4, 5, 3)
        counts.update(chunk(part))
        parts.merge(counts)
    assert (whole.pairs == parts.pairs).all()
    assert (whole.strongest == parts.strongest).all()
    assert whole.tokens == parts.tokens == 40


def test_mutual_information_by_hand() -> None:
    # Perfectly linked, two values: 1 bit; the correction subtracts (2 - 2 - 2 + 1) / (2 N ln 2), that is adds 1 / (2 N ln 2).
    assert mutual_information(np.array([[50, 0], [0, 50]])) == pytest.approx(1 + 1 / (200 * np.log(2)))
    # Independent: 0 bits; the correction subtracts (4 - 2 - 2 + 1) / (2 N ln 2).
    assert mutual_information(np.array([[25, 25], [25, 25]])) == pytest.approx(-1 / (200 * np.log(2)))


def test_independent_uniform_routing_is_at_chance() -> None:
    tokens, experts = 40_000, 8
    ids = np.random.default_rng(1).random((tokens, 3, experts)).argsort(-1)[:, :, :2]
    counts = TransitionCounts(3, experts, 2)
    counts.update(chunk(ids))
    hop = hop_statistics(counts, 1)
    spread = 5 * np.sqrt(experts / 4 / tokens)
    assert np.abs(hop.information_bits).max() < 0.002
    assert np.abs(hop.information_shuffled_bits).max() < 0.002
    assert np.abs(hop.same_expert - 1 / experts).max() < spread
    assert np.abs(hop.conditional_top1 - 1 / experts).max() < 3 * spread


def test_a_known_markov_router_is_recovered_and_the_shuffle_destroys_it() -> None:
    random = np.random.default_rng(2)
    matrix = random.dirichlet(np.full(4, 0.3), size=4)
    first = random.integers(0, 4, 60_000)
    second = (random.random(60_000)[:, None] > matrix[first].cumsum(1)).sum(1)
    counts = TransitionCounts(2, 4, 1)
    counts.update(chunk(np.stack([first, second], 1)[:, :, None]))
    assert np.abs(transition_probabilities(counts.pairs)[0, 0] - matrix).max() < 0.02
    hop = hop_statistics(counts, 1)
    expected = entropy(matrix.mean(0)) - entropy(matrix).mean()
    assert hop.information_bits[0] == pytest.approx(expected, abs=0.02)
    assert abs(hop.information_shuffled_bits[0]) < 0.001


def test_jensen_shannon_distance_by_hand() -> None:
    assert jensen_shannon_distance(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)
    assert jensen_shannon_distance(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0.0
    divergence = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    assert jensen_shannon_distance(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(np.sqrt(divergence))


def test_domains_differ_where_they_were_made_to(make_trace: Make) -> None:
    random = np.random.default_rng(3)
    problems = []
    for problem in range(40):
        even = random.integers(0, 4, (30, 1, 1))
        own_half = random.integers(0, 2, (30, 1, 1)) + 2 * (problem % 2)
        problems.append((np.concatenate([even, own_half], 1), np.ones((30, 2, 1))))
    trace = make_trace(problems, 4, datasets=[("code", "math")[problem % 2] for problem in range(40)])
    (distance,) = compute_statistics(trace, hops=1).domains
    assert (distance.first, distance.second) == ("code", "math")
    assert distance.distance[1] == 1.0
    assert distance.distance[0] < 0.1
    assert (distance.shuffled < 0.2).all()


def test_files_and_page_of_a_trace(make_trace: Make, random_problems: Make, tmp_path: Path) -> None:
    problems = random_problems(count=6, tokens=20, layers=4, num_experts=8, top_k=2)
    trace = make_trace(problems, 8, datasets=["a</script>", "b"] * 3)
    analyze_trace(trace, tmp_path / "r", hops=2, predictions=[{"predictor": "mlp", "recall@2": "0.500"}])
    statistics = json.loads((tmp_path / "r" / "statistics.json").read_text())
    assert (statistics["problems"], statistics["tokens"]) == (6, 120)
    assert [len(hop["information_bits"]) for hop in statistics["transitions"]] == [3, 2]
    with np.load(tmp_path / "r" / "transitions.npz", allow_pickle=False) as stored:
        assert stored["probabilities"].shape == (2, 4, 8, 8)
        assert stored["probabilities"][0, :3].sum(-1) == pytest.approx(1.0)
    page = (tmp_path / "r" / "report.html").read_text()
    assert "a&lt;/script&gt;" in page
    assert "a</script>" not in page
    assert 'src="http' not in page
    for title in ("Expert load", "Cross-layer transitions", "How far ahead a layer tells", "Domains", "Predictors"):
        assert f"<h2>{title}</h2>" in page
