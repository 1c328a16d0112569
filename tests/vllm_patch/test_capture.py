"""Real vLLM, multi-process, continuous batching: the captured routing against transformers with hooks, in float32."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file
from support import warm
from support.agreement import assert_agrees, assert_complete

from profiler.engines.vllm import is_installed
from profiler.errors import TraceError
from profiler.models.resolve import demo_model_folder
from profiler.trace.reader import Trace
from profiler.trace.stream import ROUTING_STREAM, read_index
from vllm_patch.check.agreement import load_oracle

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not is_installed(), reason="vLLM is not installed")]

PROBLEMS = 24
IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


# Of the layers of the embedded model: the compiler takes each by itself, for two seconds.
COMPILED_LAYERS = 3
# A token with which texts end that the first layers alone generate: they never generate the model's own.
COMPILED_STOP = 22


@pytest.fixture(scope="module")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the embedded model, with a stop token that they generate."""
    folder = tmp_path_factory.mktemp("shallow")
    for path in demo_model_folder().iterdir():
        shutil.copy(path, folder)
    for name, changed in (
        ("config.json", {"num_hidden_layers": COMPILED_LAYERS}),
        ("generation_config.json", {"eos_token_id": COMPILED_STOP}),
    ):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(settings | changed), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    left_out = tuple(f"model.layers.{layer}." for layer in range(COMPILED_LAYERS, 8))
    kept = {name: weight for name, weight in weights.items() if not name.startswith(left_out)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["eager", "compiled"])
def model(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """The mode, and the model that runs in it."""
    folder: Path = request.getfixturevalue("shallow_model") if request.param == "compiled" else demo_model_folder()
    return request.param, folder


@pytest.fixture(scope="module")
def captured(model: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """One engine start per mode; prompts of three kinds in one batch, some ended by a stop token, some by length."""
    mode, folder = model
    out = tmp_path_factory.mktemp(mode) / "trace"
    command = ["collect", "--model", str(folder), "--dtype", "float32", f"--{mode}"]
    command += ["--dataset", "demo-math,demo-code,demo-reviews", "--num-problems", str(PROBLEMS)]
    command += ["--max-new-tokens", "150", "--out", str(out)]
    # One engine in the process that starts it, one in processes of its own, as it is by default.
    environment = IN_ONE_PROCESS if mode == "eager" else {}
    done = warm.run("specmoe", *command, environment=environment, warm_children=True)
    assert done.returncode == 0, done.stderr
    assert f"{PROBLEMS} problems" in done.stdout
    return Trace.open(out)


def test_every_set_agrees_with_the_oracle(captured: Trace, model: tuple[str, Path]) -> None:
    assert_agrees(captured, load_oracle(model[1]))


def test_every_sequence_of_n_tokens_gives_n_minus_1_rows_per_layer(captured: Trace) -> None:
    assert captured.problems.num_rows == PROBLEMS
    assert_complete(captured)


def test_both_ways_of_ending_occurred(captured: Trace) -> None:
    assert set(captured.problems.column("finish_reason").to_pylist()) == {"stop", "length"}


def test_the_metadata_says_how_it_was_recorded(captured: Trace) -> None:
    metadata = captured.metadata
    assert metadata.engine == "vllm"
    assert "vllm" in metadata.versions
    assert (metadata.model.dtype, metadata.capture["prefix_caching"]) == ("float32", False)


def test_nothing_but_the_trace_is_left(captured: Trace) -> None:
    names = sorted(path.relative_to(captured.path).as_posix() for path in captured.path.rglob("*") if path.is_file())
    assert names == ["manifest.json", "metadata.json", "problems.parquet", "routing/part-00000.parquet", "tokens.parquet"]


GSM8K = Path(__file__).parents[3] / "shared" / "datasets" / "gsm8k" / "test.parquet"


@pytest.mark.skipif(not GSM8K.is_file(), reason="no local copy of GSM8K")
def test_gsm8k_from_a_local_file_agrees_with_the_oracle(tmp_path: Path) -> None:
    out = tmp_path / "trace"
    command = ["collect", "--model", "demo", "--dtype", "float32", "--dataset", "gsm8k"]
    command += ["--data-files", str(GSM8K), "--num-problems", "20", "--max-new-tokens", "32", "--out", str(out)]
    assert warm.run("specmoe", *command, environment=IN_ONE_PROCESS).returncode == 0
    trace = Trace.open(out)
    assert_complete(trace)
    assert_agrees(trace, load_oracle(demo_model_folder()))


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [("interrupt", 130, "specmoe: interrupted"), ("kill the engine", 1, "its process EngineCore ended with exit code -9")],
)
def test_a_run_that_is_cut_off_ends_with_one_line_and_leaves_no_process(
    how: str, code: int, text: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    short_folder = tempfile.mkdtemp()
    request.addfinalizer(lambda: shutil.rmtree(short_folder, ignore_errors=True))
    command = ["collect", "--model", "demo", "--dataset", "demo-math,demo-code,demo-reviews"]
    command += ["--num-problems", "48", "--max-new-tokens", "850", "--out", str(tmp_path / "trace")]
    # Not tmp_path: vLLM's sockets are there, and a socket's path may have 107 characters.
    run = warm.start("specmoe", *command, environment={"TMPDIR": short_folder}, warm_children=True)
    for line in run.stderr:
        if line.startswith("12 of 48"):
            break
    descendants = psutil.Process(run.pid).children(recursive=True)
    if how == "interrupt":
        os.killpg(run.pid, signal.SIGINT)
    else:
        next(p for p in descendants if "EngineCore" in " ".join(p.cmdline())).kill()
    rest = run.stderr.read()
    assert run.wait(60) == code
    assert text in rest.splitlines()[-1]
    _, alive = psutil.wait_procs(descendants, timeout=20)
    assert alive == []
    # Rows that had reached a file by then stay, marked as incomplete.
    if (tmp_path / "trace").exists():
        assert read_index(tmp_path / "trace" / "capture" / "run-00000" / ROUTING_STREAM) is not None
        with pytest.raises(TraceError, match="is incomplete: no manifest"):
            Trace.open(tmp_path / "trace")
