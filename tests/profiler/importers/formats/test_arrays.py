"""Arrays and dumps of inference engines: vLLM's routed_experts, SGLang's recorder."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from profiler.errors import TraceError
from profiler.importers import find_format, import_trace
from profiler.importers.rows import ImportOptions
from profiler.trace.reader import Trace

# [T, L, K]: the first layer is dense; token 1 came from the prefix cache.
ROUTED = np.array([[[0, 0], [3, 1], [2, 0]], [[-1, -1], [-1, -1], [-1, -1]], [[0, 0], [0, 2], [1, 3]]], dtype=np.int16)


def test_dense_layers_and_cached_positions_have_no_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "routes.npy", ROUTED)
    assert find_format(tmp_path / "routes.npy").name == "routed-experts"
    trace = import_trace(tmp_path / "routes.npy", tmp_path / "t", options=ImportOptions(num_experts=8))
    assert trace.metadata.model.moe_layers == [1, 2]
    chunk = trace.load()
    assert chunk.token_ids_T.tolist() == [0, 2]
    assert chunk.expert_ids_TLK.tolist() == [[[3, 1], [2, 0]], [[0, 2], [1, 3]]]
    assert chunk.weights_TLK is None
    assert "1 further position of 1 problem without rows" in trace.metadata.gaps


@pytest.mark.parametrize("compressed", [False, True])
def test_every_array_of_an_archive_is_a_sequence(tmp_path: Path, compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "routes.npz", first=ROUTED.astype(np.int32), second=np.asfortranarray(ROUTED[2:]))
    trace = import_trace(tmp_path / "routes.npz", tmp_path / "t")
    assert trace.problems.column("source_key").to_pylist() == ["first", "second"]
    assert trace.arrays(1).expert_ids_TLK.tolist() == [[[0, 2], [1, 3]]]


def test_a_folder_of_arrays_is_a_trace(tmp_path: Path) -> None:
    (tmp_path / "routes").mkdir()
    for number in (2, 10):
        np.save(tmp_path / "routes" / f"{number}.npy", ROUTED)
    trace = import_trace(tmp_path / "routes", tmp_path / "t")
    assert trace.problems.column("source_key").to_pylist() == ["2", "10"]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3)), r"float64 of shape \(2, 3\), expected whole numbers"),
        (np.zeros((2, 3, 2), np.int32), "every layer is 0 or -1 throughout"),
        (np.array([[[0, -5]], [[1, 2]]]), "expert id -5..2"),
        (np.array([None, 1], dtype=object), "is not an array"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "routes.npy", array, allow_pickle=True)
    with pytest.raises(TraceError, match=reason):
        import_trace(tmp_path / "routes.npy", tmp_path / "t")


def test_layers_taken_for_dense_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "routes.npy", ROUTED)
    gaps = import_trace(tmp_path / "routes.npy", tmp_path / "t").metadata.gaps
    assert "layers that are 0 or -1 throughout were taken as dense: 0" in gaps


def test_ids_that_no_signed_number_holds_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "routes.npy", np.array([[[1, 2**64 - 1]]], dtype=np.uint64))
    with pytest.raises(TraceError, match=r"expert id 1\.\.18446744073709551615"):
        import_trace(tmp_path / "routes.npy", tmp_path / "t")


def test_an_array_of_a_billion_layers_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        header = {"descr": "|i1", "fortran_order": False, "shape": (1, 10**9, 1)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call] # numpy gives it no types
        file.truncate(file.tell() + 10**9)
    with pytest.raises(TraceError, match="more than a trace can hold"):
        import_trace(tmp_path / "x.npy", tmp_path / "t")


def test_an_array_that_promises_more_than_it_has_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 2), np.int32))
    content = (tmp_path / "x.npy").read_bytes().replace(b"(1, 2, 2), }     ", b"(99999999,2,2),} ")
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(TraceError, match="is not an array"):
        import_trace(tmp_path / "x.npy", tmp_path / "t")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(TraceError, match="does not fit into its"):
        import_trace(tmp_path / "x.npz", tmp_path / "t")


def record(
    number: int, mode: int, vocab: list[int], positions: list[int], lengths: list[int] | None, experts: list[int]
) -> dict[str, object]:
    """A pass over layers 0 (dense) and 1, K = 2 of 8 columns; a token's experts are (e, e + 1)."""
    ids = torch.full((2, len(vocab), 8), -1, dtype=torch.int32)
    ids[1, :, 0] = torch.tensor(experts)
    ids[1, :, 1] = torch.tensor(experts) + 1
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": vocab,
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": ids,
        "misc_objects": [],
        # Releases since 2026 also count the tokens of each physical expert.
        "global_physical_count": torch.zeros(2, 8, dtype=torch.int32),
    }


