"""The sections of one trace's page: each states its finding in one sentence with the numbers, then shows the data."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.documents.curves import CacheCurves
from analysis.documents.evaluation import Evaluation
from analysis.documents.simulation import Simulation
from analysis.report.figures import Section
from analysis.report.sections.answers import ShownAnswer, answers_section
from analysis.report.sections.cache_sizes import cache_sizes_section
from analysis.report.sections.flow import flow_section
from analysis.report.sections.groups import clusters_section, domains_section, pairs_section
from analysis.report.sections.load import load_section
from analysis.report.sections.locality import repetition_section, reuse_section
from analysis.report.sections.offload import offload_section
from analysis.report.sections.predictability import predictability_section, predictions_section, weights_section
from analysis.report.sections.transitions import hops_section, transitions_section
from analysis.report.sections.working_set import working_set_section
from analysis.statistics.compute import Statistics


def all_sections(
    statistics: Statistics,
    labels: Sequence[str],
    evaluations: Sequence[Evaluation],
    simulations: Sequence[Simulation],
    answers: Sequence[ShownAnswer] = (),
    curves: Sequence[CacheCurves] = (),
) -> list[Section]:
    """The sections that the trace has data for."""
    sections = [answers_section(statistics, answers, evaluations, simulations)] if answers else []
    sections.append(load_section(statistics, labels))
    if statistics.hops:
        sections += [transitions_section(statistics), flow_section(statistics), hops_section(statistics)]
    sections += [repetition_section(statistics), reuse_section(statistics), cache_sizes_section(statistics, curves)]
    if statistics.working_set is not None:
        sections.append(working_set_section(statistics.working_set, statistics.axes.num_experts))
    if statistics.pairs is not None:
        sections.append(pairs_section(statistics))
    if statistics.domains:
        sections.append(domains_section(statistics))
    if statistics.clusters:
        sections.append(clusters_section(statistics))
    if statistics.weights is not None:
        sections.append(weights_section(statistics))
    if statistics.contexts:
        sections.append(predictability_section(statistics))
    sections += [predictions_section(evaluation, number) for number, evaluation in enumerate(evaluations, start=1)]
    return sections + [
        offload_section(simulation, device.name, f"{number}-{place}")
        for number, simulation in enumerate(simulations, start=1)
        for place, device in enumerate(simulation.devices, start=1)
    ]
