"""Rows as a table for people or as JSON for programs."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

# Of tables that go into a file or pipe.
TABLE_WIDTH = 200

console = Console(highlight=False)


def print_rows(rows: list[dict[str, str]], as_json: bool) -> None:
    """Print rows of the same columns."""
    if as_json:
        console.print_json(json.dumps(rows))
        return
    table = Table(box=None)
    for column in rows[0]:
        # A cut hub id is of no use, nor is a cut name.
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*row.values())
    wide = console if console.is_terminal else Console(width=TABLE_WIDTH)
    wide.print(table)
