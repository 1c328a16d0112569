"""`modal run modal_jobs/train.py`: on a local trace that is uploaded, and on the shards of a collected run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.offline_modal import OfflineModal, last_line, needs_modal

from profiler.trace.reader import Trace
from speculation.evaluation.evaluate import evaluate
from speculation.predictors.options import TrainingOptions
from speculation.training.fit import train
from speculation.training.runs import load_run

pytestmark = [pytest.mark.modal, needs_modal]

TRAIN = ["run", "modal_jobs/train.py", "--predictor", "conditional-counts"]


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> OfflineModal:
    return OfflineModal(tmp_path_factory.mktemp("modal") / "account")


def tables(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    stored: dict[str, np.ndarray] = load_file(run / "model.safetensors")
    return stored


def test_a_trace_from_here_is_trained_on_there(trace: Trace, account: OfflineModal, tmp_path: Path) -> None:
    done = account.run(*TRAIN, "--trace", str(trace.path), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(tmp_path / "run")
    local = train(trace, "conditional-counts", tmp_path / "local", options=TrainingOptions())
    here, there = tables(local.path), tables(run.path)
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)
    assert run.trace_sha256 == local.trace_sha256
    document = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    expected = evaluate(local, trace).model_dump(mode="json", by_alias=True)
    for found in (document, expected):
        # A time, which differs.
        found["results"] = {name: result["metrics"]["h=1"]["recall@2"] for name, result in found["results"].items()}
    assert document["results"] == expected["results"]
    assert len(document["results"]) == 4
    assert "shuffled control" in done.stdout

    again = account.run(*TRAIN, "--trace", str(trace.path), "--out", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    assert "was already trained" in again.stdout
    assert "uploading" not in again.stdout
    # On a Volume of another name.
    assert account.run("volume", "create", "elsewhere").returncode == 0
    other = [*TRAIN, "--trace", str(trace.path), "--volume", "elsewhere", "--out", str(tmp_path / "other")]
    # What an earlier download of another job left.
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part" / "left.json").write_text("{}")
    done = account.run(*other)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "other").iterdir()} == {path.name for path in (tmp_path / "run").iterdir()}
    assert next(account.volume("elsewhere").glob("trace-*/trained/*/manifest.json")).is_file()
    taken = account.run(*TRAIN, "--trace", str(trace.path), "--out", str(tmp_path / "again"))
    assert last_line(taken).endswith("again exists: choose another --out")


def test_a_collected_run_is_trained_on_where_it_is(account: OfflineModal, tmp_path: Path) -> None:
    job = ["--model", "demo", "--engine", "transformers", "--dtype", "float32", "--dataset", "demo-math,demo-code"]
    job += ["--num-problems", "40", "--max-new-tokens", "4", "--shard-size", "20"]
    collected = account.run("run", "modal_jobs/collect.py", *job, "--out", str(tmp_path / "trace"))
    assert collected.returncode == 0, collected.stderr
    trace = Trace.open(tmp_path / "trace")
    done = account.run(*TRAIN, "--run-id", trace.metadata.capture["run_id"], "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    here, there = tables(train(trace, "conditional-counts", tmp_path / "local").path), tables(tmp_path / "run")
    assert all(np.array_equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "train: expected either --run-id, of a collected run, or --trace, a local trace folder"),
        (["--run-id", "none"], "train: no run or trace none on the Volume"),
        (["--trace", "absent"], "train: absent: no such trace directory"),
        (["--run-id", "x", "--gpu", "TPU"], "train: unknown GPU 'TPU': expected one of L4"),
        (["--run-id", "x", "--predictor", "oracle"], "train: unknown predictor 'oracle'"),
        (["--run-id", "x", "--volume", "absent"], "train: Volume 'absent' not found"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments: list[str], text: str, account: OfflineModal, tmp_path: Path) -> None:
    done = account.run("run", "modal_jobs/train.py", *arguments, "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert text in last_line(done)
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
