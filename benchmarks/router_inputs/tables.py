"""The results of `benchmarks.router_inputs` as CSV, tables and a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.router_inputs.reduced_inputs import POINT, bytes_for, frontier, marginal_prices
from benchmarks.studies import markdown, write_rows
from profiler.trace.writer import write_text

Outcome = dict[str, Any]
"""What `benchmarks.router_inputs.run` returns for one run, or a row of the CSV file."""
Key = tuple[str, str, str, str]
"""Predictor, what it sees, the reduction, and what it was trained on: the runs of all seeds together."""

ALL = "all"
BOOTSTRAP_SAMPLES = 2000
FACTS = (
    "predictor",
    "sees",
    "reduction",
    "bytes",
    "trained_on",
    "seed",
    "train_problems",
    "train_tokens",
    "epochs",
    "train_seconds",
    "parameters",
)
# mlp from routes alone: what router inputs add something to.
REFERENCE: Key = ("mlp", "routes", "", ALL)
WHOLE: Key = ("mlp", "both", "", ALL)
COLORS = {"pca": "#0072B2", "random": "#E69F00", "gates": "#009E73", "learned": "#D55E00", "whole": "#CC79A7"}
KINDS = {
    "pca": "principal components",
    "random": "random directions",
    "gates": "logits of the next layers' routers",
    "learned": "logits of pre-attention",
    "whole": "all numbers, of every 1, 2 or 4 layers",
}


def write_results(outcomes: Sequence[Outcome], out: Path) -> None:
    """Write `router-inputs.csv`, `tables.md` and `router-inputs.html` into `out`."""
    write_rows(list(rows(outcomes)), out / "router-inputs.csv")
    groups = by_key(outcomes)
    tables = [_main_table(groups), _domain_table(groups), _transfer_table(groups), _curve_table(groups), _prices(groups)]
    write_text(out / "tables.md", "\n\n".join(filter(None, tables)) + "\n")
    if REFERENCE in groups and WHOLE in groups:
        write_text(out / "router-inputs.html", figure(groups).to_html(include_plotlyjs=True))


def rows(outcomes: Iterable[Outcome]) -> Iterable[Outcome]:
    """A row for each run, number of layers ahead, and domain of the test prompts, and for all domains together."""
    for outcome in outcomes:
        domain_P = np.array(outcome["domains"])
        for hop in range(1, len(outcome["examples"]) + 1):
            for domain in [ALL, *sorted(set(outcome["domains"]))]:
                is_chosen_P = (domain_P == domain) | (domain == ALL)
                sums = {name: np.array(outcome[name][hop - 1])[is_chosen_P].sum() for name in ("examples", "found", "exact")}
                control = np.array(outcome["control"][hop - 1])[is_chosen_P].sum()
                pairs, top_k = sums["examples"] * outcome["top_k"], outcome["top_k"]
                yield {name: outcome[name] for name in FACTS} | {
                    "layers_ahead": hop,
                    "evaluated_on": domain,
                    "problems": int(is_chosen_P.sum()),
                    "predictions": int(sums["examples"]),
                    f"recall@{top_k}": round(float(sums["found"] / pairs), 5),
                    "exact": round(float(sums["exact"] / sums["examples"]), 5),
                    "control": round(float(control / pairs), 5),
                    "chance": outcome["chance"],
                }


def by_key(outcomes: Iterable[Outcome]) -> dict[Key, list[Outcome]]:
    """The runs of all seeds of each experiment."""
    groups: dict[Key, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome["predictor"], outcome["sees"], outcome["reduction"], outcome["trained_on"]].append(outcome)
    return dict(groups)


def recall(runs: Sequence[Outcome], hop: int, domain: str = ALL, count: str = "found") -> float:
    """recall@K over all predictions `hop` layers ahead of all runs.

    count: "control" for the shuffled control, "exact" for the share of predictions whose top K are the true set.
    """
    found_P, possible_P = _sums(runs, hop, domain, count)
    return float(found_P.sum() / possible_P.sum())


def interval(runs: Sequence[Outcome], hop: int, reference: Sequence[Outcome] | None = None) -> tuple[float, float]:
    """The 95 % bootstrap interval of `recall` over the test prompts, or of its difference to that of `reference`.

    The difference is paired: both are computed on the same resampled prompts.
    """
    sums = [_sums(each, hop, ALL, "found") for each in (runs, reference) if each is not None]
    problems = len(sums[0][0])
    drawn_BP = np.random.default_rng(0).integers(problems, size=(BOOTSTRAP_SAMPLES, problems))
    values = [found_P[drawn_BP].sum(1) / possible_P[drawn_BP].sum(1) for found_P, possible_P in sums]
    low, high = np.quantile(values[0] - values[1] if reference is not None else values[0], [0.025, 0.975]).tolist()
    return low, high


def _sums(
    runs: Sequence[Outcome], hop: int, domain: str, count: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Numerators and denominators of each problem, summed over runs, `[P]`."""
    is_chosen_P = np.array([domain in {ALL, each} for each in runs[0]["domains"]])
    found_P, examples_P = (np.sum([run[name][hop - 1] for run in runs], axis=0)[is_chosen_P] for name in (count, "examples"))
    return found_P.astype(float), examples_P * (1.0 if count == "exact" else runs[0]["top_k"])


