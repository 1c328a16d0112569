"""Capture options, and the environment variables that pass them to the engine's processes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from profiler.errors import EngineError, EngineUsageError

# The plugin repeats this name, because it must not import this module while capture is off.
_VARIABLE = "SPECMOE_CAPTURE"
# Folder inside vLLM's cache for code that was compiled with capture's copies in it.
OWN_CACHE = "specmoe"
# Id of the process that started an engine only to collect with it: the engine ends when that process ends.
OWNER_VARIABLE = f"{_VARIABLE}_OWNER"


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What is recorded besides expert ids and weights. Worker processes read it from their environment.

    Attributes:
        logits: Record all router logits, float16.
        hidden_layers: Decoder layers whose router inputs are recorded, float16.
        hidden_tokens: Once the router inputs of this many tokens have been recorded, those of further requests are not.
        out: Folder that a server records into from its start; empty for engines that a collector starts and stops recording on.
        rotate_megabytes: When a trace's rows reach this size, a server starts a new trace for new requests; 0 for never.
    """

    logits: bool = False
    hidden_layers: tuple[int, ...] = ()
    hidden_tokens: int = 20_000
    out: str = ""
    rotate_megabytes: int = 0

    def to_environment(self) -> dict[str, str]:
        """The environment variables that switch the plugin on with these options."""
        return {
            _VARIABLE: "1",
            f"{_VARIABLE}_LOGITS": str(int(self.logits)),
            f"{_VARIABLE}_HIDDEN": ",".join(map(str, self.hidden_layers)),
            f"{_VARIABLE}_HIDDEN_TOKENS": str(self.hidden_tokens),
            f"{_VARIABLE}_OUT": self.out,
            f"{_VARIABLE}_ROTATE_MB": str(self.rotate_megabytes),
        }

    @classmethod
    def from_environment(cls, environment: dict[str, str]) -> Self | None:
        """The options, or None if capture is off. Raises `EngineError` on values that are not whole numbers."""
        if environment.get(_VARIABLE) != "1":
            return None
        try:
            return cls(
                logits=bool(int(environment.get(f"{_VARIABLE}_LOGITS") or 0)),
                hidden_layers=tuple(sorted({int(x) for x in (environment.get(f"{_VARIABLE}_HIDDEN") or "").split(",") if x})),
                hidden_tokens=int(environment.get(f"{_VARIABLE}_HIDDEN_TOKENS") or cls.hidden_tokens),
                out=environment.get(f"{_VARIABLE}_OUT", ""),
                rotate_megabytes=int(environment.get(f"{_VARIABLE}_ROTATE_MB") or 0),
            )
        except ValueError as error:
            raise EngineError(
                f"{_VARIABLE}_LOGITS, _HIDDEN, _HIDDEN_TOKENS or _ROTATE_MB: expected whole numbers: {error}"
            ) from error


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse comma-separated layer numbers; returned in ascending order. Raises `EngineError` on anything else."""
    if not re.fullmatch(r"(\d{1,5}(,\d{1,5})*)?", text.replace(" ", "")):
        raise EngineUsageError(f"capture_hidden {text!r}: expected layer numbers separated by commas, such as 1,5")
    return tuple(sorted({int(layer) for layer in text.split(",") if layer.strip()}))


def separate_compile_cache() -> None:
    """Point vLLM's cache at its subfolder `specmoe`: vLLM gives captured and plain runs the same key for compiled code.

    Does nothing in processes that inherit the setting.
    """
    plain = os.environ.get("VLLM_CACHE_ROOT") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm"
    if Path(plain).name != OWN_CACHE:
        os.environ["VLLM_CACHE_ROOT"] = str(Path(plain) / OWN_CACHE)
