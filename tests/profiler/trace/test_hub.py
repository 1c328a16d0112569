"""The dataset folder and its upload, to a hub that speaks the protocol."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.traces import MakeProblems, MakeTrace

from profiler.errors import TraceError
from profiler.trace.hub import write_hub_folder
from profiler.trace.reader import Trace


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    return make_trace(random_problems(count=2, tokens=5, layers=2, num_experts=8, top_k=2), 8)


def test_the_card_names_configurations_and_facts(trace: Trace, tmp_path: Path) -> None:
    write_hub_folder(trace, tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert [config["config_name"] for config in front["configs"]] == ["routing", "problems", "tokens"]
    assert front["configs"][0] == {"config_name": "routing", "data_files": "routing/*.parquet", "default": True}
    assert "2 MoE layers, 8 experts, top-2, weights as the model applies them" in card
    assert "20, one per (problem, token, MoE layer)" in card


def test_names_from_the_metadata_cannot_write_into_the_card(trace: Trace, tmp_path: Path) -> None:
    path = trace.path / "metadata.json"
    document = json.loads(path.read_text())
    document["model"]["id"] = "x\n---\n# Free <script>alert(1)</script> [money](http://evil)"
    path.write_text(json.dumps(document))
    (trace.path / "manifest.json").unlink()
    from profiler.trace.writer import write_manifest

    write_manifest(trace.path)
    write_hub_folder(Trace.open(trace.path), tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "<script>" not in card
    assert "[money](" not in card
    assert "\n# Free" not in card


def test_a_changed_file_is_not_copied(trace: Trace, tmp_path: Path) -> None:
    part = trace.routing_files[0]
    content = bytearray(part.read_bytes())
    content[20] ^= 1
    part.write_bytes(content)
    with pytest.raises(TraceError, match="does not match its sha256"):
        write_hub_folder(Trace.open(trace.path), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def push(trace: Trace, folder: Path, address: str, token: str, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["convert", str(trace.path), str(folder), "--to", "hub-folder", "--push", "me/routes", *more]
    environment = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HOME": str(folder.parent)}
    return subprocess.run([sys.executable, "-m", "specmoe", *arguments], capture_output=True, text=True, env=environment)


def test_a_push_puts_every_file_into_the_dataset(
    trace: Trace, tmp_path: Path, hub: tuple[str, dict[str, dict[str, Any]]]
) -> None:
    address, repositories = hub
    done = push(trace, tmp_path / "folder", address, "good", "--private")
    assert done.returncode == 0, done.stderr
    assert "datasets/me/routes" in done.stdout
    repository = repositories["me/routes"]
    assert repository["asked"]["type"] == "dataset"
    assert repository["private"]
    folder = tmp_path / "folder"
    local = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert repository["files"] == local
    assert {"README.md", "manifest.json", "routing/part-00000.parquet"} <= local.keys()


def test_a_second_push_leaves_nothing_of_the_first(
    trace: Trace, tmp_path: Path, hub: tuple[str, dict[str, dict[str, Any]]]
) -> None:
    address, repositories = hub
    files = {"routing/part-00007.parquet": b"old", "notes.md": b"mine"}
    repositories["me/routes"] = {"asked": {}, "private": False, "files": files}
    assert push(trace, tmp_path / "folder", address, "good").returncode == 0
    assert "routing/part-00007.parquet" not in files
    assert files["notes.md"] == b"mine"
    # The folder is there now, and can be pushed again; but what is public does not become private by asking.
    assert push(trace, tmp_path / "folder", address, "good").returncode == 0
    done = push(trace, tmp_path / "folder", address, "good", "--private")
    assert done.returncode == 1
    assert "me/routes exists and is public" in done.stderr


def test_a_folder_of_another_trace_is_not_overwritten(trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("mine")
    done = push(trace, tmp_path / "folder", "http://127.0.0.1:9", "good")
    assert done.returncode == 1
    assert "is not an export of this trace" in done.stderr


def test_without_a_network_the_push_says_so(trace: Trace, tmp_path: Path) -> None:
    done = push(trace, tmp_path / "folder", "http://127.0.0.1:9", "good")
    assert done.returncode == 1
    assert done.stderr.startswith("specmoe: the hub did not accept me/routes")
    assert done.stderr.count("\n") == 1


def test_links_are_not_published(trace: Trace, tmp_path: Path) -> None:
    (trace.path / "tokens.parquet").rename(tmp_path / "elsewhere")
    (trace.path / "tokens.parquet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TraceError, match="is a link"):
        write_hub_folder(trace, tmp_path / "folder")


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(
    trace: Trace, tmp_path: Path, hub: tuple[str, dict[str, dict[str, Any]]]
) -> None:
    done = push(trace, tmp_path / "folder", hub[0], "bad")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the hub did not accept me/routes" in done.stderr
    assert "Invalid username or password" in done.stderr
    assert (tmp_path / "folder" / "README.md").is_file()
