"""Tables as CSV text, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV: numbers with six digits, unknown values (None, `nan`, infinity) empty.

    Spreadsheets run text that begins like a formula, and names in a trace are untrusted: such text gets a leading apostrophe.

    Example:
        >>> csv_text([("run", "recall"), ("=a", 0.25), ("b", None)]).splitlines()
        ['run,recall', "'=a,0.25", 'b,']
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
