"""Options of live metrics and of shadow mode, and the environment variables that pass them to the engine's processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from profiler.errors import EngineError

# The plugin repeats these two names, because it must not import this module while both are off.
SWITCH = "SPECMOE_LIVE"
SHADOW = "SPECMOE_SHADOW"
# The folder in which the engine's processes publish their metrics. The first process creates it, the others inherit it.
FOLDER_VARIABLE = f"{SWITCH}_DIR"


@dataclass(frozen=True, kw_only=True)
class ShadowOptions:
    """A predictor that is scored on live traffic, in a process of its own.

    Attributes:
        run: The run directory of the predictor.
        share: Share of the requests to score, above 0 and at most 1.
        window_tokens: Recall and hit rates are over the last scored requests with at most so many tokens together.
        cpu: Processor time that scoring may take, as a share of one core.
        policies: Eviction policies to play; names of `specmoe simulate`.
        slots: Cache sizes to play, in experts per layer; empty for a quarter and a half of the experts.
    """

    run: str
    share: float = 0.05
    window_tokens: int = 20_000
    cpu: float = 0.25
    policies: tuple[str, ...] = ("lru", "ewma")
    slots: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The options from the values of their fields, where JSON has made tuples lists."""
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class LiveOptions:
    """What is counted of a running engine.

    Attributes:
        window_seconds: Length of the rolling window.
        experts: Whether to publish the tokens of each expert: layers x experts time series.
        address: `PORT` or `HOST:PORT` of a metrics server of our own; empty for none.
        shadow: The predictor that is scored on live traffic; None for none.
    """

    window_seconds: float = 60.0
    experts: bool = False
    address: str = ""
    shadow: ShadowOptions | None = None

    @property
    def host_and_port(self) -> tuple[str, int] | None:
        """Where our own metrics server listens; None without one. Without a host, only on this machine."""
        if not self.address:
            return None
        host, _, port = self.address.rpartition(":")
        return host or "127.0.0.1", int(port)

    @classmethod
    def from_environment(cls, environment: dict[str, str]) -> Self | None:
        """The options, or None if live metrics are off. `SPECMOE_SHADOW` switches them on, too.

        Raises:
            EngineError: A variable has another value than expected.
        """
        run = environment.get(SHADOW, "")
        if environment.get(SWITCH) != "1" and not run:
            return None
        return cls(
            window_seconds=_number(environment, f"{SWITCH}_WINDOW", cls.window_seconds, 1, 86_400),
            experts=environment.get(f"{SWITCH}_EXPERTS") == "1",
            address=_address(environment),
            shadow=_shadow(environment, run) if run else None,
        )


def _shadow(environment: dict[str, str], run: str) -> ShadowOptions:
    names = [name.strip() for name in environment.get(f"{SHADOW}_POLICIES", "").split(",") if name.strip()]
    slots = environment.get(f"{SHADOW}_SLOTS", "")
    try:
        sizes = tuple(sorted({int(size) for size in slots.split(",") if size.strip()}))
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise EngineError(f"{SHADOW}_SLOTS={slots}: expected experts per layer separated by commas, such as 2,4")
    return ShadowOptions(
        run=run,
        # Not 0: that would be a shadow that never scores anything.
        share=_number(environment, f"{SHADOW}_SHARE", ShadowOptions.share, 1e-6, 1),
        window_tokens=int(_number(environment, f"{SHADOW}_TOKENS", ShadowOptions.window_tokens, 1, 10_000_000)),
        cpu=_number(environment, f"{SHADOW}_CPU", ShadowOptions.cpu, 0.001, 1),
        policies=tuple(dict.fromkeys(names)) or ShadowOptions.policies,
        slots=sizes,
    )


def _address(environment: dict[str, str]) -> str:
    address = environment.get(f"{SWITCH}_PORT", "").strip()
    port = address.rpartition(":")[2]
    if address and not (port.isdecimal() and 0 < int(port) < 65_536):
        raise EngineError(f"{SWITCH}_PORT={address}: expected a port or HOST:PORT, such as 9464 or 0.0.0.0:9464")
    return address


def _number(environment: dict[str, str], name: str, default: float, least: float, most: float) -> float:
    text = environment.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise EngineError(f"{name}={text}: expected a number from {least:g} to {most:g}")
    return value
