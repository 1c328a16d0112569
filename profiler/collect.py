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

from profiler.capture import Sequence, finish_trace
from profiler.datasets import Dataset, Problem, find_dataset, load_problems
from profiler.engines import Captured, Completion, Engine, EngineOptions, Prompt, Sampling, start_engine
from profiler.errors import DatasetError, EngineError, TraceError
from profiler.models import ResolvedModel, resolve_model
from profiler.schema import (
    CAPTURE_FOLDER,
    METADATA_FILE,
    DatasetMetadata,
    Metadata,
)
from profiler.writer import write_metadata

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
    absent = sorted(set(options.engine_options.capture.hidden_layers) - set(model.metadata.moe_layers))
    if absent:
        layers = model.metadata.moe_layers
        raise EngineError(f"--capture-hidden {absent[0]}: not an MoE layer of {model.metadata.id} ({layers[0]}..{layers[-1]})")
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
            for note in [*engine.notes, *_size_estimates(options, model, prompts)]:
                on_stage(note)
            on_stage(f"running {len(prompts)} problems")
            completions, captured = _run(engine, prompts, options, on_progress)
        except EngineError as error:
            if _discard_if_empty(options.out, created):
                raise
            raise EngineError(f"{error}; what was recorded before stays in {options.out / CAPTURE_FOLDER}") from error
        except BaseException:
            _discard_if_empty(options.out, created)
            raise
        generated = time.monotonic()
        on_stage("sealing the trace")
        sequences = _sequences(problems, prompts, truncated, completions, captured.captured_as)
        metadata = metadata.model_copy(update={"capture": metadata.capture | captured.report})
        trace = finish_trace(options.out, metadata, sequences, jsonl=options.jsonl)
    finally:
        engine.close()
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


def _size_estimates(options: CollectOptions, model: ResolvedModel, prompts: list[Prompt]) -> list[str]:
    """What the optional recordings may take before compression, a line each."""
    capture, facts = options.engine_options.capture, model.metadata
    tokens = sum(len(prompt.token_ids) + options.sampling.max_new_tokens - 1 for prompt in prompts)
    estimates = []
    if capture.logits:
        values = tokens * len(facts.moe_layers) * facts.num_experts
        estimates.append(
            f"router logits: up to {tokens:,} tokens x {len(facts.moe_layers)} layers x {facts.num_experts} experts, "
            f"{2 * values / 1e6:,.1f} MB"
        )
    if capture.hidden_layers:
        # The problem that crosses the budget is still recorded whole.
        longest = max(len(prompt.token_ids) for prompt in prompts) + options.sampling.max_new_tokens
        some = min(tokens, capture.hidden_tokens + longest)
        values = some * len(capture.hidden_layers) * model.hidden_size
        estimates.append(
            f"router inputs: about {some:,} tokens x {len(capture.hidden_layers)} layers x {model.hidden_size} values, "
            f"{2 * values / 1e6:,.1f} MB (--hidden-tokens)"
        )
    return estimates


def _run(
    engine: Engine, prompts: list[Prompt], options: CollectOptions, on_progress: Callable[[int, int], None]
) -> tuple[list[Completion], Captured]:
    completions: list[Completion] = []

    def finished(completion: Completion) -> None:
        completions.append(completion)
        on_progress(len(completions), len(prompts))

    on_progress(0, len(prompts))
    captured = engine.generate(prompts, options.sampling, options.out / CAPTURE_FOLDER, finished)
    return sorted(completions, key=lambda completion: completion.problem_id), captured


def _discard_if_empty(out: Path, created: bool) -> bool:
    """Leave no trace directory behind that holds no rows; returns whether it is gone."""
    if any((out / CAPTURE_FOLDER).glob("part-*.parquet")):
        return False
    shutil.rmtree(out / CAPTURE_FOLDER, ignore_errors=True)
    (out / METADATA_FILE).unlink(missing_ok=True)
    if created:
        out.rmdir()
    return True


def _sequences(
    problems: list[Problem],
    prompts: list[Prompt],
    truncated: list[int],
    completions: list[Completion],
    captured_as: dict[int, int],
) -> list[Sequence]:
    return [
        Sequence(
            problem_id=prompt.problem_id,
            captured_as=captured_as.get(prompt.problem_id),
            dataset=problem.dataset,
            source_key=problem.source_key,
            prompt=problem.prompt,
            output=completion.text,
            prompt_token_ids=prompt.token_ids,
            output_token_ids=completion.token_ids,
            truncated_tokens=cut,
            cached_tokens=completion.cached_tokens,
            finish_reason=completion.finish_reason,
        )
        for problem, prompt, cut, completion in zip(problems, prompts, truncated, completions, strict=True)
    ]


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
            "logits": options.engine_options.capture.logits,
            "hidden_layers": list(options.engine_options.capture.hidden_layers),
            "prefix_caching": options.engine_options.prefix_caching,
        },
        command=_public_command(),
    )


def _public_command() -> list[str]:
    """The command line without the folder of the interpreter or script."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
