"""Run a model whose experts do not fit on the device: they are in host memory or on disk, and a cache of them on the device.

- `storage`: an expert in memory, in a checkpoint's files, and where it is read from.
- `slots`, `transfers`: the memory on the device, and the thread that fills it: demand loads first, then prefetches.
- `forward`, `experts`: the computation of experts in any order, and what happens in an MoE layer.
- `steps`, `foresight`: the tokens of a forward pass, and what is predicted from them.
- `options`, `model_loading`: what a user chooses, and a `transformers` model without its experts.
- `generation`: batches of prompts, continued.
- `assembly`, `model`: how the model gets at its experts, and `OffloadedModel`, which is all of it.
- `recording`, `agreement`, `memory`: the trace of a run, its simulation, and the memory that it took.
"""

from __future__ import annotations

from speculation.runtime.generation import Generation
from speculation.runtime.model import OffloadedModel
from speculation.runtime.options import CacheSize

__all__ = ["CacheSize", "Generation", "OffloadedModel"]
