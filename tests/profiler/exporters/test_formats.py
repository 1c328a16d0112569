"""Every format: the file is read as the engine's loader reads it, and keeps the experts that the report measured."""

from __future__ import annotations

import csv
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.traces import MakeProblems, MakeTrace

from profiler.errors import ModelError, SpecmoeError, TraceError
from profiler.exporters import FORMATS, ExportOptions, export_trace
from profiler.exporters.chosen_experts import Budget
from profiler.exporters.counts import count_parts
from profiler.exporters.json_table import ExpertTable
from profiler.exporters.report import REPORT_SUFFIX, ExportReport, report_path
from profiler.trace.reader import Trace

LAYERS, EXPERTS, FIRST = 3, 8, 1


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    """A trace of a model whose first decoder layer has no experts, with experts of uneven use."""
    problems = random_problems(40, 6, LAYERS, EXPERTS, 2)
    # Expert e becomes e // 2 in half of the problems, where that leaves the two of a token different.
    for number, (ids, _) in enumerate(problems):
        if number % 2:
            ids[:] = np.where(ids[..., :1] // 2 != ids[..., 1:] // 2, ids // 2, ids)
    return make_trace(problems, EXPERTS, first_layer=FIRST)


def export(trace: Trace, out: Path, name: str, **options: Any) -> tuple[ExportReport, list[str]]:
    budget = None if name == "sglang" else Budget(slots=2)
    return export_trace(trace, out, name, replace(ExportOptions(budget=budget), **options))


def kept_of(report: ExportReport) -> list[int]:
    return [report.kept_by_layer[FIRST + layer] for layer in range(LAYERS)]


@pytest.mark.parametrize("name", FORMATS)
def test_report_is_written_next_to_the_file(name: str, trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / f"exported{FORMATS[name].suffix}"
    report, _ = export(trace, out, name)
    assert ExportReport.model_validate_json(report_path(out).read_text()) == report
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))
    counted = count_parts(trace)
    assert report.tokens == counted.part("train").num_tokens
    assert report.held_out_tokens == counted.part("test").num_tokens
    if name != "sglang":
        assert report.chance is not None
        assert report.chance == report.kept / (LAYERS * EXPERTS)
        assert report.hit_rate is not None
        assert report.best_static is not None
        assert report.hit_rate <= report.best_static
    assert any(FORMATS[name].unverified in line for line in report.lines())
    with pytest.raises(TraceError, match="exists: choose another file"):
        export(trace, out, name)


