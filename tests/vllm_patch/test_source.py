"""The source patch on sources of each form that vLLM had, and on the installed vLLM, run for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import warm
from support.agreement import assert_agrees, assert_complete
from typer.testing import CliRunner, Result

from profiler.engines.vllm import is_installed
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from vllm_patch import source
from vllm_patch.__main__ import app
from vllm_patch.check.agreement import load_oracle
from vllm_patch.source import BEGIN, PatchError, open_vllm

LAYER_FORM = """
class FusedMoE:
    def {name}(self, hidden_states, router_logits):
        if self.enable_eplb:
            if self.expert_load_view is None:
                raise ValueError("none")
        topk_weights, topk_ids = router_logits, router_logits

        if self.enable_eplb:
            topk_ids = remap(topk_ids)
        return topk_weights, topk_ids
"""
ROUTER_FORM = """
class BaseRouter:
    def {name}(self, hidden_states, router_logits, topk_indices_dtype=None, *, input_ids=None):
        topk_weights, topk_ids = self._compute_routing(
            hidden_states, router_logits, topk_indices_dtype
        )
        topk_ids = self._apply_eplb_mapping(topk_ids)
        return topk_weights, topk_ids
"""
FOLDER = "model_executor/layers/fused_moe"
FORMS = {
    "0.13.0": (f"{FOLDER}/layer.py", LAYER_FORM.format(name="select_experts")),
    "0.14.1": (f"{FOLDER}/layer.py", LAYER_FORM.format(name="_select_experts")),
    "0.20.0": (f"{FOLDER}/router/base_router.py", ROUTER_FORM.format(name="select_experts")),
    "0.33.0": (f"{FOLDER}/router/base_router.py", ROUTER_FORM.format(name="_select_experts")),
}


def checkout(root: Path, version: str, text: str | None = None) -> Path:
    """A checkout of a vLLM with nothing but the files that matter."""
    name, form = FORMS[version]
    package = root / "vllm"
    (package / name).parent.mkdir(parents=True)
    (package / name).write_text(form if text is None else text, newline="")
    (package / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    (package / "v1" / "worker").mkdir(parents=True)
    (package / "v1" / "worker" / "worker_base.py").write_text("class WorkerWrapperBase:\n    pass\n")
    return package / name


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("version", FORMS)
def test_apply_and_revert_restore_every_byte(version: str, tmp_path: Path) -> None:
    path = checkout(tmp_path, version)
    before = files(tmp_path)
    local = open_vllm(tmp_path)
    assert (local.version, local.state) == (version, "not applied")
    assert local.hook.first <= tuple(map(int, version.split(".")[:2])) <= local.hook.last
    assert len(source.apply(local)) == 2
    assert open_vllm(tmp_path).state == "applied"
    patched = files(tmp_path)
    assert source.apply(open_vllm(tmp_path)) == []
    assert files(tmp_path) == patched
    compile(path.read_text(), str(path), "exec")
    assert len(source.revert(open_vllm(tmp_path / "vllm"))) == 2
    assert files(tmp_path) == before
    assert source.revert(open_vllm(tmp_path)) == []


@pytest.mark.parametrize("version", FORMS)
def test_the_hook_sees_the_ids_before_they_are_remapped(version: str, tmp_path: Path) -> None:
    path = checkout(tmp_path, version)
    source.apply(open_vllm(tmp_path))
    space: dict[str, Any] = {"remap": lambda ids: "copies"}
    exec(path.read_text(), space)
    kind = space.get("FusedMoE") or space["BaseRouter"]
    seen: list[object] = []
    attributes = {
        "enable_eplb": True,
        "expert_load_view": 1,
        "_compute_routing": lambda self, hidden, logits, dtype: (logits, logits),
        "_apply_eplb_mapping": lambda self, ids: "copies",
    }
    layer = type("Layer", (kind,), attributes)()
    choose = getattr(layer, "select_experts", None) or layer._select_experts
    assert choose("hidden", "logits") == ("logits", "copies")
    layer.specmoe_copy = lambda *tensors: seen.append(tensors)
    assert choose("hidden", "logits") == ("logits", "copies")
    assert seen == [("hidden", "logits", "logits", "logits")]


def test_windows_line_ends_are_kept(tmp_path: Path) -> None:
    path = checkout(tmp_path, "0.33.0", FORMS["0.33.0"][1].replace("\n", "\r\n"))
    before = files(tmp_path)
    source.apply(open_vllm(tmp_path))
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")
    source.revert(open_vllm(tmp_path))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROUTER_FORM.format(name="other"), "no function that selects experts as in vLLM 0.12 to 0.33"),
        (ROUTER_FORM.format(name="_select_experts").replace("_compute_routing", "_compute"), r"line 3: BaseRouter\._select"),
        (ROUTER_FORM.format(name="_select_experts").replace("hidden_states, router", "x, router", 1), "not have the expected"),
        ("class BaseRouter:\n  def _select_experts(self:\n", "line 2: not valid Python"),
        (ROUTER_FORM.format(name="_select_experts") + "# no end", "last line has no line ending"),
        (ROUTER_FORM.format(name="_select_experts") + BEGIN + "\n", "1 begin and 0 end marks"),
    ],
)
def test_a_file_that_is_not_as_expected_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    path = checkout(tmp_path, "0.33.0", text)
    before = files(tmp_path)
    with pytest.raises(PatchError, match=message) as refusal:
        source.apply(open_vllm(tmp_path))
    assert str(path if "no function" not in message else tmp_path) in str(refusal.value)
    assert files(tmp_path) == before


def test_edited_lines_of_ours_are_not_thrown_away(tmp_path: Path) -> None:
    path = checkout(tmp_path, "0.33.0")
    source.apply(open_vllm(tmp_path))
    path.write_text(path.read_text().replace("is not None", "is not False"))
    with pytest.raises(PatchError, match="line 7: the marked lines were changed"):
        source.revert(open_vllm(tmp_path))


def test_a_write_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path, "0.33.0")
    before = files(tmp_path)
    replace = Path.replace
    calls = []

    def fail_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_second)
    with pytest.raises(PatchError, match="No space left on device; nothing was changed"):
        source.apply(open_vllm(tmp_path))
    assert files(tmp_path) == before


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_the_commands(tmp_path: Path) -> None:
    checkout(tmp_path, "0.20.0")
    assert "BaseRouter.select_experts in model_executor" in run("status", "--vllm", str(tmp_path)).stdout
    patch = run("diff", "--vllm", str(tmp_path)).stdout
    assert run("apply", "--vllm", str(tmp_path)).stdout.count("patched ") == 2
    assert "nothing to do" in run("apply", "--vllm", str(tmp_path)).stdout
    status = run("status", "--vllm", str(tmp_path))
    assert (status.exit_code, "vLLM 0.20.0 in" in status.stdout, ": applied" in status.stdout) == (0, True, True)
    assert run("diff", "--vllm", str(tmp_path)).stdout == patch
    assert run("revert", "--vllm", str(tmp_path)).stdout.count("restored ") == 2
    (tmp_path / "own.patch").write_text(patch)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "apply", "own.patch"], cwd=tmp_path, check=True)
    assert ": applied" in run("status", "--vllm", str(tmp_path)).stdout
    command = [sys.executable, "-m", "vllm_patch", "status", "--vllm", str(tmp_path / ".git")]
    elsewhere = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (elsewhere.returncode, elsewhere.stderr.count("\n")) == (1, 1)
    assert "is not a vLLM: expected a package folder or checkout" in elsewhere.stderr


@pytest.mark.engine
@pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")
@pytest.mark.parametrize("plugins", ["", "specmoe"], ids=["the patch alone", "patch and plugin"])
def test_a_patched_vllm_records_the_same_once(plugins: str, tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    installed = Path(spec.submodule_search_locations[0])
    overlay(installed, tmp_path / "site" / "vllm", ["v1/worker", f"{FOLDER}/router"])
    source.apply(open_vllm(tmp_path / "site"))
    assert open_vllm(installed).state == "not applied"
    out = tmp_path / "trace"
    command = ["collect", "--model", "demo", "--dtype", "float32", "--dataset", "demo-code"]
    command += ["--num-problems", "6", "--max-new-tokens", "40", "--out", str(out)]
    # The engine in this process, which imports vLLM once instead of three times.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": plugins}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    done = warm.run("specmoe", *command, environment=environment, starter=warm.starter_without_vllm())
    assert done.returncode == 0, done.stderr
    trace = Trace.open(out)
    assert "vLLM's patched source" in trace.metadata.hook
    assert_complete(trace)
    assert_agrees(trace, load_oracle(demo_model_folder()))


def overlay(package: Path, target: Path, real: list[str]) -> None:
    """`package` by symbolic links, with folders `real` (and those above them) as real ones, so that files can be replaced."""
    folders = {Path(name) for name in real}
    folders |= {parent for folder in folders for parent in folder.parents}
    for folder in sorted(folders):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for entry in (package / folder).iterdir():
            name = folder / entry.name
            if name not in folders and entry.name != "__pycache__":
                if folder in {Path(item) for item in real} and entry.is_file():
                    (target / name).write_bytes(entry.read_bytes())
                else:
                    (target / name).symlink_to(entry)
