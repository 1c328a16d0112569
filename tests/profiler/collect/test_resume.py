"""Collections that are killed: what was written stays readable, and --resume ends where an uninterrupted run does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support import warm

from profiler.capture.requests import COMPLETIONS_FILE, PLANNED_FILE, read_requests
from profiler.capture.sealing import captured_positions, run_folder, runs_of
from profiler.collect.job import collect
from profiler.collect.options import LocalOptions
from profiler.engines import Engine, start_engine
from profiler.engines.vllm import is_installed
from profiler.errors import EngineError, TraceError
from profiler.importers import find_format, import_trace
from profiler.trace.reader import Trace
from profiler.trace.stream import INPUTS_STREAM, ROUTING_STREAM, InputsWriter, read_index
from profiler.trace.writer import exclusive, write_metadata

KILLS = 20


def options(out: Path, **changes: object) -> LocalOptions:
    settings: dict[str, Any] = {
        "model": "demo",
        "dataset": "demo-math",
        "out": out,
        "num_problems": 3,
        "engine": "transformers",
        "max_new_tokens": 4,
        "dtype": "float32",
    }
    return LocalOptions(**(settings | changes))


def assert_same(first: Trace, second: Trace) -> None:
    """Same problems, tokens and routing, to the bit."""
    assert second.faults(verify=True) == []
    assert first.metadata.gaps == second.metadata.gaps == []
    assert first.problems.equals(second.problems)
    assert first.tokens.equals(second.tokens)
    assert first.to_arrow().equals(second.to_arrow())


def run_collection(out: Path, seconds: float | None = None) -> int:
    """Collect into `out`, kill after `seconds`, and return the exit code."""
    command = ["collect", "--model", "demo", "--dataset", "demo-math,demo-code,demo-reviews", "--engine", "transformers"]
    command += ["--num-problems", "18", "--max-new-tokens", "20", "--dtype", "float32", "--resume", "--out", str(out)]
    running = warm.start("specmoe", *command)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGKILL)
    return running.wait(300)


def captured_tokens(out: Path) -> int:
    found = [read_index(run_folder(out, run) / ROUTING_STREAM) for run in runs_of(out)]
    return sum(len(index.token_ids_N) for index in found if index is not None)


@pytest.mark.engine
def test_twenty_kills_at_random_moments_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    assert run_collection(tmp_path / "whole") == 0
    began = time.monotonic()
    assert run_collection(tmp_path / "again") == 0
    takes = time.monotonic() - began
    whole = Trace.open(tmp_path / "whole")
    assert_same(whole, Trace.open(tmp_path / "again"))
    moments = random.Random(4)
    kills, traces, resumed = 0, 0, 0
    while kills < KILLS:
        out = tmp_path / f"killed-{traces}"
        traces += 1
        before = 0
        while not (out / "manifest.json").exists():
            if kills < KILLS:
                code = run_collection(out, moments.uniform(0.0, takes))
                kills += code == -signal.SIGKILL
            else:
                code = run_collection(out)
            assert code in (0, -signal.SIGKILL)
            if code and (out / "metadata.json").exists() and not (out / "manifest.json").exists():
                # Whatever was readable stays readable, and the trace says that it is not whole.
                now = captured_tokens(out)
                assert now >= before
                before = now
                (fault,) = Trace.open(out, allow_incomplete=True).faults()
                assert fault.startswith("no manifest.json")
                assert (f"{now:,} tokens" in fault) == (now > 0)
        trace = Trace.open(out)
        resumed += trace.metadata.capture["runs"] > 1
        assert_same(whole, trace)
    assert kills == KILLS
    # The kills did hit collections that had something to resume.
    assert resumed >= 1


@pytest.mark.engine
@pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")
def test_a_killed_vllm_run_ends_with_its_engine_and_is_resumed(tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return [
            *("specmoe", "collect", "--model", "demo", "--dataset", "demo-math,demo-code,demo-reviews"),
            *("--num-problems", "45", "--max-new-tokens", "200", "--dtype", "float32", "--resume", "--out", str(out)),
        ]

    out = tmp_path / "killed"
    killed = warm.start(*command(out), warm_children=True)
    deadline = time.monotonic() + 120
    while not (out.is_dir() and runs_of(out) and captured_tokens(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    engine = psutil.Process(killed.pid).children(recursive=True)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(20) == -signal.SIGKILL
    _, alive = psutil.wait_procs(engine, timeout=20)
    assert alive == []
    assert not (out / "manifest.json").exists()
    there = captured_tokens(out)
    assert there > 0
    # What there is can also be taken as it is.
    assert find_format(out).name == "interrupted"
    salvaged = import_trace(out, tmp_path / "salvaged")
    assert 0 < len(salvaged.load()) <= there
    assert "the collection was interrupted" in salvaged.metadata.gaps[0]
    # The engine in the command's own process, which imports vLLM once instead of three times.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = warm.run(*command(out), environment=environment)
    assert done.returncode == 0, done.stderr
    assert "problems finished by earlier runs" in done.stdout
    assert warm.run(*command(tmp_path / "whole"), environment=environment).returncode == 0
    assert_same(Trace.open(tmp_path / "whole"), Trace.open(out))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "trace"
    collect(options(out))
    return out


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection that ran to its end but was killed before it was sealed."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("profiler.collect.collector.finish_trace", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(options(tmp_path / "trace"))
    return tmp_path / "trace"


def test_what_is_finished_needs_no_engine(unfinished: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_engine(*_: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("profiler.collect.collector.start_engine", no_engine)
    assert collect(options(unfinished, resume=True)).resumed == 3
    assert_same(Trace.open(finished), Trace.open(unfinished))
    # And what is complete stays as it is, but for what a kill just before the end had left.
    before = (unfinished / "manifest.json").read_bytes()
    (unfinished / "capture" / "run-00000").mkdir(parents=True)
    assert collect(options(unfinished, resume=True)).resumed == 3
    assert (unfinished / "manifest.json").read_bytes() == before
    assert not (unfinished / "capture").exists()


def test_gaps_are_said_once_though_sealing_was_cut_short(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completions = run_folder(unfinished, 0) / COMPLETIONS_FILE
    # One position came from a prefix cache.
    completions.write_text(completions.read_text().replace('"cached_tokens":0', '"cached_tokens":1'))
    for _ in range(2):
        with monkeypatch.context() as context:
            context.setattr("profiler.capture.finish.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                collect(options(unfinished, resume=True))
    collect(options(unfinished, resume=True))
    (gap,) = Trace.open(unfinished).metadata.gaps
    assert "came from the prefix cache: problem 0, 1, 2" in gap


def test_a_problem_whose_last_rows_are_missing_runs_again(unfinished: Path, finished: Path) -> None:
    stream = run_folder(unfinished, 0) / ROUTING_STREAM
    # The last block of rows is torn, as a kill in the middle of a write leaves it.
    os.truncate(stream, stream.stat().st_size - 100)
    positions = captured_positions(run_folder(unfinished, 0))
    assert len(positions[ROUTING_STREAM]) == 2
    assert collect(options(unfinished, resume=True)).resumed == 2
    assert_same(Trace.open(finished), Trace.open(unfinished))
    assert Trace.open(unfinished).metadata.capture["runs"] == 2


def test_a_torn_completion_runs_again(unfinished: Path, finished: Path) -> None:
    completions = run_folder(unfinished, 0) / COMPLETIONS_FILE
    os.truncate(completions, completions.stat().st_size - 10)
    assert collect(options(unfinished, resume=True)).resumed == 2
    assert_same(Trace.open(finished), Trace.open(unfinished))


def test_a_problem_whose_request_read_other_tokens_runs_again(unfinished: Path, finished: Path, tmp_path: Path) -> None:
    run = run_folder(unfinished, 0)
    first, *others = read_requests(run)
    with InputsWriter(run) as writer:
        for request in others:
            writer.add(request.number, np.arange(len(request.prompt_token_ids)), np.array(request.prompt_token_ids))
        writer.add(first.number, np.arange(2), np.array([first.prompt_token_ids[0], first.prompt_token_ids[1] + 1]))
    # What there is can be taken as it is, without that problem.
    taken = import_trace(unfinished, tmp_path / "taken")
    assert taken.problems.column("problem_id").to_pylist() == [1, 2]
    assert any("left out problem 0: its request 0 of run-00000 read token" in gap for gap in taken.metadata.gaps)
    assert collect(options(unfinished, resume=True)).resumed == 2
    assert_same(Trace.open(finished), Trace.open(unfinished))


def test_inputs_of_another_layout_are_refused(unfinished: Path, tmp_path: Path) -> None:
    run = run_folder(unfinished, 0)
    shutil.copy(run / ROUTING_STREAM, run / INPUTS_STREAM)
    with pytest.raises(TraceError, match=r"inputs\.arrows: its columns are not vocab_ids of layers \[0\]"):
        import_trace(unfinished, tmp_path / "taken")


def test_a_collection_of_a_version_without_some_settings_is_resumed(unfinished: Path, finished: Path) -> None:
    metadata = json.loads((unfinished / "metadata.json").read_text())
    del metadata["capture"]["moe_backend"], metadata["capture"]["moe_kernels"]
    (unfinished / "metadata.json").write_text(json.dumps(metadata))
    (run_folder(unfinished, 0) / COMPLETIONS_FILE).write_text("")
    assert collect(options(unfinished, resume=True)).resumed == 0
    assert_same(Trace.open(finished), Trace.open(unfinished))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_new_tokens": 5}, "was started with sampling.max_new_tokens 4, now it is 5"),
        ({"num_problems": 2}, r"was started with datasets\[0\]\.problems \d, now it is 2"),
        ({"engine": "vllm"}, "was started with engine 'transformers', now it is 'vllm'"),
        ({"dtype": "bfloat16"}, None),
    ],
)
def test_a_collection_is_not_resumed_with_other_settings(unfinished: Path, changes: dict[str, Any], reason: str | None) -> None:
    if reason is None:
        # What only the engine knows is found out when it has to run.
        (run_folder(unfinished, 0) / COMPLETIONS_FILE).write_text("")
        reason = "was started with model.dtype 'float32', now it is 'bfloat16'"
    with pytest.raises(TraceError, match=reason):
        collect(options(unfinished, resume=True, **changes))
    assert captured_tokens(unfinished) > 0


def test_a_run_on_another_device_continues_with_other_kernels(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = Trace.open(unfinished, allow_incomplete=True).metadata
    captured = metadata.capture | {"moe_kernels": {"MarlinExperts": None}}
    write_metadata(unfinished, metadata.model_copy(update={"capture": captured}))
    (run_folder(unfinished, 0) / COMPLETIONS_FILE).write_text("")

    def start_on_another_device(*arguments: Any) -> Engine:
        engine = start_engine(*arguments)
        engine.moe_kernels = {"TritonExperts": "Fused"}
        return engine

    monkeypatch.setattr("profiler.collect.collector.start_engine", start_on_another_device)
    kernels = {"MarlinExperts": None, "TritonExperts": "Fused"}
    assert collect(options(unfinished, resume=True)).moe_kernels == kernels
    assert Trace.open(unfinished).metadata.capture["moe_kernels"] == kernels


def test_a_changed_dataset_is_found_out(unfinished: Path) -> None:
    planned = run_folder(unfinished, 0) / PLANNED_FILE
    lines = planned.read_text().splitlines()
    record = json.loads(lines[0]) | {"prompt": "another one"}
    planned.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    with pytest.raises(TraceError, match="problem 0 has another prompt than before"):
        collect(options(unfinished, resume=True))


def test_without_resume_an_unfinished_collection_is_left_alone(unfinished: Path) -> None:
    with pytest.raises(TraceError, match="holds an unfinished collection: resume it"):
        collect(options(unfinished))
    assert captured_tokens(unfinished) > 0


def test_a_second_collector_is_refused_and_touches_nothing(unfinished: Path, tmp_path: Path) -> None:
    with exclusive(unfinished), pytest.raises(TraceError, match="another process is collecting into it"):
        collect(options(unfinished, resume=True))
    assert captured_tokens(unfinished) > 0
    (tmp_path / "new").mkdir()
    with exclusive(tmp_path / "new"), pytest.raises(TraceError, match="another process is collecting into it"):
        collect(options(tmp_path / "new"))


def test_what_a_kill_leaves_before_the_first_file_is_not_an_obstacle(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "trace"
    out.mkdir()
    (out / ".metadata.json.123.tmp").write_text("{")
    assert collect(options(out, resume=True)).resumed == 0
    assert_same(Trace.open(finished), Trace.open(out))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(TraceError, match="is not an empty folder"):
        collect(options(tmp_path / "mine", resume=True))


def test_an_engine_that_fails_keeps_what_there_is_and_says_how_to_go_on(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from profiler.engines import transformers

    route, calls = transformers.route, 0

    def fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # the engine tries one while it starts
            raise EngineError("out of memory")
        return route(*arguments)

    with monkeypatch.context() as context:
        context.setattr(transformers, "route", fails)
        with pytest.raises(EngineError, match="out of memory; what was recorded before is kept: resume the collection"):
            collect(options(tmp_path / "trace"))
    assert collect(options(tmp_path / "trace", resume=True)).resumed == 2
    assert_same(Trace.open(finished), Trace.open(tmp_path / "trace"))


@pytest.mark.parametrize("name", ["gates.safetensors", "routing.arrows"])
def test_links_in_an_untrusted_collection_are_not_followed(unfinished: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.key").write_text("secret")
    path = run_folder(unfinished, 0) / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "secret.key")
    with pytest.raises(TraceError, match="is not a regular file"):
        import_trace(unfinished, tmp_path / "taken")
    assert not (tmp_path / "taken").exists()


def test_an_unfinished_collection_can_be_taken_as_it_is(unfinished: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(unfinished, tmp_path / "copy")
    completions = run_folder(tmp_path / "copy", 0) / COMPLETIONS_FILE
    completions.write_text("".join(completions.read_text().splitlines(keepends=True)[:2]))
    trace = import_trace(tmp_path / "copy", tmp_path / "taken")
    assert trace.problems.column("finish_reason").to_pylist()[2] == "abort"
    assert trace.problems.column("prompt").equals(Trace.open(finished).problems.column("prompt"))
    assert trace.metadata.gaps[0] == "the collection was interrupted: 3 of 3 problems had started"
    assert np.unique(trace.load().problem_ids_T).tolist() == [0, 1, 2]
    assert captured_tokens(tmp_path / "copy") == captured_tokens(unfinished)
