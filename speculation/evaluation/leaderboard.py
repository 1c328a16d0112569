"""Leaderboards: the evaluations of several runs in one table and one plot."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from analysis.documents.evaluation import CONTROL, Evaluation, Result
from profiler.errors import SpecmoeError
from profiler.trace.writer import write_text


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
    """A predictor at a horizon.

    Attributes:
        run: Name of the run, or of the baseline.
        predictor: Name of the predictor.
        horizon: h, how far ahead it predicts.
        recall: recall@K.
        low, high: The 95 % interval of `recall`.
        top_1: Share of predictions whose first expert is the strongest true one.
        exact: Share of predictions whose top K are the true set.
        without_looping: recall@K on problems whose output does not loop, if the trace has that column; for h = 1 only.
        control: recall@K of the predictor's shuffled control; None for baselines.
        parameters: Learned numbers.
        bytes: Size of the stored arrays.
        microseconds_per_prediction: Time of one prediction for one token at one layer.
        train_seconds: Training time; None for baselines, or if unknown.
    """

    run: str
    predictor: str
    horizon: int
    recall: float
    low: float
    high: float
    top_1: float
    exact: float
    without_looping: float | None
    control: float | None
    parameters: int | None
    bytes: int | None
    microseconds_per_prediction: float | None
    train_seconds: float | None


# Fields that must be equal for two evaluations to be comparable.
COMPARED = ("task", "trace", "model", "split", "part", "problems", "tokens", "chance")
LOOPING = "looping"
# Columns of the CSV file whose names are not valid Python names.
COLUMNS = {"top_1": "top-1"}


def leaderboard_rows(documents: list[Evaluation]) -> list[LeaderboardRow]:
    """List a row per predictor and horizon, by horizon, best recall first. A baseline of several evaluations is listed once.

    Raises:
        SpecmoeError: There are no evaluations, they differ in task or data, or two rows would have the same name.
    """
    if not documents:
        raise SpecmoeError("a leaderboard needs at least one run")
    for document in documents:
        for name in COMPARED:
            own, first = getattr(document, name), getattr(documents[0], name)
            if own != first:
                raise SpecmoeError(
                    f"{document.run} was evaluated with {name} {own!r}, {documents[0].run} with {first!r}: expected the same"
                )
    runs = [document.run for document in documents]
    taken = {name for document in documents for name in document.results if name != document.predictor}
    for name in runs:
        if runs.count(name) > 1 or (name in taken and documents[runs.index(name)].predictor != name):
            raise SpecmoeError(f"two rows of the leaderboard would be called {name!r}: rename a run's folder")
    rows: dict[tuple[str, int], LeaderboardRow] = {}
    for document in documents:
        for name, result in document.results.items():
            if name.endswith(CONTROL):
                continue
            own = name == document.predictor
            label = document.run if own else name
            control = document.results.get(f"{name}, {CONTROL}")
            for horizon, metrics in result.metrics.items():
                number = int(horizon.removeprefix("h="))
                # A horizon has no metrics if no token has another one that far ahead.
                if metrics and (own or (label, number) not in rows):
                    rows[label, number] = _row(document, result, label, number, control if own else None, own)
    return sorted(rows.values(), key=lambda row: (row.horizon, -row.recall))


def _row(document: Evaluation, result: Result, label: str, horizon: int, control: Result | None, own: bool) -> LeaderboardRow:
    k_name = result.recall_at_k_name
    metrics = result.metrics[f"h={horizon}"]
    low, high = result.intervals[f"h={horizon}"][k_name]
    without_looping = result.groupings.get(LOOPING, {}).get("false", {}) if horizon == 1 else {}
    control_metrics = control.metrics.get(f"h={horizon}") if control is not None else None
    return LeaderboardRow(
        run=label,
        predictor=document.predictor if own else label,
        horizon=horizon,
        recall=metrics[k_name],
        low=low,
        high=high,
        top_1=metrics["top-1"],
        exact=metrics["exact"],
        without_looping=without_looping.get(k_name),
        control=control_metrics[k_name] if control_metrics else None,
        parameters=result.parameters,
        bytes=result.bytes,
        microseconds_per_prediction=result.microseconds_per_prediction,
        train_seconds=document.train_seconds if own else None,
    )


def write_leaderboard(documents: list[Evaluation], out: Path) -> list[LeaderboardRow]:
    """Write `leaderboard.md`, `.csv`, `.json` (the evaluations) and `.html` (a plot that opens offline) to a folder."""
    rows = leaderboard_rows(documents)
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    cells = [{COLUMNS.get(name, name): value for name, value in asdict(row).items()} for row in rows]
    writer = csv.DictWriter(text, fieldnames=list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(each | {"horizon": f"h={each['horizon']}"} for each in cells)
    write_text(out / "leaderboard.csv", text.getvalue())
    write_text(
        out / "leaderboard.json",
        json.dumps([each.model_dump(mode="json", by_alias=True) for each in documents], indent=1) + "\n",
    )
    write_text(out / "leaderboard.md", as_markdown(documents, rows))
    write_text(out / "leaderboard.html", plot(documents, rows))
    return rows


def as_markdown(documents: list[Evaluation], rows: list[LeaderboardRow]) -> str:
    """The table in Markdown, below a line that says how the runs were evaluated."""
    first = documents[0]
    k_name = first.recall_at_k_name
    trained_on = max(document.trained_on for document in documents)
    held_out = "held out" if not trained_on else f"NOT held out: runs were trained on up to {trained_on} of these problems"
    head = (
        f"{first.task}, {first.model}, {first.problems} problems, {first.tokens:,} tokens of {first.trace}, "
        f"{held_out}. Chance: {k_name} {first.chance[k_name]:.3f}, exact {first.chance['exact']:.2g}. "
        "µs: time of one prediction (one token at one layer), batch size 1, one CPU thread.\n"
    )
    columns = ["run", "h", k_name, "top-1", "exact", "without looping", "control", "parameters", "MB", "µs", "training"]
    lines = [head, "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [
            row.run,
            str(row.horizon),
            f"{row.recall:.3f} ({row.low:.3f}-{row.high:.3f})",
            f"{row.top_1:.3f}",
            f"{row.exact:.3f}",
            "-" if row.without_looping is None else f"{row.without_looping:.3f}",
            "-" if row.control is None else f"{row.control:.3f}",
            _number(row.parameters),
            "-" if row.bytes is None else f"{row.bytes / 1e6:.2f}",
            _number(row.microseconds_per_prediction),
            "-" if row.train_seconds is None else f"{row.train_seconds:,.0f} s",
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def plot(documents: list[Evaluation], rows: list[LeaderboardRow]) -> str:
    """An HTML page with a plot: for every run recall@K one step ahead with its interval, its shuffled control, and chance."""
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
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row.high - row.recall for row in shown],
            "arrayminus": [row.recall - row.low for row in shown],
        },
        text=[f"{row.recall:.3f}" for row in shown],
        mode="markers+text",
        textposition="top center",
        marker={"size": 9, "color": "#0072b2"},
        name=f"{k_name}, 95 % interval over problems",
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    figure.add_vline(x=first.chance[k_name], line_dash="dot", annotation_text="chance")
    figure.update_xaxes(title=k_name, range=[0, 1])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=labels, automargin=True, tickfont={"size": 12})
    figure.update_layout(
        template="plotly_white",
        title=f"{first.task}, {first.model}: {first.problems} problems",
        font={"size": 14},
        height=160 + 44 * len(shown),
        legend={"orientation": "h", "yanchor": "bottom", "y": 1},
    )
    return str(figure.to_html(full_html=True, include_plotlyjs=True, config={"responsive": True, "displayModeBar": False}))


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
