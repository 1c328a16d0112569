"""What is collected and what came of it: the data of a collection, without the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiler.collect.usage import Usage
from profiler.datasets.problems import Problem
from profiler.engines import Sampling
from profiler.errors import EngineError
from profiler.trace.reader import Trace
from profiler.trace.schema import DatasetMetadata

# Beyond this, sampling is noise and vLLM refuses it.
MAX_TEMPERATURE = 2.0


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What one trace is to hold.

    problems: by their id in the trace. datasets: where they come from. sampling: its `max_new_tokens` is not used, since every
    problem has its own. recipe: how the problems were chosen, for the metadata. hidden_tokens: how many may have their router
    inputs recorded. resume: go on with what is in `out`.
    """

    problems: dict[int, Problem]
    datasets: list[DatasetMetadata]
    sampling: Sampling
    out: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    hidden_tokens: int = 0
    jsonl: bool = False
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class CollectProgress:
    """How far a run is. tokens: prompt and output of the problems that this run finished, in `seconds` of running."""

    problems: int
    total: int
    tokens: int
    seconds: float
    usage: Usage


@dataclass(frozen=True, kw_only=True)
class CollectSummary:
    """What the trace holds. Times in seconds, `bytes` of the whole directory. resumed: problems that were finished before.

    by_dataset: problems and tokens (prompt and output) of each. target_tokens: asked for, if tokens were.
    """

    trace: Path
    engine: str
    problems: int
    resumed: int
    prompt_tokens: int
    output_tokens: int
    truncated_problems: int
    by_dataset: dict[str, tuple[int, int]]
    target_tokens: int | None
    rows: int
    bytes: int
    start_seconds: float
    generate_seconds: float
    usage: Usage

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt and output tokens through the model per second, capture included; None if earlier runs did a part."""
        if self.resumed:
            return None
        return (self.prompt_tokens + self.output_tokens) / max(self.generate_seconds, 1e-9)


def check_sampling(sampling: Sampling) -> None:
    """Raise `EngineError` on values that no engine takes."""
    if not 0 < sampling.top_p <= 1 or not 0 <= sampling.temperature <= MAX_TEMPERATURE:
        raise EngineError(f"expected --top-p above 0 up to 1 and --temperature 0 to {MAX_TEMPERATURE:g}")


def summarize(
    trace: Trace, *, resumed: int, usage: Usage, start_seconds: float = 0.0, generate_seconds: float = 0.0
) -> CollectSummary:
    """What a complete trace holds."""
    columns = trace.problems.select(["dataset", "prompt_tokens", "output_tokens", "truncated_tokens"]).to_pydict()
    by_dataset: dict[str, tuple[int, int]] = {}
    for name, *tokens in zip(columns["dataset"], columns["prompt_tokens"], columns["output_tokens"], strict=True):
        problems, before = by_dataset.get(name, (0, 0))
        by_dataset[name] = problems + 1, before + sum(tokens)
    return CollectSummary(
        trace=trace.path,
        engine=trace.metadata.engine,
        problems=trace.problems.num_rows,
        resumed=resumed,
        prompt_tokens=sum(columns["prompt_tokens"]),
        output_tokens=sum(columns["output_tokens"]),
        truncated_problems=sum(cut > 0 for cut in columns["truncated_tokens"]),
        by_dataset=by_dataset,
        target_tokens=trace.metadata.sampling.get("target_tokens"),
        rows=trace.num_rows,
        bytes=sum(path.stat().st_size for path in trace.path.rglob("*") if path.is_file()),
        start_seconds=start_seconds,
        generate_seconds=generate_seconds,
        usage=usage,
    )
