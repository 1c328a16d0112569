"""Traces that engines write of themselves: llama.cpp, colibri, lattice, Megatron-LM."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiler.errors import TraceError
from profiler.importers import find_format, import_trace
from profiler.importers.formats import llama_cpp
from profiler.importers.reading import HEAD_BYTES
from profiler.importers.rows import ImportOptions
from profiler.trace.reader import Trace


def convert(path: Path, text: str, format_name: str, **options: Any) -> Trace:
    path.write_text(text)
    assert find_format(path).name == format_name
    return import_trace(path, path.with_name("t"), options=ImportOptions(**options))


def refused(path: Path, text: str, format_name: str, reason: str) -> None:
    path.write_text(text)
    with pytest.raises(TraceError, match=reason):
        import_trace(path, path.with_name("refused"), format_name=format_name)


# llama.cpp: a prompt of three tokens, whose last layer has only the last one, then two generated tokens. K = 2.
LLAMA = "1,5 1,0 1,5 1,3 1,2 1,5 2,7 2,1 1,4 1,0 2,6 2,2 1,0 1,3 2,1 2,4".replace(" ", "\n") + "\n"


def test_llama_cpps_tokens_are_found_from_the_blocks_of_layers(tmp_path: Path) -> None:
    trace = convert(tmp_path / "moe_trace.csv", LLAMA, "llama-cpp")
    chunk = trace.load()
    assert chunk.token_ids_T.tolist() == [2, 3, 4]
    assert chunk.expert_ids_TLK.tolist() == [[[2, 5], [7, 1]], [[4, 0], [6, 2]], [[0, 3], [1, 4]]]
    assert trace.metadata.record.weights is False
    assert trace.tokens.column("phase").to_pylist() == ["prefill"] * 3 + ["decode"] * 2
    assert trace.metadata.gaps[1] == "K = 2 was inferred: blocks of one layer are multiples of 2 lines long"
    assert "2 of 5 tokens lacked rows at some layer and were dropped, in 1 problem" in trace.metadata.gaps


def test_llama_cpps_prompt_can_be_kept_without_the_last_layer(tmp_path: Path) -> None:
    chunk = convert(tmp_path / "moe_trace.csv", LLAMA, "llama-cpp", layers=(1,)).load()
    assert chunk.expert_ids_TLK[:, 0].tolist() == [[5, 0], [5, 3], [2, 5], [4, 0], [0, 3]]


def test_llama_cpps_rankings_of_all_experts_are_not_taken_for_prompts(tmp_path: Path) -> None:
    """A block that was copied without its stride: the ranking of the first token, then a part of the second one's."""
    random = np.random.default_rng(0)
    experts, top_k, prompt = 8, 2, 7
    lines, firsts = [], []
    for layer in range(2):
        rankings = [random.permutation(experts).tolist() for _ in range(prompt)]
        firsts.append(rankings[0][:top_k])
        lines += [f"{layer},{expert}" for expert in [*chain(*rankings)][: top_k * prompt]]
    decoded = [[[3, 1], [0, 2]], [[7, 4], [5, 6]]]
    lines += [f"{layer},{expert}" for token in decoded for layer in range(2) for expert in token[layer]]
    trace = convert(tmp_path / "moe_trace.csv", "\n".join(lines) + "\n", "llama-cpp")
    assert trace.load().token_ids_T.tolist() == [0, prompt, prompt + 1]
    assert trace.load().expert_ids_TLK.tolist() == [firsts, *decoded]
    assert any(gap.startswith("6 tokens of prompts were left out: in their place") for gap in trace.metadata.gaps)


def test_llama_cpps_model_gives_k(tmp_path: Path) -> None:
    lines = [f"{layer},{expert}" for layer in range(32) for token in range(2) for expert in (token, 7)]
    trace = convert(tmp_path / "a.csv", "\n".join(lines) + "\n", "llama-cpp", model="mixtral-8x7b")
    assert (trace.metadata.model.top_k, trace.metadata.model.num_experts, len(trace.load())) == (2, 8, 2)
    refusal = "3 lines of one layer, expected a multiple of K = 2"
    (tmp_path / "b.csv").write_text("0,1\n0,2\n0,3\n")
    with pytest.raises(TraceError, match=refusal):
        import_trace(tmp_path / "b.csv", tmp_path / "u", options=ImportOptions(model="mixtral-8x7b"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0,1\n0\n", "lines 1..2: expected 'layer,expert' on each line"),
        ("0,1\n0,x\n", "expected 'layer,expert' on each line"),
        ("0,1\n-1,2\n", "layer -1..0"),
        ("0,1\n0,70000\n", "expert id 1..70000"),
        ("\n", "no lines"),
        ("0," + "0" * 40 + "\n0,1\n", "found more than 32 characters"),
    ],
)
def test_broken_llama_cpp_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    refused(tmp_path / "x.csv", text, "llama-cpp", reason)


