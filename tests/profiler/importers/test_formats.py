"""What holds for every format: detection, files and folders, and a source of another format."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import samples

from profiler.errors import TraceError
from profiler.importers import FORMATS, find_format, import_trace
from profiler.importers.rows import ImportOptions
from profiler.models.registry import MODELS
from profiler.trace.reader import Trace
from profiler.trace.schema import INFERRED_EXPERTS

# A sound file of each format.
SAMPLES: dict[str, Callable[[Path], Path]] = {
    "parquet": samples.make_parquet,
    "flame-moe": samples.make_flame,
    "sglang": samples.make_sglang,
    "routed-experts": samples.make_npy,
    "moe-beyond": samples.make_moe_beyond,
    "edge-csv": samples.make_edge_csv,
    "route-log": samples.make_route_log,
    "olmoe": samples.make_olmoe,
    "jsonl": samples.make_old_rows,
    "slime": samples.make_slime,
    "prime-rl": samples.make_prime_rl,
    "server-responses": samples.make_vllm_responses,
    "lattice": samples.make_lattice,
    "colibri": samples.make_colibri,
    "llama-cpp": samples.make_llama_cpp,
    "megatron": samples.make_megatron,
}
FOLDER_ONLY = {"interrupted"}
# Whose samples say how many experts a layer has; whose routes have no shape but the model's.
STATE_EXPERTS = {"edge-csv", "route-log", "sglang"}
NEED_ALL_LAYERS = {"server-responses"}


def sample(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    return SAMPLES[name](folder)


def test_every_format_has_a_sample() -> None:
    assert SAMPLES.keys() | FOLDER_ONLY == FORMATS.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_is_detected_and_read(tmp_path: Path, name: str) -> None:
    source = sample(name, tmp_path / "source")
    assert find_format(source).name == name
    assert import_trace(source, tmp_path / "t").num_rows
    # A format that is named is read whatever the file is called.
    renamed = source.rename(source.with_name("recording.bin"))
    assert import_trace(renamed, tmp_path / "u", format_name=name).num_rows


@pytest.mark.parametrize("name", SAMPLES)
def test_a_folder_of_files_is_detected_and_read(tmp_path: Path, name: str) -> None:
    source = sample(name, tmp_path / "source")
    folder = tmp_path / "folder"
    (folder / "routing").mkdir(parents=True)
    shutil.copyfile(source, folder / ("routing/part-0.parquet" if name == "parquet" else source.name))
    assert find_format(folder).name == name
    trace = import_trace(folder, tmp_path / "t")
    alone = import_trace(source, tmp_path / "u")
    assert trace.load().expert_ids_TLK.tolist() == alone.load().expert_ids_TLK.tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_folder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match=r"empty: (the folder contains no file named |no routing\.parquet|expected metadata)"):
        import_trace(tmp_path / "empty", tmp_path / "t", format_name=name)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress], ids=["gzip", "xz", "bzip2"])
@pytest.mark.parametrize("name", [None, "jsonl", "sglang", "moe-beyond", "server-responses"])
def test_compressed_files_are_named_as_such(tmp_path: Path, name: str | None, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.jsonl").write_bytes(pack(b"{}"))
    with pytest.raises(TraceError, match=r"a\.jsonl is compressed with (gzip|xz|bzip2): decompress it first"):
        import_trace(tmp_path / "a.jsonl", tmp_path / "t", format_name=name)


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_an_empty_file_is_named_as_such(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(TraceError, match=r"a\.jsonl is an empty file"):
        import_trace(tmp_path / "a.jsonl", tmp_path / "t", format_name=name)


def test_compressed_files_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "b.jsonl.zst").touch()
    with pytest.raises(TraceError, match=r"no file named \*\.jsonl or \*\.json; decompress b\.jsonl\.zst first"):
        import_trace(tmp_path / "logs", tmp_path / "t", format_name="lattice")


def test_a_file_is_not_an_interrupted_collection(tmp_path: Path) -> None:
    source = sample("jsonl", tmp_path / "source")
    with pytest.raises(TraceError, match=r"old\.jsonl is a file, and interrupted is read from a folder; it looks like jsonl"):
        import_trace(source, tmp_path / "t", format_name="interrupted")


@pytest.mark.parametrize(("name", "given"), list(itertools.permutations(SAMPLES, 2)))
def test_a_source_of_another_format_is_named(tmp_path: Path, name: str, given: str) -> None:
    source = sample(given, tmp_path / "source")
    with pytest.raises(TraceError, match=f"; it looks like {given}$") as refused:
        import_trace(source, tmp_path / "t", format_name=name)
    assert source.name in str(refused.value)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_model_that_is_named_and_known_gives_its_facts_whatever_the_format(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sample(name, tmp_path / "source")
    found = import_trace(source, tmp_path / "unnamed").metadata.model
    # A model of which the source shows all K experts and the last layer, but not the last experts, and one layer less.
    known = replace(
        MODELS["mixtral-8x7b"], name="known", experts=found.num_experts + 56, top_k=found.top_k, layers=found.moe_layers[-1] + 2
    )
    monkeypatch.setattr("profiler.importers.known_model.MODELS", {"known": known})
    if name in STATE_EXPERTS:
        with pytest.raises(TraceError, match=rf"says {found.num_experts} experts, but known has {known.experts}: name another"):
            import_trace(source, tmp_path / "named", options=ImportOptions(model="known"))
        return
    if name in NEED_ALL_LAYERS:
        known = replace(known, layers=len(found.moe_layers))
        monkeypatch.setattr("profiler.importers.known_model.MODELS", {"known": known})
    metadata = import_trace(source, tmp_path / "named", options=ImportOptions(model="known")).metadata
    model = metadata.model
    renormalized = known.renormalized if found.renormalized is None else found.renormalized
    assert (model.num_experts, model.num_layers, model.renormalized) == (known.experts, known.layers, renormalized)
    assert (model.top_k, model.moe_layers) == (found.top_k, found.moe_layers)
    assert INFERRED_EXPERTS not in metadata.gaps
    missing = len(set(known.moe_layers) - set(model.moe_layers))
    lacks = f"{missing} of the {len(known.moe_layers)} MoE layers of known are not in the source"
    assert (lacks in metadata.gaps) == (missing > 0)


def test_logs_of_a_layer_each_are_one_log(tmp_path: Path) -> None:
    whole = sample("route-log", tmp_path / "source").read_text().splitlines()
    folder = tmp_path / "layers"
    folder.mkdir()
    for layer in (0, 1):
        lines = [line for line in whole[1:] if f'"layer": {layer}' in line]
        (folder / f"layer_{layer}.jsonl").write_text("\n".join([whole[0], *lines]) + "\n")
    trace = import_trace(folder, tmp_path / "t")
    assert trace.metadata.model.moe_layers == [0, 1]
    assert trace.metadata.model.id == "m"
    alone = import_trace(tmp_path / "source" / "log.jsonl", tmp_path / "u")
    assert trace.load().expert_ids_TLK.tolist() == alone.load().expert_ids_TLK.tolist()


@pytest.mark.parametrize("name", ["route-log", "edge-csv", "olmoe"])
def test_logs_of_a_request_each_are_different_problems(tmp_path: Path, name: str) -> None:
    source = sample(name, tmp_path / "source")
    rows = import_trace(source, tmp_path / "u").num_rows
    shutil.copyfile(source, source.with_stem("another"))
    trace = import_trace(source.parent, tmp_path / "t")
    assert trace.num_rows == 2 * rows
    assert len({key.partition("/")[0] for key in trace.problems.column("source_key").to_pylist()}) == 2


@pytest.mark.parametrize(
    ("name", "first", "second", "said"),
    [
        ("route-log", '"model_id": "m"', '"model_id": "n"', "model m, but .* of n"),
        ("route-log", '"num_experts": 8', '"num_experts": 9', "number of experts 8, but .* of 9"),
        ("edge-csv", "# route_trace v1", "# route_trace v1 model=b", "model a, but .* of b"),
        ("edge-csv", "# route_trace v1", "# route_trace v1 model=a n_expert=9", "number of experts 8, but .* of 9"),
    ],
)
@pytest.mark.parametrize("by_layer", [False, True])
def test_logs_of_different_models_are_not_mixed(
    tmp_path: Path, name: str, first: str, second: str, said: str, by_layer: bool
) -> None:
    text = sample(name, tmp_path / "source").read_text()
    assert first in text
    sound = text.replace("# route_trace v1", "# route_trace v1 model=a n_expert=8", 1)
    folder = tmp_path / "folder"
    folder.mkdir()
    suffix = "jsonl" if name == "route-log" else "csv"
    other = text.replace(first, second, 1)
    if by_layer and name == "route-log":
        sound = "".join(line for line in sound.splitlines(keepends=True) if '"layer": 1' not in line)
        other = "".join(line for line in other.splitlines(keepends=True) if '"layer": 0' not in line)
    (folder / f"1.{suffix}").write_text(sound)
    import_trace(folder, tmp_path / "t")
    (folder / f"2.{suffix}").write_text(other)
    with pytest.raises(TraceError, match=f"1.{suffix} is of {said}: convert them one by one"):
        import_trace(folder, tmp_path / "u")


def test_json_rows_in_several_files_are_one_recording(tmp_path: Path) -> None:
    source = sample("jsonl", tmp_path / "source")
    lines = source.read_text().splitlines()
    alone = import_trace(source, tmp_path / "u")
    source.write_text("\n".join(lines[::2]) + "\n")
    source.with_stem("second").write_text("\n".join(lines[1::2]) + "\n")
    assert import_trace(source.parent, tmp_path / "t").load().expert_ids_TLK.tolist() == alone.load().expert_ids_TLK.tolist()
    source.with_stem("third").write_text(lines[0].replace("[0.8, 0.2]", "[0.7, 0.3]") + "\n")
    with pytest.raises(
        TraceError, match="two files have different rows of a problem, token and layer: convert them one by one"
    ):
        import_trace(source.parent, tmp_path / "v")


def test_a_file_is_not_a_trace(tmp_path: Path) -> None:
    source = sample("jsonl", tmp_path / "source")
    with pytest.raises(TraceError, match=r"old\.jsonl is a file, and a trace is a folder: 'specmoe convert' reads files"):
        Trace.open(source)