def test_exllamav3(trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "hot.json"
    report, usage = export(trace, out, "exllamav3")
    read = json.loads(out.read_text())
    # As load_cpu_split does: descending counts, the tail goes to the CPU.
    on_cpu = int(re.findall(r"--moe_cpu_split (\d+)", usage[0])[0])
    held_out = count_parts(trace).part("test").tokens_LE
    hits = 0
    for layer in range(LAYERS):
        stats = read.pop(f"model.layers.{layer + FIRST}.mlp")
        order = sorted(range(EXPERTS), key=lambda e: -stats[e])
        hits += held_out[layer, order[: EXPERTS - on_cpu]].sum()
    assert read == {}
    assert report.hit_rate == pytest.approx(hits / held_out.sum())
    with pytest.raises(SpecmoeError, match="equally many experts in each layer"):
        export(trace, tmp_path / "b.json", "exllamav3", over_all_layers=True)
    with pytest.raises(SpecmoeError, match=r"expected \{layer\} in it"):
        export(trace, tmp_path / "c.json", "exllamav3", layer_key="mlp")
    export(trace, tmp_path / "d.json", "exllamav3", layer_key="m.{layer}.moe", by="weight")
    mass = json.loads((tmp_path / "d.json").read_text())
    assert mass["m.2.moe"] == pytest.approx(count_parts(trace).part("train").mass_LE[1])


def test_module_names_of_architectures(trace: Trace, tmp_path: Path) -> None:
    model = trace.metadata.model.model_copy(update={"architecture": "MixtralForCausalLM"})
    mixtral = replace(trace, metadata=trace.metadata.model_copy(update={"model": model}))
    export(mixtral, tmp_path / "m.json", "exllamav3")
    assert "model.layers.1.block_sparse_moe" in json.loads((tmp_path / "m.json").read_text())


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.3, 0.9, 1.0])
def test_ktransformers(fraction: float, trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "frequency.pt"
    report, usage = export(trace, out, "ktransformers", budget=Budget(fraction=fraction))
    counts = torch.load(out, map_location="cpu", weights_only=True)["logical_count"]
    # As _init_kt_gpu_experts_masks does: three dimensions, a row for every decoder layer, the most used of all layers.
    assert tuple(counts.shape) == (1, FIRST + LAYERS, EXPERTS)
    frequency = counts.sum(dim=0).float()
    assert not frequency[:FIRST].any()
    found = re.findall(r"--kt-num-gpu-experts (\d+)|--kt-gpu-experts-ratio ([\d.]+)", usage[0])[0]
    total = int(found[0]) * LAYERS if found[0] else int(LAYERS * EXPERTS * float(found[1]))
    assert total == report.kept == int(fraction * LAYERS * EXPERTS)
    best = sorted(range(frequency.numel()), key=lambda place: (-float(frequency.view(-1)[place]), place))[:total]
    mask = np.zeros(frequency.numel(), dtype=np.bool_)
    mask[best] = True
    kept = mask.reshape(FIRST + LAYERS, EXPERTS)[FIRST:]
    assert kept.sum(1).tolist() == kept_of(report)
    held_out = count_parts(trace).part("test").tokens_LE
    assert report.hit_rate == pytest.approx(held_out[kept].sum() / held_out.sum())
    assert any("ranks the experts of all layers together" in note for note in report.notes)


def test_sglang(trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    report, _ = export(trace, out, "sglang")
    # As init_by_eplb does: a table [decoder layers, experts] of tokens.
    table = torch.tensor(json.loads(out.read_text())["logical_count"])
    assert tuple(table.shape) == (FIRST + LAYERS, EXPERTS)
    assert table[FIRST:].tolist() == count_parts(trace).part("train").tokens_LE.tolist()
    assert "physical_to_logical_map" not in json.loads(out.read_text())
    assert report.hit_rate is None
    with pytest.raises(SpecmoeError, match="keeps all experts"):
        export(trace, tmp_path / "b.json", "sglang", budget=Budget(slots=1))
    with pytest.raises(SpecmoeError, match="export by tokens"):
        export(trace, tmp_path / "b.json", "sglang", by="weight")
    with pytest.raises(SpecmoeError, match=r"names end in \.json"):
        export(trace, tmp_path / "b.txt", "sglang")


@pytest.mark.parametrize(("fraction", "kept_layers"), [(0.0, 0), (0.34, 1), (0.7, 2), (1.0, 3)])
def test_llama_cpp(fraction: float, kept_layers: int, trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "arguments.txt"
    report, _ = export(trace, out, "llama-cpp", budget=Budget(fraction=fraction))
    arguments = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    first_layers = int(re.findall(r"--n-cpu-moe (\d+)", arguments[0])[0])
    names = {
        layer: [f"blk.{layer}.ffn_{part}.weight" for part in ("up_exps", "gate_exps", "down_exps", "gate_up_exps")]
        for layer in range(FIRST, FIRST + LAYERS)
    }
    by_number = {layer for layer in names if layer < first_layers}
    assert len(by_number) == LAYERS - kept_layers
    by_name = set()
    if kept_layers < LAYERS:
        # As the loader does: pairs separated by commas, split at the first '=', searched in each tensor's name.
        quoted = re.fullmatch(r"--override-tensor '(.*)'", arguments[1])
        assert quoted is not None
        (pair,) = quoted[1].split(",")
        pattern, _, buffer = pair.partition("=")
        assert buffer == "CPU"
        by_name = {layer for layer, tensors in names.items() if all(re.search(pattern, tensor) for tensor in tensors)}
        assert not re.search(pattern, f"blk.{FIRST}0.ffn_up_exps.weight")
        assert not re.search(pattern, f"blk.{FIRST}.ffn_up_shexp.weight")
    # With one token a step the layers are alike: both arguments keep the last ones.
    assert by_name == by_number
    assert report.hit_rate == pytest.approx(kept_layers / LAYERS)
    assert kept_of(report) == [0] * (LAYERS - kept_layers) + [EXPERTS] * kept_layers


def test_json_and_csv_hold_the_same(trace: Trace, tmp_path: Path) -> None:
    options: dict[str, Any] = {"budget": Budget(fraction=0.4), "over_all_layers": True, "part": "validation"}
    report, _ = export(trace, tmp_path / "t.json", "json", **options)
    export(trace, tmp_path / "t.csv", "csv", **options)
    document = ExpertTable.model_validate_json((tmp_path / "t.json").read_text())
    assert document.report == report
    assert sum(len(layer.kept) for layer in document.layers) == report.kept == 9
    counted = count_parts(trace)
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert len(rows) == LAYERS * EXPERTS
    by_rank = sorted(rows, key=lambda row: int(row["rank"]))
    assert [int(row["kept"]) for row in by_rank] == [1] * 9 + [0] * 15
    assert sorted((int(row["tokens"]) for row in rows), reverse=True) == [int(row["tokens"]) for row in by_rank]
    for row, layer in zip(rows[::EXPERTS], document.layers, strict=True):
        assert int(row["layer"]) == layer.layer
        assert layer.tokens == counted.part("train").tokens_LE[layer.layer - FIRST].tolist()
        assert layer.held_out_tokens == counted.part("validation").tokens_LE[layer.layer - FIRST].tolist()
        assert sum(layer.share) == pytest.approx(1)


def test_gigabytes_use_the_size_of_the_model_s_experts(
    make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path
) -> None:
    trace = make_trace(random_problems(20, 3, 32, 8, 2), 8, model_id="mistralai/Mixtral-8x7B-v0.1")
    # 3 x 4096 x 14336 parameters of 2 bytes: 352 MB, so 34 of 256 experts, one in each of 32 layers.
    report, _ = export(trace, tmp_path / "t.json", "json", budget=Budget(gigabytes=12.0))
    assert report.kept == 32
    report, _ = export(trace, tmp_path / "u.json", "json", budget=Budget(gigabytes=12.0), over_all_layers=True)
    assert report.kept == 34
    for options, error, message in (
        ({"model": "gpt-oss-20b"}, SpecmoeError, "24 MoE layers of 32 experts; the trace has 32 of 8"),
        ({"model": "nothing"}, SpecmoeError, "unknown model 'nothing'"),
        ({"precision": "int3"}, ModelError, "unknown precision"),
    ):
        with pytest.raises(error, match=message):
            export(trace, tmp_path / "v.json", "json", **{"budget": Budget(gigabytes=12.0), **options})


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_model_has_the_trace_s_shape(name: str, trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / f"exported{FORMATS[name].suffix}"
    with pytest.raises(SpecmoeError, match="32 MoE layers of 8 experts; the trace has 3 of 8, up to layer 3: choose another"):
        export(trace, out, name, model="mixtral-8x7b")
    assert not list(tmp_path.glob("exported*"))


def test_a_named_model_has_the_trace_s_layers(make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path) -> None:
    """As many layers, but numbered beyond those of the model: an error if it was named, a note if the trace names it."""
    trace = make_trace(random_problems(20, 3, 32, 8, 2), 8, first_layer=2, model_id="mistralai/Mixtral-8x7B-v0.1")
    with pytest.raises(SpecmoeError, match="up to layer 33: choose another model"):
        export(trace, tmp_path / "t.json", "sglang", model="mixtral-8x7b")
    report, _ = export(trace, tmp_path / "t.json", "sglang")
    assert len(json.loads((tmp_path / "t.json").read_text())["logical_count"]) == 34
    assert any("the number of decoder layers is not known: 34" in note for note in report.notes)


@pytest.mark.parametrize("text", ["a\n--n-cpu-moe 0", "a\r$(id)", "a\x1b[2Jb\u2028c"])
def test_names_in_a_trace_begin_no_line_of_arguments(text: str, trace: Trace, tmp_path: Path) -> None:
    model = trace.metadata.model.model_copy(update={"id": text})
    metadata = trace.metadata.model_copy(update={"model": model, "gaps": [text]})
    export(replace(trace, metadata=metadata), tmp_path / "a.txt", "llama-cpp")
    export(trace, tmp_path / "b.txt", "llama-cpp")
    written, plain = ((tmp_path / name).read_text() for name in ("a.txt", "b.txt"))
    arguments = [[line for line in found.splitlines() if not line.startswith("#")] for found in (written, plain)]
    assert arguments[0] == arguments[1]
    assert "\r" not in written
    assert "\x1b" not in written


@pytest.mark.parametrize("name", ["exllamav3", "ktransformers", "sglang"])
def test_the_path_in_the_usage_is_one_word_of_a_shell(name: str, trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / f"two words; $(id){FORMATS[name].suffix}"
    _, usage = export(trace, out, name)
    words = [word.rstrip(",").removeprefix("EXL3_MOE_CPU_SPLIT_STATS=") for word in shlex.split(usage[0].replace(";", " "))]
    assert str(out).replace(";", " ") in words


@pytest.mark.parametrize("name", FORMATS)
def test_other_files_are_left_alone(name: str, trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "hot.tmp").write_text("mine")
    out = tmp_path / f"hot{FORMATS[name].suffix}"
    export(trace, out, name)
    assert {path.name for path in tmp_path.iterdir()} - {"trace"} == {"hot.tmp", out.name, report_path(out).name}
    assert (tmp_path / "hot.tmp").read_text() == "mine"


@pytest.mark.parametrize("report_fails", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_an_export_that_fails_leaves_nothing(
    name: str, report_fails: bool, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / f"hot{FORMATS[name].suffix}"
    write_text, rename = Path.write_text, Path.rename

    def write(path: Path, text: str, **options: Any) -> int:
        if REPORT_SUFFIX in path.name and report_fails:
            raise OSError("disk full")
        return write_text(path, text, **options)

    def move(path: Path, target: Path) -> Path:
        if target == out and not report_fails:
            raise OSError("disk full")
        return rename(path, target)

    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.setattr(Path, "rename", move)
    with pytest.raises(OSError, match="disk full"):
        export(trace, out, name)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("part", ["train", "all"])
def test_what_is_not_held_out_says_so(part: str, trace: Trace, tmp_path: Path) -> None:
    report, _ = export(trace, tmp_path / "t.csv", "csv", part=part)
    assert any(note.startswith("NOT held out") for note in report.notes)
    assert not any(note.startswith("NOT") for note in export(trace, tmp_path / "u.csv", "csv")[0].notes)
