"""Write the routing of a run as a trace, so that a simulation can be asked about exactly these tokens."""

from __future__ import annotations

import platform
from collections.abc import Sequence as List
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from profiler.capture.finish import finish_trace
from profiler.capture.metadata import captured_metadata
from profiler.capture.requests import Sequence
from profiler.capture.sealing import run_folder
from profiler.trace.reader import Trace
from profiler.trace.schema import Metadata, ModelMetadata
from profiler.trace.stream import RoutingWriter
from profiler.trace.writer import check_free, public_command, write_metadata
from speculation.runtime.steps import ForwardPass


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where a prompt comes from, for the trace's table of problems.

    Attributes:
        dataset: Name of the dataset.
        source_key: The problem's key there.
        prompt: Its text; None if it was given as tokens.
    """

    dataset: str
    source_key: str
    prompt: str | None


class RoutingRecorder:
    """Records the routing of problems that run one batch after the other.

    Call `start` for each batch, pass every step to `add`, and call `finish` with what the batch generated. `seal` writes the
    trace.

    Args:
        out: The directory of the trace; must not exist, or be empty.
        model: Facts of the model.
        capture: How it is run, for the metadata.
        sampling: Settings of the sampling, for the metadata.

    Raises:
        TraceError: `out` is not free.
    """

    def __init__(self, out: Path, model: ModelMetadata, capture: dict[str, Any], sampling: dict[str, Any]) -> None:
        check_free(out)
        self._out = out
        self._metadata: Metadata = captured_metadata(
            model,
            {},
            engine="transformers",
            versions={name: version(name) for name in ("transformers", "torch")} | {"python": platform.python_version()},
            hook="the experts function of the offloading runtime",
            capture=capture,
            sampling=sampling,
            command=public_command(),
        )
        folder = run_folder(out, 0)
        folder.mkdir(parents=True)
        write_metadata(out, self._metadata)
        self._writer = RoutingWriter(folder, model)
        self._sequences: list[Sequence] = []
        self._rows: list[list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]] = []

    def start(self, prompts: int) -> None:
        """Begin a batch of so many prompts."""
        self._rows = [[] for _ in range(prompts)]

    def add(self, step: ForwardPass, expert_ids_NLK: npt.NDArray[np.int64], weights_NLK: npt.NDArray[np.float32]) -> None:
        """Add a step: the experts of its real tokens, in the order of `ForwardPass.is_real_BT`."""
        row_N = np.nonzero(step.is_real_BT)[0]
        for row in step.rows:
            chosen = row_N == row
            self._rows[row].append((expert_ids_NLK[chosen], weights_NLK[chosen]))

    def finish(
        self,
        sources: List[PromptSource],
        prompt_ids: List[list[int]],
        output_ids: List[list[int]],
        texts: List[tuple[str, str]],
    ) -> None:
        """End a batch.

        Args:
            sources: Where its prompts come from.
            prompt_ids, output_ids: Their tokens, and those that were generated.
            texts: The generated text and the reason why it ended, for each.
        """
        for source, prompt, output, (text, reason), found in zip(
            sources, prompt_ids, output_ids, texts, self._rows, strict=True
        ):
            problem = len(self._sequences)
            ids_TLK, weights_TLK = (np.concatenate(parts) for parts in zip(*found, strict=True))
            self._writer.add(problem, np.arange(len(ids_TLK)), ids_TLK, weights_TLK)
            self._sequences.append(
                Sequence(
                    problem_id=problem,
                    captured_as=(0, problem),
                    dataset=source.dataset,
                    source_key=source.source_key,
                    prompt=source.prompt,
                    output=text,
                    prompt_token_ids=prompt,
                    output_token_ids=output,
                    finish_reason=reason,
                )
            )

    def seal(self) -> Trace:
        """Write the trace of all batches that are finished.

        Raises:
            TraceError: Nothing was captured.
        """
        self._writer.close()
        return finish_trace(self._out, self._metadata, self._sequences)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._writer.close()
