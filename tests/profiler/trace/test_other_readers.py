"""A trace is plain Parquet: what the documentation promises of other tools, run with them."""

from __future__ import annotations

from pathlib import Path

import datasets
import duckdb
import numpy as np
import polars as pl
import pytest
from support.traces import MakeProblems, MakeTrace

from profiler.trace.hub import write_hub_folder
from profiler.trace.reader import Trace


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    return make_trace(random_problems(count=5, tokens=7, layers=3, num_experts=8, top_k=2), 8)


@pytest.fixture(autouse=True)
def _caches_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(trace: Trace) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for row in trace.to_arrow().to_pylist()]


def test_hugging_face_datasets_load_the_parts(trace: Trace) -> None:
    loaded = datasets.load_dataset("parquet", data_files=str(trace.path / "routing" / "*.parquet"), split="train")
    assert [tuple(row.values()) for row in loaded] == rows(trace)
    arrays = loaded.with_format("numpy")[:3]
    assert arrays["expert_ids"].shape == (3, 2)
    streamed = datasets.load_dataset("parquet", data_files=str(trace.path / "routing" / "*.parquet"), streaming=True)
    assert next(iter(streamed["train"]))["token_id"] == 0


def test_a_hub_folder_loads_by_configuration_and_is_a_trace(trace: Trace, tmp_path: Path) -> None:
    write_hub_folder(trace, tmp_path / "folder")
    loaded = datasets.load_dataset(str(tmp_path / "folder"), "routing", split="train")
    assert [tuple(row.values()) for row in loaded] == rows(trace)
    assert datasets.load_dataset(str(tmp_path / "folder"), split="train").column_names == loaded.column_names
    assert datasets.load_dataset(str(tmp_path / "folder"), "problems", split="train")["prompt"][1] == "prompt 1"
    assert datasets.load_dataset(str(tmp_path / "folder"), "tokens", split="train")["phase"][0] == "prefill"
    assert Trace.open(tmp_path / "folder").faults(verify=True) == []


def test_pandas_and_arrow_have_every_row(trace: Trace) -> None:
    frame = trace.to_pandas()
    assert list(frame.columns) == ["problem_id", "layer", "token_id", "expert_ids", "weights"]
    assert len(frame) == trace.num_rows == trace.to_arrow().num_rows
    assert frame.expert_ids[0].tolist() == trace.arrays(0).expert_ids_TLK[0, 0].tolist()


def test_duckdb_counts_experts_and_weights(trace: Trace) -> None:
    pairs = f"select layer, unnest(list_zip(expert_ids, weights)) as pair from '{trace.path}/routing/*.parquet'"
    query = f"select layer, pair[1], count(*), sum(pair[2]) from ({pairs}) group by all order by all"
    found = duckdb.sql(query)
    assert found is not None
    rows = found.fetchall()
    chunk = trace.load()
    assert chunk.weights_TLK is not None
    for layer, expert, count, weight in rows:
        mine = chunk.expert_ids_TLK[:, layer] == expert
        assert count == mine.sum()
        assert weight == pytest.approx(chunk.weights_TLK[:, layer][mine].astype(np.float64).sum())
    assert sum(count for _, _, count, _ in rows) == trace.num_rows * 2


def test_polars_counts_experts(trace: Trace) -> None:
    scanned = pl.scan_parquet(f"{trace.path}/routing/*.parquet")
    counts = scanned.explode("expert_ids").group_by("layer", "expert_ids").len().collect()
    assert counts["len"].sum() == trace.num_rows * 2
    weights = scanned.select(pl.col("weights").arr.sum()).collect()
    assert weights["weights"].cast(pl.Float64).mean() == pytest.approx(1, abs=1e-3)
