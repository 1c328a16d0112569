"""Write a simulation as JSON, CSV and a page with plots."""

from __future__ import annotations

import csv
import io
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from analysis.documents.evaluation import CONTROL
from analysis.documents.simulation import BOUNDS, SIMULATION_FILE, SimulatedRow, Simulation
from profiler.trace.writer import write_text

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#777777")
# Lists, and what only the best rows have, are left to the JSON file.
_NOT_IN_CSV = {"counts_by_layer", "slots_by_layer", "gain"}


def write_simulation(simulation: Simulation, out: Path) -> None:
    """Write `simulation.json`, `simulation.csv` and `simulation.html`, which opens offline, to the folder `out`."""
    drawn = simulation_page(simulation)
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in SimulatedRow.model_fields if name not in _NOT_IN_CSV], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump(exclude=_NOT_IN_CSV) for row in simulation.rows)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "simulation.csv", text.getvalue())
    write_text(out / SIMULATION_FILE, simulation.to_json())
    write_text(out / "simulation.html", drawn)


def simulation_page(simulation: Simulation) -> str:
    """Draw hit rate and tokens per second by cache size, for each device; a menu chooses the policy."""
    figures = [_figure(simulation, device.name) for device in simulation.devices]
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.PackageLoader("speculation.offload", ""), trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("simulation.html.j2").render(
        simulation=simulation,
        figures=[
            figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"responsive": True, "displayModeBar": False})
            for number, figure in enumerate(figures)
        ],
    )


def _figure(simulation: Simulation, device: str | None) -> Any:
    from plotly.subplots import make_subplots

    rows = [row for row in simulation.rows if row.device == device]
    bounds = {row.policy: row for row in rows if row.policy in BOUNDS}
    inner = [row for row in rows if row.policy not in bounds]
    policies = list(dict.fromkeys(row.label for row in inner))
    prefetchers = list(dict.fromkeys(row.prefetch for row in inner))
    is_timed = device is not None
    # One above the other, because the page may be as narrow as a phone.
    titles = ["hit rate", "tokens per second"][: 1 + is_timed]
    figure = make_subplots(len(titles), 1, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.1)
    shown: list[str] = []
    names = [name.removesuffix(f", {CONTROL}") for name in prefetchers]
    colors = dict(zip(dict.fromkeys(names), COLORS * len(names), strict=False))
    for policy in policies:
        for name, prefetch in zip(names, prefetchers, strict=True):
            line = sorted((row for row in inner if (row.label, row.prefetch) == (policy, prefetch)), key=lambda row: row.share)
            for place, value in enumerate(["hit_rate", "tokens_per_second"][: 1 + is_timed]):
                figure.add_scatter(
                    x=[row.share for row in line],
                    y=[getattr(row, value) for row in line],
                    mode="lines+markers",
                    name=escape(prefetch),
                    legendgroup=prefetch,
                    showlegend=place == 0,
                    visible=policy == policies[0],
                    line={"color": colors[name], "dash": "solid" if name == prefetch else "dot"},
                    hovertemplate=f"{escape(prefetch)}, {policy}, %{{x:.0%}}: %{{y:.3f}}<extra></extra>",
                    row=1 + place,
                    col=1,
                )
                shown.append(policy)
    if is_timed:
        for name, row in bounds.items():
            figure.add_hline(y=row.tokens_per_second, line_dash="dash", annotation_text=name, row=2, col=1)
    buttons = [
        {"label": policy, "method": "update", "args": [{"visible": [each == policy for each in shown]}]} for policy in policies
    ]
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_xaxes(title="share of all experts in the cache", row=len(titles), col=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(
        template="plotly_white",
        title=escape(device or "transfers that take no time"),
        font={"size": 14},
        height=240 + 300 * len(titles),
        margin={"l": 50, "r": 20},
        legend={"orientation": "h", "y": -0.12},
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.12, "yanchor": "top"}],
    )
    return figure
