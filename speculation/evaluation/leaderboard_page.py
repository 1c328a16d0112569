"""The leaderboard to look at: Markdown tables, and a page of plots."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from analysis.documents.evaluation import CONTROL, Evaluation, Result
from profiler.errors import counted
from speculation.evaluation.leaderboard_rows import LeaderboardRow, SeedSummary, labeled_results

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's palette is distinguishable with every common type of color blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dashdot", "longdash")


def as_markdown(documents: list[Evaluation], rows: list[LeaderboardRow], summaries: list[SeedSummary]) -> str:
    """The tables in Markdown, below a line that says how the runs were evaluated."""
    first = documents[0]
    k_name = first.recall_at_k_name
    trained_on = max(document.trained_on for document in documents)
    held_out = "held out" if not trained_on else f"NOT held out: runs were trained on up to {trained_on} of these problems"
    if not trained_on and any(document.early_stopping for document in documents):
        held_out = "not trained on, but the last epoch of some runs was chosen by these problems"
    head = (
        f"{first.task}, {first.model}, {counted(first.problems, 'problem')}, {first.tokens:,} tokens of {first.trace}, "
        f"{held_out}. Chance: {k_name} {first.chance[k_name]:.3f}, exact {first.chance['exact']:.2g}. "
        "Calibration: expected calibration error. "
        "µs: time of one prediction (one token at one layer), batch size 1, one CPU thread.\n"
    )
    cells = [
        {
            "run": row.run,
            "h": str(row.horizon),
            k_name: f"{row.recall:.3f} ({row.low:.3f}-{row.high:.3f})",
            **({first.mass_at_k_name: _share(row.mass)} if first.has_weights else {}),
            **({"top-1": _share(row.top_1)} if first.knows_strongest else {}),
            "exact": f"{row.exact:.3f}",
            "calibration": _share(row.calibration_error),
            "without looping": _share(row.without_looping),
            "control": _share(row.control),
            "parameters": _number(row.parameters),
            "MB": "-" if row.bytes is None else f"{row.bytes / 1e6:.2f}",
            "µs": _number(row.microseconds_per_prediction),
            "training": "-" if row.train_seconds is None else f"{row.train_seconds:,.0f} s",
        }
        for row in rows
    ]
    text = head + "\n" + _markdown_table(cells)
    if summaries:
        of_seeds = [
            {"predictor": each.predictor, "seeds": ", ".join(map(str, each.seeds)), "h": str(each.horizon)}
            | {name: seed_range(*values) for name, values in each.metrics.items()}
            for each in summaries
        ]
        text += "\nRuns that differ in their seed only: mean over the seeds, with the lowest and the highest in brackets.\n\n"
        text += _markdown_table(of_seeds)
    return text


def _markdown_table(rows: list[dict[str, str]]) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row.get(name, "-").replace("|", "\\|") for name in header) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def seed_range(mean: float, low: float, high: float) -> str:
    """A mean over seeds with the lowest and highest value."""
    return f"{mean:.3f} ({low:.3f}-{high:.3f})"


def leaderboard_page(documents: list[Evaluation], rows: list[LeaderboardRow], summaries: list[SeedSummary]) -> str:
    """A page of plots, one step ahead: recall@K of every run, what m experts cover, and whether probabilities are right."""
    from plotly.offline import get_plotlyjs

    first = documents[0]
    figures = [_ranking(documents, rows, summaries)]
    if any(result.budget for document in documents for result in document.results.values()):
        what = {"recall": f"share of the {_top_k(first)} chosen experts among the m most likely ones"}
        if first.has_weights:
            what["mass"] = "share of the routing weight that the m most likely experts carry"
        figures += [_budget(documents, name, title) for name, title in what.items()]
    if any(each.bins for document in documents for result in document.results.values() for each in result.calibration.values()):
        figures.append(_reliability(documents))
    settings = {"responsive": True, "displayModeBar": False}
    divisions = [figure.to_html(full_html=False, include_plotlyjs=False, config=settings) for figure in figures]
    title = escape(f"{first.task}, {first.model}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<script>{get_plotlyjs()}</script></head>\n<body>\n" + "\n".join(divisions) + "\n</body></html>\n"
    )


def _top_k(document: Evaluation) -> str:
    return document.recall_at_k_name.removeprefix("recall@")


def _ranking(documents: list[Evaluation], rows: list[LeaderboardRow], summaries: list[SeedSummary]) -> go.Figure:
    """For every run recall@K with its interval, its shuffled control, and chance; means over seeds above them."""
    import plotly.graph_objects as go

    first = documents[0]
    k_name = first.recall_at_k_name
    shown = [row for row in reversed(rows) if row.horizon == 1]
    labels = [
        f"{escape(row.run, quote=False)}<br>{_size(row.bytes or 0)}, {_number(row.microseconds_per_prediction)} µs"
        for row in shown
    ]
    controls = [(row.control, label) for row, label in zip(shown, labels, strict=True) if row.control is not None]
    figure = go.Figure()
    figure.add_scatter(
        x=[value for value, _ in controls],
        y=[label for _, label in controls],
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 12, "color": "#777777"},
        name="shuffled control of the run",
        hovertemplate="%{y}, shuffled control: %{x:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=[row.recall for row in shown],
        y=labels,
        error_x=_error_bars([(row.recall, row.low, row.high) for row in shown]),
        text=[f"{row.recall:.3f}" for row in shown],
        mode="markers+text",
        textposition="top center",
        cliponaxis=False,
        marker={"size": 9, "color": COLORS[0]},
        name=f"{k_name}, 95 % interval over problems",
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    of_seeds = [each for each in reversed(summaries) if each.horizon == 1]
    seed_labels = [
        f"{escape(each.predictor)}<br>mean of {counted(len(each.seeds), 'seed')}: {', '.join(map(str, each.seeds))}"
        for each in of_seeds
    ]
    if of_seeds:
        values = [each.metrics[k_name] for each in of_seeds]
        figure.add_scatter(
            x=[mean for mean, _, _ in values],
            y=seed_labels,
            error_x=_error_bars(values),
            text=[f"{mean:.3f}" for mean, _, _ in values],
            mode="markers+text",
            textposition="top center",
            cliponaxis=False,
            marker={"size": 9, "color": COLORS[1], "symbol": "diamond"},
            name=f"{k_name}, mean over seeds, lowest to highest",
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    figure.add_vline(x=first.chance[k_name], line_dash="dot", annotation_text="chance")
    order = [*labels, *seed_labels]
    figure.update_xaxes(title=k_name, range=[0, 1])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=order, automargin=True, tickfont={"size": 12})
    above: dict[str, object] = {"orientation": "h", "yanchor": "bottom", "y": 1}
    _lay_out(figure, f"{first.task}, {first.model}: {counted(first.problems, 'problem')}", 160 + 44 * len(order), above)
    return figure


def _error_bars(values: list[tuple[float, float, float]]) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, _, high in values],
        "arrayminus": [value - low for value, low, _ in values],
    }


def _budget(documents: list[Evaluation], name: str, title: str) -> go.Figure:
    """`recall` or `mass` against m, for every predictor and control, and chance."""
    import plotly.graph_objects as go

    figure = go.Figure()
    experts = 1
    for line, label, result in _shown(documents):
        points = [(point.m, getattr(point, name)) for point in result.budget.get("h=1", [])]
        points = [(m, value) for m, value in points if value is not None]
        if points:
            experts = max(experts, points[-1][0])
            figure.add_scatter(
                x=[m for m, _ in points],
                y=[value for _, value in points],
                mode="lines+markers",
                name=escape(label),
                line=line,
                marker={"size": 5},
            )
    if experts > 1:
        gray = {"color": "#999999", "dash": "dot"}
        figure.add_scatter(x=[1, experts], y=[1 / experts, 1], mode="lines", name="chance", line=gray)
    figure.update_xaxes(title="m: experts fetched per token and layer")
    figure.update_yaxes(title=f"{name}@m", range=[0, 1])
    _lay_out(figure, f"{name}@m: {title}", 520)
    return figure


def _reliability(documents: list[Evaluation]) -> go.Figure:
    """Observed frequency against predicted probability, for every predictor and control; the diagonal is right."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for line, label, result in _shown(documents):
        calibration = result.calibration.get("h=1")
        if calibration is not None and calibration.bins:
            figure.add_scatter(
                x=[each.predicted for each in calibration.bins],
                y=[each.observed for each in calibration.bins],
                text=[f"{each.count:,}" for each in calibration.bins],
                mode="lines+markers",
                name=f"{escape(label)}, error {calibration.error:.3f}",
                line=line,
                marker={"size": 5},
                hovertemplate="predicted %{x:.3f}, observed %{y:.3f}, %{text} predictions<extra></extra>",
            )
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="calibrated", line={"color": "#999999", "dash": "dot"})
    figure.update_xaxes(title="predicted probability that an expert is chosen", range=[0, 1])
    figure.update_yaxes(title="frequency with which it was", range=[0, 1])
    _lay_out(figure, "Calibration: predicted probabilities and observed frequencies", 560)
    return figure


def _shown(documents: list[Evaluation]) -> Iterator[tuple[dict[str, str], str, Result]]:
    """Style of the line, label and result of every predictor; a control has the color of its run, dotted."""
    number = -1
    for _, name, label, result in labeled_results(documents):
        is_control = name.endswith(CONTROL)
        number += not is_control
        dash = "dot" if is_control else DASHES[number // len(COLORS) % len(DASHES)]
        yield {"color": COLORS[number % len(COLORS)], "dash": dash}, label, result


def _lay_out(figure: go.Figure, title: str, height: int, legend: dict[str, object] | None = None) -> None:
    """legend: its place; None for the right side, where many entries fit."""
    figure.update_layout(
        template="plotly_white",
        title=escape(title),
        font={"size": 14},
        height=height,
        legend=legend or {},
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
