"""Warm-up passes in logs: long runs of identical routes are dropped where weights show what they are, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiler.importers import import_trace
from profiler.importers.identical_runs import MIN_RUN, RouteFingerprints, find_identical_runs
from profiler.importers.rows import ImportOptions
from profiler.trace.plausibility import doubts
from profiler.trace.reader import Trace

Routes = tuple[np.ndarray, np.ndarray | None]


def text(tokens: int, *, experts: int = 16, top_k: int = 2, layers: int = 2, seed: int = 0, weights: bool = True) -> Routes:
    """Routes `[T, L, K]` as text has them: random experts, and weights that never repeat."""
    random = np.random.default_rng(seed)
    ids_TLK = random.random((tokens, layers, experts)).argsort(-1)[..., :top_k]
    weights_TLK = random.random((tokens, layers, top_k)).astype(np.float32) if weights else None
    return ids_TLK, weights_TLK


def dummy(routes: Routes, first: int, length: int) -> Routes:
    """The same routes, with `length` tokens from `first` on replaced by copies of the first one."""
    ids_TLK, weights_TLK = (None if array is None else array.copy() for array in routes)
    assert ids_TLK is not None
    for array in (ids_TLK, weights_TLK):
        if array is not None:
            array[first : first + length] = array[first]
    return ids_TLK, weights_TLK


def looping(period: int, times: int) -> Routes:
    """Text of `period` tokens, repeated with the same experts and weights."""
    ids_TLK, weights_TLK = text(period)
    assert weights_TLK is not None
    return np.tile(ids_TLK, (times, 1, 1)), np.tile(weights_TLK, (times, 1, 1))


def convert(tmp_path: Path, problems: list[Routes], **options: Any) -> Trace:
    """Import routes through JSON lines, one problem for each pair of arrays."""
    lines = []
    for problem, (ids_TLK, weights_TLK) in enumerate(problems):
        for token, layer in np.ndindex(ids_TLK.shape[:2]):
            row = {"problem_id": problem, "layer": layer, "token_id": token, "expert_ids": ids_TLK[token, layer].tolist()}
            lines.append(json.dumps(row if weights_TLK is None else row | {"weights": weights_TLK[token, layer].tolist()}))
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return import_trace(tmp_path / "in.jsonl", tmp_path / "t", options=ImportOptions(**options))


def said(trace: Trace) -> list[str]:
    return [gap for gap in trace.metadata.gaps if "in runs of" in gap]


def test_a_warm_up_at_the_beginning_is_dropped_and_counted(tmp_path: Path) -> None:
    trace = convert(tmp_path, [dummy(text(500), 0, 400)])
    assert trace.load().token_ids_T.tolist() == list(range(400, 500))
    assert said(trace) == [
        "400 of 500 tokens were dropped: they are in runs of 64 or more with the same experts and weights at every layer, "
        "as the dummy tokens of an engine's warm-up are"
    ]
    # The positions of dropped tokens are not holes in the recording.
    assert not any("begin after position" in gap or "further positions" in gap for gap in trace.metadata.gaps)


def test_a_warm_up_is_kept_on_request_and_said(tmp_path: Path) -> None:
    trace = convert(tmp_path, [dummy(text(500), 0, 400)], identical_runs="keep")
    assert len(trace.load()) == 500
    assert said(trace)[0].startswith("400 of 500 tokens were kept although they are in runs of 64 or more")


def test_runs_anywhere_and_over_several_buckets_are_dropped_exactly(tmp_path: Path) -> None:
    # Buckets hold turns of 4,096 positions: this run crosses two borders of them.
    routes = dummy(dummy(text(9000, layers=1), 30, 8800), 8900, 70)
    trace = convert(tmp_path, [routes, text(10, layers=1, seed=1)])
    assert trace.arrays(0).token_ids_T.tolist() == [*range(30), *range(8830, 8900), *range(8970, 9000)]
    assert len(trace.arrays(1)) == 10


def test_shorter_batches_of_the_same_dummy_are_part_of_the_warm_up(tmp_path: Path) -> None:
    warm = dummy(text(200), 0, 200)
    parts = [(warm[0][:n], None if warm[1] is None else warm[1][:n]) for n in (200, 4, 1)]
    trace = convert(tmp_path, [*parts, text(50, seed=3)])
    assert np.unique(trace.load().problem_ids_T).tolist() == [3]


def test_a_warm_up_whose_weights_are_unlike_those_of_text_is_dropped(tmp_path: Path) -> None:
    # Rounded, so that all of the text has the same weights, but others than the dummy.
    ids_TLK, _ = dummy(text(552, layers=1), 0, 512)
    weights_TLK = np.full(ids_TLK.shape, [0.3, 0.2], dtype=np.float32)
    weights_TLK[:512] = [0.1, 0.09]
    assert len(convert(tmp_path, [(ids_TLK, weights_TLK)]).load()) == 40


@pytest.mark.parametrize(
    ("routes", "is_said"),
    [
        pytest.param(dummy(text(500, weights=False), 0, 400), True, id="without weights, a run may be text"),
        pytest.param((dummy(text(500), 0, 400)[0], np.full((500, 2, 2), 0.5, np.float32)), True, id="weights that never vary"),
        pytest.param((dummy(text(500), 0, 400)[0], text(500)[1]), False, id="the same experts with other weights: repetition"),
        pytest.param(dummy(text(500), 0, MIN_RUN - 1), False, id="a short run"),
        pytest.param(
            (text(500, experts=4, top_k=1, weights=False)[0] // 4, None), False, id="top-1 of one expert without weights"
        ),
        pytest.param(
            (np.sort(text(500, experts=2, top_k=2, weights=False)[0], axis=-1), None), False, id="K = E: one set of experts"
        ),
        pytest.param(looping(5, times=100), False, id="a loop of five tokens"),
    ],
)
def test_runs_that_may_be_text_are_kept(tmp_path: Path, routes: Routes, is_said: bool) -> None:
    trace = convert(tmp_path, [routes], num_experts=16 if routes[0].max() > 1 else 2)
    assert len(trace.load()) == 500
    assert bool(said(trace)) == is_said


def test_all_runs_are_dropped_on_request(tmp_path: Path) -> None:
    trace = convert(tmp_path, [dummy(text(500, weights=False), 0, 400)], identical_runs="drop")
    assert trace.load().token_ids_T.tolist() == list(range(400, 500))


def test_a_log_of_nothing_else_is_kept_and_implausible(tmp_path: Path) -> None:
    trace = convert(tmp_path, [dummy(text(200), 0, 200)], num_experts=16)
    assert len(trace.load()) == 200
    assert doubts(trace)[0].startswith("implausible: 100% of the tokens or more have the same route at every layer")


def test_empty_slots_of_dropped_tokens_are_not_counted(tmp_path: Path) -> None:
    lines = [{"problem_id": 0, "layer": 0, "token_id": t, "expert_ids": [3], "weights": [0.25]} for t in range(100)]
    ids_TLK, weights_TLK = text(50, layers=1)
    assert weights_TLK is not None
    for t in range(50):
        row = {"problem_id": 0, "layer": 0, "token_id": 100 + t, "expert_ids": ids_TLK[t, 0].tolist()}
        lines.append(row | {"weights": weights_TLK[t, 0].tolist()})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = import_trace(tmp_path / "in.jsonl", tmp_path / "t")
    assert trace.metadata.record.empty_slots == 0
    assert len(trace.load()) == 50


def test_rounded_weights_are_not_evidence() -> None:
    ids_TLK, weights_TLK = dummy(text(500), 0, 400)
    fingerprints = RouteFingerprints()
    fingerprints.add(np.arange(500), ids_TLK.astype(np.int32), weights_TLK)
    keys_T, routes_T, weights_T, _ = fingerprints.sorted()
    expected = [True] * 400 + [False] * 100
    assert find_identical_runs(keys_T, routes_T, weights_T).dummy_T.tolist() == expected
    runs = find_identical_runs(keys_T, routes_T, weights_T, rounded=True)
    assert not runs.dummy_T.any()
    assert runs.unclear_T.tolist() == expected


@pytest.mark.parametrize("seed", range(40))
def test_exactly_the_inserted_runs_are_found(seed: int) -> None:
    """Property: with weights, any runs of dummies in any text are found, token by token, and nothing else."""
    random = np.random.default_rng(seed)
    experts, top_k, layers = int(random.integers(2, 40)), int(random.integers(1, 3)), int(random.integers(1, 5))
    lengths = random.integers(1, 600, size=4)
    pieces, expected = [], []
    for n, length in enumerate(lengths.tolist()):
        routes = text(length, experts=experts, top_k=top_k, layers=layers, seed=seed * 10 + n)
        inserted = bool(random.integers(2)) and length >= MIN_RUN
        pieces.append(dummy(routes, 0, length) if inserted else routes)
        expected += [inserted] * length
    problem_T = np.repeat(np.arange(4), lengths)
    keys_T = problem_T.astype(np.int64) << 32 | np.concatenate([np.arange(length) for length in lengths])
    ids_TLK = np.concatenate([ids for ids, _ in pieces]).astype(np.int32)
    weights_TLK = np.concatenate([weights for _, weights in pieces if weights is not None])
    fingerprints = RouteFingerprints()
    for half in np.array_split(random.permutation(len(keys_T)), 2):
        fingerprints.add(keys_T[half], ids_TLK[half], weights_TLK[half])
    sorted_keys_T, routes_T, weights_T, _ = fingerprints.sorted()
    assert (sorted_keys_T == keys_T).all()
    runs = find_identical_runs(sorted_keys_T, routes_T, weights_T)
    # If there is nothing to compare with, nothing is certain.
    assert runs.dummy_T.tolist() == (expected if not all(expected) else [False] * len(expected))


@pytest.mark.parametrize(("experts", "layers"), [(2, 1), (3, 1), (2, 4), (8, 1)])
def test_skewed_routing_without_weights_raises_no_alarm(experts: int, layers: int) -> None:
    """A router that prefers one expert in 19 of 20 tokens has runs of hundreds by chance, and they are not reported."""
    random = np.random.default_rng(experts * 10 + layers)
    ids_TLK = np.where(
        random.random((20_000, layers, 1)) < 0.95 ** (1 / layers), 0, random.integers(0, experts, (20_000, layers, 1))
    )
    fingerprints = RouteFingerprints()
    fingerprints.add(np.arange(20_000), ids_TLK.astype(np.int32), None)
    keys_T, routes_T, weights_T, _ = fingerprints.sorted()
    assert not find_identical_runs(keys_T, routes_T, weights_T).unclear_T.any()
    assert not find_identical_runs(keys_T, routes_T, weights_T).dummy_T.any()
