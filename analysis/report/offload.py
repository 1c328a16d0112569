"""The section on experts that do not fit: which cache and predictor, and how much faster."""

from __future__ import annotations

from analysis.documents.simulation import BOUNDS, SimulatedRow, Simulation
from analysis.report.figures import CONTROL, Line, Section, html, lines

# What knows what comes: a policy, and a prefetcher.
BOUND, ORACLE = "belady", "oracle"


def offload_section(simulation: Simulation, device: str | None, number: str) -> Section:
    """One device of a simulation. number: of the section, for the names of its elements."""
    rows = [row for row in simulation.rows if row.device == device and row.policy not in BOUNDS]
    bounds = {row.policy: row for row in simulation.rows if row.device == device and row.policy in BOUNDS}
    best = [row for row in simulation.best if row.device == device]
    headline = " ".join(map(_answer, best)) or _hits(rows)
    shown = max(best, key=lambda row: row.gain or 0).policy if best else rows[0].policy
    sizes = sorted({row.share for row in rows})
    chosen = []
    for prefetch in dict.fromkeys(row.prefetch for row in rows):
        found = {row.share: row for row in rows if (row.policy, row.prefetch) == (shown, prefetch)}
        values = [_value(found.get(size)) for size in sizes]
        chosen.append(Line(f"{shown}, {prefetch}", values, CONTROL if prefetch.endswith("control") else None))
    y_title = "hit rate" if device is None else "tokens per second"
    figures: tuple[str, ...] = ()
    if len(sizes) > 1:
        ticks = [f"{size:.0%}" for size in sizes]
        drawn = lines(chosen, ticks, "share of all experts in the cache", y_title, as_category=True)
        figures = (html(drawn, f"offload-{number}", headline),)
    header = ("cache", "policy", "fetched ahead", "hit rate", "tokens/s", "times on demand")
    cells = tuple(_cells(row) for row in [*bounds.values(), *rows] if not row.prefetch.endswith("control"))
    notes = next((each.assumptions for each in simulation.devices if each.name == device), [])
    explanation = "Simulated, not run: the trace's requests against a cache, with copies beside the products. " + " ".join(
        [*(f"Assumed: {line}." for line in notes), *simulation.notes]
    )
    return Section("Experts that do not fit", headline, explanation, figures, ((header, *cells),))


def _answer(row: SimulatedRow) -> str:
    ahead = "nothing fetched ahead" if row.prefetch == "none" else f"{row.prefetch} fetching ahead"
    gain = "" if row.gain is None or row.prefetch == "none" else f", {row.gain:.2f} x the best without"
    return (
        f"With {row.gigabytes or 0:.1f} GB for experts on {row.device}: {row.policy}, {ahead}, "
        f"{row.tokens_per_second or 0:.1f} tokens/s, {row.times_on_demand or 0:.1f} x copying on demand{gain}."
    )


def _hits(rows: list[SimulatedRow]) -> str:
    possible = [row for row in rows if row.policy != BOUND and row.prefetch != ORACLE and not row.prefetch.endswith("control")]
    if not possible:
        return "Nothing was simulated that does not know what comes."
    row = max(possible, key=lambda row: row.hit_rate)
    ahead = "nothing fetched ahead" if row.prefetch == "none" else f"{row.prefetch} fetching ahead"
    return (
        f"At most {row.hit_rate:.1%} of the requested experts were in the cache: {row.share:.0%} of all experts, {row.policy}, "
        f"{ahead}, if copies took no time."
    )


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
