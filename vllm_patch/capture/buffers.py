"""Static device buffers that the hooks fill in every forward pass, and snapshots of them after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_patch.routers.hook import Copy

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Snapshot:
    """The rows of one step, being copied to the host. `arrays` waits until the copy is done."""

    tensors: dict[str, torch.Tensor]
    copied: Any = None

    @property
    def nbytes(self) -> int:
        """Size on the host."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def arrays(self) -> Arrays:
        """The rows as arrays `[T, L, W]`, by name; `input_ids` are `[T]`."""
        if self.copied is not None:
            self.copied.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


class CaptureBuffers:
    """Buffers `[max_tokens, L, W]` at fixed addresses: expert ids and weights, and optionally logits and router inputs.

    They are allocated once, before the engine measures memory and captures CUDA graphs. W is K for expert ids and weights.

    logits: whether to record router logits, with W = E, of all layers.
    hidden_layers: positions (among the L layers) of the layers whose router inputs are recorded, with W = hidden_size.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        layers: int,
        num_experts: int,
        top_k: int,
        device: torch.device | str,
        logits: bool = False,
        hidden_layers: tuple[int, ...] = (),
        hidden_size: int = 0,
    ) -> None:
        self._device = torch.device(device)
        self._hidden_layers = hidden_layers
        self._hidden_size = hidden_size
        self._num_experts = num_experts
        id_type = torch.int16 if num_experts <= np.iinfo(np.int16).max else torch.int32

        def buffer(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((max_tokens, count, width), dtype=dtype, device=self._device)

        self.tensors = {"expert_ids": buffer(layers, top_k, id_type), "weights": buffer(layers, top_k, torch.float16)}
        if logits:
            self.tensors["logits"] = buffer(layers, num_experts, torch.float16)
        if hidden_layers:
            self.tensors["hidden"] = buffer(len(hidden_layers), hidden_size, torch.float16)
        # -1 is not a valid expert id: it marks rows that no hook wrote in this step, and the writer rejects them.
        self.clear()
        # mypy: PyTorch leaves streams and events without annotations.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call] # as below

    @property
    def nbytes(self) -> int:
        """Size on the device."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def clear(self) -> None:
        """Mark every row as unwritten."""
        self.tensors["expert_ids"].fill_(-1)

    def copy_of_layer(self, position: int, output_scale: float = 1.0) -> Copy:
        """The function that the hook of the MoE layer at `position` (of L) calls.

        It runs unconditionally and on the device, without allocation or Python state, so that compilers can inline it and CUDA
        graphs can replay it.

        output_scale: a factor that the model applies to the experts' output and that the router's weights do not include.
        """
        ids_TK = self.tensors["expert_ids"][:, position]
        weights_TK = self.tensors["weights"][:, position]

        def copy_pairs(_hidden: torch.Tensor, _logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
            ids_TK[: ids.shape[0]].copy_(ids)
            weights_TK[: weights.shape[0]].copy_(weights)

        def copy_scaled(_hidden: torch.Tensor, _logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
            ids_TK[: ids.shape[0]].copy_(ids)
            weights_TK[: weights.shape[0]].copy_(weights * output_scale)

        copies: list[Copy] = [copy_pairs if output_scale == 1.0 else copy_scaled]
        if "logits" in self.tensors:
            logits_TE = self.tensors["logits"][:, position]
            experts = self._num_experts

            def copy_logits(_hidden: torch.Tensor, logits: torch.Tensor, _weights: torch.Tensor, _ids: torch.Tensor) -> None:
                logits_TE[: logits.shape[0]].copy_(logits[:, :experts])

            copies.append(copy_logits)
        if position in self._hidden_layers:
            hidden_TD = self.tensors["hidden"][:, self._hidden_layers.index(position)]
            size = self._hidden_size

            def copy_hidden(hidden: torch.Tensor, _logits: torch.Tensor, _weights: torch.Tensor, _ids: torch.Tensor) -> None:
                hidden_TD[: hidden.shape[0]].copy_(hidden[:, :size])

            copies.append(copy_hidden)
        return copies[0] if len(copies) == 1 else _all(copies)

    def snapshot(
        self,
        rows: int,
        *,
        hidden: bool = False,
        names: Sequence[str] | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> Snapshot:
        """Copy the first `rows` rows of a finished step, then mark them as unwritten.

        On a GPU, the copy to pinned memory runs on its own stream and overlaps the next step.

        names: the buffers to copy; default: all, router inputs only if `hidden`.
        input_ids: the runner's tensor of vocabulary ids; its first `rows` values are copied, too.
        """
        if names is None:
            names = [name for name in self.tensors if hidden or name != "hidden"]
        copies = {name: self.tensors[name][:rows].clone() for name in names}
        if input_ids is not None:
            copies["input_ids"] = input_ids[:rows].clone()
        self.tensors["expert_ids"][:rows].fill_(-1)
        if self._stream is None:
            return Snapshot(copies)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host = {}
            for name, tensor in copies.items():
                # The allocator must not reuse this memory before the copy stream has read it.
                tensor.record_stream(self._stream)
                host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host[name].copy_(tensor, non_blocking=True)
            # mypy: as above.
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call] # PyTorch leaves it without annotations
            copied.record(self._stream)
        return Snapshot(host, copied)


def _all(copies: list[Copy]) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]:
    def copy(hidden: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        for one in copies:
            one(hidden, logits, weights, ids)

    return copy
