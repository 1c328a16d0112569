"""Shards on a Volume: finished, begun and resumed, spoiled. Real collections with the transformers engine, no Modal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from modal_jobs import shards
from modal_jobs.analyzing import plan_analysis
from modal_jobs.download import download_run, fetch_trace
from modal_jobs.shards import collect_shard, dollars_per_hour, finished_attempt, finished_parts, shard_folder
from modal_jobs.training import open_source
from profiler.collect.collection import CollectProgress
from profiler.collect.collector import TraceCollector
from profiler.collect.options import RentedOptions
from profiler.engines import EngineOptions
from profiler.errors import DatasetError, TraceError
from profiler.models.gpus import find_gpu
from profiler.plan.estimate import HOST_DOLLARS
from profiler.plan.job import CollectJob, make_plan, read_shard, write_job
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE


class LocalVolume:
    """A folder with what is used of a Volume."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def listdir(self, path: str, *, recursive: bool = False) -> list[Entry]:
        folder = self.root / path.lstrip("/")
        return [Entry(str(found.relative_to(self.root))) for found in (folder.rglob("*") if recursive else folder.iterdir())]

    def read_file(self, path: str) -> Iterator[bytes]:
        content = (self.root / path).read_bytes()
        yield from (content[start : start + 1000] for start in range(0, len(content), 1000))


class Entry:
    def __init__(self, path: str) -> None:
        self.path = path


@pytest.fixture(scope="module")
def collector() -> Iterator[TraceCollector]:
    with TraceCollector("demo", engine="transformers", engine_options=EngineOptions(dtype="float32")) as started:
        yield started


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[CollectJob, Path]:
    """Ten problems in two shards, as they are uploaded."""
    options = RentedOptions(
        model="demo",
        dataset="demo-math,demo-code",
        num_problems=10,
        max_new_tokens=4,
        engine="transformers",
        dtype="float32",
        shard_size=5,
    )
    plan = make_plan(options)
    folder = tmp_path_factory.mktemp("volume") / plan.job.run_id
    write_job(folder, plan.job, plan.problems)
    return plan.job, folder


@pytest.fixture
def run(job: tuple[CollectJob, Path], tmp_path: Path) -> Path:
    folder = tmp_path / job[0].run_id
    shutil.copytree(job[1], folder)
    return folder


def collect(run: Path, job: CollectJob, shard: int, collector: TraceCollector, said: list[str]) -> shards.ShardReport:
    return collect_shard(run, job, shard, collector, commit=lambda: None, say=said.append, spent=lambda: 0.5)


