"""The router inputs of a trace (`hidden/`) and the routers' weights (`gates.safetensors`), for predictors that need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import EmptyPartError, TraceError, first_line
from profiler.trace.reader import Trace
from profiler.trace.schema import GATES_FILE, HIDDEN_FOLDER, RoutingChunk

MAX_GATE_BYTES = 1 << 30
MAX_HIDDEN_BYTES = 16 << 30


@dataclass(frozen=True)
class RouterInputs:
    """The hidden states that the routers received, and the routers' weights.

    hidden_TLD: float16 `[T, L, D]`, the input of each layer's router.
    weight_LED: `[L, E, D]`, the routers' weights.
    bias_LE: `[L, E]`, the routers' biases; zeros if the model has none.
    correction_LE: `[L, E]`, the correction that is added to the sigmoid scores before experts are selected; None if the model
    has none.
    """

    hidden_TLD: npt.NDArray[np.float16]
    weight_LED: npt.NDArray[np.float32]
    bias_LE: npt.NDArray[np.float32]
    correction_LE: npt.NDArray[np.float32] | None

    def of_tokens(self, tokens: npt.NDArray[Any]) -> RouterInputs:
        """Select some tokens, by a boolean mask or by indices."""
        return RouterInputs(self.hidden_TLD[tokens], self.weight_LED, self.bias_LE, self.correction_LE)


def with_router_inputs(trace: Trace, chunk: RoutingChunk) -> tuple[RoutingChunk, RouterInputs]:
    """Keep the problems of `chunk` whose router inputs were recorded, and read those router inputs.

    Raises `TraceError` if the trace has no router inputs, if they do not cover all MoE layers, or if they exceed
    MAX_HIDDEN_BYTES. Raises `EmptyPartError` if none of these problems has router inputs.
    """
    layers = list(trace.metadata.model.moe_layers)
    how = f"collect it again with capture_hidden {','.join(map(str, layers))}"
    if not (trace.path / HIDDEN_FOLDER).is_dir() or not (trace.path / GATES_FILE).is_file():
        raise TraceError(f"{trace.path} has no router inputs ({HIDDEN_FOLDER}/ and {GATES_FILE}): {how}")
    wanted = np.unique(chunk.problem_ids_T)
    ids, found_layers, pieces, size = [], [], [], 0
    for ids_N, layers_N, values_ND in trace.value_rows(HIDDEN_FOLDER, range(int(wanted[0]), int(wanted[-1]) + 1)):
        chosen = np.isin(ids_N, wanted)
        if chosen.any():
            ids.append(ids_N[chosen])
            found_layers.append(layers_N[chosen])
            pieces.append(values_ND[chosen])
            size += pieces[-1].nbytes
        if size > MAX_HIDDEN_BYTES:
            raise TraceError(f"{trace.path}: its router inputs take more than {MAX_HIDDEN_BYTES >> 30} GiB")
    if not pieces:
        # Router inputs are recorded up to a limit of tokens, which ends at the end of a problem.
        raise EmptyPartError(f"{trace.path} has no router inputs for any of these problems: {how} and more hidden_tokens")
    all_ids, all_layers = np.concatenate(ids), np.concatenate(found_layers)
    if len(all_layers) % len(layers) or (all_layers.reshape(-1, len(layers)) != layers).any():
        raise TraceError(f"{trace.path} has router inputs of layers {sorted(set(all_layers.tolist()))}, expected all: {how}")
    kept = np.isin(chunk.problem_ids_T, all_ids)
    if not np.array_equal(chunk.problem_ids_T[kept], all_ids[:: len(layers)]):
        raise TraceError(f"{trace.path}: some problems have router inputs for different tokens than routing")
    hidden_TLD = np.concatenate(pieces).reshape(-1, len(layers), pieces[0].shape[1])
    return chunk.take(kept), RouterInputs(hidden_TLD, *_gates(trace, layers, hidden_TLD.shape[2]))


def _gates(trace: Trace, layers: list[int], width: int) -> tuple[Any, Any, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, experts = trace.path / GATES_FILE, trace.metadata.model.num_experts
    try:
        if path.stat().st_size > MAX_GATE_BYTES:
            raise TraceError(f"{path} is larger than {MAX_GATE_BYTES >> 30} GiB, the limit for routers' weights")
        tensors = {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise TraceError(f"{path} cannot be read: {first_line(error)}") from error

    def stacked(name: str, shape: tuple[int, ...], default: float | None) -> npt.NDArray[np.float32] | None:
        found = [tensors.get(f"layers.{layer}.{name}") for layer in layers]
        if all(each is None for each in found):
            return None if default is None else np.full((len(layers), *shape), default, dtype=np.float32)
        for layer, each in zip(layers, found, strict=True):
            if each is None or each.shape != shape or not np.isfinite(each).all():
                raise TraceError(f"{path}: 'layers.{layer}.{name}', expected finite numbers of shape {shape}")
        return np.stack([each for each in found if each is not None])

    weight = stacked("weight", (experts, width), None)
    if weight is None:
        raise TraceError(f"{path} has no router weights for layers {layers}")
    return weight, stacked("bias", (experts,), 0.0), stacked("e_score_correction_bias", (experts,), None)
