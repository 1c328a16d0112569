"""However a trace is cut, into frames, parts or threads, the counts are those of one pass."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.frames import counted, make_axes, make_frame, uniform
from support.traces import MakeProblems, MakeTrace

from analysis.counts import counting, kernels
from analysis.counts.accumulator import Accumulator
from analysis.counts.counting import BYTES_PER_ROW, MIN_ROWS_PER_THREAD, TABLE_BYTES, TraceCounts, axes_of, count_trace
from analysis.counts.frames import Frame, read_frames
from analysis.counts.survey import ALL_PROBLEMS, OTHER_DATASETS, Axes, Choice, Survey, survey_trace
from analysis.counts.survey import make_axes as axes_from
from analysis.counts.weights import MARGIN_BIN
from analysis.statistics.compute import Source, compute_statistics
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE, TOKENS_FILE, ModelMetadata, RoutingChunk


def assert_equal(first: TraceCounts, second: TraceCounts) -> None:
    for name, part in first.parts.items():
        theirs = second.parts[name].state()
        for key, array in part.state().items():
            assert np.array_equal(array, theirs[key]), f"{name}: {key}"


def count(axes: Axes, frames: list[Frame]) -> TraceCounts:
    counts = TraceCounts(axes)
    for part in counts.parts.values():
        counted(part, frames)
    return counts


def test_arrays_of_any_layout_compile_nothing_again() -> None:
    random = np.random.default_rng(0)
    axes = make_axes(2, 8, 2, hops=1, vocabulary=tuple(range(3)))
    vocab = [random.integers(0, 3, 20)]
    frame = make_frame([uniform(random, 20, 2, 8, 2)], 8, vocab=vocab)
    whole = count(axes, [frame])
    loops = [loop for loop in vars(kernels).values() if hasattr(loop, "signatures")]
    assert len(loops) >= 12
    compiled = {loop.__name__: len(loop.signatures) for loop in loops}
    strided = RoutingChunk(
        frame.chunk.problem_ids_T.repeat(2)[::2],
        frame.chunk.token_ids_T.repeat(2)[::2],
        np.asfortranarray(frame.chunk.expert_ids_TLK),
        np.asfortranarray(frame.chunk.weights_TLK),
    )
    assert_equal(whole, count(axes, [replace(frame, chunk=strided, vocab_T=vocab[0].astype(np.int32).repeat(2)[::2])]))
    assert {loop.__name__: len(loop.signatures) for loop in loops} == compiled


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=2, max_size=6),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    border=st.floats(0, 1),
    shape=st.sampled_from([(3, 5, 2), (2, 4, 1), (1, 70, 3), (4, 6, 6)]),
    seed=st.integers(0, 1000),
)
def test_cuts_change_nothing(
    lengths: list[int], cuts: list[float], border: float, shape: tuple[int, int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    layers, experts, top_k = shape
    problems = [uniform(random, length, layers, experts, top_k) for length in lengths]
    for ids in problems:
        # Some tokens with fewer experts.
        ids[random.random(ids.shape[:2]) < 0.1, top_k - 1] = experts
    weights = [-np.sort(-random.random(ids.shape), axis=-1) for ids in problems]
    vocab = [random.integers(-1, 4, length) for length in lengths]
    axes = make_axes(layers, experts, top_k, hops=min(2, layers - 1), datasets=("a", "b", "c"), vocabulary=(10, 20, 30))
    whole = make_frame(
        problems, experts, weights=weights, vocab=vocab, datasets=random.integers(0, 3, len(lengths)).tolist(), first_problem=5
    )
    expected = count(axes, [whole])

    at = sorted({0, len(whole), *(round(cut * len(whole)) for cut in cuts)})
    pieces = [whole.take(slice(begin, end)) for begin, end in itertools.pairwise(at)]
    assert_equal(expected, count(axes, [piece for piece in pieces if len(piece)]))

    ends = np.cumsum([0, *lengths])
    middle = int(ends[1 + round(border * (len(lengths) - 2))])
    parts = [count(axes, [whole.take(part)]) for part in (slice(0, middle), slice(middle, None))]
    restored = TraceCounts.restored(axes, parts[0].save())
    # Parts may come in any order.
    parts[1].merge(restored)
    assert_equal(expected, parts[1])


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    problems = random_problems(count=12, tokens=60, layers=4, num_experts=8, top_k=2)
    return make_trace(
        problems, 8, datasets=["b", "a", "c"] * 4, vocab_ids=[np.arange(61) % 7] * 12, prompt_tokens=10, name="twelve"
    )


def test_threads_and_parts_count_what_one_pass_counts(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trace, "spans", lambda self, parts: [range(3), range(3, 7), range(7, 100)])
    one, three = count_trace(trace, hops=2, workers=1), count_trace(trace, hops=2, workers=3)
    assert_equal(one, three)
    assert one.load.tokens.sum() == 12 * 60


def test_spans_cover_every_problem_once(trace: Trace) -> None:
    spans = trace.spans(4)
    found = [problem for span in spans for chunk in trace.chunks(problems=span) for problem in np.unique(chunk.problem_ids_T)]
    assert found == list(range(12))


def test_frames_know_dataset_phase_fold_and_token(trace: Trace) -> None:
    axes = axes_of(trace, survey_trace(trace))
    frames = list(read_frames(trace, axes))
    (frame,) = frames
    assert axes.datasets == ("a", "b", "c")
    assert frame.dataset_T.reshape(12, 60)[:, 0].tolist() == [1, 0, 2] * 4
    assert (frame.phase_T.reshape(12, 60) == (np.arange(60) >= 10)).all()
    assert set(frame.fold_T.tolist()) == {0, 1}
    assert [axes.vocabulary[place] for place in frame.vocab_T[:60]] == [position % 7 for position in range(60)]
    # A fold depends on the prompt alone, and parts see the same.
    later = list(read_frames(trace, axes, range(5, 9)))
    assert np.concatenate([part.fold_T for part in later]).tolist() == frame.fold_T[300:540].tolist()
    assert np.concatenate([part.vocab_T for part in later]).tolist() == frame.vocab_T[300:540].tolist()


def test_rows_without_problem_are_refused(trace: Trace, make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    other = make_trace(random_problems(count=3, tokens=60, layers=4, num_experts=8, top_k=2), 8, name="three")
    (trace.path / "problems.parquet").write_bytes((other.path / "problems.parquet").read_bytes())
    with pytest.raises(TraceError, match=r"routing rows of problem 3, which problems\.parquet does not list"):
        count_trace(trace)


def test_unsorted_tokens_are_refused(trace: Trace) -> None:
    import pyarrow.parquet as pq

    path = trace.path / TOKENS_FILE
    table = pq.read_table(path)
    pq.write_table(table.take(np.arange(table.num_rows)[::-1]), path)
    with pytest.raises(TraceError, match=r"tokens\.parquet is not sorted"):
        count_trace(trace)


def test_traces_without_tables_are_counted(trace: Trace) -> None:
    for name in ("problems.parquet", TOKENS_FILE, MANIFEST_FILE):
        (trace.path / name).unlink()
    bare = Trace.open(trace.path, allow_incomplete=True)
    counts = count_trace(bare)
    assert counts.axes.datasets == (ALL_PROBLEMS,)
    assert counts.load.tokens.tolist() == [[0, 0, 720]]
    # Problems are still distinguished, and fall into both folds.
    assert len(counts.load.blocks.counts) == 12
    assert (counts.transitions.strongest.sum((1, 2, 3, 4)) > 0).all()


def test_many_datasets_are_counted_as_one_more() -> None:
    survey = Survey()
    survey.problems.update({f"d{number:02}": 100 - number for number in range(40)})
    model = ModelMetadata(id="synthetic", moe_layers=[0, 1], num_experts=4, top_k=1)
    axes = axes_from(survey, model, hops=1, has_weights=True)
    assert axes.datasets == (*(f"d{number:02}" for number in range(15)), OTHER_DATASETS)


def test_surveys_add_up(trace: Trace) -> None:
    survey, twice = survey_trace(trace), survey_trace(trace)
    twice.merge(survey)
    assert twice.problems == {"a": 8, "b": 8, "c": 8}
    assert twice.tokens[0] == 2 * survey.tokens[0]


@pytest.mark.parametrize("stored", [b"no archive", b""])
def test_stored_counts_that_are_none_are_refused(stored: bytes) -> None:
    with pytest.raises(TraceError, match="stored counts are not readable"):
        TraceCounts.restored(make_axes(2, 4, 1), stored)


def test_stored_counts_of_another_analysis_are_refused() -> None:
    stored = TraceCounts(make_axes(2, 4, 1)).save()
    with pytest.raises(TraceError, match="stored counts of another analysis"):
        TraceCounts.restored(make_axes(2, 5, 1), stored)


def test_pickled_objects_are_not_loaded() -> None:
    buffer = io.BytesIO()
    stored: dict[str, Any] = {"load/counts": np.array([{"a": 1}], dtype=object)}
    np.savez(buffer, **stored)
    with pytest.raises(TraceError, match="stored counts are not readable"):
        TraceCounts.restored(make_axes(2, 4, 1), buffer.getvalue())


def test_too_many_hops_are_refused(
    make_trace: MakeTrace, random_problems: MakeProblems, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_trace(random_problems(count=2, tokens=5, layers=6, num_experts=8, top_k=2), 8, name="six")
    monkeypatch.setattr("analysis.counts.counting.MAX_TRANSITION_BYTES", 4 * 6 * 81 * 4 * 2)
    assert axes_of(trace, survey_trace(trace)).hops == 2
    with pytest.raises(TraceError, match="choose at most 2 hops"):
        axes_of(trace, survey_trace(trace), 3)


def test_every_accumulator_is_part_of_a_count() -> None:
    """A statistic that is not in `TraceCounts` would be neither merged nor stored."""

    def below(kind: type) -> set[type]:
        return {kind} if not kind.__subclasses__() else set().union(*map(below, kind.__subclasses__()))

    assert {type(part) for part in TraceCounts(make_axes(2, 4, 1)).parts.values()} == below(Accumulator)


def test_logits_are_counted_once_per_problem(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from profiler.trace.schema import values_schema
    from profiler.trace.writer import write_manifest

    trace = make_trace(random_problems(count=3, tokens=4, layers=2, num_experts=4, top_k=2), 4, name="logits")
    logits = np.tile(np.array([4, 3, 1, 0], dtype=np.float16), 3 * 4 * 2)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(logits), 4)
    columns = [
        pa.array(np.repeat(np.arange(3, dtype=np.int32), 8)),
        pa.array(np.tile([0, 1], 12).astype(np.int16)),
        pa.array(np.tile(np.repeat(np.arange(4, dtype=np.int32), 2), 3)),
        lists.cast(values_schema("logits", 4).field(3).type),
    ]
    (trace.path / "logits").mkdir()
    pq.write_table(pa.Table.from_arrays(columns, schema=values_schema("logits", 4)), trace.path / "logits/part-00000.parquet")
    (trace.path / MANIFEST_FILE).unlink()
    write_manifest(trace.path)
    counts = count_trace(Trace.open(trace.path))
    assert counts.margins.histogram.sum(1).tolist() == [12, 12]
    # The second largest minus the third.
    assert counts.margins.histogram.argmax(1) * MARGIN_BIN == pytest.approx([2, 2], abs=1.01 * MARGIN_BIN)


def test_problems_can_be_left_out_and_grouped_by_another_column(trace: Trace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = trace.path / "problems.parquet"
    table = pq.read_table(path)
    table = table.append_column("looping", pa.array([number % 4 == 0 for number in range(12)]))
    table = table.append_column("category", pa.array(["x", "y", None] * 4))
    pq.write_table(table, path)
    choice = Choice(by="category", without="looping")
    counts = count_trace(trace, choice=choice)
    # Problems 0, 4 and 8 are left out: x, y and unknown.
    assert counts.axes.datasets == ("unknown", "x", "y")
    assert counts.load.tokens.sum(1).tolist() == [180, 180, 180]
    assert sum(counts.reuse.lengths.values()) == 9
    assert Source.of(trace, choice).caveats == ("problems with 'looping' are left out",)
    with pytest.raises(TraceError, match="lacks column 'author'"):
        count_trace(trace, choice=Choice(by="author"))
    pq.write_table(table.set_column(table.column_names.index("looping"), "looping", pa.array([True] * 12)), path)
    with pytest.raises(TraceError, match="has no routing rows of problems without 'looping'"):
        compute_statistics(trace, choice=choice)


def test_threads_do_not_lose_problems_that_are_out_of_order(make_trace: MakeTrace, random_problems: MakeProblems) -> None:
    problems = random_problems(count=4, tokens=6, layers=2, num_experts=4, top_k=1)
    first = make_trace(problems[:2], 4, name="first")
    second = make_trace(problems, 4, name="second")
    # Problems 0 to 3, then 0 and 1 again, in two files.
    target = second.path / "routing" / "part-00001.parquet"
    target.write_bytes(first.routing_files[0].read_bytes())
    (second.path / MANIFEST_FILE).unlink()
    broken = Trace.open(second.path, allow_incomplete=True)
    for workers in (1, 2):
        with pytest.raises(TraceError, match="does not come after"):
            count_trace(broken, workers=workers)


@pytest.mark.parametrize(
    ("table_bytes", "rows", "expected"),
    [
        (1 << 20, 2 * MIN_ROWS_PER_THREAD - 1, 1),
        (1 << 20, 2 * MIN_ROWS_PER_THREAD, 2),
        # A thread's tables must pay off, and fit into memory.
        (100 << 20, 2 * (100 << 20) // BYTES_PER_ROW - 1, 1),
        (100 << 20, 2 * (100 << 20) // BYTES_PER_ROW, 2),
        (TABLE_BYTES, 1 << 40, 1),
        (2 * TABLE_BYTES, 1 << 40, 1),
    ],
)
def test_threads_need_rows_and_memory(table_bytes: int, rows: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_cores", lambda: 8)
    assert min(2, counting._workers(table_bytes, 0, rows)) == expected
