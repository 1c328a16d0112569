"""Build command lines from dataclasses whose fields are `profiler.collect.options.option`s."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

Options = TypeVar("Options")


def switch(name: str, flag: str, help: str) -> inspect.Parameter:  # noqa: A002 - as typer calls it
    """An extra parameter of a command: a switch that is off by default."""
    annotation = Annotated[bool, typer.Option(flag, help=help)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def typer_command(options: type[Options], *more: inspect.Parameter) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function `f(options, **more)` as a typer command with one argument for each field of `options`.

    more: extra parameters, which the function receives by keyword.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type] # a dataclass by contract

        def command(**values: Any) -> Any:
            mine = {name: value for name, value in values.items() if name in names}
            return function(options(**mine), **{name: value for name, value in values.items() if name not in names})

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        parameters = [_parameter(field, kind) for field, kind in _fields(options)]
        # Functions have arbitrary attributes, but their type does not declare this one.
        command.__signature__ = inspect.Signature([*parameters, *more])  # type: ignore[attr-defined] # inspect reads it
        return command

    return decorate


def plain_signature(options: type[Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    """The fields as parameters of plain types, and their annotations, for command lines that know only those (Modal).

    Paths and choices become strings.
    """
    parameters = []
    for field, kind in _fields(options):
        is_optional = NoneType in get_args(kind)
        inner = next(each for each in get_args(kind) if each is not NoneType) if is_optional else kind
        plain = str if inner is Path or get_origin(inner) is Literal else inner
        annotation = plain | None if is_optional else plain
        parameters.append(_with_default(field, annotation))
    signature = inspect.Signature(parameters)
    return signature, {parameter.name: parameter.annotation for parameter in parameters}


def _fields(options: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields and their types; fields without a default come first."""
    types = get_type_hints(options)
    fields = sorted(dataclasses.fields(options), key=lambda field: field.default is not dataclasses.MISSING)
    return [(field, types[field.name]) for field in fields]


def _parameter(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    metadata = field.metadata
    flags = [metadata["flag"]] if "flag" in metadata else [_flag(field.name)] if kind is bool else []
    bounds = {name: metadata[name] for name in ("min", "max", "metavar") if name in metadata}
    return _with_default(field, Annotated[kind, typer.Option(*flags, help=metadata["help"], **bounds)])


def _with_default(field: dataclasses.Field[Any], annotation: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flag(name: str) -> str:
    """The flag of a boolean field, without the `--no-` flag that typer would add."""
    return "--" + name.replace("_", "-")
