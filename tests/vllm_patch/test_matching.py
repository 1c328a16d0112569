"""Captured rows and their requests: whatever ids a program gives, no sequence gets the rows of another one's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from profiler.capture.finish import finish_trace
from profiler.capture.inputs import CapturedInputs
from profiler.capture.requests import ABORTED, CapturedRequest, Sequence, read_requests
from profiler.capture.sealing import run_folder
from profiler.errors import TraceError
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata, ModelMetadata
from profiler.trace.writer import write_metadata
from vllm_patch.capture.buffers import CaptureBuffers
from vllm_patch.capture.recorder import Recorder
from vllm_patch.capture.steps import NewRequest, Step
from vllm_patch.matching import Output, UnmatchedOutputError, match_outputs

EXPERTS = 251
METADATA = Metadata(
    model=ModelMetadata(id="synthetic", moe_layers=[0], num_experts=EXPERTS, top_k=1), engine="none", hook="none"
)


@dataclass
class Run:
    """A request as a program runs it: its id, its tokens, whether it is aborted, and how it is scheduled."""

    name: str
    prompt: list[int]
    output: list[int]
    internal: str = ""
    aborted: bool = False
    computed: int = 0
    drafts: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


def route(tokens: list[int]) -> int:
    """The expert of the last of these tokens: like a model's, it depends on all tokens up to there, and on nothing else."""
    return hash(tuple(tokens)) % EXPERTS


def run_steps(recorder: Recorder, runs: list[Run], batch: int) -> None:
    """Run the requests, `batch` at a time, with drafts that may be wrong, and record every step as the engine would."""
    waiting, running, ended = list(runs), list[Run](), set[str]()
    while waiting or running or ended:
        new = []
        # Ids without vLLM's random suffix can be used again only when their request has ended.
        while waiting and len(running) < batch and waiting[0].internal not in {run.internal for run in running}:
            new.append(waiting.pop(0))
            running.append(new[-1])
        names, starts, counts, inputs, experts = [], [], [], [], []
        for run in running:
            first = (
                run.tokens[run.computed :] if run.computed < len(run.prompt) else run.tokens[run.computed : run.computed + 1]
            )
            fed = first[: max(1, len(run.prompt) - run.computed)]
            draft = run.drafts.pop() if run.drafts and run.computed >= len(run.prompt) else []
            names.append(run.internal)
            starts.append(run.computed)
            counts.append(len(fed) + len(draft))
            known = run.tokens[: run.computed]
            for token in [*fed, *draft]:
                known = [*known, token]
                inputs.append(token)
                experts.append(route(known))
            run.computed += len(fed)
            for token in draft:
                if run.computed < len(run.tokens) and token == run.tokens[run.computed]:
                    run.computed += 1
                else:
                    break
        rows = len(inputs)
        recorder.buffers.copy_of_layer(0)(
            torch.zeros(rows, 1), torch.zeros(rows, 1), torch.ones(rows, 1), torch.tensor(experts).reshape(-1, 1)
        )
        recorder.record(
            Step(
                request_ids=names,
                starts_B=np.array(starts),
                scheduled=dict(zip(names, counts, strict=True)),
                rows=rows,
                new=[NewRequest(run.internal, None, run.prompt, 0) for run in new],
                finished=ended,
                input_ids=torch.tensor(inputs, dtype=torch.int32),
            )
        )
        done = [run for run in running if run.computed >= (len(run.prompt) + 1 if run.aborted else len(run.tokens) - 1)]
        ended = {run.internal for run in done}
        running = [run for run in running if run.internal not in ended]


def capture(directory: Path, runs: list[Run], batch: int) -> list[CapturedRequest]:
    write_metadata(directory, METADATA)
    buffers = CaptureBuffers(max_tokens=256, layers=1, num_experts=EXPERTS, top_k=1, device="cpu")
    recorder = Recorder(buffers, moe_layers=[0], num_experts=EXPERTS, top_k=1)
    assert "error" not in recorder.start(run_folder(directory, 0))
    run_steps(recorder, runs, batch)
    assert "error" not in recorder.stop()
    return read_requests(run_folder(directory, 0))


def sequence(problem_id: int, number: int, prompt: list[int], output: list[int]) -> Sequence:
    return Sequence(
        problem_id=problem_id,
        captured_as=(0, number),
        dataset="synthetic",
        source_key="",
        prompt=None,
        output="",
        prompt_token_ids=prompt,
        output_token_ids=output,
        finish_reason="length" if output else ABORTED,
    )


def assert_routes(trace: Trace, problem_id: int, tokens: list[int]) -> None:
    chunk = trace.arrays(problem_id)
    assert chunk.token_ids_T.tolist() == list(range(len(tokens) - 1))
    assert chunk.expert_ids_TLK[:, 0, 0].tolist() == [route(tokens[: position + 1]) for position in range(len(tokens) - 1)]


