"""The results of `check` as a table: Markdown, or CSV for docs/results/families.csv.

    python -m vllm_patch.check.table [--csv] FILE...

Each FILE was written by `check --json`. Where several have a model in the same mode, the last one counts.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

from profiler.errors import TraceError
from vllm_patch.check.results import CheckDocument, JobResult, Verdict, read_check

WORDS = {
    Verdict.exact: "exact",
    Verdict.ties: "exact up to ties",
    Verdict.wrong: "**wrong**",
    Verdict.refused: "refused",
    Verdict.failed: "does not run here",
    Verdict.skipped: "not run",
}
COLUMNS = ["model", "mode", "type", "recorded routing", "oracle", "sets", "differ", "remarks"]
LONGEST_REMARK = 240


def markdown_table(documents: list[CheckDocument]) -> str:
    """One line for each model and mode: how exact the recorded routing is, by which oracle, or why it was not compared."""
    origins = {f"Run on {document.began[:10]} on {document.device}: {_versions(document)}." for document in documents}
    lines = [line for origin in sorted(origins) for line in (origin, "")]
    header, *rows = _table(documents)
    lines += [_line(header), "|" + "---|" * len(header), *(_line(row) for row in rows)]
    return "\n".join(lines) + "\n"


def csv_table(documents: list[CheckDocument]) -> str:
    """The same table as CSV, without the lines that say where it ran."""
    text = io.StringIO()
    header, *rows = _table(documents)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for model, mode, dtype, verdict, oracle, sets, differ, remarks in rows:
        counts = [number.replace(",", "") for number in (sets, differ)]
        writer.writerow([model, mode, dtype, verdict.strip("*"), oracle, *counts, remarks])
    return text.getvalue()


def _table(documents: list[CheckDocument]) -> list[list[str]]:
    jobs = {(job.model, job.mode): job for document in documents for job in document.jobs}
    return [COLUMNS, *(_cells(job) for job in jobs.values())]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _versions(document: CheckDocument) -> str:
    return ", ".join(f"{name} {number}" for name, number in document.versions.items() if name != "speculative-moe")


def _cells(job: JobResult) -> list[str]:
    counts = ["" if number is None else f"{number:,}" for number in (job.compared, job.differing)]
    right = job.verdict in {Verdict.exact, Verdict.ties}
    remark = "" if right else job.detail
    if right and job.input_difference is not None:
        remark = f"router inputs differ from those in transformers by {job.input_difference:.2%} (median)"
    if len(remark) > LONGEST_REMARK:
        remark = remark[: LONGEST_REMARK - 4] + " ..."
    cells = [job.model.rpartition("/")[2], job.mode, job.dtype, WORDS[job.verdict], job.oracle or "", *counts, remark]
    return [cell.replace("\n", " ") for cell in cells]


if __name__ == "__main__":
    files = [argument for argument in sys.argv[1:] if argument != "--csv"]
    write = csv_table if "--csv" in sys.argv[1:] else markdown_table
    try:
        print(write([read_check(Path(file)) for file in files]), end="")
    except TraceError as error:
        sys.exit(str(error))
