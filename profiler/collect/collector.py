"""Load a model once and collect one trace after another: problems -> engine with capture -> sealed directory.

When a killed collection is resumed, problems that an earlier run finished, and whose routing is complete, are kept. All others
run again, in a new run.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from profiler.capture.finish import finish_trace
from profiler.capture.metadata import captured_metadata
from profiler.capture.requests import Sequence
from profiler.capture.sealing import captured_positions, run_folder, runs_of
from profiler.collect.collection import (
    Collection,
    CollectProgress,
    CollectSummary,
    check_sampling,
    size_estimates,
    summarize,
)
from profiler.collect.resume import check_settings, finished_problems, hidden_tokens_used
from profiler.collect.run import CollectionRun
from profiler.collect.selection import Selection, describe, select
from profiler.collect.skipping import describe_skipped, encode_prompts, skipped_problems
from profiler.collect.usage import UsageMonitor
from profiler.engines import Engine, EngineOptions, Sampling, start_engine
from profiler.errors import EngineError, NothingToRunError, TraceError, counted
from profiler.models.gpus import device_name, local_gpu
from profiler.models.registry import MODELS, preset
from profiler.models.resolve import resolve_model
from profiler.trace.reader import Trace
from profiler.trace.schema import CAPTURE_FOLDER, METADATA_FILE, Metadata
from profiler.trace.stream import ROUTING_STREAM
from profiler.trace.writer import check_free, exclusive, left_temporaries, public_command, write_metadata


@dataclass(frozen=True)
class CollectedTrace:
    """A complete trace in a temporary folder; `save` moves it. A trace that is never saved stays in that folder.

    summary: what the trace holds, and its current path (`summary.trace`).
    """

    summary: CollectSummary

    def save(self, path: str | Path) -> Trace:
        """Move the trace to a new place and open it there.

        Args:
            path: The new trace directory. It must not exist, or be empty.

        Returns:
            The trace at `path`.

        Raises:
            TraceError: `path` holds files, or this trace has been saved already.
        """
        target = Path(path)
        check_free(target)
        if not self.summary.trace.is_dir():
            raise TraceError(f"{self.summary.trace} does not exist any more: the trace was saved before")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            target.rmdir()
        shutil.move(self.summary.trace, target)
        self.summary.trace.parent.rmdir()
        return Trace.open(target)


class TraceCollector:
    """Collects traces of one model.

    The engine starts with the first collection and keeps running until `close`, or until the end of a `with` block. With the
    `vllm` engine, a script must start it under `if __name__ == "__main__":`, because vLLM's processes import the script again.

    Args:
        model: Short name of the registry (`specmoe models`), `demo`, a Hugging Face hub id, or a folder.
        engine: `vllm` or `transformers`.
        precision: Checkpoint of a model known by short name. `auto` takes the first one that fits on this machine's GPU, or the
            published one without a GPU.
        revision: Branch, tag or commit of a hub model.
        engine_options: How the model is loaded, and what is captured besides experts and weights
            (`profiler.engines.EngineOptions`).
        on_stage: Called with a line of text at the start of every stage.
        on_progress: Called with a `profiler.collect.collection.CollectProgress` when the engine begins and after every problem.

    Raises:
        ModelError: The model is unknown, cannot be resolved, or does not fit on the GPU.
        EngineError: The model does not support the requested length, or router inputs of a layer that is not an MoE layer
            are requested.

    Example:
        >>> from profiler import TraceCollector
        >>> with TraceCollector("demo", engine="transformers") as collector:
        ...     collected = collector.collect_from_datasets(["demo-math", "demo-code"], num_problems=8)
        >>> trace = collected.save("traces/demo")
        >>> trace.problems.num_rows
        8
    """

    def __init__(
        self,
        model: str,
        *,
        engine: str = "vllm",
        precision: str = "auto",
        revision: str | None = None,
        engine_options: EngineOptions | None = None,
        on_stage: Callable[[str], None] = lambda text: None,
        on_progress: Callable[[CollectProgress], None] = lambda progress: None,
    ) -> None:
        options = engine_options or EngineOptions()
        entry, gpu = MODELS.get(model), local_gpu()
        chosen = preset(entry, gpu, precision) if engine == "vllm" and entry is not None and gpu is not None else None
        precision = chosen.precision if chosen is not None else precision
        self.model = resolve_model(model, dtype=options.dtype, revision=revision, precision=precision)
        if chosen is not None:
            # vLLM refuses a context whose keys and values do not fit into its cache.
            longest = min(self.model.max_length, chosen.kv_tokens)
            options = replace(options, batch=options.batch or chosen.batch, max_length=options.max_length or longest)
        elif entry is not None and gpu is not None and gpu.name in entry.small_gpus:
            options = replace(options, batch=options.batch or entry.small_gpus[gpu.name][1])
        self.engine_name = engine
        self.options = options
        self.on_stage, self.on_progress = on_stage, on_progress
        self._engine: Engine | None = None
        self._start_seconds = 0.0
        self._check_options()

    def collect_from_datasets(
        self,
        datasets: list[str] | tuple[str, ...],
        *,
        num_problems: int = 100,
        target_tokens: int | None = None,
        max_tokens_per_problem: int | None = None,
        data_files: Path | None = None,
        sampling: Sampling | None = None,
    ) -> CollectedTrace:
        """Collect problems of several datasets, spread evenly over them, into a temporary folder.

        Args:
            datasets: Names of datasets (`specmoe datasets`).
            num_problems: Total number of problems; a dataset that holds fewer than its share gives all it has.
            target_tokens: Total number of tokens, prompt and output, instead of a number of problems
                (`profiler.datasets.problems.take_tokens`).
            max_tokens_per_problem: Limit on the prompt and output tokens of a problem; longer prompts lose their tail.
            data_files: Local .parquet or .jsonl file to read instead of the hub; allowed with one dataset only.
            sampling: How output tokens are sampled (`profiler.engines.Sampling`); greedy by default, with each dataset's own
                maximum of new tokens.

        Returns:
            The trace in a temporary folder; move it with `CollectedTrace.save`.

        Raises:
            DatasetError: A dataset is unknown, cannot be read or is empty, or a number is below 1.
            ModelError: The model or its tokenizer cannot be loaded.
            EngineError: The engine is not installed, or the capture failed.
        """
        selection = Selection(
            datasets=tuple(datasets),
            num_problems=num_problems,
            target_tokens=target_tokens,
            max_tokens_per_problem=max_tokens_per_problem,
            data_files=data_files,
            sampling=sampling or Sampling(),
        )
        check_sampling(selection.sampling)
        problems = select(selection, self.model.location, self.model.metadata.revision)
        capture = self.options.capture
        hidden_tokens = capture.hidden_tokens if capture.hidden_layers else 0
        folder = Path(tempfile.mkdtemp(prefix="specmoe-"))
        try:
            summary = self.collect(
                Collection(out=folder / "trace", hidden_tokens=hidden_tokens, **describe(selection, problems))
            )
        except BaseException:
            if not (folder / "trace").exists():
                folder.rmdir()
            raise
        return CollectedTrace(summary)

    def collect(self, collection: Collection) -> CollectSummary:
        """Run the problems and write a complete trace to `collection.out`.

        Args:
            collection: The problems, where they come from, and the directory of the trace.

        Returns:
            Counts, sizes and times of the trace.

        Raises:
            SpecmoeError: `out` is taken, the model cannot be loaded, or the capture failed. Whatever can be checked before the
                engine starts is checked then, before anything is written. Rows of an interrupted run stay in `out`, where a
                collection with `resume=True` continues.
        """
        out = collection.out
        check_free(out, resume=collection.resume)
        created = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out), UsageMonitor() as monitor:
            # Another collector may have started or finished a trace here since the first check.
            check_free(out, resume=collection.resume)
            was_started = (out / METADATA_FILE).exists()
            try:
                return self._collect(collection, monitor)
            except BaseException:
                if not was_started:
                    _discard_if_empty(out, created)
                raise

    def close(self) -> None:
        """Stop the engine if it is running."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def start(self) -> Engine:
        """Start the engine if it is not running, and return it.

        Raises:
            EngineError: The engine is not installed or does not support an option.
            ModelError: The engine cannot load the model.
        """
        if self._engine is None:
            self.on_stage(f"starting {self.engine_name} with {self.model.metadata.id}")
            began = time.monotonic()
            self._engine = start_engine(self.engine_name, self.model, self.options)
            self._start_seconds = time.monotonic() - began
        return self._engine

    def _check_options(self) -> None:
        max_length = self.options.max_length
        facts = self.model.metadata
        if max_length is not None and max_length > self.model.max_length:
            raise EngineError(f"max_length {max_length}: {facts.id} supports at most {self.model.max_length} tokens")
        absent = sorted(set(self.options.capture.hidden_layers) - set(facts.moe_layers))
        if absent:
            layers = facts.moe_layers
            raise EngineError(f"hidden layer {absent[0]}: not an MoE layer of {facts.id} ({layers[0]}..{layers[-1]})")

    def _collect(self, collection: Collection, monitor: UsageMonitor) -> CollectSummary:
        """Like `collect`, in a folder that is locked for this process."""
        out, problems = collection.out, collection.problems
        earlier = Trace.open(out, allow_incomplete=True) if (out / METADATA_FILE).is_file() else None
        sequences: dict[int, Sequence] = {}
        skipped: dict[int, str] = {}
        if earlier is not None:
            check_settings(earlier.metadata, self._settings(collection), out)
            if earlier.manifest is not None:
                self.on_stage(f"{out} is already finished")
                trace = Trace.open(out)
                # The earlier run may have been killed after it wrote the manifest and before it removed the folder.
                shutil.rmtree(out / CAPTURE_FOLDER, ignore_errors=True)
                return summarize(trace, resumed=trace.problems.num_rows, usage=monitor.usage)
            sequences = finished_problems(out, problems)
            skipped = skipped_problems(out)
            self.on_stage(f"resuming: {len(sequences)} of {counted(len(problems), 'problem')} are finished")
        resumed = len(sequences)
        remaining = {
            number: problem for number, problem in problems.items() if number not in sequences and number not in skipped
        }
        start_seconds, generate_seconds = 0.0, 0.0
        if earlier is not None and not remaining:
            # Sealing determines the gaps again.
            metadata = earlier.metadata.model_copy(update={"gaps": []})
        else:
            engine = self.start()
            start_seconds = self._start_seconds
            metadata = self._metadata(collection, engine)
            if earlier is not None:
                # A run may continue on another device, where vLLM uses other kernels.
                now = metadata.model_dump(mode="json", exclude={"created", "command", "gaps"})
                now["capture"].pop("moe_kernels")
                check_settings(earlier.metadata, now, out)
                kernels = {"moe_kernels": earlier.metadata.capture.get("moe_kernels", {}) | engine.moe_kernels}
                kept = {"created": earlier.metadata.created, "capture": metadata.capture | kernels}
                metadata = metadata.model_copy(update=kept)
            write_metadata(out, metadata)
            prompts, unusable = encode_prompts(engine, remaining)
            for note in [
                *engine.notes,
                *size_estimates(self.options.capture, self.model, collection, [prompt for prompt, _ in prompts]),
            ]:
                self.on_stage(note)
            self.on_stage(f"running {counted(len(prompts), 'problem')}")
            began = time.monotonic()
            run = CollectionRun(collection, sequences, monitor, self.on_stage, self.on_progress)
            ran, report = run.complete(engine, prompts, unusable, self._hidden_tokens_left(collection, sequences))
            generate_seconds = time.monotonic() - began
            sequences |= ran
            skipped = skipped_problems(out)
            metadata = metadata.model_copy(update={"capture": metadata.capture | report})
        if not sequences:
            raise NothingToRunError(len(problems), describe_skipped(problems, skipped))
        self.on_stage("sealing the trace")
        runs = len(runs_of(out))
        cut = sum(sequence.truncated_tokens > 0 for sequence in sequences.values())
        counts = {"truncated_problems": cut, "skipped_problems": len(skipped), "runs": runs, "device": device_name()}
        metadata = metadata.model_copy(
            update={"capture": metadata.capture | counts, "gaps": describe_skipped(problems, skipped)}
        )
        trace = finish_trace(out, metadata, list(sequences.values()), jsonl=collection.jsonl, drop_other_requests=runs > 1)
        return summarize(
            trace,
            resumed=resumed,
            usage=monitor.usage,
            start_seconds=start_seconds,
            generate_seconds=generate_seconds,
        )

    def _hidden_tokens_left(self, collection: Collection, finished: dict[int, Sequence]) -> int:
        """The part of the collection's budget for router inputs that earlier runs have not used."""
        if not self.options.capture.hidden_layers:
            return collection.hidden_tokens
        return max(0, collection.hidden_tokens - hidden_tokens_used(collection.out, finished))

    def _settings(self, collection: Collection) -> dict[str, Any]:
        """The part of the metadata that is known before the engine starts."""
        sampling = collection.sampling
        return {
            "model": {"id": self.model.metadata.id, "revision": self.model.metadata.revision},
            "engine": self.engine_name,
            "datasets": [dataset.model_dump(mode="json") for dataset in collection.datasets],
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": sampling.seed,
                "ignore_eos": sampling.ignore_eos,
                **collection.recipe,
            },
        }

    def _metadata(self, collection: Collection, engine: Engine) -> Metadata:
        settings = self._settings(collection)
        loaded = {name: getattr(engine, name) for name in ("moe_layers", "num_experts", "top_k", "dtype")}
        if self.options.load_in is not None:
            loaded["quantization"] = f"bitsandbytes {self.options.load_in}"
        return captured_metadata(
            self.model.metadata,
            loaded,
            datasets=settings["datasets"],
            sampling=settings["sampling"],
            engine=engine.name,
            versions=engine.versions | {"python": platform.python_version()},
            hook=engine.hook,
            capture={
                "dtype": self.options.dtype,
                "compiled": engine.compiled,
                "max_length": engine.max_length,
                "logits": self.options.capture.logits,
                "hidden_layers": list(self.options.capture.hidden_layers),
                "hidden_tokens": collection.hidden_tokens,
                "prefix_caching": self.options.prefix_caching,
                "moe_backend": self.options.moe_backend,
                "moe_kernels": engine.moe_kernels,
            },
            command=public_command(),
        )


def _discard_if_empty(out: Path, created: bool) -> None:
    """Remove a trace directory that holds no rows."""
    if any(captured_positions(run_folder(out, run)).get(ROUTING_STREAM) for run in runs_of(out)):
        return
    shutil.rmtree(out / CAPTURE_FOLDER, ignore_errors=True)
    for path in (out / METADATA_FILE, *left_temporaries(out / METADATA_FILE)):
        path.unlink(missing_ok=True)
    if created:
        out.rmdir()
