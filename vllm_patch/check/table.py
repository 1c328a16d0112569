"""The results of `check` as a Markdown table, for docs/families.md.

    python -m vllm_patch.check.table FILE...

Each FILE was written by `check --json`. Where several have a model in the same mode, the last one counts.
"""

from __future__ import annotations

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
LONGEST_REMARK = 240


def markdown_table(documents: list[CheckDocument]) -> str:
    """One line for each model and mode: how exact the recorded routing is, by which oracle, or why it was not compared."""
    origins = {f"Run on {document.began[:10]} on {document.device}: {_versions(document)}." for document in documents}
    lines = [line for origin in sorted(origins) for line in (origin, "")]
    jobs = {(job.model, job.mode): job for document in documents for job in document.jobs}
    lines += [
        "| model | mode | type | recorded routing | oracle | sets | differ | remarks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(job) for job in jobs.values())]) + "\n"


def _versions(document: CheckDocument) -> str:
    return ", ".join(f"{name} {number}" for name, number in document.versions.items() if name != "speculative-moe")


def _row(job: JobResult) -> str:
    counts = ["" if number is None else f"{number:,}" for number in (job.compared, job.differing)]
    right = job.verdict in {Verdict.exact, Verdict.ties}
    remark = "" if right else job.detail
    if right and job.input_difference is not None:
        remark = f"router inputs differ from those in transformers by {job.input_difference:.2%} (median)"
    if len(remark) > LONGEST_REMARK:
        remark = remark[: LONGEST_REMARK - 4] + " ..."
    cells = [job.model.rpartition("/")[2], job.mode, job.dtype, WORDS[job.verdict], job.oracle or "", *counts, remark]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    try:
        print(markdown_table([read_check(Path(file)) for file in sys.argv[1:]]), end="")
    except TraceError as error:
        sys.exit(str(error))
