"""Servers: traffic is recorded by itself, traces rotate, and stopping the server closes the last one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import warm
from support.agreement import assert_agrees, assert_complete

from profiler.capture.requests import CapturedRequest, problem_ids
from profiler.engines.vllm import is_installed
from profiler.errors import TraceError
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from profiler.trace.schema import CAPTURE_FOLDER, Metadata, ModelMetadata
from vllm_patch.capture.buffers import CaptureBuffers
from vllm_patch.capture.recorder import Recorder
from vllm_patch.capture.steps import NewRequest, Step
from vllm_patch.check.agreement import load_oracle, vocabulary
from vllm_patch.serving.server import FINISHED_FILE, begin_trace, finish, next_trace

METADATA = Metadata(
    model=ModelMetadata(id="synthetic", moe_layers=[0], num_experts=4, top_k=2),
    engine="vllm",
    hook="none",
    capture={"server": True},
)


def request(number: int, label: int | str | None) -> CapturedRequest:
    return CapturedRequest(number, f"cmpl-{number}", label, [1, 2], 0)


def test_clients_numbers_are_kept_and_the_others_get_the_smallest_free_ones() -> None:
    labels = [None, 1, "question 4", 1, 0, -3, 2**40]
    ids = problem_ids([request(number, label) for number, label in enumerate(labels)])
    assert ids == {1: 1, 4: 0, 0: 2, 2: 3, 3: 4, 5: 5, 6: 6}


@pytest.fixture(autouse=True)
def steps_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` waits for each step, which the recorder would otherwise keep for a second to write it with others."""
    monkeypatch.setattr("vllm_patch.capture.recorder.BATCH_BYTES", 1)


def serve(out: Path, steps: list[Step], limit: int) -> list[Path]:
    """Run steps through a rotating recorder; every row of step i routes to experts i and i + 1 (mod 4)."""
    buffers = CaptureBuffers(max_tokens=8, layers=1, num_experts=4, top_k=2, device="cpu")
    recorder = Recorder(buffers, moe_layers=[0], num_experts=4, top_k=2)
    closed: list[Path] = []

    def end(run: Path) -> None:
        closed.append(run.parent.parent)

    answer = recorder.start_rotating(lambda: begin_trace(next_trace(out), METADATA), end, limit)
    assert "error" not in answer
    for number, step in enumerate(steps):
        rows = step.rows
        ids = torch.tensor([number % 4, (number + 1) % 4]).repeat(rows, 1)
        buffers.copy_of_layer(0)(torch.zeros(rows, 1), torch.zeros(rows, 4), torch.tensor([[0.75, 0.25]] * rows), ids)
        # Each step is written on its own, so that the limit is looked at after each.
        done = recorder.status()["rows"]
        recorder.record(step)
        deadline = time.monotonic() + 30
        while recorder.status()["rows"] < done + rows and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "error" not in recorder.stop()
    return closed


def step(spans: list[tuple[str, int, int]], new: tuple[str, ...] = (), finished: tuple[str, ...] = ()) -> Step:
    names, starts, counts = (list(column) for column in zip(*spans, strict=True))
    return Step(
        request_ids=names,
        starts_B=np.array(starts),
        scheduled=dict(zip(names, counts, strict=True)),
        rows=sum(counts),
        new=[NewRequest(name, None, [1, 2], 0) for name in new],
        finished=set(finished),
    )


def finished_line(name: str, output: list[int]) -> str:
    return json.dumps({"request_id": name, "output_token_ids": output, "finish_reason": "length"}) + "\n"


