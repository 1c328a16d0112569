"""One run of an engine over the prompts that are left, which writes down what is needed to resume it if it is killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

from profiler.capture.requests import (
    COMPLETIONS_FILE,
    PLANNED_FILE,
    SKIPPED_FILE,
    CompletedProblem,
    PlannedProblem,
    Sequence,
    SkippedProblem,
    read_completed,
)
from profiler.capture.sealing import run_folder, runs_of
from profiler.collect.collection import Collection, CollectProgress
from profiler.collect.skipping import problem_in_words
from profiler.collect.usage import UsageMonitor
from profiler.engines import Completion, Engine, Prompt


class CollectionRun:
    """A new run of a collection, in a folder of its own.

    finished: sequences of earlier runs, by problem id. on_stage, on_progress: as for `TraceCollector`.
    """

    def __init__(
        self,
        collection: Collection,
        finished: dict[int, Sequence],
        monitor: UsageMonitor,
        on_stage: Callable[[str], None],
        on_progress: Callable[[CollectProgress], None],
    ) -> None:
        self._collection = collection
        self._number = max(runs_of(collection.out), default=-1) + 1
        self._folder = run_folder(collection.out, self._number)
        self._monitor, self._on_stage, self._on_progress = monitor, on_stage, on_progress
        self._done = self._total = len(finished)
        self._tokens = 0
        self._began = time.monotonic()
        self._lengths: dict[int, int] = {}

    def complete(
        self, engine: Engine, prompts: list[tuple[Prompt, int]], unusable: dict[int, str], hidden_tokens: int
    ) -> tuple[dict[int, Sequence], dict[str, Any]]:
        """Run the prompts; returns their sequences by problem id, and the engine's report.

        prompts: each with the number of tokens cut off its tail. unusable: problems that have no prompt, and why; recorded as
        skipped, like those that the engine rejects. hidden_tokens: how many tokens' router inputs may be recorded.
        """
        self._folder.mkdir(parents=True)
        self._write_plan(prompts)
        self._lengths = {prompt.problem_id: len(prompt.token_ids) for prompt, _ in prompts}
        self._total += len(prompts) + len(unusable)
        self._began = time.monotonic()
        report: dict[str, Any] = {}
        with (
            (self._folder / COMPLETIONS_FILE).open("w", encoding="utf-8") as completions,
            (self._folder / SKIPPED_FILE).open("w", encoding="utf-8") as rejections,
        ):
            for problem_id, reason in unusable.items():
                self._skip(rejections, problem_id, reason)
            self._report_progress()
            if prompts:
                report = engine.generate(
                    [prompt for prompt, _ in prompts],
                    self._collection.sampling,
                    self._folder,
                    lambda completion: self._finish(completions, completion),
                    lambda problem_id, reason: self._skip(rejections, problem_id, reason),
                    hidden_tokens,
                )
        return read_completed(self._collection.out, self._number), report

    def _write_plan(self, prompts: list[tuple[Prompt, int]]) -> None:
        with (self._folder / PLANNED_FILE).open("w", encoding="utf-8") as file:
            for prompt, cut in prompts:
                problem = self._collection.problems[prompt.problem_id]
                planned = PlannedProblem(
                    problem_id=prompt.problem_id,
                    dataset=problem.dataset,
                    source_key=problem.source_key,
                    prompt=problem.prompt,
                    prompt_token_ids=prompt.token_ids,
                    truncated_tokens=cut,
                )
                file.write(planned.to_json() + "\n")

    def _skip(self, file: TextIO, problem_id: int, reason: str) -> None:
        file.write(SkippedProblem(problem_id=problem_id, reason=reason).to_json() + "\n")
        file.flush()
        self._total -= 1
        self._on_stage(f"skipping {problem_in_words(self._collection.problems[problem_id], problem_id)}: {reason}")
        self._report_progress()

    def _finish(self, file: TextIO, completion: Completion) -> None:
        record = CompletedProblem(
            problem_id=completion.problem_id,
            output=completion.text,
            output_token_ids=completion.token_ids,
            cached_tokens=completion.cached_tokens,
            finish_reason=completion.finish_reason,
        )
        file.write(record.to_json() + "\n")
        file.flush()
        self._done += 1
        self._tokens += self._lengths[completion.problem_id] + len(completion.token_ids)
        self._report_progress()

    def _report_progress(self) -> None:
        self._on_progress(
            CollectProgress(
                problems=self._done,
                total=self._total,
                tokens=self._tokens,
                seconds=time.monotonic() - self._began,
                usage=self._monitor.usage,
            )
        )
