"""The model card, and a run on a hub: its own files and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from support.traces import MakeProblems, MakeTrace
from tensorboardX.proto.event_pb2 import Event
from typer.testing import CliRunner

from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from specmoe import app
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import predictor_classes
from speculation.training.fit import train
from speculation.training.push import push_run


@pytest.fixture
def trace(make_trace: MakeTrace, random_problems: MakeProblems) -> Trace:
    return make_trace(random_problems(count=20, tokens=10, layers=3, num_experts=8, top_k=2), 8)


def test_the_card_says_what_it_is_and_trusts_no_name(trace: Trace, tmp_path: Path) -> None:
    metadata = json.loads((trace.path / "metadata.json").read_text())
    metadata["model"]["id"] = "evil/<script>\n# model"
    (trace.path / "metadata.json").write_text(json.dumps(metadata))
    renamed = Trace.open(trace.path, allow_incomplete=True)
    run = train(renamed, "mlp", tmp_path / "run", options=TrainingOptions(epochs=1, width=8))
    card = (run.path / "README.md").read_text()
    assert "# mlp for evil/\\<script\\> \\# model" in card
    assert "next-layer, h = 1 to 1" in card
    assert "| epochs | 1 |" in card
    facts = json.loads((run.path / "metrics.json").read_text())
    assert f"{facts['parameters']:,} parameters" in card


def test_losses_are_logged_for_tensorboard(trace: Trace, tmp_path: Path) -> None:
    run = train(trace, "mlp", tmp_path / "run", options=TrainingOptions(epochs=3, width=8))
    logged: dict[tuple[str, int], float] = {}
    for path in sorted((run.path / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            # A record: its length, a checksum, the event, a checksum.
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            logged |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + size :]
    history = json.loads((run.path / "metrics.json").read_text())["history"]
    for entry in history:
        assert logged["train_loss", entry["epoch"]] == pytest.approx(entry["train_loss"], rel=1e-5)


def pushed(trace: Trace, out: Path, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["train", str(trace.path), "--predictor", "mlp", "--epochs", "1", "--width", "8", "--out", str(out), *more]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": address, "HF_TOKEN": "good", "HF_HUB_DISABLE_XET": "1", "HOME": str(out.parent)}
    return subprocess.run([sys.executable, "-m", "specmoe", *command], capture_output=True, text=True, env=environment)


def test_a_run_is_pushed_as_a_model(trace: Trace, tmp_path: Path, hub: tuple[str, dict[str, dict[str, Any]]]) -> None:
    address, repositories = hub
    done = pushed(trace, tmp_path / "run", address, "--push", "me/predictor", "--private")
    assert done.returncode == 0, done.stderr
    repository = repositories["me/predictor"]
    # The hub takes a repository without a type for a model.
    assert repository["asked"].get("type", "model") == "model"
    assert repository["private"]
    files = repository["files"]
    names = {"config.json", "metrics.json", "provenance.json", "README.md", "training.csv"}
    assert files.keys() == names | {f"{name}.safetensors" for name in ("model", "baselines", "problems")}
    assert all(files[name] == (tmp_path / "run" / name).read_bytes() for name in files)
    done = pushed(trace, tmp_path / "other", address, "--private")
    assert done.returncode == 2
    assert "needs --push" in done.stderr
    assert not (tmp_path / "other").exists()


def test_texts_of_training_problems_are_uploaded_on_request_only(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[Path] = []

    def upload(path: Path, *_: object, **__: object) -> str:
        uploaded.append(path)
        return "its address"

    monkeypatch.setattr("speculation.training.push.push_folder", upload)
    command = ["train", str(trace.path), "--predictor", "reuse", "--task", "reuse", "--epochs", "1", "--width", "8"]
    command += ["--out", str(tmp_path / "run"), "--push", "me/texts"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "contains texts of its training problems" in " ".join(done.output.replace("│", "").split())
    assert not (tmp_path / "run").exists()
    done = CliRunner().invoke(app, [*command, "--push-texts"])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("Uploading to me/texts, with texts of training problems (token ids and routes)\nits address\n")
    assert uploaded == [tmp_path / "run"]
    assert "**contains**: texts of training problems" in (tmp_path / "run" / "README.md").read_text()


# All that store token ids.
@pytest.mark.parametrize(
    "name", ["recommended", "recommended-small", "reuse", "reuse-small", "mlp", "token-identity", "backoff-counts"]
)
def test_who_keeps_training_texts_says_so(name: str, make_trace: MakeTrace, tmp_path: Path) -> None:
    """Of texts in which every token is another, four tokens follow each other in the same order only where texts are kept."""
    random = np.random.default_rng(0)
    problems = [(random.random((20, 3, 8)).argsort(-1)[..., :2], np.tile([0.6, 0.4], (20, 3, 1))) for _ in range(20)]
    tokens = random.permutation(20 * 21).reshape(20, 21)
    cls = predictor_classes()[name]
    trace = make_trace(problems, 8, vocab_ids=list(tokens))
    options = TrainingOptions(epochs=1, width=16, batch_tokens=256)
    run = train(trace, name, tmp_path / "run", task=min(cls.tasks), options=options)
    runs_of_four = {tuple(text[start : start + 4]) for text in tokens.tolist() for start in range(17)}
    stored = [array.reshape(-1) for array in run.predictor.arrays().values() if np.issubdtype(array.dtype, np.integer)]
    windows = [sliding_window_view(array, 4) for array in stored if len(array) >= 4]
    has_texts = any(tuple(window) in runs_of_four for each in windows for window in each.tolist())
    assert has_texts == cls.keeps_training_texts()
    if cls.keeps_training_texts():
        with pytest.raises(SpecmoeError, match="contains texts of training problems"):
            push_run(run, "me/run")
