"""Runs: they survive storage but not tampering, and are evaluated only on problems that they were not trained on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from support.traces import MakeProblems, MakeTrace
from typer.testing import CliRunner

from profiler.errors import SpecmoeError, TraceError
from profiler.trace.reader import Trace
from specmoe import app
from speculation.data.routes import load_routes
from speculation.data.tasks import Task
from speculation.evaluation.evaluate import evaluate
from speculation.predictors.neural.base import NeuralPredictor
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import predictor_classes
from speculation.training.fit import train
from speculation.training.runs import load_run

OPTIONS = TrainingOptions(epochs=2, batch_tokens=64)
# Those that need router inputs are tested where there are some: test_router_inputs.py.
OF_ROUTES = {name: cls for name, cls in predictor_classes().items() if not cls.needs_router_inputs}
NEURAL = {name for name, cls in OF_ROUTES.items() if issubclass(cls, NeuralPredictor)}
CASES = [(name, task) for name, cls in OF_ROUTES.items() for task in sorted(cls.tasks)]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_run_survives_storage(name: str, task: Task, markov_trace: Trace, tmp_path: Path) -> None:
    horizon = 1 if task in {Task.WHOLE_PATH, Task.REUSE} else 2
    options = replace(OPTIONS, epochs=1, batch_tokens=256, width=32)
    run = train(markov_trace, name, tmp_path / "run", task=task, horizon=horizon, options=options)
    again = load_run(tmp_path / "run")
    routes = load_routes(markov_trace, "test")
    first, second = (r.predictor.probabilities(routes, slice(0, 40)) for r in (run, again))
    assert (first == second).all()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "model.safetensors",
        "baselines.safetensors",
        "metrics.json",
        "problems.safetensors",
        "provenance.json",
        "README.md",
    } | ({"training.csv", "tensorboard"} if name in NEURAL else set())
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert len(provenance["trace_manifest_sha256"]) == 64


def test_training_is_reproducible(markov_trace: Trace, tmp_path: Path) -> None:
    runs = [train(markov_trace, "mlp", tmp_path / name, options=OPTIONS) for name in ("a", "b")]
    first, second = (load_file(run.path / "model.safetensors") for run in runs)
    assert all((first[name] == second[name]).all() for name in first)


def test_training_that_diverges_is_an_error_and_writes_nothing(markov_trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="diverged in epoch"):
        train(markov_trace, "mlp", tmp_path / "run", options=replace(OPTIONS, learning_rate=1e30))
    assert not (tmp_path / "run").exists()


def test_wrong_choices_are_named(markov_trace: Trace, tmp_path: Path) -> None:
    names = (
        "uniform, popularity, previous-token, token-identity, conditional-counts, backoff-counts, product-of-experts, "
        "boosted-trees, mlp, interlayer-lstm, statistics-aware, ensemble, hierarchical, attention-graph, hybrid, "
        "transformer, next-gate, pre-attention, recommended, recommended-small, ewma-repeats, reuse, reuse-small"
    )
    with pytest.raises(SpecmoeError, match=f"expected one of {names}$"):
        train(markov_trace, "oracle", tmp_path / "run")
    with pytest.raises(SpecmoeError, match="horizon 4: expected 1 to 3"):
        train(markov_trace, "mlp", tmp_path / "run", horizon=4)
    assert not (tmp_path / "run").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    with pytest.raises(SpecmoeError, match="choose another folder"):
        train(markov_trace, "popularity", tmp_path / "taken")


def test_a_trace_of_another_model_is_refused(
    markov_trace: Trace, make_trace: MakeTrace, random_problems: MakeProblems, tmp_path: Path
) -> None:
    run = train(markov_trace, "popularity", tmp_path / "run")
    other = make_trace(random_problems(count=9, tokens=3, layers=4, num_experts=16, top_k=2), 16, name="other")
    with pytest.raises(TraceError, match=r"its model has \d+ MoE layers and top-\d+ of \d+ experts, but that of .* has"):
        evaluate(run, other)


def test_tampered_runs_are_refused(markov_trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(markov_trace, "popularity", path)
    arrays = load_file(path / "model.safetensors")
    save_file({"probability_LE": arrays["probability_LE"][:, :4].copy()}, path / "model.safetensors")
    with pytest.raises(SpecmoeError, match=r"array 'probability_LE' is \(4, 4\)"):
        load_run(path)
    (path / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(SpecmoeError, match="cannot be read"):
        load_run(path)
    config = json.loads((path / "config.json").read_text())
    config["shape"]["experts"] = 60_000
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecmoeError, match="tables would exceed"):
        load_run(path)
    config["shape"]["experts"] = 10**9
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecmoeError, match="experts 1000000000, expected 1 to 65536"):
        load_run(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(SpecmoeError, match="is not valid"):
        load_run(path)


def test_resuming_what_is_finished_says_so_and_changes_nothing(markov_trace: Trace, tmp_path: Path) -> None:
    command = ["train", str(markov_trace.path), "--predictor", "popularity", "--out", str(tmp_path / "run"), "--resume"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "already finished" not in first.stdout
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert f"{tmp_path / 'run'} is already finished" in again.stdout
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").iterdir()} == before
    other = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert isinstance(other.exception, SpecmoeError)
    assert "is a finished run, and its training options differ" in str(other.exception)


@pytest.mark.parametrize("value", [None, "x", [], {}, float("nan")])
def test_a_fault_in_the_facts_of_a_training_is_named(value: object, markov_trace: Trace, tmp_path: Path) -> None:
    path = train(markov_trace, "uniform", tmp_path / "run").path / "metrics.json"
    facts = json.loads(path.read_text())
    for name in ("parameters", "train_seconds", "train_problems", "train_tokens"):
        path.write_text(json.dumps(facts | {name: value}))
        with pytest.raises(SpecmoeError, match=rf"metrics\.json is not valid: {name}") as raised:
            load_run(tmp_path / "run")
        assert str(raised.value).isprintable()
    path.write_text(json.dumps({name: each for name, each in facts.items() if name != "train_problems"}))
    with pytest.raises(SpecmoeError, match=r"metrics\.json is not valid: train_problems: Field required"):
        load_run(tmp_path / "run")


def test_a_converted_trace_cannot_hide_training_problems(markov_trace: Trace, tmp_path: Path) -> None:
    from profiler.importers import import_trace
    from profiler.importers.rows import ImportOptions
    from profiler.trace.jsonl import write_jsonl

    run = train(markov_trace, "popularity", tmp_path / "run")
    write_jsonl(markov_trace, tmp_path / "rows.jsonl")
    converted = import_trace(tmp_path / "rows.jsonl", tmp_path / "converted", options=ImportOptions(num_experts=8))
    with pytest.raises(TraceError, match="which of its problems are training problems is unknown"):
        evaluate(run, converted)
    own = train(converted, "popularity", tmp_path / "own")
    assert evaluate(own, converted).split == "by problem (hash of the problem id)"
    other = import_trace(tmp_path / "rows.jsonl", tmp_path / "other", options=ImportOptions(num_experts=9))
    with pytest.raises(SpecmoeError):
        evaluate(own, other)


def test_hashes_of_prompts_split_across_traces_and_mere_names_do_not(markov_trace: Trace, tmp_path: Path) -> None:
    from profiler.importers import import_trace
    from profiler.importers.rows import ImportOptions

    for name in ("first", "second"):
        folder = tmp_path / name
        shutil.copytree(markov_trace.path / "routing", folder / "routing")
        problems = markov_trace.problems.select(["problem_id", "dataset"])
        hashes = pa.array([f"hash {i}" for i in range(problems.num_rows)])
        pq.write_table(problems.append_column("prompt_md5", hashes), folder / "problems.parquet")
    options = ImportOptions(num_experts=8)
    first, second = (import_trace(tmp_path / name, tmp_path / f"{name}-trace", options=options) for name in ("first", "second"))
    run = train(first, "popularity", tmp_path / "run")
    assert evaluate(run, second).split == "by problem (hash of the prompt_md5)"
    for name in ("first", "second"):
        path = tmp_path / name / "problems.parquet"
        pq.write_table(pq.read_table(path).drop_columns("prompt_md5"), path)
    third = import_trace(tmp_path / "first", tmp_path / "third", options=options)
    # Another trace, though its problems have the same names.
    fourth = import_trace(tmp_path / "second", tmp_path / "fourth", options=ImportOptions(num_experts=8, command=("other",)))
    run = train(third, "popularity", tmp_path / "names")
    assert evaluate(run, third).split == "by problem (hash of the source key)"
    with pytest.raises(TraceError, match="is not the trace that"):
        evaluate(run, fourth)
