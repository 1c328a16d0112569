"""Export a trace as what other engines read: which experts are used most, and which to keep in fast memory.

Experts are chosen by the training part of the split and measured on a held-out part, one module per format. An engine chooses
by its own rule from the exported counts, and the report measures that rule's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError, TraceError, UsageError, counted
from profiler.exporters import csv_table, exllamav3, json_table, ktransformers, llama_cpp, sglang
from profiler.exporters.chosen_experts import Budget, choose_experts, choose_layers, distinct_experts, hit_rate, overlap
from profiler.exporters.content import Content
from profiler.exporters.counts import ExpertCounts, count_parts
from profiler.exporters.report import ExportReport, report_path
from profiler.models.registry import ModelEntry, find_entry
from profiler.trace.reader import Trace
from profiler.trace.schema import ModelMetadata
from profiler.trace.writer import temporary_of


@dataclass(frozen=True)
class ExportFormat:
    """A format of exports.

    Attributes:
        name, about: Its name, and what it is for.
        scope: How the engine chooses: "layer" (equally many experts in each layer), "global" (all layers ranked together),
            "layers" (whole layers), "none" (it keeps all experts), or "either" of the first two, for formats of our own.
        suffix: The usual ending of the file's name.
        unverified: What could not be tried without the engine.
        write: Write the file; returns how to use it, a line each.
    """

    name: str
    about: str
    scope: str
    suffix: str
    unverified: str
    write: Callable[[Content, Path], list[str]]


FORMATS = {
    module.NAME: ExportFormat(module.NAME, module.ABOUT, module.SCOPE, module.SUFFIX, module.UNVERIFIED, module.write)
    for module in (llama_cpp, exllamav3, ktransformers, sglang, json_table, csv_table)
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export. The fields are the options of `specmoe export`.

    Attributes:
        budget: How many experts to keep; None for a format that keeps all.
        by: What experts are ranked by: "tokens" or "weight".
        over_all_layers: Rank the experts of all layers together, where the format leaves it open.
        part: The part of the split that the choice is measured on.
        decode_only: Count generated tokens only, if the trace says which ones these are.
        batch: Tokens per step, by which a format of whole layers chooses them.
        model, precision: Model whose expert size a budget in GB uses. Default: the trace's, as it was published.
        layer_key: Name of MoE modules in the engine (`exllamav3`), with `{layer}` in it.
    """

    budget: Budget | None = None
    by: str = "tokens"
    over_all_layers: bool = False
    part: str = "test"
    decode_only: bool = True
    batch: int = 1
    model: str | None = None
    precision: str | None = None
    layer_key: str | None = None


def export_trace(trace: Trace, out: Path, format_name: str, options: ExportOptions) -> tuple[ExportReport, list[str]]:
    """Write the file `out` in a format, and its report next to it.

    Args:
        trace: An open trace.
        out: The file to create.
        format_name: One of `FORMATS`.
        options: What to export.

    Returns:
        The report, and how to use the file, a line each.

    Raises:
        SpecmoeError: An option does not fit the format or the trace, or a part of the split has no tokens.
        TraceError: `out` exists, or the trace cannot be read.
    """
    chosen = find_export_format(format_name)
    for path in (out, report_path(out)):
        if path.exists():
            raise TraceError(f"{path} exists: choose another file")
    if out.suffix != chosen.suffix and chosen.name in {ktransformers.NAME, sglang.NAME, exllamav3.NAME}:
        raise UsageError(f"{out}: {chosen.name} reads files whose names end in {chosen.suffix}")
    if options.batch < 1:
        raise UsageError(f"batch {options.batch}: expected at least 1")
    if options.by == "weight" and not trace.metadata.record.weights:
        raise SpecmoeError(f"{trace.path} has no routing weights: export by tokens")
    content = _content(trace, chosen, options)
    # The report gets its name last: a file that cannot be written leaves none, nor does a report that cannot be.
    with temporary_of(report_path(out)) as temporary:
        temporary.write_text(content.report.to_json(), encoding="utf-8")
        usage = chosen.write(content, out)
    return content.report, usage