def test_a_finished_shard_is_not_collected_again(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = collect(run, job[0], 0, collector, said)
    assert (first.problems, first.cached, first.error) == (5, False, None)
    assert any(line.startswith("shard 1 of 2: 5 of 5 problems") and line.endswith("$0.50 on this machine") for line in said)
    monkeypatch.setattr(collector, "collect", None)
    again = collect(run, job[0], 0, collector, said)
    assert (again.cached, again.attempt, again.tokens, again.rows) == (True, first.attempt, first.tokens, first.rows)


def test_a_shard_without_the_problems_that_cannot_be_run_is_finished(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, bad = collector.start(), read_shard(run, job[0], 0)[3].prompt
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda text: [] if text == bad else encode(text))
    said: list[str] = []
    assert collect(run, job[0], 0, collector, said).problems == 4
    collect(run, job[0], 1, collector, said)
    assert collect(run, job[0], 0, collector, said).cached
    trace = download_run(LocalVolume(run.parent), job[0].run_id, tmp_path / "trace", say=said.append)
    assert trace.problems.column("problem_id").to_pylist() == [0, 1, 2, *range(4, 10)]
    assert trace.metadata.capture["skipped_problems"] == 1
    assert trace.metadata.gaps == ["skipped problem 3 (demo-math 3): its prompt has no tokens"]


def test_a_shard_of_problems_that_cannot_be_run_is_finished_without_a_trace(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, said = collector.start(), list[str]()
    encode, bad = engine.encode, [problem.prompt for problem in read_shard(run, job[0], 1).values()]
    monkeypatch.setattr(engine, "encode", lambda text: [] if text in bad else encode(text))
    report = collect(run, job[0], 1, collector, said)
    assert (report.error, report.problems, len(report.gaps)) == (None, 0, 5)
    assert collect(run, job[0], 0, collector, said).problems == 5
    again = collect(run, job[0], 1, collector, said)
    assert (again.cached, again.gaps) == (True, report.gaps)
    # All that reads a run on the Volume takes the other shard.
    volume = LocalVolume(run.parent)
    trace = download_run(volume, job[0].run_id, tmp_path / "trace", say=said.append)
    assert trace.problems.column("problem_id").to_pylist() == [0, 1, 2, 3, 4]
    assert trace.metadata.capture["skipped_problems"] == 5
    assert tuple(trace.metadata.gaps) == report.gaps
    assert report.gaps[0] == "skipped problem 5 (demo-code 0): its prompt has no tokens"
    analysis = plan_analysis(run.parent, job[0].run_id, pieces=1, hops=None)
    assert [len(analysis.parts), *analysis.described().metadata.gaps] == [1, *report.gaps]
    assert open_source(run.parent, job[0].run_id, tmp_path / "work").metadata.gaps == list(report.gaps)


def test_a_run_of_problems_that_cannot_be_run_has_no_trace(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(collector.start(), "encode", lambda _: [])
    for shard in range(2):
        assert len(collect(run, job[0], shard, collector, []).gaps) == 5
    reason = rf"no problem of {job[0].run_id} can be run; skipped problem 0 \(demo-math 0\): its prompt has no tokens"
    with pytest.raises(TraceError, match=reason):
        download_run(LocalVolume(run.parent), job[0].run_id, tmp_path / "trace", say=print)
    with pytest.raises(TraceError, match=reason):
        finished_parts(run.parent, job[0].run_id)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"problems": "many"}', '{"problems": 1, "gaps": [2]}'])
def test_a_broken_note_of_skipped_problems_is_named(run: Path, job: tuple[CollectJob, Path], content: str) -> None:
    shard_folder(run, 1).mkdir()
    (shard_folder(run, 1) / "skipped.json").write_text(content)
    with pytest.raises(TraceError, match=r"shard-00001/skipped\.json does not say which problems were skipped"):
        download_run(LocalVolume(run.parent), job[0].run_id, run / "trace", say=print)


def test_an_interrupted_attempt_is_continued_elsewhere(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This machine is taken away after two problems; what it had committed by then stays.
    committed = tmp_path / "committed"

    def commit() -> None:
        if not committed.exists():
            shutil.copytree(run, committed)

    # Only the commit at the end: on a busy machine the one of every ten seconds comes before the second problem.
    monkeypatch.setattr(shards, "COMMIT_SECONDS", 1e6)
    monkeypatch.setattr(shards, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(collector.start(), "_batch", 1)

    def say(line: str) -> None:
        if "2 of 5 problems" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_shard(run, job[0], 1, collector, commit=commit, say=say)
    assert finished_attempt(committed, job[0], 1) is None
    left = list(shard_folder(committed, 1).iterdir())
    assert len(left) == 1

    said: list[str] = []
    report = collect(committed, job[0], 1, collector, said)
    assert "shard 2 of 2: resuming: 2 of 5 problems are finished" in said
    assert report.problems == 5
    # Each has a folder of its own: the other machine may still write.
    assert {path.name for path in shard_folder(committed, 1).iterdir()} == {left[0].name, report.attempt}

    untouched = tmp_path / "untouched"
    shutil.copytree(job[1], untouched)
    collect(untouched, job[0], 1, collector, said)
    resumed, whole = (Trace.open(finished_attempt(folder, job[0], 1) or folder) for folder in (committed, untouched))
    assert resumed.to_arrow().equals(whole.to_arrow())


def test_an_attempt_that_cannot_be_resumed_is_thrown_away(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector
) -> None:
    said: list[str] = []
    report = collect(run, job[0], 0, collector, said)
    complete = shard_folder(run, 0) / str(report.attempt)
    (complete / MANIFEST_FILE).unlink()
    (complete / "capture").mkdir()
    (complete / "metadata.json").write_text("{}")
    again = collect(run, job[0], 0, collector, said)
    assert again.problems == 5
    assert any("starting over, because its earlier attempt cannot be resumed" in line for line in said)
    assert finished_attempt(run, job[0], 0) == shard_folder(run, 0) / str(again.attempt)


def test_a_complete_attempt_with_a_fault_is_collected_again(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector
) -> None:
    said: list[str] = []
    report = collect(run, job[0], 0, collector, said)
    next((shard_folder(run, 0) / str(report.attempt) / "routing").iterdir()).unlink()
    assert finished_attempt(run, job[0], 0) is None
    assert collect(run, job[0], 0, collector, said).attempt != report.attempt
    assert finished_attempt(run, job[0], 0) is not None


def test_a_job_without_its_problems_is_refused(run: Path, job: tuple[CollectJob, Path], collector: TraceCollector) -> None:
    lines = (run / "problems.jsonl").read_text().splitlines(keepends=True)
    (run / "problems.jsonl").write_text("".join(lines[:7]))
    with pytest.raises(DatasetError, match=r"problems\.jsonl ends before problem 10"):
        collect(run, job[0], 1, collector, [])
    (run / "problems.jsonl").write_text("".join([*lines[:6], "{}\n", *lines[7:]]))
    with pytest.raises(DatasetError, match=r"problems\.jsonl, line 7 is not a problem"):
        collect(run, job[0], 1, collector, [])


def test_both_shards_make_one_verified_trace(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, tmp_path: Path
) -> None:
    said: list[str] = []
    collect(run, job[0], 0, collector, said)
    volume = LocalVolume(run.parent)
    with pytest.raises(TraceError, match=f"1 of 2 shards of {job[0].run_id} are finished: run the same collection again"):
        download_run(volume, job[0].run_id, tmp_path / "trace", say=said.append)
    collect(run, job[0], 1, collector, said)
    trace = download_run(volume, job[0].run_id, tmp_path / "trace", say=said.append)
    assert trace.faults(verify=True) == []
    assert trace.problems.num_rows == 10
    assert trace.metadata.capture["parts"] == 2
    assert trace.metadata.capture["devices"] == {"CPU": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == [job[0].run_id, "trace"]


def test_a_manifest_that_leaves_its_folder_is_refused(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, tmp_path: Path
) -> None:
    said: list[str] = []
    for shard in (0, 1):
        collect(run, job[0], shard, collector, said)
    attempt = next(shard_folder(run, 1).iterdir())
    manifest = attempt / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"tokens.parquet"', '"../../../../tokens.parquet"'))
    volume = LocalVolume(run.parent)
    with pytest.raises(TraceError, match=r"manifest.json on the Volume is not a manifest: .* leaves the trace directory"):
        fetch_trace(volume, str(attempt.relative_to(run.parent)), tmp_path / "fetched")
    # Such a shard is not finished.
    with pytest.raises(TraceError, match=r"1 of 2 shards of .* are finished"):
        download_run(volume, job[0].run_id, tmp_path / "trace", say=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [job[0].run_id]


def test_leftovers_of_other_attempts_are_passed_over(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, tmp_path: Path
) -> None:
    # A manifest whose files another machine removed, one that was cut off, and a complete trace of other problems.
    said: list[str] = []
    for shard in (0, 1):
        collect(run, job[0], shard, collector, said)
    complete = next(shard_folder(run, 1).iterdir())
    for name in ("00000000T000000-a", "00000000T000000-b"):
        (shard_folder(run, 1) / name).mkdir()
        text = (complete / MANIFEST_FILE).read_text()
        (shard_folder(run, 1) / name / MANIFEST_FILE).write_text(text if name.endswith("a") else text[:50])
    shutil.copytree(next(shard_folder(run, 0).iterdir()), shard_folder(run, 1) / "00000000T000000-c")
    for name in ("shard--1", "shard-old", "shard-00007"):
        shutil.copytree(complete, run / name / "x")
    assert finished_attempt(run, job[0], 1) == complete
    # And what an earlier download left where this one goes.
    stale = tmp_path / "trace.shards" / "shard-00000" / "routing" / "part-00001.parquet"
    stale.parent.mkdir(parents=True)
    shutil.copyfile(complete / "routing" / "part-00000.parquet", stale)
    trace = download_run(LocalVolume(run.parent), job[0].run_id, tmp_path / "trace", say=said.append)
    assert trace.faults(verify=True) == []
    assert trace.problems.column("problem_id").to_pylist() == list(range(10))
    assert sum(len(chunk) for chunk in trace.chunks()) * len(trace.metadata.model.moe_layers) == trace.num_rows


def test_a_commit_that_fails_is_tried_again(
    run: Path, job: tuple[CollectJob, Path], collector: TraceCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "COMMIT_SECONDS", 0.05)
    commits: list[int] = []

    def commit() -> None:
        commits.append(len(commits))
        if len(commits) == 1:
            raise RuntimeError("the server is busy")

    said: list[str] = []
    collect_shard(run, job[0], 0, collector, commit=commit, say=said.append)
    assert "recorded files could not be committed: the server is busy" in said
    assert len(commits) > 2


def test_what_a_machine_costs_follows_the_gpu_that_it_has() -> None:
    asked = find_gpu("A100-80GB")
    assert dollars_per_hour("NVIDIA A100-SXM4-80GB", asked) == pytest.approx(2.50 + HOST_DOLLARS)
    assert dollars_per_hour("NVIDIA H100 80GB HBM3", asked) == pytest.approx(3.95 + HOST_DOLLARS)
    assert dollars_per_hour("CPU", asked) == pytest.approx(2.50 + HOST_DOLLARS)


def test_progress_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch, collector: TraceCollector) -> None:
    from profiler.collect.usage import Usage

    said: list[str] = []
    with shards._reporting(collector, "shard 1 of 1", said.append, lambda: 1.25):
        for second in range(60):
            now = CollectProgress(
                problems=second, total=60, tokens=100 * second, seconds=float(second), usage=Usage(host_bytes=2 * 10**9)
            )
            collector.on_progress(now)
    assert len(said) == 6
    assert said[1] == "shard 1 of 1: 10 of 60 problems, 100 tokens/s, peak memory 2.0 GB, about $1.25 on this machine"
