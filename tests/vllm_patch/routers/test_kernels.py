"""Capture makes vLLM choose kernels that can be recorded: on stand-ins for vLLM's selection functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest

from vllm_patch.routers.kernels import recordable_kernels

PACKAGE = "vllm.model_executor.layers.fused_moe"


class Experts:
    """A kernel as vLLM's from 0.20 on."""

    @staticmethod
    def is_monolithic() -> bool:
        return False

    @staticmethod
    def is_supported_config(kernel: type[Experts], config: object) -> tuple[bool, str | None]:
        return kernel is not Unsupported, None


class Unsupported(Experts):
    pass


class Slow(Experts):
    pass


class Fused(Experts):
    @staticmethod
    def is_monolithic() -> bool:
        return True


class FusedOnLargeModels(Fused):
    """As some of vLLM's, it asks the base class and then decides for itself."""

    @staticmethod
    def is_supported_config(kernel: type[Experts], config: object) -> tuple[bool, str | None]:
        return Experts.is_supported_config(kernel, config)


class FusedAlways(Fused):
    """It does not ask the base class."""

    @staticmethod
    def is_supported_config(kernel: type[Experts], config: object) -> tuple[bool, str | None]:
        return True, None


class Faulty(Experts):
    """As in a release whose text about a kernel cannot be formatted."""

    @staticmethod
    def is_supported_config(kernel: type[Experts], config: object) -> tuple[bool, str | None]:
        raise KeyError("uint4b8")


class Twin(Experts):
    pass


Select = Callable[..., tuple[str, type[Experts]]]


@pytest.fixture
def select(monkeypatch: pytest.MonkeyPatch) -> Select:
    """A selection function as vLLM's, in stand-ins for vLLM's modules; call it where vLLM's quantization methods would."""

    def select_some_moe_backend(config: Any) -> tuple[str, type[Experts]]:
        names = config.kernels if config.moe_backend == "auto" else [config.moe_backend]
        for name in names:
            for kernel in config.kernels.get(name, ()):
                if kernel.is_supported_config(kernel, config)[0]:
                    return name, kernel
        raise ValueError("no kernel supports this")

    backends = Literal["auto", "fast", "fused", "triton", "marlin"]
    modules: dict[str, dict[str, Any]] = {
        f"{PACKAGE}.modular_kernel": {"FusedMoEExperts": Experts},
        f"{PACKAGE}.oracle": {"__path__": []},
        f"{PACKAGE}.oracle.some": {"select_some_moe_backend": select_some_moe_backend},
        "vllm.quantization": {"select_some_moe_backend": select_some_moe_backend},
        "vllm.config.kernel": {"MoEBackend": backends},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    quantization: Any = sys.modules["vllm.quantization"]
    return lambda *args, **kwargs: quantization.select_some_moe_backend(*args, **kwargs)


def config(moe_backend: str = "auto", **kernels: list[type[Experts]]) -> SimpleNamespace:
    """A layer's config, with the kernels of each backend, the fastest first."""
    return SimpleNamespace(moe_backend=moe_backend, kernels=kernels)


@pytest.mark.parametrize("fused", [Fused, FusedOnLargeModels])
def test_the_next_kernel_in_vllms_order_is_taken(select: Select, fused: type[Experts]) -> None:
    layer = config(fast=[fused], triton=[Unsupported, Twin], marlin=[Slow])
    with recordable_kernels() as kernels:
        assert select(layer) == ("triton", Twin)
        assert select(config=layer) == ("triton", Twin)
    assert kernels.replaced("Twin") == fused.__name__


def test_a_kernel_that_can_be_recorded_is_left_alone(select: Select) -> None:
    with recordable_kernels() as kernels:
        assert select(config(triton=[Twin], fast=[Fused])) == ("triton", Twin)
    assert kernels.replaced("Twin") is None


def test_after_loading_vllm_chooses_as_before(select: Select) -> None:
    layer = config(fast=[Fused], triton=[Twin])
    original: Any = sys.modules[f"{PACKAGE}.oracle.some"]
    before = original.select_some_moe_backend
    with recordable_kernels():
        # A module that is imported while the model loads.
        imported = original.select_some_moe_backend
        assert imported(layer)[1] is Twin
    assert imported(layer)[1] is Fused
    assert select(layer)[1] is Fused
    assert original.select_some_moe_backend is before
    assert Experts.is_supported_config(Fused, layer) == (True, None)


def test_a_requested_backend_is_kept_if_one_of_its_kernels_can_be_recorded(select: Select) -> None:
    with recordable_kernels() as kernels:
        assert select(config("fused", triton=[Slow], fused=[Fused, Twin])) == ("fused", Twin)
    assert kernels.replaced("Twin") == "Fused"


def test_a_requested_backend_without_one_stays_and_the_flags_to_set_are_named(select: Select) -> None:
    with recordable_kernels() as kernels:
        assert select(config("fused", fused=[Fused], triton=[Twin], marlin=[Slow])) == ("fused", Fused)
    assert kernels.advice("Fused") == (
        "use --moe-backend auto (Twin) or --moe-backend triton (Twin) or --moe-backend marlin (Slow); "
        "in a program, moe_backend='auto'"
    )


def test_where_no_other_kernel_exists_the_reason_is_given(select: Select) -> None:
    with recordable_kernels() as kernels:
        assert select(config(fused=[Fused], triton=[Unsupported])) == ("fused", Fused)
    assert kernels.advice("Fused") == (
        "vLLM has no other kernel for this model on this device (no kernel supports this): use another checkpoint or device"
    )


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [([FusedAlways, Twin], "vLLM takes FusedAlways whatever it supports"), ([Fused, Faulty], "'uint4b8'")],
)
def test_the_engine_runs_with_its_own_choice_whatever_goes_wrong(
    select: Select, kernels: list[type[Experts]], reason: str
) -> None:
    with recordable_kernels() as choices:
        assert select(config(fast=kernels)) == ("fast", kernels[0])
    assert f"no other kernel for this model on this device ({reason})" in choices.advice(kernels[0].__name__)


def test_what_vllm_refuses_is_refused_as_before(select: Select) -> None:
    with recordable_kernels(), pytest.raises(ValueError, match="no kernel supports this"):
        select(config(triton=[Unsupported]))


def test_releases_without_selection_functions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.modular_kernel", ModuleType("modular_kernel"))
    with recordable_kernels() as kernels:
        pass
    assert "use vLLM 0.20 or newer" in kernels.advice("Fused")
