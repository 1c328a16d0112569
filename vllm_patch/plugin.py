"""The vLLM plugin: attach a recorder to every worker that vLLM creates.

vLLM calls `register` in the main process, the engine core and each worker. Workers then answer three methods through
`LLM.collective_rpc`: `specmoe_start(directory, hidden_tokens)`, `specmoe_status()` and `specmoe_stop()`.
An installed plugin that is switched off must cost nothing, so this module imports only the standard library.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from pathlib import Path
from typing import Any

WATCH = "specmoe-parent"
PARENT_SECONDS = 0.5
# Also defined in `profiler.capture.options`, which must not be imported unless capture is on.
SWITCH = "SPECMOE_CAPTURE"


def register() -> None:
    """The plugin's entry point. Cheap and idempotent; patches nothing unless SPECMOE_CAPTURE=1."""
    if os.environ.get(SWITCH) != "1":
        return
    from profiler.capture.options import OWNER_VARIABLE, CaptureOptions, separate_compile_cache
    from profiler.models.deepseek_v1 import register_config
    from vllm_patch.serving.server import extend_shutdown_timeout, log_finished_requests, log_stop_strings

    options = CaptureOptions.from_environment(dict(os.environ))
    assert options is not None
    separate_compile_cache()
    register_config()
    if os.environ.get(OWNER_VARIABLE, str(os.getpid())) != str(os.getpid()):
        _end_with_parent()
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        log_finished_requests(Path(options.out))
        log_stop_strings(Path(options.out))
        extend_shutdown_timeout()
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    attach_to(WorkerWrapperBase)


def _end_with_parent() -> None:
    """End this process when its parent dies. Otherwise vLLM's engine outlives a killed collector and keeps device memory."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        # No process is left to report to. The rows that the recorder has written stay readable.
        os._exit(1)

    if not any(thread.name == WATCH for thread in threading.enumerate()):
        threading.Thread(target=watch, name=WATCH, daemon=True).start()


def attach_to(worker_wrapper: Any) -> None:
    """Attach a `WorkerCapture` to every worker that `worker_wrapper` (vLLM's `WorkerWrapperBase`) initializes. Idempotent."""
    init_device = worker_wrapper.init_device
    if hasattr(init_device, "specmoe_original"):
        return

    # `init_worker` is too early: in a worker process, vLLM loads its plugins inside that call.
    @functools.wraps(init_device)
    def init_device_and_attach(self: Any, *args: Any, **kwargs: Any) -> Any:
        from profiler.capture.options import CaptureOptions
        from vllm_patch.worker import WorkerCapture

        result = init_device(self, *args, **kwargs)
        options = CaptureOptions.from_environment(dict(os.environ))
        if options is not None:
            WorkerCapture(self.worker, options)
        return result

    # Marks the method as wrapped. mypy: functions accept attributes, but their type does not declare them.
    init_device_and_attach.specmoe_original = init_device  # type: ignore[attr-defined]
    worker_wrapper.init_device = init_device_and_attach