def test_llama_cpps_files_have_a_limit_each_and_are_kept_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text(LLAMA)
    assert sum(column.nbytes for column in llama_cpp._columns(tmp_path / "a.csv")) <= len(LLAMA)
    monkeypatch.setattr(llama_cpp, "MAX_FILE_BYTES", len(LLAMA))
    assert import_trace(tmp_path / "a.csv", tmp_path / "t").num_rows
    refused(
        tmp_path / "b.csv", LLAMA + "1,1\n", "llama-cpp", "b.csv: larger than 0 MiB: record each sequence in a file of its own"
    )


COLIBRI = """0 0 3 17:0.4000 4:0.2000
0 1 3 8:0.5000 17:0.1000
1 0 5 1:0.7500 2:0.2500
1 1 5 3:0.6000 2:0.4000
2 0 3 9:0.5000 4:0.2500
3 0 5 0:0.9000 7:0.1000
"""


def test_colibris_rows_are_numbered_pass_by_pass(tmp_path: Path) -> None:
    trace = convert(tmp_path / "route.txt", COLIBRI, "colibri")
    chunk = trace.load()
    assert chunk.token_ids_T.tolist() == [0, 1, 2]
    assert chunk.expert_ids_TLK.tolist() == [[[17, 4], [1, 2]], [[8, 17], [3, 2]], [[9, 4], [0, 7]]]
    assert chunk.weights_TLK is not None
    assert chunk.weights_TLK[2].tolist() == [[0.5, 0.25], pytest.approx([0.9, 0.1], abs=1e-3)]
    assert trace.metadata.model.moe_layers == [3, 5]
    assert trace.metadata.gaps[0].startswith("rows are numbered as they were computed, as one sequence")


def test_colibris_rounded_weights_do_not_make_text_a_warm_up(tmp_path: Path) -> None:
    text = "".join(
        f"{token} 0 3 {17 if token < 80 else token % 17}:0.{4000 if token < 80 else 2000 + token} 18:0.1000\n"
        for token in range(200)
    )
    trace = convert(tmp_path / "route.txt", text, "colibri")
    assert len(trace.load()) == 200
    assert any(
        gap.startswith("80 of 200 tokens were kept although they are in runs of 64 or more") for gap in trace.metadata.gaps
    )


def test_colibris_passes_may_be_cut_anywhere_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(tmp_path / "route.txt", COLIBRI, "colibri").to_arrow()
    for rows in range(1, 6):
        monkeypatch.setattr("profiler.importers.reading.MAX_BLOCK_ROWS", rows)
        assert import_trace(tmp_path / "route.txt", tmp_path / f"t{rows}").to_arrow() == whole


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0 0 3 1:0.5000\n0 1 3 x\n", "line 2: expected 'call row layer id:gate"),
        ("0 0 3 1:0.5\n", "line 1: expected 'call row layer id:gate"),
        ("0 0 3 1:-0.5000\n", "a weight that is negative"),
        ("0 0 3 1:0.5000\n0 0 3 2:0.5000\n", "a call has a row twice"),
        ("0 0 3\n", "no expert in any row"),
    ],
)
def test_broken_colibri_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    refused(tmp_path / "route.txt", text, "colibri", reason)


def lattice(token: int, layer: int = 0, **changes: object) -> str:
    row = {"layer_idx": layer, "token_idx": token, "selected_ids": [4, 1], "gate_weights": [0.5, 0.25]}
    return json.dumps({name: value for name, value in (row | changes).items() if value is not None}) + "\n"


def test_lattices_lines_come_in_any_order(tmp_path: Path) -> None:
    text = lattice(1, 2) + lattice(0, 1, selected_ids=[7, 3]) + lattice(1, 1) + lattice(0, 2, model="extra is ignored")
    chunk = convert(tmp_path / "a.jsonl", text, "lattice").load()
    assert chunk.expert_ids_TLK.tolist() == [[[7, 3], [4, 1]], [[4, 1], [4, 1]]]
    assert chunk.weights_TLK is not None
    assert chunk.weights_TLK[0, 0].tolist() == [0.5, 0.25]


