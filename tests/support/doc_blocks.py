"""The commands and Python blocks of the documentation, as a reader would type them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("specmoe", "python", "make", "modal", "pip", "vllm", "curl", "duckdb", "source", "jupyter")
_ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=\S+")


@dataclass(frozen=True)
class Block:
    """A command, or a block of Python. page: relative to the repository. line: its first line there, from 1."""

    page: str
    line: int
    text: str
    is_python: bool = False

    @property
    def words(self) -> list[str]:
        """The words of a command, without a comment."""
        return shlex.split(self.text, comments=True)

    @property
    def program(self) -> list[str]:
        """The words of a command from its program on, without assignments of environment variables in front of it."""
        words = self.words
        while words and _ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        return words


def pages() -> list[Path]:
    """The pages of the documentation, in the order of a first reading: what one page makes, later ones use."""
    order = re.findall(r"\b[\w./-]+\.md\b", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    return [ROOT / "README.md", *(ROOT / "docs" / page for page in order), ROOT / "CONTRIBUTING.md"]


def blocks() -> list[Block]:
    """All commands and Python blocks, in the order of the pages."""
    return [block for page in pages() for block in blocks_of(page)]


def blocks_of(page: Path) -> list[Block]:
    """Commands stand in indented lines or in fences of a shell. A line that a reader sees as output is not one."""
    name = page.relative_to(ROOT).as_posix()
    found: list[Block] = []
    body: list[str] = []
    fence, began = "", 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            if fence == "python":
                found.append(Block(name, began, "\n".join(body), is_python=True))
            elif fence in {"sh", "bash", "console"}:
                found += _commands(name, began, body)
            fence, body, began = (line[3:].strip() or "text", [], number + 1) if not fence else ("", [], 0)
        elif fence:
            body.append(line)
        elif line.startswith("    ") and not _is_list_item_text(lines, number):
            if not body:
                began = number
            body.append(line[4:])
        elif body:
            found += _commands(name, began, body)
            body = []
    return found


def _is_list_item_text(lines: list[str], number: int) -> bool:
    """Whether an indented line is a list inside a list item rather than a block of code."""
    return lines[number - 1].lstrip().startswith(("- ", "* "))


def _commands(page: str, began: int, lines: list[str]) -> list[Block]:
    """A block's commands: a line each, with what continues it. A line that no program begins is output, or a file's name."""
    found, number = [], 0
    while number < len(lines):
        first, text = number, lines[number].removeprefix("$ ")
        number += 1
        if not _begins_a_command(text):
            continue
        while number < len(lines) and (text.endswith("\\") or _is_inside_quotes(text)):
            text = f"{text.removesuffix(chr(92)).rstrip()} {lines[number].strip()}"
            number += 1
        found.append(Block(page, began + first, text.strip()))
    return found


def _is_inside_quotes(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def _begins_a_command(line: str) -> bool:
    words = line.split()
    while words and _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    return bool(words) and (words[0] in PROGRAMS or words[0].startswith(".venv"))
