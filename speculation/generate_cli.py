"""The command `generate`: run a model whose experts do not fit on the device."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from analysis.documents.generation import GeneratedText, GenerationPhase, GenerationRun, SimulatedPhase
from profiler.errors import SpecmoeError, UsageError, printable
from profiler.terminal import TABLE_WIDTH
from profiler.trace.writer import write_text
from speculation.cli import wait_passively

if TYPE_CHECKING:
    from speculation.runtime.experts import PhaseCounts
    from speculation.runtime.generation import Generation
    from speculation.runtime.model import OffloadedModel
    from speculation.runtime.recording import PromptSource

app = typer.Typer()
console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)
# Between lines of progress where there is no terminal.
PROGRESS_SECONDS = 20.0


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A model by short name ('specmoe models'), folder or hub id.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to continue. May be repeated.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Continue prompts of this dataset instead; 'specmoe datasets' lists them.")
    ] = None,
    num_problems: Annotated[int, typer.Option(min=1, help="Prompts to take from the dataset.")] = 4,
    data_files: Annotated[
        Path | None, typer.Option(help="Local .parquet or .jsonl file of the dataset, instead of the hub.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum of generated tokens per prompt.")] = 128,
    cache_fraction: Annotated[
        float | None, typer.Option(help="Share of all experts that is on the device. Default: .25, or none with --cache-gb.")
    ] = None,
    cache_gb: Annotated[float | None, typer.Option(help="GB of experts on the device, instead of a share.")] = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME|RUN",
            help="Which expert a full cache evicts: lru, ewma, lfu, lfu-aged, lfru, slru, fifo, least-stale or popularity (see "
            "'specmoe simulate --help'); or a run directory of 'specmoe train --task reuse'.",
        ),
    ] = "lru",
    time_constant: Annotated[
        float, typer.Option(min=0.1, help="Tokens over which ewma and lfu-aged forget the uses of an expert.")
    ] = 24.0,
    predictor: Annotated[
        str,
        typer.Option(
            metavar="RUN|next-gate|none",
            help="What to prefetch: what a run directory of 'specmoe train' predicts; what the next layer's router chooses for "
            "this layer's input (next-gate, which needs no training); or nothing.",
        ),
    ] = "none",
    prefetch: Annotated[
        int | None, typer.Option(min=1, help="Experts to prefetch per prediction and layer. Default: the model's top-k.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Prefetch only experts with at least this predicted probability.")
    ] = 0.0,
    store: Annotated[
        Literal["ram", "disk"], typer.Option(help="Where the other experts are: in host memory, or in the checkpoint's files.")
    ] = "ram",
    miss: Annotated[
        Literal["copy", "host"],
        typer.Option(
            help="What happens to an expert that the cache lacks: it is copied; or the CPU computes it, and it is copied in "
            "the background (host, with --store ram)."
        ),
    ] = "copy",
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="Device to compute on. Default: cuda if there is a GPU, else cpu.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights. Default: the checkpoint's.")
    ] = "auto",
    expert_bits: Annotated[
        Literal["8", "4"] | None,
        typer.Option(
            help="Round routed experts to 8 or 4 bits, in memory and cache: two or four times as many fit as in 16 bits. "
            "Default: as in the checkpoint."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts to compute at the same time.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Sample from the smallest set of tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write a trace of the routing and, with --batch 1, print what the simulation says of it."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Generate text with a model whose experts are in host memory or on disk, with a cache of them on the device.

    The output does not depend on the cache, the policy or the predictor. Only their speed differs. With --expert-bits, it is
    the output of the rounded experts.

    Example: specmoe generate demo --prompt "def add(a, b):" --store disk --cache-fraction .5 --policy ewma
    """
    if bool(prompt) == (dataset is not None):
        raise UsageError("choose either --prompt or --dataset")
    if cache_fraction is not None and cache_gb is not None:
        raise UsageError("choose either --cache-fraction or --cache-gb")
    wait_passively()
    from speculation.runtime.model import OffloadedModel
    from speculation.runtime.options import CacheSize

    sources = _sources(prompt or [], dataset, num_problems, data_files)
    if cache_gb is None and cache_fraction is None:
        cache_fraction = 0.25
    size = CacheSize(fraction=cache_fraction, gigabytes=cache_gb)
    began = time.monotonic()
    offloaded = OffloadedModel.load(
        model,
        size,
        store=store,
        miss=miss,
        policy=policy,
        predictor=None if predictor == "none" else predictor,
        prefetch=prefetch,
        threshold=threshold,
        device=device,
        dtype=dtype,
        expert_bits=None if expert_bits is None else int(expert_bits),
        time_constant=time_constant,
        revision=revision,
    )
    with offloaded:
        loaded = time.monotonic() - began
        messages.print(
            f"{escape(offloaded.metadata.id)}: {offloaded.capacity} of {offloaded.shape.experts} experts per layer in a cache "
            f"of {offloaded.cache_bytes / 1e9:.3g} GB, all {offloaded.expert_bytes / 1e9:.3g} GB of experts are read "
            f"{offloaded.reads}; loaded in {loaded:.1f} s",
            soft_wrap=True,
        )
        settings = (max_new_tokens, temperature, top_p, seed, batch)
        found = _generate_with_progress(offloaded, sources, settings, trace)
        simulated = None
        if trace is not None and miss == "copy" and batch == 1:
            simulated = _simulated(offloaded, trace, time_constant, (prefetch, threshold))
        result = _document(offloaded, policy, predictor, loaded, sources, found, simulated)
    if json_file is not None:
        write_text(json_file, result.to_json())
    for source, generation in zip(sources, found, strict=True):
        if len(sources) > 1:
            console.rule(escape(printable(f"{source.dataset} {source.source_key}")), align="left")
        typer.echo("\n".join(map(printable, f"{source.prompt}{generation.text}".split("\n"))))
    print_result(result)