def dump(path: Path, records: list[dict[str, object]], mapping: list[int]) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor([mapping, mapping])}, path)
    return path


def convert_dump(tmp_path: Path, records: list[dict[str, object]], mapping: list[int] | None = None) -> Trace:
    source = dump(tmp_path / "expert_distribution_recorder_1.5_0.pt", records, mapping or list(range(8)))
    assert find_format(source).name == "sglang"
    return import_trace(source, tmp_path / "t")


def test_sequences_are_put_together_from_positions(tmp_path: Path) -> None:
    records = [
        record(3, 2, [70, 80], [3, 2], None, [4, 5]),
        record(1, 1, [10, 11, 12, 20, 21], [0, 1, 2, 0, 1], [3, 2], [0, 1, 2, 3, 4]),
        record(4, 2, [81], [3], None, [6]),  # the first sequence has ended
    ]
    trace = convert_dump(tmp_path, records)
    assert trace.metadata.model.moe_layers == [1]
    assert trace.metadata.model.num_experts == 8
    assert trace.metadata.model.top_k == 2
    assert trace.arrays(0).expert_ids_TLK[:, 0, 0].tolist() == [0, 1, 2, 4]
    assert trace.arrays(1).expert_ids_TLK[:, 0, 0].tolist() == [3, 4, 5, 6]
    tokens = trace.tokens.to_pandas()
    assert tokens[tokens.problem_id == 1].vocab_id.tolist() == [20, 21, 80, 81]
    assert tokens[tokens.problem_id == 1].phase.tolist() == ["prefill", "prefill", "decode", "decode"]
    assert "the dump has no request ids: sequences were reconstructed from positions" in trace.metadata.gaps


def test_a_prompt_in_two_pieces_is_one_sequence(tmp_path: Path) -> None:
    records = [record(1, 1, [1, 2], [0, 1], [2], [0, 1]), record(2, 1, [3, 4], [2, 3], [2], [2, 3])]
    assert convert_dump(tmp_path, records).arrays(0).token_ids_T.tolist() == [0, 1, 2, 3]


