"""Collect a trace from options such as those of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from profiler.collect.collection import Collection, CollectSummary, Progress, check_sampling
from profiler.collect.collector import TraceCollector
from profiler.collect.selection import Selection, describe, select
from profiler.engines import EngineOptions, Sampling
from profiler.errors import EngineError
from profiler.trace.schema import METADATA_FILE
from profiler.trace.writer import check_free


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """What to collect. `num_problems` is the total, spread evenly over the datasets; `target_tokens` goes before it.

    precision: which checkpoint of a name of the registry.
    """

    model: str
    datasets: tuple[str, ...]
    out: Path
    num_problems: int = 100
    target_tokens: int | None = None
    max_tokens_per_problem: int | None = None
    data_files: Path | None = None
    revision: str | None = None
    precision: str = "auto"
    engine: str = "vllm"
    sampling: Sampling
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    jsonl: bool = False
    resume: bool = False

    @property
    def selection(self) -> Selection:
        """Which problems."""
        return Selection(
            datasets=self.datasets,
            num_problems=self.num_problems,
            target_tokens=self.target_tokens,
            max_tokens_per_problem=self.max_tokens_per_problem,
            data_files=self.data_files,
            sampling=self.sampling,
        )


def collect(
    options: CollectOptions,
    *,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> CollectSummary:
    """Run the model over the problems and leave a complete trace in `options.out`.

    on_stage is told what begins.
    Raises `SpecmoeError`; everything that can be checked before the engine starts is, and then nothing is written.
    """
    check_free(options.out, resume=options.resume)
    check_sampling(options.sampling)
    with TraceCollector(
        options.model,
        engine=options.engine,
        precision=options.precision,
        revision=options.revision,
        engine_options=options.engine_options,
        on_stage=on_stage,
        on_progress=on_progress,
    ) as collector:
        problems = select(options.selection, collector.model.location, collector.model.metadata.revision)
        if options.target_tokens is None and len(problems) < options.num_problems:
            on_stage(f"taking all {len(problems)} problems that there are, of {options.num_problems} asked for")
        capture = options.engine_options.capture
        try:
            return collector.collect(
                Collection(
                    out=options.out,
                    hidden_tokens=capture.hidden_tokens if capture.hidden_layers else 0,
                    jsonl=options.jsonl,
                    resume=options.resume,
                    **describe(options.selection, problems),
                )
            )
        except EngineError as error:
            if (options.out / METADATA_FILE).exists():
                raise type(error)(f"{error}; what was recorded before stays: --resume goes on from there") from error
            raise
