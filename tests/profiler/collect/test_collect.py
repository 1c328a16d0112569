"""Collection through the transformers engine (no vLLM needed), and the command line's errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import warm

from profiler.collect.collection import CollectSummary
from profiler.collect.job import collect
from profiler.collect.options import LocalOptions
from profiler.errors import EngineError, SpecmoeError, TraceError
from profiler.models.resolve import ResolvedModel
from profiler.trace.reader import Trace


def options(out: Path, **changes: Any) -> LocalOptions:
    settings: dict[str, Any] = {
        "model": "demo",
        "dataset": "demo-math,demo-code",
        "out": out,
        "num_problems": 5,
        "engine": "transformers",
        "max_new_tokens": 6,
        "dtype": "float32",
    }
    return LocalOptions(**(settings | changes))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    out = tmp_path_factory.mktemp("collect") / "trace"
    progress: list[tuple[int, int]] = []
    summary = collect(options(out, jsonl=True), on_progress=lambda now: progress.append((now.problems, now.total)))
    assert progress == [(n, 5) for n in range(6)]
    trace = Trace.open(out)
    assert (summary.problems, summary.rows) == (5, trace.num_rows)
    return trace


def test_problems_are_spread_evenly_and_every_file_is_in_the_manifest(collected: Trace) -> None:
    assert collected.problems.column("dataset").to_pylist() == ["demo-math"] * 3 + ["demo-code"] * 2
    assert collected.faults(verify=True) == []
    assert collected.manifest is not None
    assert set(collected.manifest.files) == {
        "metadata.json",
        "problems.parquet",
        "tokens.parquet",
        "routing/part-00000.parquet",
        "routing.jsonl",
    }


def test_a_sequence_of_n_tokens_gives_n_minus_1_rows_per_layer(collected: Trace) -> None:
    for problem in collected.problems.to_pylist():
        tokens = problem["prompt_tokens"] + problem["output_tokens"]
        chunk = collected.arrays(problem["problem_id"])
        assert chunk.token_ids_T.tolist() == list(range(tokens - 1))
        assert chunk.expert_ids_TLK.shape == (tokens - 1, 8, 2)


def test_weights_of_a_renormalizing_model_sum_to_one(collected: Trace) -> None:
    weights_TLK = collected.load().weights_TLK
    assert weights_TLK is not None
    sums = weights_TLK.astype(np.float64).sum(-1)
    assert np.abs(sums - 1).max() < 2e-3


def test_tokens_decode_to_prompt_and_output(collected: Trace) -> None:
    from transformers import AutoTokenizer

    from profiler.models.resolve import demo_model_folder

    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    tokens = collected.tokens.to_pylist()
    for problem in collected.problems.to_pylist():
        own = [t for t in tokens if t["problem_id"] == problem["problem_id"]]
        for phase, text in (("prefill", problem["prompt"]), ("decode", problem["output"])):
            ids = [t["vocab_id"] for t in own if t["phase"] == phase]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len([t for t in own if t["phase"] == "prefill"]) == problem["prompt_tokens"]


def test_jsonl_beside_the_trace_has_the_same_rows(collected: Trace) -> None:
    lines = (collected.path / "routing.jsonl").read_text().splitlines()
    assert len(lines) == collected.num_rows
    first = collected.arrays(0)
    assert json.loads(lines[0])["expert_ids"] == first.expert_ids_TLK[0, 0].tolist()


def test_a_prompt_that_is_too_long_keeps_its_head_and_says_so(tmp_path: Path) -> None:
    changed = options(tmp_path / "t", dataset="demo-reviews", num_problems=2, max_length=26)
    assert collect(changed).truncated_problems == 2
    trace = Trace.open(tmp_path / "t")
    assert trace.problems.column("prompt_tokens").to_pylist() == [20, 20]
    assert min(trace.problems.column("truncated_tokens").to_pylist()) > 0
    assert trace.metadata.capture["truncated_problems"] == 2


def test_no_room_for_a_prompt_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="leaves no room"):
        collect(options(tmp_path / "t", max_length=6))
    assert not (tmp_path / "t").exists()


def test_an_engine_that_fails_before_any_row_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from profiler.engines import transformers

    def fail(*_: object) -> None:
        raise EngineError("the engine failed")

    monkeypatch.setattr(transformers, "route", fail)
    monkeypatch.setattr(transformers.TransformersEngine, "__init__", _light_engine)
    with pytest.raises(EngineError, match="the engine failed"):
        collect(options(tmp_path / "t"))
    assert not (tmp_path / "t").exists()


def test_an_engine_that_fails_later_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from profiler.engines import transformers

    route, calls = transformers.route, iter(range(100))

    def fail_later(*arguments: Any) -> object:
        if next(calls) == 2:
            raise EngineError("the engine failed")
        return route(*arguments)

    monkeypatch.setattr(transformers, "route", fail_later)
    monkeypatch.setattr(transformers.TransformersEngine, "__init__", _light_engine)
    with pytest.raises(EngineError, match="the engine failed; what was recorded before is kept: resume the collection"):
        collect(options(tmp_path / "t"))
    assert (tmp_path / "t" / "metadata.json").is_file()


def _light_engine(self: object, model: ResolvedModel, engine_options: object) -> None:
    """The demo model, without the constructor's own trial run of `route`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = model.location
    vars(self).update(
        _tokenizer=AutoTokenizer.from_pretrained(location),
        _model=AutoModelForCausalLM.from_pretrained(location),
        versions={},
        dtype="bfloat16",
        compiled=False,
        moe_kernels={},
        notes=[],
        _batch=16,
        max_length=64,
        moe_layers=list(range(8)),
        top_k=2,
        num_experts=8,
        _model_facts=model.metadata,
    )