def find_export_format(name: str) -> ExportFormat:
    """The format called `name`. Raises `SpecmoeError`, listing the formats, if there is none."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _content(trace: Trace, chosen: ExportFormat, options: ExportOptions) -> Content:
    model = trace.metadata.model
    entry = find_entry(options.model or model.id)
    if options.model is not None and entry is None:
        raise UsageError(f"unknown model {options.model!r}: see 'specmoe models'")
    if entry is not None and (
        options.model is not None or (options.budget is not None and options.budget.gigabytes is not None)
    ):
        _check_shape(entry, model)
    notes: list[str] = []
    scope = _scope(chosen, options, notes)
    counted = count_parts(trace, decode_only=options.decode_only)
    training, held_out = counted.part("train"), counted.part(options.part)
    if options.decode_only and not counted.is_decode_only:
        notes.append("the trace does not say which tokens were generated: all were counted")
    if options.part in {"train", "all"}:
        notes.append("NOT held out: the experts were chosen by the same problems")
    score_LE = training.mass_LE if options.by == "weight" else training.tokens_LE
    kept_LE = np.zeros(score_LE.shape, dtype=np.bool_)
    if scope != "none":
        if options.budget is None:
            raise UsageError("how many experts to keep: expected a fraction, slots per layer, or gigabytes")
        kept_LE = _kept(training, score_LE, scope, _affordable(options, model, entry), options.batch)
    num_layers = model.num_layers or (None if entry is None else entry.layers)
    # A trace may have the name of a model that it is not of.
    if num_layers is None or num_layers <= model.moe_layers[-1]:
        num_layers = model.moe_layers[-1] + 1
        notes.append(f"the number of decoder layers is not known: {num_layers}, up to the last one with experts, is assumed")
    if scope == "layers":
        notes.append(
            f"hit rate: share of the distinct experts read in a step of {options.batch} (tokens drawn independently) that are "
            "in kept layers; with one token a step every layer reads K experts, so a trace cannot prefer one"
        )
    notes += trace.caveats()
    report = ExportReport(
        trace=trace.path.resolve().name,
        model=model.id,
        format=chosen.name,
        problems=training.num_problems,
        tokens=training.num_tokens,
        held_out=options.part,
        held_out_problems=held_out.num_problems,
        held_out_tokens=held_out.num_tokens,
        phase="decode" if counted.is_decode_only else "all",
        by=options.by,
        scope=scope,
        kept=int(kept_LE.sum()),
        experts=kept_LE.size,
        overlap=overlap(training.tokens_LE, held_out.tokens_LE),
        overlap_uniform=overlap(np.ones(kept_LE.shape), held_out.tokens_LE),
        unverified=chosen.unverified,
        notes=notes,
    )
    if scope != "none":
        report = report.model_copy(update=_value(training, held_out, kept_LE, scope, options, model))
    return Content(
        model=model,
        num_layers=num_layers,
        counts=training,
        held_out=held_out,
        score_LE=score_LE,
        kept_LE=kept_LE,
        batch=options.batch,
        layer_key=options.layer_key,
        report=report,
    )


def _scope(chosen: ExportFormat, options: ExportOptions, notes: list[str]) -> str:
    """How experts are chosen. Adds a note if the engine does not choose as the options ask."""
    wanted = "global" if options.over_all_layers else "layer"
    if chosen.scope == "none" and options.budget is not None:
        raise UsageError(f"{chosen.name} keeps all experts: leave out how many to keep")
    if chosen.scope == "layer" and options.over_all_layers:
        raise UsageError(f"{chosen.name} keeps equally many experts in each layer: leave out the choice over all layers")
    if chosen.scope == "global" and not options.over_all_layers:
        notes.append(f"{chosen.name} ranks the experts of all layers together, so layers keep different numbers of experts")
    return wanted if chosen.scope == "either" else chosen.scope


def _affordable(options: ExportOptions, model: ModelMetadata, entry: ModelEntry | None) -> int:
    """Experts that fit into the budget, in all layers."""
    assert options.budget is not None
    size = None if entry is None else entry.expert_bytes(options.precision or next(iter(entry.checkpoints)))
    return options.budget.experts(len(model.moe_layers), model.num_experts, size)


def _check_shape(entry: ModelEntry, model: ModelMetadata) -> None:
    """Raise `SpecmoeError` if the trace cannot be one of this entry's model: its sizes or layers would not be the trace's."""
    shape = len(model.moe_layers), model.num_experts
    if (len(entry.moe_layers), entry.experts) != shape or model.moe_layers[-1] >= entry.layers:
        raise SpecmoeError(
            f"{entry.name} has {counted(len(entry.moe_layers), 'MoE layer')} of {entry.experts} experts; the trace has "
            f"{shape[0]} of "
            f"{shape[1]}, up to layer {model.moe_layers[-1]}: choose another model"
        )


def _kept(
    counts: ExpertCounts, score_LE: npt.NDArray[np.float64] | npt.NDArray[np.int64], scope: str, experts: int, batch: int
) -> npt.NDArray[np.bool_]:
    num_experts = score_LE.shape[1]
    if scope == "layers":
        kept_L = choose_layers(counts, experts // num_experts, batch)
        return np.repeat(kept_L[:, None], num_experts, axis=1)
    return choose_experts(score_LE, experts, over_all_layers=scope == "global")


def _value(
    training: ExpertCounts,
    held_out: ExpertCounts,
    kept_LE: npt.NDArray[np.bool_],
    scope: str,
    options: ExportOptions,
    model: ModelMetadata,
) -> dict[str, object]:
    """The report's fields about the choice."""
    by_weight = options.by == "weight"
    experts = int(kept_LE.sum())
    best_LE = _kept(held_out, held_out.mass_LE if by_weight else held_out.tokens_LE, scope, experts, options.batch)
    value: dict[str, object] = {"chance": experts / kept_LE.size, "kept_by_layer": _by_layer(model, kept_LE.sum(1).tolist())}
    if scope == "layers":
        # Every token needs K experts at every layer: what differs between layers is how many distinct ones a step reads.
        known, new = (distinct_experts(counts, options.batch) for counts in (training, held_out))
        kept_L, best_L = kept_LE[:, 0], best_LE[:, 0]
        return value | {
            "hit_rate": hit_rate(kept_L, new),
            "hit_rate_training": hit_rate(kept_L, known),
            "best_static": hit_rate(best_L, new),
        }
    rates = [hit_rate(kept_LE[row], held_out.tokens_LE[row]) for row in range(len(kept_LE))]
    return value | {
        "hit_rate": hit_rate(kept_LE, held_out.tokens_LE),
        "hit_rate_training": hit_rate(kept_LE, training.tokens_LE),
        "best_static": hit_rate(best_LE, held_out.tokens_LE),
        "mass": hit_rate(kept_LE, held_out.mass_LE),
        "hit_rate_by_layer": _by_layer(model, rates),
    }


def _by_layer(model: ModelMetadata, values: list[float]) -> dict[int, float]:
    return dict(zip(model.moe_layers, values, strict=True))
