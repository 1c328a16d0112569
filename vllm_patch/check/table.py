"""The results of `check` as a Markdown table, for the documentation."""

from __future__ import annotations

from vllm_patch.check.coverage import coverage_lines
from vllm_patch.check.results import CheckDocument, JobResult, Verdict

WORDS = {
    Verdict.exact: "exact",
    Verdict.ties: "exact up to ties",
    Verdict.wrong: "**wrong**",
    Verdict.refused: "refused",
    Verdict.failed: "does not run here",
    Verdict.skipped: "not run",
}


def markdown_table(document: CheckDocument) -> str:
    """A page of one line for each job: how exact it is, by which oracle, or why not; with versions, date and coverage."""
    versions = ", ".join(f"{name} {number}" for name, number in document.versions.items() if name != "speculative-moe")
    lines = [
        f"`{' '.join(document.command)}` made this table on {document.began[:10]}: {document.device}; {versions}.",
        "",
        "| model | mode | type | recorded routing | oracle | sets | differ | remarks |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(job) for job in document.jobs),
        "",
        *(f"{line}." for line in coverage_lines(document)),
    ]
    return "\n".join(lines) + "\n"


def _row(job: JobResult) -> str:
    counts = ["" if number is None else f"{number:,}" for number in (job.compared, job.differing)]
    remark = "" if job.verdict in {Verdict.exact, Verdict.ties} and job.input_difference is None else job.detail
    if job.input_difference is not None and job.verdict != Verdict.wrong:
        remark = f"router inputs differ from transformers' by {job.input_difference:.1%} (median)"
    cells = [job.model.rpartition("/")[2], job.mode, job.dtype, WORDS[job.verdict], job.oracle or "", *counts, remark[:200]]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
