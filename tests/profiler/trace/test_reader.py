"""The reader: what is complete, what is refused, and that arrays come back whole whatever the row groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.traces import MakeProblems, MakeTrace

from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import routing_schema
from profiler.trace.writer import write_manifest


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    return make_trace(random_problems(count=5, tokens=7, layers=3, num_experts=8, top_k=2), 8)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def rewrite_routing(trace: Trace, **columns: object) -> None:
    """Replace columns of the first part, as a hostile or broken writer would, and renew the manifest."""
    path = trace.routing_files[0]
    table = pq.read_table(path)
    for name, values in columns.items():
        field = table.schema.field(name)
        if pa.types.is_fixed_size_list(field.type):
            # As other writers do: nulls are possible.
            field = pa.field(name, pa.list_(field.type.value_type, field.type.list_size))
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table(table, path)
    (trace.path / "manifest.json").unlink()
    write_manifest(trace.path)


def column(trace: Trace, name: str) -> list[Any]:
    values: list[Any] = pq.read_table(trace.routing_files[0]).column(name).to_pylist()
    return values


def test_arrays_of_one_problem_equal_that_part_of_the_whole(trace: Trace) -> None:
    whole = trace.load()
    one = trace.arrays(3)
    assert one.expert_ids_TLK.shape == (7, 3, 2)
    assert (one.expert_ids_TLK == whole.expert_ids_TLK[whole.problem_ids_T == 3]).all()
    with pytest.raises(TraceError, match="no routing of problem 99"):
        trace.arrays(99)


@pytest.mark.parametrize("group_rows", [3, 9, 21, 24, 1000])
def test_chunks_hold_whole_problems_whatever_the_row_groups(trace: Trace, group_rows: int) -> None:
    before = trace.load()
    path = trace.routing_files[0]
    table = pq.read_table(path).cast(routing_schema(8, 2))
    pq.write_table(table, path, row_group_size=group_rows)
    (trace.path / "manifest.json").unlink()
    write_manifest(trace.path)
    again = Trace.open(trace.path)
    assert (again.arrays(2).expert_ids_TLK == before.expert_ids_TLK[before.problem_ids_T == 2]).all()
    chunks = list(again.chunks())
    for chunk in chunks:
        assert (np.bincount(chunk.problem_ids_T)[np.unique(chunk.problem_ids_T)] == 7).all()
    assert (np.concatenate([c.expert_ids_TLK for c in chunks]) == before.expert_ids_TLK).all()


def test_without_a_manifest_it_is_incomplete_but_readable(trace: Trace) -> None:
    (trace.path / "manifest.json").unlink()
    with pytest.raises(TraceError, match="incomplete: no manifest"):
        Trace.open(trace.path)
    assert len(Trace.open(trace.path, allow_incomplete=True).load()) == 35


def test_a_missing_and_a_truncated_file_are_named(trace: Trace) -> None:
    (trace.path / "tokens.parquet").unlink()
    with pytest.raises(TraceError, match=r"tokens\.parquet is missing"):
        Trace.open(trace.path)
    part = trace.routing_files[0]
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(TraceError, match=r"part-00000\.parquet has \d+ bytes, expected"):
        Trace.open(trace.path)
    with pytest.raises(TraceError, match="not a readable Parquet file"):
        Trace.open(trace.path, allow_incomplete=True).load()


def test_a_flipped_bit_is_found_by_verification_and_by_reading(trace: Trace) -> None:
    part = trace.routing_files[0]
    sound = part.read_bytes()
    footer = int.from_bytes(sound[-8:-4], "little")
    before = trace.to_arrow()
    found = 0
    for at in range(4, len(sound) - footer - 8):
        content = bytearray(sound)
        content[at] ^= 1
        part.write_bytes(content)
        opened = Trace.open(trace.path)
        assert opened.faults() == []
        assert opened.faults(verify=True) == ["routing/part-00000.parquet does not match its sha256"]
        try:
            after, error = opened.to_arrow(), None
        except TraceError as refusal:
            after, error = None, str(refusal)
        # What is in a page's header besides its data may go unnoticed, but never changes the data.
        assert after.equals(before) if after is not None else "part-00000.parquet, row group 0" in str(error)
        found += error is not None
    assert found > (len(sound) - footer) / 2


@pytest.mark.parametrize("escape", ["../outside", "/etc/passwd", "routing/../../x", "a\\..\\b"])
def test_a_manifest_cannot_name_files_outside_the_trace(trace: Trace, escape: str) -> None:
    edit_json(trace.path / "manifest.json", lambda m: m["files"].update({escape: m["files"]["tokens.parquet"]}))
    with pytest.raises(TraceError, match="leaves the trace directory"):
        Trace.open(trace.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 9), ("num_experts", 0), ("moe_layers", []), ("moe_layers", [2, 1]), ("moe_layers", [0, 40000])],
)
def test_impossible_metadata_is_refused(trace: Trace, field: str, value: object) -> None:
    edit_json(trace.path / "metadata.json", lambda m: m["model"].update({field: value}))
    with pytest.raises(TraceError, match=r"metadata\.json is not valid"):
        Trace.open(trace.path, allow_incomplete=True)


def test_broken_json_and_other_folders_are_not_traces(trace: Trace, tmp_path: Path) -> None:
    (trace.path / "metadata.json").write_text("{")
    with pytest.raises(TraceError, match="is not valid"):
        Trace.open(trace.path)
    with pytest.raises(TraceError, match="no such trace directory"):
        Trace.open(tmp_path / "absent")
    with pytest.raises(TraceError, match=r"it has no metadata\.json"):
        Trace.open(tmp_path)


def test_an_expert_id_out_of_range_is_named_by_row(trace: Trace) -> None:
    ids = column(trace, "expert_ids")
    ids[10] = [8, 1]
    rewrite_routing(trace, expert_ids=ids)
    with pytest.raises(TraceError, match=r"part-00000\.parquet, row group 0, row 9: .*below 8"):
        Trace.open(trace.path).load()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_weights_must_be_finite_and_not_negative(trace: Trace, bad: float) -> None:
    weights = column(trace, "weights")
    weights[4] = [bad, 0.1]
    rewrite_routing(trace, weights=[np.array(w, dtype=np.float16) for w in weights])
    with pytest.raises(TraceError, match="row 3:"):
        Trace.open(trace.path).load()


def test_unsorted_and_duplicate_rows_are_refused(trace: Trace) -> None:
    tokens = column(trace, "token_id")
    tokens[3:6] = [0, 0, 0]
    rewrite_routing(trace, token_id=tokens)
    with pytest.raises(TraceError, match="row 3: expected rows sorted"):
        Trace.open(trace.path).load()


def test_a_token_without_all_layers_is_refused(trace: Trace) -> None:
    layers = column(trace, "layer")
    layers[1] = 2
    rewrite_routing(trace, layer=layers)
    with pytest.raises(TraceError, match="every MoE layer once"):
        Trace.open(trace.path).load()


def test_reading_needs_neither_torch_nor_an_engine(trace: Trace) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from profiler import Trace; import analysis.statistics.compute as s; "
        f"s.compute_statistics(Trace.open({str(trace.path)!r}), hops=1); "
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_part_that_the_manifest_does_not_list_is_not_read(trace: Trace) -> None:
    part = trace.routing_files[0]
    (part.parent / "part-00001.parquet").write_bytes(part.read_bytes())
    assert len(Trace.open(trace.path).load()) == 35


def test_rows_that_come_twice_in_different_row_groups_are_refused(trace: Trace) -> None:
    part = trace.routing_files[0]
    table = pq.read_table(part).cast(routing_schema(8, 2))
    with pq.ParquetWriter(part, table.schema) as file:
        file.write_table(table)
        file.write_table(table)
    (trace.path / "manifest.json").unlink()
    write_manifest(trace.path)
    with pytest.raises(TraceError, match="row group 1: its first row does not come after"):
        Trace.open(trace.path).load()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda m: m.update(files={}), "does not list metadata.json and at least one routing file"),
        (lambda m: m.update(schema_version=99), "schema version 99"),
        (lambda m: m["files"]["tokens.parquet"].update(rows=1), "tokens.parquet has 40 rows, expected 1"),
    ],
)
def test_a_manifest_must_describe_the_files(trace: Trace, change: Callable[[dict[str, Any]], None], fault: str) -> None:
    edit_json(trace.path / "manifest.json", change)
    with pytest.raises(TraceError, match=fault):
        Trace.open(trace.path)


def test_nulls_and_repeated_experts_are_refused(trace: Trace) -> None:
    ids = column(trace, "expert_ids")
    ids[6] = [3, 3]
    rewrite_routing(trace, expert_ids=ids)
    with pytest.raises(TraceError, match=r"row 6: .*different expert ids"):
        Trace.open(trace.path).load()
    ids[6] = [None, 3]
    rewrite_routing(trace, expert_ids=ids)
    with pytest.raises(TraceError, match="nulls, expected none"):
        Trace.open(trace.path).load()


def test_prompts_may_be_unknown_but_not_the_problems_dataset(trace: Trace) -> None:
    for name in ("prompt", "dataset"):
        table = pq.read_table(trace.path / "problems.parquet")
        position = table.schema.get_field_index(name)
        table = table.set_column(position, name, pa.nulls(len(table), pa.string()))
        pq.write_table(table, trace.path / "problems.parquet")
        write_manifest(trace.path)
        if name == "prompt":
            assert Trace.open(trace.path).problems.column("prompt").null_count == 5
    with pytest.raises(TraceError, match="nulls in column 'dataset'"):
        _ = Trace.open(trace.path).problems


def test_pairs_out_of_order_are_refused(trace: Trace) -> None:
    weights = column(trace, "weights")
    weights[5] = [np.float16(0.25), np.float16(0.75)]
    rewrite_routing(trace, weights=[np.array(w, dtype=np.float16) for w in weights])
    with pytest.raises(TraceError, match=r"row 3: .*in descending order"):
        Trace.open(trace.path).load()


def test_a_row_group_that_decodes_to_more_than_its_limit_is_refused_unread(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profiler.trace.untrusted.parquet_files.MAX_GROUP_BYTES", 105 * 16 - 1)
    with pytest.raises(TraceError, match="row group 0: 105 rows are larger than"):
        Trace.open(trace.path).load()


def test_a_list_of_millions_is_refused_before_it_is_decoded(trace: Trace) -> None:
    """The file says that its lists are of two entries, and one has two million."""
    path = trace.routing_files[0]
    claimed = pq.read_metadata(path).metadata[b"ARROW:schema"]
    table = pq.read_table(path)
    for name in ("expert_ids", "weights"):
        kind = table.schema.field(name).type.value_type
        short = pa.array(table.column(name).to_pylist()[:-1], pa.list_(kind))
        long = pa.ListArray.from_arrays(pa.array([0, 2_000_000], pa.int32()), pa.nulls(2_000_000).cast(kind).fill_null(0))
        table = table.set_column(table.schema.get_field_index(name), name, pa.chunked_array([short, long]))
    with pq.ParquetWriter(path, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"ARROW:schema": claimed.decode()})
    assert path.stat().st_size < 10_000
    write_manifest(trace.path)
    with pytest.raises(TraceError, match=r"row group 0: columns of .*2000208.*expected lists of \[1, 1, 1, 2, 2\]"):
        Trace.open(trace.path).load()


@pytest.mark.parametrize("plain", [True, False])
def test_text_that_decodes_to_more_than_its_limit_is_refused(
    trace: Trace, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profiler.trace.untrusted.parquet_files.MAX_TABLE_BYTES", 10_000_000)
    table = pa.concat_tables([pq.read_table(trace.path / "problems.parquet").slice(0, 1)] * 200)
    long = pa.array(["x" * 1_000_000] * 200)
    position = table.schema.get_field_index("output")
    table = table.set_column(position, "output", long if plain else long.dictionary_encode())
    pq.write_table(table, trace.path / "problems.parquet")
    assert (trace.path / "problems.parquet").stat().st_size < 1 << 20
    write_manifest(trace.path)
    with pytest.raises(TraceError, match="its text takes more than"):
        _ = Trace.open(trace.path).problems


def test_further_columns_of_problems_are_kept(trace: Trace) -> None:
    path = trace.path / "problems.parquet"
    pq.write_table(pq.read_table(path).append_column("looping", pa.array([True] * 5)), path)
    write_manifest(trace.path)
    assert Trace.open(trace.path).problems.column("looping").to_pylist() == [True] * 5


def test_chunks_of_a_giant_problem_can_be_taken_in_pieces(trace: Trace) -> None:
    path = trace.routing_files[0]
    pq.write_table(pq.read_table(path).cast(routing_schema(8, 2)), path, row_group_size=6)
    write_manifest(trace.path)
    pieces = list(Trace.open(trace.path).chunks(whole_problems=False))
    assert [len(piece) for piece in pieces] == [2] * 17 + [1]
    assert sum(map(len, Trace.open(trace.path).chunks())) == 35


def test_arrays_are_views_on_what_was_decoded(trace: Trace) -> None:
    one = trace.arrays(2)
    assert not one.expert_ids_TLK.flags.owndata
    assert one.weights_TLK is not None
    assert not one.weights_TLK.flags.owndata


def test_files_of_earlier_releases_whose_columns_may_be_null_are_read(trace: Trace) -> None:
    before = trace.to_arrow()
    weights = [np.array(pair, np.float16) for pair in column(trace, "weights")]
    rewrite_routing(trace, expert_ids=column(trace, "expert_ids"), weights=weights)
    assert pq.read_schema(trace.routing_files[0]).field("weights").type.value_field.nullable
    assert Trace.open(trace.path).to_arrow().to_pylist() == before.to_pylist()
