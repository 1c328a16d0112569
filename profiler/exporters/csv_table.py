"""A CSV file with a row for each layer and expert. For spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from profiler.exporters.content import Content
from profiler.exporters.table import tables
from profiler.trace.writer import write_text

COLUMNS = ("layer", "expert", "tokens", "share", "mass", "rank", "kept", "held_out_tokens")
NAME = "csv"
ABOUT = f"a row for each layer and expert: {', '.join(COLUMNS)}"
SCOPE = "either"
SUFFIX = ".csv"
UNVERIFIED = "no engine reads this format"


def write(content: Content, out: Path) -> list[str]:
    """Write the rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for table in tables(content):
        kept = set(table.kept)
        columns = zip(table.tokens, table.share, table.mass, table.rank, table.held_out_tokens, strict=True)
        for expert, (tokens, share, mass, rank, held_out) in enumerate(columns):
            writer.writerow([table.layer, expert, tokens, f"{share:.6g}", f"{mass:.6g}", rank, int(expert in kept), held_out])
    write_text(out, text.getvalue())
    return []
