"""The cards at the top of the page: what a model's routing is like in five numbers, each with its control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.counts.contexts import NO_CONTEXT
from analysis.documents.evaluation import CONTROL as CONTROL_NAME
from analysis.documents.evaluation import Evaluation
from analysis.documents.simulation import Simulation
from analysis.report.figures import Section
from analysis.statistics.compute import Statistics, mean, show
from analysis.statistics.contexts import TASKS
from profiler.errors import counted


@dataclass(frozen=True)
class Card:
    """One finding. value: the number; bars: it and what it is compared with, as shares of the longest bar.

    Attributes:
        name: What is measured.
        value, unit: The number as text, and what it is a number of.
        bars: For each bar: whether it is a control or a reference, its length from 0 to 1, and its label.
        sentence: The finding in words.
        section: Number of the section with the details, from 1; 0 if there is none.
    """

    name: str
    value: str
    unit: str
    bars: tuple[tuple[bool, float, str], ...]
    sentence: str
    section: int


def overview(
    s: Statistics, sections: Sequence[Section], evaluations: Sequence[Evaluation], simulations: Sequence[Simulation]
) -> list[Card]:
    """The cards of one trace: load, adjacent layers, repetition, domains, predictability, then predictors and speed."""
    number = {section.title: place for place, section in reversed(list(enumerate(sections, start=1)))}
    cards = [_load(s, number.get("Expert load", 0))]
    if s.hops:
        cards.append(_layers(s, number.get("Cross-layer transitions", 0)))
    cards.append(_repetition(s, number.get("Repetition over tokens", 0)))
    cards.append(_domains(s, number.get("Domains", 0)))
    predictability = _predictability(s, number.get("Predictability", 0))
    if predictability is not None:
        cards.append(predictability)
    if evaluations:
        cards.append(_recall(evaluations, number.get("Predictors", 0)))
    speed = _speed(simulations, number.get("Experts that do not fit in memory", 0))
    return cards if speed is None else [*cards, speed]


def _bars(*values: tuple[float, str], longest: float | None = None) -> tuple[tuple[bool, float, str], ...]:
    """Bars of values with their labels, the first of which is the finding; longest: the value of a full bar.

    Values that are unknown have none.
    """
    known = [(place, value, label) for place, (value, label) in enumerate(values) if np.isfinite(value)]
    full = max((abs(value) for _, value, _ in known), default=0.0) if longest is None else longest
    return tuple((place > 0, min(1.0, max(0.0, value / full)) if full else 0.0, label) for place, value, label in known)


def _percent(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "-"


def _times(value: float, reference: float) -> str:
    """How a value relates to its control, in words."""
    if not reference > 0 or not np.isfinite(value / reference):
        return ""
    return f"{value / reference:.1f} times the control. "


def _load(s: Statistics, section: int) -> Card:
    share = mean(s.load.entropy_share)
    n, expert = (int(index) for index in np.unravel_index(s.load.share_LE.argmax(), s.load.share_LE.shape))
    busiest = float(s.load.share_LE.max()) * s.axes.num_experts
    return Card(
        "Load balance",
        _percent(share),
        "of the maximum entropy",
        _bars((share, _percent(share)), (1.0, "100% even load"), longest=1.0),
        f"The busiest expert (layer {s.axes.moe_layers[n]}, expert {expert}) receives {busiest:.1f} times an even share.",
        section,
    )


def _layers(s: Statistics, section: int) -> Card:
    first = s.hops[0]
    if s.axes.knows_strongest:
        bits, control = mean(first.information_bits), mean(first.information_shuffled_bits)
        held_out, popular = mean(first.held_out_top1), mean(first.marginal_top1)
        sentence = (
            f"Given a layer's strongest expert, the next layer's is predicted for {held_out:.0%} of tokens; popularity alone "
            f"predicts {popular:.0%}."
            if np.isfinite(held_out)
            else "How much the strongest expert of a layer says about that of the next."
        )
        return Card(
            "Information across layers",
            show(bits, 2),
            "bits shared by adjacent layers",
            _bars((bits, f"{bits:.2f}"), (control, f"{show(control, 2)} shuffled")),
            sentence,
            section,
        )
    recall, control = mean(first.conditional_topk), mean(first.shuffled_topk)
    return Card(
        "Information across layers",
        _percent(recall),
        "of the next layer's experts predicted from one expert",
        _bars((recall, _percent(recall)), (control, f"{control:.0%} shuffled"), longest=1.0),
        f"{_times(recall, control)}Predicted with {s.axes.top_k} guesses, on the tokens that were counted.",
        section,
    )


def _repetition(s: Statistics, section: int) -> Card:
    whole = s.repetitions[0]
    if s.axes.knows_strongest:
        value, control, what = mean(whole.first[0]), mean(whole.first_shuffled), "of tokens repeat the previous first choice"
    else:
        value, control, what = mean(whole.shared[0]), mean(whole.shared_shuffled), "of experts repeat from the previous token"
    if not np.isfinite(value):
        return Card("Repetition", "-", what, (), "No problem has two consecutive recorded tokens.", section)
    return Card(
        "Repetition",
        _percent(value),
        what,
        _bars((value, _percent(value)), (control, f"{control:.0%} shuffled")),
        f"{_times(value, control)}Shuffled: two tokens drawn at random.",
        section,
    )


def _domains(s: Statistics, section: int) -> Card:
    name = "Domain specialization"
    if not s.domains:
        return Card(name, "-", "", (), "The trace has a single domain, so there is nothing to compare.", section)
    far = max(s.domains, key=lambda pair: mean(pair.distance) - mean(pair.shuffled))
    value, control = mean(far.distance), mean(far.shuffled)
    found = "differ most" if value > mean(far.shuffled_high) else "differ most, but no more than their problems alone explain"
    return Card(
        name,
        show(value, 2),
        "distance of loads (0 equal, 1 disjoint)",
        _bars((value, f"{value:.2f}"), (control, f"{control:.2f} shuffled"), longest=1.0),
        f"{far.first} and {far.second} {found}.",
        section,
    )


def _predictability(s: Statistics, section: int) -> Card | None:
    by_name = {each.context: each for each in s.contexts}
    usable = [
        (by_name[name].recall_held_out, task, by_name[name].shown)
        for task, known in TASKS.items()
        for name in known
        if name in by_name and np.isfinite(by_name[name].recall_held_out)
    ]
    if not usable:
        return None
    recall, task, context = max(usable)
    popular = by_name[NO_CONTEXT].recall_held_out if NO_CONTEXT in by_name else float("nan")
    chance = s.axes.top_k / s.axes.num_experts
    return Card(
        "Predictability",
        _percent(recall),
        f"recall@{s.axes.top_k} by counting, held out",
        _bars(
            (recall, _percent(recall)),
            *([(popular, f"{popular:.0%} popularity")] if np.isfinite(popular) else []),
            (chance, f"{chance:.0%} chance"),
            longest=1.0,
        ),
        f"By counting which experts go with one thing that the task {task} knows: {context}. Counting by another thing gives "
        "another recall: the section lists them. A trained predictor should do better.",
        section,
    )


def _recall(evaluations: Sequence[Evaluation], section: int) -> Card:
    found = [
        (result.metrics["h=1"][evaluation.recall_at_k_name], name, evaluation)
        for evaluation in evaluations
        for name, result in evaluation.results.items()
        if not name.endswith(CONTROL_NAME)
    ]
    recall, name, evaluation = max(found, key=lambda each: each[0])
    metric = evaluation.recall_at_k_name
    popular = evaluation.results.get("popularity")
    control = next((each for other, each in evaluation.results.items() if other.endswith(CONTROL_NAME)), None)
    references = [
        (each.metrics["h=1"][metric], label)
        for each, label in ((popular, "popularity"), (control, "shuffled"))
        if each is not None
    ]
    return Card(
        "Trained predictor",
        _percent(recall),
        f"{metric} of {name}",
        _bars(
            (recall, _percent(recall)),
            *((value, f"{value:.0%} {label}") for value, label in references),
            longest=1.0,
        ),
        f"{evaluation.task}, {counted(evaluation.problems, 'problem')}, {evaluation.held_out}.",
        section,
    )


def _speed(simulations: Sequence[Simulation], section: int) -> Card | None:
    best = [row for simulation in simulations for row in simulation.best if row.tokens_per_second and row.times_on_demand]
    if best:
        row = max(best, key=lambda each: each.gain or 0.0)
        speed = row.tokens_per_second or 0.0
        demand = speed / (row.times_on_demand or 1.0)
        return Card(
            "Offloaded experts",
            f"{speed:.1f}",
            f"tokens/s with {row.share:.0%} of experts in the cache",
            _bars((speed, f"{speed:.1f}"), (demand, f"{demand:.1f} demand loading")),
            f"Simulated on {row.device}: {row.policy}, prefetching by {row.prefetch}; hit rate {row.hit_rate:.0%}.",
            section,
        )
    rows = [row for simulation in simulations for row in simulation.rows if row.is_possible]
    if not rows:
        return None
    # Of the smallest cache: the largest one always hits most.
    smallest = min(row.share for row in rows)
    row = max((each for each in rows if each.share == smallest), key=lambda each: each.hit_rate)
    return Card(
        "Offloaded experts",
        f"{row.hit_rate:.0%}",
        f"hit rate with {row.share:.0%} of experts in the cache",
        _bars((row.hit_rate, f"{row.hit_rate:.0%}"), (row.share, f"{row.share:.0%} chance"), longest=1.0),
        f"Simulated: {row.policy}, prefetching by {row.prefetch}, if transfers took no time.",
        section,
    )
