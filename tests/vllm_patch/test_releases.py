"""The table of hooks covers every release once."""

from __future__ import annotations

import itertools

import pytest

from vllm_patch.releases import (
    CPU_HOOKS,
    HOOKS,
    NEWEST,
    OLDEST,
    Hook,
    UnsupportedReleaseError,
    is_known,
    parse_release,
    resolve_hook,
)


@pytest.mark.parametrize(
    ("version", "cpu", "name"),
    [
        ("0.12.0", False, "layer select_experts (layer)"),
        ("0.13.1", False, "layer select_experts (layer)"),
        ("0.14.1", False, "layer _select_experts (layer)"),
        ("0.15.0", False, "router _compute_routing (router.base_router)"),
        ("0.23.0", False, "router _compute_routing (router.base_router)"),
        ("0.27.1", False, "router _compute_routing (router.base_router)"),
        ("0.27.1+cpu", True, "cpu_fused_moe.select_experts"),
        ("0.29.0+cpu", True, "experts.cpu_moe.select_experts"),
        ("0.30.0", True, "router _compute_routing (router.base_router)"),
        ("0.33.0", False, "router _compute_routing (router.base_router)"),
        ("1.2.0.dev3+gabc", False, "router _compute_routing (router.base_router)"),
    ],
)
def test_the_hook_of_a_release(version: str, cpu: bool, name: str) -> None:
    assert resolve_hook(version, cpu=cpu).name == name


@pytest.mark.parametrize("hooks", [HOOKS, CPU_HOOKS])
def test_ranges_follow_each_other(hooks: tuple[Hook, ...]) -> None:
    for before, after in itertools.pairwise(hooks):
        assert before.last < after.first or before.last == (0, 29)
        assert before.first <= before.last


def test_older_and_unreadable_releases_are_refused() -> None:
    with pytest.raises(UnsupportedReleaseError, match=r"vLLM 0\.11\.2: routing can be recorded from 0\.12 on"):
        resolve_hook("0.11.2", cpu=False)
    with pytest.raises(UnsupportedReleaseError, match=r"vLLM 0\.20\.0 on CPU: routing can be recorded from 0\.24 on"):
        resolve_hook("0.20.0", cpu=True)
    with pytest.raises(UnsupportedReleaseError, match="expected a release such as"):
        parse_release("dev")


def test_newer_releases_are_not_known() -> None:
    assert (OLDEST, NEWEST) == ((0, 12), (0, 33))
    assert is_known("0.33.1")
    assert not is_known("0.34.0")
    assert not is_known("1.0.0")
