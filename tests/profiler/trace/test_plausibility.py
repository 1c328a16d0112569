"""Warnings about traces that are well formed and still not the routing of text."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.traces import write_synthetic_trace

from profiler.trace import plausibility
from profiler.trace.hashing import hash_rows
from profiler.trace.plausibility import MIN_TOKENS, doubts
from profiler.trace.reader import Trace
from profiler.trace.schema import RoutingChunk


def trace_of(
    tmp_path: Path, share: float = 0, *, experts: int = 16, top_k: int = 2, layers: int = 3, weights: str = "random"
) -> Trace:
    """A trace of 400 tokens, of which `share` have the same route at every layer."""
    random = np.random.default_rng(0)
    ids_TLK = random.random((400, layers, experts)).argsort(-1)[..., :top_k]
    weights_TLK = np.sort(random.random((400, layers, top_k)), -1)[..., ::-1]
    if weights == "equal":
        weights_TLK = np.full(ids_TLK.shape, 1 / top_k)
    same = int(400 * share)
    ids_TLK[:same], weights_TLK = ids_TLK[0], weights_TLK.copy()
    weights_TLK[:same] = weights_TLK[0]
    half = 200
    problems = [(ids_TLK[part], weights_TLK[part].astype(np.float16)) for part in (slice(0, half), slice(half, None))]
    return write_synthetic_trace(tmp_path / "t", problems, experts)


def test_routing_of_text_raises_no_doubt(tmp_path: Path) -> None:
    assert doubts(trace_of(tmp_path, 0.4)) == []


def test_one_route_for_most_tokens_is_implausible(tmp_path: Path) -> None:
    assert doubts(trace_of(tmp_path, 0.75)) == [
        "implausible: 75% of the tokens or more have the same route at every layer: a warm-up, padding, or a faulty recorder"
    ]


def test_one_set_of_experts_for_most_tokens_is_implausible_whatever_the_weights(tmp_path: Path) -> None:
    """Dummy tokens whose weights differ in their last bits, so that the two experts change places."""
    random = np.random.default_rng(0)
    ids_TLK = random.random((300, 3, 16)).argsort(-1)[..., :2]
    weights_TLK = np.sort(random.random((300, 3, 2)), -1)[..., ::-1].copy()
    ids_TLK[:200] = np.where(random.random((200, 3, 1)) < 0.5, [3, 7], [7, 3])
    weights_TLK[:200] = np.array([0.5, 0.499]) + random.random((200, 3, 1)) / 100
    (found,) = doubts(write_synthetic_trace(tmp_path / "t", [(ids_TLK, weights_TLK.astype(np.float16))], 16))
    assert found.startswith("implausible: 67% of the tokens have the same experts at every layer, only their weights differ: ")


def test_only_the_layers_at_fault_are_named(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids_TLK = random.random((300, 3, 16)).argsort(-1)[..., :2]
    weights_TLK = np.sort(random.random((300, 3, 2)), -1)[..., ::-1].copy()
    ids_TLK[:200, 1], weights_TLK[:200, 1] = [3, 7], [0.1, 0.09]
    (found,) = doubts(write_synthetic_trace(tmp_path / "t", [(ids_TLK, weights_TLK.astype(np.float16))], 16, first_layer=4))
    assert found.startswith("implausible: 67% of the tokens or more have the same route at layer 5: ")


def test_equal_weights_are_placeholders(tmp_path: Path) -> None:
    assert doubts(trace_of(tmp_path, weights="equal")) == [
        "implausible: 100% of the rows have K equal weights, which no router computes: placeholders"
    ]


def test_a_single_layer_is_reported(tmp_path: Path) -> None:
    assert doubts(trace_of(tmp_path, layers=1)) == ["only one MoE layer was recorded, layer 0"]


@pytest.mark.parametrize("tokens", [1, 2, 3, MIN_TOKENS - 1, MIN_TOKENS])
def test_a_few_tokens_with_one_route_are_not_a_reason_for_doubt(tmp_path: Path, tokens: int) -> None:
    ids_TLK, weights_TLK = np.tile([3, 7], (tokens, 3, 1)), np.tile([0.6, 0.3], (tokens, 3, 1)).astype(np.float16)
    assert bool(doubts(write_synthetic_trace(tmp_path / "t", [(ids_TLK, weights_TLK)], 16))) == (tokens == MIN_TOKENS)


def test_what_is_kept_of_the_sample_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = trace_of(tmp_path, 0.75)
    whole = doubts(trace)
    alive: list[weakref.ref[RoutingChunk]] = []

    def one_at_a_time(trace: Trace) -> Iterator[RoutingChunk]:
        for start in range(0, 400, 40):
            chunk = trace.load()
            assert chunk.weights_TLK is not None
            part = slice(start, start + 40)
            piece = replace(chunk, expert_ids_TLK=chunk.expert_ids_TLK[part], weights_TLK=chunk.weights_TLK[part])
            assert sum(before() is not None for before in alive) <= 1
            alive.append(weakref.ref(piece))
            yield piece
            del piece

    monkeypatch.setattr(plausibility, "_chunks", one_at_a_time)
    assert doubts(trace) == whole
    assert len(alive) == 10


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (4, 1), (2, 2), (4, 4)])
def test_few_possible_routes_are_not_a_reason_for_doubt(tmp_path: Path, experts: int, top_k: int) -> None:
    """With few experts, a layer may prefer one set of them; with K = 1, renormalized weights are all 1."""
    random = np.random.default_rng(0)
    ids_TLK = np.tile(np.arange(top_k), (400, 3, 1))
    moved = random.random((400, 3)) < 0.3
    ids_TLK[moved] = (ids_TLK[moved] + 1) % experts
    weights_TLK = np.ones(ids_TLK.shape) if top_k == 1 else np.sort(random.random(ids_TLK.shape), -1)[..., ::-1]
    assert doubts(write_synthetic_trace(tmp_path / "t", [(ids_TLK, weights_TLK.astype(np.float16))], experts)) == []


def test_equal_rows_have_equal_hashes_and_others_do_not() -> None:
    random = np.random.default_rng(0)
    for kind, width in ((np.int32, 8), (np.float16, 3), (np.uint8, 70_000)):
        rows = random.integers(0, 200, (20, width)).astype(kind)
        hashes = hash_rows(np.concatenate([rows, rows]))
        assert (hashes[:20] == hashes[20:]).all()
        assert len(np.unique(hashes)) == 20
        changed = rows[:1].repeat(min(width, 500), axis=0)
        changed[np.arange(len(changed)), np.arange(len(changed))] += kind(1)
        assert len(np.unique(hash_rows(changed))) == len(changed)
