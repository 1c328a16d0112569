"""The memory on the device in which experts are computed: a pool of slots, and two buffers for those that find no room."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from speculation.runtime.layout import ExpertLayout, allocate
from speculation.runtime.packing import unpack

# Experts of a prompt for which the cache has no room go through these: one is computed while the other is filled.
BUFFERS = 2


class Slots:
    """Slots for experts on the device.

    Args:
        layouts: The layout of each layer's experts.
        capacities: Slots of each layer.
        device: Where they are.
        unpacked: The type in which packed experts are computed; None if they are not packed.

    Attributes:
        bytes: Their size, buffers included.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        capacities: Sequence[int],
        device: torch.device,
        unpacked: torch.dtype | None = None,
    ) -> None:
        self.device, self._unpacked = device, unpacked
        pools = [allocate(layout, count, device) for layout, count in zip(layouts, capacities, strict=True)]
        # Each kind of layer has buffers of its own.
        self._buffers = {layout: allocate(layout, BUFFERS, device) for layout in layouts}
        self._memory = [memory_B for pool in pools for memory_B in pool]
        self._views = [layout.views(memory_B) for layout, pool in zip(layouts, pools, strict=True) for memory_B in pool]
        self._layouts = layouts
        self.bytes = sum(pool.numel() for pool in (*pools, *self._buffers.values()))

    def memory(self, layer: int, slot: int) -> torch.Tensor:
        """uint8 `[bytes]` of a slot; of a buffer of a layer, numbered from -1 down, if it is negative."""
        return self._memory[slot] if slot >= 0 else self._buffers[self._layouts[layer]][-1 - slot]

    def weights(self, layer: int, slot: int) -> dict[str, torch.Tensor]:
        """The weights of the expert in a slot or buffer, by name; unpacked, if they are packed."""
        if slot < 0:
            return self.weights_in(layer, self.memory(layer, slot))
        return self._views[slot] if self._unpacked is None else unpack(self._views[slot], self._unpacked)

    def weights_in(self, layer: int, memory_B: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same of a layer's expert in other memory, uint8 `[bytes]`."""
        found = self._layouts[layer].views(memory_B)
        return found if self._unpacked is None else unpack(found, self._unpacked)
