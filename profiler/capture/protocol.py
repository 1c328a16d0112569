"""The protocol between a collecting process and vLLM's workers: calls over `LLM.collective_rpc`.

| call | arguments | answer |
|---|---|---|
| `specmoe_start` | folder, budget of tokens with router inputs (None: the engine's own option) | `LoadedFacts` |
| `specmoe_status` | none | `RecorderStatus` during a recording, else `LoadedFacts` |
| `specmoe_stop` | none | `RecorderStatus`, once everything is on disk |
| `specmoe_live` | none | `LiveAnswer`: the live metrics, with everything counted that the engine has computed |

An answer with the key `error` reports a refusal or a failure, in one line. With tensor parallelism the first worker records;
the others answer with their rank and are ignored. The workers' side is `vllm_patch.worker`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast

from profiler.errors import EngineError, first_line

START, STATUS, STOP, LIVE = "specmoe_start", "specmoe_status", "specmoe_stop", "specmoe_live"


class RecorderFacts(TypedDict):
    """The loaded model, and the memory that capture takes: device_bytes, and host_bytes at most."""

    moe_layers: list[int]
    num_experts: int
    top_k: int
    device_bytes: int
    host_bytes: int


class LoadedFacts(RecorderFacts):
    """`RecorderFacts` and the hook that reaches the routers. known_release: whether this vLLM release is a known one.

    moe_kernels: class that computes experts -> the one that vLLM would use without capture; None if it is the same. deviations:
    what vLLM's routers compute differently from the model's own; `hook` says it too.
    """

    hook: str
    known_release: bool
    moe_kernels: dict[str, str | None]
    deviations: list[str]


class RecorderStatus(TypedDict):
    """Progress of a recording.

    rows: written so far. unlabeled: requests without a problem id. waits: how often the engine had to wait for the writer.
    """

    rows: int
    requests: int
    unlabeled: int
    waits: int
    wait_seconds: float


class LiveAnswer(TypedDict):
    """publication: a `profiler.live.publication.Publication` as JSON."""

    publication: str


class Workers:
    """The workers of `llm`, a `vllm.LLM`.

    Every method raises `EngineError` if a worker refuses, fails, or does not know the call.
    advice: what to do if the plugin is not loaded; that error's text ends with it.
    """

    def __init__(self, llm: Any, advice: str) -> None:
        self._llm = llm
        self._advice = advice

    def start(self, folder: Path, hidden_tokens: int | None = None) -> LoadedFacts:
        """Record into `folder` from now on."""
        return cast("LoadedFacts", self._call(START, str(folder.resolve()), hidden_tokens))

    def facts(self) -> LoadedFacts:
        """Facts of the loaded model; call it only while nothing is being recorded."""
        return cast("LoadedFacts", self._call(STATUS))

    def check(self) -> None:
        """Raise `EngineError` if the recording has failed."""
        self._call(STATUS)

    def stop(self) -> RecorderStatus:
        """Write everything out and stop recording."""
        return cast("RecorderStatus", self._call(STOP))

    def live(self) -> LiveAnswer:
        """The live metrics of the engine, which must have been started with `SPECMOE_LIVE=1`."""
        return cast("LiveAnswer", self._call(LIVE))

    def _call(self, name: str, *arguments: str | int | None) -> dict[str, Any]:
        try:
            answers: list[dict[str, Any]] = self._llm.collective_rpc(name, args=arguments)
        except Exception as error:
            if f"no attribute '{name}'" in str(error):
                raise EngineError(f"vLLM did not load the plugin 'specmoe' in its workers: {self._advice}") from error
            raise EngineError(f"vLLM's worker does not answer {name!r}: {first_line(error)}") from error
        for answer in answers:
            if "error" in answer:
                raise EngineError(f"capture failed: {answer['error']}")
        return answers[0]
