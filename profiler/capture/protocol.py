"""What a collecting process and vLLM's workers say to each other: three calls over `LLM.collective_rpc`.

| call | arguments | answer |
|---|---|---|
| `specmoe_start` | folder, tokens whose router inputs are recorded (None: as the engine was started) | `LoadedFacts` |
| `specmoe_status` | none | `LoadedFacts` while nothing is recorded, else `RecorderStatus` |
| `specmoe_stop` | none | `RecorderStatus`, when everything is on disk |

An answer with the key `error` is a refusal or a failure, as one line. With tensor parallelism the first worker records; the
others answer their rank and are ignored. The workers' side is `vllm_patch.worker`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast

from profiler.errors import EngineError, first_line

START, STATUS, STOP = "specmoe_start", "specmoe_status", "specmoe_stop"


class RecorderFacts(TypedDict):
    """The model as loaded, and the memory that capture takes: bytes on the device, and at most on the host."""

    moe_layers: list[int]
    num_experts: int
    top_k: int
    device_bytes: int
    host_bytes: int


class LoadedFacts(RecorderFacts):
    """... and how its routers were reached. known_release: whether this vLLM's sources were read."""

    hook: str
    known_release: bool


class RecorderStatus(TypedDict):
    """rows: written so far. unlabeled: requests without a problem id. waits: how often the engine waited for the writer."""

    rows: int
    requests: int
    unlabeled: int
    waits: int
    wait_seconds: float


class Workers:
    """The workers of `llm`, a `vllm.LLM`. Every call raises `EngineError` if a worker refuses, fails or does not know the call.

    advice: what to do where the plugin is not loaded.
    """

    def __init__(self, llm: Any, advice: str) -> None:
        self._llm = llm
        self._advice = advice

    def start(self, folder: Path, hidden_tokens: int | None = None) -> LoadedFacts:
        """Record into `folder` from now on."""
        return cast("LoadedFacts", self._call(START, str(folder.resolve()), hidden_tokens))

    def facts(self) -> LoadedFacts:
        """The loaded model, while nothing is recorded."""
        return cast("LoadedFacts", self._call(STATUS))

    def check(self) -> None:
        """Raise `EngineError` if the recording has failed."""
        self._call(STATUS)

    def stop(self) -> RecorderStatus:
        """Write everything out and stop recording."""
        return cast("RecorderStatus", self._call(STOP))

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
