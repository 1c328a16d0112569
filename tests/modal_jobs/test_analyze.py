"""`modal run modal_jobs/analyze.py`: what parts say together is what one pass over the whole says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.offline_modal import OfflineModal, last_line, needs_modal

from analysis.analyze import analyze_trace
from modal_jobs.analyzing import AnalysisJob, count_part, merge_counts, plan_analysis
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import MANIFEST_FILE

ANALYZE = ["run", "modal_jobs/analyze.py"]


def said(out: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Everything in numbers, but for the trace's name."""
    document = json.loads((out / "statistics.json").read_text())
    del document["trace"]
    with np.load(out / "transitions.npz", allow_pickle=False) as stored:
        return document, stored["probabilities"]


@pytest.mark.modal
@needs_modal
def test_a_run_and_a_trace_are_analysed_where_they_are(trace: Trace, tmp_path: Path) -> None:
    account = OfflineModal(tmp_path / "account")
    job = ["--model", "demo", "--engine", "transformers", "--dtype", "float32", "--dataset", "demo-math,demo-code"]
    job += ["--num-problems", "12", "--max-new-tokens", "2", "--shard-size", "6"]
    collected = account.run("run", "modal_jobs/collect.py", *job, "--out", str(tmp_path / "merged"))
    assert collected.returncode == 0, collected.stderr
    merged = Trace.open(tmp_path / "merged")
    run_id = str(merged.metadata.capture["run_id"])

    # One container for both parts: two would compile the same loops at the same time.
    done = account.run(*ANALYZE, "--run-id", run_id, "--containers", "1", "--out", str(tmp_path / "there"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "part 2 of 2: counted" in done.stdout
    assert "Expert load: Load entropy is" in done.stdout
    analyze_trace(merged, tmp_path / "here")
    here, there = said(tmp_path / "here"), said(tmp_path / "there")
    assert here[0] == there[0]
    assert np.array_equal(here[1], there[1])

    again = account.run(*ANALYZE, "--run-id", run_id, "--out", str(tmp_path / "again"))
    assert again.stdout.count("had been counted before") == 2

    done = account.run(*ANALYZE, "--trace", str(trace.path), "--containers", "2", "--out", str(tmp_path / "uploaded"))
    assert done.returncode == 0, done.stdout + done.stderr
    analyze_trace(trace, tmp_path / "local")
    assert said(tmp_path / "uploaded")[0] == said(tmp_path / "local")[0]

    refused = account.run(*ANALYZE, "--run-id", "none", "--out", str(tmp_path / "refused"))
    assert refused.returncode == 1
    assert "analyze: no run or trace none on the Volume" in last_line(refused)
    assert "Traceback" not in refused.stdout + refused.stderr
    assert not (tmp_path / "refused").exists()


def counted(volume: Path, job: AnalysisJob) -> list[bytes]:
    for number in range(len(job.parts)):
        count_part(volume, job, number)
    return [(volume / job.stored(number)).read_bytes() for number in range(len(job.parts))]


@pytest.fixture
def volume(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Volume with a trace that is cut into three parts, although it has but one row group."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "mine").symlink_to(trace.path)
    monkeypatch.setattr(Trace, "spans", lambda self, parts: [range(4), range(4, 13), range(13, 1000)])
    return tmp_path / "volume"


def test_parts_of_one_trace_add_up(volume: Path, trace: Trace) -> None:
    from analysis.counts.counting import TraceCounts

    job = plan_analysis(volume, "mine", pieces=3, hops=2)
    total = merge_counts(job, counted(volume, job))
    whole = TraceCounts(job.axes)
    whole.count(trace)
    for name, part in whole.parts.items():
        for key, array in part.state().items():
            assert np.array_equal(array, total.parts[name].state()[key]), f"{name}: {key}"
    assert count_part(volume, job, 0)


def test_a_doubt_about_several_shards_is_said_once(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modal_jobs.analyzing.doubts", lambda _: ["75% are alike", "no tokens", "80% are alike", "9% are not"])
    assert plan_analysis(volume, "mine", pieces=3, hops=1).caveats[-3:] == ("75% are alike", "no tokens", "9% are not")


def test_other_content_or_hops_are_counted_anew(volume: Path, trace: Trace) -> None:
    keys = {plan_analysis(volume, "mine", pieces=3, hops=hops).key for hops in (1, 2)}
    manifest = trace.path / MANIFEST_FILE
    kept = manifest.read_bytes()
    try:
        manifest.write_bytes(kept + b"\n")
        keys.add(plan_analysis(volume, "mine", pieces=3, hops=1).key)
    finally:
        manifest.write_bytes(kept)
    assert len(keys) == 3


def test_broken_counts_are_named(volume: Path) -> None:
    job = plan_analysis(volume, "mine", pieces=3, hops=1)
    with pytest.raises(TraceError, match=r"mine/analysis-\w+/part-00001\.npz: stored counts are not readable.*modal volume rm"):
        merge_counts(job, [counted(volume, job)[0], b"broken"])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no run or trace mine on the Volume"):
        plan_analysis(tmp_path, "mine", pieces=2, hops=None)
