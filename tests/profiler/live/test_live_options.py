"""Options of live metrics from environment variables."""

from __future__ import annotations

import pytest

from profiler.errors import EngineError
from profiler.live.options import LiveOptions, ShadowOptions


def test_off_by_default_and_switched_on_by_either_variable() -> None:
    assert LiveOptions.from_environment({}) is None
    assert LiveOptions.from_environment({"SPECMOE_LIVE": "0"}) is None
    assert LiveOptions.from_environment({"SPECMOE_LIVE": "1"}) == LiveOptions()
    assert LiveOptions.from_environment({"SPECMOE_SHADOW": "runs/a"}) == LiveOptions(shadow=ShadowOptions(run="runs/a"))


def test_every_variable_is_read() -> None:
    found = LiveOptions.from_environment(
        {
            "SPECMOE_LIVE": "1",
            "SPECMOE_LIVE_WINDOW": "30",
            "SPECMOE_LIVE_EXPERTS": "1",
            "SPECMOE_LIVE_PORT": "0.0.0.0:9464",
            "SPECMOE_SHADOW": "runs/a",
            "SPECMOE_SHADOW_SHARE": ".5",
            "SPECMOE_SHADOW_TOKENS": "1000",
            "SPECMOE_SHADOW_CPU": "1",
            "SPECMOE_SHADOW_POLICIES": "slru, lru",
            "SPECMOE_SHADOW_SLOTS": "4,2,4",
        }
    )
    shadow = ShadowOptions(run="runs/a", share=0.5, window_tokens=1000, cpu=1.0, policies=("slru", "lru"), slots=(2, 4))
    assert found == LiveOptions(window_seconds=30.0, experts=True, address="0.0.0.0:9464", shadow=shadow)
    assert found.host_and_port == ("0.0.0.0", 9464)
    assert LiveOptions(address="9464").host_and_port == ("127.0.0.1", 9464)
    assert LiveOptions().host_and_port is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SPECMOE_LIVE_WINDOW", "0", "a number from 1 to 86400"),
        ("SPECMOE_LIVE_WINDOW", "nan", "a number from 1 to 86400"),
        ("SPECMOE_LIVE_PORT", "http", "a port or HOST:PORT"),
        ("SPECMOE_LIVE_PORT", "70000", "a port or HOST:PORT"),
        ("SPECMOE_SHADOW_SHARE", "5%", "a number from 1e-06 to 1"),
        ("SPECMOE_SHADOW_SHARE", "0", "a number from 1e-06 to 1"),
        ("SPECMOE_SHADOW_TOKENS", "-1", "a number from 1 to 1e"),
        ("SPECMOE_SHADOW_CPU", "2", "a number from 0.001 to 1"),
        ("SPECMOE_SHADOW_SLOTS", "a", "experts per layer"),
        ("SPECMOE_SHADOW_SLOTS", "0,2", "experts per layer"),
    ],
)
def test_other_values_are_refused_by_name(name: str, value: str, expected: str) -> None:
    with pytest.raises(EngineError, match=f"^{name}={value}: expected {expected}"):
        LiveOptions.from_environment({"SPECMOE_SHADOW": "run", name: value})
