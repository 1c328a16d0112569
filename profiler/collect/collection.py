"""The data of a collection, without the engine: its settings, its progress, and a summary of the trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from profiler.capture.options import CaptureOptions
from profiler.collect.usage import Usage
from profiler.datasets.problems import Problem
from profiler.engines import Prompt, Sampling
from profiler.errors import EngineUsageError
from profiler.models.resolve import ResolvedModel
from profiler.trace.reader import Trace
from profiler.trace.schema import DatasetMetadata

# Above this, sampled text is noise, and vLLM refuses the value.
MAX_TEMPERATURE = 2.0


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What to collect into one trace.

    Attributes:
        problems: By their id in the trace.
        datasets: Where they come from.
        sampling: Its `max_new_tokens` is not used, since every problem has its own.
        out: The trace directory.
        recipe: How the problems were chosen, for the metadata.
        hidden_tokens: Budget of tokens whose router inputs are recorded.
        jsonl: Also write the routing as JSON lines.
        resume: Continue the interrupted collection in `out`, if there is one.

    Example:
        >>> from pathlib import Path
        >>> from profiler import Collection, DatasetMetadata, Problem, Sampling, TraceCollector
        >>> problems = {0: Problem(dataset="own", source_key="0", prompt="Why is the sky blue?", max_new_tokens=8)}
        >>> datasets = [DatasetMetadata(name="own", problems=1)]
        >>> with TraceCollector("demo", engine="transformers") as collector:
        ...     collector.collect(Collection(problems=problems, datasets=datasets, sampling=Sampling(), out=Path("traces/own")))
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
    """Progress of a run.

    problems: finished so far, by this run or an earlier one, of `total`. tokens: prompt and output tokens of the problems that
    this run finished, in `seconds`.
    """

    problems: int
    total: int
    tokens: int
    seconds: float
    usage: Usage


class CollectSummary(BaseModel):
    """What the trace holds: the document of `specmoe collect --json`.

    Times are in seconds; `bytes` is the size of the whole directory.

    resumed: problems that earlier runs had finished. by_dataset: dataset -> (problems, tokens), prompt and output.
    moe_kernels: kernel that computed experts -> the one that vLLM would have used without capture; None if it is the same.
    skipped_problems: problems that could not be run; the trace's gaps name them and say why.
    target_tokens: the requested number of tokens; None if a number of problems was requested. tokens_per_second: prompt and
    output tokens, with capture; None if earlier runs finished some of the problems.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    trace: Path
    engine: str
    problems: int
    resumed: int
    prompt_tokens: int
    output_tokens: int
    truncated_problems: int
    skipped_problems: int = 0
    by_dataset: dict[str, tuple[int, int]]
    target_tokens: int | None
    moe_kernels: dict[str, str | None] = {}
    rows: int
    bytes: int
    start_seconds: float
    generate_seconds: float
    tokens_per_second: float | None
    usage: Usage


def check_sampling(sampling: Sampling) -> None:
    """Raise `EngineError` on values that no engine accepts."""
    if not 0 < sampling.top_p <= 1 or not 0 <= sampling.temperature <= MAX_TEMPERATURE:
        raise EngineUsageError(f"expected top_p above 0 and at most 1, and temperature from 0 to {MAX_TEMPERATURE:g}")


def size_estimates(capture: CaptureOptions, model: ResolvedModel, collection: Collection, prompts: list[Prompt]) -> list[str]:
    """Estimated sizes of the optional recordings before compression, one line each."""
    facts = model.metadata
    lengths = [len(prompt.token_ids) + prompt.max_new_tokens - 1 for prompt in prompts]
    tokens = sum(lengths)
    estimates = []
    if capture.logits:
        values = tokens * len(facts.moe_layers) * facts.num_experts
        estimates.append(
            f"router logits: up to {tokens:,} tokens x {len(facts.moe_layers)} layers x {facts.num_experts} experts, "
            f"{2 * values / 1e6:,.1f} MB"
        )
    if capture.hidden_layers:
        # The problem that crosses the budget is still recorded to its end.
        recorded = min(tokens, collection.hidden_tokens + max(lengths, default=0) + 1)
        values = recorded * len(capture.hidden_layers) * model.hidden_size
        estimates.append(
            f"router inputs: about {recorded:,} tokens x {len(capture.hidden_layers)} layers x {model.hidden_size} "
            f"values, {2 * values / 1e6:,.1f} MB (limited by hidden_tokens)"
        )
    return estimates


def summarize(
    trace: Trace, *, resumed: int, usage: Usage, start_seconds: float = 0.0, generate_seconds: float = 0.0
) -> CollectSummary:
    """Summarize a complete trace."""
    columns = trace.problems.select(["dataset", "prompt_tokens", "output_tokens", "truncated_tokens"]).to_pydict()
    by_dataset: dict[str, tuple[int, int]] = {}
    for name, *tokens in zip(columns["dataset"], columns["prompt_tokens"], columns["output_tokens"], strict=True):
        problems, before = by_dataset.get(name, (0, 0))
        by_dataset[name] = problems + 1, before + sum(tokens)
    prompt_tokens, output_tokens = sum(columns["prompt_tokens"]), sum(columns["output_tokens"])
    return CollectSummary(
        trace=trace.path,
        engine=trace.metadata.engine,
        problems=trace.problems.num_rows,
        resumed=resumed,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        truncated_problems=sum(cut > 0 for cut in columns["truncated_tokens"]),
        by_dataset=by_dataset,
        skipped_problems=trace.metadata.capture.get("skipped_problems", 0),
        target_tokens=trace.metadata.sampling.get("target_tokens"),
        moe_kernels=trace.metadata.capture.get("moe_kernels", {}),
        rows=trace.num_rows,
        bytes=sum(path.stat().st_size for path in trace.path.rglob("*") if path.is_file()),
        start_seconds=start_seconds,
        generate_seconds=generate_seconds,
        tokens_per_second=None if resumed else (prompt_tokens + output_tokens) / max(generate_seconds, 1e-9),
        usage=usage,
    )
