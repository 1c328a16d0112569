"""The memory on the device in which experts are computed: a pool of slots, two buffers for those that find no room, and a
workspace in which packed experts are unpacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from speculation.runtime.storage.layout import ExpertLayout, Weights, allocate

# Experts of a prompt for which the cache has no room go through these: one is computed while the other is filled.
BUFFERS = 2


class Slots:
    """Slots for experts on the device.

    Args:
        layouts: The layout of each layer's experts.
        capacities: Slots of each layer.
        device: Where they are.

    Attributes:
        bytes: Their size, buffers and workspace included, and what unpacking takes in between.
    """

    def __init__(self, layouts: Sequence[ExpertLayout], capacities: Sequence[int], device: torch.device) -> None:
        self.device = device
        pools = [allocate(layout, count, device) for layout, count in zip(layouts, capacities, strict=True)]
        # Each kind of layer has buffers of its own.
        self._buffers = {layout: allocate(layout, BUFFERS, device) for layout in layouts}
        self._memory = [memory_B for pool in pools for memory_B in pool]
        self._views = [layout.views(memory_B) for layout, pool in zip(layouts, pools, strict=True) for memory_B in pool]
        self._layouts = layouts
        self._workspaces = {(plain, device): _workspace(plain, device) for plain in _unpacked(layouts)}
        self.bytes = sum(pool.numel() for pool in pools) + bytes_besides_slots(layouts)

    def memory(self, layer: int, slot: int) -> torch.Tensor:
        """uint8 `[bytes]` of a slot; of a buffer of a layer, numbered from -1 down, if it is negative."""
        return self._memory[slot] if slot >= 0 else self._buffers[self._layouts[layer]][-1 - slot]

    def weights(self, layer: int, slot: int) -> Weights:
        """The weights of the expert in a slot or buffer, by name. If they are packed: unpacked, until the next call."""
        if slot < 0:
            return self.weights_in(layer, self.memory(layer, slot))
        return self._computed(layer, self._views[slot], self.device)

    def weights_in(self, layer: int, memory_B: torch.Tensor) -> Weights:
        """The same of a layer's expert in other memory, uint8 `[bytes]`."""
        return self._computed(layer, self._layouts[layer].views(memory_B), memory_B.device)

    def _computed(self, layer: int, kept: Weights, device: torch.device) -> Weights:
        packing = self._layouts[layer].packing
        if packing is None:
            return kept
        place = (packing.plain, device)
        if place not in self._workspaces:
            # The host's, for experts that it computes for a GPU.
            self._workspaces[place] = _workspace(*place)
        unpacked = self._workspaces[place]
        packing.unpack(kept, unpacked)
        return unpacked


def bytes_besides_slots(layouts: Sequence[ExpertLayout]) -> int:
    """Bytes on the device besides the slots: buffers, workspaces, and what unpacking takes in between, one expert at a time."""
    buffers = sum(BUFFERS * layout.bytes for layout in dict.fromkeys(layouts))
    scratch = max((layout.packing.scratch_bytes for layout in layouts if layout.packing is not None), default=0)
    return buffers + sum(plain.bytes for plain in _unpacked(layouts)) + scratch


def _unpacked(layouts: Sequence[ExpertLayout]) -> list[ExpertLayout]:
    """The kinds of experts that are unpacked."""
    return list(dict.fromkeys(layout.packing.plain for layout in layouts if layout.packing is not None))


def _workspace(plain: ExpertLayout, device: torch.device) -> Weights:
    return plain.views(allocate(plain, 1, device)[0])
