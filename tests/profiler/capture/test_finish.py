"""Capture options, requests on disk, and how a capture becomes a trace that says what it lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from profiler.capture.finish import finish_trace
from profiler.capture.options import CaptureOptions
from profiler.capture.requests import REQUESTS_FILE, CapturedRequest, Sequence, read_requests
from profiler.capture.sealing import run_folder
from profiler.errors import EngineError, TraceError
from profiler.trace.schema import CAPTURE_FOLDER, Metadata, ModelMetadata
from profiler.trace.stream import HIDDEN_STREAM, LOGITS_STREAM, RoutingWriter, ValuesWriter
from profiler.trace.writer import write_metadata

METADATA = Metadata(model=ModelMetadata(id="synthetic", moe_layers=[1, 4], num_experts=4, top_k=2), engine="none", hook="none")


def sequence(
    problem_id: int, captured_as: int | None, tokens: int, *, cached_tokens: int = 0, finish_reason: str = "unknown"
) -> Sequence:
    return Sequence(
        problem_id=problem_id,
        captured_as=None if captured_as is None else (0, captured_as),
        dataset="synthetic",
        source_key=str(problem_id),
        prompt="p",
        output="o",
        prompt_token_ids=[7],
        output_token_ids=[8] * (tokens - 1),
        cached_tokens=cached_tokens,
        finish_reason=finish_reason,
    )


def rows(tokens: int, expert: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.tile([expert, (expert + 1) % 4], (tokens, 2, 1)), np.tile([0.75, 0.25], (tokens, 2, 1))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_metadata(tmp_path, METADATA)
    with RoutingWriter(run_folder(tmp_path, 0), METADATA.model) as writer:
        writer.add(5, np.arange(3), *rows(3, 1))
        writer.add(np.array([6, 6, 5]), np.array([2, 3, 3]), *rows(3, 2))
    return tmp_path


def test_rows_get_the_ids_of_their_problems(directory: Path) -> None:
    trace = finish_trace(directory, METADATA, [sequence(0, 6, 5, cached_tokens=2), sequence(1, 5, 5)])
    assert trace.arrays(0).token_ids_T.tolist() == [2, 3]
    assert trace.arrays(1).expert_ids_TLK[:, 0, 0].tolist() == [1, 1, 1, 2]
    assert trace.metadata.gaps == ["2 positions of 1 problem came from the prefix cache: problem 0"]
    assert trace.problems.column("cached_tokens").to_pylist() == [2, 0]
    assert not (directory / CAPTURE_FOLDER).exists()
    assert [(dataset.name, dataset.problems) for dataset in trace.metadata.datasets] == [("synthetic", 2)]


def test_each_kind_of_gap_has_its_line(directory: Path) -> None:
    sequences = [
        sequence(0, 6, 5, cached_tokens=1),
        sequence(1, 5, 5, finish_reason="abort"),
        sequence(2, None, 3),
    ]
    assert finish_trace(directory, METADATA, sequences).metadata.gaps == [
        "1 position of 1 problem came from the prefix cache: problem 0",
        "1 problem aborted and incomplete: problem 1",
        "3 positions of 2 problems not captured: problem 0, 2",
    ]


def test_sealing_that_was_cut_short_can_be_repeated(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    sequences = [sequence(0, 6, 5), sequence(1, 5, 5)]
    with monkeypatch.context() as patched:
        patched.setattr("profiler.capture.finish.write_table", full)
        with pytest.raises(OSError, match="No space left"):
            finish_trace(directory, METADATA, sequences)
    assert (directory / CAPTURE_FOLDER).exists()
    trace = finish_trace(directory, METADATA, sequences)
    assert trace.num_rows == 12
    assert not (directory / CAPTURE_FOLDER).exists()


def test_rows_of_a_request_that_is_not_a_problem_are_refused(directory: Path) -> None:
    with pytest.raises(TraceError, match="rows of unknown problem 6"):
        finish_trace(directory, METADATA, [sequence(1, 5, 5)])


def test_an_empty_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nothing was captured"):
        finish_trace(tmp_path, METADATA, [sequence(0, 0, 2)])


def test_logits_and_router_inputs_are_sealed_beside_the_routing(directory: Path) -> None:
    run = run_folder(directory, 0)
    logits = np.arange(3 * 2 * 4, dtype=np.float16).reshape(3, 2, 4)
    with ValuesWriter(run / LOGITS_STREAM, [1, 4], "logits", 4) as writer:
        writer.add(np.array([6, 5, 5]), np.array([2, 0, 1]), logits)
    with ValuesWriter(run / HIDDEN_STREAM, [4], "hidden", 3) as writer:
        writer.add(5, np.arange(2), np.zeros((2, 1, 3), np.float16))
        # Computed again after a preemption: the later values stand.
        writer.add(5, np.array([1]), np.ones((1, 1, 3), np.float16))
    trace = finish_trace(directory, METADATA, [sequence(0, 6, 5), sequence(1, 5, 5)])
    positions, layers, values = trace.values("logits", 1)
    assert (positions.tolist(), layers) == ([0, 1], [1, 4])
    assert (values == logits[1:]).all()
    positions, layers, values = trace.values("hidden", 1)
    assert (positions.tolist(), layers, values[:, 0, 0].tolist()) == ([0, 1], [4], [0.0, 1.0])
    with pytest.raises(TraceError, match="no hidden of problem 0"):
        trace.values("hidden", 0)
    assert trace.manifest is not None
    assert {"logits/part-00000.parquet", "hidden/part-00000.parquet"} < set(trace.manifest.files)


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    with ValuesWriter(tmp_path / HIDDEN_STREAM, [0], "hidden", 1) as writer:
        with pytest.raises(TraceError, match="contain a value that is not a finite float16"):
            writer.add(0, np.arange(1), np.full((1, 1, 1), np.inf, np.float16))
        with pytest.raises(TraceError, match="hidden of float64, expected float16"):
            writer.add(0, np.arange(1), np.zeros((1, 1, 1)))  # type: ignore[arg-type] # float64 on purpose


def test_options_survive_the_environment() -> None:
    options = CaptureOptions(logits=True, hidden_layers=(3, 11), hidden_tokens=77, out="traces/x", rotate_megabytes=5)
    assert CaptureOptions.from_environment(options.to_environment()) == options
    assert CaptureOptions.from_environment({"SPECMOE_CAPTURE": "1"}) == CaptureOptions()
    assert CaptureOptions.from_environment({"SPECMOE_CAPTURE": "0", "SPECMOE_CAPTURE_LOGITS": "x"}) is None
    with pytest.raises(EngineError, match="expected whole numbers"):
        CaptureOptions.from_environment({"SPECMOE_CAPTURE": "1", "SPECMOE_CAPTURE_HIDDEN": "3,x"})


def test_a_torn_last_line_of_the_requests_is_left_out(tmp_path: Path) -> None:
    whole = CapturedRequest(0, "a", "label", [1, 2], 1)
    (tmp_path / REQUESTS_FILE).write_text(whole.to_json() + "\n" + whole.to_json()[:20])
    assert read_requests(tmp_path) == [whole]
    assert read_requests(tmp_path / "none") == []


def test_a_line_that_is_not_a_request_is_named(tmp_path: Path) -> None:
    whole = CapturedRequest(0, "a", 1, [1, 2], 0).to_json()
    for broken in (whole.replace('"number":0', '"number":-1'), whole.replace("}", ',"more":1}'), "null"):
        (tmp_path / REQUESTS_FILE).write_text(f"{whole}\n{broken}\n")
        with pytest.raises(TraceError, match=r"requests\.jsonl, line 2: "):
            read_requests(tmp_path)