# Few names, tokens and lengths, so that ids, prompts and whole sequences repeat.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Run], int, bool]:
    suffixes = draw(st.booleans())
    runs = []
    for number in range(draw(st.integers(1, 8))):
        # "q-0000000a" looks as if vLLM had appended its suffix to "q".
        name = draw(st.sampled_from(["q", "r", "q-0000000a"]))
        runs.append(
            Run(
                name,
                prompt=draw(TOKENS),
                output=draw(TOKENS),
                internal=f"{name}-{number:08x}" if suffixes else name,
                aborted=draw(st.integers(0, 5)) == 0,
                drafts=draw(st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=4)),
            )
        )
    return runs, draw(st.integers(1, 4)), draw(st.booleans())


# Two requests with one id: the drafts that the first one rejected, behind its end, are the rest of the second one's output.
REJECTED_BEHIND_THE_END = [Run("r", [0], [1, 1, 0], "r", drafts=[[0, 1]]), Run("r", [0], [1, 1, 1, 0], "r")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs())
@example((REJECTED_BEHIND_THE_END, 1, False))
def test_whatever_ids_repeat_every_output_gets_the_routes_of_its_tokens(
    tmp_path_factory: pytest.TempPathFactory, program: tuple[list[Run], int, bool]
) -> None:
    runs, batch, reverse = program
    directory = tmp_path_factory.mktemp("trace")
    drafts = any(any(run.drafts) for run in runs)
    requests = capture(directory, runs, batch)
    assert len(requests) == len(runs)
    outputs = [run for run in runs if not run.aborted]
    outputs = outputs[::-1] if reverse else outputs
    found = match_outputs(
        [Output(run.name, run.prompt, run.output) for run in outputs],
        requests,
        CapturedInputs(run_folder(directory, 0)),
        drafts=drafts,
    )
    sequences: list[Sequence] = []
    for run, request in zip(outputs, found, strict=True):
        assert isinstance(request, CapturedRequest), request
        sequences.append(sequence(len(sequences), request.number, run.prompt, run.output))
    used = {one.captured_as for one in sequences}
    for request in requests:
        if (0, request.number) not in used:
            sequences.append(sequence(len(sequences), request.number, request.prompt_token_ids, []))
    assert len(sequences) == len(runs)
    if not any(one.tokens > 1 for one in sequences):
        return
    trace = finish_trace(directory, METADATA, sequences)
    for problem_id, run in enumerate(outputs):
        assert_routes(trace, problem_id, run.tokens)


REQUESTS = [Run("q", [1, 2], [3, 4, 5], "q"), Run("q", [1, 2], [3, 4, 6], "q"), Run("r", [1, 2], [3, 4, 5], "r")]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[list[CapturedRequest], CapturedInputs]:
    requests = capture(tmp_path, [Run(run.name, run.prompt, run.output, run.internal) for run in REQUESTS], 2)
    return requests, CapturedInputs(run_folder(tmp_path, 0))


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        # The last token is never read: the first two requests read the same, so either order is right.
        ([Output("q", [1, 2], [3, 4, 6]), Output("q", [1, 2], [3, 4, 5])], [0, 1]),
        ([Output("r", [1, 2], [3, 4, 5])], [2]),
        ([Output("s", [1, 2], [3])], ["output 's' was not generated during the recording"]),
        ([Output("q", [1, 3], [3])], ["output 'q' has other tokens than every request of that id"]),
        ([Output("q", [1, 2], [3, 3, 5])], ["output 'q' has other tokens than every request of that id"]),
        ([Output("q", [1, 2], [3, 4, 5, 6])], ["output 'q' has other tokens than every request of that id"]),
        ([Output("r", [1, 2], [3, 4, 5])] * 2, [2, "output 'r' was added more often"]),
    ],
)
def test_an_output_gets_a_request_of_its_own_tokens_or_a_reason(
    inputs: tuple[list[CapturedRequest], CapturedInputs], outputs: list[Output], expected: list[int | str]
) -> None:
    for found, wanted in zip(match_outputs(outputs, *inputs), expected, strict=True):
        if isinstance(wanted, str):
            assert str(found).startswith(wanted)
            assert isinstance(found, UnmatchedOutputError)
        else:
            assert isinstance(found, CapturedRequest)
            assert found.number == wanted