def _name(key: Key) -> str:
    predictor, sees, reduction, _ = key
    return f"`{predictor}`, {'routes and inputs' if sees == 'both' else sees}" + (f", {reduction}" if reduction else "")


def _mains(groups: dict[Key, list[Outcome]]) -> list[Key]:
    """The experiments with nothing reduced that were trained on all domains, the best first."""
    keys = [key for key in groups if key[2:] == ("", ALL)]
    return sorted(keys, key=lambda key: -recall(groups[key], 1))


def _hops(groups: dict[Key, list[Outcome]]) -> range:
    return range(1, len(next(iter(groups.values()))[0]["examples"]) + 1)


def _with_interval(runs: Sequence[Outcome], hop: int) -> str:
    low, high = interval(runs, hop)
    return f"{_short(recall(runs, hop))} ({_short(low)}-{_short(high)})"


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def _spread(runs: Sequence[Outcome]) -> str:
    values = [recall([run], 1) for run in runs]
    return f"{_short(min(values))}-{_short(max(values))}" if len(values) > 1 else "-"


def _main_table(groups: dict[Key, list[Outcome]]) -> str:
    hops = _hops(groups)
    header = ["predictor and what it sees", *(f"{hop} ahead" for hop in hops), "exact, 1 ahead", "control, 1 ahead"]
    header += ["seeds", "lowest-highest, 1 ahead", "parameters", "CPU s"]
    lines = []
    for key in _mains(groups):
        runs = groups[key]
        lines.append(
            [
                _name(key),
                *(_with_interval(runs, hop) for hop in hops),
                _short(recall(runs, 1, count="exact")),
                _short(recall(runs, 1, count="control")),
                str(len(runs)),
                _spread(runs),
                f"{runs[0]['parameters']:,}",
                f"{np.mean([run['train_seconds'] for run in runs]):.0f}",
            ]
        )
    return markdown(header, lines)


def _domain_table(groups: dict[Key, list[Outcome]]) -> str:
    domains = sorted(set(next(iter(groups.values()))[0]["domains"]))
    header = ["1 ahead", *domains]
    return markdown(
        header, ([_name(key), *(_short(recall(groups[key], 1, domain)) for domain in domains)] for key in _mains(groups))
    )


def _transfer_table(groups: dict[Key, list[Outcome]]) -> str:
    domains = sorted(set(next(iter(groups.values()))[0]["domains"]))
    keys = sorted(key for key in groups if key[3] != ALL)
    header = ["1 ahead", "trained on", *(f"on {domain}" for domain in domains), "control on all"]
    lines = (
        [
            _name(key),
            key[3],
            *(_short(recall(groups[key], 1, domain)) for domain in domains),
            _short(recall(groups[key], 1, count="control")),
        ]
        for key in keys
    )
    return markdown(header, lines) if keys else ""


def _points(groups: dict[Key, list[Outcome]], hop: int) -> dict[Key, tuple[float, float]]:
    """(bytes per token and layer, recall) of `mlp` with routes and inputs, whole and reduced, and without inputs."""
    keys = [key for key in groups if key[0] == "mlp" and key[1] == "both" and key[3] == ALL]
    return {key: (groups[key][0]["bytes"], recall(groups[key], hop)) for key in [REFERENCE, *keys] if key in groups}


