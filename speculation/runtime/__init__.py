"""Run a model whose experts do not fit on the device: they are in host memory or on disk, and a cache of them on the device.

- `layout`, `checkpoint`, `expert_stores`: an expert in memory, in a checkpoint's files, and where it is read from.
- `slots`, `transfers`: the memory on the device, and the thread that fills it: demand loads first, then prefetches.
- `forward`, `experts`: the computation of experts in any order, and what happens in an MoE layer.
- `steps`, `foresight`: the tokens of a forward pass, and what is predicted from them.
- `model_loading`, `model`: a `transformers` model without its experts, and `OffloadedModel`, which puts all of it together.
"""

from __future__ import annotations

from speculation.runtime.model import CacheSize, Generation, OffloadedModel

__all__ = ["CacheSize", "Generation", "OffloadedModel"]
