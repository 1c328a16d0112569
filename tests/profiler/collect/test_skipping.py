"""Problems that cannot be run: the others are collected, and the trace says which were not, and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from profiler import TraceCollector
from profiler.collect.collection import Collection
from profiler.datasets.problems import Problem
from profiler.engines import EngineOptions, Sampling
from profiler.errors import EngineError
from profiler.trace.reader import Trace
from profiler.trace.schema import DatasetMetadata

BAD_PROBLEMS = {
    "an empty prompt": (
        Problem(dataset="synthetic", source_key="bad", prompt="", max_new_tokens=3),
        "its prompt has no tokens",
    ),
    "no room for a prompt": (
        Problem(dataset="synthetic", source_key="bad", prompt="def", max_new_tokens=5000),
        "max_new_tokens 5000 leaves no room for a prompt in 1024 tokens",
    ),
    "a row without a prompt": (
        Problem(dataset="synthetic", source_key="bad", prompt="", max_new_tokens=3, unusable="its column 'prompt' is empty"),
        "its column 'prompt' is empty",
    ),
    "a prompt that is cut to nothing": (
        Problem(dataset="synthetic", source_key="bad", prompt="def", max_new_tokens=3, max_prompt_tokens=0),
        "its prompt has no tokens",
    ),
    "a token outside the vocabulary": (
        Problem(dataset="synthetic", source_key="bad", prompt="\N{SNOWMAN}", max_new_tokens=3),
        "it has a token that the model, with 3072, does not know",
    ),
}
GOOD = Problem(dataset="synthetic", source_key="good", prompt="def f(x):", max_new_tokens=3)


@pytest.fixture(scope="module")
def strict() -> Iterator[TraceCollector]:
    """An engine whose tokenizer gives no tokens for an empty text, and one that the model does not know for a snowman."""
    with TraceCollector("demo", engine="transformers", engine_options=EngineOptions(dtype="float32")) as collector:
        engine = collector.start()
        encode = engine.encode
        # mypy: a stand-in for the engine's method.
        engine.encode = lambda text: [] if not text else [1, 5000] if "\N{SNOWMAN}" in text else encode(text)  # type: ignore[method-assign]
        yield collector


def collection(out: Path, problems: list[Problem], *, resume: bool = False) -> Collection:
    return Collection(
        problems=dict(enumerate(problems)),
        datasets=[DatasetMetadata(name="synthetic", problems=len(problems))],
        sampling=Sampling(),
        out=out,
        resume=resume,
    )


@pytest.mark.parametrize("kind", BAD_PROBLEMS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_problem_that_cannot_be_run_is_skipped_named_and_counted(
    kind: str, place: int, strict: TraceCollector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, reason = BAD_PROBLEMS[kind]
    problems = [GOOD, GOOD]
    problems.insert(place, bad)
    said: list[str] = []
    monkeypatch.setattr(strict, "on_stage", said.append)
    summary = strict.collect(collection(tmp_path / "t", problems))
    assert (summary.problems, summary.skipped_problems) == (2, 1)
    trace = Trace.open(tmp_path / "t")
    assert trace.faults(verify=True) == []
    assert trace.problems.column("problem_id").to_pylist() == [i for i in range(3) if i != place]
    assert trace.metadata.gaps == [f"skipped problem {place} (synthetic bad): {reason}"]
    assert f"skipping problem {place} (synthetic bad): {reason}" in said


def test_only_if_no_problem_can_be_run_is_it_an_error(strict: TraceCollector, tmp_path: Path) -> None:
    bad = [problem for problem, _ in BAD_PROBLEMS.values()]
    with pytest.raises(
        EngineError, match=r"none of 5 problems can be run; skipped problem 0 \(synthetic bad\): its prompt has no"
    ):
        strict.collect(collection(tmp_path / "t", bad))
    assert not (tmp_path / "t").exists()


def test_skipped_problems_stay_skipped_when_a_collection_is_resumed(
    strict: TraceCollector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    problems = [GOOD, *(problem for problem, _ in BAD_PROBLEMS.values())]
    with monkeypatch.context() as patched:
        patched.setattr("profiler.collect.collector.finish_trace", full)
        with pytest.raises(OSError, match="No space"):
            strict.collect(collection(tmp_path / "t", problems))
    # All that is left is sealing: nothing may start the engine.
    monkeypatch.setattr(strict, "start", None)
    summary = strict.collect(collection(tmp_path / "t", problems, resume=True))
    assert (summary.problems, summary.resumed, summary.skipped_problems) == (1, 1, len(BAD_PROBLEMS))
    assert len(Trace.open(tmp_path / "t").metadata.gaps) == len(BAD_PROBLEMS)
