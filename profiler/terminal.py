"""Print rows as a table for people or as JSON for programs."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

# Width of tables that are written to a file or a pipe, which have no width to measure.
TABLE_WIDTH = 200

console = Console(highlight=False)


def print_rows(rows: list[dict[str, str]], as_json: bool) -> None:
    """Print rows, all with the same columns, as a table or as JSON."""
    if as_json:
        console.print_json(json.dumps(rows))
        return
    table = Table(box=None)
    for column in rows[0]:
        # A truncated hub id is useless, and so is a truncated name.
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*row.values())
    wide = console if console.is_terminal else Console(width=TABLE_WIDTH)
    wide.print(table)
