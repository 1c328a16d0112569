"""One self-contained HTML page from statistics: figures by Plotly, whose JavaScript is in the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from analysis.documents.evaluation import Evaluation
from analysis.documents.simulation import Simulation
from analysis.report.comparison import compared_facts, comparison_sections
from analysis.report.figures import Section
from analysis.report.sections import all_sections
from analysis.statistics.agreement import Agreement
from analysis.statistics.compute import Statistics
from profiler.trace.writer import write_text

MADE_WITH = "Made by specmoe analyze. Everything is in this file: no network is needed."


def write_report(
    statistics: Statistics,
    path: Path,
    labels: Sequence[str] = (),
    evaluations: Sequence[Evaluation] = (),
    simulations: Sequence[Simulation] = (),
) -> list[tuple[str, str]]:
    """Write the page of one trace; returns title and headline of its sections.

    labels: of the tokens, see `labels.token_labels`; evaluations: of predictors; simulations: of caches.
    """
    sections = all_sections(statistics, labels, evaluations, simulations)
    _write(path, f"Expert routing of {statistics.source.metadata.model.id}", _facts(statistics), sections)
    return [(section.title, section.headline) for section in sections]


def write_comparison(
    compared: dict[str, Statistics], path: Path, agreements: dict[str, Agreement], paired: set[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Write the page of several traces, by the names that they are shown under; returns as `write_report`.

    agreements: of pairs of them that have prompts in common; paired: those that have the same problems.
    """
    sections = comparison_sections(compared, agreements, paired)
    _write(path, "Expert routing compared", compared_facts(compared), sections)
    return [(section.title, section.headline) for section in sections]


def _write(path: Path, title: str, facts: list[tuple[str, str]], sections: list[Section]) -> None:
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.PackageLoader("analysis.report", ""), trim_blocks=True, lstrip_blocks=True
    )
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    template = environment.get_template("page.html.j2")
    page = template.render(title=title, facts=facts, sections=sections, plotly=get_plotlyjs(), script=script, footer=MADE_WITH)
    write_text(path, page)


def _facts(statistics: Statistics) -> list[tuple[str, str]]:
    metadata, model = statistics.source.metadata, statistics.source.metadata.model
    phases = {phase: load.tokens for (dataset, phase), load in statistics.loads.items() if dataset == "all" and phase != "all"}
    facts: list[tuple[str, Any]] = [
        ("Model", " ".join(filter(None, [model.id, model.quantization]))),
        ("Routing", f"{len(model.moe_layers)} MoE layers, {model.num_experts} experts, top-{model.top_k}"),
        ("Data", ", ".join(statistics.datasets)),
        ("Problems", f"{statistics.problems:,}"),
        ("Tokens", f"{statistics.tokens:,} (" + ", ".join(f"{n:,} {phase}" for phase, n in phases.items()) + ")"),
        ("Recorded with", _origin(statistics)),
        ("Chance", f"a given expert is selected with probability {model.top_k / model.num_experts:.3f}"),
    ]
    facts += [("Gap", gap) for gap in metadata.gaps]
    facts += [("Note", caveat) for caveat in statistics.source.caveats]
    return facts


def _origin(statistics: Statistics) -> str:
    """Engine, version and precision; for a converted trace, the format that it came in."""
    metadata = statistics.source.metadata
    if metadata.engine == "unknown":
        return ", ".join(filter(None, [metadata.hook, metadata.model.dtype]))
    engine = " ".join(filter(None, [metadata.engine, metadata.versions.get(metadata.engine)]))
    return ", ".join(filter(None, [engine, metadata.model.dtype]))
