"""Collect a trace: problems -> prompts -> engine with capture -> sealed trace directory."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from profiler.datasets import Dataset, Problem, find_dataset, load_problems
from profiler.engines import Completion, Engine, EngineOptions, Prompt, Sampling, start_engine
from profiler.errors import DatasetError, EngineError, TraceError
from profiler.jsonl import write_jsonl
from profiler.models import ResolvedModel, resolve_model
from profiler.reader import Trace
from profiler.schema import (
    CAPTURE_FOLDER,
    DECODE,
    JSONL_FILE,
    METADATA_FILE,
    PREFILL,
    PROBLEMS_FILE,
    PROBLEMS_SCHEMA,
    TOKENS_FILE,
    TOKENS_SCHEMA,
    DatasetMetadata,
    Metadata,
)
from profiler.writer import seal, write_manifest, write_metadata, write_table

# Beyond this, sampling is noise and vLLM refuses it.
MAX_TEMPERATURE = 2.0


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """What to collect. `num_problems` is the total, spread evenly over the datasets."""

    model: str
    datasets: tuple[str, ...]
    out: Path
    num_problems: int = 100
    data_files: Path | None = None
    revision: str | None = None
    engine: str = "vllm"
    sampling: Sampling
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    jsonl: bool = False


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What was collected. Times in seconds, `bytes` of the whole directory."""

    trace: Path
    engine: str
    problems: int
    prompt_tokens: int
    output_tokens: int
    truncated_problems: int
    rows: int
    bytes: int
    start_seconds: float
    generate_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Prompt and output tokens through the model per second, capture included, engine start excluded."""
        return (self.prompt_tokens + self.output_tokens) / max(self.generate_seconds, 1e-9)


def collect(
    options: CollectOptions,
    *,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CollectSummary:
    """Run the model over the problems and leave a complete trace in `options.out`.

    on_stage is told what begins; on_progress gets (finished problems, all problems).
    Raises `SpecmoeError`; everything that can be checked before the engine starts is, and then nothing is written.
    """
    check_free(options.out)
    if not 0 < options.sampling.top_p <= 1 or not 0 <= options.sampling.temperature <= MAX_TEMPERATURE:
        raise EngineError(f"expected --top-p above 0 up to 1 and --temperature 0 to {MAX_TEMPERATURE:g}")
    model = resolve_model(options.model, dtype=options.engine_options.dtype, revision=options.revision)
    datasets = [find_dataset(name) for name in options.datasets]
    problems = _load_all(datasets, options)
    max_length = options.engine_options.max_length
    if max_length is not None and max_length > model.max_length:
        raise EngineError(f"--max-length {max_length}: {model.metadata.id} was made for {model.max_length} tokens at most")
    if len(problems) < options.num_problems:
        on_stage(f"taking all {len(problems)} problems that there are, of {options.num_problems} asked for")
    on_stage(f"starting {options.engine} with {model.metadata.id}")
    began = time.monotonic()
    engine = start_engine(options.engine, model, options.engine_options)
    started = time.monotonic()
    try:
        prompts, truncated = _encode(engine, problems, options.sampling.max_new_tokens)
        metadata = _metadata(options, model, engine, datasets, problems, truncated)
        created = not options.out.exists()
        options.out.mkdir(parents=True, exist_ok=True)
        try:
            write_metadata(options.out, metadata)
            on_stage(f"running {len(prompts)} problems")
            completions = _run(engine, prompts, options, on_progress)
        except BaseException:
            _discard_if_empty(options.out, created)
            raise
        generated = time.monotonic()
        on_stage("sealing the trace")
        _finish(options, metadata, problems, prompts, truncated, completions)
    finally:
        engine.close()
    trace = Trace.open(options.out)
    return CollectSummary(
        trace=options.out,
        engine=engine.name,
        problems=len(problems),
        prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
        output_tokens=sum(len(completion.token_ids) for completion in completions),
        truncated_problems=sum(cut > 0 for cut in truncated),
        rows=trace.num_rows,
        bytes=sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file()),
        start_seconds=started - began,
        generate_seconds=generated - started,
    )


def check_free(out: Path) -> None:
    """Raise `TraceError` unless `out` is absent or an empty folder."""
    if out.is_dir() and (out / METADATA_FILE).exists():
        raise TraceError(f"{out} already holds a trace: choose another --out, or delete that folder first")
    existing = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise TraceError(f"{existing} is a file, not a folder: choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TraceError(f"{out} exists and is not an empty folder: choose another --out")


def _load_all(datasets: list[Dataset], options: CollectOptions) -> list[Problem]:
    if options.data_files is not None and len(datasets) > 1:
        raise DatasetError("--data-files goes with one --dataset, not with several")
    if len(set(datasets)) < len(datasets):
        raise DatasetError(f"--dataset {','.join(options.datasets)} names a dataset twice")
    share, rest = divmod(options.num_problems, len(datasets))
    problems = []
    for position, dataset in enumerate(datasets):
        count = share + (position < rest)
        if count:
            problems += load_problems(dataset, count, data_files=options.data_files)
    return problems


def _encode(engine: Engine, problems: list[Problem], max_new_tokens: int) -> tuple[list[Prompt], list[int]]:
    """Prompts, and how many tokens each lost: prompts that leave no room for the output keep their head."""
    room = engine.max_length - max_new_tokens
    if room < 1:
        raise EngineError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in {engine.max_length} tokens")
    prompts, truncated = [], []
    for problem_id, problem in enumerate(problems):
        token_ids = engine.encode(problem.prompt)
        prompts.append(Prompt(problem_id, token_ids[:room]))
        truncated.append(max(0, len(token_ids) - room))
    return prompts, truncated


def _run(
    engine: Engine, prompts: list[Prompt], options: CollectOptions, on_progress: Callable[[int, int], None]
) -> list[Completion]:
    completions: list[Completion] = []

    def finished(completion: Completion) -> None:
        completions.append(completion)
        on_progress(len(completions), len(prompts))

    on_progress(0, len(prompts))
    engine.generate(prompts, options.sampling, options.out / CAPTURE_FOLDER, finished)
    return sorted(completions, key=lambda completion: completion.problem_id)


def _discard_if_empty(out: Path, created: bool) -> None:
    """Leave no trace directory behind that holds no rows."""
    if any((out / CAPTURE_FOLDER).glob("part-*.parquet")):
        return
    shutil.rmtree(out / CAPTURE_FOLDER, ignore_errors=True)
    (out / METADATA_FILE).unlink(missing_ok=True)
    if created:
        out.rmdir()


def _finish(
    options: CollectOptions,
    metadata: Metadata,
    problems: list[Problem],
    prompts: list[Prompt],
    truncated: list[int],
    completions: list[Completion],
) -> None:
    """Write everything but the capture itself; the manifest last."""
    lengths = {
        prompt.problem_id: len(prompt.token_ids) + len(completion.token_ids)
        for prompt, completion in zip(prompts, completions, strict=True)
    }
    missing = seal(options.out, metadata.model, lengths)
    if missing:
        positions = sum(missing.values())
        metadata = metadata.model_copy(
            update={"gaps": [f"{positions} positions of {len(missing)} problems were not captured: {sorted(missing)[:20]}"]}
        )
        write_metadata(options.out, metadata)
    write_table(options.out / TOKENS_FILE, _tokens_table(prompts, completions))
    write_table(options.out / PROBLEMS_FILE, _problems_table(problems, prompts, truncated, completions))
    extra_files = {}
    if options.jsonl:
        trace = Trace.open(options.out, allow_incomplete=True)
        extra_files[JSONL_FILE] = write_jsonl(trace, options.out / JSONL_FILE)
    write_manifest(options.out, extra_files)


def _tokens_table(prompts: list[Prompt], completions: list[Completion]) -> pa.Table:
    pairs = list(zip(prompts, completions, strict=True))
    lengths = np.array([len(p.token_ids) + len(c.token_ids) for p, c in pairs])
    decode = [np.arange(n) >= len(p.token_ids) for (p, _), n in zip(pairs, lengths, strict=True)]
    return pa.table(
        [
            np.repeat(np.array([p.problem_id for p, _ in pairs], dtype=np.int32), lengths),
            np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            np.concatenate([np.array(p.token_ids + c.token_ids, dtype=np.int32) for p, c in pairs]),
            pa.DictionaryArray.from_arrays(np.concatenate(decode).astype(np.int8), [PREFILL, DECODE]),
        ],
        schema=TOKENS_SCHEMA,
    )


def _problems_table(
    problems: list[Problem], prompts: list[Prompt], truncated: list[int], completions: list[Completion]
) -> pa.Table:
    rows = [
        {
            "problem_id": prompt.problem_id,
            "dataset": problem.dataset,
            "source_key": problem.source_key,
            "prompt": problem.prompt,
            "output": completion.text,
            "prompt_tokens": len(prompt.token_ids),
            "output_tokens": len(completion.token_ids),
            "truncated_tokens": cut,
            "finish_reason": completion.finish_reason,
        }
        for problem, prompt, cut, completion in zip(problems, prompts, truncated, completions, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=PROBLEMS_SCHEMA)


def _metadata(
    options: CollectOptions,
    model: ResolvedModel,
    engine: Engine,
    datasets: list[Dataset],
    problems: list[Problem],
    truncated: list[int],
) -> Metadata:
    sampling = options.sampling
    return Metadata(
        model=model.metadata.model_copy(
            update={
                "moe_layers": engine.moe_layers,
                "num_experts": engine.num_experts,
                "top_k": engine.top_k,
                "dtype": engine.dtype,
            }
        ),
        datasets=[
            DatasetMetadata(
                name=dataset.name,
                hub_id=None if options.data_files else dataset.hub_id,
                config=None if options.data_files else dataset.config,
                split=None if options.data_files else dataset.split,
                data_files=options.data_files.name if options.data_files else None,
                prompt_template=dataset.template,
                problems=sum(problem.dataset == dataset.name for problem in problems),
            )
            for dataset in datasets
        ],
        sampling={
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "ignore_eos": sampling.ignore_eos,
        },
        engine=engine.name,
        versions=engine.versions | {"speculative-moe": version("speculative-moe"), "python": platform.python_version()},
        hook=engine.hook,
        capture={
            "dtype": options.engine_options.dtype,
            "compiled": engine.compiled,
            "max_length": engine.max_length,
            "truncated_problems": sum(cut > 0 for cut in truncated),
            "prefix_caching": False,
        },
        command=_public_command(),
    )


def _public_command() -> list[str]:
    """The command line without the folder of the interpreter or script."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
