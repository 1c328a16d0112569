"""Parts of one collection become the trace that a single collection would have written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from profiler.collect.collection import Collection
from profiler.collect.collector import TraceCollector
from profiler.collect.selection import Selection, describe, select
from profiler.engines import EngineOptions, Sampling
from profiler.errors import TraceError
from profiler.models.resolve import demo_model_folder
from profiler.trace.merge import merge_traces
from profiler.trace.reader import Trace
from profiler.trace.writer import write_manifest, write_metadata


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, and the same collection in three parts of unequal size, cut inside a dataset."""
    folder = tmp_path_factory.mktemp("parts")
    selection = Selection(datasets=("demo-math", "demo-code"), num_problems=9, sampling=Sampling(max_new_tokens=5))
    problems = select(selection, str(demo_model_folder()))
    with TraceCollector("demo", engine="transformers", engine_options=EngineOptions(dtype="float32")) as collector:
        whole = Collection(out=folder / "whole", **describe(selection, problems))
        collector.collect(whole)
        for name, ids in (("c", range(6, 9)), ("a", range(4)), ("b", range(4, 6))):
            some = {problem_id: problems[problem_id] for problem_id in ids}
            counted = [
                dataset.model_copy(update={"problems": sum(p.dataset == dataset.name for p in some.values())})
                for dataset in whole.datasets
            ]
            collector.collect(replace(whole, problems=some, datasets=counted, out=folder / name))
    return folder


def test_merged_parts_equal_the_whole(parts: Path, tmp_path: Path) -> None:
    whole = Trace.open(parts / "whole")
    merged = merge_traces([parts / "c", parts / "a", parts / "b"], tmp_path / "merged", about={"synthetic": "here"})
    assert merged.faults(verify=True) == []
    assert merged.to_arrow().equals(whole.to_arrow())
    assert merged.tokens.equals(whole.tokens)
    assert merged.problems.equals(whole.problems)
    assert merged.metadata.datasets == whole.metadata.datasets
    assert merged.metadata.sampling == whole.metadata.sampling
    expected = {**whole.metadata.capture, "parts": 3, "runs": 3, "synthetic": "here", "devices": {"CPU": 3}}
    assert merged.metadata.capture == {name: value for name, value in expected.items() if name != "device"}
    assert merged.metadata.versions == whole.metadata.versions
    assert [len(chunk) for chunk in merged.chunks()]
    assert Trace.open(parts / "a").faults(verify=True) == []


def test_what_is_not_a_part_is_refused_and_leaves_nothing(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="overlap: whole has problem 8"):
        merge_traces([parts / "whole", parts / "c"], tmp_path / "out")
    shutil.copytree(parts / "b", tmp_path / "other")
    metadata = Trace.open(parts / "b").metadata
    write_metadata(tmp_path / "other", metadata.model_copy(update={"sampling": metadata.sampling | {"seed": 1}}))
    (tmp_path / "other" / "manifest.json").unlink()
    with pytest.raises(TraceError, match="other is incomplete"):
        merge_traces([parts / "a", tmp_path / "other"], tmp_path / "out")
    write_manifest(tmp_path / "other")
    with pytest.raises(TraceError, match=r"recorded with sampling .*'seed': 1.* not parts of one trace"):
        merge_traces([parts / "a", tmp_path / "other"], tmp_path / "out")
    with pytest.raises(TraceError, match="already holds a trace"):
        merge_traces([parts / "a"], parts / "whole")
    assert not (tmp_path / "out").exists()


def test_other_versions_devices_and_kernels_are_listed(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "b", tmp_path / "b")
    metadata = Trace.open(parts / "b").metadata
    kernels = {"OAITritonExperts": "OAITritonMxfp4ExpertsMonolithic"}
    captured = metadata.capture | {"device": "NVIDIA H100", "moe_kernels": kernels}
    changed = {"versions": metadata.versions | {"torch": "9.9"}, "capture": captured}
    write_metadata(tmp_path / "b", metadata.model_copy(update=changed))
    (tmp_path / "b" / "manifest.json").unlink()
    write_manifest(tmp_path / "b")
    # A file that its manifest does not list does not belong to the trace.
    shutil.copyfile(parts / "a" / "routing" / "part-00000.parquet", tmp_path / "b" / "routing" / "part-00001.parquet")
    merged = merge_traces([parts / "a", tmp_path / "b", parts / "c"], tmp_path / "merged")
    assert merged.metadata.versions["torch"] == f"{metadata.versions['torch']}, 9.9"
    assert merged.metadata.capture["devices"] == {"CPU": 2, "NVIDIA H100": 1}
    assert merged.metadata.capture["moe_kernels"] == kernels
    assert merged.to_arrow().equals(Trace.open(parts / "whole").to_arrow())
