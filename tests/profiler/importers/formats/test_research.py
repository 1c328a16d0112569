"""What research projects published: OLMoE, FLAME-MoE, MoE-Beyond, edge route traces, bare Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiler.errors import TraceError
from profiler.importers import find_format, import_trace
from profiler.importers.formats import moe_beyond
from profiler.importers.rows import ImportOptions
from profiler.trace.reader import Trace


def test_olmoes_nesting_has_the_layer_last(tmp_path: Path) -> None:
    source = tmp_path / "c4_results.jsonl"
    source.write_text(
        '{"input_ids": [510, 12], "predicted_token_ids": [12, 7], "exp_ids": [[[3, 60], [9, 1]], [[5, 2], [3, 8]]]}\n'
    )
    assert find_format(source).name == "olmoe"
    trace = import_trace(source, tmp_path / "t", options=ImportOptions(num_experts=64))
    assert trace.load().expert_ids_TLK.tolist() == [[[3, 9], [60, 1]], [[5, 3], [2, 8]]]
    assert trace.tokens.column("vocab_id").to_pylist() == [510, 12]
    assert trace.tokens.column("phase").to_pylist() == ["prefill", "prefill"]
    assert trace.metadata.record.weights is False


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"exp_ids": [[[1, 2], [3]]]}', "rows of different length"),
        ('{"exp_ids": [[1, 2]]}', "nested 3 deep"),
        ('{"exp_ids": [[[1, 0.5]]]}', "expected a list of whole numbers"),
        ('{"exp_ids": [[[-1, 0]]]}', "below 0"),
        ('{"exp_ids": [[[1, 0]]], "input_ids": [1, 2]}', "2 input_ids, but exp_ids of 1 token"),
        ('{"exp_ids": [[[1, 0]]]}\n{"exp_ids": [[[1, 0]', "line 2: not JSON"),
        ('{"exp_ids": [[[1, 0]]]}\n[]', "line 2: expected an object"),
    ],
)
def test_broken_olmoe_lines_are_refused(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(TraceError, match=reason):
        import_trace(tmp_path / "x.jsonl", tmp_path / "t")


def flame(tmp_path: Path, tokens: int) -> tuple[Path, np.ndarray]:
    random = np.random.default_rng(0)
    folder = tmp_path / "flame-moe-290m" / "actives" / "iter_0540"
    folder.mkdir(parents=True)
    ids_TLK = random.random((tokens, 2, 16)).argsort(-1)[..., :3]
    scores_TLK = -np.sort(-random.random((tokens, 2, 3)), axis=-1).astype(np.float16)
    for position, name in enumerate(("layer_02", "layer_03")):
        columns = {
            "scores": pa.array(scores_TLK[:, position].tolist(), pa.list_(pa.float16())),
            "indices": pa.array(ids_TLK[:, position].tolist(), pa.list_(pa.int16())),
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    samples = tmp_path / "flame-moe-290m" / "samples"
    samples.mkdir()
    for number, part in enumerate(np.array_split(np.arange(tokens, dtype=np.int32), 2)):
        pq.write_table(pa.table({"token_id": part}), samples / f"{number:03d}.parquet")
    return folder, ids_TLK


def test_flames_layers_count_from_one_and_its_text_is_cut_into_sequences(tmp_path: Path) -> None:
    folder, ids_TLK = flame(tmp_path, 2048 + 100)
    assert find_format(folder).name == "flame-moe"
    trace = import_trace(folder, tmp_path / "t", options=ImportOptions(num_experts=64))
    assert trace.metadata.model.moe_layers == [1, 2]
    assert trace.metadata.model.renormalized is False
    assert (trace.load().expert_ids_TLK == ids_TLK).all()
    assert trace.problems.num_rows == 2
    assert trace.arrays(1).token_ids_T.tolist() == list(range(100))
    assert trace.tokens.column("vocab_id").to_pylist() == list(range(2148))


def test_flames_files_must_have_as_many_rows(tmp_path: Path) -> None:
    folder, _ = flame(tmp_path, 10)
    path = folder / "layer_03.parquet"
    pq.write_table(pq.read_table(path).slice(0, 9), path)
    with pytest.raises(TraceError, match="differ in their number of rows"):
        import_trace(folder, tmp_path / "t")


BEYOND = """Layer ID,Batch Number,Token,Activated Expert IDs\r
1,0,I,"[8, 22, 38]"\r
1,0,",","[4, 8, 11]"\r
2,0,I,"[1, 2, 3]"\r
2,0,",","[5, 2, 6]"\r
"""


def test_moe_beyonds_positions_are_row_numbers_of_a_layer(tmp_path: Path) -> None:
    (tmp_path / "eamc").mkdir()
    for number in (10, 9):
        (tmp_path / "eamc" / f"prompt_{number}_data.csv").write_text(BEYOND, newline="")
    assert find_format(tmp_path / "eamc").name == "moe-beyond"
    trace = import_trace(tmp_path / "eamc", tmp_path / "t", options=ImportOptions(num_experts=64))
    assert trace.problems.column("source_key").to_pylist() == ["9", "10"]
    assert trace.arrays(1).expert_ids_TLK.tolist() == [[[8, 22, 38], [1, 2, 3]], [[4, 8, 11], [5, 2, 6]]]
    assert trace.metadata.model.moe_layers == [1, 2]
    assert trace.tokens.column("text").to_pylist() == ["I", ",", "I", ","]
    assert trace.tokens.column("vocab_id").null_count == 4
    assert trace.metadata.record.weights is False


def test_a_number_elsewhere_in_the_name_is_not_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("deepseek2_prompt_7.csv", "deepseek2_prompt_8.csv"):
        (tmp_path / "d" / name).write_text(BEYOND, newline="")
    trace = import_trace(tmp_path / "d", tmp_path / "t")
    assert trace.problems.column("source_key").to_pylist() == ["deepseek2_prompt_7", "deepseek2_prompt_8"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BEYOND.replace("Token", "Tok", 1), "lacks the column 'Token'"),
        (BEYOND.replace('"[5, 2, 6]"', "\"__import__('os')\""), "line 5: expected a list of expert ids"),
        (BEYOND.replace('"[5, 2, 6]"', '"5"'), "expected a list of whole numbers"),
        (BEYOND + "3,0\r\n", "fewer fields than columns"),
    ],
)
def test_broken_moe_beyond_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "prompt_0_data.csv").write_text(text, newline="")
    with pytest.raises(TraceError, match=reason):
        import_trace(tmp_path / "prompt_0_data.csv", tmp_path / "t")


EDGE = """# route_trace v1
# model=/m/qwen3.gguf arch=qwen3moe n_layer=3 n_expert=128 n_expert_used=2
# layer=0 expert_bytes=1769472 dense_bytes=12345
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped
0,0,0,0,0,87,0.6,0,1769472,0
0,0,0,0,1,5,0.4,0,1769472,0
0,0,1,0,1,7,0.25,0,1769472,0
0,0,1,0,0,9,0.75,0,1769472,0
0,0,1,1,0,1,0.5,0,1769472,0
0,0,1,1,1,2,0.5,0,1769472,0
0,1,2,0,0,3,0.875,1,1769472,0
0,1,2,0,1,4,0.125,1,1769472,1
0,1,2,1,0,6,0.75,1,1769472,0
0,1,2,1,1,8,0.25,1,1769472,0
0,1,-1,1,1,8,0.25,1,1769472,0
"""


def edge(tmp_path: Path, text: str, **options: Any) -> Trace:
    (tmp_path / "routes.csv").write_text(text)
    assert find_format(tmp_path / "routes.csv").name == "edge-csv"
    return import_trace(tmp_path / "routes.csv", tmp_path / "t", options=ImportOptions(**options))


def test_slots_become_rows_and_dropped_experts_empty_slots(tmp_path: Path) -> None:
    trace = edge(tmp_path, EDGE)
    assert trace.metadata.model.id == "qwen3.gguf"
    assert trace.metadata.model.num_experts == 128
    chunk = trace.load()
    # Position 0 lacks the last layer, as prompts do there.
    assert chunk.token_ids_T.tolist() == [1, 2]
    assert chunk.expert_ids_TLK.tolist() == [[[9, 7], [1, 2]], [[3, 128], [6, 8]]]
    assert trace.metadata.record.empty_slots == 1
    assert trace.tokens.column("phase").to_pylist() == ["prefill", "prefill", "decode"]
    assert "1 of 3 tokens lacked rows at some layer and were dropped, in 1 problem" in trace.metadata.gaps


def test_the_prompt_can_be_kept_without_the_last_layer(tmp_path: Path) -> None:
    assert edge(tmp_path, EDGE, layers=(0,)).load().token_ids_T.tolist() == [0, 1, 2]


def test_unknown_weights_are_not_invented(tmp_path: Path) -> None:
    trace = edge(tmp_path, EDGE.replace("0.75,0,", "nan,0,"))
    assert trace.load().token_ids_T.tolist() == [2]
    assert "1 of 3 tokens had an unknown weight and were dropped" in trace.metadata.gaps
    none = re.sub(r"(?m)^((?:-?\d+,){6})[0-9.]+,", r"\1nan,", EDGE)
    trace = import_trace(_written(tmp_path / "n.csv", none), tmp_path / "n")
    assert trace.metadata.record.weights is False
    assert "the source has no weight" in trace.metadata.gaps


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_columns_that_are_ignored_may_hold_anything(tmp_path: Path) -> None:
    rows = [f"0,{n},0,{slot},{slot},{'note' if n > 2000 else ''}" for n in range(3000) for slot in range(2)]
    trace = edge(tmp_path, "turn,step,layer,slot,expert,comment\n" + "\n".join(rows) + "\n")
    assert len(trace.load()) == 3000


def test_lines_of_one_token_must_be_together(tmp_path: Path) -> None:
    rows = [f"0,{n},0,{slot},{slot}" for slot in range(2) for n in range(5)]
    with pytest.raises(TraceError, match="are not together: sort the file by turn, step, layer and slot"):
        edge(tmp_path, "turn,step,layer,slot,expert\n" + "\n".join([rows[5], *rows[:5], *rows[6:], rows[4]]) + "\n")


def test_columns_may_be_absent_but_not_broken(tmp_path: Path) -> None:
    text = "turn,step,layer,slot,expert\n0,0,0,0,3\n0,0,0,1,1\n"
    trace = edge(tmp_path, text)
    assert trace.load().expert_ids_TLK.tolist() == [[[3, 1]]]
    for broken, reason in (("0,0,0,1,x", "after row 0"), ("0,1,0,0,", "an empty field"), ("0,1", "after row 0")):
        with pytest.raises(TraceError, match=reason):
            import_trace(_written(tmp_path / "b.csv", f"{text}{broken}\n"), tmp_path / "b")


def bare(tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    rows = {
        "problem_id": [4, 4, 4, 4],
        "layer": [0, 1, 0, 1],
        "token_id": [101, 101, 102, 102],
        "expert_ids": [[3, 1], [0, 2], [1, 2], [2, 3]],
        "weights": [[0.75, 0.25]] * 4,
    }
    types = [pa.int32(), pa.int16(), pa.int32(), pa.list_(pa.uint8(), 2), pa.list_(pa.float16(), 2)]
    table = pa.table({n: pa.array(v, kind) for (n, v), kind in zip((rows | changes).items(), types, strict=True)})
    pq.write_table(table, folder / "routing.parquet")
    problem = {"problem_id": [4], "dataset": ["mmlu"], "looping": [True], "prompt_md5": ["abc"], "num_tokens": [2]}
    pq.write_table(pa.table(problem), folder / "problems.parquet")
    tokens = {"problem_id": [4, 4], "token_id": [101, 102], "token": ["The", " answer"]}
    pq.write_table(pa.table(tokens), folder / "tokens.parquet")
    return folder


def test_bare_parquet_keeps_what_else_is_known_of_problems_and_tokens(tmp_path: Path) -> None:
    folder = bare(tmp_path)
    assert find_format(folder).name == "parquet"
    trace = import_trace(folder, tmp_path / "t", options=ImportOptions(num_experts=32))
    assert trace.arrays(4).expert_ids_TLK.tolist() == [[[3, 1], [0, 2]], [[1, 2], [2, 3]]]
    (problem,) = trace.problems.to_pylist()
    assert (problem["dataset"], problem["source_key"], problem["looping"], problem["prompt"]) == ("mmlu", "abc", True, None)
    assert trace.tokens.column("text").to_pylist() == ["The", " answer"]
    assert trace.tokens.column("phase").to_pylist() == ["decode", "decode"]
    assert trace.metadata.gaps == [
        "the phases of tokens are unknown: every problem begins after position 0, so all count as generated",
        "1 problem without the first positions, 101 in all: prompts not recorded, or only in part",
    ]


@pytest.mark.parametrize(
    ("name", "column", "values", "reason"),
    [
        ("tokens", "token_id", pa.array([None, 102], pa.int32()), "token_id: expected whole numbers, and no nulls"),
        ("tokens", "vocab_id", pa.array(["a", "b"]), "expected int32"),
        ("tokens", "phase", pa.array(["prefill", "thinking"]), "a phase that is neither 'prefill' nor 'decode'"),
        ("problems", "problem_id", pa.array(["4"]), "problem_id: expected whole numbers"),
        ("problems", "prompt_tokens", pa.array(["many"]), "expected int32"),
    ],
)
def test_side_tables_of_other_types_are_refused(tmp_path: Path, name: str, column: str, values: pa.Array, reason: str) -> None:
    folder = bare(tmp_path)
    table = pq.read_table(folder / f"{name}.parquet")
    table = table.drop_columns([column] if column in table.column_names else []).append_column(column, values)
    pq.write_table(table, folder / f"{name}.parquet")
    with pytest.raises(TraceError, match=reason):
        import_trace(folder, tmp_path / "t")


def test_text_in_any_form_and_unknown_vocabulary_ids_are_taken(tmp_path: Path) -> None:
    folder = bare(tmp_path)
    problems = {
        "problem_id": [4],
        "dataset": pa.array(["mmlu"]).dictionary_encode(),
        "prompt": pa.array(["Why?"], pa.large_string()),
    }
    pq.write_table(pa.table(problems | {"tags": [["a"]]}), folder / "problems.parquet")
    tokens = {
        "problem_id": [4, 4],
        "token_id": [101, 102],
        "vocab_id": pa.array([7, None], pa.int64()),
        "phase": ["decode"] * 2,
    }
    pq.write_table(pa.table(tokens), folder / "tokens.parquet")
    trace = import_trace(folder, tmp_path / "t", options=ImportOptions(num_experts=32))
    assert trace.problems.select(["dataset", "prompt"]).to_pylist() == [{"dataset": "mmlu", "prompt": "Why?"}]
    assert trace.tokens.column("vocab_id").to_pylist() == [7, None]
    assert "columns of problems.parquet that are neither text nor numbers were left out: tags" in trace.metadata.gaps


def test_bare_parquet_with_broken_rows_is_refused(tmp_path: Path) -> None:
    folder = bare(tmp_path, weights=[[0.5, float("inf")]] * 4)
    with pytest.raises(TraceError, match="problem 4, token 101, layer 0: a weight that is negative"):
        import_trace(folder, tmp_path / "t")
    content = (folder / "routing.parquet").read_bytes()
    (folder / "routing.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(TraceError, match="looks like none of"):
        import_trace(folder, tmp_path / "t")


def test_every_later_command_copes_with_what_is_missing(tmp_path: Path) -> None:
    from analysis.statistics.compute import compute_statistics
    from speculation.data.routes import load_routes

    random = np.random.default_rng(0)
    rows = [
        {"problem_id": p, "layer": layer, "token_id": t, "expert_ids": random.permutation(4)[: 1 + (t + layer) % 2].tolist()}
        for p in range(3)
        for t in range(5)
        for layer in (0, 1)
    ]
    source = _written(tmp_path / "in.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    trace = import_trace(source, tmp_path / "t")
    statistics = compute_statistics(trace, hops=1)
    counted = np.zeros((2, 4))
    for row in rows:
        counted[row["layer"], row["expert_ids"]] += 1
    assert np.allclose(statistics.load.share_LE, counted / counted.sum(1, keepdims=True))
    with pytest.raises(TraceError, match=r"15 slots without an expert.*drop_incomplete"):
        load_routes(trace, "all")
    source.write_text("".join(json.dumps(row | {"expert_ids": [0, 1]}) + "\n" for row in rows))
    routes = load_routes(import_trace(source, tmp_path / "u"), "all")
    assert (routes.weights_TLK == 0.5).all()


def test_a_small_file_that_padding_makes_large_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Layer ID,Batch Number,Token,Activated Expert IDs\n" + "1,0,a,[3]\n" * 200 + f'1,0,b,"{[*range(1024)]}"\n'
    source = _written(tmp_path / "prompt_1.csv", text)
    whole = import_trace(source, tmp_path / "t").to_arrow()
    monkeypatch.setattr(moe_beyond, "WHOLE_BYTES", 2 * len(text))
    monkeypatch.setattr(moe_beyond, "ROWS", 50)
    pieces: list[tuple[int, ...]] = []

    def read(path: Path) -> Iterator[moe_beyond._Block]:
        for block in blocks(path):
            pieces.append(block.ids_NK.shape)
            yield block

    blocks = moe_beyond._blocks
    monkeypatch.setattr(moe_beyond, "_blocks", read)
    assert import_trace(source, tmp_path / "u").to_arrow() == whole
    assert pieces == [(50, 1)] * 4 + [(1, 1024)]


@pytest.mark.parametrize("seed", range(5))
def test_moe_beyond_is_read_the_same_at_once_and_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    random = np.random.default_rng(seed)
    texts = ["a", ",", '""', "line\nbreak", " \u00e9\u4e16", "", "'", "\t"]
    lines = [
        f'{layer},{batch},"{random.choice(texts)}","{random.permutation(9)[: random.integers(1, 5)].tolist()}"\r\n'
        for batch in range(2)
        for layer in (1, 2, 7)
        for _ in range(6)
    ]
    text = "Layer ID,Batch Number,Token,Activated Expert IDs\r\n" + "".join(lines)
    (tmp_path / "prompt_3.csv").write_bytes(text.encode())
    at_once = import_trace(tmp_path / "prompt_3.csv", tmp_path / "t")
    monkeypatch.setattr("profiler.importers.formats.moe_beyond.WHOLE_BYTES", 0)
    monkeypatch.setattr("profiler.importers.formats.moe_beyond.ROWS", 5)
    by_row = import_trace(tmp_path / "prompt_3.csv", tmp_path / "u")
    assert at_once.to_arrow() == by_row.to_arrow()
    assert at_once.tokens == by_row.tokens
    assert at_once.problems == by_row.problems
