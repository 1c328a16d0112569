"""The vLLM plugin: attach a recorder to every worker that vLLM creates, and put live metrics on its `/metrics`.

vLLM calls `register` in the main process, the engine core and each worker. Workers then answer these methods through
`LLM.collective_rpc`: `specmoe_start(directory, hidden_tokens)`, `specmoe_status()`, `specmoe_stop()` and `specmoe_live()`.
An installed plugin that is switched off must cost nothing, so this module imports only the standard library.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiler.capture.options import CaptureOptions
    from profiler.live.options import LiveOptions

WATCH = "specmoe-parent"
PARENT_SECONDS = 0.5
# Also defined in `profiler.capture.options` and `profiler.live.options`, which must not be imported while all are off.
SWITCH, LIVE_SWITCH, SHADOW = "SPECMOE_CAPTURE", "SPECMOE_LIVE", "SPECMOE_SHADOW"


def register() -> None:
    """The plugin's entry point. Cheap and idempotent; patches nothing unless capture or live metrics are switched on."""
    if "1" not in {os.environ.get(SWITCH), os.environ.get(LIVE_SWITCH)} and not os.environ.get(SHADOW):
        return
    from profiler.capture.options import OWNER_VARIABLE, separate_compile_cache
    from profiler.models.deepseek_v1 import register_config
    from vllm_patch.serving.server import extend_shutdown_timeout, log_finished_requests, log_stop_strings

    found = _options()
    assert found is not None
    options, live = found
    separate_compile_cache()
    register_config()
    if os.environ.get(OWNER_VARIABLE, str(os.getpid())) != str(os.getpid()):
        _end_with_parent()
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        log_finished_requests(Path(options.out))
        log_stop_strings(Path(options.out))
        extend_shutdown_timeout()
    if live is not None:
        _expose(live)
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    attach_to(WorkerWrapperBase)


def _options() -> tuple[CaptureOptions, LiveOptions | None] | None:
    """What to record, and what to count; None if both are off.

    To count, buffers and hooks are needed as for a capture that records nothing.
    """
    from profiler.capture.options import CaptureOptions
    from profiler.live.options import LiveOptions

    environment = dict(os.environ)
    capture, live = CaptureOptions.from_environment(environment), LiveOptions.from_environment(environment)
    return None if capture is None and live is None else (capture or CaptureOptions(), live)


def _expose(live: LiveOptions) -> None:
    """Make the folder in which the engine's processes publish, unless a parent process has, and serve what is in it."""
    from profiler.live.options import FOLDER_VARIABLE
    from vllm_patch.live.exposition import expose, serve_metrics

    is_first = FOLDER_VARIABLE not in os.environ
    if is_first:
        # All processes of the engine inherit the variable.
        os.environ[FOLDER_VARIABLE] = folder = tempfile.mkdtemp(prefix="specmoe-live-")
        atexit.register(_remove, folder, os.getpid())
    folder_path = Path(os.environ[FOLDER_VARIABLE])
    expose(folder_path)
    if is_first and live.host_and_port is not None:
        serve_metrics(folder_path, *live.host_and_port)


def _remove(folder: str, owner: int) -> None:
    # Forked processes inherit the exit handler, but not the folder.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


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
        from vllm_patch.worker import WorkerCapture

        result = init_device(self, *args, **kwargs)
        if (options := _options()) is not None:
            WorkerCapture(self.worker, *options)
        return result

    # Marks the method as wrapped. mypy: functions accept attributes, but their type does not declare them.
    init_device_and_attach.specmoe_original = init_device  # type: ignore[attr-defined]
    worker_wrapper.init_device = init_device_and_attach
