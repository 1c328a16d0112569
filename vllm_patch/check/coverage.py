"""What a run of `check` covered, and what it did not, in words."""

from __future__ import annotations

from profiler.errors import counted
from vllm_patch.check.device import DeviceFacts
from vllm_patch.check.jobs import FAMILY_NAMES
from vllm_patch.check.results import CheckDocument, JobResult, Verdict

COMPARED = {Verdict.exact, Verdict.ties, Verdict.wrong}
# What no job of `check` runs, whatever the options.
NEVER_RUN = (
    "tensor parallelism",
    "speculative decoding",
    "quantizations other than AWQ",
    "LoRA",
    "images and audio",
    "contexts above 1,024 tokens",
)


def coverage(jobs: list[JobResult], device: DeviceFacts) -> tuple[list[str], list[str]]:
    """What was compared, and what was not: each a list of phrases."""
    compared = [job for job in jobs if job.verdict in COMPARED]
    covered = []
    for mode in dict.fromkeys(job.mode for job in compared):
        models = [_name(job.model) for job in compared if job.mode == mode]
        covered.append(f"{mode}: {models[0] if len(models) == 1 else f'{len(models)} models'}")
    if any(job.asynchronous for job in compared):
        covered.append("asynchronous scheduling")
    by_oracle = [job for job in compared if job.oracle not in {None, "transformers"}]
    if by_oracle:
        covered.append("of these, by another oracle than transformers alone: " + _names(by_oracle))
    missing = []
    for verdict, text in (
        (Verdict.refused, "refused"),
        (Verdict.failed, "do not run here"),
        (Verdict.skipped, "no time was left for"),
    ):
        found = [job for job in jobs if job.verdict == verdict]
        if found:
            missing.append(f"{text}: {_names(found)}")
    others = [name for name in FAMILY_NAMES if name not in {job.model for job in jobs}]
    if others:
        missing.append(f"{len(others)} further families (--all)")
    if not device.on_gpu:
        missing.append("GPUs")
    if not any(job.asynchronous for job in compared):
        missing.append("asynchronous scheduling")
    return covered, [*missing, *NEVER_RUN]


def verdict_line(document: CheckDocument) -> str:
    """How many jobs ran, and their verdicts."""
    counts = {verdict: sum(job.verdict == verdict for job in document.jobs) for verdict in Verdict}
    verdicts = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)
    return f"{counted(len(document.jobs), 'run')} on {document.device}: {verdicts or 'nothing ran'}"


def coverage_line(document: CheckDocument) -> str:
    """The last line of the output."""
    return f"Covered: {'; '.join(document.covered) or 'nothing'}. Not covered: {'; '.join(document.not_covered)}."


def _names(jobs: list[JobResult]) -> str:
    return ", ".join(dict.fromkeys(_name(job.model) for job in jobs))


def _name(model: str) -> str:
    return model.rpartition("/")[2]
