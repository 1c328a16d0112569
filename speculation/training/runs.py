"""A run directory: a trained predictor, the counting baselines fitted on the same problems, and their provenance.

config.json              predictor, task, shape, settings, training options with the seed
model.safetensors        the learned arrays of the predictor
baselines.safetensors    the counting baselines, so that every evaluation can compare with them
problems.safetensors     digests of the training problems, so that no evaluation counts them as held out
metrics.json             training history and sizes
README.md                the model card
training.csv             losses by epoch, written during training
tensorboard/             the same, for TensorBoard
checkpoints/             checkpoints, until training is finished
provenance.json          trace, versions, command line, git commit
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from profiler.errors import SpecmoeError, UsageError, first_fault
from profiler.trace.hub import CARD_FILE
from profiler.trace.reader import MAX_DOCUMENT_BYTES, Trace
from profiler.trace.schema import MANIFEST_FILE
from profiler.trace.splits import split_key
from profiler.trace.writer import sha256_of, write_text
from speculation.data.tasks import Shape, Task
from speculation.predictors.base import Arrays, Predictor
from speculation.predictors.neural.training_loop import CHECKPOINTS
from speculation.predictors.options import Epochs, TrainingOptions
from speculation.predictors.registry import find_predictor
from speculation.training.card import model_card

CONFIG_FILE = "config.json"
BASELINES = ("popularity", "previous-token", "conditional-counts")
MAX_FILE_BYTES = 4 << 30


class TrainingFacts(BaseModel):
    """`metrics.json` of a run. Older files lack the fields that have a default.

    Attributes:
        parameters: Learned numbers.
        train_seconds: The duration of the training.
        train_problems, train_tokens: What it was trained on.
        validation_problems: Problems for early stopping.
        shared_problems: Problems of the trace for early stopping that were left out, because they are training problems too.
        validated_on: SHA-256 of the digests of the problems for early stopping; None without any, or in older runs.
        validation_sha256: The SHA-256 of the manifest of the trace for early stopping; None if it is the same trace, or in
            older runs.
        history: An entry for each epoch; empty for counting predictors.
    """

    parameters: int
    train_seconds: float = Field(allow_inf_nan=False)
    train_problems: int
    train_tokens: int
    validation_problems: int = 0
    shared_problems: int = 0
    validated_on: str | None = None
    validation_sha256: str | None = None
    history: Epochs = []


@dataclass(frozen=True)
class Run:
    """A run directory that was loaded with `load_run`.

    Args:
        path: The run directory.
        name: The name of the predictor.
        predictor: The trained predictor.
        baselines: The counting baselines by name, fitted on the same problems.
        split: The field by whose hash the trace was split into training and held-out problems, such as "prompt" (see
            `profiler.trace.splits.split_key`).
        trace_sha256: The SHA-256 of the trace's manifest; None if the trace had no manifest.
        trained_on: uint64 `[P]`, digests of the training problems, ascending.
        options: The training options by name, with the seed.
        facts: How the training went, and what its last epoch was chosen by.

    Example:
        >>> run = load_run(Path("runs/math"))  # doctest: +SKIP
        >>> run.name, sorted(run.baselines)  # doctest: +SKIP
        ('recommended', ['conditional-counts', 'popularity', 'previous-token'])
    """

    path: Path
    name: str
    predictor: Predictor
    baselines: dict[str, Predictor]
    split: str
    trace_sha256: str | None
    trained_on: npt.NDArray[np.uint64]
    options: dict[str, Any]
    facts: TrainingFacts

    @property
    def baselines_from(self) -> tuple[str | None, bytes, Shape]:
        """What the baselines were computed from: runs for which it is equal have equal baselines."""
        return self.trace_sha256, self.trained_on.tobytes(), self.predictor.shape


def baseline_shape(shape: Shape) -> Shape:
    """What the baselines of a run predict: the same as the predictor or, for `reuse`, the experts of the token itself."""
    return shape if shape.task.predicts_experts else replace(shape, task=Task.WHOLE_PATH)


def save_run(
    path: Path,
    predictor: Predictor,
    baselines: dict[str, Predictor],
    options: TrainingOptions,
    history: Epochs,
    facts: dict[str, Any],
    trace: Trace,
    trained_on: npt.NDArray[np.uint64],
) -> None:
    """Write the run directory and remove the checkpoints.

    `config.json` is written last, so that a run directory that has it is complete.
    """
    path.mkdir(parents=True, exist_ok=True)
    arrays = predictor.arrays()
    _save_arrays(path / "model.safetensors", arrays)
    stored = {f"{name}/{key}": a for name, baseline in baselines.items() for key, a in baseline.arrays().items()}
    _save_arrays(path / "baselines.safetensors", stored)
    _save_arrays(path / "problems.safetensors", {"digests": trained_on})
    sizes = {
        "parameters": count_parameters(arrays),
        "bytes": (path / "model.safetensors").stat().st_size,
    }
    _write_json(path / "metrics.json", {**sizes, **facts, "history": history})
    write_text(path / CARD_FILE, model_card(predictor, options, history, {**sizes, **facts}, trace))
    _write_json(path / "provenance.json", _provenance(trace))
    config = {
        "predictor": predictor.name,
        "task": predictor.shape.task,
        "split": split_key(trace),
        "trace_sha256": manifest_sha256(trace),
        "shape": {name: value for name, value in asdict(predictor.shape).items() if name != "task"},
        "settings": predictor.settings(),
        "options": asdict(options),
    }
    _write_json(path / CONFIG_FILE, config)
    shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)


def load_predictor(path: str | Path) -> Predictor:
    """Load the trained predictor of a run directory.

    Untrusted run directories are safe to load: nothing is unpickled, and sizes are limited.

    Args:
        path: A run directory, as written by `specmoe train`.

    Returns:
        The trained predictor, on the GPU if it is a neural predictor and CUDA is available.

    Raises:
        SpecmoeError: `path` is not a run directory, or its files are invalid or inconsistent.

    Example:
        >>> predictor = load_predictor("runs/math")  # doctest: +SKIP
        >>> history = History(predictor.shape)  # doctest: +SKIP
        >>> history.begin(vocab_id=17)  # doctest: +SKIP
        >>> history.add(expert_ids=[3, 1], weights=[0.75, 0.25])  # doctest: +SKIP
        >>> prediction = predictor.predict(history)  # doctest: +SKIP
    """
    return load_run(Path(path)).predictor


def problems_sha256(digests: npt.NDArray[np.uint64]) -> str:
    """What identifies a set of problems: the SHA-256 of their digests, ascending."""
    return hashlib.sha256(digests.tobytes()).hexdigest()


def load_run(path: Path) -> Run:
    """Load a run directory: the predictor, its baselines, and what it was trained on.

    Untrusted run directories are safe to load: nothing is unpickled, and sizes are limited.

    Args:
        path: A run directory, as written by `specmoe train`.

    Raises:
        SpecmoeError: `path` is not a run directory, or its files are invalid or inconsistent.

    Example:
        >>> run = load_run(Path("runs/math"))  # doctest: +SKIP
        >>> routes = load_routes(Trace.open("traces/math"), "test")  # doctest: +SKIP
        >>> probabilities_TLHE = run.predictor.probabilities(routes, slice(0, 100))  # doctest: +SKIP
    """
    if not (path / "config.json").is_file():
        raise SpecmoeError(f"{path} is not a run directory: it has no config.json, which 'specmoe train' writes")
    try:
        config = _read_json(path / "config.json")
        if config["task"] not in set(Task):
            raise SpecmoeError(f"task {config['task']!r}, expected one of {', '.join(Task)}")
        shape = Shape(**config["shape"], task=Task(config["task"]))
        name, settings = str(config["predictor"]), dict(config["settings"])
        split, trace_sha256 = str(config["split"]), config["trace_sha256"]
        options = {"seed": 0} | dict(config.get("options", {}))
        options["seed"] = int(options["seed"])
    except SpecmoeError as error:
        raise SpecmoeError(f"{path}/config.json: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecmoeError(f"{path}/config.json is not valid: {type(error).__name__} {error}") from error
    try:
        predictor = find_predictor(name).restore(shape, settings, _load_arrays(path / "model.safetensors"))
    except UsageError as error:
        # Not what the user chose, but what the run says.
        raise SpecmoeError(f"{path}/config.json: {error}") from error
    stored = _load_arrays(path / "baselines.safetensors")
    baselines = {}
    for baseline in BASELINES:
        own = {key.split("/", 1)[1]: array for key, array in stored.items() if key.startswith(f"{baseline}/")}
        baselines[baseline] = find_predictor(baseline).restore(baseline_shape(shape), {}, own)
    trained_on = _load_arrays(path / "problems.safetensors").get("digests")
    if trained_on is None or trained_on.ndim != 1 or trained_on.dtype != np.uint64:
        raise SpecmoeError(f"{path}/problems.safetensors: expected 'digests', uint64 of one dimension")
    facts = _training_facts(path / "metrics.json")
    return Run(path, name, predictor, baselines, split, trace_sha256, trained_on, options, facts)


def _training_facts(path: Path) -> TrainingFacts:
    try:
        return TrainingFacts.model_validate(_read_json(path))
    except ValidationError as error:
        raise SpecmoeError(f"{path} is not valid: {first_fault(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SpecmoeError(f"{path} is not valid: {type(error).__name__} {error}") from error


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise SpecmoeError(f"{path} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB, the limit for a run")
    return json.loads(path.read_text(encoding="utf-8"))


def count_parameters(arrays: Arrays) -> int:
    """The number of learned parameters: those in floating-point arrays, not vocabularies."""
    return int(sum(array.size for array in arrays.values() if np.issubdtype(array.dtype, np.floating)))


def manifest_sha256(trace: Trace) -> str | None:
    """The SHA-256 of the trace's manifest, which identifies its content; None if the trace is incomplete."""
    manifest = trace.path / MANIFEST_FILE
    return sha256_of(manifest) if manifest.is_file() else None


def _save_arrays(path: Path, arrays: Arrays) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
    temporary.rename(path)


def _load_arrays(path: Path) -> Arrays:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SpecmoeError(f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB, the limit for a predictor")
        return dict(load_file(path))
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise SpecmoeError(f"{path} cannot be read: {error}") from error


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _provenance(trace: Trace) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trace": trace.path.name,
        "trace_manifest_sha256": manifest_sha256(trace),
        "model": trace.metadata.model.model_dump(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git_commit(),
        "versions": {name: version(name) for name in ("speculative-moe", "torch", "numpy")}
        | {"python": platform.python_version()},
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
