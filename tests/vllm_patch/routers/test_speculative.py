"""Speculative decoding without vLLM: what is refused, and that rows of rejected drafts never reach the trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_patch.releases import resolve_hook
from vllm_patch.routers.hook import UnsupportedModelError
from vllm_patch.routers.speculative import METHODS, describe_speculation, refuse_unsupported_speculation

ROUTER_HOOK = resolve_hook("0.32.0", cpu=True)
SHARED_FUNCTION_HOOK = resolve_hook("0.29.0", cpu=True)


def make_config(method: str | None, *, async_scheduling: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=None if method is None else SimpleNamespace(method=method, num_speculative_tokens=4),
        scheduler_config=SimpleNamespace(async_scheduling=async_scheduling),
    )


@pytest.mark.parametrize("method", METHODS)
def test_known_methods_are_recorded_and_described(method: str) -> None:
    config = make_config(method)
    refuse_unsupported_speculation(config, ROUTER_HOOK)
    assert describe_speculation(config) == {"speculative_decoding": {"method": method, "draft_tokens": 4}}


@pytest.mark.parametrize("method", ["ngram_gpu", "dspark", "dflash", "extract_hidden_states", "custom_class", "new"])
def test_other_methods_are_refused(method: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"method '{method}': only ngram"):
        refuse_unsupported_speculation(make_config(method), ROUTER_HOOK)


def test_asynchronous_scheduling_and_shared_functions_are_refused_with_drafts_only() -> None:
    refuse_unsupported_speculation(make_config(None, async_scheduling=True), SHARED_FUNCTION_HOOK)
    assert describe_speculation(make_config(None)) == {}
    with pytest.raises(UnsupportedModelError, match="async_scheduling=False"):
        refuse_unsupported_speculation(make_config("eagle", async_scheduling=True), ROUTER_HOOK)
    with pytest.raises(UnsupportedModelError, match="run without speculative_config"):
        refuse_unsupported_speculation(make_config("ngram"), SHARED_FUNCTION_HOOK)
