"""From a trace, runs and devices to a table, its files and a plot: what `specmoe simulate` does."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from profiler.errors import SpecmoeError
from profiler.models.gpus import Gpu
from profiler.models.registry import USED_SHARE
from profiler.trace.reader import Trace
from profiler.trace.writer import write_text
from speculation.data.routes import Routes, load_routes, route_digests
from speculation.data.tasks import Shape, Task
from speculation.evaluation.evaluate import check_run
from speculation.offload.costs import Costs, costs_of, find_entry
from speculation.offload.kernel import Rule
from speculation.offload.replay import default_device, measure
from speculation.offload.replay_study import Replay, sizes_of
from speculation.offload.requests import requests_of
from speculation.offload.simulate import Workload, capacities
from speculation.offload.sweep import (
    CONTROL,
    NONE,
    ORACLE,
    POPULARITY,
    Prefetcher,
    PrefetchOptions,
    Row,
    popularity_of,
    prefetcher_of,
    simple_prefetcher,
    sweep,
)
from speculation.predictors.options import TrainingOptions
from speculation.predictors.registry import find_predictor, predictor_classes
from speculation.training.runs import CONFIG_FILE, Run, load_run

OnDone = Callable[[int, int], None]
DEFINITIONS = {
    "hit_rate": "experts in the cache when their layer's router chose them, over all that were chosen",
    "late": "chosen experts whose copy a prediction had asked for, but which was not over: their layer waits for it",
    "miss": "chosen experts that were neither; copied on demand",
    "loads_per_token": "copies of experts to the device, on demand and predicted, per token",
    "wasted": "predicted copies whose expert was given up before anything asked for it, or never used, over all predicted",
    "collisions_per_token": "misses of experts that had been given up earlier in the same step",
    "streamed_per_token": "experts copied for one request alone, as the cache had no room beside the request's others",
    "stalled": "share of the time in which products wait for copies",
    "times_on_demand": "tokens per second over those without any cache",
    "counts_by_layer": "of each MoE layer: experts requested, hit, late, missed; copies (loads), of these predicted, of "
    "these useful and wasted; collisions; experts streamed; predictions dropped (queue or cache full, or too late)",
}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#777777")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to simulate; fields as the options of `specmoe simulate`."""

    trace: Trace
    part: str
    predictors: tuple[str, ...]
    policies: tuple[Rule, ...]
    fractions: tuple[float, ...] = ()
    gigabytes: tuple[float, ...] = ()
    is_global: bool = False
    devices: tuple[Gpu, ...] = ()
    measure: bool = False
    model: str | None = None
    precision: str | None = None
    link: float | None = None
    horizon: int = 1
    experts: int | None = None
    threshold: float = 0.0
    queue: int = 64
    batch: int = 1


def run_study(study: Study, on_done: OnDone = lambda done, total: None) -> dict[str, Any]:
    """Simulate everything; the document has a row per simulation, what was assumed, and what each number means.

    Raises `SpecmoeError` for unknown names, runs that do not fit the trace, or a part without problems.
    """
    runs = {name: load_run(Path(name)) for name in study.predictors if (Path(name) / CONFIG_FILE).is_file()}
    facts = study.trace.metadata.model
    # Only its sizes are used: this task has them for a single layer too.
    shape = Shape.of(facts, 1, Task.NEXT_TOKEN)
    notes: list[str] = []
    for name, run in runs.items():
        check_run(run, study.trace)
        if run.predictor.takes_router_inputs:
            raise SpecmoeError(f"{name} takes router inputs, which a simulation does not have")
    costs = _costs(study, notes)
    routes = load_routes(study.trace, study.part)
    if not routes.is_decode_T.any():
        notes.append("No token is known to be generated: all are simulated as if they were.")
        routes = replace(routes, is_decode_T=np.ones(len(routes), dtype=np.bool_))
    requests = requests_of(routes, shape.experts, batch=study.batch)
    popularity_LE = popularity_of(study.trace, study.part, next(iter(runs.values()), None), shape, notes)
    workload = Workload(requests, popularity_LE)
    how = PrefetchOptions(experts=study.experts or shape.top_k, threshold=study.threshold, horizon=study.horizon)
    prefetchers = [
        each for name in dict.fromkeys(study.predictors) for each in _prefetchers(name, study, runs, workload, routes, how)
    ]
    sizes = [
        list(dict.fromkeys(capacities(workload, list(study.fractions), list(study.gigabytes), cost, study.is_global)))
        for cost in costs
    ]
    notes += _too_large(study, costs, sizes, shape)
    total = sum(2 + len(each) * len(study.policies) * len(prefetchers) for each in sizes)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_done(done, total)

    rows = sweep(
        workload,
        sizes,
        list(study.policies),
        prefetchers,
        costs,
        is_global=study.is_global,
        queue=study.queue,
        on_done=count,
    )
    trained_on = {name: int(np.isin(route_digests(study.trace, routes), run.trained_on).sum()) for name, run in runs.items()}
    notes += [
        f"NOT held out: {name} was trained on {number} of these problems" for name, number in trained_on.items() if number
    ]
    decode = int(requests.tokens_S[requests.is_decode_S].sum())
    if not runs and study.part in {"train", "all"}:
        notes.append("NOT held out: popularity and counted tables are of problems that are simulated.")
    kinds = "one cache for all layers" if study.is_global else "a cache for each layer"
    notes += [
        f"{len(routes.problem_ids)} problems, {decode:,} generated and {len(routes) - decode:,} prompt tokens "
        f"({study.part} part); {study.batch} at a time; {kinds}, which begins with the experts most popular in training.",
        f"Fetched ahead: {how.experts} experts of each prediction, popularity and oracle {how.horizon} layers ahead; "
        "predictors ask about generated tokens only. A predictor's own time is measured here, one prediction after the other. "
        "The shuffled control fetches what was predicted about other tokens.",
        *study.trace.caveats(),
    ]
    return {
        "trace": study.trace.path.name,
        "model": study.model or facts.id,
        "layers": shape.layers,
        "num_experts": shape.experts,
        "top_k": shape.top_k,
        "part": study.part,
        "problems": len(routes.problem_ids),
        "tokens": len(routes),
        "batch": study.batch,
        "is_global": study.is_global,
        "definitions": DEFINITIONS,
        "devices": [
            {
                "name": None if cost is None else cost.device,
                "costs": None if cost is None else cost.to_json(),
                "assumptions": [] if cost is None else cost.describe(),
            }
            for cost in costs
        ],
        "notes": notes,
        "best": best_of(rows),
        "rows": rows,
    }


