"""The sections on routing weights, on predictability from simple contexts, and on trained predictors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go

from analysis.documents.evaluation import CONTROL as CONTROL_NAME
from analysis.documents.evaluation import Evaluation, budget_table, table
from analysis.report.figures import (
    CHANCE,
    COLORS,
    CONTROL,
    LABELS,
    TOP_LEGEND,
    Curve,
    Drawing,
    Section,
    drawing,
    lines,
    wrapped,
)
from analysis.statistics.compute import Statistics, mean, show
from analysis.statistics.contexts import TASKS, ContextStatistics
from analysis.statistics.weights import QUANTILES
from profiler.errors import counted


def weights_section(s: Statistics) -> Section:
    """Mean weights by rank, and margins where logits were recorded. Only for traces with weights."""
    assert s.weights is not None
    layers, weights = list(s.axes.moe_layers), s.weights
    chosen = [Curve(f"rank {rank + 1}", weights.mean[:, rank]) for rank in range(s.axes.top_k)]
    chosen.append(Curve("even: 1/K", [weights.even] * len(layers), CHANCE))
    figures = [
        drawing(
            lines(chosen, layers, "layer", "mean routing weight"),
            "weights",
            "Mean weight by rank and layer.",
            read="the farther the lines are apart, the more the strongest expert decides; equal weights would be at 1/K.",
        )
    ]
    headline = (
        f"On average the strongest expert has a weight of {weights.mean[:, 0].mean():.2f}, the last of {s.axes.top_k} has "
        f"{weights.mean[:, -1].mean():.2f}."
    )
    explanation = "Routing weights as the model applies them. "
    middle = len(layers) // 2
    rows = [(f"layer {layers[middle]}", "mean", *(f"{quantile:.0%}" for quantile in QUANTILES))]
    rows += [
        (
            f"rank {rank + 1}",
            show(float(weights.mean[middle, rank])),
            *(show(float(v)) for v in weights.quantiles[middle, rank]),
        )
        for rank in range(s.axes.top_k)
    ]
    if s.margins is not None:
        close = mean(s.margins.close)
        headline += f" For {close:.0%} of tokens the logit of the next expert is within 0.1 of that of the last selected one."
        median = QUANTILES.index(0.5)
        drawn = lines(
            [
                Curve(f"{QUANTILES[q]:.0%} of tokens are below", s.margins.quantiles[:, q])
                for q in (0, median, len(QUANTILES) - 1)
            ],
            layers,
            "layer",
            "margin (logits)",
        )
        figures.append(
            drawing(
                drawn,
                "margins",
                "Margin between rank K and K+1.",
                read="small margins are close decisions, which another precision may decide differently.",
            )
        )
        explanation += "Margin: the K-th largest router logit minus the next."
    else:
        explanation += (
            "The margin to the next expert is unknown, as router logits were not recorded (collect with --capture-logits)."
        )
    return Section("Routing weights", headline, explanation, tuple(figures), (tuple(rows),))


def predictability_section(s: Statistics) -> Section:
    """How well single contexts predict the experts: lower and upper bounds."""
    top_k = s.axes.top_k
    by_name = {each.context: each for each in s.contexts}
    names = list(by_name)
    low = [by_name[name].recall_held_out for name in names]
    high = [by_name[name].recall_plug_in for name in names]
    figure = go.Figure()
    for values, name, symbol, color in (
        (low, "held out (lower bound)", "circle", COLORS[0]),
        (high, "on the same tokens (upper bound)", "line-ns-open", COLORS[1]),
    ):
        figure.add_scatter(
            x=[round(value, 4) if np.isfinite(value) else None for value in values],
            y=[wrapped(by_name[name].shown) for name in names],
            name=name,
            mode="markers",
            marker={"symbol": symbol, "size": 13, "color": color, "line": {"width": 3, "color": color}},
        )
    figure.add_vline(x=top_k / s.axes.num_experts, line=CHANCE)
    figure.update_xaxes(title=f"recall@{top_k}", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(legend=TOP_LEGEND, height=220 + 44 * len(names))
    columns: dict[str, Callable[[ContextStatistics], str]] = {
        "context": lambda each: each.shown,
        f"recall@{top_k}": lambda each: _between(each.recall_held_out, each.recall_plug_in),
        "top-1": lambda each: _between(each.top1_held_out, each.top1_plug_in),
        "entropy of the strongest (bits)": lambda each: _between(each.first_bits_plug_in, each.first_bits_held_out, 2),
        "entropy of the set, at most (bits)": lambda each: _between(each.set_bits_plug_in, each.set_bits_held_out, 2),
        "tasks": lambda each: ", ".join(task for task, known in TASKS.items() if each.context in known),
    }
    if not s.axes.knows_strongest:
        columns = {name: cell for name, cell in columns.items() if name not in {"top-1", "entropy of the strongest (bits)"}}
    rows = [tuple(columns), *(tuple(cell(each) for cell in columns.values()) for each in s.contexts)]
    sentences = []
    for task, known in TASKS.items():
        usable = [by_name[name] for name in known if name in by_name and np.isfinite(by_name[name].recall_held_out)]
        if usable:
            best = max(usable, key=lambda each: each.recall_held_out)
            sentences.append(f"{task} {best.recall_held_out:.2f} ({best.shown})")
    headline = (
        f"Held-out recall@{top_k} from the best single context of each task: {'; '.join(sentences)}; chance is "
        f"{top_k / s.axes.num_experts:.2f}."
        if sentences
        else "There are too few problems to evaluate on held-out ones."
    )
    explanation = (
        "A reference for predictors: how well counting predicts the experts from a single context that is known in the task. "
        "Evaluation on the same tokens is optimistic, on the held-out half of the problems pessimistic; the true value for the "
        "context lies between. A predictor that combines contexts can exceed all of them; one that falls below the best "
        "context of its task is not worth its parameters. The predictor conditional-counts knows the experts of the layer "
        "before: compare it with the rows of that layer, not with the token itself. Entropy is given the context. Values are "
        "means over the layers that have every context."
    )
    read = "each row is one context; the recall that it allows lies between the two marks. The gray line is chance."
    figures = (drawing(figure, "predictability", headline, LABELS, read=read),)
    return Section("Predictability", headline, explanation, figures, (tuple(rows),))


def _between(low: float, high: float, digits: int = 3) -> str:
    return f"{show(low, digits)} to {show(high, digits)}"


def predictions_section(evaluation: Evaluation, number: int) -> Section:
    """An evaluation as a table and by layer. number: of the section, for the ids of its elements."""
    rows = table(evaluation)
    header = tuple(rows[0])
    cells = (header, *(tuple(row[name] for name in header) for row in rows))
    metric = header[1]
    predictors = {name: result for name, result in evaluation.results.items() if not name.endswith(CONTROL_NAME)}
    best = max(predictors, key=lambda name: predictors[name].metrics["h=1"][metric])
    headline = (
        f"{best} predicts best: {metric} {predictors[best].metrics['h=1'][metric]:.3f}, chance {evaluation.chance[metric]:.3f}."
    )
    # The run's own predictor, its control and popularity are shown at first.
    own = evaluation.predictor or best
    place = {own: 0, f"{own}, {CONTROL_NAME}": 1, "popularity": 2}
    ordered = sorted(evaluation.results, key=lambda name: place.get(name, 3))
    chosen = []
    for name in ordered:
        by_layer = [
            float("nan") if metrics is None else metrics.get(metric, float("nan"))
            for metrics in evaluation.results[name].by_target_layer.get("h=1", [])
        ]
        chosen.append(Curve(name, by_layer, CONTROL if name not in predictors else None))
    figures: tuple[Drawing, ...] = ()
    if chosen and len(chosen[0].y) > 1:
        chosen.insert(3, Curve("chance", [evaluation.chance[metric]] * len(chosen[0].y), CHANCE))
        drawn = lines(chosen, list(range(len(chosen[0].y))), "predicted MoE layer (from 0)", metric)
        read = "the share of each layer's experts among the K predicted ones; the dotted control should be near popularity."
        figures = (drawing(drawn, f"predictors-{number}", headline, read=read),)
    budgets = {name: evaluation.results[name].budget.get("h=1") for name in ordered}
    by_budget = {name: points for name, points in budgets.items() if points}
    tables = [cells]
    if by_budget:
        all_m = [point.m for point in next(iter(by_budget.values()))]
        chosen = [
            Curve(name, [point.recall for point in points], CONTROL if name not in predictors else None)
            for name, points in by_budget.items()
        ]
        chosen.insert(3, Curve("chance", [m / all_m[-1] for m in all_m], CHANCE))
        caption = "Share of the chosen experts among the m most likely ones."
        drawn = lines(chosen, all_m, "m: experts fetched per token and layer", "recall@m")
        read = "how much recall is gained by fetching more experts than the K that a token needs."
        figures += (drawing(drawn, f"budget-{number}", caption, read=read),)
        if budget := budget_table(evaluation):
            tables.append((tuple(budget[0]), *(tuple(row.values()) for row in budget)))
    explanation = (
        f"Run {evaluation.run}, task {evaluation.task}, evaluated on {counted(evaluation.problems, 'problem')} "
        f"({evaluation.tokens:,} "
        "tokens) "
        f"of {evaluation.trace}: the {evaluation.part} part of a split {evaluation.split}. In parentheses: 95 % interval over "
        "problems."
    )
    if by_budget:
        explanation += (
            " Second table: recall, and share of the routing weight (mass), if the m most likely experts are fetched; ECE: "
            "expected calibration error of the predicted probabilities."
        )
    return Section("Predictors", headline, explanation, figures, tuple(tables))
