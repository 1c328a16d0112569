"""Collect a trace, given the options of the command line."""

from __future__ import annotations

from collections.abc import Callable

from profiler.collect.collection import Collection, CollectProgress, CollectSummary, check_sampling
from profiler.collect.collector import TraceCollector
from profiler.collect.options import LocalOptions
from profiler.collect.selection import describe, select
from profiler.errors import EngineError, counted
from profiler.trace.schema import METADATA_FILE
from profiler.trace.writer import check_free


def collect(
    options: LocalOptions,
    *,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[CollectProgress], None] = lambda progress: None,
) -> CollectSummary:
    """Run the model over the problems and write a complete trace to `options.out`.

    on_stage: called with a line of text at the start of every stage. on_progress: called when the
    engine begins and after every problem.
    Raises `SpecmoeError`. Whatever can be checked before the engine starts is checked then, before anything is written.
    """
    check_free(options.out, resume=options.resume)
    check_sampling(options.sampling)
    selection = options.selection
    with TraceCollector(
        options.model,
        engine=options.engine,
        precision=options.precision,
        revision=options.revision,
        engine_options=options.engine_options,
        on_stage=on_stage,
        on_progress=on_progress,
    ) as collector:
        problems = select(selection, collector.model.location, collector.model.metadata.revision)
        if options.target_tokens is None and len(problems) < options.num_problems:
            on_stage(
                f"taking {counted(len(problems), 'problem')}: the datasets hold fewer than the {options.num_problems} requested"
            )
        capture = options.capture
        try:
            return collector.collect(
                Collection(
                    out=options.out,
                    hidden_tokens=capture.hidden_tokens if capture.hidden_layers else 0,
                    jsonl=options.jsonl,
                    resume=options.resume,
                    **describe(selection, problems),
                )
            )
        except EngineError as error:
            if (options.out / METADATA_FILE).exists():
                raise type(error)(f"{error}; what was recorded before is kept: resume the collection to continue") from error
            raise
