"""Writes the parts of the reference that the code already says: commands with their options, and documents with their schemas.

mkdocs calls the functions `on_...` (see `hooks` in mkdocs.yml). `reference/cli.md` and `reference/documents.md` are templates.
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import re
from itertools import zip_longest
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from analysis.documents.schemas import KINDS

# How a user starts each command line -> the module and name of its typer app.
COMMAND_LINES = {"specmoe": ("specmoe", "app"), "python -m vllm_patch": ("vllm_patch.__main__", "app")}
# File of the schema -> module and class of the document, what writes it, and the public function that reads it.
DOCUMENTS = {
    "metadata": (
        "profiler.trace.schema",
        "Metadata",
        "`specmoe collect` and `specmoe convert` (`metadata.json`)",
        "`profiler.Trace.open(...).metadata`",
    ),
    "manifest": ("profiler.trace.schema", "Manifest", "`specmoe collect` and `specmoe convert` (`manifest.json`)", ""),
    "collect": ("profiler.collect.collection", "CollectSummary", "`specmoe collect --json`", ""),
    **{
        name: (
            f"analysis.documents.{kind.module}",
            kind.model,
            f"`{kind.command}`" + (f" (`DIR/{kind.file}`)" if kind.file else ""),
            f"`analysis.{kind.reader}`" if kind.reader else "",
        )
        for name, kind in KINDS.items()
    },
    "export": (
        "profiler.exporters.report",
        "ExportReport",
        "`specmoe export TRACE --to FORMAT --out FILE` (`FILE.report.json`)",
        "",
    ),
    "check": ("vllm_patch.check.results", "CheckDocument", "`python -m vllm_patch check --json FILE`", ""),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the JSON schema of each document to the site."""
    for name in DOCUMENTS:
        schema = json.dumps(document(name).model_json_schema(mode="serialization"), indent=1)
        files.append(File.generated(config, f"reference/schemas/{name}.json", content=schema))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the templates."""
    if page.file.src_uri == "reference/cli.md":
        return markdown.replace("<!-- commands -->", commands_page())
    if page.file.src_uri == "reference/documents.md":
        return markdown.replace("<!-- documents -->", documents_page())
    return markdown


def document(name: str) -> type[BaseModel]:
    """The model of a document."""
    module, cls = DOCUMENTS[name][:2]
    return getattr(importlib.import_module(module), cls)  # type: ignore[no-any-return] # DOCUMENTS names models only


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command as a user types it, in the order of the help."""
    found = {}
    for line, (module, name) in COMMAND_LINES.items():
        group: Any = typer.main.get_command(getattr(importlib.import_module(module), name))
        found.update({f"{line} {command}": body for command, body in group.commands.items() if not body.hidden})
    return found


def commands_page() -> str:
    """A section for each command: what it does, an example, and its arguments and options."""
    return "\n\n".join(_command(name, command) for name, command in commands().items())


def _command(name: str, command: typer.core.TyperCommand) -> str:
    context = typer.Context(command)
    paragraphs = [" ".join(paragraph.split()) for paragraph in inspect.cleandoc(command.help or "").split("\n\n")]
    examples = [text.removeprefix("Example: ") for text in paragraphs if text.startswith("Example: ")]
    parts = [f"## {name}", *(_prose(text) for text in paragraphs if not text.startswith("Example: "))]
    parts.append(f"Usage: `{' '.join([name, *command.collect_usage_pieces(context)])}`")
    if examples:
        parts.append("\n".join(f"    {example}" for example in examples))
    rows = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if rows:
        lines = [f"| `{syntax}` | {_prose(about)} |" for syntax, about in rows]
        parts.append("\n".join(["| argument or option | meaning |", "|---|---|", *lines]))
    return "\n\n".join(parts)


def _prose(text: str) -> str:
    """Text in which only `code` is markup, as Markdown."""
    parts = " ".join(text.split()).split("`")
    escaped = [re.sub(r"([\\|*_\[\]])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    code = [f"`{part}`" for part in parts[1::2]]
    return "".join(piece for pair in zip_longest(escaped, code, fillvalue="") for piece in pair)


def documents_page() -> str:
    """A section for each document: what writes and reads it, its schema, and the fields of all its parts."""
    return "\n\n".join(_document(name) for name in DOCUMENTS)


def _document(name: str) -> str:
    model = document(name)
    _, cls, written, read = DOCUMENTS[name]
    schema = model.model_json_schema(mode="serialization")
    reader = f" Read by {read}." if read else ""
    parts = [f"## {cls}", f"Written by {written}.{reader} JSON schema: [{name}.json](schemas/{name}.json)."]
    parts.append(_fields(schema, name))
    for part, definition in schema.get("$defs", {}).items():
        parts += [f"### {part} {{#{name}-{part}}}", _fields(definition, name)]
    return "\n\n".join(parts)


def _fields(schema: dict[str, Any], name: str) -> str:
    """What a docstring says of a model, and a table of its fields."""
    text, described = _described(schema.get("description", ""))
    if "enum" in schema:
        return "\n\n".join(filter(None, [text, "One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + "."]))
    lines = ["| field | type | |", "|---|---|---|"]
    required = schema.get("required", [])
    for field, kind in schema.get("properties", {}).items():
        about = described.get(field, "")
        optional = "" if field in required else "optional. "
        lines.append(f"| `{field}` | {_type(kind, name)} | {optional}{about} |")
    return "\n\n".join(filter(None, [text, "\n".join(lines)]))


def _described(docstring: str) -> tuple[str, dict[str, str]]:
    """A docstring's text, and what its section `Attributes` says of each field."""
    sections = re.split(r"^(Attributes|Example):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    named = dict(zip(sections[1::2], sections[2::2], strict=True))
    described = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + named.get("Attributes", "")):
        names, _, about = entry.strip().partition(":")
        described.update({field.strip(): _prose(about) for field in names.split(",")})
    return "\n\n".join(_prose(paragraph) for paragraph in sections[0].split("\n\n")), described


def _type(kind: dict[str, Any], name: str) -> str:
    """A JSON type in words; parts of the document are links to their section."""
    if "$ref" in kind:
        part = kind["$ref"].rpartition("/")[2]
        return f"[{part}](#{name}-{part})"
    if "anyOf" in kind:
        return " or ".join(_type(each, name) for each in kind["anyOf"])
    if "prefixItems" in kind:
        return "(" + ", ".join(_type(each, name) for each in kind["prefixItems"]) + ")"
    if kind.get("type") == "array":
        return f"list of {_type(kind.get('items', {}), name)}"
    if isinstance(kind.get("additionalProperties"), dict):
        return f"map of {_type(kind['additionalProperties'], name)}"
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    return str(kind.get("type", "any"))