def test_a_request_stays_with_the_trace_in_which_it_began(tmp_path: Path) -> None:
    steps = [
        step([("a", 0, 2), ("b", 0, 2)], new=("a", "b")),
        step([("b", 2, 1), ("c", 0, 2)], new=("c",), finished=("a",)),
        step([("c", 2, 1)], finished=("b",)),
    ]
    # Two pairs of int16 and float16 are 8 bytes a row: the first step fills a trace.
    closed = serve(tmp_path, steps, limit=4 * 8)
    assert [path.name for path in closed] == ["trace-00000", "trace-00001"]
    (tmp_path / FINISHED_FILE).write_text("".join(finished_line(name, [5, 6]) for name in "abc"))
    first, second = finish(closed[0]), finish(closed[1])
    assert first is not None
    assert second is not None
    assert first.problems.column("source_key").to_pylist() == ["a", "b"]
    assert second.problems.column("source_key").to_pylist() == ["c"]
    assert first.arrays(0).token_ids_T.tolist() == [0, 1]
    assert first.arrays(1).token_ids_T.tolist() == [0, 1, 2]
    assert first.arrays(1).expert_ids_TLK[:, 0, 0].tolist() == [0, 0, 1]
    assert second.arrays(0).expert_ids_TLK[:, 0, 0].tolist() == [1, 1, 2]
    assert first.metadata.gaps == ["1 position of 1 problem not captured: problem 0"]
    assert vocabulary(second) == {0: [1, 2, 5, 6]}


def test_a_request_that_never_ended_keeps_its_prompt(tmp_path: Path) -> None:
    (directory,) = serve(tmp_path, [step([("a", 0, 2)], new=("a",)), step([("a", 2, 1)])], limit=0)
    trace = finish(directory)
    assert trace is not None
    assert trace.problems.column("finish_reason").to_pylist() == ["abort"]
    assert trace.arrays(0).token_ids_T.tolist() == [0]
    assert trace.metadata.gaps == ["1 problem aborted and incomplete: problem 0"]


def test_a_server_without_traffic_leaves_no_trace(tmp_path: Path) -> None:
    (directory,) = serve(tmp_path, [], limit=0)
    assert (directory / CAPTURE_FOLDER / "run-00000" / "routing.arrows").is_file()
    assert finish(directory) is None
    assert not directory.exists()


def test_requests_ended_at_a_stop_string_are_not_called_aborted(tmp_path: Path) -> None:
    (directory,) = serve(tmp_path, [step([("a", 0, 2)], new=("a",)), step([("a", 2, 1)])], limit=0)
    record = {"request_id": "a", "output_token_ids": [5, 6], "finish_reason": "abort"}
    stop = {"request_id": "a", "stopped": True}
    (tmp_path / FINISHED_FILE).write_text(json.dumps(stop) + "\n" + json.dumps(record) + "\n")
    trace = finish(directory)
    assert trace is not None
    assert trace.problems.column("finish_reason").to_pylist() == ["stop"]
    assert trace.metadata.gaps == []


def test_an_id_that_a_client_uses_again_gets_the_output_that_it_read(tmp_path: Path) -> None:
    read = [[1, 2], [5], [1, 2], [6]]
    steps = [
        step([("a", 0, 2)], new=("a",)),
        step([("a", 2, 1)]),
        step([("a", 0, 2)], new=("a",), finished=("a",)),
        step([("a", 2, 1)]),
    ]
    tokens = [replace(one, input_ids=torch.tensor(ids, dtype=torch.int32)) for one, ids in zip(steps, read, strict=True)]
    (directory,) = serve(tmp_path, tokens, limit=0)
    lines = [finished_line("a", output) for output in ([6], [6, 7], [5, 6], [9, 9])]
    (tmp_path / FINISHED_FILE).write_text("".join(lines))
    trace = finish(directory)
    assert trace is not None
    assert vocabulary(trace) == {0: [1, 2, 5, 6], 1: [1, 2, 6, 7]}
    assert [trace.arrays(problem).expert_ids_TLK[:, 0, 0].tolist() for problem in (0, 1)] == [[0, 0, 1], [2, 2, 3]]
    assert trace.metadata.gaps == []


SERVER = """
import os, sys, time
from pathlib import Path
from vllm_patch.serving.server import Sealer

sealer = Sealer()
traces = [Path(path) for path in sys.argv[1:]]
for trace in traces:
    sealer.opened(trace)
sealer.closed(traces[0])
print([Path(f"/proc/self/task/{os.getpid()}/children").read_text()], flush=True)
time.sleep(600)
"""


