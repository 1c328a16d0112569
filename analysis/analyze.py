"""Analyze traces into folders: statistics, tables, transition matrices and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from analysis.counts.answers import read_answers
from analysis.counts.survey import EVERYTHING, Choice
from analysis.documents.curves import CacheCurves
from analysis.documents.evaluation import Evaluation
from analysis.documents.simulation import Simulation
from analysis.documents.statistics import STATISTICS_FILE, ComparisonDocument
from analysis.report import write_comparison, write_report
from analysis.report.comparison import comparison_sections, comparison_table
from analysis.report.labels import sequence_texts, token_labels
from analysis.report.sections import all_sections
from analysis.report.sections.answers import ShownAnswer, wanted_problems, window_for
from analysis.report.tables import write_tables
from analysis.statistics.agreement import agreement_of, read_prompts, same_problems
from analysis.statistics.compute import Statistics, compute_statistics, plain
from analysis.statistics.differences import load_difference
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.writer import write_text

Findings = list[tuple[str, str]]
"""Title and headline of each section of a report."""
Compute = Callable[..., Statistics]
"""`compute_statistics`, or a function with the same arguments that also shows progress."""


def analyze_trace(
    trace: Trace,
    out: Path,
    *,
    hops: int | None = None,
    choice: Choice = EVERYTHING,
    seed: int = 0,
    evaluations: Sequence[Evaluation] = (),
    simulations: Sequence[Simulation] = (),
    curves: Sequence[CacheCurves] = (),
    tokenizer: str | None = None,
    figures: Path | None = None,
    compute: Compute = compute_statistics,
) -> tuple[Statistics, Findings]:
    """Compute the statistics of `trace` and write the files of `write_analysis` to `out`.

    Raises `TraceError` as `compute_statistics` does, and if `curves` are of a model of another shape.
    """
    model = trace.metadata.model
    for each in curves:
        if (len(each.moe_layers), each.num_experts) != (len(model.moe_layers), model.num_experts):
            raise TraceError(
                f"curves of {each.trace}: {len(each.moe_layers)} layers of {each.num_experts} experts; {trace.path} has "
                f"{len(model.moe_layers)} of {model.num_experts}: run 'specmoe curve' on a trace of this model"
            )
    statistics = compute(trace, hops=hops, choice=choice, seed=seed)
    answers = read_shown_answers(trace, choice, evaluations, simulations, tokenizer)
    findings = write_analysis(
        statistics,
        out,
        evaluations=evaluations,
        simulations=simulations,
        curves=curves,
        tokenizer=tokenizer,
        answers=answers,
        figures=figures,
    )
    return statistics, findings


def read_shown_answers(
    trace: Trace,
    choice: Choice = EVERYTHING,
    evaluations: Sequence[Evaluation] = (),
    simulations: Sequence[Simulation] = (),
    tokenizer: str | None = None,
) -> list[ShownAnswer]:
    """Read the problems that the report of `trace` shows token by token, with their texts.

    Problems with results in `evaluations` and `simulations` come first. Raises `TraceError` as `read_answers` does, and
    `SpecmoeError` as `token_labels` does.
    """
    model = trace.metadata.model
    window = window_for(len(model.moe_layers), model.num_experts, model.top_k)
    found = read_answers(trace, choice, first=wanted_problems(evaluations, simulations), window=window)
    texts = sequence_texts([answer.keys for answer in found], model.id, tokenizer)
    return [ShownAnswer(answer, words) for answer, words in zip(found, texts, strict=True)]


def write_analysis(
    statistics: Statistics,
    out: Path,
    *,
    evaluations: Sequence[Evaluation] = (),
    simulations: Sequence[Simulation] = (),
    curves: Sequence[CacheCurves] = (),
    tokenizer: str | None = None,
    answers: Sequence[ShownAnswer] = (),
    figures: Path | None = None,
) -> Findings:
    """Write `statistics.json`, `transitions.npz`, `tables/*.csv` and `report.html` to `out`; return the report's findings.

    answers: problems to show token by token, from `read_shown_answers`; these are in no count. figures: folder for the report's
    figures as SVG, PNG and CSV (`report.paper_figures`), which needs matplotlib.
    """
    labels = token_labels(statistics.axes, statistics.source.metadata.model.id, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / STATISTICS_FILE, statistics.to_document().to_json())
    temporary = out / "transitions.tmp.npz"
    np.savez_compressed(temporary, probabilities=statistics.probabilities, moe_layers=np.array(statistics.axes.moe_layers))
    temporary.replace(out / "transitions.npz")
    write_tables(statistics, labels, out / "tables")
    if figures is not None:
        from analysis.report.paper_figures import write_figures

        write_figures(all_sections(statistics, labels, evaluations, simulations, curves=curves), figures)
    return write_report(statistics, out / "report.html", labels, evaluations, simulations, answers, curves)


def compare_traces(
    traces: list[Trace],
    out: Path,
    *,
    hops: int | None = None,
    choice: Choice = EVERYTHING,
    seed: int = 0,
    figures: Path | None = None,
    compute: Compute = compute_statistics,
) -> tuple[ComparisonDocument, Findings]:
    """Analyze each trace into its own folder in `out`, and write `report.html` and `statistics.json` of the comparison.

    figures: folder for the figures of the comparison, as for `write_analysis`.
    """
    names = _names(traces)
    compared, prompts = {}, {}
    for name, trace in zip(names, traces, strict=True):
        compared[name] = analyze_trace(trace, out / name, hops=hops, choice=choice, seed=seed, compute=compute)[0]
        prompts[name] = read_prompts(trace, choice)
    agreements, paired, differences = {}, set(), []
    for first, second in combinations(names, 2):
        if same_problems(prompts[first], prompts[second]):
            paired.add((first, second))
        agreement = agreement_of(prompts[first], prompts[second])
        if agreement is not None:
            agreements[f"{first} / {second}"] = agreement
        one, other = compared[first], compared[second]
        if one.load.share_LE.shape == other.load.share_LE.shape:
            is_paired = (first, second) in paired
            shape = one.load.share_LE.shape
            differences.append(load_difference(first, second, one.blocks_of, other.blocks_of, shape, seed, is_paired=is_paired))
    found = [each for each in differences if each is not None]
    document = ComparisonDocument.model_validate(
        {
            "traces": {name: str(trace.path) for name, trace in zip(names, traces, strict=True)},
            "figures": plain(comparison_table(compared)),
            "agreement": plain(agreements),
            "differences": plain(found),
        }
    )
    write_text(out / STATISTICS_FILE, document.to_json())
    if figures is not None:
        from analysis.report.paper_figures import write_figures

        write_figures(comparison_sections(compared, agreements, paired, found), figures)
    return document, write_comparison(compared, out / "report.html", agreements, paired, found)


def _names(traces: list[Trace]) -> list[str]:
    """The names of the traces' folders, numbered where a name is taken already."""
    names: list[str] = []
    for trace in traces:
        base = name = trace.path.resolve().name
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names