def _curve_table(groups: dict[Key, list[Outcome]]) -> str:
    if REFERENCE not in groups:
        return ""
    reference, last = groups[REFERENCE], _hops(groups)[-1]
    header = ["router inputs", "bytes per token and layer", "recall, 1 ahead", "gain", "95 % interval of the gain"]
    header += ["bytes per .01", f"recall, {last} ahead", "gain", "seeds"]
    points = _points(groups, 1)
    lines = []
    for key in sorted(points, key=lambda key: (points[key][0], key[2])):
        runs = groups[key]
        gains = [recall(runs, hop) - recall(reference, hop) for hop in (1, last)]
        low, high = interval(runs, 1, reference)
        lines.append(
            [
                "none" if key == REFERENCE else key[2] or "all",
                f"{points[key][0]:g}",
                _short(points[key][1]),
                f"{gains[0]:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                f"{points[key][0] / gains[0] * POINT:.1f}" if gains[0] > 0 else "-",
                _short(recall(runs, last)),
                f"{gains[1]:+.3f}",
                str(len(runs)),
            ]
        )
    return markdown(header, lines)


def _prices(groups: dict[Key, list[Outcome]]) -> str:
    if REFERENCE not in groups:
        return ""
    lines = []
    for hop in _hops(groups):
        points = list(_points(groups, hop).values())
        best = frontier(points)
        lines.append(
            [
                str(hop),
                "-" if (needed := bytes_for(POINT, points)) is None else f"{needed:.1f}",
                ", ".join(f"{size:g}: {_short(value)}" for size, value in best),
                ", ".join(f"{size:g} to {following:g}: {price:g}" for size, following, price in marginal_prices(points)),
            ]
        )
    header = ["layers ahead", "bytes for the first .01", "frontier, bytes: recall", "bytes for each further .01"]
    return markdown(header, lines)


def figure(groups: dict[Key, list[Outcome]]) -> Any:
    """Recall against bytes per token and layer, one layer ahead and as far ahead as was predicted."""
    from plotly.subplots import make_subplots

    hops = (1, _hops(groups)[-1])
    titles = [f"{hop} layer{'s' * (hop > 1)} ahead" for hop in hops]
    plot = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    for column, hop in enumerate(hops, start=1):
        points = _points(groups, hop)
        for kind, color in COLORS.items():
            for bits, dash in ((16, "solid"), (8, "dot")):
                keys = [key for key in points if key != REFERENCE and _style(groups[key][0]) == (kind, bits)]
                line = sorted(points[key] for key in keys)
                if line:
                    plot.add_scatter(
                        x=[size for size, _ in line],
                        y=[value for _, value in line],
                        mode="lines+markers",
                        name=KINDS[kind] + (", 8 bits" if bits == 8 else ""),
                        legendgroup=f"{kind}{bits}",
                        showlegend=column == 1,
                        line={"color": color, "dash": dash},
                        row=1,
                        col=column,
                    )
        for key, name in {
            REFERENCE: "mlp, routes alone",
            ("recommended", "routes", "", ALL): "recommended",
            ("pre-attention", "inputs", "", ALL): "pre-attention",
        }.items():
            if key in groups:
                plot.add_hline(
                    y=recall(groups[key], hop),
                    line={"color": "#777777", "dash": "dash", "width": 1},
                    annotation={"text": name, "font": {"size": 11}, "xanchor": "left"},
                    annotation_position="top left",
                    row=1,
                    col=column,
                )
    plot.update_xaxes(type="log", title="bytes per token and layer", tickvals=[4, 8, 16, 32, 64, 128, 256])
    plot.update_yaxes(title="recall@2", col=1)
    plot.update_layout(
        template="plotly_white",
        title="Demo model: mlp from routes and reduced router inputs",
        font={"size": 13},
        width=980,
        height=520,
        legend={"orientation": "h", "y": -0.18},
    )
    return plot


def _style(outcome: Outcome) -> tuple[str, int]:
    label = outcome["reduction"]
    return outcome["kind"], 16 if "bit" not in label else 8 if "8bit" in label else 4