def best_of(rows: list[Row]) -> list[Row]:
    """The fastest row of each device and size that needs to know nothing of what comes: neither Belady's rule nor the oracle.

    gain: over the fastest of these that fetches nothing ahead.
    """
    found = []
    possible = [
        row
        for row in rows
        if row["policy"] not in {"on demand", "all resident", Rule.BELADY.name.lower()}
        and row["prefetch"] != ORACLE
        and not row["prefetch"].endswith(CONTROL)
        and row["tokens_per_second"]
    ]
    for device, capacity in dict.fromkeys((row["device"], row["capacity"]) for row in possible):
        own = [row for row in possible if (row["device"], row["capacity"]) == (device, capacity)]
        best = max(own, key=lambda row: row["tokens_per_second"])
        plain = max((row["tokens_per_second"] for row in own if row["prefetch"] == NONE), default=None)
        found.append(best | {"gain": best["tokens_per_second"] / plain if plain else None})
    return found


def _too_large(study: Study, costs: list[Costs | None], sizes: list[list[int]], shape: Shape) -> list[str]:
    """Caches that no such device has room for, beside the model's other weights."""
    entry = find_entry(study.model or study.trace.metadata.model.id)
    found = []
    for gpu, cost, each in zip(study.devices, costs, sizes, strict=False):
        if entry is None or cost is None:
            continue
        experts = shape.layers * shape.experts * cost.expert_bytes / 1e9
        rest = max(0.0, entry.weights_gb(cost.precision) - experts)
        largest = max(each, default=0) * (1 if study.is_global else shape.layers) * cost.expert_bytes / 1e9
        if largest + rest > gpu.memory * USED_SHARE:
            found.append(f"{largest:.0f} GB of experts and {rest:.0f} GB of other weights do not fit on an {gpu.name}.")
    return found


def _costs(study: Study, notes: list[str]) -> list[Costs | None]:
    """Of each device; one None where nothing is known of the model."""
    name = study.model or study.trace.metadata.model.id
    entry = find_entry(name)
    if entry is None:
        if study.model is not None:
            raise SpecmoeError(f"unknown model {study.model!r}: see 'specmoe models'")
        notes.append(
            f"The sizes of {name} are not known: no device was simulated, copies take no time. Name a --model that has them."
        )
        return [None]
    facts = study.trace.metadata.model
    if (len(entry.moe_layers), entry.experts, entry.top_k) != (len(facts.moe_layers), facts.num_experts, facts.top_k):
        raise SpecmoeError(
            f"{entry.name} has {len(entry.moe_layers)} MoE layers of {entry.experts} experts, top-{entry.top_k}; the trace "
            f"{len(facts.moe_layers)} of {facts.num_experts}, top-{facts.top_k}: choose another --model"
        )
    found: list[Costs | None] = [costs_of(entry, gpu, study.precision, link=study.link) for gpu in study.devices]
    for gpu in study.devices:
        weights = entry.weights_gb(study.precision or entry.precisions[0])
        if weights <= gpu.memory * USED_SHARE:
            notes.append(f"All of {entry.name}, {weights:.0f} GB, would fit on an {gpu.name} of {gpu.memory} GB.")
    if study.measure:
        wanted = Replay(
            trace=study.trace,
            part=study.part,
            run=None,
            policy=Rule.LRU,
            fraction=0.0,
            kind=default_device(),
            model=study.model,
            precision=study.precision,
        )
        costs, sizes = sizes_of(wanted, Shape.of(facts, 1, Task.NEXT_TOKEN))
        found.append(measure(wanted.kind, sizes, costs))
    return found


