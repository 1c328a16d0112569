"""Which function selects experts in which vLLM release. No other module of this package depends on the version.

The table was read from the source of every release it names; `docs/results/releases.md` lists the releases that were run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# The attribute of a layer or router that vLLM's source calls if it was patched (`vllm_patch.source`).
SOURCE_ATTRIBUTE = "specmoe_copy"
_PACKAGE = "vllm.model_executor.layers.fused_moe"

Release = tuple[int, int]


class UnsupportedReleaseError(Exception):
    """There is no hook for this vLLM release. The message says which releases are supported."""


@dataclass(frozen=True)
class Hook:
    """Where the releases `first` to `last` select experts.

    module, function: the function that selects experts; it takes (hidden_states, router_logits, ...) and returns
    (weights, ids, ...). owner: the object whose method is wrapped: each MoE layer, its router, or, for monolithic CPU kernels,
    the module, whose function all layers share. wraps: the name of that method or function.
    logical: whether the ids are the model's own even when vLLM balances load over replicas of experts (EPLB).
    """

    first: Release
    last: Release
    module: str
    function: str
    owner: Literal["layer", "router", "module"]
    wraps: str
    logical: bool = True
    cpu: bool = False

    @property
    def name(self) -> str:
        """The wrapped method or function and its module, for metadata."""
        where = self.module.removeprefix(f"{_PACKAGE}.")
        return f"{where}.{self.wraps}" if self.owner == "module" else f"{self.owner} {self.wraps} ({where})"

    @property
    def source(self) -> str:
        """Path of the source file inside the `vllm` package."""
        return self.module.removeprefix("vllm.").replace(".", "/") + ".py"


HOOKS = (
    Hook((0, 12), (0, 13), f"{_PACKAGE}.layer", "FusedMoE.select_experts", "layer", "select_experts", logical=False),
    Hook((0, 14), (0, 14), f"{_PACKAGE}.layer", "FusedMoE._select_experts", "layer", "_select_experts", logical=False),
    Hook((0, 15), (0, 23), f"{_PACKAGE}.router.base_router", "BaseRouter.select_experts", "router", "_compute_routing"),
    Hook((0, 24), (0, 33), f"{_PACKAGE}.router.base_router", "BaseRouter._select_experts", "router", "_compute_routing"),
)
# Up to 0.29, CPU builds select experts inside their kernels, with a function of the kernel's module.
CPU_HOOKS = (
    Hook((0, 24), (0, 27), f"{_PACKAGE}.cpu_fused_moe", "select_experts", "module", "select_experts", cpu=True),
    Hook((0, 28), (0, 29), f"{_PACKAGE}.experts.cpu_moe", "select_experts", "module", "select_experts", cpu=True),
    *(hook for hook in HOOKS if hook.last >= (0, 30)),
)
OLDEST, NEWEST = HOOKS[0].first, HOOKS[-1].last
OLDEST_CPU = CPU_HOOKS[0].first
OLDEST_CPU_ROUTER: Release = (0, 30)


def parse_release(version: str) -> Release:
    """(major, minor) of a version such as `0.32.0+cpu`. Raises `UnsupportedReleaseError` if it is not a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found:
        raise UnsupportedReleaseError(f"vLLM reports version {version!r}: expected a release such as 0.32.0")
    return int(found.group(1)), int(found.group(2))


def resolve_hook(version: str, *, cpu: bool) -> Hook:
    """The hook of a release. Releases newer than all known ones get the newest hook.

    Raises `UnsupportedReleaseError` for releases older than the oldest known one.
    """
    release = parse_release(version)
    hooks = CPU_HOOKS if cpu else HOOKS
    oldest = OLDEST_CPU if cpu else OLDEST
    if release < oldest:
        where = " on CPU" if cpu else ""
        raise UnsupportedReleaseError(f"vLLM {version}{where}: routing can be recorded from {oldest[0]}.{oldest[1]} on")
    return next((hook for hook in hooks if release <= hook.last), hooks[-1])


def is_known(version: str) -> bool:
    """Whether the source of this release was read. For other releases, the first step shows whether the hook works."""
    return OLDEST <= parse_release(version) <= NEWEST