def test_an_out_that_is_taken_is_refused_untouched(collected: Trace, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="already holds a trace"):
        collect(options(collected.path))
    assert collected.faults(verify=True) == []
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TraceError, match="not an empty folder"):
        collect(options(tmp_path))


def test_data_files_go_with_one_dataset(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="one dataset only"):
        collect(options(tmp_path / "t", data_files=tmp_path / "x.parquet"))


def test_options_of_vllm_are_refused_with_another_engine(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="moe_backend 'marlin' is an option of vLLM: use the engine vllm"):
        collect(options(tmp_path / "t", moe_backend="marlin"))
    assert not (tmp_path / "t").exists()


def specmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run("specmoe", *arguments)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["collect", "--model", "demo"], 2, "Missing option '--dataset'"),
        (["collect", "--model", "x", "--dataset", "demo-math", "--out", "OUT"], 2, "unknown model 'x': expected one of demo"),
        (["collect", "--model", "demo", "--dataset", "x", "--out", "OUT"], 2, "unknown dataset 'x': expected one of humaneval"),
        (["collect", "--model", "demo", "--dataset", "gsm8k", "--data-files", "no.parquet", "--out", "OUT"], 1, "no such file"),
        (
            ["collect", "--model", "demo", "--dataset", "demo-math", "--out", "OUT", "--dtype", "int3"],
            2,
            "'int3' is not one of",
        ),
        (["inspect", "OUT"], 1, "no such trace directory"),
        (["convert", "OUT", "OUT2"], 1, "no such file or folder"),
        (["convert", "OUT", "OUT2", "--from", "xml"], 2, "'xml': expected one of interrupted, parquet"),
        (["convert", "OUT", "OUT2", "--layers", "5-3"], 2, "'5-3': expected the smaller number first"),
        (["convert", "OUT", "OUT2", "--layers", "all"], 2, "'all': expected numbers and ranges"),
        (["convert", "OUT", "OUT2", "--num-experts", "100000"], 2, "65535"),
        (["convert", "OUT", "OUT2", "--push", "me/x"], 2, "needs --to hub-folder"),
        (["analyze", "OUT", "--out", "OUT2"], 1, "no such trace directory"),
        (["evaluate", "OUT", "--trace", "OUT"], 1, "is not a run"),
    ],
)
def test_wrong_usage_is_one_clear_line(arguments: list[str], code: int, text: str, tmp_path: Path) -> None:
    done = specmoe(*[argument.replace("OUT", str(tmp_path / "out")) for argument in arguments])
    assert done.returncode == code
    assert done.stdout == ""
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_vllm_the_vllm_engine_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from profiler.engines import vllm

    monkeypatch.setattr(vllm, "is_installed", lambda: False)
    with pytest.raises(EngineError, match=r"vLLM is not installed: pip install 'speculative-moe\[cpu\]'"):
        collect(options(tmp_path / "t", engine="vllm"))
    assert not (tmp_path / "t").exists()


def test_inspect_tells_complete_from_incomplete(collected: Trace, tmp_path: Path) -> None:
    import shutil

    done = specmoe("inspect", str(collected.path), "--verify")
    assert done.returncode == 0
    assert "8 MoE layers (0-7), 8 experts, top-2" in done.stdout
    assert done.stdout.endswith("complete\n")
    shutil.copytree(collected.path, tmp_path / "t")
    (tmp_path / "t" / "manifest.json").unlink()
    done = specmoe("inspect", str(tmp_path / "t"), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["complete"] is False


def test_a_budget_that_is_not_reached_is_said(tmp_path: Path) -> None:
    budget = ["--target-tokens", "100000", "--max-tokens-per-problem", "12", "--max-new-tokens", "2"]
    common = ["collect", "--model", "demo", "--engine", "transformers", "--out", str(tmp_path / "t")]
    done = specmoe(*common, "--dataset", "demo-math,demo-reviews", *budget)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "demo-math 40 problems, 480 tokens; demo-reviews 40 problems, 480 tokens" in lines
    assert "960 of 100,000 tokens: outputs ended early, or the datasets have no more problems" in lines
    assert any(line.startswith("peak memory ") for line in lines)


def test_the_summary_as_json_is_read_back(tmp_path: Path) -> None:
    common = ["collect", "--model", "demo", "--engine", "transformers", "--dataset", "demo-math", "--num-problems", "2"]
    done = specmoe(*common, "--max-new-tokens", "2", "--out", str(tmp_path / "t"), "--json")
    assert done.returncode == 0, done.stderr
    summary = CollectSummary.model_validate_json(done.stdout)
    assert (summary.trace, summary.problems, summary.output_tokens) == (tmp_path / "t", 2, 4)
    assert summary.tokens_per_second == pytest.approx(
        (summary.prompt_tokens + summary.output_tokens) / summary.generate_seconds, rel=1e-6
    )
    assert json.loads(summary.model_dump_json()) == json.loads(done.stdout)