def print_result(result: GenerationRun) -> None:
    """Print how fast a run was and what its cache did."""
    shown = Table(box=None)
    for column in ("", "tokens", "tokens/s", "hits", "late", "loaded", "on host", "MB/token", "waiting", "predicting"):
        shown.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, phase in (("prompts", result.prefill), ("generated", result.decode)):
        if phase.tokens:
            shown.add_row(
                name,
                f"{phase.tokens:,}",
                f"{phase.tokens_per_second:.2f}",
                f"{phase.hit_rate:.3f}",
                f"{phase.late / phase.requested:.3f}",
                f"{(phase.misses - phase.host) / phase.requested:.3f}",
                f"{phase.host / phase.requested:.3f}",
                f"{phase.gigabytes * 1e3 / phase.tokens:.4g}",
                f"{phase.stall:.0%}",
                f"{phase.foresight:.0%}",
            )
    (console if console.is_terminal else Console(width=TABLE_WIDTH, highlight=False)).print(shown)
    if result.predictor is not None:
        typer.echo(
            f"Prefetched {result.prefetched:,} experts: {result.useful:,} were used before they were evicted, "
            f"{result.wasted:,} were not; {result.dropped:,} predictions were dropped"
        )
    device = "" if result.device_gigabytes is None else f", of the GPU {result.device_gigabytes:.2f} GB"
    typer.echo(f"Peak memory of the process {result.memory_gigabytes:.2f} GB{device}")
    for line in result.notes:
        typer.echo(line)
    if result.simulated is not None:
        simulated = result.simulated
        typer.echo(
            f"Simulation of the same tokens: hit rate {simulated.hit_rate:.3f}, {simulated.tokens_per_second:.2f} tokens/s "
            f"(the run reached {result.decode.tokens_per_second / max(simulated.tokens_per_second, 1e-9):.2f} of that)"
        )
        for line in simulated.assumptions:
            typer.echo(f"  {line}")


def _sources(prompts: list[str], dataset: str | None, count: int, data_files: Path | None) -> list[PromptSource]:
    from speculation.runtime.recording import PromptSource

    if dataset is None:
        return [PromptSource(dataset="prompts", source_key=str(n), prompt=text) for n, text in enumerate(prompts)]
    from profiler.datasets.problems import read_problems
    from profiler.datasets.registry import find_dataset

    problems = list(islice(read_problems(find_dataset(dataset), data_files=data_files), count))
    if not problems:
        raise SpecmoeError(f"{data_files or dataset} has no problems")
    return [PromptSource(dataset=each.dataset, source_key=each.source_key, prompt=each.prompt) for each in problems]


