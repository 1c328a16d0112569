"""The results of `check`, as one document. `--json` writes it after every step, and the tables are printed from it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from profiler.errors import TraceError, first_fault, first_line


class Verdict(StrEnum):
    """The verdict on one job.

    exact: all sets are equal, and all weights up to rounding. ties: sets differ only where rounding decides. wrong: capture
    cannot be trusted. refused: the recorder refused to record; the detail says why. failed: vLLM or the reference could not run
    the model. skipped: no time was left.
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
    """One model in one mode. compared, differing: numbers of expert sets; a set is the experts of one token at one layer.

    runner: the module of vLLM's model runner. asynchronous: whether vLLM scheduled a step before the one before it had ended.
    oracle: what the recorded sets were compared with: `transformers`, or its routers on the inputs that vLLM recorded (if vLLM
    computes something before the router in another way), and what was left out of it. input_difference: in the latter case, the
    median relative difference of the routers' inputs.

    Fields are None if they are unknown because the run ended early.
    """

    model: str
    mode: str
    dtype: str
    verdict: Verdict
    detail: str
    oracle: str | None = None
    hook: str | None = None
    runner: str | None = None
    asynchronous: bool | None = None
    vllm: str | None = None
    compared: int | None = None
    differing: int | None = None
    widest_gap: float | None = None
    weight_error: float | None = None
    weight_ratio: float | None = None
    input_difference: float | None = None
    start_seconds: float | None = None
    seconds: float = 0.0


class Ratio(_Part):
    """Tokens/s of an arm divided by tokens/s without the plugin in the same round: median, minimum and maximum over rounds."""

    median: float
    least: float
    most: float


class OverheadResult(_Part):
    """One workload. Tokens per second are medians over the rounds, without the discarded first round.

    off_spread: minimum and maximum of the tokens/s without the plugin, divided by their median.
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
    """The whole document. notes: errors outside the jobs. covered, not_covered: phrases that sum the run up."""

    version: int = 1
    device: str
    versions: dict[str, str]
    command: list[str]
    began: str
    jobs: list[JobResult] = []
    overhead: list[OverheadResult] = []
    replay: list[dict[str, Any]] = []
    notes: list[str] = []
    covered: list[str] = []
    not_covered: list[str] = []
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """Write the document atomically: a reader sees the old file or the new one."""
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    def passed(self, named: Iterable[str] = ()) -> bool:
        """Whether no job is wrong, at least one is right, and each model that the user `named` has one that is right."""
        right = {job.model for job in self.jobs if job.verdict in {Verdict.exact, Verdict.ties}}
        return bool(right) and right >= set(named) and all(job.verdict != Verdict.wrong for job in self.jobs)


def read_check(path: Path) -> CheckDocument:
    """Read what `check --json` wrote. Raises `TraceError`, in one line, if the file is missing or something else."""
    try:
        return CheckDocument.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise TraceError(
            f"{path}: expected what 'python -m vllm_patch check --json FILE' writes: {first_fault(error)}"
        ) from error
    except OSError as error:
        raise TraceError(f"{path}: {first_line(error)}") from error
