"""Collect a trace: problems -> prompts -> engine with capture -> sealed trace directory.

A collection that was killed is resumed: problems that an earlier run finished, and whose routing is all there, are kept; the
others run again, in a run of their own.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from profiler.capture import (
    COMPLETIONS_FILE,
    PLANNED_FILE,
    CompletedProblem,
    PlannedProblem,
    Sequence,
    finish_trace,
    read_completed,
)
from profiler.capture_stream import ROUTING_STREAM
from profiler.datasets import Dataset, Problem, find_dataset, load_problems
from profiler.engines import Completion, Engine, EngineOptions, Prompt, Sampling, start_engine
from profiler.errors import DatasetError, EngineError
from profiler.models import ResolvedModel, resolve_model
from profiler.reader import Trace
from profiler.resume import check_free, finished_problems, refuse_other_settings, with_hidden_tokens_left
from profiler.schema import CAPTURE_FOLDER, METADATA_FILE, DatasetMetadata, Metadata
from profiler.sealing import captured_positions, run_folder, runs_of
from profiler.writer import exclusive, public_command, write_metadata

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
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What the trace holds. Times in seconds, `bytes` of the whole directory. resumed: problems that were finished before."""

    trace: Path
    engine: str
    problems: int
    resumed: int
    prompt_tokens: int
    output_tokens: int
    truncated_problems: int
    rows: int
    bytes: int
    start_seconds: float
    generate_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt and output tokens through the model per second, capture included; None if earlier runs did a part."""
        if self.resumed:
            return None
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
    check_free(options.out, resume=options.resume)
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
    created = not options.out.exists()
    options.out.mkdir(parents=True, exist_ok=True)
    with exclusive(options.out):
        # Another collector may have begun or finished it since the first look.
        check_free(options.out, resume=options.resume)
        begun = (options.out / METADATA_FILE).exists()
        try:
            return _collect(options, model, datasets, problems, on_stage, on_progress)
        except BaseException as error:
            if not begun and _discard_if_empty(options.out, created):
                raise
            if isinstance(error, EngineError):
                raise EngineError(f"{error}; what was recorded before stays: --resume goes on from there") from error
            raise


def _collect(
    options: CollectOptions,
    model: ResolvedModel,
    datasets: list[Dataset],
    problems: list[Problem],
    on_stage: Callable[[str], None],
    on_progress: Callable[[int, int], None],
) -> CollectSummary:
    """As `collect`, in a folder that is held."""
    out = options.out
    earlier = Trace.open(out, allow_incomplete=True) if (out / METADATA_FILE).is_file() else None
    sequences: dict[int, Sequence] = {}
    if earlier is not None:
        refuse_other_settings(earlier.metadata, _settings(options, model, datasets, problems), out)
        if earlier.manifest is not None:
            on_stage(f"{out} is complete already")
            trace = Trace.open(out)
            # A kill may have come between the manifest and this.
            shutil.rmtree(out / CAPTURE_FOLDER, ignore_errors=True)
            return _summary(trace, resumed=trace.problems.num_rows)
        sequences = finished_problems(out, problems)
        on_stage(f"resuming: {len(sequences)} of {len(problems)} problems are finished")
    resumed = len(sequences)
    start_seconds, generate_seconds = 0.0, 0.0
    if earlier is not None and resumed == len(problems):
        # Sealing says anew what is missing.
        metadata = earlier.metadata.model_copy(update={"gaps": []})
    else:
        on_stage(f"starting {options.engine} with {model.metadata.id}")
        began = time.monotonic()
        engine = start_engine(options.engine, model, with_hidden_tokens_left(options.engine_options, out, sequences))
        try:
            start_seconds = time.monotonic() - began
            metadata = _metadata(options, model, engine, datasets, problems)
            if earlier is None:
                write_metadata(out, metadata)
            else:
                refuse_other_settings(
                    earlier.metadata, metadata.model_dump(mode="json", exclude={"created", "command", "gaps"}), out
                )
                metadata = metadata.model_copy(update={"created": earlier.metadata.created})
            remaining = [problem_id for problem_id in range(len(problems)) if problem_id not in sequences]
            prompts = _encode(engine, problems, remaining, options.sampling.max_new_tokens)
            for note in [*engine.notes, *_size_estimates(options, model, [prompt for prompt, _ in prompts])]:
                on_stage(note)
            on_stage(f"running {len(prompts)} problems")
            began = time.monotonic()
            ran, report = _run(engine, problems, prompts, options, lambda done: on_progress(resumed + done, len(problems)))
            generate_seconds = time.monotonic() - began
        finally:
            engine.close()
        sequences |= ran
        metadata = metadata.model_copy(update={"capture": metadata.capture | report})
    on_stage("sealing the trace")
    runs = len(runs_of(out))
    cut = sum(sequence.truncated_tokens > 0 for sequence in sequences.values())
    metadata = metadata.model_copy(update={"capture": metadata.capture | {"truncated_problems": cut, "runs": runs}})
    trace = finish_trace(out, metadata, list(sequences.values()), jsonl=options.jsonl, others_abandoned=runs > 1)
    return _summary(trace, resumed=resumed, start_seconds=start_seconds, generate_seconds=generate_seconds)


def _summary(trace: Trace, *, resumed: int, start_seconds: float = 0.0, generate_seconds: float = 0.0) -> CollectSummary:
    columns = trace.problems.select(["prompt_tokens", "output_tokens", "truncated_tokens"]).to_pydict()
    return CollectSummary(
        trace=trace.path,
        engine=trace.metadata.engine,
        problems=trace.problems.num_rows,
        resumed=resumed,
        prompt_tokens=sum(columns["prompt_tokens"]),
        output_tokens=sum(columns["output_tokens"]),
        truncated_problems=sum(cut > 0 for cut in columns["truncated_tokens"]),
        rows=trace.num_rows,
        bytes=sum(path.stat().st_size for path in trace.path.rglob("*") if path.is_file()),
        start_seconds=start_seconds,
        generate_seconds=generate_seconds,
    )


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


def _encode(engine: Engine, problems: list[Problem], problem_ids: list[int], max_new_tokens: int) -> list[tuple[Prompt, int]]:
    """Prompts, and how many tokens each lost: prompts that leave no room for the output keep their head."""
    room = engine.max_length - max_new_tokens
    if room < 1:
        raise EngineError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in {engine.max_length} tokens")
    prompts = []
    for problem_id in problem_ids:
        token_ids = engine.encode(problems[problem_id].prompt)
        prompts.append((Prompt(problem_id, token_ids[:room]), max(0, len(token_ids) - room)))
    return prompts


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
    engine: Engine,
    problems: list[Problem],
    prompts: list[tuple[Prompt, int]],
    options: CollectOptions,
    on_progress: Callable[[int], None],
) -> tuple[dict[int, Sequence], dict[str, Any]]:
    """Run the prompts in a run of their own; returns their sequences and the engine's report."""
    run = max(runs_of(options.out), default=-1) + 1
    folder = run_folder(options.out, run)
    folder.mkdir(parents=True)
    with (folder / PLANNED_FILE).open("w", encoding="utf-8") as file:
        for prompt, cut in prompts:
            problem = problems[prompt.problem_id]
            planned = PlannedProblem(
                problem_id=prompt.problem_id,
                dataset=problem.dataset,
                source_key=problem.source_key,
                prompt=problem.prompt,
                prompt_token_ids=prompt.token_ids,
                truncated_tokens=cut,
            )
            file.write(planned.to_json() + "\n")
    done = 0
    with (folder / COMPLETIONS_FILE).open("w", encoding="utf-8") as completions:

        def finished(completion: Completion) -> None:
            nonlocal done
            record = CompletedProblem(
                problem_id=completion.problem_id,
                output=completion.text,
                output_token_ids=completion.token_ids,
                cached_tokens=completion.cached_tokens,
                finish_reason=completion.finish_reason,
            )
            completions.write(record.to_json() + "\n")
            completions.flush()
            done += 1
            on_progress(done)

        on_progress(done)
        report = engine.generate([prompt for prompt, _ in prompts], options.sampling, folder, finished)
    return read_completed(options.out, run), report


