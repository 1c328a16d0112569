"""Make vLLM choose MoE kernels whose routing can be recorded.

Some kernels (vLLM calls them monolithic) take the router's logits and select the experts themselves, where no hook sees them.
vLLM has one selection function per quantization, `select_*_moe_backend`. It goes through the kernels, the fastest first, and
takes the first one that supports the model, the device and the settings. `recordable_kernels` repeats a selection that took a
monolithic kernel, with such kernels reported as unsupported, and so gets the next one in vLLM's own order. Nothing here names a
kernel or a device; docs/results/kernels.md shows the outcome.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any, get_args

_PACKAGE = "vllm.model_executor.layers.fused_moe"
_SELECTOR = re.compile(r"select_\w*moe_backend")
# The first release in which every quantization has a selection function.
FIRST_RELEASE = "0.20"
_MOST_NAMED = 3


class KernelChoices:
    """The kernels that were chosen while a model was loaded. Kernels are known by the names of their classes."""

    def __init__(self) -> None:
        self._active = True
        self._replaced: dict[str, str] = {}
        self._refusals: dict[str, str] = {}

    def replaced(self, kernel: str) -> str | None:
        """The kernel that vLLM would use instead of this one; None if this one is vLLM's own choice."""
        return self._replaced.get(kernel)

    def advice(self, kernel: str) -> str:
        """What to do about a kernel that selects experts internally and is used nevertheless."""
        advice = f"use vLLM {FIRST_RELEASE} or newer, where capture chooses another kernel, or another quantization"
        return self._refusals.get(kernel, advice)

    def _choosing(self, select: Callable[..., Any], base: Any) -> Callable[..., Any]:
        @functools.wraps(select)
        def choose(*args: Any, **kwargs: Any) -> Any:
            own = select(*args, **kwargs)
            # Once the model is loaded, modules that were imported meanwhile still have this function.
            if not self._active or not _is_monolithic(own):
                return own
            # Whatever goes wrong, the engine must run with vLLM's own choice.
            try:
                chosen = _select_recordable(select, base, args, kwargs)
                self._replaced[_kernel_of(chosen)] = _kernel_of(own)
            except Exception as error:
                with contextlib.suppress(Exception):
                    self._refusals[_kernel_of(own)] = _refusal(select, args, kwargs, error)
                return own
            return chosen

        return choose


@contextlib.contextmanager
def recordable_kernels() -> Iterator[KernelChoices]:
    """While the block runs, vLLM's selection functions skip kernels that select experts internally.

    Where no other kernel exists, vLLM keeps its own choice. Does nothing in releases without such functions.
    """
    choices = KernelChoices()
    base = _base_class()
    found = [] if base is None else _selectors()
    for module, name, select in found:
        setattr(module, name, choices._choosing(select, base))
    try:
        yield choices
    finally:
        choices._active = False
        for module, name, select in found:
            setattr(module, name, select)


def recordable_backends(select: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str]:
    """The values of `moe_backend` with which capture can record: value -> kernel. `auto` comes first if it is one of them.

    select: one of vLLM's selection functions, called with these arguments.
    """
    found = {}
    for backend in get_args(importlib.import_module("vllm.config.kernel").MoEBackend):
        positional = tuple(_with_backend(value, backend) for value in args)
        named = {name: _with_backend(value, backend) for name, value in kwargs.items()}
        with contextlib.suppress(Exception):  # of any type: the backend is unknown, or supports something else
            found[backend] = _kernel_of(_select_recordable(select, _base_class(), positional, named))
    return found


def _select_recordable(select: Callable[..., Any], base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `select` returns without monolithic kernels. Raises what it raises, `NotImplementedError` if it takes one anyway."""
    with _without_monolithic(base):
        chosen = select(*args, **kwargs)
    if _is_monolithic(chosen):
        raise NotImplementedError(f"vLLM takes {_kernel_of(chosen)} whatever it supports")
    return chosen


def _refusal(select: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> str:
    usable = recordable_backends(select, *args, **kwargs)
    if not usable:
        return f"vLLM has no other kernel for this model on this device ({error}): use another checkpoint or device"
    flags = [f"--moe-backend {backend} ({kernel})" for backend, kernel in usable.items()]
    return f"use {' or '.join(flags[:_MOST_NAMED])}; in a program, moe_backend={next(iter(usable))!r}"


def _base_class() -> Any:
    """vLLM's base class of kernels; None in releases whose kernels do not say whether they are monolithic."""
    try:
        base = importlib.import_module(f"{_PACKAGE}.modular_kernel").FusedMoEExperts
    except (ModuleNotFoundError, AttributeError):
        return None
    return base if hasattr(base, "is_monolithic") and hasattr(base, "is_supported_config") else None


def _selectors() -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """The selection functions, in vLLM's modules that define them and in all that imported them."""
    try:
        package = importlib.import_module(f"{_PACKAGE}.oracle")
    except ImportError:
        return []
    for found in pkgutil.iter_modules(package.__path__):
        # A quantization whose packages are missing or broken cannot be in use.
        with contextlib.suppress(Exception):
            importlib.import_module(f"{package.__name__}.{found.name}")
    return [
        (module, name, value)
        for module in [
            module for name, module in sys.modules.items() if name.startswith("vllm.") and isinstance(module, ModuleType)
        ]
        for name, value in vars(module).items()
        if _SELECTOR.fullmatch(name) and isinstance(value, FunctionType)
    ]


@contextlib.contextmanager
def _without_monolithic(base: Any) -> Iterator[None]:
    """While the block runs, monolithic kernels report that they are not supported."""
    is_supported = base.is_supported_config

    # A static method, to which vLLM passes the kernel's class.
    def is_recordable(kernel: Any, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        if kernel.is_monolithic():
            return False, "it selects experts internally, where capture does not see them"
        answer: tuple[bool, str | None] = is_supported(kernel, *args, **kwargs)
        return answer

    base.is_supported_config = staticmethod(is_recordable)
    try:
        yield
    finally:
        base.is_supported_config = staticmethod(is_supported)


def _with_backend(value: Any, backend: str) -> Any:
    """A copy of the layer's config with another `moe_backend`; any other value unchanged."""
    if not hasattr(value, "moe_backend"):
        return value
    value = copy.copy(value)
    value.moe_backend = backend
    return value


def _is_monolithic(chosen: tuple[Any, Any]) -> bool:
    # Some backends of other platforms have no class of their own.
    kernel = chosen[1]
    return hasattr(kernel, "is_monolithic") and bool(kernel.is_monolithic())


def _kernel_of(chosen: tuple[Any, Any]) -> str:
    """The name of the kernel in what a selection function returns, (backend, the kernel's class)."""
    return str(chosen[1].__name__)
