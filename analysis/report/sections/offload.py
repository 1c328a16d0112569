"""The section on offloaded experts: the best cache policy and prefetcher, and their speed."""

from __future__ import annotations

from analysis.documents.evaluation import CONTROL as CONTROL_NAME
from analysis.documents.simulation import BOUNDS, SimulatedRow, Simulation
from analysis.report.figures import CONTROL, Curve, Drawing, Section, drawing, lines


def offload_section(simulation: Simulation, device: str | None, number: str) -> Section:
    """One device of a simulation. number: of the section, for the ids of its elements."""
    rows = [row for row in simulation.rows if row.device == device and row.policy not in BOUNDS]
    bounds = {row.policy: row for row in simulation.rows if row.device == device and row.policy in BOUNDS}
    best = [row for row in simulation.best if row.device == device]
    headline = " ".join(map(_timed_sentence, best)) or _hit_rate_sentence(rows)
    shown = max(best, key=lambda row: row.gain or 0).policy if best else next((row.policy for row in rows), "")
    sizes = sorted({row.share for row in rows})
    chosen = []
    for prefetch in dict.fromkeys(row.prefetch for row in rows):
        found = {row.share: row for row in rows if (row.policy, row.prefetch) == (shown, prefetch)}
        values = [_value(found.get(size)) for size in sizes]
        chosen.append(Curve(f"{shown}, {prefetch}", values, CONTROL if prefetch.endswith(CONTROL_NAME) else None))
    y_title = "hit rate" if device is None else "tokens per second"
    figures: tuple[Drawing, ...] = ()
    if len(sizes) > 1:
        ticks = [f"{size:.0%}" for size in sizes]
        drawn = lines(chosen, ticks, "share of all experts in the cache", y_title, as_category=True)
        read = "each line is a prefetcher with the same eviction policy; the dotted control prefetches for other tokens."
        figures = (drawing(drawn, f"offload-{number}", headline, read=read),)
    header = ("cache", "policy", "prefetcher", "hit rate", "tokens/s", "speedup over demand loading")
    cells = tuple(_cells(row) for row in [*bounds.values(), *rows] if not row.prefetch.endswith(CONTROL_NAME))
    notes = next((each.assumptions for each in simulation.devices if each.name == device), [])
    explanation = (
        "Simulated, not run: the trace's requests are played against a cache of experts, with transfers overlapping "
        "computation. "
    ) + " ".join([*(f"Assumed: {line}." for line in notes), *simulation.notes])
    return Section("Experts that do not fit in memory", headline, explanation, figures, ((header, *cells),))


def _timed_sentence(row: SimulatedRow) -> str:
    gain = "" if row.gain is None or row.prefetch == "none" else f" and {row.gain:.2f} x the best policy without prefetching"
    return (
        f"With {row.gigabytes or 0:.1f} GB for experts on {row.device}: {row.policy} with {_prefetching(row)} gives "
        f"{row.tokens_per_second or 0:.1f} tokens/s, {row.times_on_demand or 0:.1f} x demand loading without a cache{gain}."
    )


def _hit_rate_sentence(rows: list[SimulatedRow]) -> str:
    possible = [row for row in rows if row.is_possible]
    if not rows:
        return "No cache was simulated."
    if not possible:
        return "Every simulated policy or prefetcher uses future knowledge: add one that does not."
    row = max(possible, key=lambda row: row.hit_rate)
    return (
        f"The best hit rate is {row.hit_rate:.1%}: a cache with {row.share:.0%} of all experts, {row.policy} and "
        f"{_prefetching(row)}, if transfers took no time."
    )


def _prefetching(row: SimulatedRow) -> str:
    return "no prefetching" if row.prefetch == "none" else f"prefetching by {row.prefetch}"


def _value(row: SimulatedRow | None) -> float:
    if row is None:
        return float("nan")
    if row.device is None:
        return row.hit_rate
    return float("nan") if row.tokens_per_second is None else row.tokens_per_second


def _cells(row: SimulatedRow) -> tuple[str, ...]:
    size = f"{row.share:.0%}" + ("" if row.gigabytes is None else f", {row.gigabytes:.1f} GB")
    timed = (
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}",
        "-" if row.times_on_demand is None else f"{row.times_on_demand:.1f}",
    )
    return (size, row.policy, row.prefetch, f"{row.hit_rate:.3f}", *timed)
