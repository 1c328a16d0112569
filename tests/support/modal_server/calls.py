"""Calls of functions: their inputs, delivered to containers, and their outputs."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from support.modal_server.containers import Container
from support.modal_server.functions import Function
from support.modal_server.parts import Part, new_id, not_found

if TYPE_CHECKING:
    from support.modal_server.server import Server

FAILED = {pb.GenericResult.GENERIC_STATUS_FAILURE, pb.GenericResult.GENERIC_STATUS_TIMEOUT}
MAX_OUTSTANDING = 1000


@dataclass
class Input:
    """An input of a call. retry: how often it failed before. delivered: how often a container got this attempt."""

    id: str
    number: int
    call: Call
    item: pb.FunctionInput
    retry: int = 0
    delivered: int = 0
    output: pb.FunctionGetOutputsItem | None = None


@dataclass
class Call:
    """A call. outputs: all there were, also of attempts that failed and were tried again."""

    id: str
    function: Function
    is_map: bool
    invocation: pb.FunctionCallInvocationType.ValueType
    inputs: list[Input] = field(default_factory=list)
    outputs: list[pb.FunctionGetOutputsItem] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


class Calls(Part):
    """Calls of the running command."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.calls: dict[str, Call] = {}

    def _find(self, call_id: str) -> Call:
        if call_id not in self.calls:
            raise not_found(f"no call {call_id}")
        return self.calls[call_id]

    async def FunctionMap(self, request: pb.FunctionMapRequest, container: Container | None) -> pb.FunctionMapResponse:
        """Begin a call, of one input or of many."""
        function = self.server.functions.find(request.function_id)
        is_map = request.function_call_type == pb.FUNCTION_CALL_TYPE_MAP
        call = Call(new_id("fc"), function, is_map, request.function_call_invocation_type)
        self.calls[call.id] = call
        return pb.FunctionMapResponse(
            function_call_id=call.id,
            function_call_jwt=_token({"function_call_id": call.id}),
            pipelined_inputs=[self._add(call, item) for item in request.pipelined_inputs],
            retry_policy=function.definition.retry_policy,
            sync_client_retries_enabled=True,
            max_inputs_outstanding=MAX_OUTSTANDING,
        )

    async def FunctionPutInputs(
        self, request: pb.FunctionPutInputsRequest, container: Container | None
    ) -> pb.FunctionPutInputsResponse:
        call = self._find(request.function_call_id)
        return pb.FunctionPutInputsResponse(inputs=[self._add(call, item) for item in request.inputs])

    def _add(self, call: Call, put: pb.FunctionPutInputsItem) -> pb.FunctionPutInputsResponseItem:
        added = Input(new_id("in"), put.idx, call, put.input)
        call.inputs.append(added)
        self.server.containers.deliver(added)
        return pb.FunctionPutInputsResponseItem(idx=put.idx, input_id=added.id, input_jwt=_token_of(added))

    async def FunctionFinishInputs(self, request: pb.FunctionFinishInputsRequest, container: Container | None) -> Empty:
        return Empty()

    async def FunctionRetryInputs(
        self, request: pb.FunctionRetryInputsRequest, container: Container | None
    ) -> pb.FunctionRetryInputsResponse:
        """Calls that wait for their outputs are retried by their clients."""
        tokens = []
        for item in request.inputs:
            claims = _claims(item.input_jwt)
            call = self._find(claims["function_call_id"])
            again = next(one for one in call.inputs if one.id == claims["input_id"])
            self._retry(again, item.retry_count or again.retry + 1)
            tokens.append(_token_of(again))
        return pb.FunctionRetryInputsResponse(input_jwts=tokens)

    def _retry(self, again: Input, retry: int) -> None:
        again.retry, again.delivered, again.output = retry, 0, None
        self.server.containers.deliver(again)

    async def FunctionGetOutputs(
        self, request: pb.FunctionGetOutputsRequest, container: Container | None
    ) -> pb.FunctionGetOutputsResponse:
        """Of some inputs, or of all since the last request; waits for the first for some time."""
        call = self._find(request.function_call_id)
        seen = int(request.last_entry_id.split("-")[0] or 0)

        def ready() -> list[pb.FunctionGetOutputsItem]:
            if not request.HasField("start_idx"):
                return call.outputs[seen:]
            last = request.end_idx if request.HasField("end_idx") else len(call.inputs)
            return [one.output for one in call.inputs if one.output is not None and request.start_idx <= one.number <= last]

        async with call.changed:
            if request.timeout and not ready():
                with suppress(TimeoutError):
                    await asyncio.wait_for(call.changed.wait_for(ready), request.timeout)
        outputs = ready()
        return pb.FunctionGetOutputsResponse(
            outputs=outputs,
            idxs=[output.idx for output in outputs],
            last_entry_id=f"{len(call.outputs)}-0",
            num_unfinished_inputs=sum(one.output is None for one in call.inputs),
        )

    async def finish(
        self,
        done: Input,
        result: pb.GenericResult,
        data_format: pb.DataFormat.ValueType = pb.DATA_FORMAT_UNSPECIFIED,
        task_id: str = "",
        *,
        for_good: bool = False,
    ) -> None:
        """Record an output; a failure of a call that no client waits for is retried first, unless for_good is true."""
        policy = done.call.function.definition.retry_policy
        spawned = done.call.invocation == pb.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
        if spawned and result.status in FAILED and not for_good and done.retry < policy.retries:
            delay = policy.initial_delay_ms * policy.backoff_coefficient**done.retry
            await asyncio.sleep(min(delay, policy.max_delay_ms or delay) / 1000)
            self._retry(done, done.retry + 1)
            return
        done.output = pb.FunctionGetOutputsItem(
            result=result,
            idx=done.number,
            input_id=done.id,
            data_format=data_format,
            task_id=task_id,
            retry_count=done.retry,
            output_created_at=time.time(),
        )
        async with done.call.changed:
            done.call.outputs.append(done.output)
            done.call.changed.notify_all()


def _token_of(one: Input) -> str:
    return _token({"idx": one.number, "input_id": one.id, "function_call_id": one.call.id})


def _token(claims: dict[str, str | int]) -> str:
    """An unsigned JWT, which the client reads too."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({"alg": "none"}, claims)]
    return ".".join([*parts, ""])


def _claims(token: str) -> dict[str, str]:
    claims: dict[str, str] = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    return claims
