"""The writer: pairs sorted, problems sorted, ends trimmed, double captures resolved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from profiler.capture.sealing import run_folder, seal
from profiler.errors import TraceError
from profiler.trace import writer as writer_module
from profiler.trace.reader import Trace
from profiler.trace.rows import has_repeats, sort_pairs
from profiler.trace.schema import CAPTURE_FOLDER, Metadata, ModelMetadata
from profiler.trace.stream import RoutingWriter
from profiler.trace.writer import left_temporaries, temporary_of, write_manifest, write_metadata, write_text

MODEL = ModelMetadata(id="synthetic", moe_layers=[1, 2], num_experts=4, top_k=2)


def start(directory: Path) -> RoutingWriter:
    directory.mkdir(exist_ok=True)
    write_metadata(directory, Metadata(model=MODEL, engine="none", hook="none"))
    return RoutingWriter(run_folder(directory, 0), MODEL)


def rows(tokens: int, first_expert: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.tile([first_expert, (first_expert + 1) % 4], (tokens, 2, 1))
    return ids, np.tile([0.75, 0.25], (tokens, 2, 1))


def test_pairs_are_sorted_by_weight_and_ties_by_expert() -> None:
    ids, weights = sort_pairs(np.array([[[3, 1, 2]]], np.uint8), np.array([[[0.25, 0.5, 0.5]]], np.float16))
    assert ids.tolist() == [[[1, 2, 3]]]
    assert weights.tolist() == [[[0.5, 0.5, 0.25]]]


@settings(max_examples=60, deadline=None)
@given(
    top_k=st.integers(1, 11),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_pairs_sort_as_a_plain_sort_does(top_k: int, seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    ids = random.random((4, 3, 64)).argsort(-1)[..., :top_k].astype(np.uint8)
    weights = random.integers(0, 3 if ties else 1000, ids.shape).astype(np.float16) / np.float16(8)
    found_ids, found_weights = sort_pairs(ids, weights)
    order = np.lexsort((ids, -weights), axis=-1)
    assert (found_ids == np.take_along_axis(ids, order, -1)).all()
    assert (found_weights == np.take_along_axis(weights, order, -1)).all()
    ids[1, 2, -1] = ids[1, 2, 0]
    repeats = has_repeats(ids)
    assert repeats.sum() == (top_k > 1)
    assert repeats[1, 2] == (top_k > 1)


def test_a_negative_zero_weighs_as_much_as_zero() -> None:
    ids, weights = sort_pairs(np.array([[[0, 1, 2]]], np.uint8), np.array([[[-0.0, 0.5, 0.0]]], np.float16))
    assert ids.tolist() == [[[1, 0, 2]]]
    assert weights.tolist() == [[[0.5, 0.0, 0.0]]]


def test_a_hand_written_trace_has_exactly_these_rows(tmp_path: Path) -> None:
    with start(tmp_path / "t") as routing:
        routing.add(7, np.array([0]), np.array([[[0, 3], [2, 1]]]), np.array([[[0.25, 0.75], [0.5, 0.5]]]))
    seal(tmp_path / "t", MODEL, {7: 2})
    write_manifest(tmp_path / "t")
    assert pq.read_table(tmp_path / "t" / "routing").to_pylist() == [
        {"problem_id": 7, "layer": 1, "token_id": 0, "expert_ids": [3, 0], "weights": [0.75, 0.25]},
        {"problem_id": 7, "layer": 2, "token_id": 0, "expert_ids": [1, 2], "weights": [0.5, 0.5]},
    ]


def test_problems_in_any_order_come_out_sorted_over_many_row_groups_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "ROWS_PER_GROUP", 12)
    monkeypatch.setattr(writer_module, "ROWS_PER_FILE", 40)
    order = np.random.default_rng(0).permutation(30).tolist()
    with start(tmp_path / "t") as routing:
        for problem_id in order:
            routing.add(problem_id, np.arange(3), *rows(3, problem_id % 4))
    assert seal(tmp_path / "t", MODEL, dict.fromkeys(range(30), 4)) == {}
    write_manifest(tmp_path / "t")
    trace = Trace.open(tmp_path / "t")
    assert len(trace.routing_files) > 1
    chunk = trace.load()
    assert chunk.problem_ids_T.tolist() == np.repeat(np.arange(30), 3).tolist()
    assert chunk.token_ids_T.tolist() == [0, 1, 2] * 30
    assert (chunk.expert_ids_TLK[:, 0, 0] == chunk.problem_ids_T % 4).all()
    assert not (tmp_path / "t" / CAPTURE_FOLDER).exists()


def test_the_last_generated_token_is_never_routed_so_rows_beyond_are_dropped(tmp_path: Path) -> None:
    with start(tmp_path / "t") as routing:
        routing.add(0, np.arange(5), *rows(5))
    assert seal(tmp_path / "t", MODEL, {0: 5}) == {}
    write_manifest(tmp_path / "t")
    assert Trace.open(tmp_path / "t").load().token_ids_T.tolist() == [0, 1, 2, 3]


def test_a_position_captured_twice_keeps_the_later_capture(tmp_path: Path) -> None:
    with start(tmp_path / "t") as routing:
        routing.add(0, np.arange(3), *rows(3, first_expert=0))
        routing.add(0, np.arange(1, 3), *rows(2, first_expert=2))
    seal(tmp_path / "t", MODEL, {0: 4})
    write_manifest(tmp_path / "t")
    chunk = Trace.open(tmp_path / "t").load()
    assert chunk.token_ids_T.tolist() == [0, 1, 2]
    assert chunk.expert_ids_TLK[:, 0, 0].tolist() == [0, 2, 2]


def test_missing_positions_and_problems_are_reported(tmp_path: Path) -> None:
    with start(tmp_path / "t") as routing:
        routing.add(0, np.array([0, 2]), *rows(2))
    missing = seal(tmp_path / "t", MODEL, {0: 4, 1: 6})
    assert {problem: gaps.tolist() for problem, gaps in missing.items()} == {0: [[1, 2]], 1: [[0, 5]]}


def test_what_is_missing_takes_no_memory_for_what_is_not_there(tmp_path: Path) -> None:
    with start(tmp_path / "t") as routing:
        routing.add(0, np.array([5, 2**31 - 3]), *rows(2))
    missing = seal(tmp_path / "t", MODEL, {0: 2**31 - 1})
    assert missing[0].tolist() == [[0, 5], [6, 2**31 - 3]]


def test_rows_of_an_unknown_problem_are_refused(tmp_path: Path) -> None:
    with start(tmp_path / "t") as routing:
        routing.add(5, np.arange(2), *rows(2))
    with pytest.raises(TraceError, match="unknown problem 5"):
        seal(tmp_path / "t", MODEL, {0: 3})


@pytest.mark.parametrize("bad", [-1, 4])
def test_expert_ids_out_of_range_are_refused(tmp_path: Path, bad: int) -> None:
    ids, weights = rows(2)
    ids[1, 0, 0] = bad
    with pytest.raises(TraceError, match=r"expected 0\.\.3"):
        start(tmp_path / "t").add(0, np.arange(2), ids, weights)


def test_wrong_k_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"expected \(2, 2, 2\)"):
        start(tmp_path / "t").add(0, np.arange(2), np.zeros((2, 2, 3), int), np.zeros((2, 2, 3)))


def test_an_unfinished_writer_leaves_no_file_under_its_final_name(tmp_path: Path) -> None:
    start(tmp_path / "t").add(0, np.arange(2), *rows(2))
    assert not list((tmp_path / "t").rglob("part-*.parquet"))


@settings(max_examples=30, deadline=None)
@given(
    weights=hnp.arrays(np.float16, (3, 2, 2), elements=st.floats(0, 8, width=16)),
    first=hnp.arrays(np.int64, (3, 2), elements=st.integers(0, 3)),
)
def test_whatever_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, weights: np.ndarray, first: np.ndarray) -> None:
    ids = np.stack([first, (first + 1) % 4], axis=-1)
    directory = tmp_path_factory.mktemp("property") / "t"
    with start(directory) as routing:
        routing.add(0, np.arange(3), ids, weights)
    seal(directory, MODEL, {0: 4})
    write_manifest(directory)
    chunk = Trace.open(directory).load()
    assert chunk.weights_TLK is not None
    read = {
        (t, layer, int(e)): w
        for t in range(3)
        for layer in range(2)
        for e, w in zip(chunk.expert_ids_TLK[t, layer], chunk.weights_TLK[t, layer], strict=True)
    }
    put = {(t, layer, int(ids[t, layer, k])): weights[t, layer, k] for t in range(3) for layer in range(2) for k in range(2)}
    assert read == put
    assert (np.diff(chunk.weights_TLK.astype(float), axis=-1) <= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 70_000.0])
def test_weights_that_the_reader_would_refuse_are_refused_here(tmp_path: Path, bad: float) -> None:
    ids, weights = rows(2)
    weights[1, 1, 0] = bad
    with pytest.raises(TraceError, match="negative, not a number, or above 65,504"):
        start(tmp_path / "t").add(0, np.arange(2), ids, weights)


def test_an_expert_twice_in_a_layer_and_negative_problems_are_refused(tmp_path: Path) -> None:
    ids, weights = rows(2)
    with pytest.raises(TraceError, match="problem_id or token_id is negative"):
        start(tmp_path / "t").add(-1, np.arange(2), ids, weights)
    ids[0, 1] = 2
    with start(tmp_path / "u") as routing:
        routing.add(3, np.arange(2), ids, weights)
    with pytest.raises(TraceError, match="problem 3, token 0, layer 2: the same expert twice"):
        seal(tmp_path / "u", MODEL, {3: 3})


def test_text_is_written_next_to_other_files_and_not_over_them(tmp_path: Path) -> None:
    (tmp_path / "hot.tmp").write_text("mine")
    with temporary_of(tmp_path / "hot.json") as outer:
        outer.write_text("first")
        write_text(tmp_path / "hot.csv", "second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "hot.tmp": "mine",
        "hot.json": "first",
        "hot.csv": "second",
    }


def test_a_temporary_file_is_removed_after_an_error_and_found_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "hot.json"
    with temporary_of(path) as temporary:
        temporary.write_text("begun")
        assert left_temporaries(path) == {temporary}
    path.unlink()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert not list(tmp_path.iterdir())