def _generate_with_progress(
    offloaded: OffloadedModel,
    sources: list[PromptSource],
    settings: tuple[int, float, float, int, int],
    trace: Path | None,
) -> list[Generation]:
    """Generate, with a live line where there is a terminal, else with a line now and then."""
    max_new_tokens, temperature, top_p, seed, batch = settings
    decode, prompts = offloaded.experts.decode, [source.prompt or "" for source in sources]
    total = len(prompts) * max_new_tokens
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        last_printed = time.monotonic()

        def report() -> None:
            nonlocal last_printed
            line = _line(decode)
            progress.update(bar, completed=decode.tokens, description=line)
            if not messages.is_terminal and time.monotonic() - last_printed > PROGRESS_SECONDS:
                last_printed = time.monotonic()
                messages.print(f"{decode.tokens} of up to {total} tokens: {line}")

        return offloaded.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch=batch,
            on_token=report,
            trace=trace,
            sources=sources,
        )


def _line(decode: PhaseCounts) -> str:
    if not decode.tokens:
        return "computing the prompt"
    return (
        f"{decode.tokens / decode.seconds:.2f} tokens/s, hit rate {decode.hits / decode.requested:.3f}, "
        f"waiting {decode.stall / decode.seconds:.0%}"
    )


def _simulated(
    offloaded: OffloadedModel, trace: Path, time_constant: float, prefetch: tuple[int | None, float]
) -> SimulatedPhase | None:
    """What the simulation says of the trace; None where it cannot be compared."""
    from profiler.trace.reader import Trace
    from speculation.runtime.agreement import measured_costs, simulate_run, simulated_phase

    if offloaded.experts.slots.device.type != "cpu" or not offloaded.experts.decode.tokens:
        return None
    if offloaded.prefetcher is not None and offloaded.prefetcher_run is None:
        # The simulation cannot know what the routers choose for another layer's input.
        return None
    costs = measured_costs(offloaded)
    result = simulate_run(
        offloaded,
        Trace.open(trace),
        costs,
        time_constant=time_constant,
        prefetcher=offloaded.prefetcher_run,
        prefetch=prefetch[0] or offloaded.shape.top_k,
        threshold=prefetch[1],
        reuse=offloaded.reuse_run,
    )
    return simulated_phase(result, costs)


def _document(
    offloaded: OffloadedModel,
    policy: str,
    predictor: str,
    loaded: float,
    sources: list[PromptSource],
    found: list[Generation],
    simulated: SimulatedPhase | None,
) -> GenerationRun:
    from speculation.runtime.memory import peak_device_memory, peak_memory

    experts, counts = offloaded.experts, offloaded.experts.transfers.counts
    device_memory = peak_device_memory(experts.slots.device)
    return GenerationRun(
        model=offloaded.metadata.id,
        device=str(experts.slots.device),
        dtype=offloaded.metadata.dtype or "",
        expert_bits=offloaded.expert_bits,
        store=offloaded.store.value,
        reads=offloaded.reads,
        policy=policy,
        predictor=None if predictor == "none" else predictor,
        capacity=offloaded.capacity,
        num_experts=offloaded.shape.experts,
        cache_gigabytes=offloaded.cache_bytes / 1e9,
        expert_gigabytes=offloaded.expert_bytes / 1e9,
        load_seconds=loaded,
        prefill=_phase(experts.prefill),
        decode=_phase(experts.decode),
        prefetched=counts.prefetched,
        useful=counts.useful,
        wasted=experts.transfers.wasted,
        dropped=counts.dropped,
        memory_gigabytes=peak_memory() / 1e9,
        device_gigabytes=None if device_memory is None else device_memory / 1e9,
        notes=experts.notes,
        simulated=simulated,
        outputs=[
            GeneratedText(
                prompt=source.prompt,
                prompt_tokens=len(generation.prompt_ids),
                token_ids=generation.token_ids,
                text=generation.text,
                finish_reason=generation.finish_reason,
            )
            for source, generation in zip(sources, found, strict=True)
        ],
    )


def _phase(counts: PhaseCounts) -> GenerationPhase:
    seconds = counts.seconds or 1.0
    return GenerationPhase(
        tokens=counts.tokens,
        seconds=counts.seconds,
        requested=counts.requested,
        hits=counts.hits,
        late=counts.late,
        misses=counts.misses,
        host=counts.host,
        streamed=counts.streamed,
        gigabytes=counts.bytes / 1e9,
        stall=counts.stall / seconds,
        foresight=counts.foresight / seconds,
    )