@pytest.mark.parametrize("suffix", ["", "-0a1b2c3d"], ids=["vLLM 0.13", "vLLM 0.14"])
@pytest.mark.parametrize("unknown", [False, True], ids=["", "with an output of before"])
@pytest.mark.parametrize("reverse", [False, True])
def test_ids_of_the_program_may_end_as_those_of_vllm(tmp_path: Path, suffix: str, unknown: bool, reverse: bool) -> None:
    names = ["job", "job-deadbeef", "job-deadbeef-deadbeef", "-deadbeef"]
    runs = [Run(name, [1, 2], [3, 4, n], name + suffix) for n, name in enumerate(names)]
    requests = capture(tmp_path, runs, 2)
    outputs = [Output(run.name, run.prompt, run.output) for run in runs]
    # As long as the others, and with the same tokens.
    others = [Output("other", [1, 2], [3, 4, 0]), Output("other-deadbeef", [1, 2], [3, 4, 0])] * unknown
    order = [*outputs, *others][:: -1 if reverse else 1]
    found = match_outputs(order, requests, CapturedInputs(run_folder(tmp_path, 0)))
    for output, request in zip(order, found, strict=True):
        if output in others:
            assert str(request).endswith("was not generated during the recording")
        else:
            assert isinstance(request, CapturedRequest)
            assert request.request_id == output.name + suffix


@pytest.mark.parametrize(("output", "last"), [([3, 4, 5], 5), ([3, 4, 5, 6], 6), ([3, 4], 4)])
def test_the_last_piece_of_a_stream_is_not_taken_for_the_output(tmp_path: Path, output: list[int], last: int) -> None:
    """Its one token would stand where the request read the first one."""
    requests = capture(tmp_path, [Run("q", [1, 2], output, "q")], 1)
    inputs = CapturedInputs(run_folder(tmp_path, 0))
    whole, piece = Output("q", [1, 2], output), Output("q", [1, 2], [last])
    assert match_outputs([whole], requests, inputs) == requests
    (error,) = match_outputs([piece], requests, inputs)
    assert "lacks tokens of its request: with output_kind=DELTA" in str(error)
    # A draft that was rejected may stand there, too.
    assert match_outputs([piece], requests, inputs, drafts=True) == requests


@pytest.mark.parametrize("suffix", ["", "-0a1b2c3d"], ids=["vLLM 0.13", "vLLM 0.14"])
def test_a_sample_that_came_alone_is_found_by_its_number(tmp_path: Path, suffix: str) -> None:
    """Unless FINAL_ONLY is requested, vLLM returns each sample by itself, and the name of the first one says nothing."""
    names = ["0_q", "1_q", "q"]
    requests = capture(tmp_path, [Run(name, [1, 2], [3, 4, n], name + suffix) for n, name in enumerate(names)], 1)
    outputs = [Output("1_q", [1, 2], [3, 4, 1], "1_q"), Output("q", [1, 2], [3, 4, 0], "0_q")]
    found = match_outputs(outputs, requests[:2], CapturedInputs(run_folder(tmp_path, 0)))
    assert found == [requests[1], requests[0]]
    # A request of that very id comes first.
    assert match_outputs(outputs[1:], requests, CapturedInputs(run_folder(tmp_path, 0))) == [requests[2]]


def test_an_output_of_before_takes_no_request_of_an_id_that_seems_to_have_a_suffix(tmp_path: Path) -> None:
    requests = capture(tmp_path, [Run("job-deadbeef", [1, 2], [3, 4, 5], "job-deadbeef")], 1)
    before, own = match_outputs(
        [Output("job", [1, 2], [3, 4, 5]), Output("job-deadbeef", [1, 2], [3, 4, 5])],
        requests,
        CapturedInputs(run_folder(tmp_path, 0)),
    )
    assert own == requests[0]
    assert isinstance(before, UnmatchedOutputError)


def test_without_the_tokens_that_were_read_an_id_that_was_used_again_is_refused(tmp_path: Path) -> None:
    requests = [CapturedRequest(number, name, None, [1, 2], 0) for number, name in enumerate("qqr")]
    outputs = [Output("q", [1, 2], [3]), Output("r", [1, 2], [3])]
    again, once = match_outputs(outputs, requests, CapturedInputs(tmp_path))
    assert "give each request an id of its own" in str(again)
    assert once == requests[2]


@pytest.mark.parametrize(
    ("sequences", "text"),
    [
        (
            [sequence(0, 0, [1, 2], [3, 4, 5]), sequence(1, 0, [1, 2], [3, 4, 5])],
            "problems 0 and 1 have the same captured request",
        ),
        ([sequence(0, 0, [1, 3], [3, 4, 5])], "problem 0 has another prompt than its request 0"),
        ([sequence(4, 2, [1, 2], [3, 5, 5])], "problem 4: its request 2 of run-00000 read token 4 at position 3, expected 5"),
    ],
)
def test_sealing_refuses_sequences_that_are_not_their_requests(sequences: list[Sequence], text: str, tmp_path: Path) -> None:
    capture(tmp_path, [Run(run.name, run.prompt, run.output, run.internal) for run in REQUESTS], 2)
    with pytest.raises(TraceError, match=text):
        finish_trace(tmp_path, METADATA, sequences, drop_other_requests=True)
    assert read_requests(run_folder(tmp_path, 0))
