"""Find the captured request of each output of a program: request ids are not enough, since a program may reuse one."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from profiler.capture.inputs import CapturedInputs
from profiler.capture.requests import CapturedRequest
from profiler.errors import TraceError

# vLLM appends a dash and eight random characters to request ids from 0.14 on.
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


class UnmatchedOutputError(TraceError):
    """No captured request, or more than one, can be that of an output. The message says why and what to do."""


@dataclass(frozen=True)
class Output:
    """One sample of a request's output, with the id that the program knows the request by.

    sample_name: the id that vLLM gives the sample if its request has several, where that is unknown; otherwise empty.
    """

    name: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    sample_name: str = ""


def match_outputs(
    outputs: list[Output], requests: list[CapturedRequest], inputs: CapturedInputs, *, drafts: bool = False
) -> list[CapturedRequest | UnmatchedOutputError]:
    """For each output, the request of its id and prompt that read its tokens; each request is used once.

    If several requests read the same tokens, their routes are the same, and it does not matter which is which. Outputs without
    such a request get an error instead. drafts: whether requests also read draft tokens, which may have been rejected.
    """
    by_id: defaultdict[str, list[CapturedRequest]] = defaultdict(list)
    by_name: defaultdict[str, list[CapturedRequest]] = defaultdict(list)
    for request in requests:
        by_id[request.request_id].append(request)
        by_name[_SUFFIX.sub("", request.request_id)].append(request)
    free = {request.number for request in requests}
    found: dict[int, CapturedRequest | UnmatchedOutputError] = {}

    def order(place: int) -> tuple[bool, int]:
        # A request that read a long output has read its beginning, too, but not the other way round: the long ones choose
        # first. Before them come those whose id is a captured one: what looks like vLLM's suffix may be the program's own.
        return outputs[place].name not in by_id, -len(outputs[place].token_ids)

    for place in sorted(range(len(outputs)), key=order):
        output = outputs[place]
        try:
            named = [
                request
                for name in (output.name, output.sample_name)
                if name
                for request in by_id.get(name) or by_name.get(name, [])
            ]
            found[place] = _choose(output, named, free, inputs, drafts=drafts)
        except UnmatchedOutputError as error:
            found[place] = error
    return [found[place] for place in range(len(outputs))]


def _choose(
    output: Output, named: list[CapturedRequest], free: set[int], inputs: CapturedInputs, *, drafts: bool
) -> CapturedRequest:
    if not named:
        raise UnmatchedOutputError(f"output {output.name!r} was not generated during the recording")
    same = [request for request in named if request.prompt_token_ids == output.prompt_token_ids]
    if inputs.known:
        tokens = output.prompt_token_ids + output.token_ids
        same = [request for request in same if inputs.has_read(request.number, tokens)]
        if same and not drafts:
            # What a request reads behind the end of its output begins with the output's last token. In the last piece of a
            # stream, the token after the prompt is another one than was read there.
            same = [request for request in same if inputs.difference(request.number, tokens, last=True) is None]
            if not same:
                raise UnmatchedOutputError(
                    f"output {output.name!r} lacks tokens of its request: with output_kind=DELTA, the last output has the last "
                    "tokens only; use CUMULATIVE or FINAL_ONLY"
                )
    elif len(same) > 1:
        raise UnmatchedOutputError(
            f"output {output.name!r}: {len(same)} requests had this id and prompt, and this vLLM release does not show which "
            "of them it belongs to: give each request an id of its own"
        )
    if not same:
        raise UnmatchedOutputError(f"output {output.name!r} has other tokens than every request of that id in the recording")
    for request in same:
        if request.number in free:
            free.remove(request.number)
            return request
    raise UnmatchedOutputError(f"output {output.name!r} was added more often than the recording has requests with its tokens")