def appears(path: Path, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.exists()


def test_traces_are_sealed_when_closed_and_when_the_server_is_killed(tmp_path: Path) -> None:
    steps = [step([("a", 0, 4)], new=("a",)), step([("b", 0, 4)], new=("b",), finished=("a",)), step([("c", 0, 1)], new=("c",))]
    full, last = serve(tmp_path, steps, limit=4 * 8)[:2]
    (tmp_path / FINISHED_FILE).write_text("".join(finished_line(name, [5, 6]) for name in "abc"))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(full), str(last)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        # No child of the server: vLLM kills an engine's whole tree.
        assert server.stdout.readline() == "['']\n"
        assert appears(full / "manifest.json")
        assert not (last / "manifest.json").exists()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert appears(last / "manifest.json")
    assert Trace.open(full).problems.column("source_key").to_pylist() == ["a"]
    assert Trace.open(last).problems.column("source_key").to_pylist() == ["b"]


def test_only_unfinished_traces_can_be_finished(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"is not an unsealed trace: expected metadata\.json and capture/"):
        finish(tmp_path)
    assert next_trace(tmp_path).name == "trace-00000"
    (tmp_path / "trace-00041" / CAPTURE_FOLDER).mkdir(parents=True)
    assert next_trace(tmp_path).name == "trace-00042"


def post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    address = f"http://127.0.0.1:{port}/v1/completions"
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers), timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


@pytest.mark.engine
@pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")
def test_a_real_server_records_its_traffic_and_closes_the_trace_on_sigterm(tmp_path: Path) -> None:
    out = tmp_path / "served"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "SPECMOE_CAPTURE": "1",
        "SPECMOE_CAPTURE_OUT": str(out),
        "SPECMOE_CAPTURE_LOGITS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
    }
    command = ["--model", str(demo_model_folder())]
    command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--no-enable-prefix-caching"]
    module = "vllm.entrypoints.openai.api_server"
    server = warm.start(module, *command, environment=environment, log=tmp_path / "log", warm_children=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.runs, (tmp_path / "log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)
        body = {"model": "demo", "prompt": "A train leaves", "max_tokens": 30, "temperature": 0}
        bodies = [{**body, "prompt": f"def f{number}(", "vllm_xargs": {"problem_id": 10 + number}} for number in range(8)]
        bodies += [body, {**body, "vllm_xargs": {"problem_id": "review 3"}}, {**body, "n": 2, "temperature": 1.0}]
        bodies += [{**body, "prompt": "def add(", "stop": ["e"], "vllm_xargs": {"problem_id": 30}}]
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda b: post(port, b), bodies))
        os.kill(server.pid, signal.SIGTERM)
        server.wait(60)
    finally:
        if server.runs:
            os.killpg(server.pid, signal.SIGKILL)
    assert appears(out / "trace-00000" / "manifest.json"), (tmp_path / "log").read_text()
    trace = Trace.open(out / "trace-00000")
    problems = {problem["problem_id"]: problem for problem in trace.problems.to_pylist()}
    assert sorted(problems) == [0, 1, 2, 3, *range(10, 18), 30]
    assert problems[30]["finish_reason"] == answers[11]["choices"][0]["finish_reason"] == "stop"
    for number in range(8):
        assert problems[10 + number]["prompt"].endswith(f"def f{number}(")
        assert problems[10 + number]["output"] == answers[number]["choices"][0]["text"]
    keys = [problems[i]["source_key"] for i in range(4)]
    assert "review 3" in keys
    assert sum(answers[8]["id"] in key for key in keys) == 1
    assert_complete(trace)
    positions, layers, logits_TLE = trace.values("logits", 10)
    assert (positions == trace.arrays(10).token_ids_T).all()
    assert logits_TLE.shape[1:] == (len(layers), 8)
    assert (trace.path / "gates.safetensors").is_file()
    assert assert_agrees(trace, load_oracle(demo_model_folder())) > 12 * 30 * 8
    assert np.unique(trace.load().problem_ids_T).size == 13
