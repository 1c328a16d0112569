"""What is captured: options, and the environment variables by which engines' processes receive them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from profiler.errors import EngineError

# The plugin has the name too: it must not import this module where nothing is recorded.
_VARIABLE = "SPECMOE_CAPTURE"
# Inside vLLM's cache, for code that was compiled with the copies.
OWN_CACHE = "specmoe"
# The process that started an engine only to collect with it: the engine ends when that process does.
OWNER_VARIABLE = f"{_VARIABLE}_OWNER"


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What is recorded besides expert ids and weights. Engines read it from the environment of their worker processes.

    logits: all router logits, float16. hidden_layers: decoder layers whose router inputs are recorded, float16.
    hidden_tokens: no request is admitted to the recording of router inputs once so many tokens have been recorded.
    out: where a server records by itself from its start; empty for engines that are told when and where.
    rotate_megabytes: a server begins a new trace for new requests when the rows of this one have grown to this; 0 for never.
    """

    logits: bool = False
    hidden_layers: tuple[int, ...] = ()
    hidden_tokens: int = 20_000
    out: str = ""
    rotate_megabytes: int = 0

    def to_environment(self) -> dict[str, str]:
        """Variables that switch the plugin on with these options."""
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
        """The options, or None if capture is off. Raises `EngineError` on values that are no numbers."""
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
    """Layer numbers with commas, ascending. Raises `EngineError` on anything else."""
    if not re.fullmatch(r"(\d{1,5}(,\d{1,5})*)?", text.replace(" ", "")):
        raise EngineError(f"--capture-hidden {text!r}: expected layer numbers with commas, such as 1,5")
    return tuple(sorted({int(layer) for layer in text.split(",") if layer.strip()}))


def keep_compiled_code_apart() -> None:
    """Give vLLM a folder `specmoe` of its own inside its cache: captured and plain runs share its key for compiled code.

    Does nothing in processes that inherit the folder.
    """
    plain = os.environ.get("VLLM_CACHE_ROOT") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm"
    if Path(plain).name != OWN_CACHE:
        os.environ["VLLM_CACHE_ROOT"] = str(Path(plain) / OWN_CACHE)