def _discard_if_empty(out: Path, created: bool) -> bool:
    """Leave no trace directory behind that holds no rows; returns whether it is gone."""
    if any(captured_positions(run_folder(out, run)).get(ROUTING_STREAM) for run in runs_of(out)):
        return False
    shutil.rmtree(out / CAPTURE_FOLDER, ignore_errors=True)
    for name in (METADATA_FILE, Path(METADATA_FILE).with_suffix(".tmp").name):
        (out / name).unlink(missing_ok=True)
    if created:
        out.rmdir()
    return True


def _settings(
    options: CollectOptions, model: ResolvedModel, datasets: list[Dataset], problems: list[Problem]
) -> dict[str, Any]:
    """What the metadata says before an engine was started."""
    sampling = options.sampling
    return {
        "model": {"id": model.metadata.id, "revision": model.metadata.revision},
        "engine": options.engine,
        "datasets": [
            DatasetMetadata(
                name=dataset.name,
                hub_id=None if options.data_files else dataset.hub_id,
                config=None if options.data_files else dataset.config,
                split=None if options.data_files else dataset.split,
                data_files=options.data_files.name if options.data_files else None,
                prompt_template=dataset.template,
                problems=sum(problem.dataset == dataset.name for problem in problems),
            ).model_dump(mode="json")
            for dataset in datasets
        ],
        "sampling": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "ignore_eos": sampling.ignore_eos,
        },
    }


def _metadata(
    options: CollectOptions, model: ResolvedModel, engine: Engine, datasets: list[Dataset], problems: list[Problem]
) -> Metadata:
    settings = _settings(options, model, datasets, problems)
    loaded = {name: getattr(engine, name) for name in ("moe_layers", "num_experts", "top_k", "dtype")}
    return Metadata(
        model=model.metadata.model_copy(update=loaded),
        datasets=settings["datasets"],
        sampling=settings["sampling"],
        engine=engine.name,
        versions=engine.versions | {"speculative-moe": version("speculative-moe"), "python": platform.python_version()},
        hook=engine.hook,
        capture={
            "dtype": options.engine_options.dtype,
            "compiled": engine.compiled,
            "max_length": engine.max_length,
            "logits": options.engine_options.capture.logits,
            "hidden_layers": list(options.engine_options.capture.hidden_layers),
            "hidden_tokens": options.engine_options.capture.hidden_tokens,
            "prefix_caching": options.engine_options.prefix_caching,
        },
        command=public_command(),
    )
