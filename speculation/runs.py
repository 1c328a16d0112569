"""A run directory: a trained predictor, the popularity baseline fitted on the same problems, and where they came from.

config.json              predictor, task, shape, settings, options
model.safetensors        what the predictor learned
baselines.safetensors    the counting baselines, so that every evaluation stands beside them
metrics.json             training history and sizes
provenance.json          trace, versions, command line, git commit, seed
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from profiler.errors import SpecmoeError
from profiler.reader import Trace
from profiler.schema import MANIFEST_FILE
from profiler.writer import sha256_of
from speculation.predictors import Arrays, Predictor, Shape, TrainingOptions, find_predictor

NEXT_LAYER = "next-layer"
BASELINES = ("popularity", "conditional-counts")
MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class Run:
    """A loaded run: the predictor, and the baselines by name."""

    path: Path
    name: str
    task: str
    predictor: Predictor
    baselines: dict[str, Predictor]


def save_run(
    path: Path,
    predictor: Predictor,
    baselines: dict[str, Predictor],
    options: TrainingOptions,
    history: list[dict[str, float]],
    facts: dict[str, Any],
    trace: Trace,
) -> None:
    """Write the run directory; `config.json` last, so that a run that has one is whole."""
    path.mkdir(parents=True, exist_ok=True)
    arrays = predictor.arrays()
    _save_arrays(path / "model.safetensors", arrays)
    stored = {f"{name}/{key}": a for name, baseline in baselines.items() for key, a in baseline.arrays().items()}
    _save_arrays(path / "baselines.safetensors", stored)
    sizes = {
        "parameters": int(sum(array.size for array in arrays.values())),
        "bytes": (path / "model.safetensors").stat().st_size,
    }
    _write_json(path / "metrics.json", {**sizes, **facts, "history": history})
    _write_json(path / "provenance.json", _provenance(trace))
    config = {
        "predictor": predictor.name,
        "task": NEXT_LAYER,
        "shape": asdict(predictor.shape),
        "settings": predictor.settings(),
        "options": asdict(options),
    }
    _write_json(path / "config.json", config)


def load_run(path: Path) -> Run:
    """Load a run. Raises `SpecmoeError` if it is none, or if its files do not fit together. Nothing is unpickled."""
    if not (path / "config.json").is_file():
        raise SpecmoeError(f"{path} is not a run: it has no config.json (made by 'specmoe train')")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        shape = Shape(**config["shape"])
        name, task, settings = str(config["predictor"]), str(config["task"]), dict(config["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise SpecmoeError(f"{path}/config.json is not valid: {error!r}") from error
    limits = {"layers": 10_000, "experts": 65_536, "top_k": 1024, "horizon": 10_000}
    for field, limit in limits.items():
        value = getattr(shape, field)
        if not isinstance(value, int) or not 1 <= value <= limit:
            raise SpecmoeError(f"{path}/config.json: {field} {value!r}, expected 1 to {limit}")
    if task != NEXT_LAYER:
        raise SpecmoeError(f"{path}/config.json: task {task!r}, this release knows {NEXT_LAYER!r}")
    predictor = find_predictor(name).restore(shape, settings, _load_arrays(path / "model.safetensors"))
    stored = _load_arrays(path / "baselines.safetensors")
    baselines = {}
    for baseline in BASELINES:
        own = {key.split("/", 1)[1]: array for key, array in stored.items() if key.startswith(f"{baseline}/")}
        baselines[baseline] = find_predictor(baseline).restore(shape, {}, own)
    return Run(path, name, task, predictor, baselines)


def _save_arrays(path: Path, arrays: Arrays) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
    temporary.rename(path)


def _load_arrays(path: Path) -> Arrays:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SpecmoeError(f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB, which no predictor needs")
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise SpecmoeError(f"{path} cannot be read: {error}") from error


def _write_json(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def _provenance(trace: Trace) -> dict[str, Any]:
    manifest = trace.path / MANIFEST_FILE
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trace": trace.path.name,
        "trace_manifest_sha256": sha256_of(manifest) if manifest.is_file() else None,
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