def _prefetchers(
    name: str, study: Study, runs: dict[str, Run], workload: Workload, routes: Routes, how: PrefetchOptions
) -> Iterator[Prefetcher]:
    if name in runs:
        folder = Path(name).name
        others = {each for each in study.predictors if each not in runs} | {NONE, ORACLE, POPULARITY}
        is_taken = folder in others or sum(Path(each).name == folder for each in runs) > 1
        yield from prefetcher_of(runs[name].predictor, name if is_taken else folder, routes, workload.requests, how)
    elif name in {NONE, POPULARITY, ORACLE}:
        yield simple_prefetcher(name, workload, how)
    elif name in predictor_classes():
        for run in runs.values():
            if name in run.baselines:
                yield from prefetcher_of(run.baselines[name], name, routes, workload.requests, how)
                return
        layers = len(study.trace.metadata.model.moe_layers)
        predictor = find_predictor(name)(Shape.of(study.trace.metadata.model, min(study.horizon, max(1, layers - 1))))
        predictor.fit(load_routes(study.trace, "train"), None, TrainingOptions(), lambda *_: None)
        yield from prefetcher_of(predictor, name, routes, workload.requests, how)
    else:
        raise SpecmoeError(f"--predictor {name}: neither a run, nor {NONE}, {POPULARITY}, {ORACLE} or a predictor's name")


def write_study(document: dict[str, Any], out: Path) -> None:
    """Write `simulation.json`, `.csv` and `.html`, a plot that opens offline."""
    whole, drawn = json.dumps(document, indent=1, allow_nan=False) + "\n", page(document)
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    columns = [name for name in document["rows"][0] if name != "counts_by_layer"]
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(document["rows"])
    write_text(out / "simulation.csv", text.getvalue())
    write_text(out / "simulation.json", whole)
    write_text(out / "simulation.html", drawn)


def page(document: dict[str, Any]) -> str:
    """A page: hit rate and tokens per second against the cache, for each device; a menu chooses the policy."""
    figures = [_figure(document, device["name"]) for device in document["devices"]]
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"responsive": True, "displayModeBar": False})
        for number, figure in enumerate(figures)
    ]
    lines = [line for device in document["devices"] for line in device["assumptions"]]
    told = "".join(f"<li>{escape(line)}</li>" for line in [*document["notes"], *(f"Assumed: {line}" for line in lines)])
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{escape(document['model'])}: caches of experts</title>"
        "<style>body{font:16px sans-serif;margin:1rem auto;max-width:70rem;padding:0 .5rem}li{margin:.2rem 0}</style></head>"
        f"<body><h1>{escape(document['model'])}: caches of experts</h1>{''.join(parts)}<ul>{told}</ul></body></html>\n"
    )


def _figure(document: dict[str, Any], device: str | None) -> Any:
    from plotly.subplots import make_subplots

    rows: list[Row] = [row for row in document["rows"] if row["device"] == device]
    bounds = {row["policy"]: row for row in rows if row["policy"] in {"on demand", "all resident"}}
    inner = [row for row in rows if row["policy"] not in bounds]
    policies = list(dict.fromkeys(row["policy"] for row in inner))
    prefetchers = list(dict.fromkeys(row["prefetch"] for row in inner))
    is_timed = device is not None
    # One above the other: a page may be as narrow as a phone.
    titles = ["hit rate", "tokens per second"][: 1 + is_timed]
    figure = make_subplots(len(titles), 1, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.1)
    shown: list[str] = []
    names = [name.removesuffix(f", {CONTROL}") for name in prefetchers]
    colors = dict(zip(dict.fromkeys(names), COLORS * len(names), strict=False))
    for policy in policies:
        for name, prefetch in zip(names, prefetchers, strict=True):
            line = sorted(
                (row for row in inner if (row["policy"], row["prefetch"]) == (policy, prefetch)), key=lambda r: r["share"]
            )
            for place, value in enumerate(["hit_rate", "tokens_per_second"][: 1 + is_timed]):
                figure.add_scatter(
                    x=[row["share"] for row in line],
                    y=[row[value] for row in line],
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
            figure.add_hline(y=row["tokens_per_second"], line_dash="dash", annotation_text=name, row=2, col=1)
    buttons = [
        {"label": policy, "method": "update", "args": [{"visible": [each == policy for each in shown]}]} for policy in policies
    ]
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_xaxes(title="share of all experts in the cache", row=len(titles), col=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(
        template="plotly_white",
        title=escape(device or "copies that take no time"),
        font={"size": 14},
        height=240 + 300 * len(titles),
        margin={"l": 50, "r": 20},
        legend={"orientation": "h", "y": -0.12},
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.12, "yanchor": "top"}],
    )
    return figure
