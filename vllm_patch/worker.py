"""Capture in one vLLM worker: attach a recorder when the model is loaded, record steps, and answer the collector's calls."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiler.capture.metadata import captured_metadata, describe_kernels
from profiler.capture.options import CaptureOptions
from profiler.capture.protocol import LIVE, START, STATUS, STOP
from profiler.live.options import LiveOptions
from profiler.models.resolve import loaded_model
from profiler.trace.schema import GATES_FILE, Metadata
from vllm_patch.capture.recorder import Recorder
from vllm_patch.serving.server import Sealer, begin_trace, next_trace

if TYPE_CHECKING:
    from vllm_patch.live.counter import LiveCounter
    from vllm_patch.releases import Hook
    from vllm_patch.routers.kernels import KernelChoices

log = logging.getLogger("vllm.specmoe")

# The worker's methods that replace the weights of the loaded model.
WEIGHT_CHANGES = ("reload_weights", "update_weights", "reset_weights")


class WorkerCapture:
    """Capture in one vLLM worker: wraps its `load_model`, `execute_model` and `shutdown`, and answers the collector's calls.

    Warm-up and profiling runs bypass `Worker.execute_model`, so they are never recorded. A model or setting that cannot be
    recorded does not stop the engine: every call returns the reason.
    """

    def __init__(self, worker: Any, options: CaptureOptions, live: LiveOptions | None = None) -> None:
        self._worker = worker
        self._options = options
        self._live_options = live
        self._counter: LiveCounter | None = None
        self._recorder: Recorder | None = None
        self._facts: dict[str, Any] = {}
        self._refusal: str | None = None
        self._sealer: Sealer | None = None
        self._load_model = worker.load_model
        self._execute_model = worker.execute_model
        self._shutdown = worker.shutdown
        worker.load_model = self.load_model
        worker.execute_model = self.execute_model
        worker.shutdown = self.shutdown
        for name in WEIGHT_CHANGES:
            if hasattr(worker, name):
                setattr(worker, name, self._ending_capture(name, getattr(worker, name)))
        setattr(worker, START, self.start)
        setattr(worker, STATUS, self.status)
        setattr(worker, STOP, self.stop)
        setattr(worker, LIVE, self.live)

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model, then allocate buffers and wrap the routers, before memory profiling and compilation."""
        from vllm_patch.routers.kernels import recordable_kernels

        hook: Hook | None = None
        with self._refusing():
            hook = self._find_hook()
        # Old kernels of CPUs are hooked although they select experts internally.
        choosing = hook is not None and hook.owner != "module"
        with recordable_kernels() if choosing else contextlib.nullcontext() as kernels:
            result = self._load_model(*args, **kwargs)
        # With tensor parallelism every rank computes the same routing.
        if self._worker.vllm_config.parallel_config.rank == 0:
            if hook is not None:
                with self._refusing():
                    self._attach(hook, kernels)
            if self._live_options is not None:
                self._count(self._live_options)
            if self._options.out:
                self._serve()
        return result

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the step, then pass its rows to the recorder and to the live counts."""
        from vllm_patch.capture.steps import label_rows

        result = self._execute_model(scheduler_output, *args, **kwargs)
        recorder, counter = self._recorder, self._counter
        recording = recorder is not None and recorder.recording
        if recording or counter is not None:
            # No error of ours may disturb the engine's requests.
            try:
                step, snapshot = label_rows(self._worker.model_runner, scheduler_output), None
                if recorder is not None and recording:
                    snapshot = recorder.record(step)
                if counter is not None:
                    counter.offer(step, snapshot)
            except Exception as error:
                if recorder is not None and recording:
                    recorder.fail(error)
                if counter is not None:
                    counter.fail(error)
        return result

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """Close a server's recording and the live counts, then shut down."""
        if self._counter is not None:
            self._counter.close()
            self._counter = None
        if self._options.out and self._recorder is not None and self._recorder.recording:
            answer = self._recorder.stop()
            if "error" in answer:
                log.error("capture failed: %s", answer["error"])
            elif self._sealer is not None:
                self._sealer.wait()
        return self._shutdown(*args, **kwargs)

    def start(self, directory: str, hidden_tokens: int | None = None) -> dict[str, Any]:
        """Begin recording into `directory`. Returns facts of the loaded model, or `error`.

        hidden_tokens: the token budget for router inputs; default: the one in the engine's options.
        """
        if self._refusal is not None:
            return {"error": self._refusal}
        if self._recorder is None:
            return {"rank": self._worker.rank}
        answer = self._recorder.start(Path(directory), hidden_tokens)
        if "error" in answer:
            return answer
        try:
            self._save_gates(Path(directory))
        except Exception as error:
            self._recorder.stop()
            return {"error": f"the routers' weights cannot be saved: {error}"}
        return {**answer, **self._facts}

    def status(self) -> dict[str, Any]:
        """While recording, the recorder's status; otherwise facts of the loaded model. With `error`, if there is one."""
        if self._refusal is not None:
            return {"error": self._refusal}
        if self._recorder is None:
            return {"rank": self._worker.rank}
        return self._recorder.status() if self._recorder.recording else {**self._recorder.facts(), **self._facts}

    def stop(self) -> dict[str, Any]:
        """Write all queued rows and stop recording. Returns the final status."""
        return self._recorder.stop() if self._recorder is not None else {}

    def live(self) -> dict[str, Any]:
        """The live metrics as a `LiveAnswer`, once everything that was computed is counted; or `error`."""
        if self._refusal is not None and self._counter is None:
            return {"error": self._refusal}
        if self._counter is None:
            return {"rank": self._worker.rank} if self._live_options else {"error": "start the engine with SPECMOE_LIVE=1"}
        return {"publication": self._counter.publication().to_json()}

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """An error in the block does not stop the engine: it becomes the reason why nothing can be recorded."""
        from vllm_patch.releases import UnsupportedReleaseError
        from vllm_patch.routers.hook import UnsupportedModelError

        try:
            yield
        except (UnsupportedModelError, UnsupportedReleaseError) as refusal:
            self._refusal = str(refusal)
        except Exception as error:
            # An unexpected kind of model must not stop a server.
            self._refusal = f"the recorder does not support this model: {type(error).__name__}: {error}"

    def _ending_capture(self, name: str, change_weights: Callable[..., Any]) -> Callable[..., Any]:
        """A method that ends the capture before it changes the weights: a trace is of one model, which its metadata names."""

        @functools.wraps(change_weights)
        def end_capture_and_change(*args: Any, **kwargs: Any) -> Any:
            # The first reason stays: reload_weights calls load_weights.
            self._refusal = self._refusal or f"{name} changed the loaded weights: start the engine again to record it"
            if self._recorder is not None and self._recorder.recording and not self._recorder.ended:
                log.error("routing is no longer recorded: %s", self._refusal)
                # Everything that is queued was computed with the weights that the metadata names.
                self._recorder.end(RuntimeError(self._refusal))
            return change_weights(*args, **kwargs)

        return end_capture_and_change

    def _count(self, options: LiveOptions) -> None:
        """Count until shutdown. If that is impossible, the reason is logged and the engine continues."""
        from vllm_patch.live.start import start_counter

        if self._refusal is not None or self._recorder is None:
            log.error("routing is not counted: %s", self._refusal)
            return
        try:
            self._counter = start_counter(self._recorder, self._worker.vllm_config, options)
        except Exception as error:
            log.error("routing is not counted: %s: %s", type(error).__name__, error)

    def _serve(self) -> None:
        """Record until shutdown. If that is impossible, the reason is logged and the server continues."""
        out, options = Path(self._options.out), self._options
        error = self._refusal
        if error is None and self._recorder is not None:
            try:
                # Only once, now: later traces must not depend on the hub, nor run gates while the engine runs steps.
                metadata = self._metadata()
                self._save_gates(out)
                sealer = self._sealer = Sealer()

                def begin() -> Path:
                    directory = next_trace(out)
                    capture = begin_trace(directory, metadata)
                    sealer.opened(directory)
                    capture.mkdir(parents=True)
                    if options.logits or options.hidden_layers:
                        shutil.copyfile(out / GATES_FILE, capture / GATES_FILE)
                    return capture

                def end(capture: Path) -> None:
                    sealer.closed(capture.parent.parent)

                error = self._recorder.start_rotating(begin, end, options.rotate_megabytes << 20).get("error")
            except Exception as reason:
                error = f"{type(reason).__name__}: {reason}"
        if error is not None:
            log.error("routing is not recorded: %s", error)
        elif self._recorder is not None:
            sizes = [self._recorder.facts()[name] / 1e6 for name in ("device_bytes", "host_bytes")]
            log.warning("recording routing into %s: buffers of %.1f MB on the device, at most %.0f MB on the host", out, *sizes)
            for line in describe_kernels(self._facts["moe_kernels"], replaced_only=True):
                log.warning("%s", line)

    def _metadata(self) -> Metadata:
        import vllm

        from vllm_patch.routers.speculative import describe_speculation

        assert self._recorder is not None
        config = self._worker.vllm_config.model_config
        facts = {name: getattr(self._recorder, name) for name in ("moe_layers", "num_experts", "top_k")}
        model = loaded_model(config.model, config.revision, facts)
        return captured_metadata(
            model,
            {**facts, "dtype": str(config.dtype).removeprefix("torch.")},
            engine="vllm",
            versions={"vllm": vllm.__version__},
            hook=self._facts["hook"],
            capture={
                "server": True,
                "moe_kernels": self._facts["moe_kernels"],
                "prefix_caching": bool(self._worker.vllm_config.cache_config.enable_prefix_caching),
                "tokenizer": None if config.skip_tokenizer_init else config.tokenizer,
                "logits": self._options.logits,
                "hidden_layers": list(self._options.hidden_layers),
            }
            | describe_speculation(self._worker.vllm_config),
        )

    def _save_gates(self, directory: Path) -> None:
        """Save the routers' weights if router inputs or logits are recorded."""
        if self._options.logits or self._options.hidden_layers:
            from vllm_patch.routers.gates import save_gates

            size = self._worker.vllm_config.model_config.get_hidden_size()
            save_gates(self._worker.model_runner.get_model(), self._layers, size, directory / GATES_FILE)

    def _find_hook(self) -> Hook:
        import vllm
        from vllm.platforms import current_platform

        from vllm_patch.releases import resolve_hook
        from vllm_patch.routers.hook import refuse_unsupported
        from vllm_patch.routers.speculative import refuse_unsupported_speculation

        refuse_unsupported(self._worker.vllm_config)
        hook = resolve_hook(vllm.__version__, cpu=current_platform.is_cpu())
        refuse_unsupported_speculation(self._worker.vllm_config, hook)
        return hook

    def _attach(self, hook: Hook, kernels: KernelChoices | None) -> None:
        import vllm

        from vllm_patch.capture.buffers import CaptureBuffers
        from vllm_patch.releases import is_known
        from vllm_patch.routers.deviations import find_deviations
        from vllm_patch.routers.hook import UnsupportedModelError, attach, find_moe_layers, source_is_patched

        config, options = self._worker.vllm_config, self._options
        self._layers = layers = find_moe_layers(self._worker.model_runner.get_model(), hook, kernels)
        indices = [layer.index for layer in layers]
        absent = sorted(set(options.hidden_layers) - set(indices))
        if absent:
            raise UnsupportedModelError(
                f"router inputs of layer {absent[0]}: not an MoE layer; expected layers among {indices[0]}..{indices[-1]}"
            )
        if options.hidden_layers and any(getattr(x.module, "routed_input_transform", None) is not None for x in layers):
            raise UnsupportedModelError("router inputs: this model's experts get a different input than its router")
        if (options.hidden_layers or options.logits) and any(hasattr(x.module, "_moe_state") for x in layers):
            raise UnsupportedModelError(
                "router inputs and logits: this model's routers run in transformers' code, which passes vLLM only their choice"
            )
        model = self._worker.model_runner.get_model()
        # Programs for reinforcement learning also pass new weights to the model itself.
        model.load_weights = self._ending_capture("load_weights", model.load_weights)
        buffers = CaptureBuffers(
            max_tokens=_most_tokens(config),
            layers=len(layers),
            num_experts=layers[0].num_experts,
            top_k=layers[0].top_k,
            device=self._worker.device,
            logits=options.logits,
            hidden_layers=tuple(indices.index(layer) for layer in options.hidden_layers),
            hidden_size=config.model_config.get_hidden_size(),
        )
        for position, layer in enumerate(layers):
            attach(hook, layer, buffers.copy_of_layer(position, layer.output_scale))
        how = "vLLM's patched source" if source_is_patched(hook) else "wrapped when loaded"
        if not is_known(vllm.__version__):
            how += f", release {vllm.__version__} unknown, checked on the first step"
        used = dict.fromkeys(layer.kernel for layer in layers)
        deviations = find_deviations(layers)
        self._facts = {
            "hook": "; ".join([f"{hook.name}, {how}", *deviations]),
            "known_release": is_known(vllm.__version__),
            "moe_kernels": {kernel: kernels.replaced(kernel) if kernels is not None else None for kernel in used},
            "deviations": deviations,
        }
        self._recorder = Recorder(
            buffers,
            moe_layers=indices,
            num_experts=layers[0].num_experts,
            top_k=layers[0].top_k,
            hidden_layers=options.hidden_layers,
            hidden_tokens=options.hidden_tokens,
        )


def _most_tokens(config: Any) -> int:
    """The largest number of rows in a forward pass: a step's token limit, padded for CUDA graphs and tensor parallelism."""
    graphs = getattr(config.compilation_config, "cudagraph_capture_sizes", None) or [0]
    most = int(max(config.scheduler_config.max_num_batched_tokens, *graphs))
    ranks = int(config.parallel_config.tensor_parallel_size)
    return -(-most // ranks) * ranks
