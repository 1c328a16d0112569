"""The vLLM plugin: attach a recorder to every worker that vLLM creates.

vLLM calls `register` in the main process, the engine core and each worker. The worker then offers three calls to
`LLM.collective_rpc`: `specmoe_start(directory)`, `specmoe_status()` and `specmoe_stop()`.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from vllm_patch.hook import UnsupportedModelError, refuse_unsupported, wrap_routers
from vllm_patch.recorder import Recorder
from vllm_patch.steps import label_rows

ENVIRONMENT_VARIABLE = "SPECMOE_CAPTURE"


def register() -> None:
    """Entry point. Cheap and idempotent; patches nothing unless SPECMOE_CAPTURE=1."""
    if os.environ.get(ENVIRONMENT_VARIABLE) != "1":
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device
    if hasattr(init_device, "specmoe_original"):
        return

    # Not `init_worker`: in a worker process vLLM loads its plugins from inside that call.
    @functools.wraps(init_device)
    def init_device_and_attach(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = init_device(self, *args, **kwargs)
        WorkerCapture(self.worker)
        return result

    # Marks the method as wrapped. mypy: functions take attributes, their type does not say so.
    init_device_and_attach.specmoe_original = init_device  # type: ignore[attr-defined]
    WorkerWrapperBase.init_device = init_device_and_attach


class WorkerCapture:
    """Capture in one vLLM worker: wraps the worker's `load_model` and `execute_model`, and answers its calls.

    Warm-up and profiling runs go past `Worker.execute_model` and so are never recorded. A model or setting that cannot be
    recorded does not stop the engine: the reason is kept and answered by `specmoe_start`.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._recorder: Recorder | None = None
        self._refusal: str | None = None
        self._load_model = worker.load_model
        self._execute_model = worker.execute_model
        worker.load_model = self.load_model
        worker.execute_model = self.execute_model
        worker.specmoe_start = self.start
        worker.specmoe_status = self.status
        worker.specmoe_stop = self.stop

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load, then allocate buffers and wrap the routers: before memory profiling and compilation."""
        result = self._load_model(*args, **kwargs)
        config = self._worker.vllm_config
        # With tensor parallelism every rank computes the same routing.
        if config.parallel_config.rank == 0:
            try:
                refuse_unsupported(config)
                self._recorder = wrap_routers(
                    self._worker.model_runner.get_model(),
                    max_tokens=config.scheduler_config.max_num_batched_tokens,
                    device=self._worker.device,
                )
            except UnsupportedModelError as refusal:
                self._refusal = str(refusal)
        return result

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the step, then hand its rows to the recorder."""
        result = self._execute_model(scheduler_output, *args, **kwargs)
        if self._recorder is not None and self._recorder.recording:
            self._recorder.record(label_rows(self._worker.model_runner, scheduler_output))
        return result

    def start(self, directory: str) -> dict[str, Any]:
        """Begin recording into `directory`. Answers facts of the loaded model, or `error`."""
        if self._refusal is not None:
            return {"error": self._refusal}
        if self._recorder is None:
            return {"rank": self._worker.rank}
        return self._recorder.start(Path(directory))

    def status(self) -> dict[str, Any]:
        """Answers `error` if the writer has failed."""
        return self._recorder.status() if self._recorder is not None else {}

    def stop(self) -> dict[str, Any]:
        """Write everything out. Answers `rows`, and `error` if the writer failed."""
        return self._recorder.stop() if self._recorder is not None else {}
