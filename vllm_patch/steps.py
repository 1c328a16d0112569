"""Say which request and which sequence positions the rows of one engine step belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """Row labels of one `execute_model` call.

    spans: (request id, first position in the sequence, number of rows), in the order of the rows.
    problem_ids: problem id of each request that is new in this step, or None where the client gave none.
    finished: requests that ended before this step.
    """

    spans: list[tuple[str, int, int]]
    problem_ids: dict[str, int | None]
    finished: set[str]


def label_rows(runner: Any, scheduler_output: Any) -> Step:
    """Labels from vLLM's model runner just after it ran `scheduler_output`.

    The V2 runner keeps the batch in `execute_model_state.input_batch`, the V1 runner in `input_batch`; both hold, per
    request in row order, how many tokens had been computed before the step.
    """
    batch = getattr(getattr(runner, "execute_model_state", None), "input_batch", None)
    scheduled = scheduler_output.num_scheduled_tokens
    spans: list[tuple[str, int, int]] = []
    if scheduler_output.total_num_scheduled_tokens:
        if batch is not None:
            request_ids, computed = batch.req_ids, batch.num_computed_tokens_np
        else:
            batch = runner.input_batch
            request_ids, computed = batch.req_ids[: batch.num_reqs], batch.num_computed_tokens_cpu
        spans = [(request, int(computed[row]), scheduled[request]) for row, request in enumerate(request_ids)]
    return Step(
        spans=spans,
        problem_ids={new.req_id: _problem_id(new.sampling_params) for new in scheduler_output.scheduled_new_reqs},
        finished=set(scheduler_output.finished_req_ids),
    )


def _problem_id(sampling_params: Any) -> int | None:
    problem_id = (getattr(sampling_params, "extra_args", None) or {}).get("problem_id")
    return problem_id if isinstance(problem_id, int) else None