def test_request_ids_are_used_where_a_fork_records_them(tmp_path: Path) -> None:
    records = [
        record(1, 1, [1, 2], [0, 0], [1, 1], [0, 1]) | {"rids": ["a", "b"]},
        record(2, 2, [3, 4], [1, 1], None, [2, 3]) | {"rids": ["b", "a"]},
    ]
    trace = convert_dump(tmp_path, records)
    assert trace.arrays(0).expert_ids_TLK[:, 0, 0].tolist() == [0, 3]
    assert trace.arrays(1).expert_ids_TLK[:, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_where_a_fork_records_them(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = torch.zeros(2, 2, 8, dtype=dtype)
    weights[1, :, :2] = torch.tensor([[0.25, 0.5], [0.75, 0.125]])
    trace = convert_dump(tmp_path, [record(1, 1, [1, 2], [0, 1], [2], [0, 4]) | {"topk_weights_of_layer": weights}])
    found = trace.arrays(0)
    assert found.weights_TLK is not None
    assert found.expert_ids_TLK[:, 0].tolist() == [[1, 0], [4, 5]]
    assert found.weights_TLK[:, 0].tolist() == [[0.5, 0.25], [0.75, 0.125]]


def test_physical_experts_are_mapped_to_the_models_own(tmp_path: Path) -> None:
    trace = convert_dump(tmp_path, [record(1, 1, [1], [0], [1], [6])], mapping=[0, 1, 2, 3, 4, 5, 2, 4])
    assert trace.load().expert_ids_TLK.tolist() == [[[2, 4]]]
    assert trace.metadata.model.num_experts == 6


# Ten lists that stand for ten billion when they are written out.
NESTED: list[object] = [1]
for _ in range(10):
    NESTED = [NESTED] * 10


def test_requests_that_ran_one_after_the_other_are_not_mixed_up(tmp_path: Path) -> None:
    records = [
        record(1, 1, [1, 2], [0, 1], [2], [0, 0]),
        record(2, 2, [3], [2], None, [0]),
        record(3, 2, [4], [3], None, [0]),
        record(4, 1, [5, 6, 7, 8], [0, 1, 2, 3], [4], [6, 6, 6, 6]),
        record(5, 2, [9], [4], None, [6]),
        record(6, 2, [10], [5], None, [6]),
        # And one whose beginning came from a cache.
        record(7, 1, [11, 12], [6, 7], [2], [4, 4]),
    ]
    trace = convert_dump(tmp_path, records)
    assert [trace.arrays(p).token_ids_T.tolist() for p in range(3)] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [6, 7]]
    assert [set(trace.arrays(p).expert_ids_TLK[:, 0, 0].tolist()) for p in range(3)] == [{0}, {6}, {4}]
    assert "1 decoded tokens fit several sequences; each was assigned to the last one in the batch" in trace.metadata.gaps


def test_files_of_ranks_that_are_copies_are_imported_once(tmp_path: Path) -> None:
    (tmp_path / "dumps").mkdir()
    for rank in range(2):
        records = [record(1, 1, [1, 2], [0, 1], [2], [0, 1]) | {"rank": rank}]
        dump(tmp_path / "dumps" / f"expert_distribution_recorder_1.5_{rank}.pt", records, list(range(8)))
    trace = import_trace(tmp_path / "dumps", tmp_path / "t")
    assert trace.problems.num_rows == 1
    assert "1 of 2 files are copies of other ranks' files and were left out" in trace.metadata.gaps


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def test_a_dump_with_code_in_it_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"records": [Evil()]}, tmp_path / "x.pt")
    with pytest.raises(TraceError, match="tensors and plain values only"):
        import_trace(tmp_path / "x.pt", tmp_path / "t")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TraceError, match=r"is not a torch\.save"):
        import_trace(tmp_path / "y.pt", tmp_path / "t")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"topk_ids_of_layer": [1]}, "expected a tensor of 3 dimensions"),
        ({"topk_ids_of_layer": torch.zeros(2, 1, 2)}, "expected whole numbers"),
        ({"positions": []}, "0 positions for 1 token"),
        ({"extend_seq_lens": [0]}, "extend_seq_lens of 0 tokens in all"),
        ({"extend_seq_lens": [NESTED]}, "extend_seq_lens: expected a list of whole numbers"),
        ({"rids": [NESTED]}, "expected rids, strings or numbers"),
        (
            {"topk_weights_of_layer": torch.zeros(2, 1, 2)},
            r"of shape \(2, 1, 2\), expected that of the ids",
        ),
        ({"topk_weights_of_layer": torch.zeros(2, 1, 8, dtype=torch.int32)}, "int32, expected floating-point numbers"),
        ({"forward_mode": torch.tensor([1, 2]), "extend_seq_lens": None}, None),
        ({"topk_ids_of_layer": torch.full((2, 1, 2), 9, dtype=torch.int32)}, "not in last_physical_to_logical_map"),
        ({"topk_ids_of_layer": torch.ones(1, dtype=torch.int32).expand(2, 1, 1 << 40)}, "more elements than its storage holds"),
    ],
)
def test_broken_records_are_refused(tmp_path: Path, change: dict[str, object], reason: str | None) -> None:
    if reason is None:
        assert len(convert_dump(tmp_path, [record(1, 1, [1], [0], [1], [0]) | change]).load()) == 1
        return
    with pytest.raises(TraceError, match=reason):
        convert_dump(tmp_path, [record(1, 1, [1], [0], [1], [0]) | change])


def test_dumps_of_counts_are_not_routing(tmp_path: Path) -> None:
    torch.save({"rank": 0, "logical_count": torch.zeros(1, 2, 8)}, tmp_path / "x.pt")
    with pytest.raises(TraceError, match="a dump of counts contains no routing"):
        import_trace(tmp_path / "x.pt", tmp_path / "t")
