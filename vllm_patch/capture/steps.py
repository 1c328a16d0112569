"""Label the rows of an engine step with their requests and sequence positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class NewRequest:
    """A request that appears for the first time in a step.

    label: `extra_args["problem_id"]` as the client passed it, or None. cached_tokens: tokens taken from the prefix cache.
    """

    request_id: str
    label: int | str | None
    prompt_token_ids: list[int]
    cached_tokens: int


@dataclass(frozen=True)
class Step:
    """Row labels of one `execute_model` call. Little is computed here, because the engine waits for it.

    request_ids, starts_B: id and first sequence position of each request, in the order of the rows. scheduled: number of rows
    of each request. rows: number of rows in total. new: requests that appear for the first time. finished: requests that ended
    before this step. input_ids: the device tensor whose first rows are the vocabulary ids that the model read; None if unknown.
    """

    request_ids: list[str]
    starts_B: npt.NDArray[np.integer[Any]]
    scheduled: dict[str, int]
    rows: int
    new: list[NewRequest]
    finished: set[str]
    input_ids: Any = None


def label_rows(runner: Any, scheduler_output: Any) -> Step:
    """The labels of a step, read from vLLM's model runner just after it ran `scheduler_output`.

    The V2 runner keeps the batch in `execute_model_state.input_batch`, the V1 runner in `input_batch`. Both store, for each
    request in row order, how many tokens had been computed before the step.
    """
    request_ids: list[str] = []
    starts_B: npt.NDArray[np.integer[Any]] = np.empty(0, dtype=np.int32)
    input_ids: Any = None
    if scheduler_output.total_num_scheduled_tokens:
        batch = getattr(getattr(runner, "execute_model_state", None), "input_batch", None)
        if batch is not None:
            request_ids, computed = list(batch.req_ids), batch.num_computed_tokens_np
            input_ids = getattr(batch, "input_ids", None)
        else:
            batch = runner.input_batch
            request_ids, computed = batch.req_ids[: batch.num_reqs], batch.num_computed_tokens_cpu
            found = getattr(runner, "input_ids", None)
            # A pair of buffers, on the host and on the device.
            input_ids = getattr(found, "gpu", found)
        # A copy, because the runner updates the array in place.
        starts_B = np.array(computed[: len(request_ids)])
    return Step(
        request_ids=request_ids,
        starts_B=starts_B,
        scheduled=scheduler_output.num_scheduled_tokens,
        rows=scheduler_output.total_num_scheduled_tokens,
        new=[
            NewRequest(new.req_id, _label(new.sampling_params), list(new.prompt_token_ids or []), new.num_computed_tokens)
            for new in scheduler_output.scheduled_new_reqs
        ],
        finished=scheduler_output.finished_req_ids,
        input_ids=input_ids,
    )


def _label(sampling_params: Any) -> int | str | None:
    label = (getattr(sampling_params, "extra_args", None) or {}).get("problem_id")
    return label if isinstance(label, int | str) and not isinstance(label, bool) else None