def test_lattices_weights_may_be_absent_or_empty(tmp_path: Path) -> None:
    text = lattice(0, gate_weights=[]) + lattice(1, gate_weights=None)
    assert convert(tmp_path / "a.jsonl", text, "lattice").metadata.record.weights is False
    refused(
        tmp_path / "b.jsonl", lattice(0) + lattice(1, gate_weights=[]), "lattice", "line 2: no gate_weights, but other lines"
    )


def test_lattices_sequences_are_not_merged(tmp_path: Path) -> None:
    refused(
        tmp_path / "a.jsonl", lattice(0) + lattice(0, selected_ids=[2, 3]), "lattice", "each sequence needs a file of its own"
    )


def megatron(step: int, layer: int, indices: list[list[int]], **changes: object) -> str:
    row = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
    return json.dumps(row | {"num_tokens": len(indices), "topk": 2, "top_indices": indices} | changes) + "\n"


def test_megatrons_passes_are_problems(tmp_path: Path) -> None:
    text = (
        megatron(0, 1, [[5, 2], [0, 3]])
        + megatron(0, 2, [[1, 4], [6, 7]])
        + megatron(1, 1, [[2, 1]])
        + megatron(1, 2, [[3, 0]])
    )
    # The second micro-batch of step 1, and a layer of multi-token prediction that shares a number with layer 1.
    text += megatron(1, 1, [[7, 6]]) + megatron(1, 2, [[5, 4]]) + megatron(1, 1, [[0, 1]], block="mtp", mtp_idx=0)
    trace = convert(tmp_path / "router_trace_rank0.jsonl", text, "megatron")
    assert [trace.arrays(n).expert_ids_TLK.tolist() for n in range(3)] == [
        [[[5, 2], [1, 4]], [[0, 3], [6, 7]]],
        [[[2, 1], [3, 0]]],
        [[[7, 6], [5, 4]]],
    ]
    assert trace.problems.column("source_key").to_pylist() == [
        "router_trace_rank0/0",
        "router_trace_rank0/1",
        "router_trace_rank0/1/1",
    ]
    assert "1 record of multi-token prediction left out" in trace.metadata.gaps


def test_megatrons_lines_may_be_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    ids_TK = np.random.default_rng(0).random((9000, 16)).argsort(-1)[:, :2]
    line = megatron(0, 1, ids_TK.tolist())
    assert len(line) > HEAD_BYTES
    trace = convert(tmp_path / "router_trace_rank0.jsonl", line, "megatron")
    assert (trace.load().expert_ids_TLK[:, 0] == ids_TK).all()


def test_megatrons_copies_by_other_ranks_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for rank, indices in enumerate(([[5, 2]], [[5, 2]], [[6, 1]])):
        (tmp_path / "d" / f"router_trace_rank{rank}.jsonl").write_text(megatron(0, 1, indices, rank=rank))
    trace = import_trace(tmp_path / "d", tmp_path / "t")
    assert trace.load().expert_ids_TLK.tolist() == [[[5, 2]], [[6, 1]]]
    gaps = trace.metadata.gaps
    assert "1 of 3 files are copies of other ranks' files and were left out" in gaps
    assert any(gap.startswith("with pipeline parallelism, ranks number different layers alike") for gap in gaps)
    assert any(gap.startswith("if activations were recomputed, every pass") for gap in gaps)
    assert any(gap.startswith("if the router returned a mask, experts are in the order of their ids") for gap in gaps)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (megatron(0, 1, [[1, 2], [3]]), "line 1: 'top_indices' are not expert ids, or not equally many"),
        (megatron(0, 1, [*[[]] * 200_000, [*range(1024)]]), "not equally many for each token"),
        (megatron(0, 1, [[1, -2]]), "'top_indices' are not expert ids"),
        (megatron(0, 1, [[1, 2]], num_tokens=3), "'top_indices' of 1 token, but num_tokens is 3"),
        (megatron(0, -1, [[1, 2]]), "layer -1, expected 0"),
        (megatron(0, 1, [[1, 2]], top_indices=5), "expected lists of expert ids 'top_indices'"),
        (megatron(0, 1, []), "no routing rows"),
    ],
)
def test_broken_megatron_records_are_refused(tmp_path: Path, line: str, reason: str) -> None:
    refused(tmp_path / "router_trace_rank0.jsonl", line, "megatron", reason)
