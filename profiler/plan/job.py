"""Plan a collection on rented GPUs before it runs: the job, its shards, and its estimated time and cost.

A `CollectJob` and its problems are all that the rented machines need; `modal_jobs` sends them there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from profiler.collect.collection import check_sampling
from profiler.collect.options import RentedOptions
from profiler.collect.selection import Selection, describe, guess, select
from profiler.datasets.problems import Problem
from profiler.engines import AUTO_BACKEND, ENGINES, Sampling
from profiler.errors import (
    DatasetError,
    EngineError,
    EngineUsageError,
    ModelError,
    ModelUsageError,
    TraceError,
    UnreachableError,
    counted,
    first_fault,
)
from profiler.models.gpus import Gpu, find_gpu
from profiler.models.registry import MODELS, QUANTIZE_PRECISION, ModelEntry, checkpoint, preset, quantized_checkpoint
from profiler.models.resolve import DEMO_MODEL, demo_model_folder, resolve_model
from profiler.plan.estimate import Estimate, estimate
from profiler.trace.schema import DatasetMetadata
from profiler.trace.writer import write_text

DEFAULT_GPU, FALLBACK_GPU = "A100-80GB", "H100"
# The release that rented machines run; the tests run the same one on CPU.
VLLM = "vllm==0.32.0"
DTYPES = ("auto", "float32", "bfloat16", "float16")
JOB_FILE, JOB_PROBLEMS_FILE = "job.json", "problems.jsonl"
# A failure loses at most one shard, but the last sequences of every shard leave the GPU half idle. Hence a few shards per
# container: none smaller than two full batches, none so large that a failure loses an hour.
SHARDS_PER_CONTAINER = 4
SMALL_SHARD, LARGE_SHARD = 512, 8192
MAX_CONTAINERS = 100
# Shard numbers have five digits.
MAX_SHARDS = 99_999
# Default maximum of tokens per sequence. It is the same on every GPU, so that a run can be resumed on another.
PLANNED_CONTEXT = 8192


class CollectJob(BaseModel):
    """What to collect, as the rented machines read it (`job.json`).

    shards: the first problem of each shard, followed by the number of problems. image: the package that the machines run.
    run_id: a readable name with a hash of everything that determines the recorded rows, including the problems, but not the GPU
    or the shards.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    model: str
    precision: str = "auto"
    revision: str | None = None
    engine: str = "vllm"
    dtype: str = "auto"
    moe_backend: str = AUTO_BACKEND
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logits: bool = False
    hidden_layers: list[int] = []
    hidden_tokens: int = 0
    datasets: list[DatasetMetadata]
    recipe: dict[str, Any] = {}
    image: str
    shards: list[int] = Field(min_length=2)

    @property
    def num_shards(self) -> int:
        return len(self.shards) - 1

    @property
    def entry(self) -> ModelEntry | None:
        """The model's registry entry; None if it has none."""
        return MODELS.get(self.model)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that an engine needs: a hub id or a folder; None for the model embedded in this package."""
        if self.entry is not None:
            return checkpoint(self.entry, self.precision)
        if self.precision == QUANTIZE_PRECISION:
            return str(quantized_checkpoint(self.model, QUANTIZE_PRECISION))
        return None if self.model == DEMO_MODEL else self.model

    @property
    def is_gated(self) -> bool:
        return self.entry is not None and self.precision in self.entry.gated


@dataclass(frozen=True)
class JobPlan:
    """A job, its problems, where it runs, and an estimate of its time and cost.

    fallback: whether another GPU may be used if `gpu` is not available. estimate: None for models that are not in the registry.
    guessed: why the problems are blanks of typical length rather than the dataset's own; empty if they are its own.
    """

    job: CollectJob
    problems: list[Problem]
    gpu: Gpu
    fallback: bool
    containers: int
    estimate: Estimate | None
    guessed: str = ""

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        job = self.job
        datasets = ", ".join(f"{dataset.problems} of {dataset.name}" for dataset in job.datasets)
        where = f"{self.gpu.name}{f' (else {FALLBACK_GPU})' if self.fallback else ''}, {self.gpu.dollars_per_hour:.2f} $/h"
        place = job.checkpoint or "embedded"
        if Path(place).is_absolute():
            place = "created by modal_jobs/quantize.py"
        lines = [
            f"run {job.run_id}" if not self.guessed else f"planned with prompts of typical length: {self.guessed}",
            f"  problems    {len(self.problems):,} ({datasets}) in {counted(job.num_shards, 'shard')}",
            f"  model       {job.model}{f', {job.precision}' if job.precision != 'auto' else ''}: {place}",
            f"  where       Modal, up to {self.containers} x {where}; {job.image}",
        ]
        found = self.estimate
        if found is None:
            return [*lines, "  estimate    unknown: the model is not in the registry (specmoe models)"]
        return [
            *lines,
            f"  tokens      about {found.prompt_tokens:,} prompt and up to {found.new_tokens:,} generated",
            f"  time        about {_duration(found.wall_seconds)}, {found.gpu_hours:.2f} GPU hours",
            f"  cost        about ${found.dollars:.2f} (GPU, 4 cores and 32 GiB by the hour)",
            f"  trace       about {found.trace_bytes / 1e6:,.0f} MB",
            "  These are estimates by a roofline, not measured; docs/results/scaling.md describes the method.",
        ]

    def document(self) -> dict[str, Any]:
        """The plan as a JSON document."""
        return {
            **self.job.model_dump(mode="json"),
            **({"run_id": None, "guessed": self.guessed} if self.guessed else {}),
            "checkpoint": self.job.checkpoint,
            "problems": len(self.problems),
            "gpu": self.gpu.name,
            "containers": self.containers,
            "estimate": asdict(self.estimate) if self.estimate else None,
        }


def make_plan(options: RentedOptions, *, may_guess: bool = False) -> JobPlan:
    """Choose problems, checkpoint and shards. Needs no account; needs the hub only for the dataset (and to count tokens).

    may_guess: if the dataset cannot be reached, plan with prompts of typical length. Such a plan must not be run.
    Raises `SpecmoeError` if an option is invalid, or if the model, dataset or GPU does not exist or does not fit.
    """
    model, precision, engine, dtype = options.model, options.precision, options.engine, options.dtype
    containers, shard_size, max_length, revision = (
        options.containers,
        options.shard_size,
        options.max_length,
        options.revision,
    )
    selection, capture = options.selection, options.capture
    hidden_layers = capture.hidden_layers
    rented = find_gpu(options.gpu or DEFAULT_GPU, rented=True)
    check_sampling(selection.sampling)
    if not 1 <= containers <= MAX_CONTAINERS:
        raise EngineUsageError(f"containers {containers}: expected 1 to {MAX_CONTAINERS}")
    if engine not in ENGINES:
        raise EngineUsageError(f"unknown engine {engine!r}: expected one of {', '.join(ENGINES)}")
    if dtype not in DTYPES:
        raise EngineUsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if shard_size is not None and shard_size < 1:
        raise EngineUsageError(f"shard_size {shard_size}: expected 1 or more")
    if hidden_layers and capture.hidden_tokens < 1:
        raise EngineUsageError(f"hidden_tokens {capture.hidden_tokens}: expected 1 or more")
    if engine == "transformers" and (capture.logits or hidden_layers):
        raise EngineUsageError("capture of logits and router inputs needs the engine vllm")
    if engine == "transformers" and options.moe_backend != AUTO_BACKEND:
        raise EngineUsageError(f"moe_backend {options.moe_backend!r} is an option of vLLM: use the engine vllm")
    entry = MODELS.get(model)
    moe_layers: list[int] | None = None
    context: int | None = None
    if entry is not None:
        moe_layers, context = entry.moe_layers, entry.context
        precision = preset(entry, rented, precision).precision
        location = entry.checkpoints.get(precision) or next(iter(entry.checkpoints.values()))
    elif precision == QUANTIZE_PRECISION and "/" in model:
        location = model
    elif precision != "auto":
        raise ModelUsageError(
            f"precision chooses a checkpoint of a short name, and {model!r} is not one (see 'specmoe models')"
        )
    elif model == DEMO_MODEL:
        location = str(demo_model_folder())
        facts = resolve_model(DEMO_MODEL)
        moe_layers, context = facts.metadata.moe_layers, facts.max_length
    else:
        if Path(model).is_dir():
            raise ModelError(f"{model} is a folder on this machine: rented GPUs take short names and hub ids")
        facts = resolve_model(model, revision=revision)
        location, moe_layers, context = facts.location, facts.metadata.moe_layers, facts.max_length
    _check_lengths(model, max_length, context, selection)
    absent = sorted(set(hidden_layers) - set(moe_layers)) if moe_layers is not None else []
    if absent and moe_layers:
        raise EngineError(f"hidden layer {absent[0]}: not an MoE layer of {model} ({moe_layers[0]}..{moe_layers[-1]})")
    guessed = ""
    try:
        problems = select(selection, location, revision)
    except (UnreachableError, ModelError) as error:
        # Either the dataset or the tokenizer that counts tokens may be unavailable.
        if not may_guess:
            raise
        problems, guessed = guess(selection), str(error)
    about = describe(selection, problems)
    sampling: Sampling = about["sampling"]
    job = CollectJob(
        run_id="unnamed",
        model=model,
        precision=precision,
        revision=revision,
        engine=engine,
        dtype=dtype,
        moe_backend=options.moe_backend,
        max_length=max_length or (min(context, PLANNED_CONTEXT) if context is not None else None),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        logits=capture.logits,
        hidden_layers=sorted(hidden_layers),
        hidden_tokens=capture.hidden_tokens if hidden_layers else 0,
        datasets=about["datasets"],
        recipe=about["recipe"],
        image=VLLM,
        shards=cut_into_shards(len(problems), containers, shard_size),
    )
    containers = min(containers, job.num_shards)
    job = job.model_copy(update={"run_id": _run_id(job, problems)})
    estimated = None
    if entry is not None:
        largest = max(end - start for start, end in pairwise(job.shards))
        estimated = estimate(entry, rented, preset(entry, rented, precision), problems, largest, containers)
    return JobPlan(job, problems, rented, options.gpu is None, containers, estimated, guessed)


def cut_into_shards(problems: int, containers: int, shard_size: int | None = None) -> list[int]:
    """The first problem of each shard, followed by the number of problems. Shards differ by at most one problem.

    Raises `EngineError` if there would be more than MAX_SHARDS.
    """
    if shard_size is None:
        share = -(-problems // containers)
        shard_size = min(share, max(SMALL_SHARD, -(-share // SHARDS_PER_CONTAINER)), LARGE_SHARD)
    count = -(-problems // shard_size)
    if count > MAX_SHARDS:
        raise EngineError(
            f"shard_size {shard_size} makes {count:,} shards, expected at most {MAX_SHARDS:,}: choose a larger one"
        )
    return [problems * shard // count for shard in range(count + 1)]


def write_job(folder: Path, job: CollectJob, problems: list[Problem]) -> None:
    """Write a job and its problems into `folder`, as `job.json` and `problems.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOB_PROBLEMS_FILE).open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in _problem_lines(problems))
    write_text(folder / JOB_FILE, job.model_dump_json(indent=1) + "\n")


def read_job(text: str | bytes, where: str) -> CollectJob:
    """Parse the content of a job's file. Raises `TraceError`, which names `where`, if it is not a job."""
    try:
        return CollectJob.model_validate_json(text)
    except ValidationError as error:
        raise TraceError(f"{where}: {first_fault(error)}") from error


def read_shard(folder: Path, job: CollectJob, shard: int) -> dict[int, Problem]:
    """The problems of one shard, by id. Raises `DatasetError` if a line is not a problem, or if lines are missing."""
    adapter = TypeAdapter(Problem)
    problems = {}
    path = folder / JOB_PROBLEMS_FILE
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            if number >= job.shards[shard + 1]:
                break
            if number >= job.shards[shard]:
                try:
                    problems[number] = adapter.validate_json(line)
                except ValidationError as error:
                    raise DatasetError(f"{path}, line {number + 1} is not a problem: {first_fault(error)}") from error
    if len(problems) < job.shards[shard + 1] - job.shards[shard]:
        raise DatasetError(f"{path} ends before problem {job.shards[shard + 1]}")
    return problems


def shard_datasets(job: CollectJob, problems: dict[int, Problem]) -> list[DatasetMetadata]:
    """The job's datasets, with the number of problems that the shard takes from each."""
    return [
        dataset.model_copy(update={"problems": sum(problem.dataset == dataset.name for problem in problems.values())})
        for dataset in job.datasets
    ]


def _check_lengths(model: str, max_length: int | None, context: int | None, selection: Selection) -> None:
    """Raise `EngineError` on lengths that an engine would refuse only when the GPU is already rented."""
    if max_length is not None and (max_length < 2 or (context is not None and max_length > context)):
        raise EngineError(f"max_length {max_length}: expected 2 to {context or 'the length'} of {model}")
    longest = max_length or (min(context, PLANNED_CONTEXT) if context is not None else None)
    new_tokens = selection.sampling.max_new_tokens
    if longest is not None and new_tokens is not None and new_tokens >= longest:
        raise EngineError(f"max_new_tokens {new_tokens} leaves no room for a prompt in {longest} tokens")


def _run_id(job: CollectJob, problems: list[Problem]) -> str:
    settings = job.model_dump(mode="json", exclude={"run_id", "shards"}) | {"version": version("speculative-moe")}
    if job.moe_backend == AUTO_BACKEND:
        # Runs that were begun before there was this option are resumed.
        del settings["moe_backend"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for line in _problem_lines(problems):
        digest.update(line.encode())
    names = "-".join(dataset.name for dataset in job.datasets)
    precision = f"-{job.precision}" if job.precision != "auto" else ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{job.model}{precision}-{names}-{len(problems)}").lstrip("._-")
    return f"{name[:120]}-{digest.hexdigest()[:10]}"


def _problem_lines(problems: list[Problem]) -> Iterator[str]:
    return (json.dumps(vars(problem), separators=(",", ":"), sort_keys=True) for problem in problems)


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
