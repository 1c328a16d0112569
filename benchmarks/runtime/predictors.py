"""What the rows' predictors are trained on, these predictors, and prompts that they have not seen."""

from __future__ import annotations

import shutil
from pathlib import Path

from profiler.datasets.problems import read_problems
from profiler.datasets.registry import DEMO_DATASETS, find_dataset
from profiler.trace.reader import Trace
from speculation.data.routes import problems_of_part
from speculation.data.tasks import Task
from speculation.predictors.options import TrainingOptions
from speculation.runtime.model import OffloadedModel
from speculation.runtime.options import CacheSize
from speculation.runtime.recording import PromptSource
from speculation.training.fit import train

PROMPTS = 3
# The predictors are trained on so many continuations of each prompt, of so many tokens at most.
SAMPLES, TRAIN_TOKENS = 4, 160
# Layers ahead that are predicted: where a transfer takes longer than a layer's computation, one is too late.
HORIZON = 3


def demo_trace(folder: Path) -> Trace:
    """A trace of all embedded prompts, each continued several times by the embedded model itself."""
    if not (folder / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        problems = [problem for name in DEMO_DATASETS for problem in read_problems(find_dataset(name))]
        sources = [
            PromptSource(dataset=each.dataset, source_key=f"{each.source_key}-{sample}", prompt=each.prompt)
            for sample in range(SAMPLES)
            for each in problems
        ]
        with OffloadedModel.load("demo", CacheSize(fraction=1.0), device="cpu") as offloaded:
            prompts = [source.prompt or "" for source in sources]
            offloaded.generate(
                prompts, max_new_tokens=TRAIN_TOKENS, temperature=0.9, batch=len(problems), trace=folder, sources=sources
            )
    return Trace.open(folder)


def trained(trace: Trace, folder: Path, name: str, task: Task, horizon: int = 1) -> Path:
    """The directory of a run."""
    if not (folder / "config.json").is_file():
        train(trace, name, folder, task=task, horizon=horizon, options=TrainingOptions())
    return folder


def test_prompts(trace: Trace) -> list[str]:
    """Prompts that no predictor has been trained on, one for each dataset."""
    held_out = set(problems_of_part(trace, "test").tolist())
    found: dict[str, str] = {}
    for problem in trace.problems.to_pylist():
        if problem["problem_id"] in held_out:
            found.setdefault(problem["dataset"], problem["prompt"])
    return list(found.values())[:PROMPTS]
