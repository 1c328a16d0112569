"""What `check` found, as one document: `--json` writes it after every step, and the table is printed from it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Verdict(StrEnum):
    """exact: every set and weight equal. ties: sets differ where rounding decides. wrong: capture is not to be trusted.

    refused: the recorder says why it cannot record. failed: vLLM or the reference does not run this. skipped: no time was left.
    """

    exact = "exact"
    ties = "ties"
    wrong = "wrong"
    refused = "refused"
    failed = "failed"
    skipped = "skipped"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JobResult(_Part):
    """One model in one mode. compared, differing: sets of experts, of one token at one layer.

    What is not known, because the run ended early, is None.
    """

    model: str
    mode: str
    dtype: str
    verdict: Verdict
    detail: str
    oracle: str | None = None
    hook: str | None = None
    runner: str | None = None
    vllm: str | None = None
    compared: int | None = None
    differing: int | None = None
    widest_gap: float | None = None
    weight_error: float | None = None
    weight_ratio: float | None = None
    start_seconds: float | None = None
    seconds: float = 0.0


class Ratio(_Part):
    """Tokens/s of an arm over those without the plugin, in the same round: median, least and most over the rounds."""

    median: float
    least: float
    most: float


class OverheadResult(_Part):
    """One workload. Tokens per second are medians over the rounds; the first round was discarded.

    off_spread: of the tokens/s without the plugin, least and most over their median.
    """

    workload: str
    model: str
    rounds: int
    tokens: int
    tokens_per_second: dict[str, float]
    ratios: dict[str, Ratio]
    off_spread: tuple[float, float]
    seconds: dict[str, list[float]]
    rows_per_round: int
    writer_waits: int


class CheckDocument(_Part):
    """All of it. notes: what went wrong beside the jobs, and what was not covered."""

    version: int = 1
    device: str
    versions: dict[str, str]
    command: list[str]
    began: str
    jobs: list[JobResult] = []
    overhead: list[OverheadResult] = []
    replay: list[dict[str, Any]] = []
    notes: list[str] = []
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """Replace the file by this document: a reader sees the old one or the new one."""
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    def passed(self, named: Iterable[str] = ()) -> bool:
        """Nothing is wrong, something is right, and so is each of the models that the user `named`."""
        right = {job.model for job in self.jobs if job.verdict in {Verdict.exact, Verdict.ties}}
        return bool(right) and right >= set(named) and all(job.verdict != Verdict.wrong for job in self.jobs)
