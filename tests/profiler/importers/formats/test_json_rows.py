"""JSON lines in: the project's own and the older spelling, with rows missing, drifting, repeated, shorter, or broken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiler.errors import TraceError
from profiler.importers import find_format, import_trace
from profiler.importers.rows import ImportOptions
from profiler.trace.jsonl import write_jsonl
from profiler.trace.reader import Trace


def line(problem_id: object = 0, layer: int = 0, token_id: float = 0, **changes: object) -> str:
    row = {"problem_id": problem_id, "layer": layer, "token_id": token_id, "expert_ids": [1, 0], "weights": [0.5, 0.5]}
    return json.dumps({name: value for name, value in (row | changes).items() if value is not None})


def old(problem_id: int = 0, layer: int = 0, token_idx: int = 0, **changes: object) -> str:
    row = {"dataset": "gsm8k", "problem_id": problem_id, "layer": layer, "token_idx": token_idx}
    return json.dumps(row | {"experts": [7, 0], "gating_probs": [0.8, 0.2]} | changes)


def convert(tmp_path: Path, lines: list[str], **options: Any) -> Trace:
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return import_trace(tmp_path / "in.jsonl", tmp_path / "t", options=ImportOptions(**options))


def test_rows_may_be_in_any_order(tmp_path: Path) -> None:
    lines = [line(1, 5, 1), line(0, 4), line(1, 4, 1), line(0, 5), line(1, 4), line(1, 5)]
    trace = convert(tmp_path, lines)
    assert trace.metadata.model.moe_layers == [4, 5]
    assert trace.load().problem_ids_T.tolist() == [0, 1, 1]
    assert trace.load().token_ids_T.tolist() == [0, 0, 1]
    assert trace.metadata.gaps == [
        "num_experts was inferred from the highest expert id",
        "no prompts, outputs or vocabulary ids",
    ]


def test_tokens_that_lack_a_layer_are_dropped_and_counted(tmp_path: Path) -> None:
    trace = convert(tmp_path, [line(layer=0), line(layer=1), line(layer=0, token_id=1), line(layer=1, token_id=2)])
    assert trace.load().token_ids_T.tolist() == [0]
    assert trace.metadata.gaps[0] == "2 of 3 tokens lacked rows at some layer and were dropped, in 1 problem"


def test_a_row_written_twice_counts_once_and_two_that_differ_not_at_all(tmp_path: Path) -> None:
    lines = [line(), line(), line(token_id=1), line(token_id=1, expert_ids=[0, 2]), line(token_id=2)]
    trace = convert(tmp_path, lines)
    assert trace.load().token_ids_T.tolist() == [0, 2]
    assert trace.metadata.gaps[:2] == [
        "1 of 3 tokens had two different rows at a layer and were dropped",
        "1 further position of 1 problem without rows",
    ]


def test_the_older_spelling_names_problems_by_dataset(tmp_path: Path) -> None:
    lines = [old(3), old(3, dataset="humaneval"), old(3, token_idx=1, experts=[2, 5])]
    trace = convert(tmp_path, lines)
    assert trace.problems.select(["dataset", "source_key"]).to_pylist() == [
        {"dataset": "gsm8k", "source_key": "3"},
        {"dataset": "humaneval", "source_key": "3"},
    ]
    assert trace.arrays(0).expert_ids_TLK.tolist() == [[[7, 0]], [[2, 5]]]
    assert [(d.name, d.problems) for d in trace.metadata.datasets] == [("gsm8k", 1), ("humaneval", 1)]
    assert "token_idx: it is unknown whether they include the prompt" in trace.metadata.gaps[0]


def test_token_pos_is_a_position_too(tmp_path: Path) -> None:
    lines = [json.dumps(json.loads(old(token_idx=4)) | {"token_pos": 4})]
    lines = [text.replace('"token_idx": 4, ', "") for text in lines]
    assert convert(tmp_path, lines).load().token_ids_T.tolist() == [4]


def test_text_problem_ids_are_numbered_and_kept_as_keys(tmp_path: Path) -> None:
    trace = convert(tmp_path, [line("HumanEval/7"), line("HumanEval/3")])
    assert trace.problems.column("source_key").to_pylist() == ["HumanEval/7", "HumanEval/3"]


def test_lists_of_differing_length_become_empty_slots_not_zeros(tmp_path: Path) -> None:
    lines = [line(expert_ids=[4, 2], weights=[0.7, 0.3]), line(token_id=1, expert_ids=[3], weights=[0.25])]
    trace = convert(tmp_path, lines)
    assert trace.metadata.record.empty_slots == 1
    assert trace.caveats() == ["1 slot without an expert: some tokens went to fewer than K"]
    chunk = trace.load()
    assert chunk.expert_ids_TLK.tolist() == [[[4, 2]], [[3, 5]]]  # 5 experts: the id 5 stands for none
    assert chunk.weights_TLK is not None
    assert np.isnan(chunk.weights_TLK).tolist() == [[[False, False]], [[False, True]]]
    assert trace.to_arrow().column("expert_ids").to_pylist() == [[4, 2], [3, None]]
    write_jsonl(trace, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])["expert_ids"] == [3]


def test_tokens_with_fewer_experts_can_be_left_out(tmp_path: Path) -> None:
    lines = [line(), line(token_id=1, expert_ids=[1], weights=[0.25])]
    trace = convert(tmp_path, lines, drop_incomplete=True)
    assert trace.metadata.record.empty_slots == 0
    assert trace.load().token_ids_T.tolist() == [0]
    assert "1 of 2 tokens went to fewer than K experts and were dropped" in trace.metadata.gaps


def test_lines_without_weights_give_a_trace_without_weights(tmp_path: Path) -> None:
    trace = convert(tmp_path, [line(weights=None, expert_ids=[0, 1])])
    assert trace.metadata.record.weights is False
    chunk = trace.load()
    assert chunk.weights_TLK is None
    assert chunk.expert_ids_TLK.tolist() == [[[0, 1]]]
    assert trace.to_arrow().column_names == ["problem_id", "layer", "token_id", "expert_ids"]
    write_jsonl(trace, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == '{"problem_id": 0, "layer": 0, "token_id": 0, "expert_ids": [0, 1]}\n'


def test_only_the_requested_layers_need_rows(tmp_path: Path) -> None:
    lines = [line(), line(layer=1), line(token_id=1)]
    trace = convert(tmp_path, lines, layers=(0,))
    assert trace.load().token_ids_T.tolist() == [0, 1]
    assert "only layers 0 were imported" in trace.metadata.gaps
    with pytest.raises(TraceError, match="no routing rows at layers 7"):
        import_trace(tmp_path / "in.jsonl", tmp_path / "u", options=ImportOptions(layers=(7,)))


def test_many_problems_and_tokens_over_several_buckets_come_out_sorted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    keys = [(p, t) for p in range(150) for t in (0, 1, 5000, 9000)]
    lines = [line(p, layer, t, expert_ids=[p % 3, 3]) for p, t in keys for layer in (0, 2)]
    trace = convert(tmp_path, [lines[i] for i in random.permutation(len(lines))])
    chunk = trace.load()
    assert list(zip(chunk.problem_ids_T.tolist(), chunk.token_ids_T.tolist(), strict=True)) == keys
    assert (chunk.expert_ids_TLK[:, 1].min(-1) == chunk.problem_ids_T % 3).all()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([line(), "{"], "line 2: not JSON"),
        ([line(), "null" + line()], "line 2: not JSON"),
        ([line(), line() + " null"], "line 2: not JSON"),
        ([line(), "[]"], "line 2: expected an object"),
        (['{"layer": 0, "problem_id": 0, "expert_ids": [1]}'], "line 1: expected a whole number 'token_id'"),
        ([line(), line(weights=[0.5])], "line 2: 1 weights for 2 experts"),
        ([line(), line(weights=None)], "line 2: expected a list 'weights'"),
        ([line(expert_ids=[1, -1])], "line 1: expected expert ids in 'expert_ids' within the valid range"),
        ([line(weights=[0.5, -0.5])], "problem 0, token 0, layer 0: a weight that is negative"),
        (
            [line(layer=0), line(layer=1, token_id=1)],
            r"nothing is left: 2 of 2 tokens lacked rows .* Of the layers \[0, 1\], layer 0",
        ),
        ([line(token_id=-1)], "token_id -1..-1"),
        ([line(token_id=2**70)], "expected a whole number"),
        ([line(token_id=1.5)], "expected a whole number"),
        ([line(problem_id=-1)], "problem_id -1..-1"),
        ([line(expert_ids=[0, 0])], "2 experts per token, but ids only up to 0"),
        ([line(), line(token_id=1, expert_ids=[1, 1])], None),
        ([line(expert_ids=[70_000, 0])], "expert id 0..70000"),
        ([line(weights=[1e6, 0.5])], "above 65,504"),
        ([line(layer=40_000)], "layer 40000..40000"),
        ([line(expert_ids=[1, None])], "line 1: expected expert ids in 'expert_ids' within the valid range"),
        ([line(expert_ids=[], weights=[])], "no expert in any row"),
        ([line(expert_ids=list(range(2000)), weights=[0.1] * 2000)], "expected a list 'expert_ids' of at most 1024"),
    ],
)
def test_bad_lines_are_refused_with_the_reason(tmp_path: Path, lines: list[str], reason: str | None) -> None:
    if reason is None:
        assert "1 of 2 tokens named an expert twice at a layer and were dropped" in convert(tmp_path, lines).metadata.gaps
        return
    with pytest.raises(TraceError, match=reason):
        convert(tmp_path, lines)
    assert not (tmp_path / "t").exists()


def test_weights_that_only_later_lines_have_are_an_error_whatever_the_order(tmp_path: Path) -> None:
    for lines in ([line(weights=None), line(token_id=1)], [line(), line(token_id=1, weights=None)]):
        with pytest.raises(TraceError, match="expected a list 'weights'"):
            convert(tmp_path, lines)


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf\n\r\n" + line().encode() + b"\r\n\n")
    assert find_format(tmp_path / "in.jsonl").name == "jsonl"
    assert import_trace(tmp_path / "in.jsonl", tmp_path / "t").metadata.record.weights


def test_an_unknown_weight_is_unknown_wherever_it_stands(tmp_path: Path) -> None:
    for n, weights in enumerate(([float("nan"), 0.5], [0.5, float("nan")])):
        (tmp_path / "in.jsonl").write_text(line(weights=weights) + "\n" + line(token_id=1) + "\n")
        trace = import_trace(tmp_path / "in.jsonl", tmp_path / f"t{n}")
        assert trace.load().token_ids_T.tolist() == [1]


def test_a_huge_position_takes_no_memory(tmp_path: Path) -> None:
    gaps = convert(tmp_path, [line(token_id=2**31 - 3)]).metadata.gaps
    assert gaps[0] == "1 problem without the first positions, 2,147,483,645 in all: prompts not recorded, or only in part"


def test_the_largest_id_leaves_room_for_that_of_empty_slots(tmp_path: Path) -> None:
    lines = [line(expert_ids=[65_534, 7]), line(token_id=1, expert_ids=[5], weights=[1.0])]
    assert convert(tmp_path, lines).load().expert_ids_TLK.tolist() == [[[7, 65_534]], [[5, 65_535]]]
    with pytest.raises(TraceError, match=r"expert id 0\.\.65535"):
        import_trace(_one(tmp_path, line(expert_ids=[65_535, 0])), tmp_path / "u")


def _one(tmp_path: Path, text: str) -> Path:
    (tmp_path / "one.jsonl").write_text(text + "\n")
    return tmp_path / "one.jsonl"


def test_a_pipe_is_not_a_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(TraceError, match="no such file or folder"):
        import_trace(tmp_path / "x.pt", tmp_path / "t")
    with pytest.raises(TraceError, match="looks like none of"):
        import_trace(tmp_path, tmp_path / "t")


def test_a_trace_is_not_a_source_but_says_so(tmp_path: Path) -> None:
    convert(tmp_path, [line()])
    with pytest.raises(TraceError, match="is a trace already"):
        import_trace(tmp_path / "t", tmp_path / "u")


def test_a_number_of_experts_below_the_highest_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="expert id 1, expected below the number of experts, 1"):
        convert(tmp_path, [line()], num_experts=1)


def test_positions_that_are_not_there_are_named_as_gaps(tmp_path: Path) -> None:
    gaps = convert(tmp_path, [line(token_id=2), line(token_id=7)]).metadata.gaps
    assert gaps[:2] == [
        "1 problem without the first positions, 2 in all: prompts not recorded, or only in part",
        "4 further positions of 1 problem without rows",
    ]


def test_a_target_folder_that_was_there_stays_there_empty(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(TraceError, match="expected expert ids in 'expert_ids' within the valid range"):
        convert(tmp_path, [line(expert_ids=[None])])
    assert list((tmp_path / "t").iterdir()) == []


def test_formats_are_found_by_content_or_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello\n")
    with pytest.raises(TraceError, match="looks like none of interrupted, parquet"):
        find_format(tmp_path / "x")
    with pytest.raises(TraceError, match="unknown format 'xml': expected one of interrupted"):
        find_format(tmp_path / "x", "xml")
    with pytest.raises(TraceError, match="no such file or folder"):
        import_trace(tmp_path / "y", tmp_path / "t")
