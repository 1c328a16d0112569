"""Problems that cannot be run: no prompt, no room for one, or a prompt that the engine rejects. The others still run."""

from __future__ import annotations

from pathlib import Path

from profiler.capture.finish import NAMED_PROBLEMS
from profiler.capture.requests import read_skipped
from profiler.capture.sealing import run_folder, runs_of
from profiler.datasets.problems import Problem
from profiler.engines import Engine, Prompt
from profiler.errors import counted


def encode_prompts(engine: Engine, problems: dict[int, Problem]) -> tuple[list[tuple[Prompt, int]], dict[int, str]]:
    """Encode the prompts; each comes with the number of tokens cut off its tail to leave room for the output.

    Also returns the problems without a usable prompt, and why.
    """
    prompts, unusable = [], {}
    for problem_id, problem in problems.items():
        if problem.unusable is not None:
            unusable[problem_id] = problem.unusable
            continue
        room = engine.max_length - problem.max_new_tokens
        if room < 1:
            unusable[problem_id] = (
                f"max_new_tokens {problem.max_new_tokens} leaves no room for a prompt in {engine.max_length} tokens"
            )
            continue
        if problem.max_prompt_tokens is not None:
            room = min(room, problem.max_prompt_tokens)
        token_ids = engine.encode(problem.prompt)
        if token_ids[:room]:
            prompts.append((Prompt(problem_id, token_ids[:room], problem.max_new_tokens), max(0, len(token_ids) - room)))
        else:
            unusable[problem_id] = "its prompt has no tokens"
    return prompts, unusable


def skipped_problems(out: Path) -> dict[int, str]:
    """The problems that the runs of `out` skipped, and why."""
    return {record.problem_id: record.reason for run in runs_of(out) for record in read_skipped(run_folder(out, run))}


def problem_in_words(problem: Problem, problem_id: int) -> str:
    """A problem for messages: its id, its dataset, and its key there."""
    return f"problem {problem_id} ({problem.dataset} {problem.source_key})"


def describe_skipped(problems: dict[int, Problem], skipped: dict[int, str]) -> list[str]:
    """Lines for the trace's gaps: each skipped problem and why, up to a limit, and how many more there are."""
    # A dataset that was replaced before the collection was resumed may have fewer problems.
    known = sorted((problem_id, reason) for problem_id, reason in skipped.items() if problem_id in problems)
    lines = [
        f"skipped {problem_in_words(problems[problem_id], problem_id)}: {reason}"
        for problem_id, reason in known[:NAMED_PROBLEMS]
    ]
    more = known[NAMED_PROBLEMS:]
    return [*lines, f"skipped {counted(len(more), 'more problem')}, {more[0][0]} to {more[-1][0]}"] if more else lines
