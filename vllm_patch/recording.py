"""Record the routing of your own `vllm.LLM`: call `enable()` before vLLM starts, and generate inside a `Recording`.

docs/guide/capture.md shows a complete program.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from profiler.capture.finish import finish_trace
from profiler.capture.inputs import CapturedInputs
from profiler.capture.metadata import captured_metadata
from profiler.capture.options import CaptureOptions, separate_compile_cache
from profiler.capture.protocol import Workers
from profiler.capture.requests import ABORTED, CapturedRequest, Sequence, read_requests
from profiler.capture.sealing import run_folder
from profiler.errors import EngineError, TraceError
from profiler.live.publication import Publication
from profiler.models.resolve import loaded_model
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata
from profiler.trace.writer import write_metadata
from vllm_patch.matching import Output, UnmatchedOutputError, match_outputs
from vllm_patch.routers.speculative import describe_speculation

DATASET = "own"


def enable(options: CaptureOptions | None = None) -> None:
    """Switch capture on for the engines that this process starts from now on.

    Call it before vLLM starts: the engine's processes inherit the switch through environment variables. Captured engines get
    their own compile cache, because vLLM's key for compiled code does not distinguish captured and plain runs. They also
    skip kernels that select experts internally, where vLLM has another one; the trace's metadata names both.

    Args:
        options: What to record besides expert ids and weights, such as router logits. Default: nothing else.

    Example:
        >>> import vllm_patch
        >>> from profiler import CaptureOptions
        >>> vllm_patch.enable(CaptureOptions(logits=True))
    """
    os.environ.update((options or CaptureOptions()).to_environment())
    separate_compile_cache()


def live_metrics(llm: Any) -> dict[str, dict[tuple[str, ...], float]]:
    """The live metrics of an engine, as a server publishes them on `/metrics`.

    Args:
        llm: A `vllm.LLM`, started with `SPECMOE_LIVE=1` in the environment.

    Returns:
        The value of each metric by its name and the values of its labels, as text and in the order of docs/guide/live.md.

    Raises:
        EngineError: The engine has no live metrics, or a worker fails.

    Example:
        >>> import os
        >>> os.environ["SPECMOE_LIVE"] = "1"  # before vLLM starts
        >>> from vllm import LLM
        >>> from profiler.models.resolve import demo_model_folder
        >>> import vllm_patch
        >>> llm = LLM(str(demo_model_folder()))
        >>> llm.generate(["Why is the sky blue?"])
        >>> vllm_patch.live_metrics(llm)["specmoe_tokens"]
    """
    answer = Workers(llm, "set SPECMOE_LIVE=1 before vLLM starts").live()
    return Publication.from_json(answer["publication"]).samples.values


class Recording:
    """A context manager that records all requests of an engine and writes a complete trace when it exits.

    Every sample of every output passed to `add` becomes a problem, in that order. Requests whose output is never added
    (aborted ones) keep the routing of their prompt and are marked `abort`. If the block raises an exception other than one
    that `add` raised, no trace is written, and the captured rows stay in `out/capture`.

    Args:
        llm: The `vllm.LLM` to record, started after `enable()`.
        out: The trace directory to write. It must not exist, or be empty.

    Attributes:
        out: The trace directory.
        trace: The complete trace, a `profiler.Trace`; None until the block has exited.

    Raises:
        EngineError: On entry, if the engine cannot record; the message says why. On exit, if recording failed.
        TraceError: On entry, if `out` exists and is not an empty folder. On exit, if no request ran inside the block. Also on
            exit, once a trace of everything else is complete, if an output passed to `add` was not generated inside the
            block or was added twice.

    Example:
        >>> import vllm_patch
        >>> vllm_patch.enable()
        >>> from vllm import LLM
        >>> from profiler.models.resolve import demo_model_folder
        >>> llm = LLM(str(demo_model_folder()))
        >>> with vllm_patch.Recording(llm, "traces/mine") as recording:
        ...     recording.add(llm.generate(["Why is the sky blue?"]))
        >>> recording.trace.problems.num_rows
        1
    """

    def __init__(self, llm: Any, out: str | Path) -> None:
        self.out = Path(out)
        self._llm = llm
        self._workers = Workers(llm, "call vllm_patch.enable() before starting the engine")
        self._outputs: dict[int, Any] = {}
        self._refusal: TraceError | None = None
        self.trace: Trace | None = None

    def add(self, outputs: Iterable[Any]) -> None:
        """Add outputs to the trace, with their prompts and generated text.

        Args:
            outputs: What `llm.generate` or `llm.chat` returned inside the block: finished `vllm.RequestOutput` objects.

        Raises:
            TraceError: An output is of another kind (such as that of `llm.beam_search`), not finished, or was added before. No
                output of this call is added. The recording continues, and its trace is written even if the error leaves the
                block.
        """
        if self.trace is not None:
            raise TraceError(f"{self.out} is complete: add outputs inside the block that generates them")
        if not isinstance(outputs, Iterable):
            self._refusal = TraceError(f"{type(outputs).__name__} cannot be added to a recording: expected a list of outputs")
            raise self._refusal
        # By identity: the outputs are kept, so no other object gets the same.
        added: dict[int, Any] = {}
        for output in outputs:
            again = id(output) in added or id(output) in self._outputs
            reason = _reason_against(output) or ("it was added before" if again else None)
            if reason is not None:
                self._refusal = TraceError(f"{type(output).__name__} cannot be added to a recording: {reason}")
                raise self._refusal
            added[id(output)] = output
        self._outputs |= added

    def __enter__(self) -> Self:
        if not hasattr(self._llm, "llm_engine"):
            raise EngineError(
                f"{type(self._llm).__name__} cannot be recorded by Recording: expected a vllm.LLM; record other engines as a "
                "server is recorded, with CaptureOptions(out=...)"
            )
        if self.out.exists() and any(self.out.iterdir()):
            raise TraceError(f"{self.out} exists and is not an empty folder: choose another one")
        self._facts = self._workers.start(run_folder(self.out, 0))
        try:
            # Makes the captured rows usable if this process is killed.
            write_metadata(self.out, self._metadata())
        except BaseException:
            # The caller gets no recording, so the engine must stop recording.
            self._workers.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        answer = self._workers.stop()
        if kind is not None and error is not self._refusal:
            return
        requests = read_requests(run_folder(self.out, 0))
        if not requests:
            shutil.rmtree(self.out)
            raise TraceError(f"{self.out}: no request ran during the recording")
        metadata = self._metadata()
        waits = {"writer_waits": answer["waits"], "writer_wait_seconds": round(answer["wait_seconds"], 3)}
        inputs = CapturedInputs(run_folder(self.out, 0))
        sequences, unmatched = self._sequences(requests, inputs)
        gaps = [f"{len(unmatched)} added outputs are left out, the first because {unmatched[0]}"] if unmatched else []
        metadata = metadata.model_copy(update={"capture": metadata.capture | waits, "gaps": gaps})
        self.trace = finish_trace(self.out, metadata, sequences, inputs=inputs)
        if unmatched and error is None:
            raise TraceError(f"{unmatched[0]}; {self.out} holds the routing of everything else")

    def _sequences(
        self, requests: list[CapturedRequest], inputs: CapturedInputs
    ) -> tuple[list[Sequence], list[UnmatchedOutputError]]:
        """The sequences of the added outputs and of all other requests, and why outputs are not among them."""
        samples = [(output, sample) for output in self._outputs.values() for sample in output.outputs]
        outputs = [
            Output(
                f"{sample.index}_{output.request_id}" if len(output.outputs) > 1 or sample.index else output.request_id,
                list(output.prompt_token_ids),
                list(sample.token_ids),
                # Unless vLLM returns all samples of a request together, each output has those that have just finished.
                sample_name=f"{sample.index}_{output.request_id}",
            )
            for output, sample in samples
        ]
        found = match_outputs(outputs, requests, inputs, drafts=self._llm.llm_engine.vllm_config.speculative_config is not None)
        sequences: list[Sequence] = []
        for (output, sample), named, request in zip(samples, outputs, found, strict=True):
            if isinstance(request, CapturedRequest):
                sequences.append(
                    Sequence(
                        problem_id=len(sequences),
                        captured_as=(0, request.number),
                        dataset=DATASET,
                        source_key=named.name,
                        prompt=output.prompt or self._text(named.prompt_token_ids),
                        output=sample.text,
                        prompt_token_ids=named.prompt_token_ids,
                        output_token_ids=named.token_ids,
                        cached_tokens=request.cached_tokens,
                        finish_reason=sample.finish_reason or ABORTED,
                    )
                )
        used = {request.number for request in found if isinstance(request, CapturedRequest)}
        for request in requests:
            if request.number not in used:
                sequences.append(
                    Sequence(
                        problem_id=len(sequences),
                        captured_as=(0, request.number),
                        dataset=DATASET,
                        source_key=request.request_id,
                        prompt=self._text(request.prompt_token_ids),
                        output="",
                        prompt_token_ids=request.prompt_token_ids,
                        output_token_ids=[],
                        cached_tokens=request.cached_tokens,
                        finish_reason=ABORTED,
                    )
                )
        return sequences, [request for request in found if isinstance(request, UnmatchedOutputError)]

    def _text(self, token_ids: list[int]) -> str:
        """The prompt's text, or its token ids if the engine has no tokenizer."""
        if self._llm.llm_engine.vllm_config.model_config.skip_tokenizer_init:
            return " ".join(map(str, token_ids))
        return str(self._llm.get_tokenizer().decode(token_ids))

    def _metadata(self) -> Metadata:
        import vllm

        config = self._llm.llm_engine.vllm_config
        model = loaded_model(config.model_config.model, config.model_config.revision, self._facts)
        return captured_metadata(
            model,
            {
                "moe_layers": self._facts["moe_layers"],
                "num_experts": self._facts["num_experts"],
                "top_k": self._facts["top_k"],
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
            },
            engine="vllm",
            versions={"vllm": vllm.__version__},
            hook=self._facts["hook"],
            capture={
                "prefix_caching": bool(config.cache_config.enable_prefix_caching),
                "moe_kernels": self._facts["moe_kernels"],
            }
            | describe_speculation(config),
        )


def _reason_against(output: Any) -> str | None:
    """Why an object that a program adds is not a finished output of generated text; None if it is one."""
    if hasattr(output, "sequences") and not hasattr(output, "request_id"):
        return (
            "beam search runs each step of each beam as a request of its own, which vLLM does not name: "
            "generate samples with SamplingParams(n=...) instead"
        )
    samples = getattr(output, "outputs", None)
    if not isinstance(samples, list) or not all(hasattr(sample, "token_ids") for sample in samples):
        return "expected vllm.RequestOutput, as llm.generate returns it"
    return None if output.finished else f"request {output.request_id!r} has not finished"
