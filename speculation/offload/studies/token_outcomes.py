"""What a simulated cache did for each expert of some tokens, for the report's token-by-token view."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.counts.answers import window_of
from analysis.documents.simulation import SimulatedRow
from analysis.documents.token_results import CachedProblem, SimulatedSample
from profiler.trace.reader import Trace
from profiler.trace.splits import all_digests
from speculation.data.routes import Routes
from speculation.evaluation.evaluate import sampled_problems, token_groups
from speculation.offload.requests import Requests
from speculation.offload.simulation.simulate import Workload
from speculation.offload.studies.sweep import SimulationJob


def simulated_sample(
    trace: Trace,
    routes: Routes,
    workload: Workload,
    rows: list[SimulatedRow],
    best: list[SimulatedRow],
    jobs: list[SimulationJob],
) -> SimulatedSample | None:
    """What the cache of one of the simulations did for some problems of every dataset; None if none can be shown.

    Args:
        trace, routes: What was simulated.
        workload: The requests of these routes.
        rows, jobs: Every simulation.
        best: The fastest rows that use no future knowledge, see `Simulation.best`.
    """
    number = row_to_sample(rows, best)
    if number is None:
        return None
    row, outcomes_N = rows[number], jobs[number].run(workload, with_outcomes=True).outcomes_N
    problems = sampled_problems(routes, token_groups(trace, routes))
    return SimulatedSample(
        device=row.device,
        capacity=row.capacity,
        share=row.share,
        policy=row.label,
        prefetch=row.prefetch,
        problems=cached_problems(routes, workload.requests, outcomes_N, problems, all_digests(trace)),
    )


def row_to_sample(rows: list[SimulatedRow], best: list[SimulatedRow]) -> int | None:
    """The row whose outcomes are listed token by token, by its index; None if every row uses future knowledge.

    It is the one that gains most by prefetching. If nothing takes time, it is the best of the smallest cache, because the
    largest one always hits most.

    Args:
        rows: All rows.
        best: The fastest rows that use no future knowledge, see `Simulation.best`.
    """
    if best:
        chosen = max(best, key=lambda row: row.gain or 0.0).model_copy(update={"gain": None})
        return rows.index(chosen)
    possible = [number for number, row in enumerate(rows) if row.is_possible and row.capacity]
    if not possible:
        return None
    return max(possible, key=lambda number: (-rows[number].capacity, rows[number].hit_rate))


def cached_problems(
    routes: Routes, requests: Requests, outcomes_N: npt.NDArray[np.uint8], problems: list[int], digests: dict[int, int]
) -> list[CachedProblem]:
    """The outcomes for the tokens of some problems; of a long problem, the tokens that the report shows.

    Args:
        routes: The simulated tokens.
        requests: The requests that they made.
        outcomes_N: Of each requested expert, see `SimulationResult`.
        problems: Ids of the problems.
        digests: The digest of each problem's prompt.
    """
    found = []
    step_N = np.repeat(np.arange(requests.steps), requests.tokens_S)
    step_T = np.full(len(routes), -1)
    step_T[requests.tokens_N[requests.is_kept_N]] = step_N[requests.is_kept_N]
    for problem in problems:
        rows_T = np.flatnonzero(routes.problem_ids_T == problem)
        shown_T = rows_T[window_of(routes.is_decode_T[rows_T])]
        outcomes_TLK = np.zeros((len(shown_T), requests.layers, requests.top_k), dtype=np.uint8)
        for step in np.unique(step_T[shown_T][step_T[shown_T] >= 0]).tolist():
            in_step_T = step_T[shown_T] == step
            outcomes_TLK[in_step_T] = _of_step(requests, outcomes_N, step, routes.expert_ids_TLK[shown_T[in_step_T]])
        found.append(CachedProblem.of(digests[problem], routes.token_ids_T[shown_T], outcomes_TLK))
    return found


def _of_step(
    requests: Requests, outcomes_N: npt.NDArray[np.uint8], step: int, expert_ids_TLK: npt.NDArray[Any]
) -> npt.NDArray[np.uint8]:
    """The outcomes for the experts of tokens `[T, L, K]` that were computed in one step."""
    starts = requests.starts_R[step * requests.layers : (step + 1) * requests.layers + 1]
    layer_N = np.repeat(np.arange(requests.layers), np.diff(starts))
    outcome_LE = np.zeros((requests.layers, requests.num_experts), dtype=np.uint8)
    outcome_LE[layer_N, requests.experts_N[starts[0] : starts[-1]]] = outcomes_N[starts[0] : starts[-1]]
    found: npt.NDArray[np.uint8] = outcome_LE[np.arange(requests.layers)[:, None], expert_ids_TLK]
    return found
